"""What is accepted of a batch of trees, in Triton: the path that the target agrees with, and the rules that draw.

Rules draw from uniforms and Gumbel noise that are inputs, so that they decide as the rules of `verify/` do on the same numbers.
Scores are compared in float64, as there: in fp32, sums that lie less than a rounding apart would be told apart otherwise.
Ties go to the lowest token. The twins are in `reference_rules`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.reference_rules import Accepted
from specdec.kernels.variant import Variant

MOST_NODES = 1024
_NEVER = tl.constexpr(-(1 << 20))
_NO_TOKEN = tl.constexpr(1 << 30)
_BLOCK = 1024
# Tokens that one program goes through; more programs share a longer row.
_CHUNK = 8192
# Of the programs that draw: float64 scores and logarithms take many registers.
_DRAW_WARPS = 8


@triton.jit
def _accept(
    tokens, parents, num_nodes, chosen, counts, nexts, paths, token_row, parent_row, chosen_row, path_row, nodes,
    NODES: tl.constexpr, DOUBLINGS: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, NODES)
    drafted = (node > 0) & (node < nodes) & (node < tl.load(num_nodes + request))
    token = tl.load(tokens + request * token_row + node, mask=drafted, other=0)
    parent = tl.load(parents + request * parent_row + node, mask=drafted, other=0)
    wanted = tl.load(chosen + request * chosen_row + parent, mask=drafted, other=0)
    # The sum over a node and its ancestors is its depth where all of them match, and negative where one does not.
    depth = tl.where(node == 0, 0, tl.where(drafted & (token == wanted), 1, _NEVER))
    above = parent.to(tl.int32)
    for _ in tl.static_range(DOUBLINGS):
        depth += tl.gather(depth, above, 0)
        above = tl.gather(above, above, 0)
    count = tl.max(depth, 0)
    last = tl.min(tl.where(depth == count, node, NODES), 0)
    tl.store(counts + request, count.to(tl.int64))
    tl.store(nexts + request, tl.load(chosen + request * chosen_row + last))
    path = tl.zeros((NODES,), tl.int64)
    for step in range(0, count):
        path = tl.where(node == count - 1 - step, last, path)
        last = tl.load(parents + request * parent_row + last).to(tl.int32)
    tl.store(paths + request * path_row + node, path, mask=node < nodes - 1)


@triton.jit
def _better(best, token, weight, noise, columns):
    """Each lane's best log(weight) + noise and its token; nothing is drawn where the weight is 0 or NaN."""
    positive = weight > 0
    score = tl.where(positive, tl.log(tl.where(positive, weight, 1.0).to(tl.float64)) + noise, float("-inf"))
    higher = score > best
    return tl.where(higher, score, best), tl.where(higher, columns, token)


@triton.jit
def _best(best, token):
    """The best score of all lanes, and the lowest token that has it."""
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, token, _NO_TOKEN), 0)


@triton.jit
def _draw(
    values, gumbel, tops, drawn, value_request, value_row, gumbel_request, gumbel_row, nodes, vocabulary, splits,
    WEIGHTS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    split, row = tl.program_id(1), tl.program_id(0).to(tl.int64)
    values += row // nodes * value_request + row % nodes * value_row
    gumbel += row // nodes * gumbel_request + row % nodes * gumbel_row
    first = split * CHUNK
    best, token = tl.full((BLOCK,), float("-inf"), tl.float64), first + tl.arange(0, BLOCK)
    broken = tl.zeros((BLOCK,), tl.int32)
    for start in range(first, tl.minimum(first + CHUNK, vocabulary), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        live = columns < vocabulary
        value = tl.load(values + columns, mask=live, other=0.0 if WEIGHTS else float("-inf")).to(tl.float32)
        noise = tl.load(gumbel + columns, mask=live, other=0.0).to(tl.float64)
        broken |= ((value != value) | (value == float("inf"))).to(tl.int32)
        if WEIGHTS:
            best, token = _better(best, token, value, noise, columns)
        else:
            score = value.to(tl.float64) + noise
            higher = score > best
            best, token = tl.where(higher, score, best), tl.where(higher, columns, token)
    top, token_here = _best(best, token)
    # A broken row has no law: its mark wins over every score.
    whole = tl.max(broken, 0) == 0
    tl.store(tops + row * splits + split, tl.where(whole, top, float("inf")))
    tl.store(drawn + row * splits + split, tl.where(whole, token_here, -1))


@triton.jit
def _draw_best(tops, drawn, chosen, splits, SPLITS: tl.constexpr):
    row, split = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS)
    best = tl.load(tops + row * splits + split, mask=split < splits, other=float("-inf"))
    top, token = _best(best, tl.load(drawn + row * splits + split, mask=split < splits, other=_NO_TOKEN))
    tl.store(chosen + row, tl.where(top > float("-inf"), token, -1).to(tl.int64))


@triton.jit
def _judge(
    p, q, tokens, num_nodes, uniforms, marks, p_request, p_row, q_request, q_row, token_row, uniform_row, steps, vocabulary,
    HAS_Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bit 0 of marks[b, k]: token k + 1 is accepted. Bit 1: row k of q is a law."""
    step, request = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    token = tl.load(tokens + request * token_row + step + 1)
    here = tl.load(p + request * p_request + step * p_row + token).to(tl.float32)
    ratio, law = here, 1
    if HAS_Q:
        row = q + request * q_request + step * q_row
        broken = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            value = tl.load(row + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)
            broken |= ((value != value) | (tl.abs(value) == float("inf"))).to(tl.int32)
        there = tl.load(row + token).to(tl.float32)
        law = (tl.max(broken, 0) == 0).to(tl.int32)
        drawn = (law != 0) & (there > 0)
        # Rounded as in torch: the plain division of a GPU is off by some units in the last place.
        ratio = tl.where(drawn, tl.div_rn(here, tl.where(drawn, there, 1.0)), 0.0)
    # NaN stays NaN here, and no uniform is below it.
    ratio = tl.where(ratio > 1.0, 1.0, ratio)
    accepted = tl.load(uniforms + request * uniform_row + step).to(tl.float64) < ratio.to(tl.float64)
    accepted = accepted & (step + 1 < tl.load(num_nodes + request))
    tl.store(marks + request * steps + step, accepted.to(tl.int32) + 2 * law)


@triton.jit
def _leading(marks, steps, STEPS: tl.constexpr):
    """How many tokens are accepted before the first that is not; STEPS > steps."""
    step = tl.arange(0, STEPS)
    mark = tl.load(marks + step, mask=step < steps, other=0)
    return tl.min(tl.where((mark & 1) != 0, STEPS, step), 0)


@triton.jit
def _redraw(
    p, q, tokens, gumbel, marks, tops, drawn, p_request, p_row, q_request, q_row, token_row, gumbel_row,
    nodes, vocabulary, splits, HAS_Q: tl.constexpr, STEPS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The best token of a chunk, once by the residual and once by p: which of them counts is known when all chunks are done."""
    split, request = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count = _leading(marks + request * (nodes - 1), nodes - 1, STEPS).to(tl.int64)
    behind = count < nodes - 1
    law = tl.load(marks + request * (nodes - 1) + count, mask=behind, other=0) > 1
    token = tl.load(tokens + request * token_row + count + 1, mask=behind, other=-1)
    p += request * p_request + count * p_row
    q += request * q_request + count * q_row
    first = split * CHUNK
    best, token_of = tl.full((BLOCK,), float("-inf"), tl.float64), first + tl.arange(0, BLOCK)
    best_p, token_of_p = best, token_of
    for start in range(first, tl.minimum(first + CHUNK, vocabulary), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        live = columns < vocabulary
        here = tl.load(p + columns, mask=live, other=0.0).to(tl.float32)
        noise = tl.load(gumbel + request * gumbel_row + columns, mask=live, other=0.0).to(tl.float64)
        there = tl.load(q + columns, mask=live & law, other=0.0).to(tl.float32) if HAS_Q else tl.where(columns == token, 1.0, 0.0)
        best, token_of = _better(best, token_of, here - there, noise, columns)
        best_p, token_of_p = _better(best_p, token_of_p, here, noise, columns)
    place = (request * splits + split) * 2
    top, token_here = _best(best, token_of)
    tl.store(tops + place, top)
    tl.store(drawn + place, token_here)
    top, token_here = _best(best_p, token_of_p)
    tl.store(tops + place + 1, top)
    tl.store(drawn + place + 1, token_here)


@triton.jit
def _settle(
    p, num_nodes, marks, tops, drawn, counts, nexts, paths, p_request, p_row, path_row, steps, splits,
    STEPS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0).to(tl.int64)
    split, step = tl.arange(0, SPLITS), tl.arange(0, STEPS)
    count = _leading(marks + request * steps, steps, STEPS)
    place, live = (request * splits + split) * 2, split < splits
    top, token = _best(tl.load(tops + place, mask=live, other=float("-inf")), tl.load(drawn + place, mask=live, other=_NO_TOKEN))
    _, token_p = _best(
        tl.load(tops + place + 1, mask=live, other=float("-inf")), tl.load(drawn + place + 1, mask=live, other=_NO_TOKEN)
    )
    # No residual where p equals q to the last bit, and none is wanted when every drafted token was accepted.
    wanted = (count + 1 < tl.load(num_nodes + request)) & (top > float("-inf"))
    here = tl.load(p + request * p_request + count.to(tl.int64) * p_row).to(tl.float32)
    tl.store(counts + request, count.to(tl.int64))
    tl.store(nexts + request, tl.where(here == here, tl.where(wanted, token, token_p), -1).to(tl.int64))
    tl.store(paths + request * path_row + step, tl.where(step < count, step + 1, 0).to(tl.int64), mask=step < steps)


def _outputs(batch: int, nodes: int, device: torch.device) -> Accepted:
    whole = torch.empty(2, batch, dtype=torch.int64, device=device)
    return Accepted(whole[0], whole[1], torch.empty(batch, nodes - 1, dtype=torch.int64, device=device))


def _dense(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        assert tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] < 2, "the last dimension is dense"


def accept_path(tokens: Tensor, parents: Tensor, num_nodes: Tensor, chosen: Tensor) -> Accepted:
    """The longest path whose every token is what the target chose at its parent, and the target's token behind it.

    tokens, parents: [B, N] int64 as in a `TokenTree`.  num_nodes: [B] int64 on the device; nodes at or beyond it never
    match.  chosen: [B, N] int64, -1 where a node's row held NaN. Of equal siblings the deeper path counts, then the
    first. One program a request finds all depths by doubling. N is at most 1,024.
    """
    batch, nodes = tokens.shape
    assert nodes <= MOST_NODES, f"{nodes} nodes, at most {MOST_NODES}"
    _dense(tokens, parents, num_nodes, chosen)
    out = _outputs(batch, nodes, tokens.device)
    bucket = _bucket(nodes)
    _accept[(batch,)](
        tokens, parents, num_nodes, chosen, *out, tokens.stride(0), parents.stride(0), chosen.stride(0), out.path.stride(0), nodes,
        NODES=bucket, DOUBLINGS=bucket.bit_length() - 1, num_warps=_warps(bucket),
    )  # fmt: skip
    return out


def _bucket(nodes: int) -> int:
    """Few sizes are compiled: 16, 64, 256, 1,024."""
    return next(size for size in (16, 64, 256, MOST_NODES) if nodes <= size)


def _warps(bucket: int) -> int:
    """Up to 64 nodes stay within a warp, so that gathers and sums need no shared memory."""
    return 1 if bucket <= 64 else 4


def sample_nodes(values: Tensor, gumbel: Tensor, *, weights: bool = False) -> Tensor:
    """[B, N] int64: argmax over the vocabulary of log p + G at every node, the lowest token of equals.

    values: [B, N, V], log p or logits, since a row's normaliser changes no argmax; with `weights`, p itself, not negative.
    gumbel: [B, N, V] or expanded to it, fp32 or float64. -1 where a row holds NaN or +inf, or no token can be drawn.
    """
    batch, nodes, vocabulary = values.shape
    _dense(values, gumbel)
    splits = triton.cdiv(vocabulary, _CHUNK)
    tops = torch.empty(batch * nodes, splits, dtype=torch.float64, device=values.device)
    drawn = torch.empty(batch * nodes, splits, dtype=torch.int32, device=values.device)
    chosen = torch.empty(batch, nodes, dtype=torch.int64, device=values.device)
    _draw[(batch * nodes, splits)](
        values, gumbel, tops, drawn, *values.stride()[:2], *gumbel.stride()[:2], nodes, vocabulary, splits,
        WEIGHTS=weights, CHUNK=_CHUNK, BLOCK=_BLOCK, num_warps=_DRAW_WARPS,
    )  # fmt: skip
    _draw_best[(batch * nodes,)](tops, drawn, chosen, splits, SPLITS=triton.next_power_of_2(splits), num_warps=1)
    return chosen


def reject_chain(p: Tensor, q: Tensor | None, tokens: Tensor, num_nodes: Tensor, uniforms: Tensor, gumbel: Tensor) -> Accepted:
    """Token rejection on chains: token k is accepted where uniforms[b, k] < min(1, p / q), strictly; then one draw.

    p: [B, N, V] the target's probabilities.  q: [B, N, V], row n the law of node n + 1; None for one-hot laws.
    tokens: [B, N] int64.  num_nodes: [B] int64 on the device.  uniforms: [B, K], K >= N - 1.  gumbel: [B, V].
    The draw is argmax(log w + G), w being p behind the last token where all were accepted or p equals q, else the positive part
    of p - q. A row of q that is not finite accepts nothing and takes nothing from p. Probabilities, ratios and residuals
    are fp32 as in the rule, whose decisions are met bit for bit; only the logarithm may differ, in float64's last bit.
    """
    batch, nodes, vocabulary = p.shape
    assert nodes <= MOST_NODES, f"{nodes} nodes, at most {MOST_NODES}"
    _dense(p, q, tokens, num_nodes, uniforms, gumbel)
    out, steps, splits = _outputs(batch, nodes, p.device), triton.next_power_of_2(nodes), triton.cdiv(vocabulary, _CHUNK)
    marks = torch.empty(batch, nodes - 1, dtype=torch.int32, device=p.device)
    tops = torch.empty(batch, splits, 2, dtype=torch.float64, device=p.device)
    drawn = torch.empty(batch, splits, 2, dtype=torch.int32, device=p.device)
    law, rows = p if q is None else q, p.stride()[:2] + (p if q is None else q).stride()[:2]
    if nodes > 1:
        _judge[(nodes - 1, batch)](
            p, law, tokens, num_nodes, uniforms, marks, *rows, tokens.stride(0), uniforms.stride(0), nodes - 1, vocabulary,
            HAS_Q=q is not None, BLOCK=_BLOCK,
        )  # fmt: skip
    _redraw[(splits, batch)](
        p, law, tokens, gumbel, marks, tops, drawn, *rows, tokens.stride(0), gumbel.stride(0), nodes, vocabulary, splits,
        HAS_Q=q is not None, STEPS=steps, CHUNK=_CHUNK, BLOCK=_BLOCK, num_warps=_DRAW_WARPS,
    )  # fmt: skip
    _settle[(batch,)](
        p, num_nodes, marks, tops, drawn, *out, *rows[:2], out.path.stride(0), nodes - 1, splits,
        STEPS=steps, SPLITS=triton.next_power_of_2(splits), num_warps=1,
    )  # fmt: skip
    return out


def variants() -> Iterator[Variant]:
    """Ahead-of-time compilation: every bucket of nodes, the two types of rows, with and without q."""
    for bucket in (16, 64, 256, MOST_NODES):
        constants = {"NODES": bucket, "DOUBLINGS": bucket.bit_length() - 1}
        yield Variant(f"accept path, {bucket} nodes", _accept, _types(_accept), constants, _warps(bucket))
    yield Variant("draw best", _draw_best, _types(_draw_best), {"SPLITS": 32}, 1)
    for steps in (16, MOST_NODES):
        yield Variant(f"settle, {steps} nodes", _settle, _types(_settle) | {"p": "*fp32"}, {"STEPS": steps, "SPLITS": 32}, 1)
    tiles = {"CHUNK": _CHUNK, "BLOCK": _BLOCK}
    for dtype in ("bf16", "fp32"):
        rows = dict.fromkeys(("p", "q", "values"), f"*{dtype}")
        for weights in (False, True):
            name, how = f"draw {dtype}{' weights' * weights}", {"WEIGHTS": weights} | tiles
            yield Variant(name, _draw, _types(_draw) | rows, how, _DRAW_WARPS)
        for given in (False, True):
            name, law = f"{dtype}{' q' * given}", {"HAS_Q": given}
            yield Variant(f"judge {name}", _judge, _types(_judge) | rows, law | {"BLOCK": _BLOCK})
            for steps in (16, MOST_NODES):
                how = law | {"STEPS": steps} | tiles
                yield Variant(f"redraw {name}, {steps} nodes", _redraw, _types(_redraw) | rows, how, _DRAW_WARPS)


_POINTERS = {
    **dict.fromkeys(("tokens", "parents", "num_nodes", "chosen", "counts", "nexts", "paths"), "*i64"),
    **dict.fromkeys(("uniforms", "gumbel", "tops"), "*fp64"),
    **dict.fromkeys(("marks", "drawn"), "*i32"),
}


def _types(kernel: triton.JITFunction) -> dict[str, str]:
    """Names in small letters are pointers or 32-bit integers, names in capitals constants."""
    return {name: _POINTERS.get(name, "i32") for name in kernel.arg_names if name.islower()}
