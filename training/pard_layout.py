"""The training rows of PARD (arXiv 2504.18583): what a draft sees when it drafts in parallel, at every position at once.

Row (anchor a, depth b) of a document is the b-th mask token behind its token a: its input is x[a] at depth 0 and the mask token
otherwise, its position a + b, and its label x[a + b + 1]. It attends to the document's tokens up to a and to the masks between
a and itself. Conditional drop (COD) keeps at depth i only a share of the rows of depth i - 1. The mask follows from three
integer vectors, and is made on the device where the forward runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.errors import SpecDecError

IGNORED = -100


@dataclass(frozen=True, slots=True)
class PardRows:
    """P rows for each of M packed rows of text: depth 0 first, then depth 1 and so on, positions ascending within each.

    ids, positions, anchors, depths, documents, labels, places: [M, P] int64.  weights: [M, P] fp32.  anchors and positions
    count from the start of the document; positions = anchors + depths.  labels: -100, and weight 0, where there is none.
    places: where in the packed row the token in front of the label stands; what the target says there is what the row is to
    say. Rows behind the last are padding: document 0, position 0, weight 0; they see each other and nothing else, so that no
    row of a mask is empty.
    """

    ids: Tensor
    positions: Tensor
    anchors: Tensor
    depths: Tensor
    documents: Tensor
    labels: Tensor
    places: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> PardRows:
        """The same rows on another device."""
        return PardRows(*(getattr(self, name).to(device) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class PardLayout:
    """Which rows are made of a text. Raises `SpecDecError` on values outside their range.

    num_tokens: K, the tokens that are drafted in one forward, so depths 0 to K - 1.  mask_id: the mask token.
    retain, retain_min: of n tokens, depth i keeps int(n * max(retain ** i, retain_min)) rows; retain within (0, 1], and 1
    drops nothing; retain_min within [0, 1].  labelled_only: below depth 0, only chains that still lead to a label that counts are
    kept, and n is the number of tokens in the loss mask: no rows are spent on a long prompt. Not so in the paper.
    decay: a label of depth b weighs decay ** b; 1 in the paper.  multiple: P is rounded up to it, which keeps shapes few.
    """

    num_tokens: int
    mask_id: int
    retain: float = 0.7
    retain_min: float = 0.2
    labelled_only: bool = False
    decay: float = 1.0
    multiple: int = 1

    def __post_init__(self) -> None:
        """Refuse what is no layout."""
        if self.num_tokens < 1 or self.multiple < 1:
            raise SpecDecError(f"num_tokens {self.num_tokens} and multiple {self.multiple} are at least 1")
        if not (0 < self.retain <= 1 and 0 <= self.retain_min <= 1):
            raise SpecDecError(
                f"retain {self.retain} and retain_min {self.retain_min} are not shares; PARD takes 0.7 and 0.2, and 1 drops nothing"
            )
        if not 0 < self.decay < float("inf"):
            raise SpecDecError(f"decay {self.decay} is not above 0 and finite; 1 weighs all depths alike")

    def share(self, depth: int) -> float:
        """Of the tokens, the share that has a row of this depth."""
        return max(self.retain**depth, self.retain_min)


def pard_rows(
    ids: Tensor, documents: Tensor, loss_mask: Tensor, layout: PardLayout, generator: torch.Generator | None = None
) -> PardRows:
    """The kept rows of M packed rows of text, every one with its complete chain of rows from depth 0.

    ids: [M, L] int64.  documents: [M, L] integers, 0 for padding, otherwise a number for each document, unique within the
    row and without gaps.  loss_mask: [M, L] bool, of the predicted token.  generator: on the device of `ids`; not needed where
    nothing is dropped. Depth 0 keeps every token. Of the rows of depth i - 1 whose successor a + i is still in the
    document, as many as `layout` says are drawn uniformly without replacement, from all documents of a packed row together.

    Labels leave out nothing but what the loss mask leaves out: an end of text counts, also where it is the padding token.
    Waits for the device once, to know P. Raises `SpecDecError` where shapes do not fit.
    """
    _check(ids, documents, loss_mask, layout, generator)
    anchors, behind = _places(documents)
    depths = torch.arange(layout.num_tokens, device=ids.device)[None, :, None].expand(-1, -1, ids.shape[1])
    ahead = (torch.arange(ids.shape[1], device=ids.device) + depths + 1).clamp(max=ids.shape[1] - 1).expand(len(ids), -1, -1)
    counts = (behind[:, None, :] > depths) & _at(loss_mask.bool(), ahead)
    kept = _kept(documents != 0, behind, counts, loss_mask, layout, generator)
    columns = (
        torch.where(depths == 0, ids[:, None, :], layout.mask_id),
        anchors[:, None, :] + depths,
        anchors[:, None, :].expand_as(kept),
        depths.expand_as(kept),
        documents[:, None, :].long().expand_as(kept),
        torch.where(counts, _at(ids, ahead), IGNORED),
        ahead - 1,
        torch.where(counts, layout.decay ** depths.double(), 0.0).float(),
    )
    order, live = _order(kept.flatten(1), layout.multiple)
    empty = (layout.mask_id, 0, 0, 0, 0, IGNORED, 0, 0)
    picked = (column.flatten(1).gather(1, order) for column in columns)
    return PardRows(*(torch.where(live, column, value) for column, value in zip(picked, empty, strict=True)))


def _check(ids: Tensor, documents: Tensor, loss_mask: Tensor, layout: PardLayout, generator: torch.Generator | None) -> None:
    if not ids.shape == documents.shape == loss_mask.shape or ids.dim() != 2:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (ids, documents, loss_mask))
        raise SpecDecError(f"ids, documents and loss_mask are {shapes}; all are [M, L]")
    if generator is None and layout.share(layout.num_tokens - 1) < 1:
        raise SpecDecError("rows are dropped at random and no generator came; pass one, or retain=1 to keep all rows")


def _places(documents: Tensor) -> tuple[Tensor, Tensor]:
    """[M, L] each: how many tokens of the same document stand before a token, and how many behind it."""
    length = documents.shape[1]
    index = torch.arange(length, device=documents.device).expand_as(documents)
    change = documents[:, 1:] != documents[:, :-1]
    edge = torch.ones_like(documents[:, :1], dtype=torch.bool)
    first = torch.where(torch.cat([edge, change], 1), index, 0).cummax(1).values
    last = torch.where(torch.cat([change, edge], 1), index, length).flip(1).cummin(1).values.flip(1)
    return index - first, last - index


def _kept(
    real: Tensor, behind: Tensor, counts: Tensor, loss_mask: Tensor, layout: PardLayout, generator: torch.Generator | None
) -> Tensor:
    """[M, K, L] bool: which anchors have a row of each depth.  counts: [M, K, L], where such a row has a label that counts."""
    useful = counts.long().flip(1).cummax(1).values.flip(1).bool()
    tokens = ((real & loss_mask.bool()) if layout.labelled_only else real).sum(1, keepdim=True)
    kept = [real]
    # One order serves all depths: what comes first among the kept is a uniform choice of them, whatever was kept before.
    order = torch.rand(real.shape, dtype=torch.float64, device=real.device, generator=generator)
    for depth in range(1, layout.num_tokens):
        # The last token of a document has a row of a depth, though it has no label there.
        able = useful[:, depth] if layout.labelled_only else behind >= depth
        candidates, share = kept[-1] & able, layout.share(depth)
        rank = order.masked_fill(~candidates, 2.0).argsort(dim=1, stable=True).argsort(1)
        kept.append(candidates if share == 1 else candidates & (rank < (tokens.double() * share).long()))
    return torch.stack(kept, 1)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """[M, K, L]: values [M, L] at index [M, K, L]."""
    return values[:, None, :].expand_as(index).gather(2, index)


def _order(kept: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """[M, P] each: where the kept rows of [M, K * L] stand, in order, and which of the P are rows at all."""
    counts = kept.sum(1, keepdim=True)
    width = -(-max(int(counts.max()), 1) // multiple) * multiple
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)
    if width > order.shape[1]:
        order = torch.nn.functional.pad(order, (0, width - order.shape[1]))
    return order[:, :width], torch.arange(width, device=kept.device) < counts


class Places(NamedTuple):
    """Three integer vectors that say where rows stand, of any shapes that broadcast."""

    anchors: Tensor
    depths: Tensor
    documents: Tensor


def allowed(query: Places, key: Places) -> Tensor:
    """Bool, broadcast: whether the query's row attends to the key's row.

    Of the same document it sees the tokens up to its anchor, and of its own chain what is not deeper than itself.
    """
    text = (key.depths == 0) & (key.anchors <= query.anchors)
    chain = (key.anchors == query.anchors) & (key.depths <= query.depths)
    return (query.documents == key.documents) & (text | chain)


def bool_mask(rows: PardRows, block: int = 1024) -> Tensor:
    """[M, 1, P, P] bool, true where attended, on the device of `rows`, for SDPA: M * P * P bytes.

    block: query rows that are compared at a time; what the comparison takes besides is five times M * block * P bytes.
    """
    anchors, depths, documents = rows.anchors, rows.depths, rows.documents
    size = anchors.shape[1]
    mask = torch.empty(anchors.shape[0], 1, size, size, dtype=torch.bool, device=anchors.device)
    keys = Places(anchors[:, None, :], depths[:, None, :], documents[:, None, :])
    for start in range(0, size, block):
        part = slice(start, min(start + block, size))
        queries = Places(anchors[:, part, None], depths[:, part, None], documents[:, part, None])
        mask[:, 0, part] = allowed(queries, keys)
    return mask


def additive_mask(rows: PardRows, dtype: torch.dtype, block: int = 1024) -> Tensor:
    """[M, 1, P, P] of `dtype`, 0 where attended and its lowest number elsewhere, on the device of `rows`.

    Takes M * P * P elements of `dtype` and as many bytes; eager attention adds it to its scores.
    """
    mask = bool_mask(rows, block)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def mask_mod(rows: PardRows) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule as FlexAttention asks for it, (batch, head, query, key) to bool: nothing of P * P exists.

    Holds the three vectors of `rows`, so it belongs to one batch and its device. Make a block mask of it with
    `torch.nn.attention.flex_attention.create_block_mask(mask_mod(rows), M, None, P, P, device)`.
    """
    anchors, depths, documents = rows.anchors, rows.depths, rows.documents

    def at(batch: Tensor, row: Tensor) -> Places:
        return Places(anchors[batch, row], depths[batch, row], documents[batch, row])

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return allowed(at(batch, query), at(batch, key))

    return seen
