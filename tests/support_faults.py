"""Setups that are wrong on purpose, each in one way that real codes have been wrong in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.cache import KVCache
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.kernels.rows import Rows
from specdec.noise import Stream
from specdec.rows import tree_rows
from specdec.types import Budget, Committed, Draft, TokenTree
from specdec.verify import block


class RawLaw(DraftModelDrafter):
    """Draws from the processed law and tells the raw one."""

    def _draws(self, slots: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[Any, Any]:
        process, draw = super()._draws(slots, lengths)
        raw: list[Tensor] = []

        def noted(logits: Tensor, drafted: list[Tensor]) -> Tensor:
            raw.append(logits.float())
            return process(logits, drafted)

        return noted, lambda processed, step: (draw(processed, step)[0], raw[-1].softmax(-1))


class ArgmaxDrafts(DraftModelDrafter):
    """Takes the likeliest token and tells the law as if it had drawn from it."""

    def _draws(self, slots: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[Any, Any]:
        process, draw = super()._draws(slots, lengths)
        return process, lambda processed, step: (processed.argmax(-1, keepdim=True), draw(processed, step)[1])


class SharedNoise(DraftModelDrafter):
    """Draws with the very uniforms that rejection accepts with; each draw alone still has law q."""

    def _draws(self, slots: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[Any, Any]:
        process, draw = super()._draws(slots, lengths)
        sampling = self._setup.sampling
        if sampling is None:
            return process, draw
        requests, starts, first = torch.tensor(slots), torch.tensor(lengths), torch.tensor(1)

        def shared(processed: Tensor, step: int) -> tuple[Tensor, Tensor]:
            q = processed.softmax(-1)
            uniform = sampling.noise.uniform(Stream.ACCEPT, requests, starts, first, torch.tensor(step))
            token = (q.double().cumsum(-1) < uniform[:, None] * q.double().sum(-1, keepdim=True)).sum(-1, keepdim=True)
            return token, q

        return process, shared


class DroppedDrafts(DraftModelDrafter):
    """Ends a chain before the first token that turned out unlikely, and does not say so."""

    def propose(self, budget: Budget) -> Draft:
        draft = super().propose(budget)
        if draft.q is None or draft.tree.tokens.shape[1] == 1:
            return draft
        drawn = draft.q[:, :-1].gather(2, draft.tree.tokens[:, 1:, None])[..., 0]
        kept = (drawn > 0.25).long().cumprod(1).sum(1).tolist()
        sizes = [min(size, 1 + count) for size, count in zip(draft.tree.num_nodes, kept, strict=True)]
        beyond = torch.arange(draft.tree.tokens.shape[1]) >= torch.tensor(sizes)[:, None]
        widest = max(sizes)
        tree = TokenTree(
            draft.tree.tokens.masked_fill(beyond, 0)[:, :widest],
            draft.tree.parents.masked_fill(beyond, 0)[:, :widest],
            tuple(sizes),
            is_chain=True,
        )
        return replace(draft, tree=tree, q=draft.q[:, :widest])


class ForgetsTokens(DraftModelDrafter):
    """Is not told the last accepted token of a round."""

    def commit(self, committed: Committed) -> None:
        heard = [(*tokens[:-2], tokens[-1]) for tokens in committed.tokens]
        super().commit(replace(committed, tokens=tuple(heard)))


def stale_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that counts the accepted nodes and leaves their keys and values where they were."""

    def commit(cache: KVCache, paths: list[tuple[int, ...]]) -> None:
        cache.lengths = [length + 1 + len(path) for length, path in zip(cache.lengths, paths, strict=True)]

    monkeypatch.setattr(KVCache, "commit", commit)


def wrong_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafted nodes are scored one position too far."""

    def shifted(cache: KVCache, tree: TokenTree) -> Rows:
        rows = tree_rows(cache, tree)
        drafted = torch.cat([(torch.arange(size) > 0).long() for size in rows.sizes])
        return replace(rows, positions=rows.positions + drafted)

    monkeypatch.setattr("specdec.runner.tree_rows", shifted)


def early_break(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block verification that stops at the first token that does not pass, where the longest that passes counts."""
    right = block.block_verdict

    class Breaks:
        """A chooser whose accepted tokens end with the first that is not."""

        def __init__(self, chooser: Any) -> None:
            self.pick = chooser.pick
            self.accepts = chooser.accept

        def accept(self, prob: Tensor) -> Tensor:
            return self.accepts(prob).long().cumprod(1).bool()

    def broken(p: Tensor, q: Tensor, drafted: Tensor, end: Tensor, chooser: Any, null: Tensor | None = None) -> Any:
        return right(p, q, drafted, end, Breaks(chooser), null)

    monkeypatch.setattr(block, "block_verdict", broken)
