"""Greedy multi-path block verification (arXiv 2602.16961): the best of several paths, judged as a block by the law of the best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.types import Draft, Law, Scores, TokenTree, Verdict
from specdec.verify.block import Block, block_verdict
from specdec.verify.chooser import Chooser
from specdec.verify.laws import finite_law, live_nodes


@dataclass(frozen=True, slots=True)
class MultiPathBlock:
    """Lossless when every node was drawn from q on its own: the root's children begin the paths, equal ones kept apart.

    Behind a node tokens are ordered by p / q. Of K paths the one counts that is first in the order of their tokens, one depth
    after the other; its token at a node behind which A is the probability of all worse paths, x of the node's own path, y and z
    of its worse and of its own continuation, has the law ((A + y + z)^K - (A + y)^K) / ((A + x)^K - A^K), and block
    verification with that law for q decides. Paths of unequal length are compared as far as the shortest goes. Of several
    children below depth 1 only the first is looked at. On a chain it is block verification, decision for decision.
    """

    name: str = "multi-path-block"
    lossless: bool = True
    laws: frozenset[Law] = frozenset({Law.INDEPENDENT})
    trees: bool = True
    uses_q: bool = True

    def verify(self, draft: Draft, scores: Scores, chooser: Chooser) -> Verdict:
        """See `Rule.verify`; one accept over the tokens of the best path and one pick."""
        tree = draft.tree
        if tree.is_chain or tree.tokens.shape[1] == 1:
            return Block().verify(draft, scores, chooser)
        p = scores.logits.softmax(-1)
        q = finite_law(draft, p)
        assert q is not None
        paths = _paths(tree)
        winner, laws = _best_path(tree, paths, p, q)
        nodes = torch.nn.functional.pad(winner.clamp(min=0), (1, 0))
        rows = p.gather(1, nodes[..., None].expand_as(p))
        drafted = tree.tokens.gather(1, nodes)[:, 1:]
        count, token = block_verdict(rows, laws, drafted, (winner >= 0).sum(1), chooser)
        depth = torch.arange(winner.shape[1], device=p.device)
        return Verdict(count, token, nodes[:, 1:] * (depth < count[:, None]))


class _Paths(NamedTuple):
    """starts: [B, N] bool, the root's children.  following: [B, N], a node's first child, -1 for none.

    number: [B], how many paths there are, 1 at least.  shortest: [B], the length of the shortest.
    """

    starts: Tensor
    following: Tensor
    number: Tensor
    shortest: Tensor


def _paths(tree: TokenTree) -> _Paths:
    size = tree.tokens.shape[1]
    number, live = torch.arange(size, device=tree.tokens.device), live_nodes(tree)
    child = (tree.parents[:, None] == number[:, None]) & live[:, None]
    following = torch.where(child, number, size).amin(2)
    following = torch.where(following < size, following, -1)
    starts = (tree.parents == 0) & live
    at, length = number.expand_as(following), torch.zeros_like(following)
    for _ in range(1, size):
        length = length + (at >= 0)
        at = _step(following, at)
    shortest = torch.where(starts, length, size).amin(1)
    return _Paths(starts, following, starts.sum(1), shortest)


def _step(following: Tensor, at: Tensor) -> Tensor:
    """The node after each of at [B, ...] on its path; -1 behind the end."""
    return torch.where(at >= 0, following.gather(1, at.clamp(min=0)), -1)


def _best_path(tree: TokenTree, paths: _Paths, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N - 1], the nodes of the best path, -1 behind its end; and [B, N, V], the law that each of its tokens has as the best.

    Float64, since laws of the best are differences of powers. Of paths with equal tokens the first counts, up to where they part.
    """
    size = tree.tokens.shape[1]
    at = torch.where(paths.starts, torch.arange(size, device=p.device), -1)
    kept, node = paths.starts, torch.zeros_like(tree.tokens[:, 0])
    worse, share = torch.zeros_like(p[:, 0, 0], dtype=torch.float64), torch.ones_like(p[:, 0, 0], dtype=torch.float64)
    trail, laws = [], []
    for depth in range(size - 1):
        row = node[:, None, None].expand(-1, 1, p.shape[2])
        here, law = p.gather(1, row)[:, 0], q.gather(1, row)[:, 0]
        compared = (depth < paths.shortest)[:, None]
        rank, below = _order(here, law)
        of_best = law.double() * _factor(law.double(), below, worse, share, paths.number)
        laws.append(torch.where(compared, of_best.to(law.dtype), law))
        token = tree.tokens.gather(1, at.clamp(min=0))
        places = torch.where(kept, rank.gather(1, token), p.shape[2])
        kept = kept & (~compared | (places == places.amin(1, keepdim=True)))
        first = kept.int().argmax(1, keepdim=True)
        chosen, node = token.gather(1, first), at.gather(1, first)[:, 0]
        worse = worse + share * below.gather(1, chosen)[:, 0]
        share = share * law.double().gather(1, chosen)[:, 0]
        trail.append(at)
        at, node = _step(paths.following, at), node.clamp(min=0)
    laws.append(torch.zeros_like(laws[0]))
    best = kept.int().argmax(1)[:, None]
    return torch.cat([nodes.gather(1, best) for nodes in trail], 1), torch.stack(laws, 1)


def _order(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of each token by p / q, 0 for the best and the lower token first in a tie; and the q of all worse ones. [B, V] each."""
    order = (p / q).nan_to_num(nan=0.0).sort(dim=1, descending=True, stable=True).indices
    ranks = torch.arange(q.shape[1], device=q.device).expand_as(order)
    sums = q.double().gather(1, order).flip(1).cumsum(1).flip(1)
    sums = torch.nn.functional.pad(sums[:, 1:], (0, 1))
    return torch.empty_like(order).scatter_(1, order, ranks), torch.empty_like(sums).scatter_(1, order, sums)


def _factor(q: Tensor, below: Tensor, worse: Tensor, share: Tensor, number: Tensor) -> Tensor:
    """[B, V]: the law of the best path's token over q. q, below: [B, V], of a token and of all worse ones.  number: [B], K.

    worse, share: [B], the probabilities of the paths worse than the node's own, and of its own, up to the node.
    """
    worse, share, number = worse[:, None], share[:, None], number[:, None].double().clamp(min=1)
    return (_slope(worse + share * below, share * q, number) / _slope(worse, share, number)).nan_to_num(nan=0.0, posinf=0.0)


def _slope(low: Tensor, step: Tensor, power: Tensor) -> Tensor:
    """((low + step)^K - low^K) / step without cancellation; its limit where step is 0. low, step: 0 or more."""
    high = low + step
    log = torch.log1p(-torch.where(step > 0, step / high, 0.0))
    runs = torch.where(log < 0, torch.expm1(power * log) / torch.expm1(log), power)
    return high ** (power - 1) * runs
