"""Forwards on a CPU, written out as flat lists of operations once their kind has come a few times lately.

Two sizes of a kind are recorded. What they have in common serves every further size of that kind that comes more than once, after
one forward in which it has to agree bit for bit with the eager one; where rounding is free, so many sizes that agree speak for all.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specdec.capture import Forward, Outputs, Recording, capture, for_any_rows

logger = logging.getLogger(__name__)
# Forwards, for each that a recording waits for, among which these have to come: what is run now and then is not worth one.
_LATELY = 4
# What a function that was written for other numbers of rows may raise where it does not fit.
_UNFIT = (RuntimeError, ValueError, IndexError)


class FlatForwards:
    """The forwards of one model by number of rows. refused: why nothing is written out, or None.

    cold: calls so far that were not yet as later ones of their size will be, those that wrote it out or compared it among them.
    """

    def __init__(
        self,
        name: str,
        kind: Callable[[int], int],
        *,
        after: int,
        most: int,
        trusted_after: int | None = None,
        refused: str | None = None,
    ) -> None:
        """name: of the model.  kind: equal for numbers of rows that are run alike.

        after: eager forwards of a kind until the next recording, among at most four times as many of all kinds.  most: recordings.
        trusted_after: sizes that have to agree before others of their kind need not; None for all.
        """
        self._name, self._kind, self._after, self._most = name, kind, max(after, 1), most
        self._trusted_after, self.refused, self.cold = trusted_after, refused, 0
        self.clear()

    def clear(self) -> None:
        """Forget all functions, since the weights have changed."""
        self._runs: dict[int, Forward] = {}
        self._recordings: dict[int, list[Recording]] = {}
        self._for_any: dict[int, Forward] = {}
        self._agreed: dict[int, int] = {}
        self._eagerly: dict[int, deque[int]] = {}
        self._now = 0
        self._seen: set[int] = set()
        self._tried: set[int] = set()

    def __contains__(self, rows: int) -> bool:
        """Whether so many rows run written out."""
        return rows in self._runs

    @property
    def recorded(self) -> int:
        """Sizes that were recorded themselves."""
        return sum(map(len, self._recordings.values()))

    def __call__(self, eager: Forward, tokens: Tensor, positions: Tensor, context: Callable[[], Any]) -> Outputs:
        """Logits and taps, as the eager forward gives them. context: makes what a forward attends by.

        eager: of the model, each time the same; kept here it would keep its owner, and with that these, alive.
        """
        rows = tokens.shape[1]
        self._now += 1
        run = self._runs.get(rows)
        if run is not None:
            return run(tokens, positions, context())
        first, kind = rows not in self._seen, self._kind(rows)
        waits = self.refused is None and self.recorded < self._most
        self._seen.add(rows)
        # A size that comes once, as batches that end meet many, is not worth comparing; where few speak for all, each is.
        once = first and kind in self._for_any and self._trusted_after is None
        if kind in self._for_any and rows not in self._tried and not once:
            return self._fit(eager, tokens, positions, context)
        due = not once and waits and self._comes_often(kind)
        self.cold += first or waits
        return self._record(eager, tokens, positions, context) if due else eager(tokens, positions, context())

    def _comes_often(self, kind: int) -> bool:
        """Note an eager forward of a kind. Whether there were enough of them lately for a recording to pay."""
        eagerly = self._eagerly.setdefault(kind, deque(maxlen=self._after))
        eagerly.append(self._now)
        return len(eagerly) == self._after and self._now - eagerly[0] < _LATELY * self._after

    def _fit(self, eager: Forward, tokens: Tensor, positions: Tensor, context: Callable[[], Any]) -> Outputs:
        """A size by what is written for any: kept for it if it agrees with the eager forward, or if enough others did."""
        rows = tokens.shape[1]
        kind = self._kind(rows)
        run, trusted = self._for_any[kind], self._trusted_after is not None and self._agreed[kind] >= self._trusted_after
        self._tried.add(rows)
        self.cold += 1
        try:
            again = run(tokens, positions, context())
        except _UNFIT as error:
            logger.debug("%d rows of %s need a recording of their own: %s", rows, self._name, error)
            again = None
        if trusted and again is not None:
            self._runs[rows] = run
            return again
        expected = eager(tokens, positions, context())
        if again is not None and _same(expected, again):
            self._runs[rows] = run
            self._agreed[kind] += 1
        return expected

    def _record(self, eager: Forward, tokens: Tensor, positions: Tensor, context: Callable[[], Any]) -> Outputs:
        """Run the rows and write them down on the way; that is kept only if it agrees."""
        found = capture(eager, tokens, positions, context())
        if isinstance(found, str):
            self._refuse(found)
            return eager(tokens, positions, context())
        expected, recording = found
        run = self._function(recording)
        if _same(expected, run(tokens, positions, context())):
            self._runs[recording.rows] = run
            return expected
        self._refuse("the captured forward differs from the eager one")
        # The keys and values in the cache are those of the last forward.
        return eager(tokens, positions, context())

    def _function(self, recording: Recording) -> Forward:
        """Of a recording; for any number of rows of its kind where an earlier one differs in that number only."""
        kind = self._kind(recording.rows)
        earlier = self._recordings.setdefault(kind, [])
        common = next((both for one in earlier if (both := for_any_rows(one, recording)) is not None), None)
        earlier.append(recording)
        self._eagerly[kind].clear()
        run = (common or recording).function()
        if common is not None:
            self._for_any[kind], self._agreed[kind] = run, 0
        return run

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        self.clear()
        logger.warning("specdec runs %s without capture: %s", self._name, reason)


def _same(expected: Outputs, again: Outputs) -> bool:
    """Bit for bit, a NaN for a NaN."""
    pairs = list(zip(expected, again, strict=True))
    return all(torch.equal(a, b) for a, b in pairs) or all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
