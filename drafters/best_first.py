"""A draft model's best-first trees of up to 1,024 nodes, for targets that are far slower than their draft (SpecExec)."""

from __future__ import annotations

from torch import Tensor, nn

from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.frontier import Frontier
from specdec.errors import SpecDecError
from specdec.runner import RunnerOptions
from specdec.trees.best_first import BestFirst
from specdec.types import Budget, Draft, Law


class BestFirstDrafter(DraftModelDrafter):
    """A small causal LM whose trees hold the most likely nodes, however deep (SpecExec, arXiv 2406.02532, section 4).

    The target's forward over the tree answers every text that stays in it, so a large tree is a cache of what comes next.
    Tokens are deterministic: it serves every rule but rejection. The budget's nodes and depth hold, its width is the most
    children of a node; how many nodes a forward expands is `frontier`, so a level may expand more. On a GPU each forward costs
    a synchronisation.
    """

    name = "best-first"

    def __init__(self, model: nn.Module, *, frontier: int = 32, forwards: int = 64, options: RunnerOptions | None = None) -> None:
        """model: left as it was found.  frontier: nodes expanded in one forward.  forwards: most of them in a round."""
        for name, value in (("frontier", frontier), ("forwards", forwards)):
            if not isinstance(value, int) or value < 1:
                raise SpecDecError(f"BestFirstDrafter {name}={value!r}: give a whole number, at least 1")
        super().__init__(model, shape="tree", options=options)
        self._frontier, self._forwards = frontier, forwards

    def _tree(self, roots: Tensor, logits: Tensor, budget: Budget, depth: int) -> Draft:
        cache = self.runner.cache
        growth = BestFirst(logits, budget.width, budget.nodes, budget.depth)
        seen = Frontier(tuple(cache.lengths), logits.device)
        for _ in range(self._forwards):
            chosen = growth.choose(self._frontier)
            if chosen is None:
                break
            rows = seen.rows(chosen.tokens, chosen.parents, chosen.depths, cache.shared)
            cache.ensure(rows.span)
            growth.expand(self.runner.forward(rows)[0])
        return Draft(growth.tree(roots), Law.DETERMINISTIC)
