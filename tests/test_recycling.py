"""Token recycling learns from every node that was scored, drafts from what it learned, and never changes the text."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.drafters.base import Drafter, DraftSetup
from specdec.drafters.recycling import RecyclingDrafter, default_choices
from specdec.errors import SpecDecError, VocabularyMismatchError
from specdec.generator import SpeculativeGenerator
from specdec.planner import FixedPlanner
from specdec.types import Budget, Committed, Law, Scores, TokenTree
from tests.support_compare import RecordingPlanner, assert_same_greedy
from tests.support_models import VOCABULARY, left_padded, prompts, tiny_model

pytestmark = pytest.mark.slow

TAP = "top_k:3"
NEW = 40
PLAN = FixedPlanner(nodes=12, depth=4, width=4)


def _setup(vocabulary: int = VOCABULARY) -> DraftSetup:
    return DraftSetup(torch.device("cpu"), vocabulary, 256, Law.DETERMINISTIC)


def _begun(drafter: RecyclingDrafter, *texts: list[int]) -> RecyclingDrafter:
    drafter.begin(tuple(map(tuple, texts)), _setup())
    return drafter


def _budget(requests: int = 1, nodes: int = 12, depth: int = 4, width: int = 4) -> Budget:
    return Budget(tuple(range(requests)), (nodes,) * requests, (depth,) * requests, (width,) * requests)


def _top(tree: TokenTree, k: int = 3) -> Tensor:
    """A target's runners-up that depend on the token alone: 2t, 2t + 1, 2t + 2, ... of the vocabulary; padding has the root's."""
    live = torch.arange(tree.tokens.shape[1]) < torch.tensor(tree.num_nodes)[:, None]
    tokens = torch.where(live, tree.tokens, tree.tokens[:, :1])
    return (2 * tokens[:, :, None] + torch.arange(k)) % VOCABULARY


def _round(drafter: RecyclingDrafter, budget: Budget, *tokens: list[int], paths: Any = None) -> TokenTree:
    """A round in which the target scores what was proposed and says these tokens."""
    tree = drafter.propose(budget).tree
    paths = paths or [()] * len(tokens)
    counts = tuple(map(len, paths))
    drafter.commit(Committed(budget.requests, tuple(map(tuple, tokens)), counts, tuple(map(tuple, paths)), {TAP: _top(tree)}))
    return tree


def _children(drafter: RecyclingDrafter, token: int) -> list[int]:
    """What the drafter expects behind a token; nothing when it has not learned it."""
    drafter.begin(((token,),), _setup())
    tokens: list[int] = drafter.propose(_budget(depth=1)).tree.tokens[0, 1:].tolist()
    return tokens


def test_the_first_rounds_draft_nothing_and_what_was_scored_is_learned() -> None:
    drafter = _begun(RecyclingDrafter(top_k=3), [30, 5])
    assert _round(drafter, _budget(), [10]).num_nodes == (1,)
    assert _round(drafter, _budget(), [5]).num_nodes == (1,), "10 has not been scored"
    assert _round(drafter, _budget(), [7]).tokens[0, 1:4].tolist()
    assert _children(drafter, 5) == [10, 11, 12]
    assert _children(drafter, 10) == [20, 21, 22]
    assert _children(drafter, 7) == []


def test_every_node_is_learned_from_the_rejected_ones_too() -> None:
    drafter = _begun(RecyclingDrafter(top_k=3), [5])
    _round(drafter, _budget(), [5])
    tree = _round(drafter, _budget(), [50])
    tokens = tree.tokens[0].tolist()
    assert tree.num_nodes[0] > 6
    assert {10, 11, 12} <= set(tokens)
    for token in tokens:
        assert _children(drafter, token) == [(2 * token + i) % VOCABULARY for i in range(3)]


def test_the_tree_is_filled_from_the_matrix_level_by_level() -> None:
    drafter = _begun(RecyclingDrafter(top_k=3, choices=[(0,), (1,), (0, 2), (0, 2, 1), (1, 0)]), [5])
    for _ in range(4):
        _round(drafter, _budget(), [5])
    tree = drafter.propose(_budget()).tree
    assert tree.parents[0].tolist() == [-1, 0, 0, 1, 3, 2]
    first, second = 10, 11
    third = 2 * first + 2
    assert tree.tokens[0].tolist() == [5, first, second, third, 2 * third + 1, 2 * second]
    assert not tree.is_chain


def test_the_newest_of_equal_tokens_counts() -> None:
    drafter = _begun(RecyclingDrafter(top_k=3), [5], [5])
    tree = drafter.propose(_budget(2)).tree
    top = torch.tensor([[[1, 2, 3]], [[4, 5, 6]]])
    drafter.commit(Committed((0, 1), ((5,), (5,)), (0, 0), ((), ()), {TAP: top}))
    assert tree.tokens.shape == (2, 1)
    assert _children(drafter, 5) == [4, 5, 6]


def test_padding_teaches_nothing() -> None:
    drafter = _begun(RecyclingDrafter(top_k=3), [5], [0])
    _round(drafter, _budget(2), [5], [8])
    assert _children(drafter, 0) == [0, 1, 2]
    drafter.begin(((5,), (8,)), _setup())
    tree = _round(drafter, _budget(2), [1], [2])
    assert tree.num_nodes[0] > tree.num_nodes[1] == 1
    assert tree.tokens[1, 1:].tolist() == [0] * (tree.tokens.shape[1] - 1)
    assert _children(drafter, 8) == [16, 17, 18]
    assert _children(drafter, 0) == [0, 1, 2]


def test_a_wider_tap_is_read_as_far_as_the_tree_goes() -> None:
    drafter = _begun(RecyclingDrafter(top_k=3), [5])
    tree = drafter.propose(_budget()).tree
    wide = torch.cat((_top(tree), torch.full((1, 7, 3), 60)), 1)
    drafter.commit(Committed((0,), ((9,),), (0,), ((),), {TAP: wide}))
    assert _children(drafter, 5) == [10, 11, 12]


@pytest.mark.parametrize("foreign", ["requests", "width", "path", "token", "no tap", "not proposed"])
def test_a_round_that_scored_another_tree_teaches_nothing(foreign: str) -> None:
    drafter = _begun(RecyclingDrafter(top_k=3, choices=[(0,), (1,), (0, 0)]), [5], [5])
    _round(drafter, _budget(2), [5], [5])
    tree = drafter.propose(_budget(2)).tree
    assert tree.tokens[0].tolist() == [5, 10, 11, tree.tokens[0, 3].item()]
    unlike = torch.full((2, 4, 3), 44) + torch.arange(3)
    requests, tokens, paths, taps = (0, 1), ((10, 3), (3,)), ((1,), ()), {TAP: unlike}
    if foreign == "requests":
        requests = (1, 0)
    elif foreign == "width":
        taps = {TAP: unlike[:, :3]}
    elif foreign == "path":
        paths = ((3,), ())
    elif foreign == "token":
        tokens = ((12, 3), (3,))
    elif foreign == "no tap":
        taps = {}
    else:
        drafter.begin(((5,), (5,)), _setup())
    drafter.commit(Committed(requests, tokens, tuple(map(len, paths)), paths, taps))
    assert drafter.propose(_budget(2)).tree.tokens[:, 0].tolist() == [3, 3]
    assert _children(drafter, 5) == [10, 11]


def test_a_round_without_a_draft_teaches_the_last_tokens() -> None:
    drafter = _begun(RecyclingDrafter(top_k=3), [5], [30])
    drafter.commit(Committed((1, 0), ((7,), (6,)), (0, 0), ((), ()), {TAP: torch.tensor([[[1, 2, 3]], [[4, 5, 6]]])}))
    assert _children(drafter, 30) == [1, 2, 3]
    assert _children(drafter, 5) == [4, 5, 6]
    assert _children(drafter, 7) == []


def test_rounds_that_the_planner_keeps_plain_teach() -> None:
    target = tiny_model()
    drafter = RecyclingDrafter(top_k=3)
    inputs = left_padded(prompts((5, 9)))
    generator = SpeculativeGenerator(target, drafter, planner=FixedPlanner(nodes=0))
    out = generator.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    target_top = target(out[1:, :-1]).logits[0, -1].topk(3).indices.tolist()
    assert _children(drafter, int(out[1, -2])) == target_top


def test_the_same_round_teaches_when_it_scored_the_proposal() -> None:
    drafter = _begun(RecyclingDrafter(top_k=3, choices=[(0,), (1,), (0, 0)]), [5])
    _round(drafter, _budget(), [5])
    drafter.propose(_budget())
    unlike = torch.full((1, 4, 3), 44) + torch.arange(3)
    drafter.commit(Committed((0,), ((10, 3),), (1,), ((1,),), {TAP: unlike}))
    assert _children(drafter, 5) == [44, 45]


def test_the_matrix_lasts_across_calls_and_the_draft_depends_on_it_and_the_last_token_only() -> None:
    drafter = RecyclingDrafter(top_k=3)
    for text in ([9, 5], [7, 8, 5]):
        _begun(drafter, text)
        for _ in range(6):
            _round(drafter, _budget(), [5])
    trees = [_begun(drafter, text).propose(_budget()).tree for text in ([5], [3, 4, 5], [5, 5])]
    assert trees[0].num_nodes[0] > 5
    assert all(torch.equal(tree.tokens, trees[0].tokens) for tree in trees)
    _begun(drafter, [3])
    drafter.commit(Committed((0,), ((4, 5),), (1,)))
    assert torch.equal(drafter.propose(_budget()).tree.tokens, trees[0].tokens)


@pytest.mark.parametrize(("nodes", "depth", "width"), [(0, 4, 4), (1, 1, 1), (5, 2, 2), (9, 6, 1), (32, 6, 3), (99, 99, 8)])
def test_trees_keep_to_their_budget(nodes: int, depth: int, width: int) -> None:
    drafter = _begun(RecyclingDrafter(top_k=3), [5], [9], [5])
    for _ in range(3):
        _round(drafter, _budget(3), [5], [9], [5])
    budget = Budget((0, 1, 2), (nodes, 0, nodes), (depth, depth, 1), (width, width, width))
    tree = drafter.propose(budget).tree
    assert tree.num_nodes[1] == 1
    for b, deepest in ((0, depth), (2, 1)):
        size = tree.num_nodes[b]
        parents, level = tree.parents[b, :size].tolist(), [0]
        for n, parent in enumerate(parents[1:], 1):
            assert parent < n
            level.append(level[parent] + 1)
        assert size - 1 <= nodes
        assert max(level) <= deepest
        assert all(parents.count(n) <= width for n in range(size))
        for at in range(max(level)):
            assert len({n for n in parents[1:] if level[n] == at}) <= width
        pairs = [(p, t) for p, t in zip(parents[1:], tree.tokens[b, 1:size].tolist(), strict=True)]
        assert len(set(pairs)) == len(pairs), "siblings repeat a token"
    assert width > 1 or max(tree.num_nodes) == min(nodes, depth) + 1
    assert tree.is_chain == all(tree.parents[b, n] == n - 1 for b, size in enumerate(tree.num_nodes) for n in range(size)), (
        "the promise of the fast path"
    )


def test_the_default_tree_is_closed_and_best_first() -> None:
    for top_k in (1, 2, 8, 12):
        choices = default_choices(top_k)
        assert len(choices) == len(set(choices)) == (6 if top_k == 1 else 32)
        assert max(map(len, choices)) <= 6
        assert all(path[:-1] in ((), *choices[:i]) for i, path in enumerate(choices))
        assert choices[0] == (0,)


def _feed_taps(generator: SpeculativeGenerator, name: str, k: int) -> None:
    """Give the runner the tap by hand: the first k tokens of every node's logits."""
    runner: Any = generator.engine.runner
    score = runner.score

    def with_tap(tree: TokenTree) -> Scores:
        scores: Scores = score(tree)
        return dataclasses.replace(scores, taps={name: scores.logits.topk(k).indices})

    runner.score = with_tap


@pytest.mark.parametrize("lengths", [(9,), (9, 3, 14)], ids=["one", "ragged"])
def test_greedy_equals_generate_with_taps_fed_by_hand(lengths: tuple[int, ...]) -> None:
    model: Any = tiny_model()
    inputs = left_padded(prompts(lengths))
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    drafter, planner = RecyclingDrafter(top_k=4), RecordingPlanner(PLAN)
    drafter.taps = ()
    generator = SpeculativeGenerator(model, drafter, planner=planner)
    drafter.taps = ("top_k:4",)
    _feed_taps(generator, "top_k:4", 4)
    accepted = []
    for _ in range(2):
        planner.rounds.clear()
        tokens = generator.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        assert_same_greedy(model, inputs, tokens, expected)
        accepted.append(sum(sum(r.accepted) for r in planner.rounds))
    assert accepted[0] > 0
    assert accepted[1] >= accepted[0], "the matrix of the first call is there in the second"


def test_greedy_equals_generate() -> None:
    model: Any = tiny_model()
    inputs = left_padded(prompts((9, 3)))
    planner = RecordingPlanner(PLAN)
    generator = SpeculativeGenerator(model, RecyclingDrafter(), planner=planner)
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert_same_greedy(model, inputs, generator.generate(**inputs, max_new_tokens=NEW, do_sample=False), expected)
    assert max(planner.accepted_lengths()) > 0


def test_wrong_options_and_another_target_are_told() -> None:
    assert isinstance(RecyclingDrafter(), Drafter)
    assert RecyclingDrafter(top_k=5).taps == ("top_k:5",)
    with pytest.raises(SpecDecError, match="top_k=0"):
        RecyclingDrafter(top_k=0)
    with pytest.raises(SpecDecError, match="vocabulary=8"):
        RecyclingDrafter(vocabulary=8)
    for choices in ([(0, 0)], [(0,), (0,)], [(3,)], [()]):
        with pytest.raises(SpecDecError, match="choices"):
            RecyclingDrafter(top_k=3, choices=choices)
    with pytest.raises(VocabularyMismatchError, match="50"):
        RecyclingDrafter(vocabulary=50).begin(((1,),), _setup())
    drafter = _begun(RecyclingDrafter(), [1])
    with pytest.raises(VocabularyMismatchError, match=str(VOCABULARY)):
        drafter.begin(((1,),), _setup(70))
    with pytest.raises(SpecDecError, match="larger vocabulary"):
        RecyclingDrafter(top_k=8).begin(((1,),), _setup(8))
