"""Packs trees and committed tokens of all requests into the rows of one forward."""

from __future__ import annotations

from collections.abc import Sequence
from operator import add

import torch
from torch import Tensor

from specdec.cache import KVCache
from specdec.kernels.rows import Rows
from specdec.kernels.transfer import on_device
from specdec.trees.layout import ancestors, depths
from specdec.types import TokenTree


def chain_rows(cache: KVCache, texts: Sequence[Sequence[int]]) -> Rows:
    """Rows that append texts[b] to row b of the cache."""
    base, sizes = tuple(cache.lengths), tuple(map(len, texts))
    span = max(map(add, base, sizes))
    cache.ensure(span)
    tokens = on_device([[token for text in texts for token in text]], cache.slots.device)
    if len(sizes) == 1:
        positions = cache.slots[base[0] : span]
    else:
        places = [n + i for n, size in zip(base, sizes, strict=True) for i in range(size)]
        positions = on_device(places, cache.slots.device)
    return Rows(base, sizes, tokens, positions[None], positions, base, shared=cache.shared)


def next_rows(cache: KVCache, ahead: int, tokens: Tensor) -> Rows:
    """One row for each row of the cache, `ahead` slots behind its tokens: a chain sees all before it. tokens: [B, 1]."""
    base = tuple([n + ahead for n in cache.lengths])
    cache.ensure(max(base) + 1)
    slots = cache.slots[base[0] : base[0] + 1] if len(base) == 1 else on_device(base, cache.slots.device)
    return Rows(base, (1,) * len(base), tokens.view(1, -1), slots[None], slots, base, shared=cache.shared)


def tree_rows(cache: KVCache, tree: TokenTree) -> Rows:
    """Rows that score every live node of each request's tree behind what row b of the cache holds."""
    lengths = cache.lengths
    cache.ensure(max(map(add, lengths, tree.num_nodes)))
    if len(tree.num_nodes) == 1:
        return _one_request(lengths[0], tree, cache.slots)
    base, sizes = tuple(lengths), tree.num_nodes
    device, width = tree.tokens.device, tree.tokens.shape[1]
    live = _live(sizes, width, device)
    start = on_device(base, device)[:, None]
    order = torch.arange(width, device=device)
    depth = order.expand(len(base), width) if tree.is_chain else depths(tree.parents)
    slots = (start + order).reshape(-1)[live]
    positions = (start + depth).reshape(-1)[live]
    tokens = tree.tokens.reshape(-1)[live]
    seen, offsets = (None, None) if tree.is_chain else (ancestors(tree.parents), depth)
    if seen is not None:
        widest = max(sizes)
        seen, offsets = seen[:, :widest, :widest], depth[:, :widest]
    return Rows(base, sizes, tokens[None], positions[None], slots, base, seen, offsets, cache.shared)


def _one_request(length: int, tree: TokenTree, line: Tensor) -> Rows:
    size = tree.num_nodes[0]
    slots = line[length : length + size]
    tokens = tree.tokens if tree.tokens.shape[1] == size else tree.tokens[:, :size]
    if tree.is_chain or size == 1:
        return Rows((length,), (size,), tokens, slots[None], slots, (length,))
    parents = tree.parents[:, :size]
    depth = depths(parents)
    return Rows((length,), (size,), tokens, depth + length, slots, (length,), ancestors(parents), depth)


def doubled_row(cache: KVCache, token: Tensor) -> Rows:
    """The one row of a tree without draft, and a copy of it in the next slot, where nothing committed lies. token: [1, 1]."""
    length = cache.lengths[0]
    cache.ensure(length + 2)
    slots = cache.slots[length : length + 2]
    return Rows((length,), (2,), token.expand(1, 2), slots[None, :1].expand(1, 2), slots, (length,))


def _live(sizes: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Flat indices of the live nodes in a padded [B, N] value."""
    return on_device([b * width + n for b, size in enumerate(sizes) for n in range(size)], device)
