"""Block verification of a chain (arXiv 2403.10444): the drafted tokens are judged together, not one by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.types import Draft, Law, Scores, Verdict
from specdec.verify.chooser import Chooser
from specdec.verify.laws import chain_law, live_nodes
from specdec.verify.null_mass import null_behind


@dataclass(frozen=True, slots=True)
class Block:
    """Lossless when q is the law that the chain was drawn from, or the chain is deterministic; no valid rule keeps more of a chain.

    With w_0 = 1, w_i = min(1, w_{i-1} p(x_i) / q(x_i)) and R_i = sum_x [w_i p - q]+ behind token i, the first i tokens pass with
    h_i = R_i / (R_i + 1 - w_i), all of them with h_K = w_K, each by a draw of its own. The longest that passes is accepted, also
    where a shorter one does not pass. A `RepairedDraft` goes on behind its last node with a token that never passes.
    """

    name: str = "block"
    lossless: bool = True
    laws: frozenset[Law] = frozenset({Law.INDEPENDENT, Law.DETERMINISTIC})
    trees: bool = False
    uses_q: bool = True

    def verify(self, draft: Draft, scores: Scores, chooser: Chooser) -> Verdict:
        """See `Rule.verify`; one accept over all drafted tokens and one pick."""
        p, drafted = scores.logits.softmax(-1), draft.tree.tokens[:, 1:]
        end = live_nodes(draft.tree).sum(1) - 1
        return Verdict(*block_verdict(p, chain_law(draft, p), drafted, end, chooser, null_behind(draft, end)))


def block_verdict(
    p: Tensor, q: Tensor, drafted: Tensor, end: Tensor, chooser: Chooser, null: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """[B] int64 each: how many of a chain's tokens are accepted, and the next token, -1 where its row holds NaN.

    p, q: [B, K + 1, V], behind node 0 and behind each drafted token.  drafted: [B, K].  end: [B], tokens drafted, K or fewer.
    null: [B] bool, where one more token was drawn behind `end` and dropped for what it was.
    """
    place = torch.arange(p.shape[1], device=p.device)
    # What lies behind a row of NaN cannot be judged: the chain ends there, and the row shows if it is reached.
    readable = torch.where(p[..., 0].isnan(), place, p.shape[1]).amin(1)
    last = torch.ones_like(end, dtype=torch.bool) if null is None else ~null | (readable <= end)
    end = torch.minimum(end, readable)
    weights = _path_weights(p, q, drafted)
    excess = (weights[..., None] * p - q).clamp(min=0).sum(-1)
    passes = torch.where(weights < 1, excess / (excess + 1 - weights), 1.0)
    passes = torch.where((place == end[:, None]) & last[:, None], weights, passes)
    passed = chooser.accept(torch.where(place <= end[:, None], passes, 0.0)[:, 1:])
    count = torch.nn.functional.pad(passed * place[1:], (1, 0)).amax(1)
    row = count[:, None, None].expand(-1, 1, p.shape[-1])
    here, law = p.gather(1, row)[:, 0], q.gather(1, row)[:, 0]
    residual = (weights.gather(1, count[:, None]) * here - law).clamp(min=0).nan_to_num(nan=0.0)
    whole = ((count == end) & last) | (residual.sum(1) <= 0)
    token = chooser.pick(torch.where(whole[:, None], here.nan_to_num(nan=0.0), residual))
    return count, token.masked_fill(here[:, 0].isnan(), -1)


def _path_weights(p: Tensor, q: Tensor, drafted: Tensor) -> Tensor:
    """[B, K + 1]: w_i; 0 from the first token on that was not drawn from q or whose p is NaN."""
    token = drafted[..., None]
    ours, theirs = p[:, :-1].gather(2, token)[..., 0], q[:, :-1].gather(2, token)[..., 0]
    drawn = (theirs > 0) & (ours == ours)
    weights = [torch.ones_like(p[:, 0, 0])]
    for k in range(drafted.shape[1]):
        weights.append(torch.where(drawn[:, k], (weights[-1] * ours[:, k] / theirs[:, k]).clamp(max=1.0), 0.0))
    return torch.stack(weights, 1)
