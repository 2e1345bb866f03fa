"""Planners on a recorded machine: times of rounds and accepted drafts as they were measured, without the noise.

A text is recorded as one number for each of its tokens: how many of the tokens drafted there the target accepts. Times are
recorded by batch size, drafted nodes and depth. A planner then meets the very rounds that it would have met, and the same planner
meets the same rounds each time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from specdec import GoodputPlanner
from specdec.planner import FixedPlanner, Planner
from specdec.types import DrafterTraits, Load, RoundStats

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
class Outcome:
    """What a planner made of a cell. rounds: with their forecasts."""

    tokens: int
    seconds: float
    rounds: tuple[RoundStats, ...]

    @property
    def goodput(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def replay(recording: Recording, key: str, batch: int, planner: Planner, turns: int = 1) -> Outcome:
    """All texts of `key`, `batch` at a time, and all again `turns` times, with one planner."""
    texts = recording.texts[key] * turns
    rounds: list[RoundStats] = []
    for first in range(0, len(texts) - batch + 1, batch):
        rounds += _replayed(recording, texts[first : first + batch], planner)
    tokens = sum(len(stats.requests) + sum(stats.accepted) for stats in rounds)
    return Outcome(tokens, sum(stats.seconds for stats in rounds), tuple(rounds))


def _replayed(recording: Recording, texts: Sequence[str], planner: Planner) -> list[RoundStats]:
    """One batch of texts to its end."""
    done, rounds = [0] * len(texts), list[RoundStats]()
    while active := tuple([i for i, text in enumerate(texts) if done[i] < len(text)]):
        room = tuple([len(texts[i]) - done[i] for i in active])
        load = Load(active, tuple([recording.prompt + done[i] for i in active]), room, _TRAITS)
        budget = planner.plan(load)
        drafted = tuple(map(min, budget.nodes, budget.depth))
        accepted = tuple([min(int(texts[i][done[i]]), n) for i, n in zip(active, drafted, strict=True)])
        target_s, draft_s = recording.target_s(len(active), sum(drafted)), recording.draft_s(len(active), max(drafted))
        stats = RoundStats(
            active, drafted, accepted, drafted, len(active) + sum(drafted), draft_s, target_s, 0.0, 0.0, forecast=budget.forecast
        )
        planner.observe(stats)
        rounds.append(stats)
        for i, kept in zip(active, accepted, strict=True):
            done[i] += kept + 1
    return rounds


def fixed(recording: Recording, key: str, batch: int, turns: int = 1) -> dict[int, float]:
    """Goodput of every fixed length, 0 for plain decoding."""
    planners = {length: FixedPlanner(nodes=length, depth=max(length, 1)) for length in LENGTHS}
    return {length: replay(recording, key, batch, planner, turns).goodput for length, planner in planners.items()}


def played(recording: Recording, key: str, batch: int, rounds: int) -> dict[str, float]:
    """A cell: a fresh goodput planner over plain decoding and over the best fixed length. rounds: plain ones, at least."""
    texts = recording.texts[key]
    turns = -(-rounds // (sum(map(len, texts)) // batch))
    ours, lengths = replay(recording, key, batch, GoodputPlanner(), turns), fixed(recording, key, batch)
    best = max(lengths, key=lambda length: lengths[length])
    return {"vs_plain": ours.goodput / lengths[0], "best_fixed": best, "vs_best_fixed": ours.goodput / lengths[best]}
