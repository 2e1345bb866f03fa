"""Packs trees and committed tokens of all requests into the rows of one forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.kernels.rows import Rows
from specdec.trees.layout import ancestors, depths
from specdec.types import TokenTree


def chain_rows(lengths: Sequence[int], texts: Sequence[Sequence[int]], device: torch.device) -> Rows:
    """Rows that append texts[b] behind lengths[b] cached tokens."""
    sizes = tuple(len(text) for text in texts)
    tokens = torch.tensor([[token for text in texts for token in text]], device=device)
    if len(sizes) == 1:
        positions = torch.arange(lengths[0], lengths[0] + sizes[0], device=device)
    else:
        places = [n + i for n, size in zip(lengths, sizes, strict=True) for i in range(size)]
        positions = torch.tensor(places, device=device)
    base = tuple(lengths)
    return Rows(base, sizes, tokens, positions[None], positions, base)


def tree_rows(lengths: Sequence[int], tree: TokenTree) -> Rows:
    """Rows that score every live node of each request's tree behind lengths[b] cached tokens."""
    if len(tree.num_nodes) == 1:
        return _one_request(lengths[0], tree)
    base, sizes = tuple(lengths), tree.num_nodes
    device, width = tree.tokens.device, tree.tokens.shape[1]
    live = _live(sizes, width, device)
    start = torch.tensor(base, device=device)[:, None]
    order = torch.arange(width, device=device)
    depth = order.expand(len(base), width) if tree.is_chain else depths(tree.parents)
    slots = (start + order).reshape(-1)[live]
    positions = (start + depth).reshape(-1)[live]
    tokens = tree.tokens.reshape(-1)[live]
    seen, offsets = (None, None) if tree.is_chain else (ancestors(tree.parents), depth)
    if seen is not None:
        widest = max(sizes)
        seen, offsets = seen[:, :widest, :widest], depth[:, :widest]
    return Rows(base, sizes, tokens[None], positions[None], slots, base, seen, offsets)


def _one_request(length: int, tree: TokenTree) -> Rows:
    size, device = tree.num_nodes[0], tree.tokens.device
    slots = torch.arange(length, length + size, device=device)
    tokens = tree.tokens[:, :size]
    if tree.is_chain or size == 1:
        return Rows((length,), (size,), tokens, slots[None], slots, (length,))
    parents = tree.parents[:, :size]
    depth = depths(parents)
    return Rows((length,), (size,), tokens, depth + length, slots, (length,), ancestors(parents), depth)


def _live(sizes: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Flat indices of the live nodes in a padded [B, N] value."""
    return torch.tensor([b * width + n for b, size in enumerate(sizes) for n in range(size)], device=device)
