"""Which rows train which head of Medusa: head k (0-based) at position t predicts token t + 2 + k (arXiv 2401.10774)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import SpecDecError


@dataclass(frozen=True, slots=True)
class MedusaRows:
    """The C pairs of a position and a head that count in the loss, sorted by head, then by position.

    rows: [C] int64, the position in the flattened [M * L].  heads: [C] int64.  labels: [C] int64, the token to predict.
    weights: [C] fp32, decay ** (head + 1).  bounds: K + 1 host integers; the pairs of head k are [bounds[k], bounds[k + 1]).
    """

    rows: Tensor
    heads: Tensor
    labels: Tensor
    weights: Tensor
    bounds: tuple[int, ...]

    @property
    def num_heads(self) -> int:
        """K."""
        return len(self.bounds) - 1

    def of_head(self, head: int) -> slice:
        """The pairs of one head."""
        return slice(self.bounds[head], self.bounds[head + 1])


def medusa_rows(ids: Tensor, documents: Tensor, loss_mask: Tensor, *, num_heads: int, decay: float = 0.8) -> MedusaRows:
    """Head k counts at position t where token t + 2 + k is in the document of t and in the loss mask.

    ids: [M, L] int64.  documents: [M, L] integers, 0 for padding, otherwise a number for each document, unique within the
    row.  loss_mask: [M, L] bool, of the predicted token, never of position t.  decay: head k weighs decay ** (k + 1); the
    language model's own head would weigh 1. Waits for the device once, so it is best made where the data is.
    Raises `SpecDecError` where shapes or numbers do not fit.
    """
    if not ids.shape == documents.shape == loss_mask.shape or ids.dim() != 2:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (ids, documents, loss_mask))
        raise SpecDecError(f"ids, documents and loss_mask are {shapes}; all are [M, L]")
    if num_heads < 1 or not decay > 0:
        raise SpecDecError(f"num_heads {num_heads} and decay {decay}: there is at least one head, and decay is above 0")
    counts = torch.stack([_counts(documents, loss_mask.bool(), 2 + head) for head in range(num_heads)])
    heads, row, position = counts.nonzero(as_tuple=True)
    sizes = counts.sum((1, 2)).cumsum(0).tolist()
    weights = (decay ** (heads + 1).double()).float()
    return MedusaRows(row * ids.shape[1] + position, heads, ids[row, position + 2 + heads], weights, (0, *sizes))


def _counts(documents: Tensor, loss_mask: Tensor, ahead: int) -> Tensor:
    """[M, L] bool: the token so far ahead is of the same document and in the loss mask."""
    counts = torch.zeros_like(loss_mask)
    here, there = documents[:, :-ahead], documents[:, ahead:]
    counts[:, :-ahead] = (here == there) & (here != 0) & loss_mask[:, ahead:]
    return counts


def per_head(values: Tensor, layout: MedusaRows) -> Tensor:
    """[K] fp32: the mean of a statistic over the pairs of each head, 0 for a head that has none; nothing is copied to the host.

    values: [C], for example the acceptance or the matches of a loss.
    """
    sums = torch.zeros(2, layout.num_heads, device=values.device)
    heads = layout.heads.to(values.device)
    sums[0].index_add_(0, heads, values.detach().float())
    sums[1].index_add_(0, heads, torch.ones_like(heads, dtype=torch.float32))
    return sums[0] / sums[1].clamp(min=1)
