"""What the attention kernel is launched with: its operands as values, and tiles and splits chosen from shapes only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Fewer keys than this in a split cost more in launches and merging than they save.
_KEYS_PER_SPLIT = 256
# Partial sums, written and read in fp32, may cost this share of the bf16 keys and values that are read.
_PARTIAL_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Items:
    """What each item attends to; tensors on the device, so that one captured launch serves every tree.

    table: [I, 6] int64, a row (first packed row, rows, cache row, first slot, committed, end): its rows attend to the slots
    from `first slot` up to `end`. All rows see the slots below `committed`; slot committed + j is seen where bit j of
    the row's words is set.
    bits: [R, W] int64, or None for chains, in which row n sees every j <= n.  positions: [R] int64, and offsets: [I, T] int64,
    the position of slot committed + j less `committed`; only windows need them.
    most_rows, most_slots: host bounds on the rows and the slots of an item.
    """

    table: Tensor
    positions: Tensor
    most_rows: int
    most_slots: int
    bits: Tensor | None = None
    offsets: Tensor | None = None


@dataclass(frozen=True, slots=True)
class KeyValues:
    """One layer's cache. key, value: [C, Hkv, S, D] of one stride; uint8 holds e4m3, to be multiplied by scales [Hkv] fp32.

    pages: [C', P] int64, a block table; then C counts pages of S slots each. None: a cache row is one piece.
    """

    key: Tensor
    value: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    pages: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Logits:
    """How logits are made. window: positions a row sees, its own included.  sinks: [H] fp32, one more logit without a value."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Tiles:
    """A launch: rows and keys of a tile, splits of the keys, warps and stages of a program."""

    rows: int
    keys: int
    splits: int
    warps: int
    stages: int


def choose_tiles(
    items: int, most_rows: int, most_slots: int, heads: int, group: int, width: int, itemsize: int, processors: int
) -> Tiles:
    """Tiles for shapes alone, so that a captured launch stays right while texts grow. heads: of keys and values.

    itemsize: bytes of the type that is multiplied.  processors: of the device; the splits fill them two to three times over.
    Keys, warps and stages are the largest that spill no registers on sm_80 and sm_90, see `specdec.kernels.ahead`.
    """
    packed = most_rows * group
    rows, keys, warps, stages = _shape(max(16, _power_of_two(packed)), width, itemsize)
    blocks = -(-packed // rows)
    wanted = -(-5 * processors // (2 * items * blocks * heads))
    cap = min(most_slots // _KEYS_PER_SPLIT, int(_PARTIAL_SHARE / 2 * most_slots / packed))
    return Tiles(rows, keys, max(1, min(wanted, cap, 128)), warps, stages)


def _shape(packed: int, width: int, itemsize: int) -> tuple[int, int, int, int]:
    """Rows, keys, warps and stages of a program."""
    if itemsize > 2:
        return (16, 16, 4, 1) if width > 128 else (16, 32, 8, 2) if width > 64 else (min(packed, 32), 32, 4, 2)
    if width > 128:
        rows = min(packed, 64)
        return rows, 32, 8 if rows == 64 else 4, 2
    rows = min(packed, 128)
    return rows, 64 if width > 64 or rows >= 64 else 128, 8 if rows >= 64 else 4, 2 if rows > 64 else 3


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
