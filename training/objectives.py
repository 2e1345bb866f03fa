"""What a training method is to the loop: a module whose forward is a loss, and what becomes of it in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.drafters.base import Drafter
from specdec.training.packing import PackedRows


@dataclass(frozen=True, slots=True)
class Micro:
    """One forward's worth of a step. rows: on the device.  weight: scalar, the sum of its rows' weights.

    layout: what the method made of the rows; labels and indices, no hidden states.
    """

    rows: PackedRows
    layout: Any
    weight: Tensor


@dataclass(frozen=True, slots=True)
class Figures:
    """What a forward says of itself; all on the device, nothing waits for it.

    loss: scalar, to be minimised.  per_slot: [S] sums over rows of acceptance by head or position, and counts: [S] rows.
    """

    loss: Tensor
    per_slot: Tensor
    counts: Tensor


class Objective(Protocol):
    """A torch module as well: its parameters that require a gradient are what is trained."""

    slots: Sequence[str]

    def prepare(self, rows: PackedRows, generator: torch.Generator) -> Micro:
        """Make the layout of a batch. generator: on the rows' device, the only randomness."""

    def forward(self, micro: Micro, denominator: Tensor) -> Figures:
        """The loss of a batch: its weighted sum over denominator, the weight of the whole step."""

    def groups(self) -> list[tuple[list[tuple[str, torch.nn.Parameter]], float]]:
        """Named parameters, and their learning rate over optim.learning_rate."""

    def learns(self, group: int, step: int) -> bool:
        """Whether a group's weights change in this step."""

    def drafter(self) -> Drafter:
        """The drafter that the weights make at present, for evaluation."""

    def target(self) -> Any:
        """The causal LM that it drafts for."""

    def save(self, folder: Path, held_out: PackedRows | None) -> None:
        """Write what users load. held_out: on the device, for what has to be measured; None where there is none."""


def sums_by_slot(values: Tensor, slots: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """[S] sums and [S] counts of values [C] by slot [C] int64."""
    sums = torch.zeros(2, size, device=values.device)
    sums[0].index_add_(0, slots, values.detach().float())
    sums[1].index_add_(0, slots, torch.ones_like(slots, dtype=torch.float32))
    return sums[0], sums[1]
