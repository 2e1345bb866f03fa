"""Chains: trees of width one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.kernels.transfer import on_device
from specdec.types import TokenTree


def chain_tree(roots: Tensor, drafted: Sequence[Tensor], counts: tuple[int, ...], line: Tensor) -> TokenTree:
    """The chain of each request: roots [B, 1], then the first counts[b] of the drafted tokens, each [B, 1].

    Cut to the longest chain; where counts differ, the rest of a row is padding (token 0, parent 0).
    line: [B or more, K + 1 or more], the parents of a chain, see `trees.layout.chain_parents`.
    """
    longest = max(counts)
    tokens = torch.cat((roots, *drafted[:longest]), 1)
    parents = line[: tokens.shape[0], : longest + 1]
    if min(counts) != longest:
        sizes = on_device(counts, roots.device)[:, None]
        padding = parents >= sizes
        tokens, parents = tokens.masked_fill(padding, 0), parents.masked_fill(padding, 0)
    return TokenTree(tokens, parents, tuple([n + 1 for n in counts]), is_chain=True)
