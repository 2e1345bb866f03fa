"""Drafters to try a planner with: a good one, a weak one, one that knows nothing, and one that is right just long enough."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from specdec import bundled_path
from specdec.drafters.base import DraftSetup
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.types import Budget, Committed, Draft, DrafterTraits, Law

KINDS = ("good", "weak", "random", "adversarial")
# Strength of the weak one's noise, in deviations of each matrix.
_NOISE = 0.35
# The adversary is honest in the first of so many stretches of text, each this many tokens long.
_STRETCHES, _STRETCH = 4, 32


def opponent(kind: str, dtype: torch.dtype) -> Any:
    """A drafter for the bundled target, one of KINDS, the same each time. dtype: of its weights."""
    model = AutoModelForCausalLM.from_pretrained(bundled_path("draft"), dtype=dtype).eval()
    if kind == "good":
        return DraftModelDrafter(model)
    if kind == "adversarial":
        return Adversary(DraftModelDrafter(model))
    return DraftModelDrafter(_spoiled(model, whole=kind == "random"))


@torch.no_grad()
def _spoiled(model: Any, *, whole: bool) -> Any:
    """A copy with noise in its matrices. whole: nothing but noise, of the same size."""
    spoiled, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for weight in spoiled.parameters():
        if weight.ndim == 2:
            noise = torch.randn(weight.shape, generator=generator) * float(weight.float().std())
            weight.copy_(noise if whole else weight.float() + _NOISE * noise)
    return spoiled


class Adversary:
    """Drafts what the inner drafter does for a stretch of text, and then what it does not, so that past success misleads.

    Its state is the inner drafter's and the lengths of the texts. Drafts are deterministic chains.
    """

    name, shape, laws = "adversary", "chain", frozenset({Law.DETERMINISTIC})
    taps: tuple[str, ...] = ()

    def __init__(self, inner: DraftModelDrafter) -> None:
        """inner: begins and commits with this one."""
        self.inner, self.vocabulary, self.runner = inner, inner.vocabulary, inner.runner

    def begin(self, prompts: tuple[tuple[int, ...], ...], setup: DraftSetup) -> None:
        """Start a batch; see `Drafter.begin`."""
        self._lengths = [len(prompt) for prompt in prompts]
        self.inner.begin(prompts, replace(setup, law=Law.DETERMINISTIC, sampling=None))

    def propose(self, budget: Budget) -> Draft:
        """The inner draft, every token of it replaced by its neighbour where this stretch is a lie."""
        draft = self.inner.propose(budget)
        lies = [[(self._lengths[r] // _STRETCH) % _STRETCHES != 0] for r in budget.requests]
        tokens = draft.tree.tokens.clone()
        shift = torch.tensor(lies, dtype=torch.long, device=tokens.device)
        tokens[:, 1:] = (tokens[:, 1:] + shift) % self.vocabulary
        return replace(draft, tree=replace(draft.tree, tokens=tokens))

    def commit(self, committed: Committed) -> None:
        """Take in what the round added to the text."""
        self.inner.commit(committed)
        for request, tokens in zip(committed.requests, committed.tokens, strict=True):
            self._lengths[request] += len(tokens)


class Watched:
    """Lets the target decode plainly and notes, at every token, what the inner drafter would have drafted there.

    drafts[request][length]: the tokens drafted behind a text of that length, wherever the planner asked for a draft.
    """

    def __init__(self, inner: Any, depth: int) -> None:
        """depth: tokens drafted at each place."""
        self.inner, self._depth = inner, depth
        self.name, self.laws, self.shape, self.taps = inner.name, inner.laws, inner.shape, inner.taps
        self.vocabulary, self.runner = inner.vocabulary, inner.runner
        self.traits = (DrafterTraits("", inner.shape),)
        self.drafts: list[dict[int, list[int]]] = []

    def begin(self, prompts: tuple[tuple[int, ...], ...], setup: DraftSetup) -> None:
        """Start a batch; see `Drafter.begin`."""
        self._lengths = [len(prompt) for prompt in prompts]
        self.drafts = [{} for _ in prompts]
        self.inner.begin(prompts, setup)

    def propose(self, budget: Budget) -> Draft:
        """Nothing but the roots."""
        count = len(budget.requests)
        full = replace(budget, nodes=(self._depth,) * count, depth=(self._depth,) * count)
        tokens = self.inner.propose(full).tree.tokens[:, 1:].tolist()
        for request, drafted in zip(budget.requests, tokens, strict=True):
            self.drafts[request][self._lengths[request]] = drafted
        nothing: Draft = self.inner.propose(replace(budget, nodes=(0,) * count, depth=(0,) * count))
        return nothing

    def commit(self, committed: Committed) -> None:
        """Take in what the round added to the text."""
        self.inner.commit(committed)
        for request, tokens in zip(committed.requests, committed.tokens, strict=True):
            self._lengths[request] += len(tokens)
