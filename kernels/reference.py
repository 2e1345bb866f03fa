"""The PyTorch twin of every kernel: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Softmax attention of each node over the slots that it sees, in the dtype given.

    query: [B, H, N, D].  key, value: [B, H // G, S, D].  seen: [B, N, S] bool, no row empty.  Returns [B, H, N, D].
    softcap: logits become softcap * tanh(logits / softcap) before the mask (Gemma 2).
    """
    batch, heads, nodes, width = query.shape
    kv_heads = key.shape[1]
    packed = query.reshape(batch, kv_heads, heads // kv_heads * nodes, width)
    logits = torch.matmul(packed, key.transpose(2, 3)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    hidden = ~seen.repeat(1, heads // kv_heads, 1)[:, None]
    weights = logits.masked_fill(hidden, float("-inf")).to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    return torch.matmul(weights.to(value.dtype), value).reshape(batch, heads, nodes, value.shape[3])


def kv_compact(cache: Tensor, rows: Tensor, source: Tensor, target: Tensor) -> None:
    """Move slots of all layers at once, in place: cache[:, :, rows, :, target] = cache[:, :, rows, :, source].

    cache: [L, 2, B, H, S, D].  rows, source, target: [M] int64. Reads all before it writes, so moves may overlap.
    """
    cache[:, :, rows, :, target] = cache[:, :, rows, :, source]
