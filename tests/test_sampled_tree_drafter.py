"""Drawn trees of a draft model: the budget, q and the state are right, and every rule that serves them stays lossless."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specdec.drafters.base import DraftSampling
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.sampled_tree import SampledTreeDrafter
from specdec.generator import SpeculativeGenerator
from specdec.noise import Noise
from specdec.planner import FixedPlanner
from specdec.trees.layout import depths
from specdec.types import Budget, Draft, Law
from tests.support_compare import RecordingPlanner, assert_same_greedy
from tests.support_drafters import assert_same_draft, budget_of, chi_square, commit, flattened, setup_of
from tests.support_models import VOCABULARY, left_padded, noised, prompts, tiny_model

MODEL: Any = tiny_model()
SMALL = noised(MODEL, 0.1)
LAWS = [Law.INDEPENDENT, Law.WITHOUT_REPLACEMENT]
every_law = pytest.mark.parametrize("law", LAWS)
RULES = {
    Law.INDEPENDENT: ("recursive", "k-sequential", "multi-path-block"),
    Law.WITHOUT_REPLACEMENT: ("recursive-without-replacement", "traversal"),
}


def _begun(law: Law, texts: list[list[int]], seed: int = 1) -> SampledTreeDrafter:
    drafter = SampledTreeDrafter(SMALL)
    drafter.begin(tuple(map(tuple, texts)), setup_of(law, DraftSampling(flattened, Noise(seed))))
    return drafter


def _texts(draft: Draft, b: int) -> list[tuple[int, ...]]:
    """The tokens from the root to each node."""
    found: list[tuple[int, ...]] = [()]
    for n in range(1, draft.tree.num_nodes[b]):
        found.append((*found[int(draft.tree.parents[b, n])], int(draft.tree.tokens[b, n])))
    return found


@torch.no_grad()
@every_law
def test_the_budget_holds_and_q_is_the_law_behind_every_inner_node(law: Law) -> None:
    texts = prompts((9, 4, 6), seed=2)
    draft = _begun(law, texts).propose(Budget((0, 1, 2), (9, 4, 0), (3, 2, 3), (3, 3, 3)))
    assert draft.law is law
    assert draft.tree.num_nodes == (10, 5, 1)
    assert draft.q is not None
    for b, text in enumerate(texts[:2]):
        own = _texts(draft, b)
        assert max(map(len, own)) == (3, 2)[b]
        inner = set(draft.tree.parents[b, 1 : len(own)].tolist())
        for n in inner:
            logits = SMALL(torch.tensor([[*text, *own[n]]])).logits[0, -1]
            torch.testing.assert_close(draft.q[b, n], (logits / 3.0).softmax(-1), atol=1e-5, rtol=1e-3)
        if law is Law.WITHOUT_REPLACEMENT:
            assert len(set(own)) == len(own), "a path was drawn twice"
        else:
            # Each of the three paths goes on with one child of its own.
            assert draft.tree.parents[b, 4 : len(own)].tolist() == list(range(1, len(own) - 3))


@every_law
def test_it_repeats_with_its_noise_and_state_equals_state_rebuilt(law: Law) -> None:
    texts = prompts((9, 4), seed=2)
    drafter = _begun(law, texts)
    for round_ in range(4):
        draft = drafter.propose(budget_of((0, 1), nodes=8))
        again = _begun(law, texts)
        assert_same_draft(again.propose(budget_of((0, 1), nodes=8)), draft)
        assert not torch.equal(
            _begun(law, texts, seed=2).propose(budget_of((0, 1), nodes=8)).tree.tokens[:, 1:], draft.tree.tokens[:, 1:]
        )
        commit(drafter, texts, (0, 1), [[*_texts(draft, b)[-1][:round_], 3 + round_] for b in range(2)])


def test_without_sampling_it_is_the_draft_model_s_tree() -> None:
    texts, drafters = prompts((9, 4), seed=2), [SampledTreeDrafter(SMALL), DraftModelDrafter(SMALL, shape="tree")]
    for drafter in drafters:
        drafter.begin(tuple(map(tuple, texts)), setup_of())
    ours, theirs = (drafter.propose(budget_of((0, 1))) for drafter in drafters)
    assert_same_draft(ours, theirs)
    assert ours.law is Law.DETERMINISTIC


@every_law
def test_first_tokens_follow_q(law: Law) -> None:
    copies = 400
    drafter, counts, q = SampledTreeDrafter(SMALL), torch.zeros(VOCABULARY), torch.zeros(VOCABULARY)
    for seed in range(8):
        texts = (tuple(prompts((5,))[0]),) * copies
        drafter.begin(texts, setup_of(law, DraftSampling(flattened, Noise(seed))))
        draft = drafter.propose(budget_of(tuple(range(copies)), nodes=2, depth=1))
        assert draft.q is not None
        counts += torch.bincount(draft.tree.tokens[:, 1], minlength=VOCABULARY)
        q = draft.q[0, 0]
    assert chi_square(counts.double(), q.double() / q.double().sum() * 8 * copies) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("law", "rule"), [(law, rule) for law in LAWS for rule in RULES[law]])
def test_end_to_end(law: Law, rule: str) -> None:
    inputs = left_padded(prompts((9, 3, 14)))
    greedy = MODEL.generate(**inputs, max_new_tokens=25, do_sample=False)
    planner = RecordingPlanner(FixedPlanner(nodes=9, depth=3, width=3))
    generator = SpeculativeGenerator(MODEL, SampledTreeDrafter(SMALL), verifier=rule, planner=planner)
    cold = generator.generate(**inputs, max_new_tokens=25, do_sample=True, temperature=1e-4)
    assert_same_greedy(MODEL, inputs, cold, greedy)
    generator.generate(**inputs, max_new_tokens=25, do_sample=True, temperature=0.8, seed=3)
    assert planner.acceptance() > 0.2
    options: dict[str, Any] = {"max_new_tokens": 25, "do_sample": True, "temperature": 0.9, "top_k": 20, "seed": 11}
    coupled = SpeculativeGenerator(MODEL, verifier="coupled").generate(**inputs, **options)
    assert torch.equal(
        SpeculativeGenerator(MODEL, SampledTreeDrafter(SMALL), planner=planner).generate(**inputs, **options), coupled
    )


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["traversal", "multi-path-block"])
def test_the_text_follows_the_target(rule: str) -> None:
    copies, runs = 64, 12
    text = prompts((5,))[0]
    inputs = left_padded([text] * copies)
    planner = FixedPlanner(nodes=6, depth=2, width=3)
    generator = SpeculativeGenerator(MODEL, SampledTreeDrafter(noised(MODEL, 0.3)), verifier=rule, planner=planner)
    counts = torch.zeros(VOCABULARY)
    for seed in range(runs):
        out = generator.generate(**inputs, max_new_tokens=2, do_sample=True, temperature=3.0, top_k=0, seed=seed)
        counts += torch.bincount(out[:, -2], minlength=VOCABULARY)
    with torch.no_grad():
        p = (MODEL(torch.tensor([text])).logits[0, -1].double() / 3.0).softmax(-1)
    assert chi_square(counts.double(), p * copies * runs) > 1e-4


def test_depths_are_those_of_the_levels() -> None:
    draft = _begun(Law.INDEPENDENT, prompts((9,))).propose(Budget((0,), (6,), (2,), (3,)))
    assert depths(draft.tree.parents).tolist() == [[0, 1, 1, 1, 2, 2, 2]]
