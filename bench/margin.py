"""Is a difference between two half-precision outputs a rounding matter? The gap of the logits against measured noise.

A forward over many rows and one over a single row round differently. Where two outputs first differ, the gap between the
two tokens' logits is compared with that noise, measured on the same text through transformers' own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first place where two outputs differ. gap: between the two tokens' logits in the one-row path.

    noise: twice the 99.9th percentile of |one-row - many-row| logits over the whole text, the threshold.
    """

    place: int
    gap: float
    noise: float

    @property
    def within(self) -> bool:
        """Rounding explains the difference."""
        return self.gap <= self.noise


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Where two sequences first differ; None where one is the beginning of the other."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)


@torch.no_grad()
def explain(model: PreTrainedModel, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]) -> Divergence | None:
    """The first divergence of two continuations of a prompt, None where there is none."""
    place = first_difference(ours, theirs)
    if place is None:
        return None
    text = torch.tensor([[*prompt, *theirs]], device=model.device)
    single = _one_row_logits(model, text, len(prompt))
    many = model(text).logits[0, len(prompt) - 1 :].float()
    noise = 2 * float((single - many).abs().flatten().quantile(0.999))
    pair = single[place][[ours[place], theirs[place]]]
    return Divergence(place, float((pair[0] - pair[1]).abs()), noise)


def _one_row_logits(model: PreTrainedModel, text: torch.Tensor, start: int) -> torch.Tensor:
    """[T, V] fp32: logits from the prompt's last token on, one token a forward as plain decoding runs them."""
    out = model(text[:, :start], use_cache=True)
    rows, cache = [out.logits[0, -1]], out.past_key_values
    for i in range(start, text.shape[1]):
        out = model(text[:, i : i + 1], past_key_values=cache, use_cache=True)
        rows.append(out.logits[0, -1])
    return torch.stack(rows).float()
