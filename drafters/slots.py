"""Drafts whose places ahead were predicted at once, none given the others: what Medusa heads and PARD share."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from specdec.drafters.base import DraftSetup
from specdec.errors import SpecDecError
from specdec.kernels.transfer import on_device
from specdec.noise import Stream
from specdec.trees.chain import chain_tree
from specdec.trees.layout import chain_parents
from specdec.trees.product import ProductTrees, host_product_tree
from specdec.types import Budget, Draft, Law
from specdec.verify.chooser import NoiseChooser
from specdec.verify.coupled import coupled_pick

Shape = Literal["chain", "tree"]
CHAIN_LAWS = frozenset({Law.DETERMINISTIC, Law.INDEPENDENT, Law.COUPLED})


def checked_shape(shape: Shape) -> tuple[Shape, frozenset[Law]]:
    """The shape and the laws that it can be drawn by; raises for another word."""
    if shape not in ("chain", "tree"):
        raise SpecDecError(f"shape={shape!r}: allowed are 'chain' and 'tree'")
    return shape, CHAIN_LAWS if shape == "chain" else frozenset({Law.DETERMINISTIC})


def drafted_paths(slots: tuple[int, ...], drafted: list[Tensor]) -> list[tuple[int, tuple[int, ...]]]:
    """Each row's request and the tokens drafted for it so far, as `Paths` gives them. drafted: [B, 1] each."""
    rows = torch.cat(drafted, 1).tolist() if drafted else [[] for _ in slots]
    return [(slot, tuple(row)) for slot, row in zip(slots, rows, strict=True)]


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
            processed = sampling.process(logits[:, k], lambda: drafted_paths(slots, drafted))
            if self.law is Law.COUPLED:
                token = coupled_pick(sampling.noise, requests, starts + k, processed)
            else:
                laws.append(processed.softmax(-1))
                token = chooser.pick(laws[-1])
            drafted.append(token[:, None])
        return drafted, laws
