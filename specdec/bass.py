"""Draft lengths from what the last round accepted, as others choose them: the baselines that benchmarks compare with."""

from __future__ import annotations

from specdec.errors import SpecDecError
from specdec.types import Budget, Draft, Load, RoundStats

# BASS: what a length grows by, and the share of itself, one in so many, that it falls by.
_GROWS, _FALLS = 2, 10


class BassPlanner:
    """One chain length for the whole batch (BASS, arXiv 2404.15778, algorithm 1): two longer when some request accepted all of
    it, else a tenth shorter and from the second fall in a row on one more, but never under the most that a request accepted.

    It looks at finished rounds only, so every lossless rule stays lossless. The length stays with the instance from call to call.
    """

    def __init__(self, first: int = 7, limit: int = 32) -> None:
        """first: the first round's length.  limit: the longest."""
        _check("BassPlanner", first, limit)
        self.post_draw = False
        self.length, self._limit, self._falling = first, limit, 0

    def plan(self, load: Load) -> Budget:
        """Chains of the length, shorter where a request is about to end."""
        return _chains(load, self.length)

    def select(self, draft: Draft) -> Draft:
        """The draft as it came."""
        return draft

    def observe(self, stats: RoundStats) -> None:
        """The next length. A round in which nothing was drafted says nothing, nor does a full chain that room had cut."""
        if not max(stats.drafted):
            return
        most = max(stats.accepted)
        if most >= self.length:
            self.length, self._falling = min(self.length + _GROWS, self._limit), 0
        elif not _cut_short(stats, self.length):
            self.length = max(1, most, self.length - -(-self.length // _FALLS) - self._falling)
            self._falling = 1


class HeuristicPlanner:
    """One chain length for the whole batch, as transformers' assisted generation schedules it: two longer when all of a chain was
    accepted, else one shorter.

    With several requests the one that accepted most counts. State and losslessness as in `BassPlanner`.
    """

    def __init__(self, first: int = 5, limit: int = 32) -> None:
        """first: the first round's length.  limit: the longest; transformers has none."""
        _check("HeuristicPlanner", first, limit)
        self.post_draw = False
        self.length, self._limit = first, limit

    def plan(self, load: Load) -> Budget:
        """Chains of the length, shorter where a request is about to end."""
        return _chains(load, self.length)

    def select(self, draft: Draft) -> Draft:
        """The draft as it came."""
        return draft

    def observe(self, stats: RoundStats) -> None:
        """The next length; as in `BassPlanner.observe`."""
        if not max(stats.drafted):
            return
        if max(stats.accepted) >= self.length:
            self.length = min(self.length + 2, self._limit)
        elif not _cut_short(stats, self.length):
            self.length = max(1, self.length - 1)


def _check(name: str, first: int, limit: int) -> None:
    if not isinstance(first, int) or not isinstance(limit, int) or not 1 <= first <= limit:
        raise SpecDecError(f"{name} first={first!r}, limit={limit!r}: give whole numbers, 1 <= first <= limit")


def _chains(load: Load, length: int) -> Budget:
    counts = tuple([max(0, min(length, room - 1)) for room in load.room])
    return Budget(load.requests, counts, counts, (1,) * len(counts))


def _cut_short(stats: RoundStats, length: int) -> bool:
    """Whether some request accepted all of a chain that was shorter than asked for: it might have gone on."""
    return any(0 < drafted == accepted < length for drafted, accepted in zip(stats.drafted, stats.accepted, strict=True))
