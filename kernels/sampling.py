"""Temperature, top-k, top-p and min-p in Triton, without a sort: one program a row searches for the smallest value to keep.

Top-k and top-p both keep what is not below an edge, the smallest value of the row such that what lies above it weighs less
than a limit: k when every token weighs 1, a share of the whole when a token weighs its probability. The search halves the
range of values, and each pass over the row brings the ends of the range to values that occur, so that it ends when the range
holds one value. The twin is `reference_rules.filter_logits`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.variant import Variant

_SIGN = tl.constexpr(0x7FFFFFFF)
# Halvings of the values; later ones halve the bit patterns, which ends within 32 whatever the values are.
_LINEAR = tl.constexpr(16)
_BLOCK = 4096
_SMALL_BLOCK = 1024


@triton.jit
def _key(value):
    """int32 that orders as the fp32 value does, both zeros alike."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ _SIGN, bits)


@triton.jit
def _value(key):
    """The fp32 value of a key."""
    return tl.where(key < 0, key ^ _SIGN, key).to(tl.float32, bitcast=True)


@triton.jit
def _scale(logits, out, temperature, vocabulary, HAS_T: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the row divided by its temperature; returns its smallest and largest key, and whether it has a law."""
    low, high = tl.full((BLOCK,), _SIGN, tl.int32), tl.full((BLOCK,), -_SIGN, tl.int32)
    broken = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        live = columns < vocabulary
        value = tl.load(logits + columns, mask=live, other=0.0).to(tl.float32)
        if HAS_T:
            # Rounded as in torch; the plain division of a GPU is off by some units in the last place.
            value = tl.div_rn(value, tl.full((BLOCK,), 1.0, tl.float32) * tl.load(temperature).to(tl.float32))
        tl.store(out + columns, value, mask=live)
        broken |= (live & ((value != value) | (value == float("inf")))).to(tl.int32)
        low = tl.where(live, tl.minimum(low, _key(value)), low)
        high = tl.where(live, tl.maximum(high, _key(value)), high)
    high_here = tl.max(high, 0)
    return tl.min(low, 0), high_here, (tl.max(broken, 0) == 0) & (_value(high_here) > float("-inf"))


@triton.jit
def _weigh(row, vocabulary, middle, top, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """What lies above the middle key weighs, and the keys of the row next to the middle: the last one up to it, the first above."""
    weight = tl.zeros((BLOCK,), tl.float32)
    below, above = tl.full((BLOCK,), -_SIGN, tl.int32), tl.full((BLOCK,), _SIGN, tl.int32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        live = columns < vocabulary
        value = tl.load(row + columns, mask=live, other=0.0)
        key = _key(value)
        higher = live & (key > middle)
        weight += tl.where(higher, tl.exp(value - top) if MASS else 1.0, 0.0)
        above = tl.where(higher, tl.minimum(above, key), above)
        below = tl.where(live & (key <= middle), tl.maximum(below, key), below)
    return tl.sum(weight, 0), tl.max(below, 0), tl.min(above, 0)


@triton.jit
def _edge(row, vocabulary, low, high, top, limit, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest key of the row, from low to high, such that what lies above it weighs less than the limit, else high."""
    step = 0
    while low < high:
        # In 64 bits: the keys of two values may be more than 2^31 apart.
        middle = ((low.to(tl.int64) + high.to(tl.int64)) >> 1).to(tl.int32)
        if step < _LINEAR:
            middle = _key(0.5 * _value(low) + 0.5 * _value(high))
        middle = tl.minimum(tl.maximum(middle, low), high - 1)
        weight, below, above = _weigh(row, vocabulary, middle, top, MASS, BLOCK)
        fits = weight < limit
        low, high = tl.where(fits, low, above), tl.where(fits, below, high)
        step += 1
    return high


@triton.jit
def _hide(row, vocabulary, edge, highest, least, BLOCK: tl.constexpr):
    """Sets to -inf what is below the edge, or less probable than `least` times the most probable; never the highest."""
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        live = columns < vocabulary
        value = tl.load(row + columns, mask=live, other=0.0)
        key = _key(value)
        hidden = (key < edge) | (tl.exp(value - _value(highest)) < least)
        tl.store(row + columns, float("-inf"), mask=live & hidden & (key < highest))


@triton.jit
def _filter(
    logits, out, temperature, top_k, top_p, min_p, logits_row, out_row, vocabulary, HAS_T: tl.constexpr, HAS_K: tl.constexpr,
    HAS_P: tl.constexpr, HAS_MIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    out += row * out_row
    edge, highest, lawful = _scale(logits + row * logits_row, out, temperature + row, vocabulary, HAS_T, BLOCK)
    # The passes that follow read what this one wrote, and a thread may be given other columns then.
    tl.debug_barrier()
    top = _value(highest)
    if lawful:
        if HAS_K:
            count = tl.load(top_k + row)
            if (count > 0) & (count < vocabulary):
                edge = _edge(out, vocabulary, edge, highest, top, count.to(tl.float32), False, BLOCK)
        if HAS_P:
            share = tl.load(top_p + row).to(tl.float32)
            if share < 1.0:
                whole, _, _ = _weigh(out, vocabulary, edge - 1, top, True, BLOCK)
                edge = _edge(out, vocabulary, edge, highest, top, share * whole, True, BLOCK)
        if HAS_K or HAS_P or HAS_MIN:
            least = tl.load(min_p + row).to(tl.float32) if HAS_MIN else 0.0
            # No thread may still be reading what is now overwritten.
            tl.debug_barrier()
            _hide(out, vocabulary, edge, highest, least, BLOCK)


def filter_logits(
    logits: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """[R, V] fp32: each row divided by its temperature, then what top-k, top-p and min-p remove, in this order, set to -inf.

    logits: [R, V], last dimension dense.  The others: [R], a value for each row, or None. top_k keeps every token
    that is not below the k-th largest, and 0 keeps all; top_p keeps a token where what is strictly more probable sums to less
    than top_p, so all tokens of the edge's value, and 1 keeps all; min_p keeps what is at least that share of the most probable.
    The most probable token always stays. A row that holds NaN or +inf, or nothing but -inf, has no law, and keeps all.
    Sums are fp32, in an order that depends on V alone, so that a row gets the same tokens in every batch.
    """
    rows, vocabulary = logits.shape
    assert logits.stride(1) == 1 or vocabulary == 1, "the last dimension is dense"
    given = [None if x is None else x.contiguous() for x in (temperature, top_k, top_p, min_p)]
    out = torch.empty(rows, vocabulary, dtype=torch.float32, device=logits.device)
    if out.numel() == 0:
        return out
    block = _BLOCK if vocabulary > _SMALL_BLOCK else _SMALL_BLOCK
    _filter[(rows,)](
        logits, out, *(logits if x is None else x for x in given), logits.stride(0), out.stride(0), vocabulary,
        *(x is not None for x in given), BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out


def _warps(block: int) -> int:
    """As many as need no spilled registers."""
    return 16 if block > _SMALL_BLOCK else 8


def variants() -> Iterator[Variant]:
    """Ahead-of-time compilation: the types of rows, blocks of the vocabulary, each filter alone and all together."""
    names = ("HAS_T", "HAS_K", "HAS_P", "HAS_MIN")
    parameters = {"temperature": "*fp32", "top_k": "*i64", "top_p": "*fp32", "min_p": "*fp32"}
    types = parameters | {"out": "*fp32", "logits_row": "i32", "out_row": "i32", "vocabulary": "i32"}
    cases: list[tuple[str, int, tuple[str, ...]]]
    cases = [(dtype, block, names) for dtype in ("bf16", "fp16", "fp32") for block in (_SMALL_BLOCK, _BLOCK)]
    cases += [("bf16", _BLOCK, (name,)) for name in names]
    for dtype, block, used in cases:
        label = "all" if used is names else used[0].lower().removeprefix("has_")
        constants = {name: name in used for name in names} | {"BLOCK": block}
        yield Variant(f"filter {dtype} {label}, {block}", _filter, types | {"logits": f"*{dtype}"}, constants, _warps(block))
