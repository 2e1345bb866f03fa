"""Chains: trees of width one."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.trees.layout import chain_parents
from specdec.types import TokenTree


def chain_tree(roots: Tensor, drafted: Tensor, counts: tuple[int, ...]) -> TokenTree:
    """The chain of each request: roots [B], then the first counts[b] of drafted [B, K].

    Cut to the longest chain; where counts differ, the rest of a row is padding (token 0, parent 0).
    """
    batch, longest = roots.shape[0], max(counts)
    tokens = torch.cat((roots[:, None], drafted[:, :longest]), 1)
    parents = chain_parents(batch, longest + 1, roots.device)
    if min(counts) != longest:
        sizes = torch.tensor(counts, device=roots.device)[:, None]
        padding = torch.arange(longest + 1, device=roots.device) > sizes
        tokens, parents = tokens.masked_fill(padding, 0), parents.masked_fill(padding, 0)
    return TokenTree(tokens, parents, tuple(n + 1 for n in counts), is_chain=True)
