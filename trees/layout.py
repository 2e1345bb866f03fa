"""What follows from a tree's parents: depths and ancestors, derived here and nowhere else, on the device."""

from __future__ import annotations

import torch
from torch import Tensor


def ancestors(parents: Tensor) -> Tensor:
    """[B, N, N] bool: entry [b, n, m] is True where m is n or an ancestor of n.

    parents: [B, N] int64, parents[b, n] < n, -1 for the root. By doubling: log2 of the depth matrix products, no
    synchronisation.
    """
    nodes = parents.shape[1]
    own = torch.arange(nodes, device=parents.device)
    reach = ((own == own[:, None]) | (own == parents[:, :, None])).float()
    for _ in range(max(nodes - 2, 0).bit_length()):
        reach = torch.bmm(reach, reach).clamp_(max=1.0)
    return reach > 0


def depths(parents: Tensor) -> Tensor:
    """[B, N] int64, edges between each node and the root."""
    return ancestors(parents).sum(2) - 1


def chain_parents(batch: int, nodes: int, device: torch.device) -> Tensor:
    """[B, N] int64: every node's parent is the node before it."""
    return torch.arange(-1, nodes - 1, device=device).expand(batch, nodes)
