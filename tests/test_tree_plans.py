"""Static plans against brute force over every tree, and over every size and depth."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product

import pytest

from specdec.errors import SpecDecError
from specdec.trees.plans import best_tree, expected_tokens, positional, sequoia_tree
from specdec.trees.static import Choice, chain_choices, static_tree, tree_from_accuracies

Rows = list[list[float]]


@cache
def _forests(nodes: int, depth: int, width: int) -> tuple[tuple[Choice, ...], ...]:
    """Every forest of exactly so many nodes whose siblings are the first ranks."""
    if nodes == 0:
        return ((),)
    if depth == 0:
        return ()
    found = []
    for children in range(1, width + 1):
        for sizes in product(range(1, nodes + 1), repeat=children):
            if sum(sizes) == nodes:
                for parts in product(*(_forests(size - 1, depth - 1, width) for size in sizes)):
                    found.append(tuple(choice for r, part in enumerate(parts) for choice in ((r,), *((r, *rest) for rest in part))))
    return tuple(found)


def _value(choices: tuple[Choice, ...], accuracies: Rows) -> float:
    total = 1.0
    for choice in choices:
        reached = 1.0
        for depth, rank in enumerate(choice):
            reached *= accuracies[depth][rank]
        total += reached
    return total


def _random_rows(rng: random.Random, depth: int, width: int) -> Rows:
    rows = [[rng.choice([0.0, 1.0, 0.2, 0.5, rng.random(), rng.random()]) for _ in range(width)] for _ in range(depth)]
    return [sorted(row, reverse=True) for row in rows] if rng.random() < 0.5 else rows


def _trees(most_nodes: int, depth: int, width: int) -> Iterator[tuple[Choice, ...]]:
    for nodes in range(most_nodes + 1):
        yield from _forests(nodes, depth, width)


def test_the_enumeration_knows_how_many_trees_there_are() -> None:
    # Ordered trees of n + 1 nodes: the Catalan numbers.
    assert [len(_forests(n, n, n)) for n in range(6)] == [1, 1, 2, 5, 14, 42]


@pytest.mark.parametrize("seed", range(40))
def test_sequoia_trees_are_the_best_of_all_trees(seed: int) -> None:
    rng = random.Random(seed)
    depth, width, nodes = rng.randint(1, 4), rng.randint(1, 3), rng.randint(0, 6)
    rows = positional(_random_rows(rng, 1, width)[0], depth) if seed % 2 else _random_rows(rng, depth, width)
    tree = sequoia_tree(rows, nodes, depth)
    best = max(_value(choices, rows) for choices in _trees(nodes, depth, width))
    assert expected_tokens(tree, rows) == pytest.approx(best, abs=1e-12)
    smallest = min(len(c) for c in _trees(nodes, depth, width) if _value(c, rows) >= best - 1e-9)
    assert len(tree.choices) == smallest
    assert tree.depth <= depth


def test_children_are_the_first_ranks_also_where_a_later_one_is_better() -> None:
    tree = sequoia_tree([[0.1, 0.8]], 2, 1)
    assert tree.choices == ((0,), (1,))
    assert sequoia_tree([[0.1, 0.8]], 1, 1).choices == ((0,),)


def test_with_falling_accuracies_it_is_the_tree_of_the_largest_products() -> None:
    rng = random.Random(5)
    for _ in range(20):
        rows = [sorted((rng.random() for _ in range(4)), reverse=True) for _ in range(4)]
        tree, other = sequoia_tree(rows, 24, 4), tree_from_accuracies(rows, 24, 4)
        assert expected_tokens(tree, rows) == pytest.approx(expected_tokens(other, rows))


def test_the_best_nodes_come_first() -> None:
    rows = [[0.9, 0.05], [0.8, 0.3], [0.7]]
    tree = sequoia_tree(rows, 5, 3)
    scores = [_value((choice,), rows) for choice in tree.choices]
    assert scores == sorted(scores, reverse=True)
    assert static_tree(tree.choices) == tree


def test_expected_tokens_of_known_trees() -> None:
    rows = [[0.5, 0.25], [0.5]]
    assert expected_tokens(static_tree([]), rows) == 1.0
    assert expected_tokens(static_tree(chain_choices(2)), rows) == pytest.approx(1.75)
    assert expected_tokens(static_tree([(0,), (1,), (1, 0)]), rows) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert expected_tokens(static_tree(chain_choices(4)), rows) == pytest.approx(1.75)


def _stepped(rng: random.Random) -> Callable[[int, int], float]:
    """Times that stand for a while and then jump, not falling with depth."""
    jumps, draft_s = sorted(rng.uniform(1.0, 3.0) for _ in range(3)), rng.uniform(0.0, 0.3)
    return lambda nodes, depth: jumps[min(nodes // 3, 2)] + 0.01 * nodes + draft_s * depth


def _wild(rng: random.Random) -> Callable[[int, int], float]:
    times = [rng.uniform(0.5, 3.0) for _ in range(7)]
    draft_s = rng.uniform(0.0, 0.3)
    return lambda nodes, depth: times[nodes] + draft_s * depth


@pytest.mark.parametrize("times", [_stepped, _wild], ids=["stepped", "rising and falling"])
@pytest.mark.parametrize("seed", range(20))
def test_plans_are_the_best_over_all_trees_sizes_and_depths(times: Callable[..., Callable[[int, int], float]], seed: int) -> None:
    rng = random.Random(seed)
    depth, width, nodes = rng.randint(1, 4), rng.randint(1, 3), rng.randint(1, 6)
    rows, seconds = _random_rows(rng, depth, width), times(rng)
    plan = best_tree(rows, seconds, nodes, depth)
    best = 0.0
    for choices in _trees(nodes, depth, width):
        own_depth = max(map(len, choices), default=0)
        # A node that is never right is in no plan, even where a longer round would be a shorter one.
        best = max(best, _value(choices, rows) / seconds(len(choices), own_depth)) if _all_add(choices, rows) else best
    assert plan.goodput == pytest.approx(best)
    assert plan.goodput == pytest.approx(plan.tokens / seconds(plan.nodes, plan.depth))
    assert plan.tokens == pytest.approx(expected_tokens(plan.tree, rows))
    assert (plan.nodes, plan.depth, plan.width) == (len(plan.tree.choices), plan.tree.depth, plan.tree.width)


def _all_add(choices: tuple[Choice, ...], rows: Rows) -> bool:
    """Whether no smaller tree of the same kind does as well."""
    value = _value(choices, rows)
    fewer = (c for c in _trees(len(choices) - 1, max(map(len, choices), default=0), len(rows[0])))
    return not choices or value > max(_value(c, rows) for c in fewer) + 1e-12


def test_a_far_hill_is_found_behind_a_valley() -> None:
    # Four nodes cost as much as one: going node by node would stop at none.
    plan = best_tree(positional([0.8], 8), lambda nodes, depth: 1.0 if nodes == 0 else 1.9, 8, 8)
    assert (plan.nodes, plan.depth) == (8, 8)
    assert plan.goodput > 1.0


def test_what_does_not_pay_is_plain_decoding() -> None:
    plan = best_tree([[0.3, 0.2], [0.1]], lambda nodes, depth: 1.0 + nodes, 8, 4)
    assert (plan.nodes, plan.depth, plan.width, plan.tokens, plan.seconds) == (0, 0, 0, 1.0, 1.0)


def test_a_deep_chain_where_drafting_is_free_and_a_wide_tree_where_depth_is_dear() -> None:
    rows = positional([0.6, 0.2, 0.1], 6)
    deep = best_tree(rows, lambda nodes, depth: 1.0 + 0.05 * nodes, 6, 6)
    wide = best_tree(rows, lambda nodes, depth: 1.0 + 0.001 * nodes + 0.5 * depth, 6, 6)
    assert deep.depth > wide.depth
    assert wide.width > 1


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: sequoia_tree([[1.2]], 2, 2), "1.2"),
        (lambda: sequoia_tree([], 2, 2), "empty"),
        (lambda: sequoia_tree([[0.5]], -1, 2), "-1"),
        (lambda: best_tree([[0.5]], lambda nodes, depth: 0.0, 2, 2), "above 0"),
        (lambda: best_tree([[0.5]], lambda nodes, depth: float("nan"), 2, 2), "nan"),
    ],
)
def test_errors_name_what_came(make: Callable[[], object], what: str) -> None:
    with pytest.raises(SpecDecError, match=what):
        make()
