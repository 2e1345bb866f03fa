"""The drafter protocol: begin, propose, commit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from specdec.noise import Noise
from specdec.types import Budget, Committed, Draft, Law

# One entry per row: (request, the tokens after the committed text on that row's own path).
Paths = Callable[[], list[tuple[int, tuple[int, ...]]]]


@dataclass(frozen=True, slots=True)
class DraftSampling:
    """How drafted tokens are drawn when the target samples.

    process: logits [R, V] and the rows' paths to processed logits [R, V], the same processing that the target's
    logits get, so that q is the law of the draw.  noise: the call's counter-based noise.
    """

    process: Callable[[Tensor, Paths], Tensor]
    noise: Noise


@dataclass(frozen=True, slots=True)
class DraftSetup:
    """What a drafter is told when a call of `generate` begins.

    capacity: most committed tokens a request can reach.  law: the law that the rule of this call verifies;
    a drafter whose tokens are deterministic ignores it.  sampling: None when the target decodes greedily.
    vocabulary: the target's vocabulary size.
    """

    device: torch.device
    vocabulary: int
    capacity: int
    law: Law
    sampling: DraftSampling | None = None


@runtime_checkable
class Drafter(Protocol):
    """Proposes token trees. Its state is a function of the committed tokens and taps, nothing else.

    After `commit` the state equals the state rebuilt by `begin` on the whole text, for every accepted length, and
    also when `propose` was not called in between. laws: what the drafter can draw by.  shape: "chain" or "tree".
    taps: names of the target's hidden states that `commit` needs, usually none.
    """

    name: str
    laws: frozenset[Law]
    shape: Literal["chain", "tree"]
    taps: tuple[str, ...]

    def begin(self, prompts: tuple[tuple[int, ...], ...], setup: DraftSetup) -> None:
        """Start a batch: prompts[slot] are the committed tokens of each request, one or more, without padding."""

    def propose(self, budget: Budget) -> Draft:
        """A draft for budget.requests, in that order; row i of the tree is budget.requests[i].

        May propose fewer nodes than the budget allows, never more; none is a tree of one node.
        """

    def commit(self, committed: Committed) -> None:
        """Take in what the round added to the text."""
