"""How long a round takes: measured where it was run, between and beyond that fitted, and following a machine that changes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

Sizes = NDArray[np.int_]

# Samples that a measured size keeps; their median is robust against what else the machine does, and against first runs.
_KEPT = 9
# How fast the pace follows: the weight of a new round.
_FOLLOW = 0.05
# Growth for each row or step of the first size measured, while nothing else is known.
_GUESSED_GROWTH = 0.05


class Curve:
    """Seconds by size for one batch size; non-negative, and not falling with size."""

    def __init__(self) -> None:
        """Nothing is measured yet."""
        self._samples: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._points: tuple[list[int], list[float]] = ([], [])

    def add(self, size: int, seconds: float) -> None:
        """A measurement."""
        samples = self._samples.setdefault(size, deque(maxlen=_KEPT))
        samples.append(seconds)
        self._medians[size] = sorted(samples)[len(samples) // 2]
        sizes = sorted(self._medians)
        self._points = sizes, list(accumulate([self._medians[known] for known in sizes], max))

    def __bool__(self) -> bool:
        """Whether anything is known."""
        return bool(self._samples)

    @property
    def largest(self) -> int:
        """Of the measured sizes."""
        return self._points[0][-1]

    def known(self, size: int) -> float | None:
        """The median of what was measured at this size."""
        return self._medians.get(size)

    def hoped(self, sizes: Sizes) -> NDArray[np.float64]:
        """The least that they can take: what the largest measured size up to each does."""
        known, values = self._points
        place = (np.searchsorted(known, sizes, side="right") - 1).clip(0)
        found: NDArray[np.float64] = np.asarray(values)[place]
        return found

    def at(self, sizes: Sizes) -> NDArray[np.float64]:
        """Seconds: measured, interpolated between measured neighbours, or carried on beyond the last ones."""
        known, values = self._points
        first, last = known[0], known[-1]
        slope = _GUESSED_GROWTH * values[0] if first == last else (values[-1] - values[-2]) / (last - known[-2])
        beyond = (np.asarray(sizes) - last).clip(0)
        found: NDArray[np.float64] = np.interp(sizes, known, values) + slope * beyond
        return found


class CostModel:
    """Seconds of a round: the target with all around it by packed rows, the draft by its depth; each by batch size.

    The pace is common to all: a machine that slows down slows what was measured earlier, too.
    """

    def __init__(self) -> None:
        """Knows nothing yet."""
        self._target: dict[int, Curve] = {}
        self._draft: dict[int, Curve] = {}
        self._pace = 1.0

    def observe(self, batch: int, nodes: int, depth: int, draft_s: float, target_s: float) -> None:
        """A finished round. nodes: drafted in all.  depth: of the deepest draft.  target_s: all but the drafting."""
        curve = self._target.setdefault(batch, Curve())
        known = curve.known(nodes)
        if known:
            self._pace *= (target_s / (known * self._pace)) ** _FOLLOW
        curve.add(nodes, target_s / self._pace)
        self._draft.setdefault(batch, Curve()).add(depth, draft_s / self._pace)

    def knows(self, batch: int) -> bool:
        """Whether plain decoding of this batch size was measured."""
        return self.measured(batch, 0)

    def measured(self, batch: int, nodes: int) -> bool:
        """Whether there was a round of this size."""
        return batch in self._target and self._target[batch].known(nodes) is not None

    def plain(self, batch: int) -> float:
        """Seconds of a round without a draft, where `knows` says that it was measured."""
        found = self._target[batch].known(0)
        assert found is not None
        return self._pace * found

    def deepest(self, batch: int) -> int:
        """The deepest draft that was measured with this batch size."""
        return self._draft[batch].largest if batch in self._draft else 0

    def seconds(self, batch: int, most: int, depths: Sequence[int], *, hoped: bool = False) -> NDArray[np.float64]:
        """[len(depths), most + 1]: of rounds with 0, 1, ..., most drafted nodes, at most so deep.

        hoped: the least that they can take, see `Curve.hoped`.
        """
        target, draft = _nearest(self._target, batch), _nearest(self._draft, batch)
        sizes = np.arange(most + 1)
        of_target = target.hoped(sizes) if hoped else target.at(sizes)
        of_depth = np.where(sizes > 0, draft.at(np.asarray(depths))[:, None], draft.at(np.zeros(1, dtype=int)))
        found: NDArray[np.float64] = self._pace * (of_target + of_depth)
        return found


def _nearest(curves: dict[int, Curve], batch: int) -> Curve:
    return curves[min(curves, key=lambda known: abs(known - batch))]
