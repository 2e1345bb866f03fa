"""What the tests of `generate` share: a ragged batch, a generator on it, and a processor that keeps state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from specdec.generator import SpeculativeGenerator
from tests.support_models import VOCABULARY, left_padded, noised, prompts

INPUTS = left_padded(prompts((9, 3, 14, 1)))
# Tokens that end some of those texts early.
ENDS = [5, 8, 13, 21, 34, 55]


def generator_of(model: Any) -> SpeculativeGenerator:
    """Two tokens a round, by a draft that is often right."""
    return SpeculativeGenerator(model, noised(model, 0.1), planner=2)


class Counting(LogitsProcessor):
    """Each call forbids the token of its number; nothing says that it keeps state."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.calls * 7 % VOCABULARY] = -torch.inf
        scores[:, (input_ids[:, -1] + self.calls) % VOCABULARY] += 3.0
        self.calls += 1
        return scores
