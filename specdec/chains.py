"""A draft model's whole greedy chain as one CUDA graph: the committed tokens that are new to it, then one token after the other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from specdec.cache import KVCache
from specdec.graphs import Captures, Eager, Outputs, Recorder
from specdec.kernels.dispatch import DeviceContext
from specdec.kernels.tiles import Items
from specdec.round_inputs import RoundBuffers, RoundSizes
from specdec.types import TokenTree


class CapturedChains:
    """Greedy chains by bucket of rows, requests, new tokens, slots and length."""

    def __init__(self, eager: Eager, capture_after: int, most: int, record: Recorder) -> None:
        """eager: the draft model's forward.  capture_after, most, record: see `Captures`."""
        self._eager = eager
        self.captures: Captures[RoundBuffers] = Captures(capture_after, most, record)

    def run(self, pending: TokenTree, cache: KVCache, depth: int) -> Tensor | None:
        """[B, depth] int64, drafted behind the pending chains, which are written to the cache; None where not captured (yet)."""
        sizes = RoundSizes.of(pending.num_nodes, cache, ahead=depth)
        if sizes is None:
            return None
        found = self.captures.get((*sizes.key, depth), cache, partial(self._make, pending, cache, sizes, depth))
        if found is None:
            return None
        found.buffers.fill(pending, cache)
        found.replay()
        return found.outputs[0].clone()

    def _make(
        self, pending: TokenTree, cache: KVCache, sizes: RoundSizes, depth: int
    ) -> tuple[RoundBuffers, Callable[[], Outputs]]:
        buffers = RoundBuffers(sizes.requests, sizes.nodes, cache.shared, pending.tokens.device)
        buffers.fill(pending, cache)
        return buffers, partial(self._chain, buffers, cache.layers, cache.capacity - 1, sizes, depth)

    def _chain(
        self, buffers: RoundBuffers, layers: list[tuple[Tensor, Tensor]], scratch: int, sizes: RoundSizes, depth: int
    ) -> Outputs:
        """All that is recorded."""
        tree = buffers.rows(sizes, scratch)
        context = DeviceContext(tree.slots, tree.row_of, buffers.groups(tree.items, sizes.shared_slots), layers)
        logits = self._eager(tree.tokens[None], tree.items.positions[None], context)[0]
        num_nodes, lengths, _ = buffers.counts
        last = tree.place.gather(1, num_nodes[:, None] - 1)[:, 0]
        drafted, place = [logits[last].argmax(-1)], lengths + num_nodes
        request = torch.arange(sizes.requests, device=place.device)
        for _ in range(1, depth):
            table = torch.stack((request, torch.ones_like(place), request, torch.zeros_like(place), place, place + 1), 1)
            groups = buffers.groups(Items(table, place, 1, sizes.slots), sizes.shared_slots)
            context = DeviceContext(place, request, groups, layers)
            drafted.append(self._eager(drafted[-1][None], place[None], context)[0].argmax(-1))
            place = place + 1
        return (torch.stack(drafted, 1),)
