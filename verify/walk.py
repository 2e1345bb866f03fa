"""From what the target chose at every node to the accepted path, without a serial walk."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.transfer import on_device
from specdec.trees.layout import ancestors
from specdec.types import TokenTree, Verdict


def accept_matches(tree: TokenTree, chosen: Tensor) -> Verdict:
    """Accept the longest path whose every token is what the target chose at its parent.

    chosen: [B, N] int64, the target's token behind each node, -1 where its row held NaN. At most one child of a node can match
    when siblings differ; of equal siblings the first counts.
    """
    if tree.tokens.shape[1] == 1:
        return Verdict(torch.zeros_like(chosen[:, 0]), chosen[:, 0])
    before = chosen[:, :-1] if tree.is_chain else chosen.gather(1, tree.parents[:, 1:])
    return _accept(tree, tree.tokens[:, 1:] == before, chosen)


def accept_nodes(tree: TokenTree, kept: Tensor, chosen: Tensor) -> Verdict:
    """Accept the longest path of which every node is kept; of equally long ones that with the first last node.

    kept: [B, N] bool, of node 0 nothing is asked.  chosen: [B, N] int64, the token that comes behind each node if it is the last.
    """
    if tree.tokens.shape[1] == 1:
        return Verdict(torch.zeros_like(chosen[:, 0]), chosen[:, 0])
    return _accept(tree, kept[:, 1:], chosen)


def _accept(tree: TokenTree, match: Tensor, chosen: Tensor) -> Verdict:
    """match: [B, N - 1] bool, of the drafted nodes; padding counts as none."""
    live = _live(tree)
    if live is not None:
        match = match & live
    return _on_chain(match, chosen) if tree.is_chain else _on_tree(tree, match, chosen)


def verdict_rows(verdict: Verdict, tokens: Tensor, parents: Tensor) -> Tensor:
    """[B, 2 + (N - 1) or 3 (N - 1)] int64, what a round reads back: number accepted, next token, the path's tokens, then its nodes,
    then all nodes' parents.

    tokens, parents: [B, N] of the tree. A chain's nodes and parents are left out: they are 1, 2, ... number accepted.
    """
    heads = verdict.num_accepted[:, None], verdict.next_token[:, None]
    if verdict.path is None:
        return torch.cat((*heads, tokens[:, 1:]), 1)
    return torch.cat((*heads, tokens.gather(1, verdict.path), verdict.path, parents[:, 1:]), 1)


def _live(tree: TokenTree) -> Tensor | None:
    """[B, N - 1] bool: drafted nodes that are not padding; None where there is no padding."""
    nodes = tree.tokens.shape[1]
    if min(tree.num_nodes) == nodes:
        return None
    sizes = on_device(tree.num_nodes, tree.tokens.device)[:, None]
    return torch.arange(1, nodes, device=tree.tokens.device) < sizes


def _on_chain(match: Tensor, chosen: Tensor) -> Verdict:
    count = match.cumprod(1).sum(1, keepdim=True)
    return Verdict(count[:, 0], chosen.gather(1, count)[:, 0])


def _on_tree(tree: TokenTree, match: Tensor, chosen: Tensor) -> Verdict:
    nodes = tree.tokens.shape[1]
    above = ancestors(tree.parents)
    kept = ~(above[..., 1:] & ~match[:, None]).any(2)
    depth = above.sum(2) - 1
    count, last = torch.where(kept, depth, -1).max(1)
    on_path = above.gather(1, last[:, None, None].expand(-1, 1, nodes))[:, 0]
    order = torch.where(on_path, depth, nodes)
    path = order.sort(dim=1, stable=True).indices[:, 1:]
    path = path * (torch.arange(nodes - 1, device=path.device) < count[:, None])
    return Verdict(count, chosen.gather(1, last[:, None])[:, 0], path)
