"""Trees built on the host, from lists."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specdec.kernels.transfer import on_device
from specdec.types import TokenTree


def tree_from_lists(tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]], device: torch.device) -> TokenTree:
    """A tree for each request, padded to the widest. tokens[b], parents[b]: nodes in topological order, root first."""
    widest = max(map(len, tokens))
    lists = (tokens, parents)
    values = on_device([[[*row, *[0] * (widest - len(row))] for row in rows] for rows in lists], device)
    is_chain = all(parent == n - 1 for row in parents for n, parent in enumerate(row))
    return TokenTree(values[0], values[1], tuple(map(len, tokens)), is_chain)
