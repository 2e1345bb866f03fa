"""Top-k expansion with rerank: how a draft model grows a tree level by level (EAGLE-2, arXiv 2406.16858, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.rows import Rows, Shared
from specdec.kernels.transfer import on_device
from specdec.trees.rerank import likeliest, rerank
from specdec.types import Budget, TokenTree


class Expansion:
    """The candidates so far and the frontier to expand. W is the largest width, or V.

    Every level takes the top continuations of each frontier node, and expands the most likely of them by path probability, as
    many of both as the request's width; what fills the rest of its rows never comes into the tree. Candidates are numbered as they
    are found, parents first; the root is candidate -1.
    """

    def __init__(self, logits: Tensor, *, width: tuple[int, ...], lengths: tuple[int, ...]) -> None:
        """logits: [B, V] behind the root.  width: of each request.  lengths: its committed tokens, all in the draft's cache."""
        self._device, self._lengths = logits.device, lengths
        values, tokens = [found[:, 0] for found in likeliest(logits[:, None], width)]
        self._width, self._own = tokens.shape[1], tuple([min(own, tokens.shape[1]) for own in width])
        self._scores, self._tokens = [values], [tokens]
        self._parents = [torch.full_like(tokens, -1)]
        self._count, self._level = self._width, 0
        self._frontier, self._frontier_scores, self._frontier_tokens = self._numbers(0, self._width), values, tokens
        self._seen = torch.eye(self._width, dtype=torch.bool, device=logits.device).expand(len(lengths), -1, -1)
        self._offsets = torch.zeros(len(lengths), self._width, dtype=torch.long, device=logits.device)

    def _numbers(self, start: int, count: int) -> Tensor:
        return torch.arange(start, start + count, device=self._device).expand(len(self._lengths), -1)

    def rows(self, shared: tuple[Shared, ...]) -> Rows:
        """The rows of one forward over the frontier of every request. shared: as in `Rows`."""
        width, written = self._width, self._level * self._width
        base = tuple(length + written for length in self._lengths)
        start = on_device(base, self._device)[:, None]
        slots = (start + torch.arange(width, device=self._device)).reshape(-1)
        positions = (start - written + self._level).expand(-1, width).reshape(1, -1)
        sizes = (width,) * len(base)
        tokens = self._frontier_tokens.reshape(1, -1)
        return Rows(self._lengths, sizes, tokens, positions, slots, base, self._seen, self._offsets, shared)

    def expand(self, logits: Tensor) -> None:
        """Take in the frontier's logits [B * W, V] in the order of `rows`."""
        batch, width = len(self._lengths), self._width
        values, tokens = likeliest(logits.reshape(batch, width, -1), self._own)
        scores, tokens = (values + self._frontier_scores[:, :, None]).flatten(1), tokens.flatten(1)
        self._scores.append(scores)
        self._tokens.append(tokens)
        self._parents.append(self._frontier.repeat_interleave(width, 1))
        self._frontier_scores, best = scores.topk(width, dim=-1)
        if min(self._own) < width:
            beyond = torch.arange(width, device=self._device) >= on_device(self._own, self._device)[:, None]
            self._frontier_scores = self._frontier_scores.masked_fill(beyond, float("-inf"))
        self._frontier_tokens = tokens.gather(1, best)
        self._frontier = best + self._count
        self._count += width * width
        self._level += 1
        self._see(best // width)

    def _see(self, parents: Tensor) -> None:
        """The new frontier sees what its parents saw, and itself."""
        width = self._width
        kept = self._seen.gather(1, parents[:, :, None].expand(-1, -1, self._seen.shape[2]))
        own = torch.eye(width, dtype=torch.bool, device=self._device).expand(kept.shape[0], -1, -1)
        self._seen = torch.cat((kept, own), 2)
        level = torch.full_like(self._offsets[:, :width], self._level)
        self._offsets = torch.cat((self._offsets, level), 1)

    def tree(self, roots: Tensor, budget: Budget) -> TokenTree:
        """The most likely candidates under each request's budget of nodes and depth, ancestors always among them."""
        scores, tokens, parents = (torch.cat(x, 1) for x in (self._scores, self._tokens, self._parents))
        within = [sum(level.shape[1] for level in self._scores[:depth]) for depth in budget.depth]
        if min(within) < scores.shape[1]:
            limits = on_device(within, scores.device)[:, None]
            scores = scores.masked_fill(torch.arange(scores.shape[1], device=scores.device) >= limits, float("-inf"))
        levels = [min(depth, len(self._scores)) for depth in budget.depth]
        found = [own + own * own * (level - 1) if level else 0 for own, level in zip(self._own, levels, strict=True)]
        counts = tuple(map(min, budget.nodes, found))
        return rerank(roots, tokens, parents, scores, counts)
