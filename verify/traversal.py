"""Traversal verification of a tree (arXiv 2505.12398): from the leaves up, so that a whole path is judged together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.trees.layout import ancestors
from specdec.types import Draft, Law, Scores, TokenTree, Verdict
from specdec.verify.block import Block
from specdec.verify.chooser import Chooser
from specdec.verify.laws import finite_law, live_nodes, normalised, one_hot, without_token
from specdec.verify.recursive import closed_path


@dataclass(frozen=True, slots=True)
class Traversal:
    """Lossless when q is the law that siblings were drawn from, independently or without replacement, or the tree is deterministic.

    Nodes are met depth first, siblings in the order of their draws. A node is entered with the weight
    w = min(1, w' p'(x) / q'(x)), its parent's marked by ', and is left, once all its children were refused, with acceptance of
    its whole path at probability w and the next token from p. If it is refused, its parent goes on with
    R = sum_x [w' p' - q']+, p' = norm([w' p' - q']+), w' = R / (R + 1 - w') and, without replacement, q' without x,
    renormalised. A child whose token q' does not hold is passed over. On a chain it is block verification, decision for decision.
    """

    name: str = "traversal"
    lossless: bool = True
    laws: frozenset[Law] = frozenset({Law.INDEPENDENT, Law.WITHOUT_REPLACEMENT, Law.DETERMINISTIC})
    trees: bool = True
    uses_q: bool = True

    def verify(self, draft: Draft, scores: Scores, chooser: Chooser) -> Verdict:
        """See `Rule.verify`; one accept for each node and one pick."""
        if draft.tree.is_chain:
            return Block().verify(draft, scores, chooser)
        visit = _Visit(draft, scores.logits.softmax(-1), chooser)
        entered, left = _turns(draft.tree)
        for turn in range(2 * draft.tree.tokens.shape[1]):
            visit.enter(entered[:, turn])
            visit.leave(left[:, turn])
        above = ancestors(draft.tree.parents)
        accepted = above.gather(1, visit.end[:, None, None].expand(-1, 1, above.shape[2]))[:, 0]
        return closed_path(draft.tree, accepted, _row(visit.p, visit.end), chooser)


class _Visit:
    """The state of a depth-first visit. p, q: [B, N, V], what is left behind each node.  weights: [B, N].

    end: [B], the last node of the accepted path; the root until one is accepted.  done: [B].
    """

    def __init__(self, draft: Draft, p: Tensor, chooser: Chooser) -> None:
        q = finite_law(draft, p)
        self._tree, self._chooser, self._live = draft.tree, chooser, live_nodes(draft.tree)
        # Both are written to, and are ours: softmax and finite_law made them.
        self.p, self._q, self._shrinks = p, q, draft.law is Law.WITHOUT_REPLACEMENT
        self._weights = torch.ones_like(p[..., 0])
        self.end = torch.zeros_like(draft.tree.tokens[:, 0])
        self._done = torch.zeros_like(self.end, dtype=torch.bool)

    def enter(self, node: Tensor) -> None:
        """Give node [B] its weight, 0 where it was not drawn; -1 for none."""
        at, parent, token = self._place(node)
        place = parent[:, None] * self.p.shape[2] + token
        ours = self.p.flatten(1).gather(1, place)
        theirs = torch.ones_like(ours) if self._q is None else self._q.flatten(1).gather(1, place)
        weight = torch.where((theirs > 0) & (ours == ours), (self._weight(parent) * ours / theirs).clamp(max=1.0), 0.0)
        self._weights.scatter_(1, at, torch.where(node[:, None] > 0, weight, self._weights.gather(1, at)))

    def leave(self, node: Tensor) -> None:
        """Accept the path to node [B], or take it off its parent; -1 for none. Node 0 is where the visit ends: nothing to do."""
        at, parent, token = self._place(node)
        open_ = (node > 0) & self._live.gather(1, at)[:, 0] & ~self._done
        taken = self._chooser.accept(torch.where(open_, self._weights.gather(1, at)[:, 0], 0.0)) & open_
        self.end, self._done = torch.where(taken, node, self.end), self._done | taken
        law = self._law(parent, token)
        here, weight = _row(self.p, parent), self._weight(parent)
        residual = (weight * here - law).clamp(min=0)
        excess = residual.sum(1, keepdim=True)
        # A token that q does not hold was not drawn from it, and behind NaN nothing can be judged: such a refusal says nothing.
        refused = (open_ & ~taken)[:, None] & (law.gather(1, token) > 0) & (excess == excess)
        _set_row(self.p, parent, torch.where(refused, normalised(residual, here), here))
        self._weights.scatter_(1, parent[:, None], torch.where(refused, _after_refusal(weight, excess), weight))
        if self._q is not None and self._shrinks:
            _set_row(self._q, parent, torch.where(refused, without_token(law, token), law))

    def _place(self, node: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 1], [B] and [B, 1]: the node, its parent and its token; those of the root where there is none."""
        at = node.clamp(min=0)[:, None]
        return at, self._tree.parents.gather(1, at)[:, 0].clamp(min=0), self._tree.tokens.gather(1, at)

    def _law(self, parent: Tensor, token: Tensor) -> Tensor:
        return one_hot(token, self.p[:, 0]) if self._q is None else _row(self._q, parent)

    def _weight(self, node: Tensor) -> Tensor:
        return self._weights.gather(1, node[:, None])


def _after_refusal(weight: Tensor, excess: Tensor) -> Tensor:
    """R / (R + 1 - w), a parent's weight once a child was refused; 1 for the root."""
    return torch.where(weight < 1, excess / (excess + 1 - weight), 1.0)


def _row(values: Tensor, node: Tensor) -> Tensor:
    """[B, V]: the row of node [B]."""
    return values.gather(1, node[:, None, None].expand(-1, 1, values.shape[2]))[:, 0]


def _set_row(values: Tensor, node: Tensor, row: Tensor) -> None:
    values.scatter_(1, node[:, None, None].expand(-1, 1, values.shape[2]), row[:, None])


def _turns(tree: TokenTree) -> tuple[Tensor, Tensor]:
    """[B, 2 N] int64 each: the node that is entered, and the node that is left, at each turn of a depth-first visit; -1 for none.

    With s the size of a node's subtree, d its depth and e how many nodes are entered before it, it is entered at turn 2 e - d and
    left at turn 2 (e + s) - 1 - d. Padding is visited too, as the root's last children.
    """
    nodes = tree.tokens.shape[1]
    above = ancestors(tree.parents).double()
    number = torch.arange(nodes, device=tree.parents.device)
    earlier = (tree.parents[:, :, None] == tree.parents[:, None]) & (number < number[:, None])
    size, depth = above.sum(1), above.sum(2) - 1
    # Before a node come, for it and each of its ancestors but the root, the one above and the subtrees of earlier siblings.
    skipped = torch.bmm(earlier.double(), size[..., None])[..., 0] + (number > 0)
    before = torch.bmm(above, skipped[..., None])[..., 0]
    start, stop = (2 * before - depth).long(), (2 * (before + size) - 1 - depth).long()
    none = torch.full((tree.parents.shape[0], 2 * nodes), -1, device=number.device)
    every = number.expand_as(start)
    return none.scatter(1, start, every), none.scatter(1, stop, every)
