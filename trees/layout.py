"""What follows from a tree's parents: depths and ancestors, derived here and nowhere else, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

# On a CPU, trees from this size on go row by row.
_BY_ROWS_FROM = 96


def ancestors(parents: Tensor) -> Tensor:
    """[B, N, N] bool: entry [b, n, m] is True where m is n or an ancestor of n.

    parents: [B, N] int64, parents[b, n] < n, -1 for the root. By doubling: log2 of the depth matrix products, no
    synchronisation.
    """
    nodes = parents.shape[1]
    if nodes > _BY_ROWS_FROM and parents.device.type == "cpu":
        return _by_rows(parents)
    own = torch.arange(nodes, device=parents.device)
    reach = ((own == own[:, None]) | (own == parents[:, :, None])).float()
    for _ in range(max(nodes - 2, 0).bit_length()):
        reach = torch.bmm(reach, reach).clamp_(max=1.0)
    return reach > 0


def _by_rows(parents: Tensor) -> Tensor:
    """The same, a node after the other: N copies of a row, where products of large matrices would take seconds."""
    batch, nodes = parents.shape
    reach = torch.eye(nodes, dtype=torch.bool).repeat(batch, 1, 1)
    request = torch.arange(batch)
    for node in range(1, nodes):
        reach[:, node] |= reach[request, parents[:, node]]
    return reach


def depths(parents: Tensor) -> Tensor:
    """[B, N] int64, edges between each node and the root."""
    return ancestors(parents).sum(2) - 1


def chain_parents(batch: int, nodes: int, device: torch.device) -> Tensor:
    """[B, N] int64: every node's parent is the node before it."""
    return torch.arange(-1, nodes - 1, device=device).expand(batch, nodes)
