"""k-sequential selection (SpecTr, arXiv 2310.15141): children drawn independently, all judged by one threshold."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.types import Draft, Law, Scores, TokenTree, Verdict
from specdec.verify.chooser import Chooser
from specdec.verify.laws import finite_law, live_nodes, ratio
from specdec.verify.rejection import TokenRejection
from specdec.verify.walk import accept_nodes

# Halvings of [1, k]. What is left of the interval costs acceptance, about k / 2^24, and never exactness.
_HALVINGS = 24


@dataclass(frozen=True, slots=True)
class KSequential:
    """Lossless when every child was drawn from q on its own, equal siblings kept apart.

    Of k children the first is kept that passes with min(1, p(x) / (rho q(x))); with beta = sum_x min(p / rho, q) one is kept with
    probability 1 - (1 - beta)^k, and rho in [1, k] is the least for which that is at most rho beta: at least 1 - 1/e of what any
    rule reaches. If none is kept the law is norm(p - min(p / rho, q) (1 - (1 - beta)^k) / beta). On a chain it is token
    rejection, decision for decision.
    """

    name: str = "k-sequential"
    lossless: bool = True
    laws: frozenset[Law] = frozenset({Law.INDEPENDENT})
    trees: bool = True
    uses_q: bool = True

    def verify(self, draft: Draft, scores: Scores, chooser: Chooser) -> Verdict:
        """See `Rule.verify`; one accept over all nodes and one pick."""
        tree = draft.tree
        if tree.is_chain or tree.tokens.shape[1] == 1:
            return TokenRejection().verify(draft, scores, chooser)
        p = scores.logits.softmax(-1)
        q = finite_law(draft, p)
        assert q is not None
        behind = tree.parents.clamp(min=0)
        count = _children(tree)
        rho = threshold(p, q, count)
        kept = chooser.accept(_passes(p / rho[..., None].to(p.dtype), q, tree, behind))
        number = torch.arange(tree.tokens.shape[1], device=p.device)
        verdict = accept_nodes(tree, _first_kept(kept, behind), number.expand_as(tree.tokens))
        last = verdict.next_token[:, None]
        row = last[..., None].expand(-1, 1, p.shape[-1])
        here, law = p.gather(1, row)[:, 0], q.gather(1, row)[:, 0]
        left = _left(here, law, rho.gather(1, last), count.gather(1, last))
        token = chooser.pick(torch.where(left.sum(1, keepdim=True) > 0, left, here.nan_to_num(nan=0.0)))
        return replace(verdict, next_token=token.masked_fill(here[:, 0].isnan(), -1))


def threshold(p: Tensor, q: Tensor, count: Tensor) -> Tensor:
    """[...] float64 rho of rows with count [...] children, rounded up, since a lower one would not be lossless. p, q: [..., V]."""
    high = count.double().clamp(min=1)
    low = torch.ones_like(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        beta = _overlap(p, q, middle).sum(-1)
        enough = _some_kept(beta, count) <= middle * beta
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high


def _overlap(p: Tensor, q: Tensor, rho: Tensor) -> Tensor:
    return torch.minimum(p / rho[..., None].to(p.dtype), q)


def _some_kept(beta: Tensor, count: Tensor) -> Tensor:
    """1 - (1 - beta)^k in float64."""
    return 1 - (1 - beta.double()).clamp(min=0) ** count


def _children(tree: TokenTree) -> Tensor:
    """[B, N] int64: how many children each node has."""
    drafted = live_nodes(tree)[:, 1:].long()
    return torch.zeros_like(tree.tokens).scatter_add_(1, tree.parents[:, 1:], drafted)


def _passes(scaled: Tensor, q: Tensor, tree: TokenTree, behind: Tensor) -> Tensor:
    """[B, N]: with what probability each node is kept; 0 for node 0 and padding. scaled: p / rho."""
    row, token = behind[..., None].expand_as(q), tree.tokens[..., None]
    prob = ratio(scaled.gather(1, row).gather(2, token)[..., 0], q.gather(1, row).gather(2, token)[..., 0])
    return torch.where(live_nodes(tree) & (tree.parents >= 0), prob, 0.0)


def _first_kept(kept: Tensor, behind: Tensor) -> Tensor:
    """[B, N] bool: kept nodes none of whose earlier siblings is kept."""
    number = torch.arange(kept.shape[1], device=kept.device)
    earlier = (behind[:, :, None] == behind[:, None]) & (number < number[:, None])
    return kept & ~(earlier & kept[:, None]).any(2)


def _left(here: Tensor, law: Tensor, rho: Tensor, count: Tensor) -> Tensor:
    """[B, V]: what is left of the target's law behind a node none of whose children was kept; all of it behind a leaf."""
    taken = _overlap(here, law, rho[:, 0])
    beta = taken.sum(-1).double()
    scale = torch.where(beta > 0, _some_kept(beta, count[:, 0]) / beta, 0.0)
    return (here - taken * scale[:, None].to(here.dtype)).clamp(min=0).nan_to_num(nan=0.0)
