"""How well a drafter does on held-out rows: its loss, and tokens a round with the decoder that users run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specdec import FixedPlanner, SpeculativeGenerator
from specdec.drafters.base import Drafter
from specdec.training.data import Example
from specdec.training.objectives import Objective
from specdec.training.packing import PackedRows, in_order


@dataclass(frozen=True, slots=True)
class Decoded:
    """Greedy decoding of some prompts. acceptance_length: tokens of a round, the bonus token included."""

    acceptance_length: float
    acceptance_rate: float
    rounds: int


def decode(target: Any, drafter: Drafter, prompts: Sequence[Sequence[int]], *, new_tokens: int, nodes: int) -> Decoded:
    """The real decoder on these prompts, one after the other."""
    generator = SpeculativeGenerator(target, drafter, planner=FixedPlanner(nodes=nodes, depth=nodes))
    rounds = drafted = accepted = 0
    device = next(target.parameters()).device
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=device)
        generator.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        stats = generator.stats
        assert stats is not None
        rounds, drafted, accepted = rounds + stats.rounds, drafted + stats.drafted, accepted + stats.accepted
    return Decoded(1 + accepted / max(rounds, 1), accepted / max(drafted, 1), rounds)


def prompts_of(examples: Sequence[Example], count: int, longest: int = 256, of_text: int = 32) -> list[list[int]]:
    """What each row asks, up to the first token that is trained on; of plain text the first tokens. Long ones are left out."""
    found: list[list[int]] = []
    for example in examples:
        first = int(example.loss_mask.argmax())
        prompt = example.ids[: first if first > 1 else of_text].tolist()
        if 1 < len(prompt) <= longest and len(found) < count:
            found.append(prompt)
    return found


@torch.no_grad()
def held_out_loss(objective: Any, rows: PackedRows, batch: int, seed: int, device: torch.device) -> tuple[float, list[float]]:
    """Loss over all held-out rows, and the mean of each slot. objective: an `Objective`."""
    total, weights, sums = 0.0, 0.0, torch.zeros(2, len(objective.slots))
    for number, part in enumerate(in_order(rows, batch)):
        generator = torch.Generator(device).manual_seed(seed + number)
        micro = objective.prepare(part.to(device), generator)
        figures = objective(micro, torch.ones((), device=device))
        total, weights = total + float(figures.loss), weights + float(micro.weight)
        sums += torch.stack((figures.per_slot, figures.counts)).cpu()
    return total / max(weights, 1.0), (sums[0] / sums[1].clamp(min=1)).tolist()


def nodes_of(objective: Objective) -> int:
    """Tokens to draft in evaluation: one a slot, and 4 for a draft that goes token by token."""
    return len(objective.slots) if len(objective.slots) > 1 else 4
