"""Tiny random models of every causal LM that transformers knows, from configurations shrunk by the names of their fields."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 61
LAYERS = 4
# Short enough to be passed by the prompts and texts of the walk.
WINDOW = 7
_MOST_PARAMETERS = 8_000_000

_TABLE: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "n_vocab", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "projection_dim"), 32),
    **dict.fromkeys(("embed_dim", "attention_hidden_size", "attention_channels"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "d_inner"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_intermediate_size", "intermediate_size_mlp", "dff", "dim_ff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "swa_head_dim", "qk_head_dim", "d_kv"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rotary_dim", "swa_v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "hidden_size_per_layer_input", "o_lora_rank"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions", "seq_length"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_layer"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", "num_selected_experts", "experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "num_expert_group"), 1),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size", "local_window"), WINDOW),
    **dict.fromkeys(("ssm_state_size", "state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("first_k_dense_replace", "num_kv_shared_layers", "num_dense_layers"), 1),
    **dict.fromkeys(("lru_width", "mamba_d_ssm"), 32),
    **dict.fromkeys(("attention_chunk_size",), 8),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("image_size",), 16),
    **dict.fromkeys(("patch_size",), 8),
    "pad_token_id": 0,
    "eos_token_id": 2,
    "is_decoder": True,
    "tie_word_embeddings": False,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "query_pre_attn_scalar": 8,
}
# What the names do not tell.
_ALL_HEADS = {"num_key_value_heads": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
_OWN: dict[str, dict[str, Any]] = {
    "axk1": _ALL_HEADS,
    "axk2": _ALL_HEADS,
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {f"{kind}_attention": {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full", "sliding")},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v2": _ALL_HEADS,
    "deepseek_v3": _ALL_HEADS,
    "deepseek_v32": _ALL_HEADS,
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "gemma4": {"text_config": {"num_kv_shared_layers": 0}},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
    "gemma4_unified": {"text_config": {"num_kv_shared_layers": 0}},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "glm4_moe_lite": _ALL_HEADS,
    "glm_moe_dsa": _ALL_HEADS,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"] * 2},
    "hrm_text": {"num_layers_per_stack": 1, "H_cycles": 1, "L_cycles": 1},
    "hy_v4": _ALL_HEADS,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {**_ALL_HEADS, "qk_head_dim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minicpm3": _ALL_HEADS,
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "moshi": {"audio_vocab_size": VOCABULARY, "num_key_value_heads": 4},
    "qwen4_exp": {"text_config": {"layer_types": ["linear_attention"] * LAYERS}},
    "qwen4_exp_text": {"layer_types": ["linear_attention"] * LAYERS},
    "reformer": {"axial_pos_embds_dim": (8, 24), "axial_pos_shape": (16, 16)},
    "roc_bert": {"shape_embed_dim": 8, "shape_vocab_size": 61, "pronunciation_vocab_size": 61, "pronunciation_embed_dim": 8},
    "xmod": {"default_language": "en_XX"},
    "youtu": _ALL_HEADS,
    "zamba2": {"layer_types": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}


# Families without a tiny model here, and why.
UNTRIED = {
    "dots3_note": "its configuration sets layers one by one and cannot be made tiny",
    "dots3_note_text": "its configuration sets layers one by one and cannot be made tiny",
    "gemma3n": "its vision tower needs timm, which is not installed; gemma3n_text is the language model",
    "gemma4_assistant": "a drafter that runs on the hidden states of its own target",
    "gemma4_unified_assistant": "a drafter that runs on the hidden states of its own target",
    "musicgen": "generates several audio codebooks, not one text",
    "musicgen_melody": "generates several audio codebooks, not one text",
}


def every_family() -> list[str]:
    """The model types that transformers maps to a causal LM."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str) -> PretrainedConfig:
    """The configuration of a tiny model of this family."""
    return _shrunk(CONFIG_MAPPING[family], _OWN.get(family, {}))


def _shrunk(kind: type[PretrainedConfig], own: dict[str, Any]) -> PretrainedConfig:
    default = kind()
    names = set(default.to_dict()) | set(kind.attribute_map)
    changed = {name: value for name, value in _TABLE.items() if name in names}
    for name in kind.sub_configs:
        if isinstance(sub := getattr(default, name, None), PretrainedConfig):
            changed[name] = {"model_type": sub.model_type, **_shrunk(type(sub), own.get(name, {})).to_dict(), **own.get(name, {})}
    return kind(**{**changed, **{k: v for k, v in own.items() if k not in changed or k not in kind.sub_configs}})


def family_model(family: str, seed: int = 0, scale: float = 8.0) -> nn.Module:
    """A random fp32 model with varied greedy text. Raises ValueError where the configuration stays large."""
    config = tiny_config(family)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"{size} parameters: the configuration cannot be made tiny")
    torch.manual_seed(seed)
    model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(scale)
    generation: Any = model.generation_config
    generation.eos_token_id, generation.pad_token_id = None, 0
    return model
