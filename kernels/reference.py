"""The PyTorch twin of every kernel: the definition of correct."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.kernels.tiles import Items, KeyValues, Logits


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, *, scale: float, softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention of each node over the slots that it sees, in the dtype given.

    query: [B, H, N, D].  key, value: [B, H // G, S, D].  seen: [B, N, S] bool, no row empty.  Returns [B, H, N, D].
    softcap: logits become softcap * tanh(logits / softcap) before the mask (Gemma 2).
    sinks: [H], one more logit of each head, which takes weight and has no value (GPT-OSS).
    """
    batch, heads, nodes, width = query.shape
    kv_heads = key.shape[1]
    packed = query.reshape(batch, kv_heads, heads // kv_heads * nodes, width)
    logits = torch.matmul(packed, key.transpose(2, 3)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    hidden = ~seen.repeat(1, heads // kv_heads, 1)[:, None]
    logits = logits.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        own = sinks.to(logits.dtype).view(kv_heads, -1, 1).expand(-1, -1, nodes).reshape(1, kv_heads, -1, 1)
        logits = torch.cat((logits, own.expand(batch, -1, -1, -1)), 3)
    weights = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)[..., : key.shape[2]]
    return torch.matmul(weights.to(value.dtype), value).reshape(batch, heads, nodes, value.shape[3])


def packed_attention(query: Tensor, cache: KeyValues, groups: Sequence[Items], how: Logits) -> Tensor:
    """Twin of `tree_attention.tree_attention`, in float64, row by row; [R, H, D] in the query's dtype."""
    group = query.shape[1] // cache.key.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    for row in range(query.shape[0]):
        found = [_item_of(cache, items, how, row) for items in groups]
        keys, values, seen = (torch.cat(x, -2 if i < 2 else 0) for i, x in enumerate(zip(*found, strict=True)))
        logits = torch.einsum("hd,hsd->hs", query[row].double(), keys.repeat_interleave(group, 0)) * how.scale
        if how.softcap is not None:
            logits = how.softcap * torch.tanh(logits / how.softcap)
        logits = logits.masked_fill(~seen, float("-inf"))
        if how.sinks is not None:
            logits = torch.cat((logits, how.sinks.double()[:, None]), 1)
        weights = logits.softmax(-1).nan_to_num()[:, : keys.shape[1]]
        out[row] = torch.einsum("hs,hsd->hd", weights, values.repeat_interleave(group, 0))
    return out.to(query.dtype)


def _item_of(cache: KeyValues, items: Items, how: Logits, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [Hkv, S, D] in float64 of the item that holds this packed row, and which of them it sees."""
    for item, (first, rows, cache_row, begin, committed, end) in enumerate(items.table.tolist()):
        if first <= row < first + rows:
            slots = torch.arange(begin, end, device=items.table.device)
            ahead = slots - committed
            if items.bits is None:
                seen = ahead <= row - first
            else:
                words = items.bits[row][(ahead.clamp(min=0) >> 6).clamp(max=items.bits.shape[1] - 1)]
                seen = (ahead < 0) | ((words >> (ahead.clamp(min=0) & 63)) & 1).bool()
            if how.window is not None:
                ahead_place = ahead if items.offsets is None else items.offsets[item][ahead.clamp(0, items.offsets.shape[1] - 1)]
                place = torch.where(ahead < 0, slots, committed + ahead_place)
                seen = seen & (items.positions[row] - place < how.window)
            return *_read(cache, cache_row, slots), seen
    raise IndexError(f"no item holds row {row}")


def _read(cache: KeyValues, cache_row: int, slots: Tensor) -> tuple[Tensor, Tensor]:
    """[Hkv, S, D] float64 of these slots, through the block table and the scales."""
    size = cache.key.shape[2]
    where = (cache.pages[cache_row][slots // size], slots % size) if cache.pages is not None else (cache_row, slots)
    read = []
    for stored, scale in ((cache.key, cache.key_scale), (cache.value, cache.value_scale)):
        piece = stored.movedim(1, 2)[where].movedim(1, 0)
        if stored.dtype == torch.uint8:
            assert scale is not None
            piece = piece.contiguous().view(torch.float8_e4m3fn).double() * scale.double()[:, None, None]
        read.append(piece.double())
    return read[0], read[1]


def kv_compact(cache: Tensor, rows: Tensor, source: Tensor, target: Tensor) -> None:
    """Move slots of all layers at once, in place: cache[:, :, rows, :, target] = cache[:, :, rows, :, source].

    cache: [L, 2, B, H, S, D].  rows, source, target: [M] int64. Reads all before it writes, so moves may overlap.
    """
    cache[:, :, rows, :, target] = cache[:, :, rows, :, source]
