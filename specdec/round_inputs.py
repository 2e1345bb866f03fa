"""What a captured round is told, as tensors of fixed size and place: trees, lengths, and what requests share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specdec.cache import KVCache
from specdec.graphs import bucket_of
from specdec.kernels.reference_rules import TreeRows
from specdec.kernels.rows import Shared, power_of_two, private_from
from specdec.kernels.tiles import Items
from specdec.kernels.transfer import on_device
from specdec.types import TokenTree


@dataclass(frozen=True, slots=True)
class RoundSizes:
    """What a graph is made for. slots: most that a request has for itself; shared_slots: most that several share."""

    rows: int
    requests: int
    nodes: int
    slots: int
    shared_slots: int
    shared: tuple[int, ...]

    @classmethod
    def of(cls, num_nodes: tuple[int, ...], cache: KVCache, ahead: int = 0) -> RoundSizes | None:
        """Of trees of so many nodes, and slots `ahead` of them; the cache gets room for all. None for prompts."""
        rows, nodes = bucket_of(sum(num_nodes)), bucket_of(max(num_nodes))
        if rows is None or nodes is None:
            return None
        cache.ensure(max(cache.lengths) + nodes + ahead + 1)
        begins = private_from(cache.shared, len(cache.lengths))
        own = max(length + nodes + ahead - begin for length, begin in zip(cache.lengths, begins, strict=True))
        common = power_of_two(max((s.slots for s in cache.shared), default=1))
        pairs = tuple(place for s in cache.shared for place in (s.first, s.end))
        return cls(rows, len(num_nodes), nodes, power_of_two(own), common, pairs)

    @property
    def key(self) -> tuple[int, ...]:
        """By which it is captured."""
        return (self.rows, self.requests, self.nodes, self.slots, self.shared_slots, *self.shared)


class RoundBuffers:
    """Trees of fixed number and width, the lengths that they stand behind, and the slots that rows share."""

    def __init__(self, requests: int, nodes: int, shared: tuple[Shared, ...], device: torch.device) -> None:
        self.tokens, self.parents = torch.zeros(2, requests, nodes, dtype=torch.long, device=device)
        self.counts = torch.zeros(3, requests, dtype=torch.long, device=device)
        self.first, self.last = on_device([[s.first for s in shared], [s.end - 1 for s in shared]], device)

    def fill(self, tree: TokenTree, cache: KVCache) -> None:
        """Take in a round's trees. What stands behind a tree's last node is never read."""
        width = min(tree.tokens.shape[1], self.tokens.shape[1])
        self.tokens[:, :width].copy_(tree.tokens[:, :width])
        self.parents[:, :width].copy_(tree.parents[:, :width])
        counts = [tree.num_nodes, cache.lengths, private_from(cache.shared, len(cache.lengths))]
        self.counts.copy_(on_device(counts, self.counts.device), non_blocking=True)

    def rows(self, sizes: RoundSizes, scratch: int) -> TreeRows:
        """The packed rows of all trees, derived on the device."""
        from specdec.kernels.tree_rows import tree_rows

        return tree_rows(self.tokens, self.parents, self.counts[0], self.counts[1], sizes.rows, sizes.slots, scratch)

    def groups(self, own: Items, most_shared: int) -> list[Items]:
        """What attention is told: an item a request behind what it shares, and before them an item a shared prefix."""
        starts, counts, begins = own.table[:, 0], own.table[:, 1], self.counts[2]
        own.table[:, 3] = begins
        if not self.first.numel():
            return [own]
        slots = begins[self.first]
        rows = starts[self.last] + counts[self.last] - starts[self.first]
        table = torch.stack((starts[self.first], rows, self.first, torch.zeros_like(rows), slots, slots), 1)
        return [Items(table, own.positions, own.positions.shape[0], most_shared), own]
