"""What speculation did: per request and over a whole call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from specdec.types import Forecast, RoundStats


@dataclass(frozen=True, slots=True)
class RequestStats:
    """One request. drafted, accepted: tokens.  emitted: tokens its rounds gave, bonus or recovered included.

    accepted_at: how many rounds accepted a token at each depth; reached_at: how many rounds had room to draft that deep.
    Times in seconds: the request's even share of its rounds' times.
    """

    rounds: int
    drafted: int
    accepted: int
    accepted_at: tuple[int, ...]
    reached_at: tuple[int, ...]
    draft_s: float
    target_s: float
    verify_s: float
    other_s: float

    @property
    def emitted(self) -> int:
        """Tokens of all rounds, before a stop inside the last one."""
        return self.accepted + self.rounds

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens a round, the bonus token included; 1 is plain decoding, 0 no round at all."""
        return self.emitted / self.rounds if self.rounds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted part of the drafted tokens; 0 when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance_per_position(self) -> tuple[float, ...]:
        """At each depth, the part of the drafting rounds that accepted a token there; 1 at most."""
        return tuple(a / r if r else 0.0 for a, r in zip(self.accepted_at, self.reached_at, strict=True))

    @property
    def total_s(self) -> float:
        """All four phases."""
        return self.draft_s + self.target_s + self.verify_s + self.other_s


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """One call. requests: in the order of the batch.  rounds: of the batch.  num_rows: packed rows in all rounds.

    history: every round, with what the planner chose and expected of it.
    """

    requests: tuple[RequestStats, ...]
    rounds: int
    num_rows: int
    prefill_s: float
    forward_s: float
    history: tuple[RoundStats, ...] = ()

    @property
    def drafted(self) -> int:
        """Drafted tokens of all requests."""
        return sum(r.drafted for r in self.requests)

    @property
    def accepted(self) -> int:
        """Accepted draft tokens of all requests."""
        return sum(r.accepted for r in self.requests)

    @property
    def emitted(self) -> int:
        """Tokens of all requests' rounds."""
        return sum(r.emitted for r in self.requests)

    @property
    def acceptance_rate(self) -> float:
        """Accepted part of the drafted tokens."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens a request and round, the bonus token included."""
        rounds = sum(r.rounds for r in self.requests)
        return self.emitted / rounds if rounds else 0.0

    @property
    def draft_s(self) -> float:
        """Seconds spent proposing."""
        return sum(r.draft_s for r in self.requests)

    @property
    def target_s(self) -> float:
        """Seconds in the target's forwards."""
        return sum(r.target_s for r in self.requests)

    @property
    def verify_s(self) -> float:
        """Seconds processing logits and verifying."""
        return sum(r.verify_s for r in self.requests)

    @property
    def other_s(self) -> float:
        """Seconds for everything else of a round."""
        return sum(r.other_s for r in self.requests)

    @property
    def reasons(self) -> dict[str, int]:
        """How many rounds there were of each kind: plan, plain, trial, first; see `Forecast`. Empty without forecasts."""
        return dict(Counter(stats.forecast.why for stats in self.history if stats.forecast is not None))

    def forecast_errors(self, window: int = 100) -> tuple[float, ...]:
        """Expected over realised goodput, less 1, of so many rounds each; rounds before the first measurements are left out."""
        known = [(s, s.forecast) for s in self.history if s.forecast is not None and s.forecast.seconds < float("inf")]
        parts = [known[i : i + window] for i in range(0, len(known) - window + 1, window)]
        return tuple(_expected(part) / _realised([stats for stats, _ in part]) - 1 for part in parts)

    def summary(self) -> str:
        """One line for people."""
        kinds = "".join(f", {count} {why}" for why, count in self.reasons.items())
        return (
            f"{self.emitted} tokens in {self.rounds} rounds, {self.mean_acceptance_length:.2f} a round, "
            f"{self.accepted} of {self.drafted} drafted accepted ({self.acceptance_rate:.0%}); "
            f"draft {self.draft_s:.3f} s, target {self.target_s:.3f} s, verify {self.verify_s:.3f} s, "
            f"other {self.other_s:.3f} s, prefill {self.prefill_s:.3f} s" + (f"; rounds: {kinds[2:]}" if kinds else "")
        )


def _expected(part: Sequence[tuple[RoundStats, Forecast]]) -> float:
    return sum(forecast.tokens for _, forecast in part) / sum(forecast.seconds for _, forecast in part)


def _realised(part: Sequence[RoundStats]) -> float:
    tokens = sum(len(stats.requests) + sum(stats.accepted) for stats in part)
    return tokens / sum(stats.seconds for stats in part)


@dataclass(slots=True)
class _Tally:
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=list)
    reached_at: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=lambda: [0.0] * 4)

    def add(self, drafted: int, accepted: int, depth: int, seconds: Sequence[float]) -> None:
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        self.seconds = [old + new for old, new in zip(self.seconds, seconds, strict=True)]
        for counts, reach in ((self.reached_at, depth), (self.accepted_at, accepted)):
            counts.extend([0] * (depth - len(counts)))
            for level in range(reach):
                counts[level] += 1

    def stats(self) -> RequestStats:
        draft_s, target_s, verify_s, other_s = self.seconds
        return RequestStats(
            self.rounds,
            self.drafted,
            self.accepted,
            tuple(self.accepted_at),
            tuple(self.reached_at),
            draft_s,
            target_s,
            verify_s,
            other_s,
        )


class StatsCollector:
    """Keeps the rounds of a call and sums them up at its end. prefill_s is set by who prefills."""

    def __init__(self, requests: int) -> None:
        """requests: how many the call has."""
        self._requests = requests
        self._rounds: list[tuple[RoundStats, float]] = []
        self.prefill_s = 0.0

    def add(self, stats: RoundStats, elapsed: float) -> None:
        """Take in a round. elapsed: seconds since the end of the round before, this round and all."""
        self._rounds.append((stats, elapsed))

    def stats(self) -> SpeculationStats:
        """What the rounds so far did; the requests of a round share its times evenly."""
        tallies = [_Tally() for _ in range(self._requests)]
        for stats, elapsed in self._rounds:
            share = len(stats.requests)
            other = elapsed - stats.draft_s - stats.target_s - stats.verify_s
            seconds = [s / share for s in (stats.draft_s, stats.target_s, stats.verify_s, other)]
            columns = zip(stats.requests, stats.drafted, stats.accepted, stats.depth, strict=True)
            for request, drafted, accepted, depth in columns:
                tallies[request].add(drafted, accepted, depth, seconds)
        return SpeculationStats(
            requests=tuple(tally.stats() for tally in tallies),
            rounds=len(self._rounds),
            num_rows=sum(stats.num_rows for stats, _ in self._rounds),
            prefill_s=self.prefill_s,
            forward_s=sum(stats.forward_s for stats, _ in self._rounds),
            history=tuple(stats for stats, _ in self._rounds),
        )
