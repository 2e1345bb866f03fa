"""Rows filled up to numbers that came before, on CPUs that multiply bf16 themselves.

Their library prepares a product anew for each number of rows, which takes a millisecond for every shape of weights: of a small
model more than the product itself. Prompts, what a draft has to catch up on and the rows of a batch come in any number. Filled
up, few numbers ever come: more than 16 rows to round ones, and any number to one that is captured, until it has come often.
Attention runs on the live rows alone. On the CPU tried (AMX) a row's products are the same bits whatever their number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from specdec.kernels.rows import power_of_two
from specdec.linear import cpu_has_fast_bf16

_EXACT = 16
# Rows are filled up to multiples of this share of the next power of two, and of so many at least.
_SHARE, _STEP = 8, 8
# Rows that may be added to reach a captured number: so many, or this share. How often, before a number is prepared itself.
_ADDED, _ADDED_SHARE, _OFTEN = 4, 4, 32


def prepares_rows(model: nn.Module) -> bool:
    """Whether each number of rows is prepared anew for this model on this machine."""
    weights = [m.weight for m in model.modules() if type(m) is nn.Linear]
    native = all(w.device.type == "cpu" and w.dtype == torch.bfloat16 for w in weights)
    return bool(weights) and native and cpu_has_fast_bf16()


def round_number(rows: int) -> int:
    """So many rows, filled up."""
    if rows <= _EXACT:
        return rows
    step = max(power_of_two(rows) // _SHARE, _STEP)
    return -(-rows // step) * step


class RoundRows:
    """How many rows forwards are filled up to."""

    def __init__(self, captured: Callable[[int], bool]) -> None:
        """captured: whether so many rows run as fast as they can."""
        self._captured = captured
        self._came: dict[int, int] = {}

    def __call__(self, rows: int) -> int:
        """For so many live ones."""
        size = round_number(rows)
        if self._captured(size) or self._came.get(size, 0) >= _OFTEN:
            return size
        most = rows + max(rows // _ADDED_SHARE, _ADDED)
        larger = next(filter(self._captured, range(size + 1, most + 1)), size)
        if larger > size:
            self._came[size] = self._came.get(size, 0) + 1
        return larger


def filled_up(values: Tensor, rows: int) -> Tensor:
    """[1, R] to [1, rows], zeros behind what is there."""
    return nn.functional.pad(values, (0, rows - values.shape[1])) if values.shape[1] < rows else values


class LiveRows:
    """An attention context for the first `live` of a forward's rows; the others write nothing and get zeros."""

    def __init__(self, context: Any, live: int, rows: int) -> None:
        """context: of the live rows, see `AttentionContext`.  rows: of the forward."""
        self._context, self._live, self._missing = context, live, rows - live

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *how: Any) -> Tensor:
        """See `AttentionContext.attend`."""
        query, key, value = (each[:, :, : self._live] for each in (query, key, value))
        out: Tensor = self._context.attend(query, key, value, *how)
        return nn.functional.pad(out, (0, 0, 0, 0, 0, self._missing))
