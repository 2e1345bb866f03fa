"""Families, drafters, trees and batches together: greedy and coupled text is what it is without a draft."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.drafters.base import Drafter
from specdec.drafters.best_first import BestFirstDrafter
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.ensemble import Ensemble
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.medusa_heads import MedusaHeads
from specdec.drafters.pard import PardDrafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.drafters.recycling import RecyclingDrafter
from specdec.drafters.retrieval import RetrievalDrafter
from specdec.drafters.sampled_tree import SampledTreeDrafter
from specdec.drafters.several import SeveralDrafters
from specdec.drafters.staged import Staged
from specdec.drafters.suffix import SuffixDrafter
from specdec.generator import SpeculativeGenerator
from specdec.planner import FixedPlanner, Planner
from specdec.tetris import TetrisPlanner
from specdec.trees.static import chain_choices
from tests.support_compare import RecordingPlanner, assert_same_greedy
from tests.support_models import FAMILIES, VOCABULARY, left_padded, noised, prompts, tiny_model

NEW, K, MASK = 20, 3, 60
BATCHES = {1: (9,), 4: (9, 3, 14, 1)}
CHAIN, TREE, LARGE = FixedPlanner(K, K, 1), FixedPlanner(12, K, 3), FixedPlanner(40, 6, 4)
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 20, "seed": 11}


@cache
def _model(family: str) -> Any:
    return tiny_model(family)


@cache
def _draft(family: str, seed: int = 1) -> Any:
    return noised(_model(family), 0.08, seed)


def _medusa(family: str, **shape: Any) -> MedusaDrafter:
    head = _model(family).get_output_embeddings().weight.detach()
    heads = MedusaHeads(head.shape[1], VOCABULARY, K, shared_head=False)
    heads.init_from(head)
    return MedusaDrafter(heads, **shape)


# By name: the drafter of a family, its planner, and whether some of what it drafts has to be accepted.
CASES: dict[str, tuple[Callable[[str], Drafter], Planner, bool]] = {
    "prompt lookup": (lambda f: PromptLookupDrafter(min_ngram=1), CHAIN, False),
    "suffix tree": (lambda f: SuffixDrafter(min_match=1), TREE, False),
    "retrieval": (lambda f: RetrievalDrafter(), TREE, False),
    "recycling": (lambda f: RecyclingDrafter(), TREE, False),
    "model chain": (lambda f: DraftModelDrafter(_draft(f)), CHAIN, True),
    "model tree": (lambda f: DraftModelDrafter(_draft(f), shape="tree"), TREE, True),
    "best first": (lambda f: BestFirstDrafter(_draft(f), frontier=8), LARGE, True),
    "drawn tree": (lambda f: SampledTreeDrafter(_draft(f)), TREE, True),
    "staged": (lambda f: Staged(_draft(f), SuffixDrafter(min_match=1), nodes=5, width=2), CHAIN, True),
    "staged twice": (lambda f: Staged(_draft(f), Staged(_draft(f, 2), PromptLookupDrafter(min_ngram=1))), CHAIN, True),
    "medusa chain": (lambda f: _medusa(f, shape="chain"), CHAIN, False),
    "medusa tree": (lambda f: _medusa(f, shape="tree", choices=[*chain_choices(K), (1,), (0, 1), (2,)]), TREE, False),
    "pard tree": (lambda f: PardDrafter(_draft(f), MASK, shape="tree"), TREE, True),
    "ensemble": (lambda f: Ensemble([DraftModelDrafter(_draft(f)), SuffixDrafter(min_match=1), RecyclingDrafter()]), TREE, True),
    "several": (lambda f: SeveralDrafters([DraftModelDrafter(_draft(f), shape="tree"), SuffixDrafter()]), TREE, True),
    "selected": (lambda f: DraftModelDrafter(_draft(f), shape="tree"), TetrisPlanner(7, depth=K, width=2), False),
}


def _params() -> list[Any]:
    """Every drafter once while working, on one family after the other and in turn alone and in a batch; the rest is nightly."""
    found = []
    for place, name in enumerate(CASES):
        for number, family in enumerate(FAMILIES):
            for batch in BATCHES:
                fast = number == place % len(FAMILIES) and batch == (1, 4)[place // 2 % 2]
                found.append(pytest.param(family, name, batch, marks=() if fast else pytest.mark.nightly))
    return found


def _inputs(batch: int) -> dict[str, Tensor]:
    return left_padded([text * 2 for text in prompts(BATCHES[batch])])


@cache
def _expected(family: str, batch: int) -> tuple[Tensor, Tensor]:
    """Greedy text as transformers says it, and coupled text without a draft."""
    inputs, model = _inputs(batch), _model(family)
    coupled = SpeculativeGenerator(model, verifier="coupled").generate(**inputs, max_new_tokens=NEW, **SAMPLED)
    return model.generate(**inputs, max_new_tokens=NEW, do_sample=False), coupled


@pytest.mark.parametrize(("family", "name", "batch"), _params())
def test_text_does_not_depend_on_the_draft(family: str, name: str, batch: int) -> None:
    make, planner, accepts = CASES[name]
    inputs, model = _inputs(batch), _model(family)
    recording = RecordingPlanner(planner) if isinstance(planner, FixedPlanner) else None
    generator = SpeculativeGenerator(model, make(family), planner=recording or planner)
    greedy, coupled = _expected(family, batch)
    assert_same_greedy(model, inputs, generator.generate(**inputs, max_new_tokens=NEW, do_sample=False), greedy)
    assert torch.equal(generator.generate(**inputs, max_new_tokens=NEW, **SAMPLED), coupled)
    if recording is None:
        assert generator.stats is not None
        assert generator.stats.drafted > 0
    else:
        assert max(max(stats.drafted) for stats in recording.rounds) > 0
        assert not accepts or max(recording.accepted_lengths()) > 0


def test_the_matrix_is_whole_and_its_fast_part_spread() -> None:
    params = _params()
    assert len(params) == len(CASES) * len(FAMILIES) * len(BATCHES)
    fast = [param.values for param in params if not param.marks]
    assert {name for _, name, _ in fast} == set(CASES)
    assert {family for family, _, _ in fast} == set(FAMILIES)
    assert {batch for _, _, batch in fast} == set(BATCHES)
