"""Token rejection sampling on a chain (arXiv 2211.17192, algorithm 1; arXiv 2302.01318)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.transfer import on_device
from specdec.types import Draft, Law, Scores, TokenTree, Verdict
from specdec.verify.chooser import Chooser
from specdec.verify.null_mass import null_behind


@dataclass(frozen=True, slots=True)
class TokenRejection:
    """Lossless when q is the law that the chain was drawn from, or the chain is deterministic (q is one-hot then).

    Also where tokens were dropped after they were drawn, if the draft is a `RepairedDraft`.
    """

    name: str = "rejection"
    lossless: bool = True
    laws: frozenset[Law] = frozenset({Law.INDEPENDENT, Law.DETERMINISTIC})
    trees: bool = False
    uses_q: bool = True

    def verify(self, draft: Draft, scores: Scores, chooser: Chooser) -> Verdict:
        """See `Rule.verify`; one accept over all drafted tokens, one pick for the recovered or bonus token."""
        p = scores.logits.softmax(-1)
        q = _law(draft, p)
        drafted = draft.tree.tokens[:, 1:, None]
        accepted = chooser.accept(_ratio(p[:, :-1].gather(2, drafted), q[:, :-1].gather(2, drafted))[..., 0])
        count = (accepted & _live(draft.tree)).long().cumprod(1).sum(1)
        end = count[:, None, None].expand(-1, 1, p.shape[-1])
        here, there = p.gather(1, end)[:, 0], q.gather(1, end)[:, 0]
        full = (count == on_device([n - 1 for n in draft.tree.num_nodes], count.device)) & ~null_behind(draft, count)
        residual = (here - there).clamp(min=0).nan_to_num(nan=0.0)
        keep = full | (residual.sum(1) <= 0)
        token = chooser.pick(torch.where(keep[:, None], here.nan_to_num(nan=0.0), residual))
        return Verdict(count, token.masked_fill(here[:, 0].isnan(), -1))


def _law(draft: Draft, p: Tensor) -> Tensor:
    """[B, N, V] q behind every node; one-hot where the draft is deterministic; a row with NaN never accepts."""
    if draft.q is not None:
        return torch.where(draft.q.isfinite().all(-1, keepdim=True), draft.q.to(p.dtype), 0.0)
    q = torch.zeros_like(p)
    q[:, :-1].scatter_(2, draft.tree.tokens[:, 1:, None], 1.0)
    return q


def _ratio(p: Tensor, q: Tensor) -> Tensor:
    """min(1, p / q), and 0 where q is 0 or p is NaN: such a token was not drawn from q."""
    return torch.where((q > 0) & (p == p), (p / q).clamp(max=1.0), 0.0)


def _live(tree: TokenTree) -> Tensor:
    sizes = on_device(tree.num_nodes, tree.tokens.device)[:, None]
    return torch.arange(1, tree.tokens.shape[1], device=tree.tokens.device) < sizes
