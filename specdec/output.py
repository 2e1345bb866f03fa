"""The result of a call in the form that transformers gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.engine import Result
from specdec.errors import InvalidRequestError
from specdec.metrics import SpeculationStats


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` and what speculation did.

    scores, logits: as HF gives them, one [B, V] fp32 tensor a step; where a request has finished its row is zeros.
    attentions, hidden_states: from one forward of the model over the finished text, cut into HF's steps.
    past_key_values: the cache of the text without its last token, unless use_cache=False.
    """

    speculation: SpeculationStats | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """Which of a model's inner values are to be in the result. windows: of each layer, None where it sees everything.

    cached: whether a step is one token, as with a cache, or the whole text up to it.
    """

    hidden_states: bool
    attentions: bool
    windows: tuple[int | None, ...]
    cached: bool = True


def asked_of(config: GenerationConfig, input_ids: Tensor, mask: Tensor, windows: tuple[int | None, ...]) -> Asked | None:
    """What the configuration asks for, None for nothing. mask: of the whole text, which must be known for it."""
    names = ("output_hidden_states", "output_attentions")
    states, attentions = (bool(config.return_dict_in_generate and getattr(config, name)) for name in names)
    if not (states or attentions):
        return None
    if mask.shape != input_ids.shape:
        raise InvalidRequestError(
            f"{names[not states]} cannot be had for new tokens alone behind past_key_values; give the whole text as input_ids"
        )
    return Asked(states, attentions, windows, cached=config.use_cache is not False)


def padded(input_ids: Tensor, tokens: Sequence[Sequence[int]], pad: int, total: int | None) -> Tensor:
    """Prompts and new tokens [B, length]; finished requests go on with pads. total: new tokens, None for those of the longest."""
    longest = max(map(len, tokens))
    steps = longest if total is None else min(total, longest)
    new = [[*own[:steps], *[pad] * (steps - len(own))] for own in tokens]
    return torch.cat((input_ids, input_ids.new_tensor(new).view(len(new), steps)), 1)


def by_step(rows: tuple[tuple[Tensor, ...], ...] | None, steps: int) -> tuple[Tensor, ...] | None:
    """One [B, V] tensor a step from one [V] tensor a request and token."""
    if rows is None:
        return None
    nothing = torch.zeros_like(next(own[0] for own in rows if own))
    return tuple(torch.stack([own[step] if step < len(own) else nothing for own in rows]) for step in range(steps))


def output_of(sequences: Tensor, result: Result, steps: int, cache: Any, inner: Mapping[str, Any]) -> SpeculativeOutput:
    """The result with everything that was kept. steps: new tokens of the longest request.  inner: see `inner_values`."""
    fields: dict[str, Any] = {
        "sequences": sequences,
        "scores": by_step(result.scores, steps),
        "logits": by_step(result.logits, steps),
        "past_key_values": cache,
        "speculation": result.stats,
        **inner,
    }
    return SpeculativeOutput(**fields)


@torch.no_grad()
def inner_values(model: Any, sequences: Tensor, mask: Tensor, past: int, asked: Asked) -> dict[str, Any]:
    """hidden_states and attentions, as asked, of every step: one forward of the user's model over all tokens but the last.

    sequences: [B, length].  mask: [B, prompt length].  past: leading tokens that came in a cache, which the first step leaves out.
    """
    first = mask.shape[1]
    text = sequences[:, :-1]
    full = torch.cat((mask, mask.new_ones(len(text), text.shape[1] - first)), 1)
    positions = (full.long().cumsum(-1) - 1).clamp(min=0)
    out = model(
        input_ids=text,
        attention_mask=full,
        position_ids=positions,
        use_cache=False,
        output_hidden_states=asked.hidden_states,
        output_attentions=asked.attentions,
        return_dict=True,
    )
    steps = [(past, first), *((end - 1 if asked.cached else 0, end) for end in range(first + 1, text.shape[1] + 1))]
    values: dict[str, Any] = {}
    if asked.hidden_states:
        values["hidden_states"] = tuple(tuple(h[:, a:b] for h in out.hidden_states) for a, b in steps)
    if asked.attentions:
        layers = tuple(zip(out.attentions, asked.windows, strict=True))
        values["attentions"] = tuple(tuple(_seen(weights, a, b, window) for weights, window in layers) for a, b in steps)
    return values


def _seen(weights: Tensor, begin: int, end: int, window: int | None) -> Tensor:
    """The rows of one step, over the keys that HF's cache has then: all, or in a decoding step those of the window."""
    oldest = 0 if window is None else max(0, begin - window + 1)
    return weights[:, :, begin:end, oldest:end]
