"""Ensemble: trees merged without duplicates, members that see their own nodes, and losslessness end to end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from specdec.drafters.base import Drafter, DraftSampling, DraftSetup
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.ensemble import Ensemble
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.medusa_heads import MedusaHeads
from specdec.drafters.pard import PardDrafter
from specdec.drafters.recycling import RecyclingDrafter
from specdec.drafters.several import SeveralDrafters
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import IncompatibleRuleError, SpecDecError
from specdec.generator import SpeculativeGenerator
from specdec.noise import Noise
from specdec.planner import FixedPlanner
from specdec.trees.host import tree_from_lists
from specdec.types import Budget, Committed, Draft, Law
from specdec.verify.sample_and_match import SampleAndMatch
from tests import support_enumeration as tables
from tests.support_compare import RecordingPlanner, assert_same_greedy
from tests.support_drafters import assert_same_draft, budget_of, commit, flattened, setup_of
from tests.support_models import VOCABULARY, left_padded, noised, prompts, tiny_model

K, MASK, WIDTH, NEW = 3, 60, 32, 25
MODEL: Any = tiny_model()
DISTURBED, OTHER = noised(MODEL, 0.1), noised(MODEL, 0.1, seed=2)
LENGTHS = {"one": (9,), "ragged": (9, 3, 14)}


class _Said:
    """Proposes given trees, cut to the budget's nodes, and remembers what it was told."""

    laws = frozenset({Law.DETERMINISTIC, Law.INDEPENDENT})

    def __init__(self, name: str, *trees: tuple[list[int], list[int]], taps: tuple[str, ...] = ()) -> None:
        self.name, self._trees, self.taps = name, trees, taps
        self.shape: Literal["chain", "tree"] = "tree"
        self.asked: list[Budget] = []
        self.told: list[Committed] = []

    def begin(self, prompts: tuple[tuple[int, ...], ...], setup: DraftSetup) -> None:
        self.setup = setup

    def propose(self, budget: Budget) -> Draft:
        self.asked.append(budget)
        own = [self._trees[request] for request in budget.requests]
        tokens = [[50 + r, *t[:n]] for (t, _), r, n in zip(own, budget.requests, budget.nodes, strict=True)]
        parents = [[-1, *p[:n]] for (_, p), n in zip(own, budget.nodes, strict=True)]
        return Draft(tree_from_lists(tokens, parents, torch.device("cpu")), Law.DETERMINISTIC)

    def commit(self, committed: Committed) -> None:
        self.told.append(committed)


def _budget(nodes: tuple[int, ...]) -> Budget:
    return Budget(tuple(range(len(nodes))), nodes, (9,) * len(nodes), (9,) * len(nodes), drafter="ensemble")


def _paths(draft: Draft, b: int) -> set[tuple[int, ...]]:
    """The tokens from the root to each drafted node; as many as nodes, or siblings repeat a token."""
    paths: list[tuple[int, ...]] = [()]
    for n in range(1, draft.tree.num_nodes[b]):
        paths.append((*paths[int(draft.tree.parents[b, n])], int(draft.tree.tokens[b, n])))
    assert len(set(paths)) == len(paths)
    return set(paths[1:])


def test_shared_prefixes_are_one_and_every_node_is_there() -> None:
    a = _Said("a", ([1, 2, 3], [0, 1, 2]), ([4], [0]))
    b = _Said("b", ([1, 7, 2, 9], [0, 0, 1, 2]), ([5, 4, 6], [0, 0, 2]))
    ensemble = Ensemble([a, b])
    ensemble.begin(((50,), (51,)), setup_of())
    draft = ensemble.propose(_budget((8, 8)))
    assert draft.law is Law.DETERMINISTIC
    assert draft.tree.tokens[:, 0].tolist() == [50, 51]
    assert _paths(draft, 0) == {(1,), (1, 2), (1, 2, 3), (7,), (7, 9)}
    assert _paths(draft, 1) == {(4,), (4, 6), (5,)}
    assert draft.tree.num_nodes == (6, 4)


def test_nodes_are_shared_out_and_what_is_left_goes_on() -> None:
    def asked(nodes: tuple[int, ...], shares: list[float] | None) -> list[tuple[int, ...]]:
        members = [_Said(n, ([1, 2], [0, 1]), ([], [])) for n in "ab"] + [_Said("c", *[(list(range(30)), [0] * 30)] * 2)]
        ensemble = Ensemble(members, shares)
        ensemble.begin(((50,), (51,)), setup_of())
        assert all(size - 1 <= n for size, n in zip(ensemble.propose(_budget(nodes)).tree.num_nodes, nodes, strict=True))
        assert all(m.asked[0].drafter is None for m in members)
        return [m.asked[0].nodes for m in members]

    assert asked((9, 9), None) == [(3, 3), (4, 6), (5, 9)]
    assert asked((1, 0), None) == [(1, 0), (0, 0), (0, 0)]
    assert asked((8, 4), [1, 1, 2]) == [(2, 1), (2, 2), (4, 4)]


def test_members_are_not_asked_for_values_that_a_merged_tree_has_not() -> None:
    member = _Said("a", ([1], [0]))
    ensemble = Ensemble([member])
    ensemble.begin(((50,),), setup_of())
    assert ensemble.propose(replace(_budget((4,)), slots=True)).slots is None
    assert not member.asked[0].slots


def test_members_draw_nothing() -> None:
    member = _Said("a", ([1], [0]))
    Ensemble([member]).begin(((50,),), setup_of(Law.COUPLED, DraftSampling(flattened, Noise(1))))
    assert member.setup.law is Law.DETERMINISTIC
    assert member.setup.sampling is None


def test_each_member_is_told_of_its_own_nodes() -> None:
    a = _Said("a", ([1, 2], [0, 1]), ([4], [0]))
    b = _Said("b", ([7, 1, 2, 9], [0, 0, 2, 3]), ([5, 4], [0, 0]), taps=("h",))
    ensemble = Ensemble([a, b])
    ensemble.begin(((50,), (51,)), setup_of())
    tree = ensemble.propose(_budget((8, 8))).tree
    # The state behind a node is its token, and the target's forward was padded to more nodes.
    state = torch.nn.functional.pad(tree.tokens, (0, 3), value=-1)[..., None].float().expand(-1, -1, 2)
    assert _nodes(tree.tokens[0].tolist(), (1, 2, 9)) == (1, 2, 4)
    round_ = Committed((0, 1), ((1, 2, 9, 3), (8,)), (3, 0), ((1, 2, 4), ()), {"h": state, "other": state})
    ensemble.commit(round_)
    assert a.told == [round_]
    (told,) = b.told
    assert told.paths == ((2, 3, 4), ())
    assert set(told.taps) == {"h"}
    assert told.taps["h"][0, :5, 0].tolist() == [50, 7, 1, 2, 9]
    assert told.taps["h"][1, :3, 0].tolist() == [51, 5, 4]
    # A path through another's nodes keeps its taps.
    ensemble.propose(_budget((8, 8)))
    ensemble.commit(Committed((0, 1), ((7, 3), (4, 8)), (1, 1), ((3,), (1,)), {"h": state}))
    assert [float(b.told[-1].taps["h"][row, path[-1], 0]) for row, path in enumerate(b.told[-1].paths)] == [7.0, 4.0]
    # Without a proposal, or with a tree that was cut, there are no numbers to change.
    plain = Committed((0, 1), ((1,), (8,)), (0, 0), ((), ()), {"h": state})
    ensemble.commit(plain)
    ensemble.propose(_budget((8, 8)))
    cut = Committed((0, 1), ((1,), (8,)), (0, 0), ((), ()), {"h": state[:, :2]})
    ensemble.commit(cut)
    assert b.told[-2:] == [plain, cut]


def _nodes(tokens: list[int], path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(tokens.index(token) for token in path)


def test_recycling_learns_the_right_rows_behind_others() -> None:
    recycling = RecyclingDrafter(VOCABULARY, top_k=4)
    ensemble = Ensemble([_Said("a", ([40, 41, 42], [0, 1, 1])), recycling])
    ensemble.begin(((50,),), setup_of())
    for last in (50, 50, 50):
        draft = ensemble.propose(_budget((12,)))
        assert int(draft.tree.tokens[0, 0]) == 50
        behind = (draft.tree.tokens[..., None] * 7 + torch.arange(4)) % VOCABULARY
        ensemble.commit(Committed((0,), ((last,),), (0,), ((),), {"top_k:4": behind}))
    assert len(recycling._learned) > 4
    for token in recycling._learned:
        assert recycling._matrix[token].tolist() == [(token * 7 + rank) % VOCABULARY for rank in range(4)]


def _members() -> dict[str, Drafter]:
    heads = MedusaHeads(WIDTH, VOCABULARY, K, shared_head=False)
    heads.init_from(MODEL.get_output_embeddings().weight.detach())
    return {
        "suffix": SuffixDrafter(min_match=1),
        "medusa": MedusaDrafter(heads),
        "pard": PardDrafter(OTHER, MASK),
        "chain": DraftModelDrafter(DISTURBED),
        "tree": DraftModelDrafter(OTHER, shape="tree"),
    }


@torch.no_grad()
def _behind(texts: list[list[int]]) -> torch.Tensor:
    """[B, H]: the hidden states that chose the last tokens."""
    return torch.stack([MODEL.model(torch.tensor([text])).last_hidden_state[0, -2] for text in texts])


def _rebuilt(texts: list[list[int]]) -> Ensemble:
    """An ensemble that has seen all but the last tokens as prompts, and those as a round without a draft."""
    ensemble, requests = Ensemble(_members()), tuple(range(len(texts)))
    ensemble.begin(tuple(tuple(text[:-1]) for text in texts), setup_of())
    last, none = tuple((text[-1],) for text in texts), ((),) * len(texts)
    ensemble.commit(Committed(requests, last, (0,) * len(texts), none, {"last_hidden": _behind(texts)[:, None]}))
    return ensemble


def test_state_equals_state_rebuilt() -> None:
    texts = prompts((9, 4), seed=2)
    ensemble = _rebuilt(texts)
    for round_ in range(K + 1):
        tree = ensemble.propose(budget_of((0, 1), nodes=12)).tree
        paths, new = [], []
        for b, text in enumerate(texts):
            # A path of 0 to K nodes that begins at one child of the root or another.
            path, node = [], 0
            for _ in range((round_ + b) % (K + 1)):
                below = [n for n in range(1, tree.num_nodes[b]) if int(tree.parents[b, n]) == node]
                if below:
                    node = below[round_ % len(below)]
                    path.append(node)
            paths.append(tuple(path))
            new.append((*tree.tokens[b, path].tolist(), 3 + round_))
            text.extend(new[-1])
        taps = torch.zeros(2, tree.tokens.shape[1], WIDTH)
        for b, (path, state) in enumerate(zip(paths, _behind(texts), strict=True)):
            taps[b, path[-1] if path else 0] = state
        ensemble.commit(Committed((0, 1), tuple(new), tuple(map(len, paths)), tuple(paths), {"last_hidden": taps}))
        fresh = _rebuilt(texts)
        budget = budget_of((0, 1), nodes=12)
        assert_same_draft(ensemble.propose(budget), fresh.propose(budget))


def test_requests_may_leave() -> None:
    members = [SuffixDrafter(min_match=1), DraftModelDrafter(DISTURBED)]
    ensemble, texts = Ensemble(members), prompts((9, 4, 6), seed=2)
    ensemble.begin(tuple(map(tuple, texts)), setup_of())
    ensemble.propose(budget_of((0, 1, 2)))
    commit(ensemble, texts, (0, 1, 2), [[5], [6, 7], [8]])
    commit(ensemble, texts, (2,), [[4, 5]])
    draft = ensemble.propose(Budget((2, 0), (4, 0), (K, K), (2, 2)))
    assert draft.tree.num_nodes[1] == 1
    fresh = Ensemble([SuffixDrafter(min_match=1), DraftModelDrafter(DISTURBED)])
    fresh.begin((tuple(texts[2]),), setup_of())
    assert _paths(fresh.propose(Budget((0,), (4,), (K,), (2,))), 0) == _paths(draft, 0) != set()


@pytest.mark.slow
@pytest.mark.parametrize("batch", LENGTHS)
def test_greedy_equals_generate_and_no_member_alone_keeps_more(batch: str) -> None:
    inputs = left_padded([text * 2 for text in prompts(LENGTHS[batch])])
    expected = MODEL.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    rounds: dict[str, int] = {}
    drafters: dict[str, Drafter] = {"both": Ensemble([DraftModelDrafter(DISTURBED), DraftModelDrafter(OTHER)])}
    drafters |= {"first": DraftModelDrafter(DISTURBED), "second": DraftModelDrafter(OTHER)}
    drafters["all"] = Ensemble({**_members(), "recycling": RecyclingDrafter()})
    for name, drafter in drafters.items():
        planner = RecordingPlanner(FixedPlanner(nodes={"both": 2 * K, "all": 18}.get(name, K), depth=K, width=2))
        tokens = SpeculativeGenerator(MODEL, drafter, planner=planner).generate(**inputs, max_new_tokens=NEW, do_sample=False)
        assert_same_greedy(MODEL, inputs, tokens, expected)
        rounds[name] = sum(len(r.requests) for r in planner.rounds)
    # Each had K nodes of its own in the ensemble, so that no round kept less than one of them alone would have.
    assert rounds["both"] < min(rounds["first"], rounds["second"])


def test_sample_and_match_is_exact_on_merged_trees() -> None:
    p, depth = tables.Table(2, 8), 3

    def run(replay: tables.Replay) -> tables.Law1:
        ensemble, texts = Ensemble([_Said("a", ([0, 1], [0, 1])), _Said("b", ([1, 0], [0, 0]))]), [(50,)]
        ensemble.begin(tuple(texts), setup_of())
        for _ in range(2):
            tree = ensemble.propose(_budget((9,))).tree
            draft = Draft(tree, Law.DETERMINISTIC)
            texts = tables.extend(texts, tree, SampleAndMatch().verify(draft, tables.scores_of(p, texts, tree), replay))
        return tables.continue_law(p, texts[0], 1 + 2 * depth)

    assert tables.total_variation(tables.enumerate_all(run), tables.continue_law(p, (50,), 1 + 2 * depth)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["coupled", "sample-and-match"])
def test_sampling_is_what_it_is_without_a_draft(rule: str) -> None:
    inputs = left_padded([text * 2 for text in prompts(LENGTHS["ragged"])])
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.9, "top_k": 20, "seed": 11}
    planner = RecordingPlanner(FixedPlanner(nodes=10, depth=K, width=2))
    generator = SpeculativeGenerator(MODEL, Ensemble(_members()), verifier=rule, planner=planner)
    ours = generator.generate(**inputs, **options)
    assert max(planner.accepted_lengths()) > 0
    if rule == "coupled":
        assert torch.equal(ours, SpeculativeGenerator(MODEL, verifier=rule).generate(**inputs, **options))
    else:
        # At so low a temperature sampling is greedy decoding; the law itself is enumerated above.
        cold = generator.generate(**inputs, **{**options, "temperature": 1e-4})
        expected = MODEL.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        assert_same_greedy(MODEL, inputs, cold, expected)


def test_an_ensemble_may_be_one_of_several() -> None:
    several = SeveralDrafters({"model": DraftModelDrafter(DISTURBED), "all": Ensemble([SuffixDrafter(), RecyclingDrafter()])})
    assert several.shape == "tree"
    assert several.taps == ("top_k:8",)
    text = prompts((6,))[0] * 2
    several.begin((tuple(text),), setup_of())
    assert several.propose(Budget((0,), (6,), (K,), (2,), drafter="all")).tree.num_nodes[0] > 1


def test_what_does_not_fit_is_told_with_names() -> None:
    suffix: Any = SuffixDrafter()
    with pytest.raises(SpecDecError, match=r"shares=\[1\].*suffix, draft-model"):
        Ensemble([suffix, DraftModelDrafter(DISTURBED)], [1])
    with pytest.raises(SpecDecError, match="positive"):
        Ensemble([suffix], [0.0])
    with pytest.raises(SpecDecError, match="no drafter"):
        Ensemble([])
    drawn = _Said("drawn", ([1], [0]))
    drawn.laws = frozenset({Law.INDEPENDENT})
    with pytest.raises(IncompatibleRuleError, match=r"'drawn'.*independent"):
        Ensemble([suffix, drawn])
    with pytest.raises(IncompatibleRuleError, match="rejection"):
        SpeculativeGenerator(MODEL, Ensemble([suffix]), verifier="rejection")
