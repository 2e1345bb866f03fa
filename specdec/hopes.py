"""What trying sizes that were never measured has cost, and whether another may be tried."""

from __future__ import annotations

from dataclasses import dataclass

# Looks in which unmeasured sizes are thought of each time, and one among so many later.
_SEARCHED, _SEARCHES = 32, 4
# What trying them may cost: a share of all time, so many plain rounds, and a share of what drafting has gained.
_COST, _FREE, _OF_GAIN = 0.005, 3, 0.1
# Plain rounds that a round counts as, at most, in what trying costs; what a cold one took beyond that is preparing.
_LONGEST = 2.0
# What preparing sizes may cost, likewise.
_PREPARED_COST, _PREPARED_FREE, _PREPARED_OF_GAIN = 0.005, 8, 0.05


@dataclass(slots=True)
class Hopes:
    """total_s: of all rounds so far, kept by the caller."""

    total_s: float = 0.0
    _looks: int = 0
    _lost_s: float = 0.0
    _prepared_s: float = 0.0
    _gained_s: float = 0.0

    def observe(self, worth_s: float, took_s: float, plain_s: float, *, hoped: bool, cold: bool) -> None:
        """A round that drafted. worth_s: seconds of plain decoding that its tokens are worth.  plain_s: of a plain round.

        hoped: its size was tried.  cold: it also prepared something.
        """
        gained_s = worth_s - min(took_s, _LONGEST * plain_s)
        self._gained_s += gained_s
        if hoped:
            self._lost_s -= gained_s
            self._prepared_s += max(took_s - _LONGEST * plain_s, 0.0) * cold

    def due(self, plain_s: float) -> bool:
        """Whether unmeasured sizes are thought of now: not each time once much is measured, nor at any price."""
        self._looks += 1
        if self._looks > _SEARCHED and self._looks % _SEARCHES:
            return False
        gained_s = max(self._gained_s, 0.0)
        if self._lost_s > _COST * self.total_s + _FREE * plain_s + _OF_GAIN * gained_s:
            return False
        return self._prepared_s <= _PREPARED_COST * self.total_s + _PREPARED_FREE * plain_s + _PREPARED_OF_GAIN * gained_s
