"""Which nodes to draft under one budget: the theorem behind SmartSpec's and TETRIS's goodput, stated once.

With a path score, the probability that a node and all above it are accepted, tokens of a round are expected to be the number of
requests plus the sum of the drafted nodes' scores. Scores never grow from a node to its children, so the N best nodes of all
requests are closed upwards, and the best set for every N is a prefix of one order (TETRIS, arXiv 2502.15197; EAGLE-2, arXiv
2406.16858; SmartSpec, arXiv 2406.14066). Times need not be linear or unimodal: every N is looked at.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter


@dataclass(frozen=True, slots=True)
class Allocation:
    """nodes: of each request.  tokens: expected in the round.  goodput: those over the round's seconds."""

    nodes: tuple[int, ...]
    tokens: float
    goodput: float


class Candidates:
    """All requests' nodes in the one order, of which every best set is the beginning."""

    def __init__(self, scores: Sequence[Sequence[float]], depths: Sequence[Sequence[int]] | None = None) -> None:
        """scores: of each request's possible nodes, parents before children; no score is above its parent's, as for a chain's
        products.  depths: of the same nodes, where `best` is to look at some depths only.
        """
        self._batch = len(scores)
        levels = depths or [[1] * len(row) for row in scores]
        nodes = [
            (score, request, depth)
            for request, (row, own) in enumerate(zip(scores, levels, strict=True))
            for score, depth in zip(row, own, strict=True)
        ]
        if self._batch > 1:
            # Stable, so that of a request's equal scores a parent comes before its child.
            nodes.sort(key=itemgetter(0), reverse=True)
        self._nodes = nodes

    def best(
        self, seconds: Sequence[float], drafting: float = 0.0, deepest: int | None = None, least: Sequence[float] | None = None
    ) -> Allocation:
        """The allocation of the largest goodput, the smallest of equals.

        seconds: of a round with n drafted nodes in all, for n from 0 on; no more nodes than that are drafted.
        drafting: seconds that any drafting costs on top.  deepest: no node below this depth.  least: `least_of` these seconds.
        """
        nodes = self._nodes if deepest is None else [node for node in self._nodes if node[2] <= deepest]
        nodes = nodes[: len(seconds) - 1]
        tokens = expected = float(self._batch)
        most = tokens + sum([node[0] for node in nodes])
        best, count = tokens / seconds[0], 0
        least = least or least_of(seconds)
        for place, node in enumerate(nodes, 1):
            own = seconds[place] + drafting
            tokens += node[0]
            if tokens > best * own:
                best, count, expected = tokens / own, place, tokens
            elif most <= best * (least[place] + drafting):
                # Not even all the tokens that there are would do in the least time of this many nodes or more.
                break
        chosen = [0] * self._batch
        for _, request, _ in nodes[:count]:
            chosen[request] += 1
        return Allocation(tuple(chosen), expected, best)


def least_of(seconds: Sequence[float]) -> list[float]:
    """For every n, the least seconds of n nodes or more."""
    return list(accumulate(reversed(seconds), min))[::-1]


def allocate(scores: Sequence[Sequence[float]], seconds: Sequence[float]) -> Allocation:
    """See `Candidates`."""
    return Candidates(scores).best(seconds)


def allocate_evenly(
    scores: Sequence[Sequence[float]], seconds: Sequence[float], drafting: float = 0.0, most: int | None = None
) -> Allocation:
    """As `allocate`, with the same number of nodes for every request that has so many (SmartSpec by batch). most: of a request."""
    best = Allocation((0,) * len(scores), float(len(scores)), len(scores) / seconds[0])
    for size in range(1, min(max(map(len, scores)), most or len(seconds)) + 1):
        nodes = tuple([min(size, len(row)) for row in scores])
        if sum(nodes) >= len(seconds):
            break
        tokens = len(scores) + sum([sum(row[:size]) for row in scores])
        goodput = tokens / (seconds[sum(nodes)] + drafting)
        if goodput > best.goodput:
            best = Allocation(nodes, tokens, goodput)
    return best


def path_scores(rates: Sequence[Sequence[float]], nodes: int) -> list[tuple[float, int]]:
    """(score, depth) of the best `nodes` paths, the best first and so parents before children.

    rates[d][r]: the probability that the rank-r guess at depth d + 1 is the accepted one, given that its parent was.
    """
    if all(len(row) == 1 for row in rates):
        return _chain(rates[:nodes])
    found: list[tuple[float, int]] = []
    heap = [(-1.0, 0)]
    while heap and len(found) <= nodes:
        negative, depth = heapq.heappop(heap)
        found.append((-negative, depth))
        for rate in rates[depth] if depth < len(rates) else ():
            if rate > 0:
                heapq.heappush(heap, (negative * rate, depth + 1))
    return found[1:]


def _chain(rates: Sequence[Sequence[float]]) -> list[tuple[float, int]]:
    found, reached = [], 1.0
    for depth, (rate,) in enumerate(rates, 1):
        reached *= rate
        found.append((reached, depth))
    return found
