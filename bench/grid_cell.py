"""A cell of the never-slower grid: the turns of its methods, the ratio to plain decoding, and the share of the best length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import exp, log, sqrt
from statistics import fmean, median, quantiles, stdev
from typing import Any

from specdec.bench.lockstep import Ran
from specdec.bench.replay import LENGTHS
from specdec.bench.statistics import t_quantile
from specdec.types import RoundStats

PLAIN, OURS = "plain", "goodput"
# Tokens that each method drafts a round; None for as many as the planner likes.
METHODS: dict[str, int | None] = {PLAIN: 0, OURS: None, **{f"fixed {length}": length for length in LENGTHS[1:]}}
NARROW = 0.03
# Turns of a cell: at least, which the fixed lengths run in, too, and at most.
_FEWEST, _MOST = 8, 32
# What may be lost to plain decoding. A cell whose interval lies above that is not slower, and how much faster it is differs from
# prompt to prompt.
NOT_SLOWER = 0.97
# A fixed length is given up in a text when after so many segments it took so many times as long as plain decoding; and after so
# many turns when it gave less than this share of what the best one, or plain decoding, did.
_SEGMENTS, _HOPELESS = 3, 1.5
_SWEPT, _WORSE = 2, 0.9
# A segment counts as so many typical ones of its method, at most, since the machine stood still: in the first turn, in which sizes
# are run for the first time, and later. Typical is what three of four do not exceed: segments within one round's tokens take
# no time. A turn counts as so far from the median turn, at most, in the logarithm of its ratio.
_FIRST_LONGEST, _LONGEST, _HIT = 6.0, 2.0, 0.3


def losers(seconds: Mapping[str, Sequence[float]]) -> list[str]:
    """Fixed lengths that are so slow in this text that the rest of it would show nothing."""
    fixed = [(name, own) for name, own in seconds.items() if name not in (PLAIN, OURS) and len(own) >= _SEGMENTS]
    return [name for name, own in fixed if sum(own) > _HOPELESS * sum(seconds[PLAIN][: len(own)])]


@dataclass
class Cell:
    """Filled turn by turn. explained, unexplained: texts that differ, by rounding alone or not."""

    explained: int = 0
    unexplained: int = 0
    _segments: dict[str, list[tuple[float, ...]]] = field(default_factory=lambda: {name: [] for name in METHODS})
    _lasting: list[str] = field(default_factory=lambda: list(METHODS))
    _equal: int = 0
    _own_s: float = 0.0
    _stats: Any = None
    _history: list[RoundStats] = field(default_factory=list)

    @property
    def turns(self) -> int:
        """So far."""
        return len(self._segments[PLAIN])

    @property
    def methods(self) -> list[str]:
        """Of the next turn."""
        return self._lasting if self.turns < _FEWEST else [PLAIN, OURS]

    @property
    def done(self) -> bool:
        """Whether the interval is narrow, or lies above what counts as slower, or there were turns enough."""
        return self.turns >= _MOST or (self.turns >= _FEWEST and _decided(self._ratio()))

    def add(self, ran: Mapping[str, Ran]) -> None:
        """A turn. A result begins with the tokens; then come, of OURS, its stats and the seconds of its planner so far."""
        for name, own in ran.items():
            self._segments[name].append(own.seconds)
        said, self._stats, self._own_s = ran[OURS].result
        self._equal += said == ran[PLAIN].result[0]
        self._history += self._stats.history
        if _SWEPT <= self.turns <= _FEWEST:
            # One text in which a length does badly is no reason to leave it out.
            over = self._fixed()
            enough = _WORSE * max(1.0, *over.values())
            self._lasting = [name for name in self._lasting if over.get(name, enough) >= enough]

    def report(self) -> dict[str, Any]:
        """For JSON."""
        whole, fixed = replace(self._stats, history=tuple(self._history)), self._fixed()
        lasted = {name: ratio for name, ratio in fixed.items() if name in self._lasting}
        best = max(lasted, key=lambda name: lasted[name], default=PLAIN)
        best = best if lasted.get(best, 0.0) > 1.0 else PLAIN
        return {
            "ratio": self._ratio(),
            "turns": self.turns,
            "seconds": {name: [round(sum(own), 4) for own in turns] for name, turns in self._segments.items()},
            "counted": {name: [round(own, 4) for own in self._counted(name)] for name in (PLAIN, OURS)},
            "equal": self._equal,
            "explained": self.explained,
            "unexplained": self.unexplained,
            "fixed": fixed,
            "best_fixed": best,
            "share_of_best": self._over_plain(OURS, len(self._segments[best])) / lasted.get(best, 1.0),
            "forecast_errors": whole.forecast_errors(),
            "own_share": self._own_s / sum(stats.seconds for stats in self._history),
            "reasons": whole.reasons,
        }

    def _ratio(self) -> tuple[float, float, float]:
        return paired_ratio(self._counted(PLAIN), self._counted(OURS))

    def _fixed(self) -> dict[str, float]:
        return {name: self._over_plain(name) for name in METHODS if name not in (PLAIN, OURS)}

    def _counted(self, name: str) -> list[float]:
        """Seconds of each turn."""
        return [sum(own) for own in self._cut(name)]

    def _cut(self, name: str) -> list[list[float]]:
        """Seconds of each turn's segments, none longer than what passes for typical."""
        typical = quantiles([own for turn in self._segments[name] for own in turn], n=4)[2]
        longest = [_LONGEST if turn else _FIRST_LONGEST for turn in range(len(self._segments[name]))]
        return [[min(own, most * typical) for own in turn] for turn, most in zip(self._segments[name], longest, strict=True)]

    def _over_plain(self, name: str, most: int = _MOST) -> float:
        """Plain decoding's seconds over this method's, in the segments that both ran. most: turns that count, the first ones."""
        turns = islice(zip(self._cut(PLAIN), self._cut(name), strict=False), most)
        return exp(fmean([log(sum(plain[: len(own)]) / sum(own)) for plain, own in turns]))


def paired_ratio(plain: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """Plain seconds over ours, and its 95 % t interval: the mean of the logarithms of each turn's ratio.

    A turn that another load on the machine hit counts as _HIT away from the median turn: what starting costs is less than that.
    """
    logs = [log(a / b) for a, b in zip(plain, ours, strict=True)]
    middle = median(logs)
    kept = [min(max(own, middle - _HIT), middle + _HIT) for own in logs]
    half = t_quantile(0.975, len(kept) - 1) * stdev(kept) / sqrt(len(kept))
    return exp(fmean(kept)), exp(fmean(kept) - half), exp(fmean(kept) + half)


def verdict(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the grid shows as a whole. cells: their reports, by name."""
    shares = [own["share_of_best"] for own in cells.values()]
    errors = [own["forecast_errors"] for own in cells.values()]
    return {
        "cells": len(cells),
        "wholly_below_0.97": [key for key, own in cells.items() if own["ratio"][2] < NOT_SLOWER],
        "neither_narrow_nor_above_0.97": [key for key, own in cells.items() if not _decided(own["ratio"])],
        "not_equal": [key for key, own in cells.items() if own["equal"] < own["turns"]],
        "beyond_rounding": [key for key, own in cells.items() if own["unexplained"]],
        "mean_ratio": exp(fmean([log(own["ratio"][0]) for own in cells.values()])),
        "least_ratio": min(own["ratio"][0] for own in cells.values()),
        "mean_share_of_best_fixed": fmean(shares),
        "forecasts_within_10_percent": _within(errors),
        # In its first rounds a planner learns, and sizes are run for the first time.
        "forecasts_within_10_percent_after_the_first": _within([own[1:] for own in errors]),
        "median_own_share": median(own["own_share"] for own in cells.values()),
        "largest_own_share": max(own["own_share"] for own in cells.values()),
    }


def _within(errors: Sequence[Sequence[float]], most: float = 0.1) -> float | None:
    """Share of the windows whose forecast was off by no more than this; None without windows."""
    near = [abs(error) <= most for own in errors for error in own]
    return sum(near) / len(near) if near else None


def _decided(ratio: Sequence[float]) -> bool:
    return ratio[2] - ratio[1] <= 2 * NARROW or ratio[1] > NOT_SLOWER
