"""Best-first trees: the most likely nodes there are, as brute force finds them, and lossless end to end up to 1,024 of them."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.drafters.best_first import BestFirstDrafter
from specdec.errors import SpecDecError
from specdec.generator import SpeculativeGenerator
from specdec.planner import FixedPlanner
from specdec.trees import layout
from specdec.trees.best_first import BestFirst
from specdec.types import Budget, TokenTree
from tests.support_compare import RecordingPlanner, assert_same_greedy
from tests.support_drafters import assert_same_draft, budget_of, commit, setup_of
from tests.support_models import left_padded, noised, prompts, tiny_model

MODEL: Any = tiny_model()
SMALL = noised(MODEL, 0.1)
V, DEPTH = 4, 4


class _Source:
    """Random logits behind every text of a small vocabulary."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, path: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, path)) % 2**31)
        return 2 * torch.randn(V, generator=generator)

    def score(self, path: tuple[int, ...]) -> float:
        return sum(float(self(path[:k]).log_softmax(-1)[token]) for k, token in enumerate(path))


def _grown(
    sources: list[_Source], width: tuple[int, ...], nodes: tuple[int, ...], depth: tuple[int, ...], frontier: int
) -> TokenTree:
    """The tree of each source, its logits asked for path by path."""
    growth = BestFirst(torch.stack([source(()) for source in sources]), width, nodes, depth)
    expanded: list[list[tuple[int, ...]]] = [[] for _ in sources]
    while (chosen := growth.choose(frontier)) is not None:
        rows = []
        for b, source in enumerate(sources):
            above = [expanded[b][p] if p >= 0 else () for p in chosen.parents[b].tolist()]
            paths = [(*path, token) for path, token in zip(above, chosen.tokens[b].tolist(), strict=True)]
            assert [len(path) for path in paths] == chosen.depths[b].tolist()
            expanded[b] += paths
            rows += [source(path) for path in paths]
        growth.expand(torch.stack(rows))
    return growth.tree(torch.arange(len(sources)))


def _paths(tree: TokenTree, b: int) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for n in range(1, tree.num_nodes[b]):
        assert int(tree.parents[b, n]) < n
        found.append((*found[int(tree.parents[b, n])], int(tree.tokens[b, n])))
    return found[1:]


def _brute_force(source: _Source, width: int, nodes: int, depth: int) -> list[tuple[int, ...]]:
    every = [path for deep in range(1, depth + 1) for path in product(range(V), repeat=deep)]
    allowed = [p for p in every if all(t in source(p[:k]).topk(width).indices.tolist() for k, t in enumerate(p))]
    return sorted(allowed, key=source.score, reverse=True)[:nodes]


@pytest.mark.parametrize("frontier", [1, 3, 50])
@pytest.mark.parametrize(("width", "nodes"), [(1, 3), (2, 5), (3, 12), (V, 40), (2, 500)], ids=str)
def test_they_hold_the_most_likely_nodes(width: int, nodes: int, frontier: int) -> None:
    sources, depth = [_Source(7), _Source(8), _Source(9)], (DEPTH, 2, 3)
    tree = _grown(sources, (width,) * 3, (nodes, nodes, 2), depth, frontier)
    for b, source in enumerate(sources):
        own = _paths(tree, b)
        assert len(set(own)) == len(own), "siblings repeat a token"
        assert set(own) == set(_brute_force(source, width, 2 if b == 2 else nodes, depth[b]))


def test_each_request_has_its_own_width() -> None:
    sources, widths = [_Source(7), _Source(8), _Source(9)], (1, 3, V + 2)
    tree = _grown(sources, widths, (9, 9, 9), (DEPTH, 2, 3), 3)
    for b, (source, width, depth) in enumerate(zip(sources, widths, (DEPTH, 2, 3), strict=True)):
        assert set(_paths(tree, b)) == set(_brute_force(source, min(width, V), 9, depth))


def test_where_the_draft_gives_nan_no_node_comes_of_it() -> None:
    growth = BestFirst(torch.tensor([[3.0, 2.0, 1.0, 0.0], [float("nan")] * 4]), (2, 2), (4, 4), (3, 3))
    first = growth.choose(1)
    assert first is not None
    growth.expand(torch.full((2, 4), float("nan")))
    while growth.choose(1) is not None:
        growth.expand(torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(2, -1))
    tree = growth.tree(torch.zeros(2, dtype=torch.long))
    assert tree.num_nodes[1] == 1
    assert set(_paths(tree, 0)) > {(0,), (1,)}
    assert all(path[0] == 1 for path in _paths(tree, 0) if len(path) > 1)


def test_a_request_without_a_budget_gets_no_node() -> None:
    tree = _grown([_Source(1), _Source(2), _Source(3)], (2, 2, 2), (4, 0, 4), (3, 3, 0), 4)
    assert tree.num_nodes == (5, 1, 1)


def test_no_more_is_expanded_than_may_matter() -> None:
    sure = torch.full((1, V), -40.0)
    sure[0, 1] = 40.0
    growth = BestFirst(sure, (2,), (2,), (9,))
    chosen = growth.choose(8)
    assert chosen is not None
    # Two candidates fill the tree; only the likely one's child can still replace the other.
    growth.expand(sure.expand(chosen.tokens.shape[1], -1))
    assert growth.choose(8) is None
    assert growth.tree(torch.zeros(1, dtype=torch.long)).tokens.tolist() == [[0, 1, 1]]


@torch.no_grad()
def test_a_model_s_tree_scores_every_node_on_its_own_path() -> None:
    drafter, texts = BestFirstDrafter(SMALL, frontier=5), prompts((9, 4), seed=2)
    drafter.begin(tuple(map(tuple, texts)), setup_of())
    tree = drafter.propose(Budget((0, 1), (30, 17), (5, 4), (4, 4))).tree
    assert tree.num_nodes == (31, 18)
    for b, text in enumerate(texts):
        scores: dict[tuple[int, ...], float] = {(): 0.0}
        known: dict[tuple[int, ...], Tensor] = {}

        def behind(path: tuple[int, ...], text: list[int] = text, known: dict[tuple[int, ...], Tensor] = known) -> Tensor:
            if path not in known:
                known[path] = SMALL(torch.tensor([[*text, *path]])).logits[0, -1].log_softmax(-1)
            return known[path]

        own = _paths(tree, b)
        for path in own:
            scores[path] = scores[path[:-1]] + float(behind(path[:-1])[path[-1]])
        least = min(scores[path] for path in own)
        for path in ((), *own):
            if len(path) < (5, 4)[b]:
                values, tokens = behind(path).topk(4)
                outside = [float(v) for v, t in zip(values, tokens.tolist(), strict=True) if (*path, t) not in scores]
                assert all(scores[path] + value < least + 1e-3 for value in outside)


def test_state_equals_state_rebuilt() -> None:
    drafter, texts = BestFirstDrafter(SMALL, frontier=3), prompts((9, 4), seed=2)
    drafter.begin(tuple(map(tuple, texts)), setup_of())
    for round_ in range(5):
        asked = round_ % 3 != 2
        paths = [_paths(drafter.propose(budget_of((0, 1), nodes=12)).tree, b) for b in range(2)] if asked else [[()], [()]]
        commit(drafter, texts, (0, 1), [[*own[-1][:round_], 3 + round_] for own in paths])
        fresh = BestFirstDrafter(SMALL, frontier=3)
        fresh.begin(tuple(map(tuple, texts)), setup_of())
        assert_same_draft(drafter.propose(budget_of((0, 1), nodes=12)), fresh.propose(budget_of((0, 1), nodes=12)))


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [60, 200, 1024])
def test_large_trees_are_lossless(nodes: int) -> None:
    inputs, new = left_padded(prompts((9, 3))), 12 if nodes == 1024 else 40
    planner = RecordingPlanner(FixedPlanner(nodes=nodes, depth=12, width=8))
    drafter = BestFirstDrafter(noised(MODEL, 0.15))
    generator = SpeculativeGenerator(MODEL, drafter, planner=planner)
    greedy = MODEL.generate(**inputs, max_new_tokens=new, do_sample=False)
    assert_same_greedy(MODEL, inputs, generator.generate(**inputs, max_new_tokens=new, do_sample=False), greedy)
    assert max(n for round_ in planner.rounds for n in round_.drafted) == nodes
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": True, "temperature": 0.9, "top_k": 20, "seed": 11}
    coupled = SpeculativeGenerator(MODEL, verifier="coupled").generate(**inputs, **options)
    assert torch.equal(generator.generate(**inputs, **options), coupled)


def test_ancestors_of_large_trees_are_those_that_products_find(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    columns = [torch.full((3,), -1)] + [torch.randint(n, (3,), generator=generator) for n in range(1, 150)]
    parents = torch.stack(columns, 1)
    by_rows = layout.ancestors(parents)
    monkeypatch.setattr(layout, "_BY_ROWS_FROM", 1000)
    assert torch.equal(layout.ancestors(parents), by_rows)


@pytest.mark.slow
def test_a_larger_tree_keeps_no_less() -> None:
    inputs, rounds = left_padded(prompts((9,))), []
    for nodes in (4, 64):
        planner = RecordingPlanner(FixedPlanner(nodes=nodes, depth=8, width=6))
        generator = SpeculativeGenerator(MODEL, BestFirstDrafter(noised(MODEL, 0.15)), planner=planner)
        generator.generate(**inputs, max_new_tokens=24, do_sample=False)
        rounds.append(len(planner.rounds))
    assert rounds[1] < rounds[0]


def test_numbers_that_cannot_be_are_refused() -> None:
    with pytest.raises(SpecDecError, match="frontier=0"):
        BestFirstDrafter(SMALL, frontier=0)
    with pytest.raises(SpecDecError, match="forwards=0"):
        BestFirstDrafter(SMALL, forwards=0)
