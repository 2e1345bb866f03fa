"""What `generate` can be asked for: checks that name what came, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from specdec.errors import InvalidRequestError
from specdec.past import length_of

# What transformers puts into model_kwargs by itself, and we do without.
_OWN_WAY = {
    *("attention_mask", "position_ids", "use_cache", "logits_to_keep", "past_key_values"),
    *("output_attentions", "output_hidden_states"),
}
_ASSISTED = ("assistant_model", "assistant_tokenizer", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of `generate` that would change what the model computes, before anything is prepared."""
    for name in _ASSISTED:
        if arguments.get(name) not in (None, False):
            raise InvalidRequestError(f"{name} is transformers' own speculation; give the drafter to SpeculativeGenerator")
    if arguments.get("inputs_embeds") is not None:
        raise InvalidRequestError("inputs_embeds is not supported; give the whole prompt as input_ids")
    length_of(arguments.get("past_key_values"))
    if arguments.get("synced_gpus"):
        raise InvalidRequestError("synced_gpus is not supported: the target must be whole in this process")
    if arguments.get("custom_generate") is not None:
        raise InvalidRequestError("custom_generate is what this generator replaces; leave it out")
    inputs = arguments.get("inputs") if arguments.get("inputs") is not None else arguments.get("input_ids")
    if inputs is not None and (not isinstance(inputs, Tensor) or inputs.dim() != 2):
        raise InvalidRequestError("input_ids must be a tensor [batch, length]; tokenizers give one with return_tensors='pt'")
    if inputs is not None and inputs.numel() == 0:
        raise InvalidRequestError("the prompt is empty; give one token or more, for instance the start-of-text token")


def check_defaults(arguments: Mapping[str, Any], *configs: GenerationConfig | None) -> None:
    """Refuse what transformers would do before or instead of the decoding loop. configs: by precedence, behind the arguments."""

    def asked(name: str) -> Any:
        given = [arguments.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in given if value is not None), None)

    if asked("token_healing"):
        raise InvalidRequestError(
            "token_healing makes another prompt; call target.heal_tokens(input_ids, tokenizer) and give its result as input_ids"
        )
    implementation = asked("cache_implementation")
    if implementation not in (None, "dynamic", "dynamic_full", "static", "hybrid", "sliding_window"):
        raise InvalidRequestError(
            f"cache_implementation={implementation!r} is not supported: decoding uses a cache of its own, full and in the target's "
            "dtype; leave it out"
        )


def check_config(config: GenerationConfig) -> None:
    """Refuse ways of decoding other than greedy and sampling."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InvalidRequestError(
            f"{mode.value} is not supported; only greedy decoding and sampling are (num_beams=1, no assistant)"
        )


def check_model_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Refuse inputs of the model's forward that this runtime would ignore."""
    # Models of text and images are handed an empty mapping of encoded images.
    given = {name for name, value in kwargs.items() if value is not None and not (isinstance(value, Mapping) and not value)}
    extra = sorted(given - set(_OWN_WAY))
    if extra:
        raise InvalidRequestError(f"{', '.join(extra)}: not supported; prompts are given by input_ids and attention_mask")


def mask_of(input_ids: Tensor, mask: Tensor | None, past: int, length: int | None) -> Tensor:
    """The attention mask [B, length] of the whole text: ones where none is given.

    input_ids: the whole text, or what is behind the cache.  past: slots that the cache holds.
    length: of a mask that transformers dropped, since it was all ones.
    """
    if mask is None:
        whole = input_ids.shape[1] if past == 0 or length is None else length
        mask = input_ids.new_ones(len(input_ids), whole, dtype=torch.long)
    if len(mask) != len(input_ids) or mask.shape[1] not in (input_ids.shape[1], input_ids.shape[1] + past):
        behind = f", past_key_values holds {past} tokens" if past else ""
        raise InvalidRequestError(
            f"attention_mask is {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}{behind}; they must agree"
        )
    return mask


def prompts_of(input_ids: Tensor, mask: Tensor, positions: Tensor | None) -> tuple[tuple[int, ...], ...]:
    """The prompts without their left pads. mask: [B, length] of `mask_of`.  positions: what the mask implies.

    input_ids: as long as the mask, or its last tokens: those before, which a cache holds and nobody names, are then 0.
    """
    if input_ids.is_floating_point() or input_ids.dim() != 2:
        raise InvalidRequestError(
            f"input_ids of {input_ids.dtype} and shape {tuple(input_ids.shape)}; give token ids as integers, [batch, length]"
        )
    input_ids = torch.cat((input_ids.new_zeros(len(mask), mask.shape[1] - input_ids.shape[1]), input_ids), 1)
    if positions is not None:
        _check_positions(positions, mask)
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


def _check_positions(positions: Tensor, mask: Tensor) -> None:
    """positions: of the whole text, or of its last tokens."""
    counted, kept = (mask.long().cumsum(-1) - 1).to(positions.device), (mask != 0).to(positions.device)
    width = positions.shape[-1]
    fits = positions.dim() == 2 and len(positions) in (1, len(mask)) and 0 < width <= mask.shape[1]
    if not fits or bool(((positions != counted[:, -width:]) & kept[:, -width:]).any()):
        raise InvalidRequestError("position_ids must count the tokens that attention_mask keeps; leave them out")


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


def pad_token(config: GenerationConfig, criteria: StoppingCriteriaList, requests: int) -> int:
    """The pad token, 0 where none is needed: only a batch in which requests end at different steps has use for one."""
    pad = config._pad_token_tensor
    if pad is not None:
        return int(pad)
    if requests > 1 and any(hasattr(c, "eos_token_id") for c in criteria):
        raise InvalidRequestError("a batch with an end-of-sequence criterion needs pad_token_id; set it")
    return 0
