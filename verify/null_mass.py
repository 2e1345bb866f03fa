"""Null-mass repair: a drafted token may be dropped for what it is, if the mass that dropping takes from q is on record."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import IncompatibleRuleError
from specdec.kernels.transfer import on_device
from specdec.types import Draft, Law, TokenTree


@dataclass(frozen=True, slots=True)
class RepairedDraft(Draft):
    """Chains of which tokens were dropped after they were drawn, and on which rejection and block verification stay exact.

    Let K be the tokens that would have been kept behind a node, all other draws being what they are. Then the proposal behind
    it is q 1[K], and what is missing went to a null token of target mass 0: a kept token is judged as ever, and where the null
    token was drawn nothing is accepted and the next token comes from norm([p - q 1[K]]+), not from p.

    q: row n is q 1[K] behind node n.  dropped: [B, N] bool, the nodes behind which a token was drawn and none is left.

    The text of each request has the target's law, whatever the others drew. Where K depends on other requests' draws, the texts of
    one round are not independent of each other.
    """

    dropped: Tensor | None = None


def repaired(draft: Draft, kept: Tensor, num_nodes: tuple[int, ...]) -> Draft:
    """The first num_nodes[b] nodes, root included, of each drawn chain, with the null mass on record.

    kept: [B, N, V] bool, which tokens would have been kept behind each node, given all else; so the first token of a chain that
    is not in it ends the chain, and num_nodes says so on the host. A deterministic or coupled draft has no q to mend and is only
    cut. Raises IncompatibleRuleError for drawn trees.
    """
    tree = draft.tree
    if not tree.is_chain and draft.law in (Law.INDEPENDENT, Law.WITHOUT_REPLACEMENT):
        raise IncompatibleRuleError(f"null-mass repair is for chains; this draft is a tree of {draft.law} draws")
    nodes = max(num_nodes)
    sizes = on_device([num_nodes, tree.num_nodes], tree.tokens.device)[..., None]
    number = torch.arange(nodes, device=tree.tokens.device)
    beyond = number >= sizes[0]
    tokens, parents = tree.tokens[:, :nodes].masked_fill(beyond, 0), tree.parents[:, :nodes].masked_fill(beyond, 0)
    cut = TokenTree(tokens, parents, num_nodes, tree.is_chain)
    if draft.q is None:
        return Draft(cut, draft.law)
    q = draft.q[:, :nodes].masked_fill(~kept[:, :nodes] | beyond[..., None], 0.0)
    return RepairedDraft(cut, draft.law, q, dropped=(number == sizes[0] - 1) & (sizes[0] < sizes[1]))


def null_behind(draft: Draft, node: Tensor) -> Tensor:
    """[B] bool: whether a token was drawn behind node [B] and dropped for what it was."""
    dropped = draft.dropped if isinstance(draft, RepairedDraft) else None
    if dropped is None:
        return torch.zeros_like(node, dtype=torch.bool)
    return dropped.gather(1, node[:, None])[:, 0]
