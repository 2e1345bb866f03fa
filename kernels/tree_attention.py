"""Tree attention in Triton: packed rows of many requests over long prefixes and small trees.

A program takes one block of rows of one item (a request, or several that share a prefix), one KV head with its whole query
group, and one split of the keys. It walks the tiles of the prefix without any mask, then the boundary and the tree with one,
and leaves an unnormalised sum; `_combine` merges the splits. The twin is `reference.tree_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.tiles import Items, KeyValues, Logits, Tiles, choose_tiles, processors
from specdec.kernels.variant import Variant

_LOG2E = tl.constexpr(1.4426950408889634)
# Keys of a masked tile: few, since a word of ancestors for every row and key takes registers.
_TAIL = 16


@triton.jit
def _load(base, places, columns, live, MASKED: tl.constexpr, FP8: tl.constexpr, DTYPE: tl.constexpr):
    """A tile [N, D] of K or V in the type that is multiplied. e4m3 is an fp16 with its exponent 8 too low; NaN is not kept."""
    if MASKED:
        tile = tl.load(base + places[:, None] + columns[None, :], mask=live, other=0)
    else:
        tile = tl.load(base + places[:, None] + columns[None, :])
    if FP8:
        word = tile.to(tl.int16)
        tile = (((word & 0x80) << 8) | ((word & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return tile.to(DTYPE)


@triton.jit
def _places(first, slots, cache_row, row_stride, slot_stride, pages, page_stride, live, PAGE: tl.constexpr):
    """Where a tile of a cache row lies: one 64-bit base, and each slot's place behind it; a block table gives the places."""
    if PAGE > 0:
        page = tl.load(pages + cache_row * page_stride + slots // PAGE, mask=live, other=0)
        base, places = cache_row * 0, page * row_stride + (slots % PAGE) * slot_stride
    else:
        base, places = cache_row * row_stride + first * slot_stride, (slots - first).to(tl.int32) * slot_stride
    return base, places


@triton.jit
def _seen(slots, committed, end, node, words, position, offsets, WINDOW: tl.constexpr, TREE: tl.constexpr):
    """[M, N] bool: which rows see which slots, by ancestor words (words: [M] pointers) and by position."""
    ahead = slots - committed
    inside = (ahead >= 0) & (slots < end)
    if TREE:
        word = tl.load(words[:, None] + (ahead >> 6)[None, :], mask=inside[None, :], other=0)
        tree = ((word >> (ahead & 63)[None, :]) & 1) != 0
    else:
        tree = ahead[None, :] <= node[:, None]
    seen = (ahead < 0)[None, :] | (inside[None, :] & tree)
    if WINDOW > 0:
        shift = ahead
        if TREE:
            shift = tl.load(offsets + ahead, mask=inside, other=0)
        place = tl.where(ahead < 0, slots, committed + shift)
        seen = seen & (position[:, None] - place[None, :] < WINDOW)
    return seen


@triton.jit
def _update(query, keys, values, seen, acc, top, total, scale, softcap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """One tile into the running softmax, in powers of two. top: [M] largest logit so far.  total: [M] sum of weights."""
    logits = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    if SOFTCAP:
        logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)
    logits = logits * _LOG2E
    if MASKED:
        logits = tl.where(seen, logits, float("-inf"))
    highest = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(logits - base[:, None])
    shrink = tl.exp2(top - base)
    acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return acc, highest, total * shrink + tl.sum(weights, 1)


@triton.jit
def _finish(acc, top, total, sinks, head, live, SINKS: tl.constexpr):
    """Normalise, the sink's weight included."""
    if SINKS:
        sink = tl.load(sinks + head, mask=live, other=0.0) * _LOG2E
        base = tl.maximum(top, sink)
        acc = acc * tl.exp2(top - base)[:, None]
        total = total * tl.exp2(top - base) + tl.exp2(sink - base)
    return acc / tl.where(total > 0.0, total, 1.0)[:, None]


@triton.jit
def _prefix(
    query, key, value, acc, top, total, begin, low, high, end, cache_row, row_stride, slot_stride, pages, page_row, columns, wide,
    scale, softcap, N: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, FP8: tl.constexpr, PAGE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The tiles that every row sees whole. MASKED: only for widths that are no power of two."""
    for tile in range(low, high):
        first = begin + tile * N
        slots = first + tl.arange(0, N)
        base, places = _places(first, slots, cache_row, row_stride, slot_stride, pages, page_row, slots < end, PAGE)
        keys = _load(key + base, places, columns, wide[None, :], MASKED, FP8, DTYPE)
        values = _load(value + base, places, columns, wide[None, :], MASKED, FP8, DTYPE)
        acc, top, total = _update(query, keys, values, acc, acc, top, total, scale, softcap, SOFTCAP, False)
    return acc, top, total


@triton.jit
def _rest(
    query, key, value, acc, top, total, begin, stop, end, cache_row, row_stride, slot_stride, pages, page_row, columns, wide,
    scale, softcap, committed, node, live, words, position, offsets, N: tl.constexpr, SOFTCAP: tl.constexpr, FP8: tl.constexpr,
    PAGE: tl.constexpr, DTYPE: tl.constexpr, WINDOW: tl.constexpr, TREE: tl.constexpr,
):  # fmt: skip
    """The slots from `begin` to `stop` under the mask: the boundary and the tree, and with a window everything in it."""
    for tile in tl.range(0, tl.cdiv(tl.minimum(stop, end) - begin, N), num_stages=1):
        first = begin + tile * N
        slots = first + tl.arange(0, N)
        inside = slots < end
        base, places = _places(first, slots, cache_row, row_stride, slot_stride, pages, page_row, inside, PAGE)
        keys = _load(key + base, places, columns, inside[:, None] & wide[None, :], True, FP8, DTYPE)
        values = _load(value + base, places, columns, inside[:, None] & wide[None, :], True, FP8, DTYPE)
        seen = _seen(slots, committed, end, node, words, position, offsets, WINDOW, TREE) & live[:, None]
        acc, top, total = _update(query, keys, values, seen, acc, top, total, scale, softcap, SOFTCAP, True)
    return acc, top, total


@triton.jit
def _tiles_of(begin, committed, end, split, splits, N: tl.constexpr, WINDOW: tl.constexpr):
    """Where this split's tiles begin and end, and how many of the item's tiles every row sees whole."""
    if WINDOW > 0:
        begin += tl.maximum(committed - WINDOW + 1 - begin, 0) // N * N
        whole = begin * 0
    else:
        whole = tl.maximum(tl.minimum(committed, end) - begin, 0) // N
    tiles = tl.cdiv(end - begin, N)
    each = tl.cdiv(tiles, splits)
    return begin, split * each, tl.minimum(split * each + each, tiles), whole


@triton.jit
def _leave(
    acc, top, total, out, tops, totals, sinks, split, row, head, live, columns, wide, worked, out_split, out_row, out_head,
    stat_split, stat_row, SINKS: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """Store the result, or this split's part of it; a split without tiles leaves no sum, which its total of 0 says."""
    filled = live[:, None] & wide[None, :]
    if DIRECT:
        acc = _finish(acc, top, total, sinks, head, live, SINKS)
    else:
        place = split.to(tl.int64) * stat_split + row * stat_row + head
        tl.store(tops + place, top, mask=live)
        tl.store(totals + place, total, mask=live)
        filled = filled & worked
    place = split.to(tl.int64) * out_split + row * out_row + head * out_head
    tl.store(out + place[:, None] + columns[None, :], acc.to(out.dtype.element_ty), mask=filled)


@triton.jit
def _attend(
    query, key, value, out, tops, totals, table, bits, positions, offsets, pages, key_scale, value_scale, sinks,
    query_row, query_head, cache_row_stride, cache_head, cache_slot, out_split, out_row, out_head, stat_split, stat_row,
    bits_row, offset_row, page_row, scale, softcap, blocks, splits, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_P2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, TREE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, FP8: tl.constexpr, PAGE: tl.constexpr,
    DIRECT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    split, kv_head, item, block = tl.program_id(0), tl.program_id(2), tl.program_id(1) // blocks, tl.program_id(1) % blocks
    first_row, rows, cache_row = tl.load(table + item * 6), tl.load(table + item * 6 + 1), tl.load(table + item * 6 + 2)
    begin, committed, end = tl.load(table + item * 6 + 3), tl.load(table + item * 6 + 4), tl.load(table + item * 6 + 5)
    if block * BLOCK_M >= rows * GROUP:
        return
    local, columns = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, WIDTH_P2)
    node, head = (local // GROUP).to(tl.int64), (kv_head * GROUP + local % GROUP).to(tl.int64)
    live, row, wide = node < rows, first_row + node, columns < WIDTH
    asked = query + (row * query_row + head * query_head)[:, None] + columns[None, :]
    q = tl.load(asked, mask=live[:, None] & wide[None, :], other=0.0).to(DTYPE)
    words, position = bits + row * bits_row, tl.load(positions + row, mask=live, other=0)
    key += kv_head.to(tl.int64) * cache_head
    value += kv_head.to(tl.int64) * cache_head
    if FP8:
        scale *= tl.load(key_scale + kv_head)
    begin, low, high, whole = _tiles_of(begin, committed, end, split, splits, BLOCK_N, WINDOW)
    acc = tl.zeros((BLOCK_M, WIDTH_P2), tl.float32)
    top, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    acc, top, total = _prefix(
        q, key, value, acc, top, total, begin, low, tl.minimum(high, whole), end, cache_row, cache_row_stride, cache_slot, pages,
        page_row, columns, wide, scale, softcap, BLOCK_N, SOFTCAP, WIDTH != WIDTH_P2, FP8, PAGE, DTYPE)  # fmt: skip
    acc, top, total = _rest(
        q, key, value, acc, top, total, begin + tl.maximum(low, whole) * BLOCK_N, begin + high * BLOCK_N, end, cache_row,
        cache_row_stride, cache_slot, pages, page_row, columns, wide, scale, softcap, committed, node, live, words, position,
        offsets + item * offset_row, BLOCK_T, SOFTCAP, FP8, PAGE, DTYPE, WINDOW, TREE)  # fmt: skip
    if FP8:
        acc *= tl.load(value_scale + kv_head)
    _leave(acc, top, total, out, tops, totals, sinks, split, row, head, live, columns, wide, low < high, out_split, out_row,
           out_head, stat_split, stat_row, SINKS, DIRECT)  # fmt: skip


@triton.jit
def _combine(
    partial, tops, totals, out, sinks, part_split, part_row, part_head, stat_split, stat_row, out_row, out_head, splits,
    WIDTH: tl.constexpr, WIDTH_P2: tl.constexpr, SPLITS_P2: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    split, columns = tl.arange(0, SPLITS_P2), tl.arange(0, WIDTH_P2)
    live, wide = split < splits, columns < WIDTH
    place = split.to(tl.int64) * stat_split + row * stat_row + head
    tops_here = tl.load(tops + place, mask=live, other=float("-inf"))
    totals_here = tl.load(totals + place, mask=live, other=0.0)
    top = tl.max(tops_here, 0)
    if SINKS:
        sink = tl.load(sinks + head) * _LOG2E
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(tops_here - base)
    there = split.to(tl.int64) * part_split + row * part_row + head * part_head
    filled = (live & (weights > 0.0))[:, None] & wide[None, :]
    parts = tl.load(partial + there[:, None] + columns[None, :], mask=filled, other=0.0)
    total = tl.sum(totals_here * weights, 0)
    if SINKS:
        total += tl.exp2(sink - base)
    acc = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + row * out_row + head * out_head + columns, acc.to(out.dtype.element_ty), mask=wide)


def tree_attention(
    query: Tensor, cache: KeyValues, groups: Sequence[Items], how: Logits, *, splits: int | None = None, tiles: Tiles | None = None
) -> Tensor:
    """Softmax attention of packed rows over the slots that they see; [R, H, D] in the query's dtype.

    query: [R, H, D], last dimension dense.  groups: one `Items`, or several that split the slots of the same rows between
    them (a shared prefix, then each request's own), whose partial sums are merged.  splits, tiles: forced, else chosen from
    shapes. A row of no item is undefined; a row that sees nothing is zeros.
    """
    rows, heads, width = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    chosen = [tiles or _tiles(query, cache, items) for items in groups]
    counts = [splits or t.splits for t in chosen]
    if sum(counts) == 1:
        _launch(query, cache, groups[0], how, chosen[0], 1, out[None], None)
        return out
    partial = torch.empty(sum(counts), rows, heads, width, dtype=torch.float32, device=query.device)
    stats = torch.full((2, sum(counts), rows, heads), float("-inf"), dtype=torch.float32, device=query.device)
    stats[1] = 0.0
    first = 0
    for items, tile, count in zip(groups, chosen, counts, strict=True):
        _launch(query, cache, items, how, tile, count, partial[first:], stats[:, first:])
        first += count
    sinks = how.sinks if how.sinks is not None else stats
    _combine[(rows, heads)](
        partial, stats[0], stats[1], out, sinks, *partial.stride()[:3], *stats.stride()[1:3], *out.stride()[:2], first,
        WIDTH=width, WIDTH_P2=triton.next_power_of_2(width), SPLITS_P2=triton.next_power_of_2(first),
        SINKS=how.sinks is not None,
    )  # fmt: skip
    return out


def _product_type(dtype: torch.dtype) -> tl.dtype:
    """What K and V are multiplied in: their own type; the interpreter, which knows no bf16 products, takes fp32."""
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    found: tl.dtype = getattr(tl, str(dtype).removeprefix("torch."))
    return found


def _tiles(query: Tensor, cache: KeyValues, items: Items) -> Tiles:
    heads = cache.key.shape[1]
    group = query.shape[1] // heads
    count = items.table.shape[0]
    shape = (count, items.most_rows, items.most_slots, heads, group, query.shape[2], query.element_size())
    return choose_tiles(*shape, processors(query.device))


def _launch(
    query: Tensor, cache: KeyValues, items: Items, how: Logits, tiles: Tiles, splits: int, out: Tensor, stats: Tensor | None
) -> None:
    """One group of items into out[:splits], normalised when there are no stats to leave."""
    assert cache.key.stride() == cache.value.stride(), "K and V are views of one tensor"
    assert query.stride(2) == cache.key.stride(3) == 1, "the last dimension is dense"
    heads, group = cache.key.shape[1], query.shape[1] // cache.key.shape[1]
    blocks = triton.cdiv(items.most_rows * group, tiles.rows)
    none, fp8 = items.table, cache.key.dtype == torch.uint8
    bits, offsets, pages = items.bits, items.offsets, cache.pages
    _attend[(splits, items.table.shape[0] * blocks, heads)](
        query, cache.key, cache.value, out, *(stats if stats is not None else (none, none)), items.table,
        none if bits is None else bits, items.positions, none if offsets is None else offsets, none if pages is None else pages,
        cache.key_scale if fp8 else none, cache.value_scale if fp8 else none, none if how.sinks is None else how.sinks,
        query.stride(0), query.stride(1), *cache.key.stride()[:3], *out.stride()[:3],
        *(stats.stride()[1:3] if stats is not None else (0, 0)), 0 if bits is None else bits.stride(0),
        0 if offsets is None else offsets.stride(0), 0 if pages is None else pages.stride(0),
        how.scale, how.softcap or 1.0, blocks, splits,
        GROUP=group, WIDTH=query.shape[2], WIDTH_P2=triton.next_power_of_2(query.shape[2]), BLOCK_M=tiles.rows, BLOCK_N=tiles.keys,
        BLOCK_T=min(tiles.keys, _TAIL),
        TREE=bits is not None, WINDOW=how.window or 0, SOFTCAP=how.softcap is not None, SINKS=how.sinks is not None, FP8=fp8,
        PAGE=0 if pages is None else cache.key.shape[2], DIRECT=stats is None,
        DTYPE=_product_type(query.dtype),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def variants() -> Iterator[Variant]:
    """The launches that matter, for ahead-of-time compilation: head widths, types, row blocks, and each feature once."""
    yield Variant("combine", _combine, _COMBINE_TYPES, {"WIDTH": 128, "WIDTH_P2": 128, "SPLITS_P2": 32, "SINKS": False})
    cases: list[tuple[str, str, int, int, int, dict[str, Any]]] = []
    cases += [(f"{dtype} {width}", dtype, width, 4, 16, {}) for dtype in ("bf16", "fp16") for width in (64, 80, 128, 256)]
    cases += [(f"fp32 {width}, {rows} rows", "fp32", width, 4, rows, {}) for width in (64, 128, 256) for rows in (16, 64)]
    cases += [(f"bf16 128, {rows} rows", "bf16", 128, 4, rows, {}) for rows in (32, 64, 128)]
    cases += [("bf16 256, 64 rows", "bf16", 256, 4, 64, {}), ("bf16 96, window", "bf16", 96, 1, 16, {"WINDOW": 4096})]
    cases += [("bf16 128, cap and sinks", "bf16", 128, 4, 16, {"SOFTCAP": True, "SINKS": True})]
    cases += [("bf16 128, e4m3", "bf16", 128, 4, 16, {"FP8": True}), ("bf16 128, pages", "bf16", 128, 4, 16, {"PAGE": 16})]
    cases += [("bf16 128, direct chain", "bf16", 128, 4, 16, {"DIRECT": True, "TREE": False})]
    for name, dtype, width, group, rows, features in cases:
        tiles = choose_tiles(1, rows // group, 1 << 17, 8, group, width, 4 if dtype == "fp32" else 2, 132)
        off = dict.fromkeys(("SOFTCAP", "SINKS", "FP8", "DIRECT"), False) | {"TREE": True, "WINDOW": 0, "PAGE": 0}
        sizes = {"GROUP": group, "WIDTH": width, "WIDTH_P2": triton.next_power_of_2(width), "BLOCK_M": tiles.rows}
        sizes |= {"BLOCK_N": tiles.keys, "BLOCK_T": min(tiles.keys, _TAIL)}
        constants = sizes | off | features | {"DTYPE": getattr(tl, _NAMES[dtype])}
        types = _ATTEND_TYPES | {"query": f"*{dtype}", "key": f"*{dtype}", "value": f"*{dtype}"}
        if features.get("FP8"):
            types |= {"key": "*u8", "value": "*u8"}
        if features.get("DIRECT"):
            types["out"] = f"*{dtype}"
        yield Variant(f"tree attention {name}", _attend, types, constants, tiles.warps, tiles.stages)


_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_ATTEND_TYPES = {
    **dict.fromkeys(("out", "tops", "totals", "key_scale", "value_scale", "sinks"), "*fp32"),
    **dict.fromkeys(("table", "bits", "positions", "offsets", "pages"), "*i64"),
    **dict.fromkeys(("query_row", "query_head", "cache_row_stride", "cache_head", "cache_slot", "out_split", "out_row"), "i32"),
    **dict.fromkeys(("out_head", "stat_split", "stat_row", "bits_row", "offset_row", "page_row", "blocks", "splits"), "i32"),
    **dict.fromkeys(("scale", "softcap"), "fp32"),
}
_COMBINE_TYPES = {
    **dict.fromkeys(("partial", "tops", "totals", "sinks"), "*fp32"),
    **dict.fromkeys(("part_split", "part_row", "part_head", "stat_split", "stat_row", "out_row", "out_head", "splits"), "i32"),
    "out": "*bf16",
}
