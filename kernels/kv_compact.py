"""KV compaction in Triton: the accepted nodes of every tree, in all layers, become the next slots in one launch.

Everything is read on the device, so that a launch may be captured before the verdict is known.
The twin is `reference_rules.kv_compact`.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.variant import Variant

# Slots of a path that are held in registers at a time, and elements of such a tile: 64 a thread.
_MOST_ROWS = 64
_TILE = 8192


@triton.jit
def _compact(
    cache, lengths, paths, counts,
    cache_layer, pair_stride, request_stride, cache_head, cache_slot, path_row,
    heads, slots, depth, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(1).to(tl.int64)
    head, layer = (tl.program_id(0) % heads).to(tl.int64), (tl.program_id(0) // heads // 2).to(tl.int64)
    pair = (tl.program_id(0) // heads % 2).to(tl.int64)
    count = tl.minimum(tl.load(counts + request), depth)
    root = tl.load(lengths + request)
    row = cache + layer * cache_layer + pair * pair_stride + request * request_stride + head * cache_head
    for first in range(0, count, ROWS):
        step = (first + tl.arange(0, ROWS)).to(tl.int64)
        node = tl.load(paths + request * path_row + step, mask=step < count, other=0)
        moves = (step < count) & (node != step + 1) & (root + node < slots)
        source, target = row + (root + node) * cache_slot, row + (root + step + 1) * cache_slot
        for column in range(0, WIDTH, COLUMNS):
            columns = column + tl.arange(0, COLUMNS)
            live = moves[:, None] & (columns < WIDTH)[None, :]
            kept = tl.load(source[:, None] + columns[None, :], mask=live)
            # A slot may be one row's target and another's source, and other warps hold the other rows.
            tl.debug_barrier()
            tl.store(target[:, None] + columns[None, :], kept, mask=live)


def kv_compact(cache: Tensor, lengths: Tensor, paths: Tensor, counts: Tensor) -> None:
    """Move slot lengths[b] + paths[b, j] of every layer to slot lengths[b] + 1 + j for j < counts[b], in place.

    cache: [L, 2, C, H, S, D], last dimension dense, C >= B; its first B rows are the requests.  lengths: [B] int64, the
    slot of each tree's node 0.  paths: [B, P] int64, the accepted nodes in order of depth, root excluded, ascending; what
    stands behind counts[b] is not read.  counts: [B] int64. Moves may overlap: since paths ascend, a slot is written after
    all that is still to be read lies behind it. Nothing is copied to the host.
    """
    layers, pair, _, heads, slots, width = cache.shape
    batch, depth = paths.shape
    assert pair == 2, f"a cache is [L, 2, B, H, S, D], and this one {list(cache.shape)}"
    assert cache.stride(5) == 1, "the last dimension is dense"
    lengths, paths, counts = lengths.contiguous(), paths.contiguous(), counts.contiguous()
    if batch == 0 or depth == 0 or cache.numel() == 0:
        return
    rows = min(triton.next_power_of_2(depth), _MOST_ROWS)
    _compact[(layers * 2 * heads, batch)](
        cache, lengths, paths, counts, *cache.stride()[:5], paths.stride(0), heads, slots, depth,
        WIDTH=width, ROWS=rows, COLUMNS=_columns(width, rows), num_warps=4,
    )  # fmt: skip


def _columns(width: int, rows: int) -> int:
    columns: int = min(triton.next_power_of_2(width), _TILE // rows)
    return columns


def variants() -> Iterator[Variant]:
    """Ahead-of-time compilation: the types that caches have, widths, and short and long paths."""
    strides = ("cache_layer", "pair_stride", "request_stride", "cache_head", "cache_slot", "path_row")
    types = dict.fromkeys(("lengths", "paths", "counts"), "*i64") | dict.fromkeys((*strides, "heads", "slots", "depth"), "i32")
    types["cache_layer"] = types["pair_stride"] = "i64"
    for dtype in ("bf16", "fp16", "fp32", "u8"):
        for width, rows in ((64, 8), (80, 16), (128, 8), (128, 64), (256, 64)):
            constants = {"WIDTH": width, "ROWS": rows, "COLUMNS": _columns(width, rows)}
            yield Variant(f"kv compact {dtype} {width}, {rows} rows", _compact, types | {"cache": f"*{dtype}"}, constants)
