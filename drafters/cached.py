"""What drafters share that run a small causal LM with a cache of its own: the texts of a batch, and a cache that follows them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from specdec.drafters.base import DraftSetup
from specdec.errors import SpecDecError, VocabularyMismatchError
from specdec.kernels.transfer import on_device
from specdec.linear import cpu_has_fast_bf16
from specdec.runner import ModelRunner, RunnerOptions
from specdec.types import Committed

# Tokens behind which a request is taken in without logits before it drafts.
_MANY = 16


class CachedTexts:
    """The committed text of every request, and a runner whose cache holds committed tokens only.

    What was drafted is forgotten, and the first forward of a round takes in all tokens committed since, whether drafted,
    recovered or bonus. So full acceptance, no acceptance and rounds without a draft are one case.
    """

    def __init__(self, runner: ModelRunner, what: str) -> None:
        """what: the model's name in errors."""
        self._runner, self._what = runner, what
        self._texts: list[list[int]] = []
        self._order: list[int] = []

    def begin(self, prompts: tuple[tuple[int, ...], ...], setup: DraftSetup) -> None:
        """Start a batch; see `Drafter.begin`. Raises when the vocabulary or device is not the target's."""
        runner, what = self._runner, self._what
        if setup.vocabulary != runner.vocabulary:
            raise VocabularyMismatchError(
                f"the {what} has {runner.vocabulary} tokens, the target {setup.vocabulary}; use a draft of the same "
                "family, or specdec.VocabMap with both tokenizers"
            )
        if setup.device != runner.device:
            raise SpecDecError(f"the {what} is on {runner.device}, the target on {setup.device}; move one of them")
        self._texts = [list(prompt) for prompt in prompts]
        self._order = list(range(len(prompts)))
        runner.begin(len(prompts), setup.capacity)

    def arrange(self, requests: tuple[int, ...]) -> None:
        """Put the cache's rows in the order of the round; requests that ended leave the cache."""
        if tuple(self._order) != requests:
            self._runner.cache.arrange([self._order.index(r) for r in requests])
            self._order = list(requests)

    def roots(self, requests: Sequence[int]) -> Tensor:
        """[B, 1] int64: the last committed token of each."""
        return on_device([self._texts[r][-1:] for r in requests], self._runner.device)

    def has_room(self, requests: Sequence[int], depth: int) -> bool:
        """Whether the model has positions for so many tokens behind each text."""
        limit = self._runner.max_positions
        return limit is None or max([len(self._texts[r]) for r in requests]) + depth <= limit

    def pending(self, requests: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
        """The tokens committed since the last forward, one or more a request; what was drafted leaves the cache.

        Many of them, the prompt to begin with, are taken in first, but for the last: a call that never drafts pays for no prompt.
        Of a request that is to draft nothing it is one token, since a forward has a row for each; what is drafted behind that means
        nothing, and the rest of its text waits until it drafts. counts: tokens that each request drafts.
        """
        cache = self._runner.cache
        cache.lengths = [min(n, len(self._texts[r]) - 1) for n, r in zip(cache.lengths, requests, strict=True)]
        late = [self._texts[r][n:-1] if count else [] for n, r, count in zip(cache.lengths, requests, counts, strict=True)]
        if max(map(len, late)) > _MANY:
            self._runner.prefill(late)
        ends = [None if count else n + 1 for n, count in zip(cache.lengths, counts, strict=True)]
        return [self._texts[r][n:end] for n, r, end in zip(cache.lengths, requests, ends, strict=True)]

    def commit(self, committed: Committed) -> None:
        """Take in what the round added to the text."""
        for request, tokens in zip(committed.requests, committed.tokens, strict=True):
            self._texts[request].extend(tokens)


def draft_options(model: nn.Module) -> RunnerOptions:
    """A half-precision draft on a CPU without fast bf16 runs in fp32: its rounding is free, and casts cost more than products."""
    weights = [p for p in model.parameters() if p.is_floating_point()]
    slow = any(p.dtype in (torch.bfloat16, torch.float16) for p in weights) and not cpu_has_fast_bf16()
    small = sum(p.numel() for p in weights) * 4 <= RunnerOptions().pack_limit_bytes
    on_cpu = all(p.device.type == "cpu" for p in weights)
    return RunnerOptions(compute=torch.float32 if slow and small and on_cpu else None, row_invariant=False, trust_captures=True)
