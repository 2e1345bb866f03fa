"""Where packed rows live in the cache, and what each of them may see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import add

import torch
from torch import Tensor

from specdec.kernels.tiles import Items
from specdec.kernels.transfer import on_device


@dataclass(frozen=True, slots=True)
class Shared:
    """Cache rows first to end - 1, whose first `slots` slots hold the same keys and values."""

    first: int
    end: int
    slots: int


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one forward `[1, R]`, grouped by request, requests in cache order.

    lengths: B host integers, slots of the cache that hold committed tokens.  sizes: B host integers, rows of each
    request, R in all.  tokens, positions: [1, R].  slots: [R] where each row's K and V are written; a
    request's rows fill the slots from `base[b]` on, in order.  tree: [B, N, T] bool, whether row n of a request sees its slot
    lengths[b] + t; None means that the rows are a chain behind the committed tokens (base == lengths).
    offsets: [B, T] positions of those T slots less lengths[b]; only windows need them, None for a chain.
    shared: common prefixes, which an attention may read once for all their rows.
    """

    lengths: tuple[int, ...]
    sizes: tuple[int, ...]
    tokens: Tensor
    positions: Tensor
    slots: Tensor
    base: tuple[int, ...]
    tree: Tensor | None = None
    offsets: Tensor | None = None
    shared: tuple[Shared, ...] = ()

    @property
    def span(self) -> int:
        """Slots that an attention over these rows has to view."""
        span: int = max(map(add, self.base, self.sizes))
        return span

    @property
    def uniform(self) -> bool:
        """Every request has the same number of rows."""
        return len(set(self.sizes)) == 1


def request_of_row(rows: Rows) -> Tensor:
    """[R] int64, the cache row of each packed row."""
    device = rows.slots.device
    sizes = on_device(rows.sizes, device)
    return torch.repeat_interleave(torch.arange(len(rows.sizes), device=device), sizes, output_size=sum(rows.sizes))


def padded_index(sizes: Sequence[int], device: torch.device) -> Tensor:
    """[B, N] int64: the packed row of node n of request b; padding repeats the request's first row."""
    widest, last = max(sizes), sum(sizes) - 1
    starts = [min(sum(sizes[:b]), last) for b in range(len(sizes))]
    table = [[start + (n if n < size else 0) for n in range(widest)] for start, size in zip(starts, sizes, strict=True)]
    return on_device(table, device)


def _chain_tree(rows: Rows) -> tuple[Tensor, Tensor]:
    """The tree and offsets that a chain of rows stands for."""
    widest = max(rows.sizes)
    order = torch.arange(widest, device=rows.slots.device)
    tree = (order[:, None] >= order).expand(len(rows.sizes), widest, widest)
    return tree, order.expand(len(rows.sizes), widest)


def visible(rows: Rows, span: int, window: int | None = None) -> Tensor:
    """[B, N, S] bool with S = span, at least rows.span: what each padded row sees of its request's slots.

    A window of W hides keys whose *position* is W or more before the row's own: siblings of a tree share a position,
    so slots would be wrong. Padding rows see what their request's first row sees, so no row is empty.
    """
    tree, offsets = (rows.tree, rows.offsets) if rows.tree is not None else _chain_tree(rows)
    batch, _, width = tree.shape
    device = rows.slots.device
    lengths = on_device(rows.lengths, device)[:, None]
    slots = torch.arange(span, device=device)
    inside = (slots - lengths).clamp(0, width - 1)
    behind = slots < lengths
    seen = behind[:, None] | (tree.gather(2, inside[:, None].expand(-1, tree.shape[1], -1)) & (slots < lengths + width)[:, None])
    if window is not None:
        assert offsets is not None, "a tree of rows needs its slots' positions for a sliding window"
        key_positions = torch.where(behind, slots.expand(batch, -1), lengths + offsets.gather(1, inside))
        positions = rows.positions[0][padded_index(rows.sizes, device)]
        seen = seen & (positions[:, :, None] - key_positions[:, None] < window)
    return seen


def items_of(rows: Rows) -> list[Items]:
    """What the tree attention kernel is told of these rows: an item a request, and before them an item a shared prefix."""
    device, starts = rows.slots.device, list(accumulate(rows.sizes, initial=0))
    begins = private_from(rows.shared, len(rows.sizes))
    ends = list(map(add, rows.base, rows.sizes))
    table = [[starts[b], rows.sizes[b], b, begins[b], rows.lengths[b], end] for b, end in enumerate(ends)]
    bits = None if rows.tree is None else ancestor_words(rows.tree, rows.sizes)
    positions = rows.positions[0].contiguous()
    most = power_of_two(max(end - begin for begin, end in zip(begins, ends, strict=True)))
    own = Items(on_device(table, device), positions, max(rows.sizes), most, bits, rows.offsets)
    if not rows.shared:
        return [own]
    common = [[starts[s.first], starts[s.end] - starts[s.first], s.first, 0, s.slots, s.slots] for s in rows.shared]
    most_rows, most = (power_of_two(max(line[i] for line in common)) for i in (1, 4))
    return [Items(on_device(common, device), positions, most_rows, most), own]


def private_from(shared: Sequence[Shared], num_requests: int) -> list[int]:
    """For each cache row the first slot that it does not share."""
    begins = [0] * num_requests
    for common in shared:
        begins[common.first : common.end] = [common.slots] * (common.end - common.first)
    return begins


def power_of_two(n: int) -> int:
    """The smallest power of two that is n or more: captured launches go by it."""
    return 1 << (n - 1).bit_length()


def ancestor_words(tree: Tensor, sizes: Sequence[int]) -> Tensor:
    """[R, W] int64: bit t % 64 of word t // 64 says whether a packed row sees tree slot t. tree: [B, N, T] bool."""
    padded = torch.nn.functional.pad(tree, (0, -tree.shape[2] % 64)).unflatten(2, (-1, 64))
    words: Tensor = (padded.long() << torch.arange(64, device=tree.device)).sum(3)
    if len(sizes) == 1:
        return words[0, : sizes[0]]
    live = [b * tree.shape[1] + n for b, size in enumerate(sizes) for n in range(size)]
    return words.flatten(0, 1)[on_device(live, tree.device)]
