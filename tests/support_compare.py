"""Comparing speculative output with transformers' own, with ties excused only where they are ties."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from specdec.planner import FixedPlanner
from specdec.types import Budget, Draft, Load, RoundStats

# A top-2 gap under this share of the logits' deviation is a tie in fp32: either token is the argmax.
TIE = 1e-5


@dataclass
class RecordingPlanner:
    """A fixed planner that remembers every round."""

    fixed: FixedPlanner
    rounds: list[RoundStats] = field(default_factory=list)
    post_draw: bool = False

    def plan(self, load: Load) -> Budget:
        return self.fixed.plan(load)

    def select(self, draft: Draft) -> Draft:
        return draft

    def observe(self, stats: RoundStats) -> None:
        self.rounds.append(stats)

    def accepted_lengths(self) -> set[int]:
        return {n for r in self.rounds for n in r.accepted}

    def acceptance(self) -> float:
        """Share of rounds' first drafted tokens that were accepted, over rounds that drafted."""
        tried = [n for r in self.rounds for n, d in zip(r.accepted, r.drafted, strict=True) if d]
        return sum(n > 0 for n in tried) / max(1, len(tried))


class Negated(nn.Module):
    """An output head whose most likely token is the least likely one."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = -self.head(x)
        return out


def assert_same_greedy(model: nn.Module, inputs: dict[str, Tensor], ours: Tensor, theirs: Tensor) -> int:
    """Equal sequences, or different only behind a tie of the target's logits; returns the number of ties excused."""
    ties = 0
    for row in range(theirs.shape[0]):
        width = min(ours.shape[1], theirs.shape[1])
        differs = (ours[row, :width] != theirs[row, :width]).nonzero()
        if not len(differs) and ours.shape == theirs.shape:
            continue
        assert len(differs), f"lengths differ: {ours.shape[1]} and {theirs.shape[1]}"
        place = int(differs[0])
        keep = int(inputs["attention_mask"][row].sum())
        text = theirs[row, inputs["input_ids"].shape[1] - keep : place][None]
        with torch.no_grad():
            logits: Any = model(text).logits[0, -1]
        top = logits.topk(2).values
        gap = float((top[0] - top[1]) / logits.std())
        assert gap < TIE, f"row {row} differs at {place}: {ours[row, place]} for {theirs[row, place]}, gap {gap:.2e}"
        ties += 1
    if ties:
        print(f"{ties} tie(s) excused")
    return ties
