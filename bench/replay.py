"""Planners on a recorded machine: times of rounds and accepted drafts as they were measured, without the noise or with one made up.

A text is recorded as one number for each of its tokens: how many of the tokens drafted there the target accepts. Times are
recorded by batch size, drafted nodes and depth. A planner then meets the very rounds that it would have met, and the same planner
meets the same rounds each time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Protocol

from specdec import GoodputPlanner
from specdec.planner import FixedPlanner, Planner
from specdec.types import Budget, DrafterTraits, Load, RoundStats

LENGTHS = (0, 1, 2, 3, 4, 6, 8)
_TRAITS = (DrafterTraits("", "chain"),)


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of rounds with one batch size. target: by drafted tokens of each request, of LENGTHS.  draft: likewise, by depth."""

    batch: int
    target: tuple[float, ...]
    draft: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Recording:
    """times: by batch size, ascending.  texts: "drafter/temperature/workload" to one string of digits a text.

    prompt: tokens of a prompt, taken as the same for all.
    """

    times: tuple[Times, ...]
    texts: dict[str, tuple[str, ...]]
    prompt: int = 64

    @classmethod
    def read(cls, path: Path) -> Recording:
        """From the JSON that `write` makes."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        times = tuple(Times(t["batch"], tuple(t["target"]), tuple(t["draft"])) for t in raw["times"])
        return cls(times, {key: tuple(texts) for key, texts in raw["texts"].items()}, raw["prompt"])

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    def target_s(self, batch: int, nodes: int) -> float:
        """Of a round without its drafting: that of the next recorded batch size, by drafted nodes a request."""
        own = self._at(batch)
        return _between(own.target, nodes / own.batch) if batch == own.batch else self._smaller(own, batch, nodes)

    def draft_s(self, batch: int, depth: int) -> float:
        """Of drafting so deep."""
        return _between(self._at(batch).draft, depth) if depth else 0.0

    def _at(self, batch: int) -> Times:
        return next((times for times in self.times if times.batch >= batch), self.times[-1])

    def _smaller(self, own: Times, batch: int, nodes: int) -> float:
        """A batch that has shrunk: between the recorded sizes, by its packed rows."""
        below = [times for times in self.times if times.batch < batch]
        full = _between(own.target, max((batch + nodes) / own.batch - 1, 0.0))
        if not below:
            return full
        less = _between(below[-1].target, nodes / batch)
        share = (batch - below[-1].batch) / (own.batch - below[-1].batch)
        return less + share * max(full - less, 0.0)


def _between(values: Sequence[float], length: float) -> float:
    """Interpolated between LENGTHS, and carried on beyond them."""
    for place in range(1, len(LENGTHS)):
        if length <= LENGTHS[place] or place == len(LENGTHS) - 1:
            step = (values[place] - values[place - 1]) / (LENGTHS[place] - LENGTHS[place - 1])
            return values[place - 1] + step * (length - LENGTHS[place - 1])
    raise AssertionError("LENGTHS has more than one entry")


@dataclass(frozen=True, slots=True)
class Took:
    """A round's seconds. target_s, draft_s: by the clock, which a planner sees.  counted_s: what it is judged by."""

    target_s: float
    draft_s: float
    counted_s: float
    cold_target: bool = False
    cold_draft: bool = False


class Machine(Protocol):
    """What rounds take."""

    def took(self, drafted: Sequence[int], behind: int) -> Took:
        """The next round. drafted: tokens of each request.  behind: tokens that those who draft have to read before."""


class Quiet:
    """Rounds take what was recorded, each time."""

    def __init__(self, recording: Recording) -> None:
        """recording: its times."""
        self._recording = recording

    def took(self, drafted: Sequence[int], behind: int) -> Took:
        """Whatever came before."""
        target_s = self._recording.target_s(len(drafted), sum(drafted))
        draft_s = self._recording.draft_s(len(drafted), max(drafted))
        return Took(target_s, draft_s, target_s + draft_s)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a planner made of a cell. seconds: that it is judged by.  rounds: with their forecasts."""

    tokens: int
    seconds: float
    rounds: tuple[RoundStats, ...]

    @property
    def goodput(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def replay(recording: Recording, key: str, batch: int, planner: Planner, turns: int = 1, machine: Machine | None = None) -> Outcome:
    """All texts of `key`, `batch` at a time, and all again `turns` times, with one planner. machine: a quiet one by default."""
    texts, machine = recording.texts[key] * turns, machine or Quiet(recording)
    rounds: list[RoundStats] = []
    seconds = 0.0
    for first in range(0, len(texts) - batch + 1, batch):
        for stats, counted_s in _replayed(recording.prompt, texts[first : first + batch], planner, machine):
            rounds.append(stats)
            seconds += counted_s
    tokens = sum(len(stats.requests) + sum(stats.accepted) for stats in rounds)
    return Outcome(tokens, seconds, tuple(rounds))


def _replayed(prompt: int, texts: Sequence[str], planner: Planner, machine: Machine) -> Iterator[tuple[RoundStats, float]]:
    """One batch of texts to its end: its rounds, and the seconds that they count as."""
    done, behind = [0] * len(texts), [0] * len(texts)
    while active := tuple([i for i, text in enumerate(texts) if done[i] < len(text)]):
        room = tuple([len(texts[i]) - done[i] for i in active])
        budget = planner.plan(Load(active, tuple([prompt + done[i] for i in active]), room, _TRAITS))
        drafted = tuple(map(min, budget.nodes, budget.depth))
        accepted = tuple([min(int(texts[i][done[i]]), n) for i, n in zip(active, drafted, strict=True)])
        took = machine.took(drafted, sum([behind[i] for i, n in zip(active, drafted, strict=True) if n]))
        stats = _stats(active, drafted, accepted, took, budget)
        planner.observe(stats)
        yield stats, took.counted_s
        for i, n, kept in zip(active, drafted, accepted, strict=True):
            done[i] += kept + 1
            behind[i] = 0 if n else behind[i] + 1


def _stats(active: tuple[int, ...], drafted: tuple[int, ...], accepted: tuple[int, ...], took: Took, budget: Budget) -> RoundStats:
    return RoundStats(
        active,
        drafted,
        accepted,
        drafted,
        len(active) + sum(drafted),
        took.draft_s,
        took.target_s,
        0.0,
        0.0,
        forecast=budget.forecast,
        cold_target=took.cold_target,
        cold_draft=took.cold_draft,
    )


def fixed(recording: Recording, key: str, batch: int, turns: int = 1) -> dict[int, float]:
    """Goodput of every fixed length, 0 for plain decoding."""
    planners = {length: FixedPlanner(nodes=length, depth=max(length, 1)) for length in LENGTHS}
    return {length: replay(recording, key, batch, planner, turns).goodput for length, planner in planners.items()}


def played(recording: Recording, key: str, batch: int, rounds: int, machines: Sequence[Machine] = ()) -> dict[str, float]:
    """A cell: a fresh goodput planner over plain decoding and over the best fixed length, in the mean over machines.

    rounds: plain ones, at least.  machines: by default a quiet one, on which plain decoding and fixed lengths run anyway.
    """
    texts, machines = recording.texts[key], machines or (Quiet(recording),)
    turns = -(-rounds // (sum(map(len, texts)) // batch))
    ours = geometric_mean([replay(recording, key, batch, GoodputPlanner(), turns, machine).goodput for machine in machines])
    lengths = fixed(recording, key, batch)
    best = max(lengths, key=lambda length: lengths[length])
    return {"vs_plain": ours / lengths[0], "best_fixed": best, "vs_best_fixed": ours / lengths[best]}
