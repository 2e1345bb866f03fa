"""Every causal LM of transformers either says what its own generate says, or is refused by name when a runner is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, Phi3Config

from specdec.errors import InvalidRequestError, UnsupportedModelError
from specdec.generator import SpeculativeGenerator
from specdec.planner import FixedPlanner
from specdec.runner import ModelRunner, RunnerOptions
from tests.support_families import UNTRIED, every_family, family_model, tiny_config
from tests.support_models import prompts
from tests.support_walk import PAGE, ScatteredDrafter, compare, listed, walk

# Windows, soft-caps, sinks, experts, partial rotary, parallel blocks, latent attention, shared keys, own norms.
WORKS = (
    "cohere2", "deepseek_v3", "gemma2", "gemma3_text", "gemma4_text", "glm4", "gpt_oss", "granite", "mixtral", "olmo2", "phi3",
    "qwen3_moe", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
REFUSED = {
    "bart": "place among the rows",
    "bloom": "0 of 4 layers",
    "deepseek_v32": "Indexer",
    "diffllama": "more than once",
    "doge": "mask of its own making",
    "falcon": "0 of 4 layers",
    "gptj": "0 of 4 layers",
    "lfm2": "rolled back",
    "llama4_text": "not the causal one",
    "mamba": "rolled back",
    "moshi": "cache of generate",
    "mpt": "0 of 4 layers",
    "phimoe": "only the mask knows",
    "whisper": "counts the pads",
}
_PAGE = PAGE.read_text(encoding="utf-8")
_KNOWN = listed(_PAGE)
# What the page says holds for the version that it was made with.
_SAME_VERSION = f"transformers {transformers.__version__}," in _PAGE


@pytest.mark.parametrize("family", WORKS)
def test_a_family_says_what_generate_says(family: str) -> None:
    assert walk(family).verdict == "works"
    if _SAME_VERSION:
        assert _KNOWN[family].verdict == "works"


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_is_refused_for_its_reason(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match=REFUSED[family]) as error:
        ModelRunner(family_model(family))
    assert str(error.value).startswith(type(family_model(family)).__name__)
    if _SAME_VERSION:
        assert _KNOWN[family].verdict == "refused"
        assert _KNOWN[family].why in str(error.value).replace("|", "/")


@pytest.mark.nightly
@pytest.mark.parametrize("family", [f for f in every_family() if f not in WORKS and f not in REFUSED])
def test_no_family_is_wrong(family: str) -> None:
    walked = walk(family)
    assert walked.verdict != "wrong", walked.why
    if _SAME_VERSION:
        assert walked == _KNOWN[family]


def test_the_page_says_of_no_family_that_it_is_wrong() -> None:
    assert {walked.verdict for walked in _KNOWN.values()} == {"works", "refused", "untried"}


@pytest.mark.skipif(not _SAME_VERSION, reason="docs/families.md was made with another version of transformers")
def test_the_page_lists_every_family() -> None:
    assert sorted(_KNOWN) == every_family()
    assert {f for f, w in _KNOWN.items() if w.verdict == "untried"} == set(UNTRIED) & set(every_family())


@pytest.mark.parametrize("family", ["phimoe", "bart", "llama4_text", "whisper"])
def test_the_walk_tells_a_wrong_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the refusals switched off, these run, and the comparison says so."""
    monkeypatch.setattr("specdec.examine.refuse", lambda name, why: None)
    model = family_model(family)
    assert any(compare(model, lengths) is not None for lengths in ((9,), (12, 3)))


def test_the_walk_tells_a_wrong_token_behind_right_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = SpeculativeGenerator.generate

    def wrong(self: SpeculativeGenerator, **options: Any) -> Any:
        out = generate(self, **options)
        out.sequences[0, -3] = 3 if out.sequences[0, -3] != 3 else 4
        return out

    monkeypatch.setattr(SpeculativeGenerator, "generate", wrong)
    assert "another token" in (compare(family_model("llama"), (9,)) or "")


def test_a_model_that_hides_a_difference_from_attention_is_refused() -> None:
    """What no structural check can see, the comparison with the model's own forward does."""
    model: Any = family_model("llama")
    attention = type(model.model.layers[1].self_attn)

    class Scaled(attention):  # type: ignore[misc,valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.scaling = 0.05 if self.config._attn_implementation == "eager" else 1.0
            return super().forward(*args, **kwargs)

    model.model.layers[1].self_attn.__class__ = Scaled
    with pytest.raises(UnsupportedModelError, match="does not score"):
        ModelRunner(model)


@pytest.mark.parametrize("backend", ["sdpa", "reference", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_sink_takes_weight_in_every_backend(backend: Any) -> None:
    model: Any = family_model("gpt_oss")
    text, tokens = prompts((9,))[0], [7, 8, 9, 10]
    found = []
    for shift in (0.0, -4.0):
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.sinks.add_(shift)
            expected = model(torch.tensor([text + tokens])).logits[:, -1]
        runner = ModelRunner(model, options=RunnerOptions(attention=backend, capture="off", pack="off"))
        runner.begin(1, 32)
        runner.prefill([text])
        found.append(runner.extend([tokens]))
        torch.testing.assert_close(found[-1], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=0.1)


def test_a_window_longer_than_the_model_reads_is_none() -> None:
    """Phi-3.5-MoE's mask has a window of all its positions, and does not tell attention."""
    config: Any = tiny_config("phimoe")
    config.sliding_window = config.max_position_embeddings
    ModelRunner(AutoModelForCausalLM.from_config(config))
    config.sliding_window -= 1
    with pytest.raises(UnsupportedModelError, match="only the mask knows"):
        ModelRunner(AutoModelForCausalLM.from_config(config))


def test_a_text_stops_where_rotary_frequencies_change() -> None:
    config: Any = tiny_config("phi3")
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    config = Phi3Config(**{**config.to_dict(), "rope_parameters": rope, "original_max_position_embeddings": 32})
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    generator = SpeculativeGenerator(model, ScatteredDrafter([[5] * 40]), planner=FixedPlanner(nodes=6, depth=2, width=3))
    ids = torch.tensor(prompts((12,)))
    ours = generator.generate(input_ids=ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(ours, model.generate(input_ids=ids, max_new_tokens=20, do_sample=False))
    with pytest.raises(InvalidRequestError, match="32 positions"):
        generator.generate(input_ids=ids, max_new_tokens=21, do_sample=False)
