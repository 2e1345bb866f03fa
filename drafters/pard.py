"""Drafts from several places at once: PARD, a small causal LM with a mask token, and what every one-shot drafter shares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from specdec.drafters.base import DraftSetup
from specdec.drafters.draft_model import _draft_options, _paths
from specdec.errors import SpecDecError, VocabularyMismatchError
from specdec.kernels.transfer import on_device
from specdec.loading import load_model
from specdec.noise import Stream
from specdec.rows import chain_rows
from specdec.runner import ModelRunner, RunnerOptions
from specdec.trees.chain import chain_tree
from specdec.trees.layout import chain_parents
from specdec.trees.product import ProductTrees, host_product_tree
from specdec.types import Budget, Committed, Draft, Law
from specdec.verify.chooser import NoiseChooser
from specdec.verify.coupled import coupled_pick

Shape = Literal["chain", "tree"]
CHAIN_LAWS = frozenset({Law.DETERMINISTIC, Law.INDEPENDENT, Law.COUPLED})
# Where a checkpoint says which token is the mask, in the order in which others look.
MASK_FIELDS = ("mask_token_id", "pard_token", "ptd_token_id")


def checked_shape(shape: Shape) -> tuple[Shape, frozenset[Law]]:
    """The shape and the laws that it can be drawn by; raises for another word."""
    if shape not in ("chain", "tree"):
        raise SpecDecError(f"shape={shape!r}: allowed are 'chain' and 'tree'")
    return shape, CHAIN_LAWS if shape == "chain" else frozenset({Law.DETERMINISTIC})


class SlotDrafts:
    """Drafts where the K places ahead were predicted at once, none given the others.

    The law of a place does not depend on what is drawn before it, and yet is the law of its draw given the text: so chain
    rejection with it is exact. A chain is drawn by the law of the call, a tree is the product of the marginals.
    """

    def __init__(self, setup: DraftSetup, shape: Shape, num_requests: int) -> None:
        """For one call of `generate`."""
        self._setup = setup
        self.law = Law.DETERMINISTIC if shape == "tree" or setup.sampling is None else setup.law
        self._line = chain_parents(num_requests, setup.capacity, setup.device)
        self._product = ProductTrees()

    def nothing(self, roots: Tensor) -> Draft:
        """Trees of one node. roots: [B, 1]."""
        return Draft(chain_tree(roots, (), (0,) * roots.shape[0], self._line), self.law)

    def chain(self, roots: Tensor, logits: Tensor, budget: Budget, lengths: tuple[int, ...]) -> Draft:
        """Chains for budget.requests. roots: [B, 1].  logits: [B, K, V].  lengths: committed tokens, the root included."""
        logits = logits[:, : self._unstopped(logits, budget)]
        counts = tuple([min(n, d, logits.shape[1]) for n, d in zip(budget.nodes, budget.depth, strict=True)])
        if not max(counts):
            return self.nothing(roots)
        if self.law is Law.DETERMINISTIC:
            drafted = list(logits.argmax(-1).split(1, 1))
            return Draft(chain_tree(roots, drafted, counts, self._line), self.law)
        drafted, laws = self._drawn(logits[:, : max(counts)], budget.requests, lengths)
        tree = chain_tree(roots, drafted, counts, self._line)
        if self.law is not Law.INDEPENDENT:
            return Draft(tree, self.law)
        laws.append(torch.zeros_like(laws[0]))
        return Draft(tree, self.law, torch.stack(laws, 1))

    def tree(self, roots: Tensor, logits: Tensor, budget: Budget) -> Draft:
        """The likeliest paths by the product of marginals; `stop` is for chains. roots: [B, 1].  logits: [B, K, V]."""
        logits = logits.float()
        values, tokens = logits.topk(min(max(budget.width), logits.shape[-1]), dim=-1)
        log_probs = values - logits.logsumexp(-1, keepdim=True)
        build = host_product_tree if logits.device.type == "cpu" else self._product.build
        return Draft(build(roots[:, 0], log_probs, tokens, budget.nodes, budget.depth, budget.width), Law.DETERMINISTIC)

    @staticmethod
    def _unstopped(logits: Tensor, budget: Budget) -> int:
        """Places before the one at which the budget's rule stops; it is asked about a place before that is drawn."""
        if budget.stop is None:
            return logits.shape[1]
        surest = logits.float().softmax(-1).amax((0, 2)).tolist()
        return next((k for k, value in enumerate(surest) if budget.stop(value)), len(surest))

    def _drawn(self, logits: Tensor, slots: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """Tokens [B, 1] and their processed laws [B, V], place by place: processors may look at the tokens drawn before."""
        sampling = self._setup.sampling
        assert sampling is not None, "greedy chains are deterministic"
        requests, starts = on_device([slots, lengths], self._setup.device)
        chooser = NoiseChooser(sampling.noise, requests, starts, Stream.DRAFT)
        drafted: list[Tensor] = []
        laws: list[Tensor] = []
        for k in range(logits.shape[1]):
            processed = sampling.process(logits[:, k], lambda: _paths(slots, drafted))
            if self.law is Law.COUPLED:
                token = coupled_pick(sampling.noise, requests, starts + k, processed)
            else:
                laws.append(processed.softmax(-1))
                token = chooser.pick(laws[-1])
            drafted.append(token[:, None])
        return drafted, laws


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
        self.runner = ModelRunner(model, options=options or _draft_options(model))
        self.vocabulary = self.runner.vocabulary

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
        if setup.vocabulary != self.vocabulary:
            raise VocabularyMismatchError(
                f"the PARD model has {self.vocabulary} tokens, the target {setup.vocabulary}; use a draft of the same family"
            )
        if setup.device != self.runner.device:
            raise SpecDecError(f"the PARD model is on {self.runner.device}, the target on {setup.device}; move one of them")
        self._slots = SlotDrafts(setup, self.shape, len(prompts))
        self._texts = [list(prompt) for prompt in prompts]
        self._order = list(range(len(prompts)))
        self.runner.begin(len(prompts), setup.capacity)
        self.runner.prefill([prompt[:-1] for prompt in prompts])

    def propose(self, budget: Budget) -> Draft:
        """A chain or tree for budget.requests; see `Drafter.propose`."""
        if tuple(self._order) != budget.requests:
            self.runner.cache.arrange([self._order.index(r) for r in budget.requests])
            self._order = list(budget.requests)
        roots = on_device([self._texts[r][-1:] for r in budget.requests], self.runner.device)
        counts = self._counts(budget)
        if not max(counts):
            return self._slots.nothing(roots)
        logits = self._forward(budget.requests, counts)
        budget = replace(budget, depth=counts)
        if self.shape == "tree":
            return self._slots.tree(roots, logits, budget)
        return self._slots.chain(roots, logits, budget, tuple(self.runner.cache.lengths))

    def commit(self, committed: Committed) -> None:
        """Take in what the round added to the text."""
        for request, tokens in zip(committed.requests, committed.tokens, strict=True):
            self._texts[request].extend(tokens)

    def _counts(self, budget: Budget) -> tuple[int, ...]:
        """Places to predict for each request; none for any where one would leave the model's positions."""
        counts = tuple(map(min, budget.nodes, budget.depth))
        limit = self.runner.max_positions
        longest = max([len(self._texts[r]) for r in budget.requests])
        return counts if limit is None or longest + max(counts) <= limit else (0,) * len(counts)

    def _forward(self, requests: tuple[int, ...], counts: tuple[int, ...]) -> Tensor:
        """[B, K, V]: the logits of each request's places; behind counts[b] they repeat. Committed tokens stay in the cache."""
        cache = self.runner.cache
        ends = [len(self._texts[r]) for r in requests]
        cache.lengths = [min(n, end - 1) for n, end in zip(cache.lengths, ends, strict=True)]
        pending = [self._texts[r][n:] for n, r in zip(cache.lengths, requests, strict=True)]
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
