"""Packed rows of a batch of trees, derived on the device in one Triton launch: a captured round is told trees and lengths alone.

The twin is `reference_rules.tree_rows`.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.reference_rules import TreeRows, empty_rows
from specdec.kernels.variant import Variant


@triton.jit
def _tree_rows(
    tokens, parents, num_nodes, lengths, ids, positions, slots, row_of, index, table, bits, offsets,
    tree_row, index_row, offset_row, batch, scratch, REQUESTS: tl.constexpr, NODES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    request, word = tl.arange(0, REQUESTS), tl.arange(0, WORDS)
    sizes = tl.load(num_nodes + request, mask=request < batch, other=0)
    ends = tl.cumsum(sizes, 0)
    found = tl.sum((ends <= row).to(tl.int32), 0)
    live, mine = found < batch, tl.minimum(found, batch - 1)
    size = tl.sum(tl.where(request == mine, sizes, 0), 0)
    start = tl.sum(tl.where(request == mine, ends - sizes, 0), 0)
    node = tl.where(live, row - start, 0)
    seen, depth, above = tl.where(word == 0, 1, 0).to(tl.int64), tl.zeros((), tl.int64), node
    while above > 0:
        seen |= tl.where(word == above // 64, tl.full((WORDS,), 1, tl.int64) << (above % 64), 0)
        depth += 1
        above = tl.load(parents + mine.to(tl.int64) * tree_row + above)
    length = tl.load(lengths + mine)
    token = tl.load(tokens + mine.to(tl.int64) * tree_row + node)
    tl.store(ids + row, tl.where(live, token, 0))
    tl.store(positions + row, tl.where(live, length + depth, 0))
    tl.store(slots + row, tl.where(live, length + node, scratch))
    tl.store(row_of + row, tl.where(live, mine, 0).to(tl.int64))
    tl.store(bits + row.to(tl.int64) * WORDS + word, seen)
    tl.store(offsets + mine.to(tl.int64) * offset_row + node, depth, mask=live)
    first = live & (node == 0)
    place = tl.arange(0, NODES)
    tl.store(
        index + mine.to(tl.int64) * index_row + place,
        tl.where(place < size, start + place, start),
        mask=first & (place < index_row),
    )
    line, column = table + mine.to(tl.int64) * 6, tl.arange(0, 8)
    value = tl.where(column == 0, start, tl.where(column == 1, size, tl.where(column == 2, mine.to(tl.int64), 0)))
    value = tl.where(column == 4, length, tl.where(column == 5, length + size, value))
    tl.store(line + column, value, mask=first & (column < 6))


def tree_rows(
    tokens: Tensor, parents: Tensor, num_nodes: Tensor, lengths: Tensor, rows: int, most_slots: int, scratch: int
) -> TreeRows:
    """The rows that score every live node of each request's tree behind its lengths[b] committed slots; see `TreeRows`.

    tokens, parents: [B, N] int64 as in a `TokenTree`.  num_nodes, lengths: [B] int64 on the device.  rows: at least the live
    nodes of all requests; those beyond are padding that writes to the slot `scratch` of cache row 0.  most_slots: a
    bound on lengths[b] + N. A program a row walks its ancestors; nothing is copied to the host.
    """
    batch, nodes = tokens.shape
    assert tokens.stride() == parents.stride(), "tokens and parents are laid out alike"
    assert tokens.stride(1) == 1 or nodes == 1, "the last dimension is dense"
    out = empty_rows(batch, nodes, rows, most_slots, tokens.device)
    assert out.items.bits is not None
    assert out.items.offsets is not None
    _tree_rows[(rows,)](
        tokens, parents, num_nodes, lengths, out.tokens, out.items.positions, out.slots, out.row_of, out.place,
        out.items.table, out.items.bits, out.items.offsets, tokens.stride(0), nodes, out.items.offsets.stride(0), batch, scratch,
        REQUESTS=triton.next_power_of_2(batch), NODES=triton.next_power_of_2(nodes), WORDS=out.items.bits.shape[1], num_warps=1,
    )  # fmt: skip
    return out


def variants() -> Iterator[Variant]:
    """Ahead-of-time compilation: one request and many, short trees and the largest."""
    names = [name for name in _tree_rows.arg_names if name.islower()]
    scalars = ("tree_row", "index_row", "offset_row", "batch", "scratch")
    types = {name: "i32" if name in scalars else "*i64" for name in names}
    for requests, nodes in ((1, 16), (64, 64), (16, 1024)):
        constants = {"REQUESTS": requests, "NODES": nodes, "WORDS": max(1, nodes // 64)}
        yield Variant(f"tree rows, {requests} requests of {nodes} nodes", _tree_rows, types, constants, 1)
