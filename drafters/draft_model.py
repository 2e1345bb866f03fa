"""A small causal LM with the target's vocabulary as drafter: a chain, or a top-k tree grown level by level."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from specdec.drafters.base import DraftSetup
from specdec.drafters.cached import CachedTexts, draft_options
from specdec.drafters.chains import ChainDrafts, Draw, Process, replayed
from specdec.drafters.expansion import Expansion
from specdec.drafters.slots import checked_shape
from specdec.rows import next_rows
from specdec.runner import ModelRunner, RunnerOptions
from specdec.types import Budget, Committed, Draft, Law


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
        self._chains = ChainDrafts(setup, self.laws, len(prompts))
        self._texts.begin(prompts, setup)

    def propose(self, budget: Budget) -> Draft:
        """A chain or tree for budget.requests; see `Drafter.propose`."""
        self._texts.arrange(budget.requests)
        counts = tuple(map(min, budget.nodes, budget.depth))
        depth, roots = max(counts), self._texts.roots(budget.requests)
        if depth == 0 or not self._texts.has_room(budget.requests, depth):
            return self._chains.nothing(roots)
        pending = self._texts.pending(budget.requests, counts)
        drafted = self._replayed(pending, budget, depth)
        if drafted is not None:
            return self._chains.known(roots, drafted.split(1, 1), counts)
        logits = self.runner.extend(pending)
        if self.shape == "tree":
            return self._tree(roots[:, 0], logits, budget, depth)
        return self._chain(roots, logits, budget, depth)

    def commit(self, committed: Committed) -> None:
        """Take in what the round added to the text."""
        self._texts.commit(committed)

    def _replayed(self, pending: list[list[int]], budget: Budget, depth: int) -> Tensor | None:
        """Greedy chains [B, depth] in one replay; None where the runner has none, or where it is drawn or looked at here."""
        watched = budget.stop is not None or budget.slots
        if self.shape == "tree" or self._setup.sampling is not None or watched:
            return None
        return replayed(self.runner, pending, depth)

    def _chain(self, roots: Tensor, logits: Tensor, budget: Budget, depth: int) -> Draft:
        """logits: [B, V] behind the roots [B, 1]."""

        def following(drafted: list[Tensor]) -> Tensor:
            return self.runner.forward(next_rows(self.runner.cache, len(drafted) - 1, drafted[-1]))[0] if drafted else logits

        draws = self._draws(budget.requests, tuple(self.runner.cache.lengths))
        return self._chains.drawn(roots, following, draws, budget, depth)

    def _draws(self, slots: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[Process, Draw]:
        """See `ChainDrafts.draws`."""
        return self._chains.draws(slots, lengths)

    def _tree(self, roots: Tensor, logits: Tensor, budget: Budget, depth: int) -> Draft:
        """Expand the most likely nodes of each level, then keep the most likely of all."""
        lengths = tuple(self.runner.cache.lengths)
        growth = Expansion(logits, width=budget.width, lengths=lengths)
        for _ in range(depth - 1):
            rows = growth.rows(self.runner.cache.shared)
            self.runner.cache.ensure(rows.span)
            growth.expand(self.runner.forward(rows)[0])
        return Draft(growth.tree(roots, budget), Law.DETERMINISTIC)
