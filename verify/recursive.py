"""Recursive rejection over a node's children, one after the other, each against what the ones before it left of the target's law.

Independent draws: the multi-step rule of SpecInfer (arXiv 2305.09781). Without replacement: recursive speculative
decoding (arXiv 2402.14160) and Sequoia (arXiv 2402.12374).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.types import Draft, Law, Scores, TokenTree, Verdict
from specdec.verify.chooser import Chooser
from specdec.verify.laws import finite_law, live_nodes, normalised, one_hot, ratio, without_token
from specdec.verify.rejection import TokenRejection
from specdec.verify.walk import accept_nodes


@dataclass(frozen=True, slots=True)
class Recursive:
    """Lossless when every child was drawn from q on its own, equal siblings kept apart, or when the tree is deterministic.

    Child i is accepted with min(1, p_i(x) / q(x)), and p_{i+1} = norm([p_i - q]+) where it is not: some child is accepted with
    probability 1 - prod_i (1 - sum_x min(p_i, q)). A deterministic child has a one-hot q of its own. On a chain it is token
    rejection, decision for decision.
    """

    name: str = "recursive"
    lossless: bool = True
    laws: frozenset[Law] = frozenset({Law.INDEPENDENT, Law.DETERMINISTIC})
    trees: bool = True
    uses_q: bool = True

    def verify(self, draft: Draft, scores: Scores, chooser: Chooser) -> Verdict:
        """See `Rule.verify`; one accept for each drafted node and one pick."""
        return _verify(draft, scores, chooser, without=False)


@dataclass(frozen=True, slots=True)
class RecursiveWithoutReplacement:
    """Lossless when siblings were drawn from q without replacement, in the order of their nodes, or the tree is deterministic.

    As `Recursive`, but a rejected token is taken out of q and what is left of q renormalised, as it was for the next draw. A
    child whose token q no longer holds is passed over. Independent draws without the repeated ones are draws without replacement,
    so it would be exact for them too, but `Recursive` accepts more of those.
    """

    name: str = "recursive-without-replacement"
    lossless: bool = True
    laws: frozenset[Law] = frozenset({Law.WITHOUT_REPLACEMENT, Law.DETERMINISTIC})
    trees: bool = True
    uses_q: bool = True

    def verify(self, draft: Draft, scores: Scores, chooser: Chooser) -> Verdict:
        """See `Rule.verify`; one accept for each drafted node and one pick."""
        return _verify(draft, scores, chooser, without=True)


def _verify(draft: Draft, scores: Scores, chooser: Chooser, *, without: bool) -> Verdict:
    if draft.tree.is_chain:
        return TokenRejection().verify(draft, scores, chooser)
    p = scores.logits.softmax(-1)
    accepted, here = _walk(draft, p, chooser, without=without)
    return closed_path(draft.tree, accepted, here, chooser)


def _walk(draft: Draft, p: Tensor, chooser: Chooser, *, without: bool) -> tuple[Tensor, Tensor]:
    """[B, N] bool, the nodes of the accepted path, and [B, V], what is left of the target's law behind its end.

    Nodes are met in their order: parents come before children and siblings in the order of their draws.
    """
    tree, q = draft.tree, finite_law(draft, p)
    live = live_nodes(tree)
    here, law = p[:, 0], p[:, 0] if q is None else q[:, 0]
    at = torch.zeros_like(tree.tokens[:, 0])
    accepted = [torch.zeros_like(live[:, 0])]
    for node in range(1, tree.tokens.shape[1]):
        token = tree.tokens[:, node, None]
        if q is None:
            law = one_hot(token, here)
        share = law.gather(1, token)[:, 0]
        asked = (tree.parents[:, node] == at) & live[:, node] & (share > 0)
        taken = chooser.accept(torch.where(asked, ratio(here.gather(1, token)[:, 0], share), 0.0)) & asked
        failed = (asked & ~taken)[:, None]
        left = normalised(here - law, here)
        here = torch.where(taken[:, None], p[:, node], torch.where(failed, left, here))
        if q is not None:
            rest = without_token(law, token) if without else law
            law = torch.where(taken[:, None], q[:, node], torch.where(failed, rest, law))
        at = torch.where(taken, node, at)
        accepted.append(taken)
    return torch.stack(accepted, 1), here


def closed_path(tree: TokenTree, accepted: Tensor, weights: Tensor, chooser: Chooser) -> Verdict:
    """The verdict of one accepted path and a draw behind its end. accepted: [B, N] bool, closed under parents, one per depth.

    weights: [B, V], the law of the next token; where it holds NaN the token is -1. One pick.
    """
    verdict = accept_nodes(tree, accepted, torch.zeros_like(tree.tokens))
    token = chooser.pick(weights.nan_to_num(nan=0.0))
    return replace(verdict, next_token=token.masked_fill(weights[:, 0].isnan(), -1))
