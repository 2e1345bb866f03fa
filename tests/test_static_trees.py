"""Static and product trees: against brute force over all closed sets, and their cuts to a budget."""

from __future__ import annotations

from itertools import combinations, product
from math import prod

import pytest
import torch

from specdec.errors import SpecDecError
from specdec.trees.product import ProductTrees, host_product_tree
from specdec.trees.static import StaticTrees, chain_choices, cut, most_nodes, static_tree, tree_from_accuracies
from specdec.types import TokenTree


def test_choices_become_parents_ranks_and_depths() -> None:
    tree = static_tree([[0], [0, 2], [1], [0, 2, 0], [1, 0]])
    assert tree.choices == ((0,), (0, 2), (1,), (0, 2, 0), (1, 0))
    assert tree.parents == (0, 1, 0, 2, 3)
    assert tree.ranks == (0, 2, 1, 0, 0)
    assert tree.depths == (1, 2, 1, 3, 2)
    assert (tree.depth, tree.width) == (3, 3)
    assert static_tree([[0, 0], [0]]).choices == ((0,), (0, 0))
    assert static_tree(chain_choices(3)).parents == (0, 1, 2)


@pytest.mark.parametrize(
    ("choices", "told"),
    [([[]], "one or more"), ([[-1]], "-1"), ([[0, 1]], r"\[0\]"), ([[0], [0]], "twice")],
)
def test_choices_that_are_no_tree_are_refused(choices: list[list[int]], told: str) -> None:
    with pytest.raises(SpecDecError, match=told):
        static_tree(choices)


def _closed_sets(paths: list[tuple[int, ...]], size: int) -> list[tuple[tuple[int, ...], ...]]:
    return [c for c in combinations(paths, size) if all(len(p) == 1 or p[:-1] in c for p in c)]


@pytest.mark.parametrize("seed", range(12))
def test_a_tree_from_accuracies_is_the_best_of_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    accuracies = (torch.randint(1, 9, (2, 3), generator=generator) / 10).tolist()
    paths = [p for d in (1, 2) for p in product(range(2), repeat=d)]
    for nodes in range(7):
        tree = tree_from_accuracies(accuracies, nodes, most_children=2)
        value = {p: prod(accuracies[k][r] for k, r in enumerate(p)) for p in paths}
        assert len(tree.choices) == nodes
        best = max(sum(value[p] for p in chosen) for chosen in _closed_sets(paths, nodes))
        assert sum(value[p] for p in tree.choices) == pytest.approx(best)


def test_ties_go_to_the_shallower_then_the_lower_rank() -> None:
    tree = tree_from_accuracies([[0.5, 0.25], [0.5, 0.5]], 5, 2)
    assert tree.choices == ((0,), (1,), (0, 0), (0, 1), (1, 0))
    assert tree_from_accuracies([[1.0, 0.0], [1.0]], 9, 2).choices == ((0,), (0, 0))


@pytest.mark.parametrize("bad", [[], [[]], [[0.5], [1.5]], [[float("nan")]]])
def test_accuracies_that_are_no_probabilities_are_refused(bad: list[list[float]]) -> None:
    with pytest.raises(SpecDecError, match="accuracies"):
        tree_from_accuracies(bad, 3, 2)


def _check_budget(paths: list[tuple[int, ...]], nodes: int, depth: int, width: int) -> None:
    assert len(paths) <= nodes
    assert max(map(len, paths), default=0) <= depth
    assert len(set(paths)) == len(paths)
    parents = [p[:-1] for p in paths]
    assert all(not p or p in paths for p in parents)
    assert all(parents.count(p) <= width for p in parents)
    for level in range(depth):
        assert len({p for p in parents if len(p) == level}) <= max(width, 1)


BUDGETS = [(0, 3, 2), (1, 1, 1), (5, 3, 1), (9, 2, 2), (40, 3, 2), (40, 3, 3), (6, 3, 4)]


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_cut_keeps_to_its_budget(budget: tuple[int, int, int]) -> None:
    every = [p for d in (1, 2, 3) for p in product(range(4), repeat=d)]
    kept = cut(every, *budget)
    _check_budget(list(kept.choices), *budget)
    assert len(kept.choices) == min(budget[0], most_nodes(budget[1], budget[2], 4))
    from_accuracies = StaticTrees(accuracies=[[0.6, 0.3, 0.2, 0.1]] * 3).fitted(*budget)
    _check_budget(list(from_accuracies.choices), *budget)
    assert len(from_accuracies.choices) == len(kept.choices)


def test_static_trees_gather_the_guesses_of_each_request() -> None:
    trees = StaticTrees(choices=[[0], [1], [0, 1], [0, 1, 0]])
    guesses = torch.arange(12).view(2, 3, 2) + 100
    tree = trees.build(torch.tensor([7, 8]), guesses, (4, 2), (3, 2), (2, 1))
    # The second request has width 1: its node (1) is left out, and with it nothing else.
    assert tree.tokens.tolist() == [[7, 100, 101, 103, 104], [8, 106, 109, 0, 0]]
    assert tree.parents.tolist() == [[-1, 0, 0, 1, 3], [-1, 0, 1, 0, 0]]
    assert tree.num_nodes == (5, 3)
    assert not tree.is_chain
    assert StaticTrees(choices=chain_choices(3)).build(torch.tensor([7]), guesses[:1], (2,), (3,), (1,)).is_chain


def _paths_of(tree: TokenTree, b: int, tokens: torch.Tensor) -> list[tuple[int, ...]]:
    """The ranks of every drafted node, found from its token; each place of `tokens` holds tokens of its own."""
    paths: list[tuple[int, ...]] = [()]
    for n in range(1, tree.num_nodes[b]):
        above = paths[int(tree.parents[b, n])]
        paths.append((*above, tokens[b, len(above)].tolist().index(int(tree.tokens[b, n]))))
    return paths[1:]


def _best(log_probs: list[list[float]], nodes: int, depth: int, width: int) -> list[tuple[int, ...]]:
    """Level by level: the likeliest `width` nodes are expanded; then the likeliest of all found, ties to the earlier."""

    def order(paths: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return sorted(paths, key=lambda p: (-sum(log_probs[k][r] for k, r in enumerate(p)), len(p), p))

    found: list[tuple[int, ...]] = []
    frontier: list[tuple[int, ...]] = [()]
    for _ in range(depth):
        level = [(*p, r) for p in frontier for r in range(min(width, len(log_probs[0])))]
        found.extend(level)
        frontier = order(level)[:width]
    return order(found)[:nodes]


@pytest.mark.parametrize("seed", range(30))
def test_a_product_tree_holds_the_likeliest_paths(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    places, guesses = 1 + seed % 4, 1 + seed % 5
    # Whole numbers, so that sums are exact and ties are many.
    log_probs = -torch.randint(0, 5, (2, places, guesses), generator=generator).float().cumsum(-1)
    tokens = torch.arange(2 * places * guesses).view(2, places, guesses)
    trees = ProductTrees()
    for nodes in ((0, 3), (1, 1), (7, 4), (16, 5), (23, 60)):
        for depth, width in (((places, places), (guesses, guesses)), ((1, places), (1, guesses)), ((4, 2), (2, 3))):
            tree = trees.build(torch.tensor([901, 902]), log_probs, tokens, nodes, depth, width)
            assert tree.tokens[:, 0].tolist() == [901, 902]
            for b in range(2):
                expected = _best(log_probs[b].tolist(), nodes[b], min(depth[b], places), width[b])
                assert sorted(_paths_of(tree, b, tokens)) == sorted(expected)


@pytest.mark.parametrize("seed", range(10))
def test_the_host_and_the_device_build_the_same_product_tree(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(2, 4, 6, generator=generator).log_softmax(-1).sort(-1, descending=True).values
    tokens = torch.arange(48).view(2, 4, 6)
    roots = torch.tensor([901, 902])
    for nodes, depth, width in (((12, 3), (4, 2), (4, 2)), ((40, 60), (3, 4), (3, 6)), ((0, 5), (4, 9), (1, 1))):
        device = ProductTrees().build(roots, log_probs, tokens, nodes, depth, width)
        host = host_product_tree(roots, log_probs, tokens, nodes, depth, width)
        assert host.num_nodes == device.num_nodes
        assert torch.equal(host.tokens[:, 0], roots)
        for b in range(2):
            assert sorted(_paths_of(host, b, tokens)) == sorted(_paths_of(device, b, tokens))


@pytest.mark.parametrize("seed", range(8))
def test_a_wide_product_tree_is_the_best_of_all_closed_sets(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(1, 3, 2, generator=generator).sort(-1, descending=True).values
    paths = [p for d in (1, 2, 3) for p in product(range(2), repeat=d)]
    value = {p: prod(float(probs[0, k, r]) for k, r in enumerate(p)) for p in paths}
    tokens = torch.arange(6).view(1, 3, 2)
    for nodes in (3, 5, 8):
        # A level of 4 nodes is expanded whole with width 4.
        tree = ProductTrees().build(torch.tensor([99]), probs.log(), tokens, (nodes,), (3,), (4,))
        best = max(sum(value[p] for p in chosen) for chosen in _closed_sets(paths, nodes))
        assert sum(value[p] for p in _paths_of(tree, 0, tokens)) == pytest.approx(best, rel=1e-6)


def test_a_product_tree_of_laws_that_are_no_numbers_is_still_a_tree() -> None:
    log_probs = torch.full((1, 3, 3), float("nan"))
    log_probs[0, 1] = float("-inf")
    tree = ProductTrees().build(torch.tensor([9]), log_probs, torch.arange(9).view(1, 3, 3), (20,), (3,), (3,))
    assert tree.num_nodes == (21,)
    assert (tree.parents[0, 1:] < torch.arange(1, 21)).all()


def test_width_one_is_a_chain() -> None:
    tree = ProductTrees().build(torch.tensor([9]), torch.zeros(1, 3, 2), torch.arange(6).view(1, 3, 2), (5,), (3,), (1,))
    assert tree.is_chain
    assert tree.tokens.tolist() == [[9, 0, 2, 4]]
    assert tree.parents.tolist() == [[-1, 0, 1, 2]]
