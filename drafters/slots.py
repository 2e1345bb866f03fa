"""Drafts whose places ahead were predicted at once, none given the others: what Medusa heads and PARD share."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from specdec.drafters.base import DraftSetup
from specdec.drafters.chains import CHAIN_LAWS, ChainDrafts, SlotWatch, known_of
from specdec.errors import SpecDecError
from specdec.trees.layout import depths
from specdec.trees.product import ProductTrees, host_product_tree
from specdec.types import Budget, Draft, Law, SlotStats, TokenTree

Shape = Literal["chain", "tree"]


def checked_shape(shape: Shape) -> tuple[Shape, frozenset[Law]]:
    """The shape and the laws that it can be drawn by; raises for another word."""
    if shape not in ("chain", "tree"):
        raise SpecDecError(f"shape={shape!r}: allowed are 'chain' and 'tree'")
    return shape, CHAIN_LAWS if shape == "chain" else frozenset({Law.DETERMINISTIC})


def tree_slots(logits: Tensor, tree: TokenTree) -> SlotStats:
    """Of the nodes of a tree whose places were predicted at once. logits: [B, K, V], by depth."""
    q = logits.float().softmax(-1)
    known = known_of(q)
    places = (depths(tree.parents)[:, 1:] - 1).clamp(min=0)
    drawn = q.flatten(1).gather(1, places * q.shape[-1] + tree.tokens[:, 1:])
    return SlotStats(known[..., 0].gather(1, places), known[..., 1].gather(1, places), drawn)


class SlotDrafts:
    """Drafts where the K places ahead were predicted at once, none given the others.

    The law of a place does not depend on what is drawn before it, and yet is the law of its draw given the text: so chain
    rejection with it is exact. A chain is drawn by the law of the call, a tree is the product of the marginals.
    """

    def __init__(self, setup: DraftSetup, shape: Shape, num_requests: int) -> None:
        """For one call of `generate`."""
        self._chains = ChainDrafts(setup, checked_shape(shape)[1], num_requests)
        self.law, self.nothing = self._chains.law, self._chains.nothing
        self._product = ProductTrees()

    def chain(self, roots: Tensor, logits: Tensor, budget: Budget, lengths: tuple[int, ...]) -> Draft:
        """Chains for budget.requests. roots: [B, 1].  logits: [B, K, V].  lengths: committed tokens, the root included."""
        if self.law is not Law.DETERMINISTIC:
            draws = self._chains.draws(budget.requests, lengths)
            return self._chains.drawn(roots, lambda drafted: logits[:, len(drafted)], draws, budget, logits.shape[1])
        watch = SlotWatch(budget, logits.shape[1])
        logits = logits[:, : max(watch.counts)]
        drafted = logits.argmax(-1).split(1, 1)
        watch.likeliest(logits)
        return self._chains.known(roots, drafted, watch.counts, watch.stats())

    def tree(self, roots: Tensor, logits: Tensor, budget: Budget) -> Draft:
        """The likeliest paths by the product of marginals; `stop` is for chains. roots: [B, 1].  logits: [B, K, V]."""
        logits = logits.float()
        values, tokens = logits.topk(min(max(budget.width), logits.shape[-1]), dim=-1)
        log_probs = values - logits.logsumexp(-1, keepdim=True)
        build = host_product_tree if logits.device.type == "cpu" else self._product.build
        tree = build(roots[:, 0], log_probs, tokens, budget.nodes, budget.depth, budget.width)
        return Draft(tree, Law.DETERMINISTIC, slots=tree_slots(logits, tree) if budget.slots else None)
