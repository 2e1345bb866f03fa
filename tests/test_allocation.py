"""Allocation of nodes under one budget: equal to brute force, for chains and trees."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product

import pytest

from specdec.allocation import allocate, allocate_evenly, path_scores


def _brute_force(scores: Sequence[Sequence[float]], seconds: Sequence[float]) -> float:
    """The best goodput over all numbers of nodes of all requests."""
    best = 0.0
    for counts in product(*(range(len(row) + 1) for row in scores)):
        if sum(counts) < len(seconds):
            tokens = len(scores) + sum(sum(row[:count]) for row, count in zip(scores, counts, strict=True))
            best = max(best, tokens / seconds[sum(counts)])
    return best


@pytest.mark.parametrize("seed", range(60))
def test_allocations_are_the_best_there_are(seed: int) -> None:
    rng = random.Random(seed)
    scores = [_chain([rng.choice([0.0, 0.3, 0.5, 0.9, 1.0, rng.random()]) for _ in range(4)]) for _ in range(rng.randint(1, 4))]
    steps = sorted(rng.uniform(1.0, 3.0) for _ in range(3))
    seconds = [steps[min(n // 5, 2)] + rng.choice([0.0, 0.05]) * n for n in range(rng.randint(1, 17))]
    found = allocate(scores, seconds)
    assert found.goodput == pytest.approx(_brute_force(scores, seconds))
    assert sum(found.nodes) < len(seconds)
    tokens = len(scores) + sum(sum(row[:count]) for row, count in zip(scores, found.nodes, strict=True))
    assert found.tokens == pytest.approx(tokens)


def test_of_equals_the_smallest_wins_and_zero_scores_cost_nothing() -> None:
    assert allocate([[1.0, 1.0], [1.0]], [1.0, 1.5, 2.0, 2.5]).nodes == (0, 0)
    assert allocate([[0.0], [0.0]], [1.0, 1.0, 1.0]).nodes == (0, 0)


def _chain(rates: Sequence[float]) -> list[float]:
    return [score for score, _ in path_scores([[rate] for rate in rates], len(rates))]


@pytest.mark.parametrize("seed", range(20))
def test_the_same_for_all_is_the_best_of_those(seed: int) -> None:
    rng = random.Random(seed)
    scores = [_chain([rng.random() for _ in range(rng.randint(1, 4))]) for _ in range(3)]
    seconds = [1.0 + rng.choice([0.05, 0.3]) * n for n in range(13)]
    found = allocate_evenly(scores, seconds)
    counts = [[min(size, len(row)) for row in scores] for size in range(5)]
    values = [(3 + sum(sum(row[:n]) for row, n in zip(scores, each, strict=True))) / seconds[sum(each)] for each in counts]
    assert found.goodput == pytest.approx(max(values))
    assert list(found.nodes) in counts


@pytest.mark.parametrize("seed", range(20))
def test_paths_of_a_tree_are_its_best_and_closed_upwards(seed: int) -> None:
    rng = random.Random(seed)
    rates = [[rng.random() / 3 for _ in range(3)] for _ in range(3)]
    found = path_scores(rates, 10)
    everything = sorted(
        (_product(rates, choice) for depth in (1, 2, 3) for choice in product(range(3), repeat=depth)),
        reverse=True,
    )
    assert [score for score, _ in found] == pytest.approx(everything[:10])
    for place, (_, depth) in enumerate(found):
        assert depth == 1 or any(level == depth - 1 for _, level in found[:place])


def _product(rates: Sequence[Sequence[float]], choice: Sequence[int]) -> float:
    score = 1.0
    for depth, rank in enumerate(choice):
        score *= rates[depth][rank]
    return score
