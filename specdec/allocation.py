"""Which nodes to draft under one budget: the theorem behind SmartSpec's and TETRIS's goodput, stated once.

With a path score, the probability that a node and all above it are accepted, tokens of a round are expected to be the number of
requests plus the sum of the drafted nodes' scores. Scores never grow from a node to its children, so the N best nodes of all
requests are closed upwards, and the best set for every N is a prefix of one order (TETRIS, arXiv 2502.15197; EAGLE-2, arXiv
2406.16858; SmartSpec, arXiv 2406.14066). Times need not be linear or unimodal: every N is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Times = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Allocation:
    """nodes: of each request.  tokens: expected in the round.  goodput: those over the round's seconds."""

    nodes: tuple[int, ...]
    tokens: float
    goodput: float


def allocate(scores: Sequence[Sequence[float]], seconds: Times) -> Allocation:
    """The allocation of the largest goodput, the smallest of equals.

    scores: of each request's possible nodes, parents before children; no score is above its parent's, as for a chain's products.
    seconds: of a round with n drafted nodes in all, for n from 0 on; no more nodes than that are drafted.
    """
    deepest = max(map(len, scores))
    # By place first, so that of equal scores a parent comes before its child.
    nodes = [(row[place], request) for place in range(deepest) for request, row in enumerate(scores) if place < len(row)]
    gains = np.array([score for score, _ in nodes])
    order = np.argsort(-gains, kind="stable")[: len(seconds) - 1]
    tokens = len(scores) + np.concatenate(([0.0], gains[order].cumsum()))
    goodput = tokens / np.asarray(seconds)[: len(tokens)]
    count = int(goodput.argmax())
    chosen = np.bincount([nodes[n][1] for n in order[:count]], minlength=len(scores))
    return Allocation(tuple(map(int, chosen)), float(tokens[count]), float(goodput[count]))


def chain_scores(rates: Sequence[float]) -> list[float]:
    """Path scores of a chain. rates: of each depth, the probability of acceptance given that all before it were accepted."""
    scores, reached = [], 1.0
    for rate in rates:
        reached *= rate
        scores.append(reached)
    return scores
