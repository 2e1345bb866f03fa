"""Top-k expansion with rerank: how a draft model grows a tree level by level (EAGLE-2, arXiv 2406.16858, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.rows import Rows, Shared
from specdec.kernels.transfer import on_device
from specdec.trees.rerank import rerank
from specdec.types import Budget, TokenTree


class Expansion:
    """The candidates so far and the frontier to expand. W = width.

    Every level takes the top W continuations of each frontier node, and expands the W most likely of them by path
    probability. Candidates are numbered as they are found, parents first; the root is candidate -1.
    """

    def __init__(self, logits: Tensor, *, width: int, lengths: tuple[int, ...]) -> None:
        """logits: [B, V] behind the root.  lengths: committed tokens of each request, all in the draft's cache."""
        self._width, self._lengths = width, lengths
        values, tokens = logits.float().log_softmax(-1).topk(width, dim=-1)
        self._device = logits.device
        self._scores, self._tokens = [values], [tokens]
        self._parents = [torch.full_like(tokens, -1)]
        self._count, self._level = width, 0
        self._frontier, self._frontier_scores, self._frontier_tokens = self._numbers(0, width), values, tokens
        self._seen = torch.eye(width, dtype=torch.bool, device=logits.device).expand(len(lengths), -1, -1)
        self._offsets = torch.zeros(len(lengths), width, dtype=torch.long, device=logits.device)

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
        values, tokens = logits.float().log_softmax(-1).topk(width, dim=-1)
        scores = (values.view(batch, width, width) + self._frontier_scores[:, :, None]).view(batch, -1)
        tokens = tokens.view(batch, -1)
        self._scores.append(scores)
        self._tokens.append(tokens)
        self._parents.append(self._frontier.repeat_interleave(width, 1))
        self._frontier_scores, best = scores.topk(width, dim=-1)
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
        counts = tuple(min(n, w) for n, w in zip(budget.nodes, within, strict=True))
        return rerank(roots, tokens, parents, scores, counts)
