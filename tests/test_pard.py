"""PARD: one forward over committed tokens and masks, the drafter's state, its laws, and losslessness end to end."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch

from specdec.drafters.base import DraftSampling, DraftSetup
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.pard import PardDrafter
from specdec.errors import SpecDecError, VocabularyMismatchError
from specdec.generator import SpeculativeGenerator
from specdec.noise import Noise
from specdec.planner import FixedPlanner
from specdec.types import Budget, Committed, Law
from tests.support_compare import Negated, RecordingPlanner, assert_same_greedy
from tests.support_drafters import assert_same_draft, budget_of, chi_square, commit, flattened, setup_of
from tests.support_models import VOCABULARY, left_padded, noised, prompts, tiny_model

pytestmark = pytest.mark.slow

K, MASK, NEW = 3, 60, 25
MODEL: Any = tiny_model()
LENGTHS = {"one": (9,), "ragged": (9, 3, 14)}
PLANNERS = {"chain": FixedPlanner(nodes=K, depth=K, width=1), "tree": FixedPlanner(nodes=12, depth=K, width=3)}
ALPHA = 1e-4
Shape = Literal["chain", "tree"]


@torch.no_grad()
def _places(text: list[int], count: int = K) -> torch.Tensor:
    """[K, V]: the model's own logits behind the text and behind each mask."""
    out: torch.Tensor = MODEL(torch.tensor([[*text, *[MASK] * (count - 1)]])).logits[0, -count:]
    return out


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_state_equals_state_rebuilt(shape: Shape) -> None:
    drafter, texts = PardDrafter(MODEL, MASK, shape=shape), prompts((9, 4), seed=2)
    drafter.begin(tuple(map(tuple, texts)), setup_of())
    for round_ in range(2 * (K + 1)):
        asked = round_ % 3 != 2
        if asked:
            draft = drafter.propose(budget_of((0, 1)))
        new = []
        for b in range(2):
            own = draft.tree.tokens[b, 1 : 1 + (round_ + b) % (K + 1)].tolist() if asked else []
            new.append([*own, 3 + round_])
        commit(drafter, texts, (0, 1), new)
        fresh = PardDrafter(MODEL, MASK, shape=shape)
        fresh.begin(tuple(map(tuple, texts)), setup_of())
        again = drafter.propose(budget_of((0, 1)))
        assert_same_draft(again, fresh.propose(budget_of((0, 1))))
        assert drafter.runner.cache.lengths == list(map(len, texts))
        if shape == "chain":
            expected = torch.stack([_places(text).argmax(-1) for text in texts])
            assert torch.equal(again.tree.tokens[:, 1:], expected)


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_requests_may_leave_and_budgets_differ(shape: Shape) -> None:
    drafter, texts = PardDrafter(MODEL, MASK, shape=shape), prompts((9, 4, 6), seed=2)
    drafter.begin(tuple(map(tuple, texts)), setup_of())
    drafter.propose(budget_of((0, 1, 2)))
    commit(drafter, texts, (0, 1, 2), [[5], [6, 7], [8]])
    commit(drafter, texts, (2,), [[4, 5]])
    draft = drafter.propose(Budget((2, 0), (4, 0), (K, K), (2, 2)))
    assert draft.tree.num_nodes[1] == 1
    assert draft.tree.tokens[:, 0].tolist() == [texts[2][-1], texts[0][-1]]
    fresh = PardDrafter(MODEL, MASK, shape=shape)
    fresh.begin((tuple(texts[2]),), setup_of())
    alone = fresh.propose(Budget((0,), (4,), (K,), (2,)))
    assert alone.tree.num_nodes[0] == draft.tree.num_nodes[0] > 2
    assert torch.equal(draft.tree.tokens[:1, : alone.tree.num_nodes[0]], alone.tree.tokens)


@pytest.mark.parametrize("law", [Law.DETERMINISTIC, Law.INDEPENDENT, Law.COUPLED])
def test_one_place_is_what_an_ordinary_draft_model_says(law: Law) -> None:
    sampling = None if law is Law.DETERMINISTIC else DraftSampling(flattened, Noise(5))
    texts, drafters = prompts((9, 4), seed=6), [PardDrafter(MODEL, MASK), DraftModelDrafter(MODEL)]
    for drafter in drafters:
        drafter.begin(tuple(map(tuple, texts)), setup_of(law, sampling))
    for _ in range(3):
        ours, theirs = (drafter.propose(budget_of((0, 1), depth=1)) for drafter in drafters)
        assert_same_draft(ours, theirs)
        assert ours.law is theirs.law is law
        if law is Law.INDEPENDENT:
            assert torch.equal(ours.q, theirs.q)  # type: ignore[arg-type]
        for drafter in drafters:
            drafter.commit(Committed((0, 1), ((int(ours.tree.tokens[0, 1]), 7), (8,)), (1, 0)))


def test_depth_may_differ_and_pass_what_was_trained() -> None:
    drafter, texts = PardDrafter(MODEL, MASK), prompts((9, 4), seed=2)
    drafter.begin(tuple(map(tuple, texts)), setup_of())
    draft = drafter.propose(Budget((0, 1), (12, 12), (12, 2), (1, 1)))
    assert draft.tree.num_nodes == (13, 3)
    assert torch.equal(draft.tree.tokens[0, 1:], _places(texts[0], 12).argmax(-1))
    assert torch.equal(draft.tree.tokens[1, 1:3], _places(texts[1], 2).argmax(-1))


def test_nothing_is_drafted_beyond_the_models_positions() -> None:
    limit = MODEL.config.max_position_embeddings
    drafter = PardDrafter(MODEL, MASK)
    drafter.begin((tuple(prompts((limit - K,))[0]),), DraftSetup(torch.device("cpu"), VOCABULARY, limit + 64, Law.DETERMINISTIC))
    assert drafter.propose(budget_of((0,))).tree.num_nodes == (K + 1,)
    drafter.commit(Committed((0,), ((5,),), (0,)))
    assert drafter.propose(budget_of((0,))).tree.num_nodes == (1,)


def test_drawn_chains_follow_the_law_that_they_tell() -> None:
    count, text = 1500, prompts((5,))[0]
    drafter = PardDrafter(MODEL, MASK)
    setup = DraftSetup(torch.device("cpu"), VOCABULARY, 16, Law.INDEPENDENT, DraftSampling(flattened, Noise(3)))
    drafter.begin((tuple(text),) * count, setup)
    draft = drafter.propose(budget_of(tuple(range(count))))
    assert draft.q is not None
    assert draft.q.shape == (count, K + 1, VOCABULARY)
    torch.testing.assert_close(draft.q[7, :K], (_places(text) / 3.0).softmax(-1), atol=1e-4, rtol=1e-3)
    for k in range(K):
        drawn = torch.bincount(draft.tree.tokens[:, k + 1], minlength=VOCABULARY).double()
        law = draft.q[0, k].double()
        assert chi_square(drawn, law / law.sum() * count) > ALPHA


def _wrong() -> Any:
    other = copy.deepcopy(MODEL)
    other.set_output_embeddings(Negated(other.get_output_embeddings()))
    return other


@pytest.mark.parametrize("batch", [pytest.param("one", marks=pytest.mark.slow), "ragged"])
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_greedy_equals_generate(shape: Shape, batch: str) -> None:
    inputs = left_padded(prompts(LENGTHS[batch]))
    expected = MODEL.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    first: dict[str, float] = {}
    for name, draft in {"itself": MODEL, "mediocre": noised(MODEL, 0.1), "wrong": _wrong()}.items():
        for planner in (RecordingPlanner(PLANNERS[shape]), RecordingPlanner(FixedPlanner(nodes=1, depth=1))):
            generator = SpeculativeGenerator(MODEL, PardDrafter(draft, MASK, shape=shape), planner=planner)
            assert_same_greedy(MODEL, inputs, generator.generate(**inputs, max_new_tokens=NEW, do_sample=False), expected)
        first[name] = planner.acceptance()
    assert first["itself"] > 0.95
    assert 0.1 < first["mediocre"] < 0.95
    assert first["wrong"] == 0.0


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_coupled_sampling_does_not_depend_on_the_drafter(shape: Shape) -> None:
    inputs = left_padded(prompts(LENGTHS["ragged"]))
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.9, "top_k": 20, "seed": 11}
    expected = SpeculativeGenerator(MODEL, verifier="coupled").generate(**inputs, **options)
    planner = RecordingPlanner(PLANNERS[shape])
    generator = SpeculativeGenerator(MODEL, PardDrafter(MODEL, MASK, shape=shape), verifier="coupled", planner=planner)
    assert torch.equal(generator.generate(**inputs, **options), expected)
    assert max(planner.accepted_lengths()) > 0


def test_rejection_sampling_accepts_the_targets_own_law() -> None:
    inputs = left_padded(prompts(LENGTHS["ragged"]))
    planner = RecordingPlanner(FixedPlanner(nodes=1, depth=1))
    generator = SpeculativeGenerator(MODEL, PardDrafter(MODEL, MASK), verifier="rejection", planner=planner)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": True, "temperature": 0.8}
    runs = [generator.generate(**inputs, **options, seed=seed) for seed in (5, 5, 6)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    # Draft and target are one model, so q is p and every draw of the first place is kept.
    assert planner.acceptance() > 0.99
    with pytest.raises(SpecDecError, match="rejection"):
        SpeculativeGenerator(MODEL, PardDrafter(MODEL, MASK, shape="tree"), verifier="rejection")


def test_the_mask_token_is_found_or_asked_for() -> None:
    other = copy.deepcopy(MODEL)
    with pytest.raises(SpecDecError, match="pard_token"):
        PardDrafter(other)
    for field, token in (("ptd_token_id", 7), ("pard_token", 8), ("mask_token_id", 9)):
        setattr(other.config, field, token)
        assert PardDrafter(other).mask_token == token
    assert PardDrafter(other, 5).mask_token == 5
    with pytest.raises(SpecDecError, match=r"61.*61 tokens"):
        PardDrafter(other, VOCABULARY)


def test_what_does_not_fit_is_told_with_names_and_numbers() -> None:
    with pytest.raises(SpecDecError, match="shape='star'"):
        PardDrafter(MODEL, MASK, shape="star")  # type: ignore[arg-type]
    with pytest.raises(VocabularyMismatchError, match=r"61.*62"):
        PardDrafter(MODEL, MASK).begin(((1,),), DraftSetup(torch.device("cpu"), VOCABULARY + 1, 64, Law.DETERMINISTIC))
    with pytest.raises(SpecDecError, match=r"cpu.*meta"):
        PardDrafter(MODEL, MASK).begin(((1,),), DraftSetup(torch.device("meta"), VOCABULARY, 64, Law.DETERMINISTIC))
