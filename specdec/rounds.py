"""A whole greedy round as one CUDA graph: rows from trees, the forward, verification and compaction, read back once.

The host copies trees and lengths into buffers and replays. Everything that follows from them is derived inside the graph, so
the graph belongs to a bucket of sizes and never to a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from specdec.cache import KVCache
from specdec.graphs import Captured, Captures, Eager, Outputs, Recorder
from specdec.kernels.dispatch import DeviceContext
from specdec.round_inputs import RoundBuffers, RoundSizes
from specdec.types import TokenTree, Verdict
from specdec.verify.greedy import greedy_choice
from specdec.verify.walk import verdict_rows


@dataclass(frozen=True, slots=True)
class WholeRound:
    """What a round decided, on the host. verdict: rows of `verdict_rows`.  taps: name -> [B, N, H]."""

    verdict: list[list[int]]
    taps: Mapping[str, Tensor]


class CapturedRounds:
    """Greedy rounds by bucket of rows, requests, nodes and slots."""

    def __init__(self, eager: Eager, capture_after: int, most: int, record: Recorder) -> None:
        """eager: the target's forward.  capture_after, most, record: see `Captures`."""
        self._eager = eager
        self.captures: Captures[RoundBuffers] = Captures(capture_after, most, record)

    def run(self, tree: TokenTree, cache: KVCache) -> Outputs | None:
        """Score, verify and compact: the verdict as `verdict_rows` has it, and taps [B, N, H]. The caller then lengthens the cache.

        None where this bucket is not captured (yet).
        """
        sizes = RoundSizes.of(tree.num_nodes, cache)
        if sizes is None:
            return None
        found = self.captures.get(sizes.key, cache, partial(self._make, tree, cache, sizes))
        return None if found is None else _replayed(found, tree, cache)

    def _make(self, tree: TokenTree, cache: KVCache, sizes: RoundSizes) -> tuple[RoundBuffers, Callable[[], Outputs]]:
        buffers = RoundBuffers(len(tree.num_nodes), sizes.nodes, cache.shared, tree.tokens.device)
        buffers.fill(tree, cache)
        return buffers, partial(self._round, buffers, cache.layers, cache.groups, cache.capacity - 1, sizes)

    def _round(
        self, buffers: RoundBuffers, layers: list[tuple[Tensor, Tensor]], groups: list[Tensor], scratch: int, sizes: RoundSizes
    ) -> Outputs:
        """All that is recorded. Running it again on the same buffers changes nothing: the forward writes every node anew."""
        from specdec.kernels.accept import accept_path
        from specdec.kernels.kv_compact import kv_compact

        num_nodes, lengths, _ = buffers.counts
        tree = buffers.rows(sizes, scratch)
        context = DeviceContext(tree.slots, tree.row_of, buffers.groups(tree.items, sizes.shared_slots), layers)
        logits, *taps = self._eager(tree.tokens[None], tree.items.positions[None], context)
        chosen = greedy_choice(logits)[tree.place]
        accepted = accept_path(buffers.tokens, buffers.parents, num_nodes, chosen)
        for group in groups:
            kv_compact(group, lengths, accepted.path, accepted.num_accepted)
        verdict = verdict_rows(Verdict(accepted.num_accepted, accepted.next_token, accepted.path), buffers.tokens, buffers.parents)
        return verdict, *(tap[tree.place] for tap in taps)


def _replayed(found: Captured[RoundBuffers], tree: TokenTree, cache: KVCache) -> Outputs:
    found.buffers.fill(tree, cache)
    found.replay()
    verdict, *taps = found.outputs
    return verdict, *(tap.clone() for tap in taps)
