"""Rows filled up to round numbers, on CPUs that multiply bf16 themselves.

Their library prepares a product anew for each number of rows, which takes a millisecond for every shape of weights: of a small
model more than the product itself. Prompts, what a draft has to catch up on and the rows of a batch come in any number. Filled
up, few numbers ever come. Up to 16 rows stay as they are: those come again and again, and each row counts. Attention runs on the
live rows alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from specdec.kernels.rows import power_of_two
from specdec.linear import cpu_has_fast_bf16

_EXACT = 16
# Rows are filled up to multiples of this share of the next power of two, and of so many at least.
_SHARE, _STEP = 8, 8


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
