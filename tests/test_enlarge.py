"""An enlarged model is the small one: equal logits in fp32, new tokens that never win, equal text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from specdec import SpecDecError, SpeculativeGenerator, bundled_path
from specdec.bench.enlarge import LLAMA_1B, LLAMA_8B, QWEN_4B, enlarge
from specdec.bench.enlarge_heads import enlarge_heads
from specdec.bench.speed import load_prompts
from specdec.drafters.medusa_heads import MedusaHeads

pytestmark = pytest.mark.slow

# As the 8B shape does with the bundled target: twice the head width, groups of four for a group of five, all sizes larger.
WIDER: dict[str, Any] = {
    "hidden_size": 704,
    "intermediate_size": 1800,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 9000,
}


def _assert_same_function(small: Any, big: Any, ids: torch.Tensor) -> None:
    known = small.config.vocab_size
    with torch.no_grad():
        wanted, got = small(ids).logits, big(ids).logits
    assert got.shape[-1] == big.config.vocab_size
    assert float((got[..., :known] - wanted).norm() / wanted.norm()) < 1e-4
    assert torch.allclose(got[..., :known], wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert torch.isfinite(got).all()
    assert (got[..., known:] < got[..., :known].min() - 1e6).all()


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """The bundled target and draft in fp32, without end-of-sequence."""
    models = [AutoModelForCausalLM.from_pretrained(bundled_path(n), dtype=torch.float32).eval() for n in ("target", "draft")]  # type: ignore[arg-type]
    for model in models:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return models[0], models[1]


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    asked, _ = load_prompts(None, AutoTokenizer.from_pretrained(bundled_path("target")), 1, 64)
    return torch.tensor([asked[0].ids])


def test_enlarged_heads_draft_the_same_tokens(pair: tuple[Any, Any], prompt: torch.Tensor) -> None:
    """Layers that do something, on the hidden states of a real text; new tokens never win."""
    target = enlarge(pair[0], WIDER)
    heads = MedusaHeads(320, 8192, 3, 2, shared_head=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in heads.layers():
            layer.weight.normal_(0, 0.05, generator=generator)
            layer.bias.normal_(0, 0.1, generator=generator)
        small = pair[0].model(prompt).last_hidden_state[0]
        big = target.model(prompt).last_hidden_state[0]
        wide = enlarge_heads(heads, target)
        ours, theirs = wide.logits(big), heads.logits(small, pair[0].lm_head.weight)
    assert torch.allclose(ours[..., :8192], theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    assert not torch.equal(theirs[0].argmax(-1), theirs[1].argmax(-1))


def test_the_bundled_pair_enlarged_decodes_the_same_text(pair: tuple[Any, Any], prompt: torch.Tensor) -> None:
    target = enlarge(pair[0], WIDER)
    draft = enlarge(pair[1], {**WIDER, "num_hidden_layers": 3, "head_dim": 64})
    _assert_same_function(pair[0], target, prompt)
    _assert_same_function(pair[1], draft, prompt)
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 20, "do_sample": False}
    wanted = pair[0].generate(prompt, **settings).tolist()
    assert target.generate(prompt, **settings).tolist() == wanted
    small, large = SpeculativeGenerator(*pair, planner=4), SpeculativeGenerator(target, draft, planner=4)
    assert large.generate(prompt, **settings).tolist() == wanted
    small.generate(prompt, **settings)
    assert large.stats is not None
    assert small.stats is not None
    assert large.stats.accepted == small.stats.accepted > 0


def test_bf16_keeps_the_text_apart_from_rounding(pair: tuple[Any, Any], prompt: torch.Tensor) -> None:
    big = enlarge(pair[0], WIDER, dtype=torch.bfloat16)
    assert big.dtype == torch.bfloat16
    with torch.no_grad():
        wanted, got = pair[0](prompt).logits, big(prompt).logits.float()
    assert float((got[..., : wanted.shape[-1]] - wanted).norm() / wanted.norm()) < 0.05
    assert int(got.argmax(-1).max()) < wanted.shape[-1]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "wide_heads", "wide_kv_heads"),
    [(6, 2, 16, 4), (6, 2, 8, 8), (4, 4, 16, 4), (8, 1, 12, 6), (4, 2, 4, 2)],
)
@pytest.mark.parametrize("factor", [1, 3])
def test_query_groups_keep_their_keys(heads: int, kv_heads: int, wide_heads: int, wide_kv_heads: int, factor: int) -> None:
    torch.manual_seed(heads + factor)
    sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 50}
    config = LlamaConfig(
        **sizes, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8, rms_norm_eps=1e-3, initializer_range=0.3
    )
    small = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in small.model.layers:
            layer.input_layernorm.weight.uniform_(0.5, 1.5)
    shape = {"hidden_size": 96, "vocab_size": 70, "num_attention_heads": wide_heads, "num_key_value_heads": wide_kv_heads}
    big = enlarge(small, {**shape, "head_dim": 8 * factor})
    _assert_same_function(small, big, torch.randint(0, 50, (2, 17)))


def test_depth_alone_and_scaled_rotary() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=50, head_dim=16, rope_parameters=rope, initializer_range=0.3)
    small = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 50, (1, 90))
    with torch.no_grad():
        deeper = enlarge(small, {"num_hidden_layers": 3})
        assert torch.allclose(deeper(ids).logits, small(ids).logits, atol=1e-4)
    _assert_same_function(small, enlarge(small, {"head_dim": 32, "hidden_size": 40, "vocab_size": 52}), ids)


def test_what_cannot_hold_the_model_is_refused(pair: tuple[Any, Any]) -> None:
    with pytest.raises(SpecDecError, match="smaller than the model"):
        enlarge(pair[0], {"hidden_size": 64})
    with pytest.raises(SpecDecError, match="frequencies"):
        enlarge(pair[0], {"head_dim": 96})
    with pytest.raises(SpecDecError, match="whole multiple of num_attention_heads"):
        enlarge(pair[0], {"num_attention_heads": 7})
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 1, "vocab_size": 50}
    groups_of_three = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2))
    with pytest.raises(SpecDecError, match="more KV heads"):
        enlarge(groups_of_three, {"num_key_value_heads": 3})
    with pytest.raises(SpecDecError, match="hidden_size"):
        enlarge(pair[0], {"vocab_size": 9000})
    with pytest.raises(SpecDecError, match="only llama"):
        enlarge(pair[0], QWEN_4B)
    with pytest.raises(SpecDecError, match="float16"):
        enlarge(pair[0], WIDER, dtype=torch.float16)
    with pytest.raises(SpecDecError, match="may name"):
        enlarge(pair[0], {"layers": 9})


@pytest.mark.parametrize(
    ("shape", "billions"), [(LLAMA_8B, 8.03), (LLAMA_1B, 1.24), (QWEN_4B, 4.02)], ids=["llama 8b", "llama 1b", "qwen 4b"]
)
def test_named_shapes_have_the_size_of_their_names(shape: Any, billions: float) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)
