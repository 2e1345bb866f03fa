"""Captured forwards on a GPU: one CUDA graph for each bucket of packed rows, whatever the trees.

Ids, positions, slots, lengths and ancestor words are inputs: they are copied into buffers that the graph reads, rows beyond the
live ones are padding that writes to a scratch slot and is seen by nobody, and the graph is replayed. A bucket is captured when it
has come a few times; what cannot be captured runs as it is, with the reason logged once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.cache import KVCache
from specdec.kernels.rows import Rows, items_of, request_of_row
from specdec.kernels.tiles import Items, KeyValues, Logits

logger = logging.getLogger(__name__)

Outputs = tuple[Tensor, ...]
# (tokens [1, R], positions [1, R], context) to logits [R, V] and taps [R, H].
Eager = Callable[[Tensor, Tensor, Any], Outputs]

_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def bucket_of(rows: int) -> int | None:
    """The smallest captured number of rows that holds these; None for prompts, which are not captured."""
    return next((b for b in _BUCKETS if b >= rows), None)


class Recorder(Protocol):
    """Makes something replayable of a function without arguments."""

    def __call__(self, run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """A replay, and the outputs that each replay fills anew."""


def cuda_graph(run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """Captures on a side stream after two warm-up runs, as torch.cuda.graph asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph.replay, outputs


def run_again(run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """The same contract without a graph, for tests on any device: a replay runs the function on the buffers once more."""
    outputs = tuple(out.clone() for out in run())

    def replay() -> None:
        for kept, new in zip(outputs, run(), strict=True):
            kept.copy_(new)

    return replay, outputs


class _StaticContext:
    """The attention context of a captured forward: everything that changes lies in tensors of fixed place and size."""

    def __init__(self, rows: int, requests: int, words: int, like: Items, layers: list[tuple[Tensor, Tensor]]) -> None:
        device = like.table.device
        self.rows, self.layers = rows, layers
        self.tokens, self.positions = (torch.zeros(1, rows, dtype=torch.long, device=device) for _ in range(2))
        self.slots, self.row_of = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(2))
        table = torch.zeros(requests, 6, dtype=torch.long, device=device)
        bits = torch.zeros(rows, words, dtype=torch.long, device=device) if words else None
        offsets = torch.zeros(requests, 64 * words, dtype=torch.long, device=device) if words else None
        self.items = Items(table, self.positions[0], rows, like.most_slots, bits, offsets)

    def fill(self, rows: Rows, items: Items, scratch: int) -> None:
        """Take in a round's rows; padding rows write to the scratch slot of cache row 0."""
        live = rows.slots.shape[0]
        self.tokens[:, :live].copy_(rows.tokens)
        self.positions[:, :live].copy_(rows.positions)
        self.slots[:live].copy_(rows.slots)
        if len(rows.sizes) > 1:
            self.row_of[:live].copy_(request_of_row(rows))
        if live < self.rows:
            self.tokens[:, live:], self.positions[:, live:], self.slots[live:], self.row_of[live:] = 0, 0, scratch, 0
        self.items.table.copy_(items.table)
        if self.items.bits is not None and items.bits is not None:
            self.items.bits[:live].copy_(items.bits)
        if self.items.offsets is not None and items.offsets is not None:
            self.items.offsets[:, : items.offsets.shape[1]].copy_(items.offsets)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """See `AttentionContext.attend`."""
        from specdec.kernels.tree_attention import tree_attention

        keys, values = self.layers[layer]
        keys[self.row_of, :, self.slots] = key[0].transpose(0, 1)
        values[self.row_of, :, self.slots] = value[0].transpose(0, 1)
        how = Logits(scale, window, softcap)
        return tree_attention(query[0].transpose(0, 1), KeyValues(keys, values), [self.items], how)[None]


@dataclass(frozen=True, slots=True)
class _Captured:
    context: _StaticContext
    replay: Callable[[], None]
    outputs: Outputs


class CapturedForwards:
    """Forwards by bucket of rows, number of requests, ancestor words and slots; each captured on its own."""

    def __init__(self, eager: Eager, capture_after: int, most: int, record: Recorder = cuda_graph) -> None:
        """capture_after: forwards of one bucket before it is captured.  most: captures kept."""
        self._eager, self._capture_after, self._most, self._record = eager, capture_after, most, record
        self._seen: dict[tuple[int, ...], int] = {}
        self._captured: dict[tuple[int, ...], _Captured] = {}
        self._layers: list[tuple[Tensor, Tensor]] | None = None
        self.refused: str | None = None

    def forward(self, rows: Rows, cache: KVCache) -> Outputs | None:
        """Logits and taps of the live rows; None where this bucket is not captured (yet)."""
        size = bucket_of(rows.tokens.shape[1])
        if self.refused is not None or size is None:
            return None
        cache.ensure(rows.span + 1)
        if cache.layers is not self._layers:
            self.clear()
            self._layers = cache.layers
        items = items_of(rows)
        words = 0 if items.bits is None else items.bits.shape[1]
        key = (size, len(rows.sizes), words, items.most_slots)
        found = self._captured.get(key) or self._consider(key, rows, items, cache)
        if found is None:
            return None
        found.context.fill(rows, items, cache.capacity - 1)
        found.replay()
        return tuple(out[: rows.slots.shape[0]].clone() for out in found.outputs)

    def _consider(self, key: tuple[int, ...], rows: Rows, items: Items, cache: KVCache) -> _Captured | None:
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] < self._capture_after or len(self._captured) >= self._most:
            return None
        size, requests, words, _ = key
        context = _StaticContext(size, requests, words, items, cache.layers)
        context.fill(rows, items, cache.capacity - 1)
        try:
            replay, outputs = self._record(lambda: self._eager(context.tokens, context.positions, context))
        except RuntimeError as error:
            # What a graph cannot hold (a synchronisation, an allocation outside its pool) is a RuntimeError of torch's.
            self.refused = str(error).splitlines()[0]
            logger.warning("specdec runs without CUDA graphs: %s", self.refused)
            return None
        self._captured[key] = _Captured(context, replay, outputs)
        return self._captured[key]

    def clear(self) -> None:
        """Forget all captures: the cache or the weights moved."""
        self._captured.clear()
