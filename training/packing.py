"""Documents packed into rows of one length, masks that keep them apart, and batches that a step number brings back."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specdec.errors import SpecDecError
from specdec.training.data import Example


@dataclass(frozen=True, slots=True)
class PackedRows:
    """M rows of L tokens. No document is split, and none sees another through `document_mask`.

    ids: [M, L] int64, padding holds the pad token.  positions: [M, L] int64, from 0 in every document, 0 in padding.
    documents: [M, L] int64, 1, 2, ... within the row, 0 is padding.  loss_mask: [M, L] bool, tokens to train on as labels,
    never padding. A document's first token has nothing before it: a shifted loss leaves it out by `documents`.
    """

    ids: Tensor
    positions: Tensor
    documents: Tensor
    loss_mask: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Tensor | slice) -> PackedRows:
        """The rows of that index [I] or slice."""
        return PackedRows(self.ids[index], self.positions[index], self.documents[index], self.loss_mask[index])

    def to(self, device: torch.device | str) -> PackedRows:
        """The same rows on the device."""
        parts = (self.ids, self.positions, self.documents, self.loss_mask)
        return PackedRows(*(part.to(device, non_blocking=True) for part in parts))


def pack(examples: Sequence[Example], length: int, *, pad: int, together: bool = True) -> PackedRows:
    """Every example, whole, in rows of `length` tokens; the result depends on the arguments only.

    Best fit decreasing: the longest example first, each into the fullest row that still holds it, else into a new row. Rows
    keep the order in which they were begun, so shuffle them (`batches` does). together: False gives every example its own
    row, in the examples' order. Raises SpecDecError for an example longer than a row.
    """
    long = [example for example in examples if len(example.ids) > length]
    if long:
        raise SpecDecError(
            f"{long[0].source}: {len(long[0].ids)} tokens do not fit into rows of {length}; "
            "set data.max_length to at most the row's length, or data.too_long to drop"
        )
    rows = _best_fit([len(example.ids) for example in examples], length) if together else [[i] for i in range(len(examples))]
    shape = (len(rows), length)
    ids, positions, documents = np.full(shape, pad, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    loss_mask = np.zeros(shape, np.bool_)
    for row, members in enumerate(rows):
        at = 0
        for number, example in enumerate((examples[i] for i in members), 1):
            place = slice(at, at := at + len(example.ids))
            ids[row, place], loss_mask[row, place] = example.ids, example.loss_mask
            positions[row, place], documents[row, place] = np.arange(len(example.ids)), number
    return PackedRows(*map(torch.from_numpy, (ids, positions, documents, loss_mask)))


def _best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    rows: list[list[int]] = []
    # Room left and number of each row that is not full, in order.
    still_open: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        size = lengths[index]
        at = bisect_left(still_open, (size, 0))
        left, row = still_open.pop(at) if at < len(still_open) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        if left > size:
            insort(still_open, (left - size, row))
    return rows


def num_batches(rows: int, batch: int, world: int = 1) -> int:
    """Batches of one epoch for each of `world` processes: every row is in one, and all processes have equally many."""
    return -(-rows // (batch * world))


def batches(
    rows: PackedRows, batch: int, *, epoch: int, seed: int, skip: int = 0, rank: int = 0, world: int = 1
) -> Iterator[PackedRows]:
    """The batches of an epoch from number `skip` on, of `batch` rows each, shuffled.

    Batch i is a function of (rows, batch, seed, epoch, i, rank, world) and of nothing else: to go on after step s,
    start at `divmod(s, num_batches(...))`. The processes' batches are disjoint; where the last ones lack rows, rows from
    the epoch's start fill them.
    """
    if not len(rows):
        raise SpecDecError("there are no rows to make batches of; see the data report for what was left out")
    order = np.random.default_rng((seed, epoch)).permutation(len(rows))
    for number in range(skip, num_batches(len(rows), batch, world)):
        first = (number * world + rank) * batch
        yield rows.take(torch.from_numpy(order[np.arange(first, first + batch) % len(rows)]))


def in_order(rows: PackedRows, batch: int, *, rank: int = 0, world: int = 1) -> Iterator[PackedRows]:
    """Every row once over all processes, unshuffled, the last batch shorter: for evaluation."""
    own = torch.arange(rank, len(rows), world)
    for part in own.split(batch):
        if len(part):
            yield rows.take(part)


def document_mask(documents: Tensor, positions: Tensor, window: int | None = None) -> Tensor:
    """What each token may look at: its own document up to itself. Returns bool [M, 1, L, L], True is visible.

    For the `attention_mask` of transformers' models with SDPA, beside `position_ids=positions`; they take a 4D mask as it
    is, so that a model with sliding windows needs window, in tokens, itself included. Padding sees itself alone, as a row
    without anything visible would be NaN. documents, positions: [M, L] of `PackedRows`.
    """
    behind = positions[:, :, None] - positions[:, None, :]
    visible = (documents[:, :, None] == documents[:, None, :]) & (behind >= 0) & (documents > 0)[:, :, None]
    if window is not None:
        visible &= behind < window
    visible |= torch.eye(documents.shape[1], dtype=torch.bool, device=documents.device)
    return visible[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The same mask as 0 and the type's lowest value, for eager attention, which adds it to the scores."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
