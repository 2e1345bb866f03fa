"""The promise, end to end: every family, drafter and batch says exactly what `model.generate` says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from specdec.drafters.draft_model import DraftModelDrafter
from specdec.generator import SpeculativeGenerator
from specdec.planner import FixedPlanner
from tests.support_compare import Negated, RecordingPlanner, assert_same_greedy
from tests.support_models import FAMILIES, left_padded, noised, prompts, tiny_model

K = 3
NEW = 60
# Two unlike families are enough while working; `make test` runs them all.
BY_FAMILY = [family if family in ("llama", "gpt2") else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
LENGTHS = {"one": (9,), "ragged": (9, 3, 14, 1)}
SHAPES = {"chain": FixedPlanner(nodes=K, depth=K, width=1), "tree": FixedPlanner(nodes=21, depth=K, width=3)}


def _wrong(model: nn.Module) -> nn.Module:
    other: Any = copy.deepcopy(model)
    other.set_output_embeddings(Negated(other.get_output_embeddings()))
    return other


def _drafts(model: nn.Module, family: str) -> dict[str, nn.Module]:
    return {"itself": model, "random": tiny_model(family, seed=99), "wrong": _wrong(model)}


def _run(model: nn.Module, draft: nn.Module, shape: str, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
    planner = RecordingPlanner(SHAPES[shape])
    generator = SpeculativeGenerator(model, DraftModelDrafter(draft, shape=shape), planner=planner)  # type: ignore[arg-type]
    return generator.generate(**inputs, max_new_tokens=NEW, do_sample=False), planner


def _noised_run(model: nn.Module, shape: str, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
    """A disturbed copy that is accepted 20 to 80 % of the time."""
    tried = {}
    for amount in (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.45):
        tokens, planner = _run(model, noised(model, amount), shape, inputs)
        tried[amount] = planner.acceptance()
        if 0.2 <= tried[amount] <= 0.8:
            return tokens, planner
    raise AssertionError(f"no disturbance gives an acceptance of 20 to 80 %: {tried}")


@pytest.mark.parametrize("batch", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", BY_FAMILY)
def test_greedy_equals_generate(family: str, shape: str, batch: str) -> None:
    model = tiny_model(family)
    inputs = left_padded(prompts(LENGTHS[batch]))
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)  # type: ignore[operator]
    assert len(set(expected[:, inputs["input_ids"].shape[1] :].flatten().tolist())) >= 10
    lengths: set[int] = set()
    for name, draft in _drafts(model, family).items():
        tokens, planner = _run(model, draft, shape, inputs)
        assert_same_greedy(model, inputs, tokens, expected)
        lengths |= planner.accepted_lengths()
        if name == "itself":
            assert planner.acceptance() > 0.95
        if name == "wrong" and shape == "chain":
            assert planner.accepted_lengths() == {0}
    tokens, planner = _noised_run(model, shape, inputs)
    assert_same_greedy(model, inputs, tokens, expected)
    assert lengths | planner.accepted_lengths() == set(range(K + 1))


@pytest.mark.parametrize("batch", LENGTHS)
@pytest.mark.parametrize("drafter", ["prompt-lookup", "suffix", None])
@pytest.mark.parametrize("family", BY_FAMILY)
def test_greedy_equals_generate_with_lookup(family: str, drafter: str | None, batch: str) -> None:
    model = tiny_model(family)
    texts = [t * 3 for t in prompts(LENGTHS[batch])]
    inputs = left_padded(texts)
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)  # type: ignore[operator]
    generator = SpeculativeGenerator(model, drafter, planner=FixedPlanner(nodes=6, depth=5, width=2))
    assert_same_greedy(model, inputs, generator.generate(**inputs, max_new_tokens=NEW, do_sample=False), expected)


@pytest.mark.parametrize("batch", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", BY_FAMILY)
def test_coupled_sampling_does_not_depend_on_the_drafter(family: str, shape: str, batch: str) -> None:
    model = tiny_model(family)
    inputs = left_padded(prompts(LENGTHS[batch]))
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.9, "top_k": 20, "seed": 11}
    expected = SpeculativeGenerator(model, verifier="coupled").generate(**inputs, **options)
    assert len(set(expected.flatten().tolist())) >= 10
    drafters: list[Any] = [DraftModelDrafter(noised(model, 0.1), shape=shape), "suffix"]  # type: ignore[arg-type]
    for drafter in drafters:
        planner = RecordingPlanner(SHAPES[shape])
        generator = SpeculativeGenerator(model, drafter, verifier="coupled", planner=planner)
        assert torch.equal(generator.generate(**inputs, **options), expected)
        if drafter != "suffix":
            assert max(planner.accepted_lengths()) > 0
    other = SpeculativeGenerator(model, verifier="coupled").generate(**inputs, **{**options, "seed": 12})
    assert not torch.equal(other, expected)


@pytest.mark.parametrize("family", BY_FAMILY)
def test_scores_equal_a_teacher_forced_forward(family: str) -> None:
    model = tiny_model(family)
    text = prompts((9,))[0]
    generator = SpeculativeGenerator(model, DraftModelDrafter(noised(model, 0.1)), planner=2)
    out = generator.generate(
        input_ids=torch.tensor([text]), max_new_tokens=NEW, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        logits = model(out.sequences).logits[0, len(text) - 1 : -1]
    assert len(out.scores) == NEW
    for mine, theirs in zip(out.scores, logits, strict=True):
        assert float((mine[0] - theirs).abs().max() / theirs.abs().max()) < 1e-5
