"""Tiny random models of every supported family, built from configurations: nothing is downloaded."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 61
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def _old_style(**kwargs: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **kwargs,
    }


def family_config(family: str) -> PretrainedConfig:
    """The configuration of a tiny model; windows are short enough to be passed within a test."""
    configs: dict[str, PretrainedConfig] = {
        "llama": LlamaConfig(**_SMALL),
        "mistral": MistralConfig(**_SMALL, sliding_window=7),
        "qwen2": Qwen2Config(**_SMALL),
        "qwen3": Qwen3Config(**_SMALL),
        "gemma2": Gemma2Config(**_SMALL, sliding_window=7, query_pre_attn_scalar=8, attn_logit_softcapping=5.0),
        "gpt2": GPT2Config(**_old_style(n_embd=32, n_layer=2, n_head=4, n_positions=256)),
        "gpt_neox": GPTNeoXConfig(
            **_old_style(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256
            )
        ),
        "opt": OPTConfig(
            **_old_style(
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=256,
                word_embed_proj_dim=32,
            )
        ),
    }
    return configs[family]


# Seed and sharpness of the random weights with which greedy text varies: 15 to 31 distinct tokens in 60.
_VARIED = {
    "llama": (4, 12.0),
    "mistral": (3, 12.0),
    "qwen2": (0, 12.0),
    "qwen3": (0, 12.0),
    "gemma2": (4, 12.0),
    "gpt2": (3, 6.0),
    "gpt_neox": (2, 6.0),
    "opt": (4, 12.0),
}
FAMILIES = tuple(_VARIED)


def tiny_model(family: str = "llama", seed: int | None = None) -> nn.Module:
    """A random fp32 model. seed: other weights than the family's own."""
    own_seed, scale = _VARIED[family]
    torch.manual_seed(own_seed if seed is None else seed)
    # Older transformers drop Gemma's soft-cap in SDPA; the eager attention has it in all of them.
    attention = "eager" if family == "gemma2" else None
    model: nn.Module = AutoModelForCausalLM.from_config(family_config(family), attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def noised(model: nn.Module, amount: float, seed: int = 1) -> nn.Module:
    """A copy whose weights are disturbed by `amount` of each tensor's own deviation: a draft that is often right."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * amount)
    return other


def prompts(lengths: tuple[int, ...], seed: int = 3) -> list[list[int]]:
    """Random prompts of these lengths without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def left_padded(texts: list[list[int]]) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of a ragged batch, padded on the left with token 0."""
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(t)) + t for t in texts])
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts])
    return {"input_ids": ids, "attention_mask": mask}
