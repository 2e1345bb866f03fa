"""What can be drafted with: a drafter at a width, the best plan it allows, and how long it has not been tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdec.acceptance import AcceptanceModel
from specdec.allocation import Allocation, Candidates, allocate_evenly, path_scores
from specdec.costs import CostModel
from specdec.types import Load, RoundStats

# How fast the share of requests that get a draft at all follows.
_FOLLOW = 0.05
# Rounds until a drafter that is not used is tried again: at first, and at most.
_FIRST_WAIT, _LONGEST_WAIT = 48, 768
# A draft is at most so many times as deep as what was measured, and one more: a guess is not trusted further.
_DEEPER = 2
# How deep a draft may be of which nothing was measured.
_FIRST_DEPTH = 2


@dataclass(frozen=True, slots=True)
class Limits:
    """depth, nodes: of a request.  together: nodes of all requests.  evenly: the same number of nodes for all."""

    depth: int
    nodes: int
    together: int = 256
    evenly: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """arm: its place.  nodes, depth: by request, in order.  rows: drafted nodes to be expected in all.

    tokens, seconds: expected of the round.
    """

    arm: int
    requests: tuple[int, ...]
    nodes: tuple[int, ...]
    depth: tuple[int, ...]
    width: int
    rows: float
    tokens: float
    seconds: float

    @property
    def goodput(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


class Arm:
    """One drafter at one width. rates: shared by the widths of a drafter."""

    def __init__(self, place: int, name: str, width: int, rates: AcceptanceModel) -> None:
        """name: of the drafter.  width: most children of a node; 1 drafts chains."""
        self.place, self.name, self.width, self.rates = place, name, width, rates
        self.offered = 1.0
        self.idle, self.wait = 0, _FIRST_WAIT

    @property
    def stale(self) -> bool:
        """Whether it has not been tried for long."""
        return self.idle >= self.wait

    def lost(self) -> None:
        """It was tried and is not the best."""
        self.idle, self.wait = 0, min(2 * self.wait, _LONGEST_WAIT)

    def observe(self, stats: RoundStats, planned: Sequence[int]) -> None:
        """A round that it drafted in is over. planned: depth asked of it, by request."""
        asked = sum([depth > 0 for depth in planned])
        drafted = sum([nodes > 0 for nodes in stats.drafted])
        self.offered += _FOLLOW * (drafted / asked - self.offered)
        self.rates.observe(stats, planned)

    def plans(self, load: Load, costs: CostModel, most: Limits, *, hoped: bool) -> list[Plan]:
        """The best plan for every limit of depth. hoped: see `Curve.hoped`."""
        batch, width = len(load.requests), self.width
        deepest = min(max(_DEEPER * costs.deepest(self.name, width, batch) + 1, _FIRST_DEPTH), most.depth)
        paths = self._paths(load, deepest, max(min(most.nodes, most.together // batch), 1))
        scores = [[score for score, _ in own] for own in paths]
        depths = [[depth for _, depth in own] for own in paths]
        target = costs.target(batch, max(sum(map(len, paths)), 1), sum(load.lengths), share=self.offered, hoped=hoped)
        candidates, found = None if most.evenly else Candidates(scores, depths), []
        for limit in range(1, deepest + 1):
            draft = costs.draft(self.name, width, batch, limit, hoped=hoped)
            if candidates is not None:
                best = candidates.best(target, draft, limit)
            else:
                within = [[score for score, depth in own if depth <= limit] for own in paths]
                best = allocate_evenly(within, target, draft)
            found.append(self._plan(load, depths, limit, best))
        return found

    def least(self, load: Load, costs: CostModel, every: int) -> Plan:
        """One node for every `every`-th request, to see whether it is accepted."""
        batch = len(load.requests)
        offset = sum(load.lengths) % every
        nodes = tuple([int(place % every == offset and room > 1) for place, room in enumerate(load.room)])
        scores = [self._paths(load, 1, 1)[place][0][0] if own else 0.0 for place, own in enumerate(nodes)]
        target = costs.target(batch, max(sum(nodes), 1), sum(load.lengths), share=self.offered)
        seconds = target[sum(nodes)] + costs.draft(self.name, self.width, batch, 1)
        return Plan(self.place, load.requests, nodes, nodes, self.width, sum(nodes), batch + sum(scores), seconds)

    def _paths(self, load: Load, deepest: int, nodes: int) -> list[list[tuple[float, int]]]:
        """Scores and depths of each request's nodes."""
        found, shared = [], self.rates.shared(deepest, self.width)
        for request, room in zip(load.requests, load.room, strict=True):
            rates = self.rates.of(request, shared[: max(0, min(deepest, room - 1))])
            found.append([(self.offered * score, depth) for score, depth in path_scores(rates, nodes)])
        return found

    def _plan(self, load: Load, depths: Sequence[Sequence[int]], limit: int, best: Allocation) -> Plan:
        deep = [max([d for d in own if d <= limit][:count], default=0) for own, count in zip(depths, best.nodes, strict=True)]
        rows = self.offered * sum(best.nodes)
        seconds = best.tokens / best.goodput
        return Plan(self.place, load.requests, best.nodes, tuple(deep), self.width, rows, best.tokens, seconds)
