"""A draft model whose trees are drawn, so that rules which know q keep more of them when sampling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.frontier import Frontier
from specdec.kernels.transfer import on_device
from specdec.runner import RunnerOptions
from specdec.trees.sampled import Level, beam_level, independent_level, level_gumbel, sampled_draft, start_beam
from specdec.types import Budget, Draft, Law


class SampledTreeDrafter(DraftModelDrafter):
    """A small causal LM that draws trees by the law of the call, with q behind every node.

    Without replacement: stochastic beam search (RSD-S, arXiv 2402.14160, section 3.2.2), `width` nodes a level. Independent:
    `width` paths, each drawn on its own. Deterministic, as for greedy decoding: the most likely nodes, as `DraftModelDrafter`
    has them. How many nodes a request gets is cut by their number alone, level by level, so q stays the law of the draw. Drawn
    trees are as wide for every request as the budget's largest width.
    """

    name = "sampled-tree"

    def __init__(self, model: nn.Module, *, options: RunnerOptions | None = None) -> None:
        """model: left as it was found."""
        super().__init__(model, shape="tree", options=options)
        self.laws = frozenset({Law.DETERMINISTIC, Law.INDEPENDENT, Law.WITHOUT_REPLACEMENT})

    def _tree(self, roots: Tensor, logits: Tensor, budget: Budget, depth: int) -> Draft:
        if self._chains.law is Law.DETERMINISTIC:
            return super()._tree(roots, logits, budget, depth)
        levels = self._levels(logits, budget, depth)
        within = [sum(level.tokens.shape[1] for level in levels[:deep]) for deep in budget.depth]
        return sampled_draft(roots, levels, self._chains.law, tuple(map(min, budget.nodes, within)))

    def _levels(self, logits: Tensor, budget: Budget, depth: int) -> list[Level]:
        """Every level drawn behind the one before it. logits: [B, V] behind the root."""
        sampling, cache, requests = self._chains.sampling, self.runner.cache, budget.requests
        assert sampling is not None, "greedy trees are deterministic"
        lengths, width, batch = tuple(cache.lengths), max(budget.width), len(requests)
        slots, starts = on_device([requests, lengths], logits.device)
        seen, beam, levels, at = Frontier(lengths, logits.device), start_beam(batch, logits.device), list[Level](), 0
        for number in range(1, depth + 1):
            processed = sampling.process(logits, lambda: _paths(requests, levels)).view(batch, -1, logits.shape[1])
            nodes = processed.shape[1]
            if self._chains.law is Law.INDEPENDENT:
                drawn = level_gumbel(sampling.noise, slots, starts, number, width, logits.shape[1])
                level = independent_level(processed, drawn)
            else:
                drawn = level_gumbel(sampling.noise, slots, starts, number, nodes, logits.shape[1])
                level, beam = beam_level(beam, processed, drawn, width)
            levels.append(level)
            if number < depth:
                parents = level.parents + at - nodes if number > 1 else torch.full_like(level.parents, -1)
                rows = seen.rows(level.tokens, parents, torch.full_like(parents, number), cache.shared)
                at += level.tokens.shape[1]
                cache.ensure(rows.span)
                logits = self.runner.forward(rows)[0]
        return levels


def _paths(requests: tuple[int, ...], levels: list[Level]) -> list[tuple[int, tuple[int, ...]]]:
    """Of each node of the last level, its request and the tokens from the first level down to it."""
    own: list[list[tuple[int, ...]]] = [[()] for _ in requests]
    for level in levels:
        read = torch.stack((level.tokens, level.parents)).tolist()
        own = [[(*paths[p], t) for t, p in zip(*row, strict=True)] for paths, row in zip(own, zip(*read, strict=True), strict=True)]
    return [(request, path) for request, paths in zip(requests, own, strict=True) for path in paths]
