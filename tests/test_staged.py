"""Staged: a draft model whose chains another drafter begins has the law, the state and the text of the draft model alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.drafters import chains
from specdec.drafters.base import Drafter, DraftSampling, Paths
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.drafters.recycling import RecyclingDrafter
from specdec.drafters.staged import Staged
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import IncompatibleRuleError, SpecDecError, VocabularyMismatchError
from specdec.generator import SpeculativeGenerator
from specdec.noise import Noise
from specdec.planner import FixedPlanner
from specdec.trees.host import tree_from_lists
from specdec.types import Budget, Draft, Law
from specdec.verify.chooser import Chooser
from specdec.verify.typical import TypicalLossy
from tests.support_compare import RecordingPlanner, assert_same_greedy
from tests.support_drafters import assert_same_draft, budget_of, commit, flattened, setup_of
from tests.support_enumeration import Replay, enumerate_all, total_variation
from tests.support_models import VOCABULARY, left_padded, noised, prompts, tiny_model

K, NEW = 4, 25
MODEL: Any = tiny_model()
SMALL, SMALLER = noised(MODEL, 0.1), noised(MODEL, 0.15, seed=2)
INNER: dict[str, Callable[[], Drafter]] = {
    "chain": lambda: PromptLookupDrafter(min_ngram=1),
    "tree": lambda: SuffixDrafter(min_match=1),
    "model": lambda: DraftModelDrafter(SMALLER),
    "model's tree": lambda: DraftModelDrafter(SMALLER, shape="tree"),
    "staged": lambda: Staged(SMALLER, PromptLookupDrafter(min_ngram=1)),
}
every_inner = pytest.mark.parametrize("inner", INNER)


def _staged(inner: str, model: Any = SMALL) -> Staged:
    return Staged(model, INNER[inner](), nodes=6, width=2)


def _texts(*lengths: int) -> list[list[int]]:
    return [text * 3 for text in prompts(lengths, seed=2)]


@every_inner
def test_a_greedy_chain_is_the_draft_model_s_own(inner: str) -> None:
    texts = _texts(9, 4, 6)
    staged, alone = _staged(inner), DraftModelDrafter(SMALL)
    for drafter in (staged, alone):
        drafter.begin(tuple(map(tuple, texts)), setup_of())
    for round_ in range(4):
        budget = Budget((0, 1, 2), (K, round_, 0), (K, K, K), (2, 2, 2))
        draft = staged.propose(budget)
        assert_same_draft(draft, alone.propose(budget))
        new = [[*draft.tree.tokens[b, 1 : 1 + (b + round_) % draft.tree.num_nodes[b]].tolist(), 5 + round_] for b in range(3)]
        for drafter in (staged, alone):
            commit(drafter, [list(text) for text in texts], (0, 1, 2), new)


@pytest.mark.slow
@every_inner
def test_state_equals_state_rebuilt(inner: str) -> None:
    drafter, texts = _staged(inner), _texts(9, 4)
    drafter.begin(tuple(map(tuple, texts)), setup_of())
    for round_ in range(2 * (K + 1)):
        asked = round_ % 3 != 2
        if asked:
            draft = drafter.propose(budget_of((0, 1), depth=K))
        new = []
        for b in range(2):
            own = draft.tree.tokens[b, 1 : 1 + (round_ + b) % (K + 1)].tolist() if asked else []
            new.append([*own, 3 + round_])
        commit(drafter, texts, (0, 1), new)
        fresh = _staged(inner)
        fresh.begin(tuple(map(tuple, texts)), setup_of())
        assert_same_draft(drafter.propose(budget_of((0, 1), depth=K)), fresh.propose(budget_of((0, 1), depth=K)))


def test_requests_may_leave() -> None:
    drafter, texts = _staged("model"), _texts(9, 4, 6)
    drafter.begin(tuple(map(tuple, texts)), setup_of())
    drafter.propose(budget_of((0, 1, 2)))
    commit(drafter, texts, (0, 1, 2), [[5], [6, 7], [8]])
    commit(drafter, texts, (2,), [[4, 5]])
    draft = drafter.propose(Budget((2, 0), (4, 0), (K, K), (2, 2)))
    fresh = _staged("model")
    fresh.begin((tuple(texts[2]),), setup_of())
    assert draft.tree.num_nodes == (K + 1, 1)
    assert torch.equal(fresh.propose(Budget((0,), (4,), (K,), (2,))).tree.tokens, draft.tree.tokens[:1])


@pytest.mark.parametrize("law", [Law.INDEPENDENT, Law.COUPLED])
def test_what_a_request_draws_does_not_depend_on_its_place_in_the_batch(law: Law) -> None:
    texts, counts, drawn = _texts(9, 4, 6), (K, 0, 2), []
    for order in ((0, 1, 2), (2, 0, 1)):
        drafter = _staged("model")
        drafter.begin(tuple(map(tuple, texts)), setup_of(law, DraftSampling(flattened, Noise(1))))
        tree = drafter.propose(Budget(order, tuple(counts[r] for r in order), (K,) * 3, (2,) * 3)).tree
        rows = zip(order, tree.tokens.tolist(), tree.num_nodes, strict=True)
        drawn.append({request: row[:size] for request, row, size in rows})
    assert drawn[0] == drawn[1]
    assert [len(drawn[0][request]) for request in range(3)] == [K + 1, 1, 3]


def _two_likeliest(logits: Tensor, paths: Paths) -> Tensor:
    """A processor that leaves two tokens, and by which likelier ones depend on the path."""
    later = torch.tensor([len(path) for _, path in paths()])[:, None]
    scaled = logits.double() / (8.0 + later)
    return scaled.masked_fill(scaled < scaled.topk(2, dim=-1).values[:, 1:], float("-inf"))


class _Enumerated(Staged):
    """Draws by a given chooser instead of noise."""

    def __init__(self, chooser: Chooser, model: Any, inner: Drafter) -> None:
        super().__init__(model, inner, nodes=5, width=2)
        self.given = chooser

    def _chooser(self, requests: tuple[int, ...], lengths: tuple[int, ...]) -> Chooser:
        return self.given


class _Guess:
    """Proposes the same tree always: the likeliest token behind the text and another one, and one more behind each."""

    name, shape, taps, laws = "guess", "tree", (), frozenset({Law.DETERMINISTIC})

    def __init__(self, tree: Any) -> None:
        self.tree = tree

    def begin(self, prompts: object, setup: object) -> None:
        pass

    def propose(self, budget: Budget) -> Draft:
        return Draft(self.tree, Law.DETERMINISTIC)

    def commit(self, committed: object) -> None:
        pass


def _wide(model: Any) -> Any:
    """In float64, where a forward of many rows and one of few agree to 1e-14."""
    return copy.deepcopy(model).double()


def _expected(model: Any, text: list[int], depth: int) -> dict[tuple[int, ...], float]:
    """The law of the draft model's own chains."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(depth):
        law = {(*path, t): w * q for path, w in law.items() for t, q in enumerate(_q(model, text, path).tolist()) if q}
    return law


@torch.no_grad()
def _q(model: Any, text: list[int], path: tuple[int, ...]) -> Tensor:
    logits = model(torch.tensor([[*text, *path]])).logits[:, -1]
    return _two_likeliest(logits, lambda: [(0, path)])[0].softmax(-1)


@pytest.mark.parametrize("inner", ["guess", "drawn chain"])
def test_what_is_drawn_has_the_draft_model_s_law_and_its_q(inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text, depth = _wide(SMALL), prompts((7,))[0], 3
    first = _q(model, text, ()).topk(2).indices.tolist()
    second = int(_q(model, text, (first[0],)).argmax())
    tree = tree_from_lists([[text[-1], *first, second]], [[-1, 0, 0, 1]], torch.device("cpu"))
    stages: Any = _Guess(tree) if inner == "guess" else DraftModelDrafter(_wide(SMALLER))
    drafter = _Enumerated(Replay([]), model, stages)
    # The inner model's draws are enumerated with the others.
    monkeypatch.setattr(chains, "NoiseChooser", lambda *given: drafter.given)
    drafter.begin((tuple(text),), setup_of(Law.INDEPENDENT, DraftSampling(_two_likeliest, Noise(1))))
    assert drafter._rule.name == {"guess": "sample-and-match", "drawn chain": "block"}[inner]

    def run(replay: Replay) -> tuple[int, ...]:
        drafter.given = replay
        draft = drafter.propose(budget_of((0,), nodes=depth, depth=depth))
        tokens = tuple(draft.tree.tokens[0, 1:].tolist())
        assert draft.law is Law.INDEPENDENT
        assert draft.q is not None
        for k in range(depth):
            assert (draft.q[0, k] - _q(model, text, tokens[:k])).abs().max() < 1e-12
        assert not draft.q[0, depth].any()
        return tokens

    assert total_variation(enumerate_all(run), _expected(model, text, depth)) < 1e-12


def test_the_same_check_sees_an_inner_rule_that_is_not_lossless(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = _wide(SMALL), prompts((7,))[0]
    likeliest = int(_q(model, text, ()).argmax())
    tree = tree_from_lists([[text[-1], likeliest]], [[-1, 0]], torch.device("cpu"))
    drafter = _Enumerated(Replay([]), model, _Guess(tree))  # type: ignore[arg-type]
    drafter.begin((tuple(text),), setup_of(Law.INDEPENDENT, DraftSampling(_two_likeliest, Noise(1))))
    drafter._rule = TypicalLossy()

    def run(replay: Replay) -> tuple[int, ...]:
        drafter.given = replay
        return tuple(drafter.propose(budget_of((0,), nodes=2, depth=2)).tree.tokens[0, 1:].tolist())

    assert total_variation(enumerate_all(run), _expected(model, text, 2)) > 1e-2


def test_a_stop_rule_is_asked_before_every_draw_and_cuts_by_what_it_knew() -> None:
    texts = _texts(9, 4)
    drafters = [_staged("chain"), DraftModelDrafter(SMALL)]
    for drafter in drafters:
        drafter.begin(tuple(map(tuple, texts)), setup_of())

    def stop(depth: int, largest: Any, entropy: Any) -> list[bool]:
        return [depth == 2, depth == 1]

    budget = replace(budget_of((0, 1), depth=K), stop=stop, slots=True)
    ours, theirs = (drafter.propose(budget) for drafter in drafters)
    assert ours.tree.num_nodes == (3, 2)
    assert_same_draft(ours, theirs)
    assert ours.slots is not None
    assert theirs.slots is not None
    torch.testing.assert_close(ours.slots.largest, theirs.slots.largest)
    torch.testing.assert_close(ours.slots.drawn, theirs.slots.drawn)


def test_fewer_forwards_than_tokens_where_the_inner_drafter_is_right() -> None:
    text = prompts((9,))[0]
    staged = Staged(SMALL, DraftModelDrafter(SMALL))
    staged.begin((tuple(text),), setup_of())
    sizes: list[int] = []
    forward = staged._model.forward
    staged._model.forward = lambda rows: (sizes.append(rows.tokens.shape[1]), forward(rows))[1]  # type: ignore[method-assign]
    staged.propose(budget_of((0,), nodes=K, depth=K))
    # One forward takes in the prompt and verifies the chain.
    assert sizes == [len(text) - 1 + K]


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(9,), (9, 3, 14, 1)], ids=str)
@every_inner
def test_text_is_what_it_is_without_it(inner: str, lengths: tuple[int, ...]) -> None:
    inputs = left_padded([text * 2 for text in prompts(lengths)])
    planner = RecordingPlanner(FixedPlanner(nodes=K, depth=K))
    greedy = MODEL.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.9, "top_k": 20, "seed": 11}
    coupled = SpeculativeGenerator(MODEL, verifier="coupled").generate(**inputs, **options)
    generator = SpeculativeGenerator(MODEL, _staged(inner), planner=planner)
    assert_same_greedy(MODEL, inputs, generator.generate(**inputs, max_new_tokens=NEW, do_sample=False), greedy)
    assert planner.acceptance() > 0.2
    assert torch.equal(generator.generate(**inputs, **options), coupled)
    for rule in ("block", "rejection"):
        generator = SpeculativeGenerator(MODEL, _staged(inner), planner=planner, verifier=rule)
        cold = generator.generate(**inputs, **{**options, "temperature": 1e-4})
        assert_same_greedy(MODEL, inputs, cold, greedy)


def test_the_default_planner_takes_it() -> None:
    inputs = left_padded(prompts((9, 3)))
    greedy = MODEL.generate(**inputs, max_new_tokens=12, do_sample=False)
    ours = SpeculativeGenerator(MODEL, _staged("model")).generate(**inputs, max_new_tokens=12, do_sample=False)
    assert_same_greedy(MODEL, inputs, ours, greedy)


def test_without_positions_left_it_proposes_nothing() -> None:
    staged = _staged("chain")
    staged.begin((tuple(prompts((254,))[0]),), setup_of())
    assert staged.propose(budget_of((0,), nodes=K, depth=K)).tree.num_nodes == (1,)


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(SpecDecError, match="Drafter"):
        Staged(SMALL, "prompt-lookup")  # type: ignore[arg-type]
    with pytest.raises(IncompatibleRuleError, match=r"recycling.*top_k"):
        Staged(SMALL, RecyclingDrafter())
    with pytest.raises(SpecDecError, match="nodes=0"):
        Staged(SMALL, PromptLookupDrafter(), nodes=0)
    with pytest.raises(SpecDecError, match="width=0"):
        Staged(SMALL, PromptLookupDrafter(), width=0)
    with pytest.raises(VocabularyMismatchError, match=str(VOCABULARY)):
        Staged(SMALL, PromptLookupDrafter()).begin(((1, 2),), replace(setup_of(), vocabulary=VOCABULARY + 1))
    drawn = _Guess(None)
    drawn.laws = frozenset({Law.INDEPENDENT})
    assert Law.COUPLED not in Staged(SMALL, drawn).laws  # type: ignore[arg-type]
