"""PARD: a small causal LM with a mask token drafts several tokens in one forward."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from specdec.drafters.base import DraftSetup
from specdec.drafters.cached import CachedTexts, draft_options
from specdec.drafters.slots import Shape, SlotDrafts, checked_shape
from specdec.errors import SpecDecError
from specdec.kernels.transfer import on_device
from specdec.loading import load_model
from specdec.rows import chain_rows
from specdec.runner import ModelRunner, RunnerOptions
from specdec.types import Budget, Committed, Draft

# Where a checkpoint says which token is the mask, in the order in which others look.
MASK_FIELDS = ("mask_token_id", "pard_token", "ptd_token_id")


class PardDrafter:
    """A small causal LM that was trained to predict K tokens at once behind K - 1 mask tokens (PARD, arXiv 2504.18583).

    A round is one forward over the tokens committed since the last one and the masks. The cache holds committed tokens only:
    masks are written behind them and forgotten, so full acceptance, no acceptance and rounds without a draft are one case.
    K is the budget's depth and may exceed what was trained. It needs nothing of the target but its vocabulary.
    """

    name = "pard"
    taps: tuple[str, ...] = ()

    def __init__(
        self, model: nn.Module, mask_token: int | None = None, *, shape: Shape = "chain", options: RunnerOptions | None = None
    ) -> None:
        """model: left as it was found.  mask_token: None takes it from the model's config.

        shape: "tree" takes the likeliest paths by the product of the places' laws; it is deterministic and serves every
        rule but rejection.
        """
        self.shape, self.laws = checked_shape(shape)
        self.mask_token = mask_token_of(model, mask_token)
        self.runner = ModelRunner(model, options=options or draft_options(model))
        self.vocabulary = self.runner.vocabulary
        self._texts = CachedTexts(self.runner, "PARD model")

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, shape: Shape = "chain", device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> PardDrafter:
        """From a transformers checkpoint whose config.json names its mask token as `pard_token`, `mask_token_id` or `ptd_token_id`.

        Raises CheckpointError for what cannot be loaded, see `load_model`, and SpecDecError without such a field.
        """
        return cls(load_model(path, dtype=dtype, device=device), shape=shape)

    def begin(self, prompts: tuple[tuple[int, ...], ...], setup: DraftSetup) -> None:
        """Start a batch; see `Drafter.begin`. Raises when the vocabulary or device is not the target's."""
        self._texts.begin(prompts, setup)
        self._slots = SlotDrafts(setup, self.shape, len(prompts))

    def propose(self, budget: Budget) -> Draft:
        """A chain or tree for budget.requests; see `Drafter.propose`."""
        self._texts.arrange(budget.requests)
        roots = self._texts.roots(budget.requests)
        counts = tuple(map(min, budget.nodes, budget.depth))
        if not max(counts) or not self._texts.has_room(budget.requests, max(counts)):
            return self._slots.nothing(roots)
        logits = self._forward(budget.requests, counts)
        budget = replace(budget, depth=counts)
        if self.shape == "tree":
            return self._slots.tree(roots, logits, budget)
        return self._slots.chain(roots, logits, budget, tuple(self.runner.cache.lengths))

    def commit(self, committed: Committed) -> None:
        """Take in what the round added to the text."""
        self._texts.commit(committed)

    def _forward(self, requests: tuple[int, ...], counts: tuple[int, ...]) -> Tensor:
        """[B, K, V]: the logits of each request's places; behind counts[b] they repeat. Committed tokens stay in the cache."""
        cache = self.runner.cache
        pending = self._texts.pending(requests, counts)
        ends = [n + len(text) for n, text in zip(cache.lengths, pending, strict=True)]
        masks = [[self.mask_token] * (count - 1) for count in counts]
        rows = chain_rows(cache, [text + mask for text, mask in zip(pending, masks, strict=True)])
        logits = self.runner.forward(rows)[0]
        cache.lengths = ends
        if len(counts) == 1:
            return logits[None, -counts[0] :]
        index, start = [], 0
        for text, mask in zip(pending, masks, strict=True):
            first = start + len(text) - 1
            index.append([first + min(k, len(mask)) for k in range(max(counts))])
            start += len(text) + len(mask)
        return logits[on_device(index, logits.device)]


def mask_token_of(model: nn.Module, mask_token: int | None = None) -> int:
    """The mask token of a model: the given one, or the one that its config names. Raises where there is none, or no such token."""
    config = getattr(model, "config", None)
    found = mask_token
    for field in MASK_FIELDS:
        found = getattr(config, field, None) if found is None else found
    if found is None:
        raise SpecDecError(
            f"{type(model).__name__} names no mask token: its config has none of {', '.join(MASK_FIELDS)}; pass mask_token="
        )
    vocabulary = config.get_text_config().vocab_size if config is not None else 0
    if not isinstance(found, int) or not 0 <= found < vocabulary:
        raise SpecDecError(f"mask token {found!r}: give one of the model's {vocabulary} tokens, 0 to {vocabulary - 1}")
    return found
