"""Token rejection sampling on a chain (arXiv 2211.17192, algorithm 1; arXiv 2302.01318)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specdec.kernels.transfer import on_device
from specdec.types import Draft, Law, Scores, Verdict
from specdec.verify.chooser import Chooser
from specdec.verify.laws import chain_law, live_nodes, ratio
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
        q = chain_law(draft, p)
        drafted = draft.tree.tokens[:, 1:, None]
        accepted = chooser.accept(ratio(p[:, :-1].gather(2, drafted), q[:, :-1].gather(2, drafted))[..., 0])
        count = (accepted & live_nodes(draft.tree)[:, 1:]).long().cumprod(1).sum(1)
        end = count[:, None, None].expand(-1, 1, p.shape[-1])
        here, there = p.gather(1, end)[:, 0], q.gather(1, end)[:, 0]
        full = (count == on_device([n - 1 for n in draft.tree.num_nodes], count.device)) & ~null_behind(draft, count)
        residual = (here - there).clamp(min=0).nan_to_num(nan=0.0)
        keep = full | (residual.sum(1) <= 0)
        token = chooser.pick(torch.where(keep[:, None], here.nan_to_num(nan=0.0), residual))
        return Verdict(count, token.masked_fill(here[:, 0].isnan(), -1))
