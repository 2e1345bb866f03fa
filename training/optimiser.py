"""AdamW over an objective's groups, with a learning rate that is a function of the step alone."""

from __future__ import annotations

from math import cos, pi
from typing import Any

import torch

from specdec.training.config import OptimConfig
from specdec.training.objectives import Objective


def rate_at(step: int, steps: int, config: OptimConfig) -> float:
    """The share of the peak learning rate in step 0, 1, ..., steps - 1: it rises over the warm-up, then follows the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    left = 1 - done if config.schedule == "linear" else (1 + cos(pi * done)) / 2
    return config.min_rate_share + (1 - config.min_rate_share) * left


def make_optimiser(objective: Objective, config: OptimConfig) -> torch.optim.AdamW:
    """One torch group for the matrices of each group of the objective, which decay, and one for its vectors, which do not."""
    groups: list[dict[str, Any]] = []
    for number, (named, factor) in enumerate(objective.groups()):
        for decays in (True, False):
            own = [p for _, p in named if (p.dim() > 1) is decays]
            if own:
                decay = config.weight_decay if decays else 0.0
                groups.append({"params": own, "weight_decay": decay, "number": number, "factor": factor})
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))


def set_rates(optimiser: Any, objective: Objective, step: int, steps: int, config: OptimConfig) -> None:
    """Rates of this step. Groups that do not learn in it lose their gradients, so that nothing of them changes."""
    share = rate_at(step, steps, config)
    for group in optimiser.param_groups:
        group["lr"] = config.learning_rate * group["factor"] * share
        if not objective.learns(group["number"], step):
            for parameter in group["params"]:
                parameter.grad = None
