"""The PyTorch twins of the kernels of a round but attention: the definition of correct."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kernels.tiles import Items


class Accepted(NamedTuple):
    """What was accepted of B trees, on the device.

    num_accepted: [B] int64.  next_token: [B] int64, -1 where no law could be made of its row.
    path: [B, N - 1] int64, the accepted nodes in order of depth, root excluded, then zeros.
    """

    num_accepted: Tensor
    next_token: Tensor
    path: Tensor


class TreeRows(NamedTuple):
    """The packed rows of a batch of trees, R of them, padding included, on the device.

    tokens, slots, row_of: [R] int64, where each row is written and the cache row it belongs to.  place: [B, N] int64, the packed
    row of node n of request b; padding repeats the root's.  items: what attention is told of them.
    """

    tokens: Tensor
    slots: Tensor
    row_of: Tensor
    place: Tensor
    items: Items


def empty_rows(batch: int, nodes: int, rows: int, most_slots: int, device: torch.device) -> TreeRows:
    """Room for the rows of trees of at most so many nodes; words for whole powers of two."""
    words = 1 << (-(-nodes // 64) - 1).bit_length()
    flat = torch.empty(4, rows, dtype=torch.int64, device=device)
    bits = torch.empty(rows, words, dtype=torch.int64, device=device)
    offsets = torch.zeros(batch, 64 * words, dtype=torch.int64, device=device)
    table = torch.zeros(batch, 6, dtype=torch.int64, device=device)
    items = Items(table, flat[1], min(nodes, rows), most_slots, bits, offsets)
    return TreeRows(flat[0], flat[2], flat[3], torch.empty(batch, nodes, dtype=torch.int64, device=device), items)


def tree_rows(
    tokens: Tensor, parents: Tensor, num_nodes: Tensor, lengths: Tensor, rows: int, most_slots: int, scratch: int
) -> TreeRows:
    """Twin of `tree_rows.tree_rows`, node by node."""
    batch, nodes = tokens.shape
    out = empty_rows(batch, nodes, rows, most_slots, tokens.device)
    bits, offsets = out.items.bits, out.items.offsets
    assert bits is not None
    assert offsets is not None
    out.tokens.zero_(), out.items.positions.zero_(), out.row_of.zero_(), out.slots.fill_(scratch), bits.zero_()
    bits[:, 0] = 1
    first = 0
    for b, (size, length) in enumerate(zip(num_nodes.tolist(), lengths.tolist(), strict=True)):
        out.items.table[b] = torch.tensor([first, size, b, 0, length, length + size])
        out.place[b] = torch.tensor([first + (n if n < size else 0) for n in range(nodes)])
        seen: list[list[int]] = []
        for n in range(size):
            seen.append([*(seen[int(parents[b, n])] if n else []), n])
            row, depth = first + n, len(seen[n]) - 1
            out.tokens[row], out.items.positions[row], offsets[b, n] = tokens[b, n], length + depth, depth
            out.slots[row], out.row_of[row] = length + n, b
            for word in range(bits.shape[1]):
                value = sum(1 << (m % 64) for m in seen[n] if m // 64 == word)
                bits[row, word] = value - (1 << 64) if value >> 63 else value
        first += size
    return out


def kv_compact(cache: Tensor, lengths: Tensor, paths: Tensor, counts: Tensor) -> None:
    """Twin of `kv_compact.kv_compact`: all moves of a request are read before any is written."""
    for request, (length, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
        source = length + paths[request, :count]
        kept = cache[:, :, request].index_select(3, source)
        cache[:, :, request, :, length + 1 : length + 1 + count] = kept


def accept_path(tokens: Tensor, parents: Tensor, num_nodes: Tensor, chosen: Tensor) -> Accepted:
    """Twin of `accept.accept_path`, node by node: parents come before children."""
    batch, nodes = tokens.shape
    count, last = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
    path = torch.zeros(batch, nodes - 1, dtype=torch.int64)
    for b in range(batch):
        depth: dict[int, int] = {0: 0}
        for n in range(1, int(num_nodes[b])):
            parent = int(parents[b, n])
            if parent in depth and int(tokens[b, n]) == int(chosen[b, parent]):
                depth[n] = depth[parent] + 1
        deepest = max(depth, key=lambda n: (depth[n], -n))
        count[b], last[b] = depth[deepest], deepest
        for step in reversed(range(depth[deepest])):
            path[b, step], deepest = deepest, int(parents[b, deepest])
    device = tokens.device
    return Accepted(count.to(device), chosen.gather(1, last.to(device)[:, None])[:, 0], path.to(device))


def sample_nodes(values: Tensor, gumbel: Tensor, *, weights: bool = False) -> Tensor:
    """Twin of `accept.sample_nodes`."""
    scores = values.double().log() if weights else values.double()
    top = scores.amax(-1)
    chosen = (scores.nan_to_num(nan=float("-inf"), neginf=float("-inf")) + gumbel.double()).argmax(-1)
    return chosen.masked_fill(top.isnan() | top.isinf(), -1)


def reject_chain(p: Tensor, q: Tensor | None, tokens: Tensor, num_nodes: Tensor, uniforms: Tensor, gumbel: Tensor) -> Accepted:
    """Twin of `accept.reject_chain`, token by token: accept strictly below min(1, p / q), then draw once."""
    batch, nodes, size = p.shape
    law = _one_hot(tokens, size) if q is None else torch.where(q.isfinite().all(-1, keepdim=True), q.float(), 0.0)
    count, token = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
    for b in range(batch):
        n, drafted = 0, int(num_nodes[b]) - 1
        while n < drafted and _accepts(p[b, n], law[b, n], int(tokens[b, n + 1]), float(uniforms[b, n])):
            n += 1
        here = p[b, n].float()
        residual = (here - law[b, n]).clamp(min=0).nan_to_num(nan=0.0)
        weights = here if n == drafted or not bool((residual > 0).any()) else residual
        drawn = (weights.double().nan_to_num(nan=0.0).log() + gumbel[b].double()).argmax()
        count[b], token[b] = n, -1 if bool(here[0].isnan()) else drawn
    steps = torch.arange(1, nodes)
    path = steps * (steps <= count[:, None])
    return Accepted(count.to(p.device), token.to(p.device), path.to(p.device))


def _one_hot(tokens: Tensor, size: int) -> Tensor:
    """[B, N, V]: row n has all its weight on the token of node n + 1; the last row has none."""
    law = torch.zeros(*tokens.shape, size, device=tokens.device)
    law[:, :-1].scatter_(2, tokens[:, 1:, None], 1.0)
    return law


def _accepts(p: Tensor, q: Tensor, token: int, uniform: float) -> bool:
    """Whether uniform < min(1, p / q) at the token, in fp32; never where q is 0 or p is NaN."""
    ratio = (p[token].float() / q[token]).clamp(max=1.0)
    return bool(q[token] > 0) and uniform < float(ratio)


def filter_logits(
    logits: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """Twin of `sampling.filter_logits`, by sorting each row."""
    scores = logits.float() if temperature is None else logits.float() / temperature.float()[:, None]
    top = scores.amax(-1, keepdim=True)
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    if top_k is not None:
        hidden |= scores < _kth_largest(scores, top_k)
    mass = (scores - top).double().exp().masked_fill(hidden, 0.0)
    if top_p is not None:
        hidden |= (_mass_above(scores, mass) >= top_p.double()[:, None] * mass.sum(1, keepdim=True)) & (top_p < 1)[:, None]
    if min_p is not None:
        hidden |= mass < min_p.double()[:, None]
    hidden &= (scores < top) & top.isfinite()
    return scores.masked_fill(hidden, float("-inf"))


def _kth_largest(scores: Tensor, top_k: Tensor) -> Tensor:
    """[R, 1]: a row's k-th largest score; its smallest where k is 0 or more than V."""
    size = scores.shape[1]
    wanted = torch.where(top_k > 0, top_k.clamp(max=size), size) - 1
    return scores.sort(1, descending=True).values.gather(1, wanted[:, None])


def _mass_above(scores: Tensor, mass: Tensor) -> Tensor:
    """[R, V] float64: the mass of all strictly greater scores of the row."""
    order = scores.sort(1, descending=True)
    sums = mass.gather(1, order.indices).cumsum(1)
    first = torch.searchsorted(-order.values, -order.values)
    before = torch.nn.functional.pad(sums, (1, 0)).gather(1, first)
    return torch.empty_like(mass).scatter(1, order.indices, before)
