"""Best-first trees: the most likely nodes wherever they stand, by the draft's own probabilities (SpecExec, arXiv 2406.02532)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.transfer import on_device
from specdec.trees.rerank import likeliest, rerank
from specdec.types import TokenTree

_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Chosen:
    """Candidates to expand next. tokens, depths: [B, W].  parents: [B, W], the expanded node above each, -1 for the root.

    Where a request has fewer, what fills its row is run and forgotten.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor


class BestFirst:
    """Candidates so far, M of each request, and which of them were expanded.

    Once `choose` finds nothing more, `tree` gives the most likely nodes of all that have, at every node, the most likely children,
    `width` of them: a candidate outside the best so far has no child among them, since path probabilities never rise from parent
    to child. Stopped earlier, it gives the best of those found. Tokens are deterministic.
    """

    def __init__(self, logits: Tensor, width: tuple[int, ...], nodes: tuple[int, ...], depth: tuple[int, ...]) -> None:
        """logits: [B, V] behind the root.  width: most children of a node.  nodes, depth: as width, of each request's tree."""
        self._width, self._nodes = width, nodes
        self._device = logits.device
        self._most, self._deepest = on_device([nodes, depth], logits.device)[..., None]
        self._scores, self._tokens = [found[:, 0] for found in likeliest(logits[:, None], width)]
        self._scores = self._scores.masked_fill((self._deepest < 1) | (self._most < 1), _NEVER)
        self._parents = torch.full_like(self._tokens, -1)
        self._depths = torch.ones_like(self._tokens)
        # Of the candidate's parent, the number among the expanded; and whether the candidate itself was expanded.
        self._above = torch.full_like(self._tokens, -1)
        self._done = torch.zeros_like(self._tokens, dtype=torch.bool)
        self._expanded = 0
        self._last: tuple[Tensor, Tensor] | None = None

    def choose(self, count: int) -> Chosen | None:
        """The `count` most likely candidates that may still have a child in the tree; None where there is none. One read."""
        useful = ~self._done & (self._depths < self._deepest) & (self._scores > self._bound())
        values, best = self._scores.masked_fill(~useful, _NEVER).topk(min(count, useful.shape[1]), dim=1)
        if (values[:, 0] == _NEVER).tolist() == [True] * len(self._nodes):
            return None
        self._last = values, best
        self._done = self._done.scatter(1, best, True)
        return Chosen(self._tokens.gather(1, best), self._above.gather(1, best), self._depths.gather(1, best))

    def expand(self, logits: Tensor) -> None:
        """Take in what stands behind the chosen candidates. logits: [B * W, V], in their order."""
        assert self._last is not None, "choose comes first"
        values, best = self._last
        batch, chosen = best.shape
        own, tokens = likeliest(logits.reshape(batch, chosen, -1), self._width)
        scores, width = own + values[..., None], own.shape[2]
        number = torch.arange(self._expanded, self._expanded + chosen, device=self._device)
        self._scores = torch.cat((self._scores, scores.flatten(1)), 1)
        self._tokens = torch.cat((self._tokens, tokens.flatten(1)), 1)
        self._parents = torch.cat((self._parents, best.repeat_interleave(width, 1)), 1)
        self._depths = torch.cat((self._depths, 1 + self._depths.gather(1, best).repeat_interleave(width, 1)), 1)
        self._above = torch.cat((self._above, number.repeat_interleave(width).expand(batch, -1)), 1)
        self._done = torch.cat((self._done, torch.zeros_like(scores.flatten(1), dtype=torch.bool)), 1)
        self._expanded += chosen

    def tree(self, roots: Tensor) -> TokenTree:
        """The best candidates of each request, at most its nodes, with their ancestors. roots: [B]. One read."""
        found = (self._scores > _NEVER).sum(1).tolist()
        counts = tuple(map(min, self._nodes, found))
        return rerank(roots, self._tokens, self._parents, self._scores, counts)

    def _bound(self) -> Tensor:
        """[B, 1]: what a new node has to exceed to come into the tree; a tie goes to those that are there."""
        found = self._scores.shape[1]
        ranked = self._scores.sort(dim=1, descending=True).values
        least = ranked.gather(1, (self._most - 1).clamp(0, found - 1))
        return torch.where(self._most <= found, least, _NEVER)
