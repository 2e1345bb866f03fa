"""What a user calls a model, and the causal LM in it that is run."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from specdec.errors import UnsupportedModelError

# What decides, beside its weights, what an adapter adds to the output.
_ADAPTER_STATE = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


def unwrapped(target: Any) -> Any:
    """The model in a `torch.compile` wrapper or a PEFT model, or the model itself.

    Raises UnsupportedModelError for prompts that were learned as keys and values or as embeddings.
    """
    if isinstance(target, torch._dynamo.OptimizedModule):
        return unwrapped(target._orig_mod)
    learned = [name for name, config in getattr(target, "peft_config", {}).items() if getattr(config, "is_prompt_learning", False)]
    if learned:
        raise UnsupportedModelError(
            f"adapter {', '.join(learned)} of {type(target).__name__} puts learned vectors before the prompt; adapters that change "
            "layers, such as LoRA, are supported"
        )
    return target.get_base_model() if callable(getattr(target, "get_base_model", None)) else target


def causal_lm(target: Any) -> Any:
    """The transformers model whose `generate` is called: see `unwrapped`.

    Raises UnsupportedModelError for an encoder-decoder, for what has no `generate`, and for dynamic quantisation, whose one scale
    for all rows of a forward makes a token's logits depend on the other rows.
    """
    target = unwrapped(target)
    name = type(target).__name__
    if getattr(getattr(target, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; a decoder-only causal LM is needed")
    if not callable(getattr(target, "generate", None)):
        raise UnsupportedModelError(f"{name} has no generate(); a transformers causal LM is needed")
    for where, module in target.named_modules():
        if type(module).__module__.startswith("torch.ao.nn.quantized.dynamic"):
            raise UnsupportedModelError(
                f"{where} of {name} is dynamically quantised with one scale for all rows of a forward, so a draft would change "
                "what the target says; use a quantisation of the weights alone, or model.generate"
            )
    return target


def adapter_state(model: nn.Module) -> Hashable:
    """Equal as long as a model has the same adapters, in the same state. Weights may change: they are shared."""
    return tuple(
        (
            name,
            tuple((key, repr(vars(module)[key])) for key in _ADAPTER_STATE if key in vars(module)),
            len(list(module.parameters())),
        )
        for name, module in model.named_modules()
        if type(module).__module__.startswith("peft.")
    )
