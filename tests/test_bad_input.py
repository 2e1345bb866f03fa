"""What a user can get wrong: a clear error, nothing half done, the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy import stats

from specdec.drafters.draft_model import DraftModelDrafter
from specdec.errors import InvalidRequestError, NonFiniteLogitsError, SpecDecError, VocabularyMismatchError
from specdec.generator import SpeculativeGenerator
from specdec.planner import FixedPlanner
from tests.support_models import family_config, left_padded, noised, prompts, tiny_model

INPUTS = left_padded(prompts((6, 3)))


def test_nan_logits_are_told_and_the_next_call_works() -> None:
    model = tiny_model()
    generator = SpeculativeGenerator(model, DraftModelDrafter(noised(model, 0.1)), planner=2)
    expected = generator.generate(**INPUTS, max_new_tokens=8, do_sample=False)
    weight = model.lm_head.weight  # type: ignore[union-attr]
    good = weight.detach().clone()
    with torch.no_grad():
        weight[5] = float("nan")
    for sampling in (False, True):
        with pytest.raises(NonFiniteLogitsError, match="NaN"):
            generator.generate(**INPUTS, max_new_tokens=8, do_sample=sampling)
    with torch.no_grad():
        weight.copy_(good)
    assert torch.equal(generator.generate(**INPUTS, max_new_tokens=8, do_sample=False), expected)


def test_a_draft_of_another_vocabulary_is_refused_at_construction() -> None:
    config = copy.deepcopy(family_config("llama"))
    config.vocab_size = 70
    draft = type(tiny_model())(config)
    with pytest.raises(VocabularyMismatchError, match=r"70.*61"):
        SpeculativeGenerator(tiny_model(), draft)


def test_a_draft_on_another_device_is_refused_at_construction() -> None:
    draft = tiny_model(seed=5).to("meta")
    with pytest.raises(SpecDecError, match="meta"):
        SpeculativeGenerator(tiny_model(), draft)


def test_ids_that_are_no_integers_are_refused() -> None:
    generator = SpeculativeGenerator(tiny_model())
    with pytest.raises(InvalidRequestError, match="float"):
        generator.generate(torch.rand(1, 4), max_new_tokens=4)


def test_a_rule_that_cannot_verify_the_draft_is_refused_at_construction() -> None:
    model = tiny_model()
    with pytest.raises(SpecDecError, match="rejection"):
        SpeculativeGenerator(model, DraftModelDrafter(model, shape="tree"), verifier="rejection")


@pytest.mark.parametrize("nodes", [-1, 1.5])
def test_budgets_that_are_no_counts_are_refused(nodes: float) -> None:
    with pytest.raises(SpecDecError, match="nodes"):
        FixedPlanner(nodes=nodes)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("verifier", ["rejection", "sample-and-match", "coupled"])
def test_sampled_text_follows_the_target(verifier: str) -> None:
    """The first two tokens of 3,000 requests against the target's own law, draft and processing included."""
    model = tiny_model()
    text = prompts((9,))[0]
    options = {"do_sample": True, "temperature": 1.5, "top_k": 3, "max_new_tokens": 2}
    torch.manual_seed(0)
    generator = SpeculativeGenerator(model, DraftModelDrafter(noised(model, 0.15)), verifier=verifier, planner=2)
    out = generator.generate(torch.tensor([text]), num_return_sequences=3000, **options)[:, len(text) :]
    cells = {}
    with torch.no_grad():
        first = _top(model(torch.tensor([text])).logits[0, -1])
        for token, p in first.items():
            for following, r in _top(model(torch.tensor([[*text, token]])).logits[0, -1]).items():
                cells[token, following] = p * r
    drawn = [tuple(row) for row in out.tolist()]
    assert set(drawn) <= set(cells)
    kept = [c for c in cells if cells[c] * len(drawn) >= 5]
    counts = [drawn.count(c) for c in kept] + [sum(c not in kept for c in drawn)]
    expected = [cells[c] * len(drawn) for c in kept]
    expected.append(max(len(drawn) - sum(expected), 1e-9))
    if expected[-1] < 5:
        counts, expected = [*counts[:-2], counts[-2] + counts[-1]], [*expected[:-2], expected[-2] + expected[-1]]
    # Seeded: fails always or never; a right implementation fails one seed in 10,000.
    assert stats.chisquare(counts, expected).pvalue > 1e-4
    assert generator.stats is not None
    assert generator.stats.accepted > 0


def _top(logits: torch.Tensor) -> dict[int, float]:
    values, tokens = (logits / 1.5).topk(3)
    return dict(zip(tokens.tolist(), values.softmax(-1).tolist(), strict=True))
