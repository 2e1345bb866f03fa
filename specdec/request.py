"""What `generate` can be asked for: checks that name what came, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from specdec.errors import InvalidRequestError

# What transformers puts into model_kwargs by itself, and we do without.
_OWN_WAY = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "past_key_values"}
_ASSISTED = ("assistant_model", "assistant_tokenizer", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of `generate` that would change what the model computes, before anything is prepared."""
    for name in _ASSISTED:
        if arguments.get(name) not in (None, False):
            raise InvalidRequestError(f"{name} is transformers' own speculation; give the drafter to SpeculativeGenerator")
    for name in ("inputs_embeds", "past_key_values", "negative_prompt_ids", "negative_prompt_attention_mask"):
        if arguments.get(name) is not None:
            raise InvalidRequestError(f"{name} is not supported; give the whole prompt as input_ids")
    if arguments.get("synced_gpus"):
        raise InvalidRequestError("synced_gpus is not supported: the target must be whole in this process")
    if arguments.get("custom_generate") is not None:
        raise InvalidRequestError("custom_generate is what this generator replaces; leave it out")
    inputs = arguments.get("inputs") if arguments.get("inputs") is not None else arguments.get("input_ids")
    if inputs is not None and (not isinstance(inputs, Tensor) or inputs.dim() != 2):
        raise InvalidRequestError("input_ids must be a tensor [batch, length]; tokenizers give one with return_tensors='pt'")
    if inputs is not None and inputs.numel() == 0:
        raise InvalidRequestError("the prompt is empty; give one token or more, for instance the start-of-text token")


def check_config(config: GenerationConfig) -> None:
    """Refuse ways of decoding other than greedy and sampling."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InvalidRequestError(
            f"{mode.value} is not supported; only greedy decoding and sampling are (num_beams=1, no assistant)"
        )
    if config.guidance_scale not in (None, 1, 1.0):
        raise InvalidRequestError("guidance_scale needs a second forward of the model for every token; leave it out")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise InvalidRequestError(f"{name}: a tree's forward has no such output per token; run the model on the result")


def check_model_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Refuse inputs of the model's forward that this runtime would ignore."""
    extra = sorted(name for name, value in kwargs.items() if name not in _OWN_WAY and value is not None)
    if extra:
        raise InvalidRequestError(f"{', '.join(extra)}: not supported; prompts are given by input_ids and attention_mask")
    if getattr(kwargs.get("past_key_values"), "_is_user_defined", False):
        raise InvalidRequestError("past_key_values is not supported; give the whole prompt as input_ids")


def prompts_of(input_ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> tuple[tuple[int, ...], ...]:
    """The prompts without their left pads. input_ids, mask: [B, length].  positions: what the mask implies."""
    if input_ids.is_floating_point() or input_ids.dim() != 2:
        raise InvalidRequestError(
            f"input_ids of {input_ids.dtype} and shape {tuple(input_ids.shape)}; give token ids as integers, [batch, length]"
        )
    if mask is None:
        mask = torch.ones_like(input_ids)
    if mask.shape != input_ids.shape:
        raise InvalidRequestError(f"attention_mask is {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}; they must agree")
    if positions is not None:
        expected = (mask.long().cumsum(-1) - 1).to(positions.device)
        if positions.shape != expected.shape or bool(((positions != expected) & (mask != 0).to(positions.device)).any()):
            raise InvalidRequestError("position_ids must count the tokens that attention_mask keeps; leave them out")
    prompts = []
    for request, (row, keep) in enumerate(zip(input_ids.tolist(), mask.tolist(), strict=True)):
        pads = keep.index(1) if 1 in keep else len(keep)
        if pads == len(keep):
            raise InvalidRequestError(f"the prompt of request {request} is empty: attention_mask keeps no token of it")
        if any(k != 1 for k in keep[pads:]):
            raise InvalidRequestError(
                f"the attention_mask of request {request} has zeros behind its first token; pad on the left only"
            )
        prompts.append(tuple(row[pads:]))
    return tuple(prompts)


def check_prompts(prompts: tuple[tuple[int, ...], ...], vocabulary: int) -> None:
    """Refuse token ids that the model has no embedding for."""
    for request, prompt in enumerate(prompts):
        outside = [token for token in prompt if not 0 <= token < vocabulary]
        if outside:
            raise InvalidRequestError(
                f"request {request} has token id {outside[0]}, the vocabulary has 0 to {vocabulary - 1}; "
                "use the target's own tokenizer"
            )


def check_lengths(prompts: tuple[tuple[int, ...], ...], room: tuple[int, ...], most: int | None) -> None:
    """Refuse requests that could run past the model's positions. most: None where the model has no such limit."""
    for request, (prompt, new) in enumerate(zip(prompts, room, strict=True)):
        if most is not None and len(prompt) + new > most:
            raise InvalidRequestError(
                f"request {request} has {len(prompt)} prompt tokens and asks for up to {new} more; the model has "
                f"{most} positions: shorten the prompt or lower max_new_tokens"
            )
