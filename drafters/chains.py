"""Chains: what drafters share that draw one token after the other, and what a budget's rule is told of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specdec.drafters.base import DraftSetup
from specdec.kernels.transfer import on_device
from specdec.noise import Stream
from specdec.runner import ModelRunner
from specdec.trees.chain import chain_tree
from specdec.trees.host import tree_from_lists
from specdec.trees.layout import chain_parents
from specdec.types import Budget, Draft, Law, SlotStats
from specdec.verify.chooser import NoiseChooser
from specdec.verify.coupled import coupled_pick

CHAIN_LAWS = frozenset({Law.DETERMINISTIC, Law.INDEPENDENT, Law.COUPLED})

# Tokens drafted so far, each [B, 1], to the logits [B, V] of the next place.
Following = Callable[[list[Tensor]], Tensor]
# (logits [B, V], tokens drafted so far) to processed logits; (those, how many tokens so far) to (token [B, 1], its law [B, V]).
Process = Callable[[Tensor, list[Tensor]], Tensor]
Draw = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class ChainDrafts:
    """The chains of one call of `generate`. Each token is drawn from the law given the ones before it, and q is that law.

    law: how they are drawn, by the law of the call where the target samples and the drafter can.  sampling: None where nothing is
    drawn.
    """

    def __init__(self, setup: DraftSetup, laws: frozenset[Law], num_requests: int) -> None:
        """laws: the drafter's."""
        self.law = setup.law if setup.sampling is not None and setup.law in laws else Law.DETERMINISTIC
        self.sampling = None if self.law is Law.DETERMINISTIC else setup.sampling
        self._device = setup.device
        self._line = chain_parents(num_requests, setup.capacity, setup.device)

    def nothing(self, roots: Tensor) -> Draft:
        """Trees of one node. roots: [B, 1]."""
        return Draft(chain_tree(roots, (), (0,) * roots.shape[0], self._line), self.law)

    def known(self, roots: Tensor, drafted: Sequence[Tensor], counts: tuple[int, ...], slots: SlotStats | None = None) -> Draft:
        """The first counts[b] of these tokens, each [B, 1], without q."""
        return Draft(chain_tree(roots, drafted, counts, self._line), self.law, slots=slots)

    def draws(self, slots: tuple[int, ...], lengths: Sequence[int]) -> tuple[Process, Draw]:
        """How a token is drawn in this round: its logits processed first, since a stop rule looks at them, then the draw.

        slots, lengths: the requests, and the committed tokens of each.
        """
        sampling, law = self.sampling, self.law
        if sampling is None:
            return lambda logits, drafted: logits, lambda logits, step: (logits.argmax(-1, keepdim=True), logits)
        requests, starts = on_device([slots, lengths], self._device)
        chooser = NoiseChooser(sampling.noise, requests, starts, Stream.DRAFT)

        def process(logits: Tensor, drafted: list[Tensor]) -> Tensor:
            return sampling.process(logits, lambda: drafted_paths(slots, drafted))

        def draw(processed: Tensor, step: int) -> tuple[Tensor, Tensor]:
            if law is Law.COUPLED:
                return coupled_pick(sampling.noise, requests, starts + step, processed)[:, None], processed
            q = processed.softmax(-1)
            return chooser.pick(q)[:, None], q

        return process, draw

    def drawn(self, roots: Tensor, following: Following, draws: tuple[Process, Draw], budget: Budget, places: int) -> Draft:
        """Chains of `places` tokens or fewer for budget.requests. roots: [B, 1].  draws: see `draws`."""
        process, draw = draws
        watch = SlotWatch(budget, places)
        drafted: list[Tensor] = []
        laws: list[Tensor] = []
        for step in range(max(watch.counts)):
            processed = process(following(drafted), drafted)
            if not watch.goes_on(processed):
                break
            token, q = draw(processed, step)
            drafted.append(token)
            laws.append(q)
            watch.drew(token)
        tree = chain_tree(roots, drafted, watch.counts, self._line)
        if self.law is not Law.INDEPENDENT or not drafted:
            return Draft(tree, self.law, slots=watch.stats())
        laws.append(torch.zeros_like(laws[0]))
        return Draft(tree, self.law, torch.stack(laws, 1), slots=watch.stats())


def replayed(runner: ModelRunner, pending: list[list[int]], depth: int) -> Tensor | None:
    """[B, depth]: the likeliest tokens behind the pending ones, in one replay; None where the runner has none."""
    if not runner.replays:
        return None
    lines = [list(range(-1, len(text) - 1)) for text in pending]
    return runner.whole_chain(tree_from_lists(pending, lines, runner.device), depth)


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
        self._known.append(known_of(self._q))
        return self._stop is None or self._ask(len(self._known) - 1, self._known[-1].tolist())

    def drew(self, tokens: Tensor) -> None:
        """The place was drawn. tokens: [B, 1]."""
        if self._asked:
            self._drawn.append(self._q.gather(1, tokens))

    def likeliest(self, logits: Tensor) -> None:
        """Go through all places at once, where each takes its likeliest token whatever came before it. logits: [B, K, V]."""
        if self._stop is None and not self._asked:
            return
        known = known_of(logits.float().softmax(-1))
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


def known_of(q: Tensor) -> Tensor:
    """[..., 2]: largest probability and entropy of q [..., V]."""
    return torch.stack((q.amax(-1), torch.special.entr(q).sum(-1)), -1)
