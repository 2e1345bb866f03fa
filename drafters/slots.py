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
from specdec.trees.layout import chain_parents, depths
from specdec.trees.product import ProductTrees, host_product_tree
from specdec.types import Budget, Draft, Law, SlotStats, TokenTree
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


class SlotWatch:
    """How far each request's chain goes, and what was known of every place: the budget's rule is asked before each draw.

    One object serves one draft. It computes nothing where the budget has no rule and asks for no values. With a rule, every
    place costs one read of [B, 2] numbers, or `likeliest` one read in all.
    """

    def __init__(self, budget: Budget, places: int) -> None:
        """places: most that the drafter has."""
        self.counts = tuple([min(n, d, places) for n, d in zip(budget.nodes, budget.depth, strict=True)])
        self._stop, self._asked = budget.stop, budget.slots
        self._known: list[Tensor] = []
        self._drawn: list[Tensor] = []

    def goes_on(self, logits: Tensor) -> bool:
        """Whether any request drafts the next place. logits: [B, V], what it would be drawn from, after processing."""
        if self._stop is None and not self._asked:
            return True
        self._q = logits.float().softmax(-1)
        self._known.append(_known(self._q))
        return self._stop is None or self._ask(len(self._known) - 1, self._known[-1].tolist())

    def drew(self, tokens: Tensor) -> None:
        """The place was drawn. tokens: [B, 1]."""
        if self._asked:
            self._drawn.append(self._q.gather(1, tokens))

    def likeliest(self, logits: Tensor) -> None:
        """Go through all places at once, where each takes its likeliest token whatever came before it. logits: [B, K, V]."""
        if self._stop is None and not self._asked:
            return
        known = _known(logits.float().softmax(-1))
        places = known.split(1, 1)
        self._known, self._drawn = [place[:, 0] for place in places], [place[:, :, 0] for place in places]
        if self._stop is not None:
            rows = known.transpose(0, 1).tolist()
            next((depth for depth, row in enumerate(rows) if not self._ask(depth, row)), None)

    def stats(self) -> SlotStats | None:
        """Of the drawn places; None where the budget asks for no values, or nothing was drawn."""
        if not self._asked or not max(self.counts):
            return None
        longest = max(self.counts)
        known = torch.stack(self._known[:longest], 1)
        return SlotStats(known[..., 0], known[..., 1], torch.cat(self._drawn[:longest], 1))

    def _ask(self, depth: int, known: list[list[float]]) -> bool:
        assert self._stop is not None, "there is a rule to ask"
        stopped = self._stop(depth, [row[0] for row in known], [row[1] for row in known])
        self.counts = tuple([min(count, depth) if done else count for count, done in zip(self.counts, stopped, strict=True)])
        return max(self.counts) > depth


def _known(q: Tensor) -> Tensor:
    """[..., 2]: largest probability and entropy of q [..., V]."""
    return torch.stack((q.amax(-1), torch.special.entr(q).sum(-1)), -1)


def tree_slots(logits: Tensor, tree: TokenTree) -> SlotStats:
    """Of the nodes of a tree whose places were predicted at once. logits: [B, K, V], by depth."""
    q = logits.float().softmax(-1)
    known = _known(q)
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
        self._setup = setup
        self.law = Law.DETERMINISTIC if shape == "tree" or setup.sampling is None else setup.law
        self._line = chain_parents(num_requests, setup.capacity, setup.device)
        self._product = ProductTrees()

    def nothing(self, roots: Tensor) -> Draft:
        """Trees of one node. roots: [B, 1]."""
        return Draft(chain_tree(roots, (), (0,) * roots.shape[0], self._line), self.law)

    def chain(self, roots: Tensor, logits: Tensor, budget: Budget, lengths: tuple[int, ...]) -> Draft:
        """Chains for budget.requests. roots: [B, 1].  logits: [B, K, V].  lengths: committed tokens, the root included."""
        watch = SlotWatch(budget, logits.shape[1])
        logits = logits[:, : max(watch.counts)]
        laws: list[Tensor] = []
        if self.law is Law.DETERMINISTIC:
            drafted = list(logits.argmax(-1).split(1, 1))
            watch.likeliest(logits)
        else:
            drafted, laws = self._drawn(logits, budget.requests, lengths, watch)
        if not max(watch.counts):
            return self.nothing(roots)
        tree = chain_tree(roots, drafted, watch.counts, self._line)
        if self.law is not Law.INDEPENDENT:
            return Draft(tree, self.law, slots=watch.stats())
        laws.append(torch.zeros_like(laws[0]))
        return Draft(tree, self.law, torch.stack(laws, 1), slots=watch.stats())

    def tree(self, roots: Tensor, logits: Tensor, budget: Budget) -> Draft:
        """The likeliest paths by the product of marginals; `stop` is for chains. roots: [B, 1].  logits: [B, K, V]."""
        logits = logits.float()
        values, tokens = logits.topk(min(max(budget.width), logits.shape[-1]), dim=-1)
        log_probs = values - logits.logsumexp(-1, keepdim=True)
        build = host_product_tree if logits.device.type == "cpu" else self._product.build
        tree = build(roots[:, 0], log_probs, tokens, budget.nodes, budget.depth, budget.width)
        return Draft(tree, Law.DETERMINISTIC, slots=tree_slots(logits, tree) if budget.slots else None)

    def _drawn(
        self, logits: Tensor, slots: tuple[int, ...], lengths: tuple[int, ...], watch: SlotWatch
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Tokens [B, 1] and their processed laws [B, V], place by place: processors may look at the tokens drawn before."""
        sampling = self._setup.sampling
        assert sampling is not None, "greedy chains are deterministic"
        requests, starts = on_device([slots, lengths], self._setup.device)
        chooser = NoiseChooser(sampling.noise, requests, starts, Stream.DRAFT)
        drafted: list[Tensor] = []
        laws: list[Tensor] = []
        for k in range(logits.shape[1]):
            processed = sampling.process(logits[:, k], lambda: drafted_paths(slots, drafted))
            if not watch.goes_on(processed):
                break
            if self.law is Law.COUPLED:
                token = coupled_pick(sampling.noise, requests, starts + k, processed)
            else:
                laws.append(processed.softmax(-1))
                token = chooser.pick(laws[-1])
            drafted.append(token[:, None])
            watch.drew(drafted[-1])
        return drafted, laws
