"""What can be drafted with: a drafter at a width, the best plan it allows, and how long it has not been tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdec.acceptance import AcceptanceModel
from specdec.allocation import Allocation, Candidates, allocate_evenly, least_of, path_scores
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

    tokens, seconds: expected of the round.  worth: of an accepted token, over that of a token of plain decoding; 1 in trials, which
    are judged by what is accepted.
    """

    arm: int
    requests: tuple[int, ...]
    nodes: tuple[int, ...]
    depth: tuple[int, ...]
    width: int
    rows: float
    tokens: float
    seconds: float
    worth: float = 1.0

    @property
    def goodput(self) -> float:
        """Tokens a second, each for what it is worth."""
        batch = len(self.requests)
        return (batch + self.worth * (self.tokens - batch)) / self.seconds


@dataclass(frozen=True, slots=True)
class Look:
    """What an arm could draft for a load. worth: of an accepted token.  deepest: levels that are thought of.  scores, depths: of
    each request's nodes, the scores times the worth.  candidates: of all requests; None where all are to get the same number.
    """

    load: Load
    worth: float
    deepest: int
    scores: Sequence[Sequence[float]]
    depths: Sequence[Sequence[int]]
    candidates: Candidates | None

    def within(self, limit: int) -> list[list[float]]:
        """Scores of the nodes down to this depth."""
        both = [zip(scores, depths, strict=True) for scores, depths in zip(self.scores, self.depths, strict=True)]
        return [[score for score, depth in own if depth <= limit] for own in both]


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

    def look(self, load: Load, costs: CostModel, most: Limits, worth: float = 1.0) -> Look:
        """What could be drafted now. worth: of an accepted token."""
        batch = len(load.requests)
        deepest = min(max(_DEEPER * costs.deepest(self.name, self.width, batch) + 1, _FIRST_DEPTH), most.depth)
        paths = self._paths(load, deepest, max(min(most.nodes, most.together // batch), 1))
        scores = [[worth * score for score, _ in own] for own in paths]
        depths = [[depth for _, depth in own] for own in paths]
        return Look(load, worth, deepest, scores, depths, None if most.evenly else Candidates(scores, depths))

    def plans(self, look: Look, costs: CostModel, *, hoped: bool, enough: float = 1.0) -> list[Plan]:
        """The best plan for every limit of depth. hoped: see `Curve.hoped`.  enough: goodput over plain decoding's, at least."""
        load, candidates = look.load, look.candidates
        batch, nodes = len(load.requests), max(sum(map(len, look.scores)), 1)
        target = costs.target(batch, nodes, sum(load.lengths), share=self.offered, hoped=hoped)
        plain_s, target[0] = target[0], target[0] / enough
        least, found = least_of(target), []
        for limit, draft in enumerate(costs.drafts(self.name, self.width, batch, look.deepest, hoped=hoped), 1):
            if candidates is not None:
                best = candidates.best(target, draft, limit, least)
            else:
                best = allocate_evenly(look.within(limit), target, draft)
            found.append(self._plan(look, limit, best, plain_s))
        return found

    def least(self, load: Load, costs: CostModel, every: int, turn: int) -> Plan:
        """One node for every `every`-th request, to see whether it is accepted; others with the next turn."""
        batch = len(load.requests)
        nodes = tuple([int(place % every == turn % every and room > 1) for place, room in enumerate(load.room)])
        scores = [own[0][0] for own, asked in zip(self._paths(load, 1, 1), nodes, strict=True) if asked]
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

    def _plan(self, look: Look, limit: int, best: Allocation, plain_s: float) -> Plan:
        deep = best.nodes
        if self.width > 1:
            within = [[depth for depth in own if depth <= limit] for own in look.depths]
            deep = tuple([max(own[:count], default=0) for own, count in zip(within, best.nodes, strict=True)])
        rows = self.offered * sum(best.nodes)
        seconds = best.tokens / best.goodput if any(best.nodes) else plain_s
        batch, worth = len(look.load.requests), look.worth
        tokens = batch + (best.tokens - batch) / worth
        return Plan(self.place, look.load.requests, best.nodes, deep, self.width, rows, tokens, seconds, worth)
