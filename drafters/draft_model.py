"""A small causal LM with the target's vocabulary as drafter: a chain, or a top-k tree grown level by level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from specdec.drafters.base import DraftSetup
from specdec.drafters.cached import CachedTexts, draft_options
from specdec.drafters.expansion import Expansion
from specdec.drafters.slots import SlotWatch, checked_shape, drafted_paths
from specdec.kernels.transfer import on_device
from specdec.noise import Stream
from specdec.rows import next_rows
from specdec.runner import ModelRunner, RunnerOptions
from specdec.trees.chain import chain_tree
from specdec.trees.host import tree_from_lists
from specdec.trees.layout import chain_parents
from specdec.types import Budget, Committed, Draft, Law
from specdec.verify.chooser import NoiseChooser
from specdec.verify.coupled import coupled_pick

# (logits [B, V], tokens drafted so far) to processed logits; (those, how many tokens so far) to (token [B, 1], its law [B, V]).
Process = Callable[[Tensor, list[Tensor]], Tensor]
Draw = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class DraftModelDrafter:
    """Any transformers causal LM with the target's vocabulary.

    The cache holds committed tokens only, see `CachedTexts`. Chains are drawn by the law of the call; trees are the draft's
    most likely nodes (EAGLE-2, arXiv 2406.16858, section 4), which is deterministic.
    """

    name = "draft-model"
    taps: tuple[str, ...] = ()

    def __init__(
        self, model: nn.Module, *, shape: Literal["chain", "tree"] = "chain", options: RunnerOptions | None = None
    ) -> None:
        """model: left as it was found.  shape: "tree" draws deterministically and serves every rule but rejection."""
        self.shape, self.laws = checked_shape(shape)
        self.runner = ModelRunner(model, options=options or draft_options(model))
        self.vocabulary = self.runner.vocabulary
        self._texts = CachedTexts(self.runner, "draft model")

    def begin(self, prompts: tuple[tuple[int, ...], ...], setup: DraftSetup) -> None:
        """Start a batch; see `Drafter.begin`. Raises when the vocabulary or device is not the target's."""
        self._setup = setup
        self._line = chain_parents(len(prompts), setup.capacity, setup.device)
        self._texts.begin(prompts, setup)

    def propose(self, budget: Budget) -> Draft:
        """A chain or tree for budget.requests; see `Drafter.propose`."""
        self._texts.arrange(budget.requests)
        depth = max(map(min, budget.nodes, budget.depth))
        if depth == 0 or not self._texts.has_room(budget.requests, depth):
            roots = self._texts.roots(budget.requests)
            return Draft(chain_tree(roots, (), (0,) * len(budget.requests), self._line), self._law)
        pending = self._texts.pending(budget.requests)
        whole = self._whole_chain(pending, budget, depth)
        if whole is not None:
            return whole
        roots, logits = self.runner.extend(pending)
        if self.shape == "tree":
            return self._tree(roots[:, 0], logits, budget, depth)
        return self._chain(roots, logits, budget, depth)

    def commit(self, committed: Committed) -> None:
        """Take in what the round added to the text."""
        self._texts.commit(committed)

    @property
    def _law(self) -> Law:
        return Law.DETERMINISTIC if self.shape == "tree" or self._setup.sampling is None else self._setup.law

    def _whole_chain(self, pending: list[list[int]], budget: Budget, depth: int) -> Draft | None:
        """A greedy chain in one replay; None where the runner has none, or where drawing or looking at it is done here."""
        watched = budget.stop is not None or budget.slots
        if self.shape == "tree" or self._setup.sampling is not None or watched or not self.runner.replays:
            return None
        lines = [list(range(-1, len(text) - 1)) for text in pending]
        drafted = self.runner.whole_chain(tree_from_lists(pending, lines, self.runner.device), depth)
        if drafted is None:
            return None
        counts = tuple(map(min, budget.nodes, budget.depth))
        roots = self._texts.roots(budget.requests)
        return Draft(chain_tree(roots, drafted.split(1, 1), counts, self._line), Law.DETERMINISTIC)

    def _chain(self, roots: Tensor, logits: Tensor, budget: Budget, depth: int) -> Draft:
        """Draw one token after the other, each from the law given the ones before it."""
        process, draw = self._draws(budget.requests, tuple(self.runner.cache.lengths))
        watch = SlotWatch(budget, depth)
        drafted: list[Tensor] = []
        laws: list[Tensor] = []
        for step in range(depth):
            if step:
                logits = self.runner.forward(next_rows(self.runner.cache, step - 1, drafted[-1]))[0]
            processed = process(logits, drafted)
            if not watch.goes_on(processed):
                break
            token, q = draw(processed, step)
            drafted.append(token)
            laws.append(q)
            watch.drew(token)
        tree = chain_tree(roots, drafted, watch.counts, self._line)
        if self._law is not Law.INDEPENDENT or not drafted:
            return Draft(tree, self._law, slots=watch.stats())
        laws.append(torch.zeros_like(laws[0]))
        return Draft(tree, self._law, torch.stack(laws, 1)[:, : tree.tokens.shape[1]], slots=watch.stats())

    def _draws(self, slots: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[Process, Draw]:
        """How a token is drawn in this round: its logits processed first, since a stop rule looks at them, then the draw."""
        sampling = self._setup.sampling
        if sampling is None or self._law is Law.DETERMINISTIC:
            return lambda logits, drafted: logits, lambda logits, step: (logits.argmax(-1, keepdim=True), logits)
        requests, starts = on_device([slots, lengths], self.runner.device)
        chooser = NoiseChooser(sampling.noise, requests, starts, Stream.DRAFT)

        def process(logits: Tensor, drafted: list[Tensor]) -> Tensor:
            return sampling.process(logits, lambda: drafted_paths(slots, drafted))

        def draw(processed: Tensor, step: int) -> tuple[Tensor, Tensor]:
            if self._law is Law.COUPLED:
                return coupled_pick(sampling.noise, requests, starts + step, processed)[:, None], processed
            q = processed.softmax(-1)
            return chooser.pick(q)[:, None], q

        return process, draw

    def _tree(self, roots: Tensor, logits: Tensor, budget: Budget, depth: int) -> Draft:
        """Expand the most likely nodes of each level, then keep the most likely of all."""
        lengths = tuple(self.runner.cache.lengths)
        growth = Expansion(logits, width=max(budget.width), lengths=lengths)
        for _ in range(depth - 1):
            rows = growth.rows(self.runner.cache.shared)
            self.runner.cache.ensure(rows.span)
            growth.expand(self.runner.forward(rows)[0])
        return Draft(growth.tree(roots, budget), Law.DETERMINISTIC)
