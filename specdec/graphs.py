"""Captured forwards on a GPU: one CUDA graph for each bucket of packed rows, whatever the trees.

Ids, positions, slots, lengths and ancestor words are inputs: they are copied into buffers that the graph reads, rows beyond the
live ones are padding that writes to a scratch slot and is seen by nobody, and the graph is replayed. A bucket is captured when it
has come a few times; what cannot be captured runs as it is, with the reason logged once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from specdec.cache import KVCache
from specdec.kernels.dispatch import DeviceContext
from specdec.kernels.rows import Rows, items_of, request_of_row
from specdec.kernels.tiles import Items

logger = logging.getLogger(__name__)

# The buffers of a capture.
B = TypeVar("B")
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


class CudaGraphs:
    """Records on a GPU. All graphs of one recorder take their memory from one pool: they are replayed one after the other."""

    def __init__(self) -> None:
        """The pool is made with the first graph."""
        self._pool: Any = None

    def __call__(self, run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """Capture on a side stream after two warm-up runs, as torch.cuda.graph asks for."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = run()
        return graph.replay, outputs


def run_again(run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """The same contract without a graph, for tests on any device: a replay runs the function on the buffers once more."""
    outputs = tuple(out.clone() for out in run())

    def replay() -> None:
        for kept, new in zip(outputs, run(), strict=True):
            kept.copy_(new)

    return replay, outputs


@dataclass(frozen=True, slots=True)
class Captured(Generic[B]):
    """One recorded bucket: the buffers that its inputs are copied into, its replay, and what that fills."""

    buffers: B
    replay: Callable[[], None]
    outputs: Outputs


class Captures(Generic[B]):
    """What has been recorded, by key. One thing that cannot be recorded ends recording, with the reason logged once."""

    def __init__(self, capture_after: int, most: int, record: Recorder) -> None:
        """capture_after: calls of one key before it is captured.  most: captures kept.

        cold, kept here: calls so far that were not yet replayed as later ones of their key will be, the capturing one among them.
        """
        self._capture_after, self._most, self._record = capture_after, most, record
        self._seen: dict[tuple[int, ...], int] = {}
        self._found: dict[tuple[int, ...], Captured[B]] = {}
        self._layers: list[tuple[Tensor, Tensor]] | None = None
        self.refused: str | None = None
        self.cold = 0

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: tuple[int, ...], cache: KVCache, make: Callable[[], tuple[B, Callable[[], Outputs]]]) -> Captured[B] | None:
        """The capture of this key, or None where there is none (yet). make: filled buffers, and what to record over them."""
        if self.refused is not None:
            return None
        if cache.layers is not self._layers:
            self.clear()
            self._layers = cache.layers
        return self._found.get(key) or self._consider(key, make)

    def _consider(self, key: tuple[int, ...], make: Callable[[], tuple[B, Callable[[], Outputs]]]) -> Captured[B] | None:
        self._seen[key] = self._seen.get(key, 0) + 1
        full = len(self._found) >= self._most
        self.cold += self._seen[key] == 1 or not full
        if self._seen[key] < self._capture_after or full:
            return None
        buffers, run = make()
        try:
            replay, outputs = self._record(run)
        except RuntimeError as error:
            # What a graph cannot hold (a synchronisation, an allocation outside its pool) is a RuntimeError of torch's.
            self.refused = str(error).splitlines()[0]
            logger.warning("specdec runs without CUDA graphs: %s", self.refused)
            return None
        self._found[key] = Captured(buffers, replay, outputs)
        return self._found[key]

    def clear(self) -> None:
        """Forget all captures: the cache or the weights moved."""
        self._found.clear()


class _Buffers:
    """Rows of fixed number and place."""

    def __init__(self, rows: int, words: int, like: list[Items]) -> None:
        own, device = like[-1], like[-1].table.device
        self.rows = rows
        self.tokens, self.positions = (torch.zeros(1, rows, dtype=torch.long, device=device) for _ in range(2))
        self.slots, self.row_of = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(2))
        bits = torch.zeros(rows, words, dtype=torch.long, device=device) if words else None
        offsets = torch.zeros(own.table.shape[0], 64 * words, dtype=torch.long, device=device) if words else None
        common = [Items(torch.zeros_like(x.table), self.positions[0], x.most_rows, x.most_slots) for x in like[:-1]]
        self.items = [*common, Items(torch.zeros_like(own.table), self.positions[0], rows, own.most_slots, bits, offsets)]

    def fill(self, rows: Rows, items: list[Items], scratch: int) -> None:
        """Take in a round's rows; padding rows write to the scratch slot of cache row 0."""
        live = rows.slots.shape[0]
        self.tokens[:, :live].copy_(rows.tokens)
        self.positions[:, :live].copy_(rows.positions)
        self.slots[:live].copy_(rows.slots)
        if len(rows.sizes) > 1:
            self.row_of[:live].copy_(request_of_row(rows))
        if live < self.rows:
            self.tokens[:, live:], self.positions[:, live:], self.slots[live:], self.row_of[live:] = 0, 0, scratch, 0
        for mine, new in zip(self.items, items, strict=True):
            mine.table.copy_(new.table)
            if mine.bits is not None and new.bits is not None:
                mine.bits[:live].copy_(new.bits)
            if mine.offsets is not None and new.offsets is not None:
                mine.offsets[:, : new.offsets.shape[1]].copy_(new.offsets)


class CapturedForwards:
    """Forwards by bucket of rows, number of requests, ancestor words and slots; each captured on its own."""

    def __init__(self, eager: Eager, capture_after: int, most: int, record: Recorder) -> None:
        """eager: the forward to record.  capture_after, most, record: see `Captures`."""
        self._eager = eager
        self.captures: Captures[_Buffers] = Captures(capture_after, most, record)

    def forward(self, rows: Rows, cache: KVCache) -> Outputs | None:
        """Logits and taps of the live rows; None where this bucket is not captured (yet)."""
        size = bucket_of(rows.tokens.shape[1])
        if size is None:
            return None
        cache.ensure(rows.span + 1)
        items, scratch = items_of(rows), cache.capacity - 1
        bits = items[-1].bits
        words = 0 if bits is None else bits.shape[1]

        def make() -> tuple[_Buffers, Callable[[], Outputs]]:
            buffers = _Buffers(size, words, items)
            buffers.fill(rows, items, scratch)
            context = DeviceContext(buffers.slots, buffers.row_of, buffers.items, cache.layers)
            return buffers, lambda: self._eager(buffers.tokens, buffers.positions, context)

        launches = [n for x in items for n in (x.table.shape[0], x.most_rows if x is not items[-1] else 0, x.most_slots)]
        found = self.captures.get((size, words, *launches), cache, make)
        if found is None:
            return None
        found.buffers.fill(rows, items, scratch)
        found.replay()
        return tuple(out[: rows.slots.shape[0]].clone() for out in found.outputs)
