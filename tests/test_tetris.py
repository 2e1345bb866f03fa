"""TETRIS: the best nodes of all requests under one budget, as brute force finds them, and only for rules that ignore q."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.slots import tree_slots
from specdec.errors import IncompatibleRuleError, SpecDecError
from specdec.generator import SpeculativeGenerator
from specdec.tetris import TetrisPlanner, best_nodes
from specdec.trees.host import tree_from_lists
from specdec.types import Draft, Law, Load, RoundStats, SlotStats, TokenTree
from specdec.verify.compatibility import Rule, rule_for
from specdec.verify.coupled import Coupled
from specdec.verify.rejection import TokenRejection
from specdec.verify.sample_and_match import SampleAndMatch
from tests.support_compare import assert_same_greedy
from tests.support_enumeration import (
    Law1,
    Replay,
    Table,
    continue_law,
    draw_chain,
    enumerate_all,
    extend,
    joint,
    scores_of,
    total_variation,
)
from tests.support_models import left_padded, noised, prompts, tiny_model

EXACT = 1e-12
Kept = Sequence[Sequence[int]]


def _forest(rng: random.Random, chains: bool) -> tuple[list[list[float]], list[list[int]]]:
    """Up to four requests of up to four nodes; equal probabilities are common."""
    sizes = [rng.randint(0, 4) for _ in range(rng.randint(1, 4))]
    drawn = [[rng.choice([0.0, 0.5, 0.5, 1.0, rng.random()]) for _ in range(n)] for n in sizes]
    return drawn, [[node if chains else rng.randint(0, node) for node in range(n)] for n in sizes]


def _products(drawn: Sequence[float], parents: Sequence[int]) -> list[float]:
    found = [1.0]
    for own, parent in zip(drawn, parents, strict=True):
        found.append(own * found[parent])
    return found[1:]


def _total(drawn: Sequence[Sequence[float]], parents: Sequence[Sequence[int]], kept: Kept) -> float:
    return sum(_products(drawn[r], parents[r])[node - 1] for r, nodes in enumerate(kept) for node in nodes)


def _closed(parents: Sequence[Sequence[int]], kept: Kept) -> bool:
    return all(parents[r][node - 1] in (0, *nodes) for r, nodes in enumerate(kept) for node in nodes)


def _brute_force(drawn: Sequence[Sequence[float]], parents: Sequence[Sequence[int]], capacity: int) -> float:
    """The largest sum of products over all sets that hold every node's parent."""
    places = [(r, node) for r, row in enumerate(parents) for node in range(1, len(row) + 1)]
    best = 0.0
    for chosen in combinations(places, min(capacity, len(places))):
        kept = [[node for request, node in chosen if request == r] for r in range(len(parents))]
        if _closed(parents, kept):
            best = max(best, _total(drawn, parents, kept))
    return best


@pytest.mark.parametrize("chains", [True, False], ids=["chains", "trees"])
def test_the_kept_nodes_are_the_best_closed_set_there_is(chains: bool) -> None:
    rng = random.Random(int(chains))
    for _ in range(40):
        drawn, parents = _forest(rng, chains)
        capacity, size = rng.randint(1, 9), sum(map(len, parents))
        kept = best_nodes(drawn, parents, capacity)
        assert sum(map(len, kept)) == min(capacity, size)
        assert _closed(parents, kept)
        assert _total(drawn, parents, kept) == pytest.approx(_brute_force(drawn, parents, capacity))


def test_equal_scores_go_by_depth_then_by_request() -> None:
    chain = [0, 1, 2]
    assert best_nodes([[0.5] * 3] * 2, [chain] * 2, 3) == ((1, 2), (1,))
    assert best_nodes([[1.0] * 3] * 3, [chain] * 3, 7) == ((1, 2, 3), (1, 2), (1, 2))
    assert best_nodes([[0.0] * 3, [float("nan")] * 3], [chain] * 2, 2) == ((1,), (1,))


def _load(batch: int, room: int = 100) -> Load:
    return Load(tuple(range(batch)), (10,) * batch, (room,) * batch)


@pytest.mark.parametrize(
    ("capacity", "batch", "extra", "share"), [(8, 4, 1, 3), (8, 1, 1, 8), (3, 8, 1, 1), (3, 8, 0, 1), (9, 2, 3, 7)]
)
def test_each_request_proposes_its_share_and_some_more(capacity: int, batch: int, extra: int, share: int) -> None:
    budget = TetrisPlanner(capacity, extra).plan(_load(batch))
    assert budget.nodes == budget.depth == (share,) * batch
    assert budget.slots
    assert TetrisPlanner(capacity, extra).plan(_load(batch, room=2)).nodes == (share,) * batch
    assert TetrisPlanner(capacity, extra).plan(_load(batch, room=2)).depth == (1,) * batch
    assert TetrisPlanner(capacity, extra).plan(_load(batch, room=1)).nodes == (0,) * batch


def _draft(tokens: list[list[int]], parents: list[list[int]], drawn: list[list[float]]) -> Draft:
    tree = tree_from_lists(tokens, parents, torch.device("cpu"))
    widest = max(map(len, drawn))
    values = torch.tensor([[*row, *[0.9] * (widest - len(row))] for row in drawn])
    q = torch.rand(len(tokens), widest + 1, 3)
    return Draft(tree, Law.INDEPENDENT, q, slots=SlotStats(values, values, values))


def test_a_cut_draft_holds_the_kept_nodes_of_chains() -> None:
    draft = _draft([[5, 6, 7, 8], [9, 10, 11]], [[-1, 0, 1, 2], [-1, 0, 1]], [[0.9, 0.9, 0.1], [0.2, 0.9]])
    cut = TetrisPlanner(3).select(draft)
    assert cut.post_draw
    assert cut.tree.is_chain
    assert cut.tree.num_nodes == (3, 2)
    assert cut.tree.tokens.tolist() == [[5, 6, 7], [9, 10, 0]]
    assert cut.tree.parents.tolist() == [[-1, 0, 1], [-1, 0, 0]]
    assert draft.q is not None
    assert cut.q is not None
    assert torch.equal(cut.q[0], draft.q[0, :3])
    whole = TetrisPlanner(5).select(draft)
    assert whole.post_draw
    assert torch.equal(whole.tree.tokens, draft.tree.tokens)


def test_a_cut_draft_holds_the_kept_nodes_of_trees() -> None:
    parents = [[-1, 0, 0, 1, 2], [-1, 0, 1, 1, 0]]
    draft = _draft([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]], parents, [[0.1, 0.8, 0.9, 0.9], [0.7, 0.2, 0.9, 0.3]])
    cut = TetrisPlanner(4).select(draft)
    assert cut.tree.num_nodes == (3, 3)
    assert cut.tree.tokens.tolist() == [[1, 3, 5], [6, 7, 9]]
    assert cut.tree.parents.tolist() == [[-1, 0, 1], [-1, 0, 1]]
    assert not cut.tree.is_chain


def test_without_probabilities_requests_share_by_depth() -> None:
    tree = tree_from_lists([[1, 2, 3, 4], [5, 6]], [[-1, 0, 1, 2], [-1, 0]], torch.device("cpu"))
    assert TetrisPlanner(3).select(Draft(tree, Law.DETERMINISTIC)).tree.num_nodes == (3, 2)


@pytest.mark.parametrize("sizes", [{"capacity": 0}, {"capacity": 4, "extra": -1}, {"capacity": 4, "depth": 0}], ids=str)
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(SpecDecError, match=f"TetrisPlanner {list(sizes)[-1]}"):
        TetrisPlanner(**sizes)


def test_rejection_is_refused_by_name() -> None:
    laws = frozenset({Law.DETERMINISTIC, Law.INDEPENDENT, Law.COUPLED})
    post_draw = TetrisPlanner(4).post_draw
    with pytest.raises(IncompatibleRuleError, match="rejection"):
        rule_for("rejection", laws, "chain", True, False, post_draw)
    assert rule_for("auto", laws, "chain", True, False, post_draw)[0].name == "sample-and-match"
    model = tiny_model()
    with pytest.raises(IncompatibleRuleError, match="rejection"):
        SpeculativeGenerator(model, DraftModelDrafter(model), verifier="rejection", planner=TetrisPlanner(4))


P, Q = Table(2, 3), Table(2, 4)


def _chain_slots(draft: Draft) -> SlotStats:
    assert draft.q is not None
    q = draft.q[:, :-1]
    drawn = q.gather(2, draft.tree.tokens[:, 1:, None])[..., 0]
    return SlotStats(q.amax(-1), torch.special.entr(q).sum(-1), drawn)


def _selected_law(rule: Rule) -> tuple[Law1, Law1]:
    """Two rounds of two requests that draft two and one tokens, then one each, and keep the best two, then one, of all."""
    memo: dict[Any, Law1] = {}

    def one_round(contexts: list[tuple[int, ...]], counts: tuple[int, ...], replay: Replay) -> list[tuple[int, ...]]:
        draft = draw_chain(Q, contexts, counts, replay)
        draft = Draft(draft.tree, draft.law, draft.q, slots=_chain_slots(draft))
        draft = TetrisPlanner(sum(counts) - 1).select(draft)
        assert draft.post_draw
        return extend(contexts, draft.tree, rule.verify(draft, scores_of(P, contexts, draft.tree), replay))

    def run(replay: Replay) -> Law1:
        contexts = one_round([(0,), (1,)], (2, 1), replay)
        key = tuple(contexts)
        if key not in memo:
            memo[key] = enumerate_all(lambda later: _flat(one_round(contexts, (1, 1), later)))
        return memo[key]

    ours: Law1 = {}
    for text, weight in enumerate_all(run).items():
        parts = [text[: text.index(-1)], text[text.index(-1) + 1 :]]
        for whole, rest in joint([continue_law(P, part, 6) for part in parts]).items():
            ours[whole] = ours.get(whole, 0.0) + weight * rest
    return ours, joint([continue_law(P, (b,), 6) for b in range(2)])


def _flat(contexts: list[tuple[int, ...]]) -> tuple[int, ...]:
    return (*contexts[0], -1, *contexts[1])


@pytest.mark.slow
def test_two_requests_under_one_budget_keep_the_target_s_law() -> None:
    ours, exact = _selected_law(SampleAndMatch())
    assert total_variation(ours, exact) < EXACT


@pytest.mark.slow
def test_rejection_would_be_biased() -> None:
    ours, exact = _selected_law(TokenRejection())
    assert total_variation(ours, exact) > 1e-3


class _Shared:
    """One uniform for each request and position, which draft and target both turn into a token; every outcome is explored.

    Stands for the coupled noise: what a rule may assume of it is that one position's draws are a function of one variable.
    """

    def __init__(self, replay: Replay) -> None:
        self._replay, self._uniforms = replay, {}  # type: ignore[var-annotated]
        self.contexts: list[tuple[int, ...]] = []

    def token(self, request: int, row: Tensor, position: int) -> int:
        if (request, position) not in self._uniforms:
            self._uniforms[request, position] = self._drawn(request, position)
        return int((row.cumsum(0) <= self._uniforms[request, position]).sum())

    def _drawn(self, request: int, position: int) -> float:
        """The middle of one of the intervals between which no text of this length changes its token."""
        texts = [(request,)]
        for _ in range(position - 1):
            texts = [(*text, token) for text in texts for token in range(P.vocabulary)]
        edges = sorted({0.0, 1.0} | {float(table(text)[0]) for text in texts for table in (P, Q)})
        lengths = [high - low for low, high in pairwise(edges)]
        chosen = self._replay._decide(lengths)
        return (edges[chosen] + edges[chosen + 1]) / 2

    def coupled(self, log_p: Tensor, depth: Tensor) -> Tensor:
        rows = [
            [self.token(b, row.exp(), len(context) + int(d)) for row, d in zip(log_p[b], depth[b], strict=True)]
            for b, context in enumerate(self.contexts)
        ]
        return torch.tensor(rows)


@pytest.mark.slow
def test_the_coupled_rule_keeps_the_target_s_law_under_one_budget() -> None:
    lengths: set[tuple[int, ...]] = set()

    def run(replay: Replay) -> Law1:
        shared = _Shared(replay)
        shared.contexts = contexts = [(0,), (1,)]
        texts = [list(context) for context in contexts]
        for b, count in enumerate((2, 1)):
            for _ in range(count):
                texts[b].append(shared.token(b, Q(tuple(texts[b])), len(texts[b])))
        drawn = [[float(Q(tuple(text[:k]))[text[k]]) for k in range(1, len(text))] for text in texts]
        values = torch.tensor([drawn[0], [*drawn[1], 0.0]])
        tree = tree_from_lists(texts, [[-1, 0, 1], [-1, 0]], torch.device("cpu"))
        draft = TetrisPlanner(2).select(Draft(tree, Law.COUPLED, slots=SlotStats(values, values, values)))
        lengths.add(draft.tree.num_nodes)
        verdict = Coupled().verify(draft, scores_of(P, contexts, draft.tree), shared)  # type: ignore[arg-type]
        return joint([continue_law(P, c, 4) for c in extend(contexts, draft.tree, verdict)])

    law = enumerate_all(run)
    assert len(lengths) >= 2
    assert total_variation(law, joint([continue_law(P, (b,), 4) for b in range(2)])) < EXACT


class _Recording(TetrisPlanner):
    """Keeps the rounds."""

    def __init__(self, capacity: int, **options: int) -> None:
        super().__init__(capacity, **options)
        self.rounds: list[RoundStats] = []

    def observe(self, stats: RoundStats) -> None:
        self.rounds.append(stats)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_text_does_not_depend_on_the_selection_and_capacity_is_kept(shape: Any) -> None:
    model = tiny_model()
    inputs = left_padded(prompts((9, 3, 14)))
    drafter = DraftModelDrafter(noised(model, 0.1), shape=shape)
    planner = _Recording(7, **({"depth": 3, "width": 2} if shape == "tree" else {}))
    ours = SpeculativeGenerator(model, drafter, planner=planner).generate(**inputs, max_new_tokens=30, do_sample=False)
    assert_same_greedy(model, inputs, ours, model.generate(**inputs, max_new_tokens=30, do_sample=False))  # type: ignore[operator]
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": True, "temperature": 0.9, "top_k": 20, "seed": 11}
    expected = SpeculativeGenerator(model, verifier="coupled").generate(**inputs, **options)
    found = SpeculativeGenerator(model, drafter, verifier="coupled", planner=planner).generate(**inputs, **options)
    assert torch.equal(found, expected)
    assert max(sum(stats.drafted) for stats in planner.rounds) == 7
    assert all(stats.slots is None for stats in planner.rounds)
    assert max(max(stats.accepted) for stats in planner.rounds) > 0
    if shape == "chain":
        assert len({stats.drafted for stats in planner.rounds if len(stats.drafted) == 3}) > 2


def test_a_tree_of_places_is_cut_by_its_path_products() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, 2, 5)
    tokens, parents = [[0, 1, 2, 3, 4], [0, 3, 4, 1, 2]], [[-1, 0, 0, 1, 2], [-1, 0, 1, 1, 0]]
    tree: TokenTree = tree_from_lists(tokens, parents, torch.device("cpu"))
    draft = Draft(tree, Law.DETERMINISTIC, slots=tree_slots(logits, tree))
    cut = TetrisPlanner(3).select(draft)
    q, depth = logits.softmax(-1), [[0, 0, 1, 1], [0, 1, 1, 0]]
    drawn = [[float(q[b, depth[b][i], tokens[b][i + 1]]) for i in range(4)] for b in range(2)]
    kept = best_nodes(drawn, [row[1:] for row in parents], 3)
    assert cut.tree.num_nodes == tuple(len(nodes) + 1 for nodes in kept)
    for b, nodes in enumerate(kept):
        assert cut.tree.tokens[b, 1 : len(nodes) + 1].tolist() == [tokens[b][node] for node in nodes]
