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


def explain(model: PreTrainedModel, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]) -> Divergence | None:
    """The first divergence of two continuations of a prompt, None where there is none."""
    return Margins(model).explain(prompt, ours, theirs)


class Margins:
    """Explains differences between a model's outputs as `explain` does, for less where several are compared with one text."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        # Of the text measured last: a forward for each of its tokens is most of the work, and its logits are large.
        self._last: tuple[Sequence[int], Sequence[int], torch.Tensor, float] | None = None

    def explain(self, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]) -> Divergence | None:
        """The first divergence of two continuations of a prompt, None where there is none."""
        place = first_difference(ours, theirs)
        if place is None:
            return None
        if self._last is None or self._last[:2] != (prompt, theirs):
            self._last = (prompt, theirs, *_rounding(self._model, prompt, theirs))
        _, _, single, noise = self._last
        pair = single[place][[ours[place], theirs[place]]]
        return Divergence(place, float((pair[0] - pair[1]).abs()), noise)


@torch.no_grad()
def _rounding(model: PreTrainedModel, prompt: Sequence[int], text: Sequence[int]) -> tuple[torch.Tensor, float]:
    """[T, V] fp32 logits of the one-row path over a continuation, and `Divergence.noise`."""
    whole = torch.tensor([[*prompt, *text]], device=model.device)
    single = _one_row_logits(model, whole, len(prompt))
    many = model(whole).logits[0, len(prompt) - 1 :].float()
    return single, 2 * float((single - many).abs().flatten().quantile(0.999))


def _one_row_logits(model: PreTrainedModel, text: torch.Tensor, start: int) -> torch.Tensor:
    """[T, V] fp32: logits from the prompt's last token on, one token a forward as plain decoding runs them."""
    out = model(text[:, :start], use_cache=True)
    rows, cache = [out.logits[0, -1]], out.past_key_values
    for i in range(start, text.shape[1]):
        out = model(text[:, i : i + 1], past_key_values=cache, use_cache=True)
        rows.append(out.logits[0, -1])
    return torch.stack(rows).float()
