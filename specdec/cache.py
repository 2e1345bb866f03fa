"""Our KV cache: per-request lengths, one tensor for all layers that are alike, compaction in one operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import OutOfCacheError
from specdec.kernels.dispatch import SLOT_TILE
from specdec.kernels.reference import kv_compact
from specdec.kernels.rows import Shared
from specdec.kernels.transfer import on_device


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one attention layer writes: KV heads, widths of K and V, dtype and device; its sliding window or None."""

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    device: torch.device
    window: int | None = None

    @property
    def group(self) -> tuple[int, int, torch.dtype, torch.device]:
        """Layers with the same group share a tensor."""
        return self.heads, max(self.key_width, self.value_width), self.dtype, self.device


def _whole_tiles(slots: int) -> int:
    return -(-slots // SLOT_TILE) * SLOT_TILE


class KVCache:
    """K and V of every layer for B requests. Slot s of a row holds position s while s < lengths[row].

    Rows are requests in the order of the round. Tree nodes are written behind the committed slots and moved or forgotten
    by `commit`. layers[i]: the pair (K, V), [B, H, S, D] each, views of one [L, 2, B, H, S, D] tensor per group of
    like layers, in groups.
    slots: [S] int64, 0 to S - 1, on the first layer's device.  shared: rows that begin with the same tokens, see `repeat`.
    """

    def __init__(self, specs: Sequence[LayerSpec], num_requests: int, capacity: int) -> None:
        """Room for `capacity` slots a request, tree nodes included; zeroed, since masked NaN would still spread."""
        self.specs = tuple(specs)
        self.capacity = _whole_tiles(capacity)
        self.lengths = [0] * num_requests
        self.shared: tuple[Shared, ...] = ()
        self.groups: list[Tensor] = []
        for group in dict.fromkeys(spec.group for spec in self.specs):
            heads, width, dtype, device = group
            count = sum(spec.group == group for spec in self.specs)
            shape = (count, 2, num_requests, heads, self.capacity, width)
            self.groups.append(torch.zeros(shape, dtype=dtype, device=device))
        self.layers = self._views()
        self.slots = torch.arange(self.capacity, device=self.specs[0].device)

    def _views(self) -> list[tuple[Tensor, Tensor]]:
        keys = list(dict.fromkeys(spec.group for spec in self.specs))
        used = [0] * len(keys)
        views = []
        for spec in self.specs:
            which = keys.index(spec.group)
            pair = self.groups[which][used[which]]
            used[which] += 1
            views.append((pair[0, ..., : spec.key_width], pair[1, ..., : spec.value_width]))
        return views

    @property
    def num_bytes(self) -> int:
        """Memory of the whole cache."""
        return sum(group.numel() * group.element_size() for group in self.groups)

    def ensure(self, slots: int) -> None:
        """Make room for at least `slots` slots a request; grows by half, so that growth is rare."""
        if slots <= self.capacity:
            return
        self.capacity = _whole_tiles(max(slots, self.capacity * 3 // 2))
        for i, old in enumerate(self.groups):
            new = torch.zeros((*old.shape[:4], self.capacity, old.shape[5]), dtype=old.dtype, device=old.device)
            new[..., : old.shape[4], :] = old
            self.groups[i] = new
        self.layers = self._views()
        self.slots = torch.arange(self.capacity, device=self.slots.device)

    def fits(self, num_requests: int, capacity: int) -> bool:
        """Whether a batch of this size needs no other memory."""
        return capacity <= self.capacity and bool(self.groups) and num_requests <= self.groups[0].shape[2]

    def reset(self, num_requests: int) -> None:
        """Begin a batch that fits in the same memory, so that what was captured on it stays right."""
        self.lengths, self.shared = [0] * num_requests, ()
        for group in self.groups:
            group.zero_()

    def repeat(self, sources: Sequence[int], shared_from: int) -> None:
        """Make every row b a copy of row sources[b], which is its own source.

        Neighbours of one source then share what they hold, where that is shared_from slots or more.
        """
        copies = [row for row, source in enumerate(sources) if row != source]
        if not copies:
            return
        self.lengths = [self.lengths[source] for source in sources]
        used = max(self.lengths[row] for row in copies)
        for group in self.groups:
            there = on_device([sources[row] for row in copies], group.device)
            group[:, :, on_device(copies, group.device), :, :used] = group[:, :, there, :, :used]
        self.shared = tuple(Shared(a, b, self.lengths[a]) for a, b in _runs(sources) if self.lengths[a] >= shared_from)

    def arrange(self, order: Sequence[int]) -> None:
        """Keep these rows, in this order, in place: only rows that change their place are copied, as far as they are filled."""
        moved = [row for row, source in enumerate(order) if row != source]
        self.lengths = [self.lengths[row] for row in order]
        self._arrange_shared(order)
        if moved:
            used = max(self.lengths[row] for row in moved)
            for group in self.groups:
                sources = on_device([order[row] for row in moved], group.device)
                group[:, :, on_device(moved, group.device), :, :used] = group[:, :, sources, :, :used]

    def closed_up(self, rows: Sequence[int]) -> list[int]:
        """These rows in an order for `arrange` that moves the fewest: gaps are filled from behind, unless slots are shared."""
        if self.shared:
            return list(rows)
        kept, behind = set(rows), [row for row in rows if row >= len(rows)]
        return [row if row in kept else behind.pop() for row in range(len(rows))]

    def _arrange_shared(self, order: Sequence[int]) -> None:
        """What is shared by rows that are still neighbours."""
        which: list[int] = [-1 - row for row in range(len(order))]
        for number, common in enumerate(self.shared):
            which = [number if common.first <= order[row] < common.end else name for row, name in enumerate(which)]
        self.shared = tuple(Shared(a, b, self.shared[which[a]].slots) for a, b in _runs(which) if which[a] >= 0)

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep node 0 and the nodes of each row's path, which become the next slots; forget the other nodes."""
        rows: list[int] = []
        source: list[int] = []
        target: list[int] = []
        for row, path in enumerate(paths):
            for step, node in enumerate(path, start=1):
                if node != step:
                    rows.append(row)
                    source.append(self.lengths[row] + node)
                    target.append(self.lengths[row] + step)
            self.lengths[row] += 1 + len(path)
        if rows:
            for group in self.groups:
                kv_compact(group, *on_device([rows, source, target], group.device))


def _runs(names: Sequence[int]) -> list[tuple[int, int]]:
    """(first, end) of two or more equal neighbours."""
    ends = [i + 1 for i, name in enumerate(names) if i + 1 == len(names) or names[i + 1] != name]
    return [(first, end) for first, end in zip([0, *ends], ends, strict=False) if end - first > 1]


def check_memory(specs: Sequence[LayerSpec], num_requests: int, capacity: int, device: torch.device, limit: int | None) -> None:
    """Raise OutOfCacheError before decoding when a cache of this size does not fit, so that no call fails in its middle.

    limit: bytes, None for what is free on a GPU; on a CPU there is no limit of its own.
    """
    slots = num_requests * _whole_tiles(capacity)
    needed = sum(2 * slots * spec.group[0] * spec.group[1] * spec.dtype.itemsize for spec in specs)
    if limit is None and device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        limit = int(0.95 * torch.cuda.mem_get_info(device)[0]) + reusable
    if limit is not None and needed > limit:
        raise OutOfCacheError(
            f"{num_requests} request(s) of up to {capacity} tokens need {needed / 2**30:.2f} GiB of keys and values, and "
            f"{limit / 2**30:.2f} GiB are allowed; lower max_new_tokens or the batch, or raise RunnerOptions.cache_limit_bytes"
        )
