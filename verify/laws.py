"""What rules do with laws: q as it may be trusted, the chance that a token is kept, and what is left of a law."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.transfer import on_device
from specdec.types import Draft, TokenTree


def finite_law(draft: Draft, p: Tensor) -> Tensor | None:
    """[B, N, V] q in p's dtype, zero in rows with NaN or infinity, so that nothing behind them is accepted; None without a q."""
    if draft.q is None:
        return None
    return torch.where(draft.q.isfinite().all(-1, keepdim=True), draft.q.to(p.dtype), 0.0)


def chain_law(draft: Draft, p: Tensor) -> Tensor:
    """[B, N, V] q behind every node of a chain, see `finite_law`; one-hot where the chain is deterministic."""
    law = finite_law(draft, p)
    if law is None:
        law = torch.zeros_like(p)
        law[:, :-1].scatter_(2, draft.tree.tokens[:, 1:, None], 1.0)
    return law


def live_nodes(tree: TokenTree) -> Tensor:
    """[B, N] bool: the nodes that are not padding."""
    sizes = on_device(tree.num_nodes, tree.tokens.device)[:, None]
    return torch.arange(tree.tokens.shape[1], device=tree.tokens.device) < sizes


def one_hot(token: Tensor, like: Tensor) -> Tensor:
    """[B, V]: all weight on token [B, 1]. like: [B, V], for dtype and device."""
    return torch.zeros_like(like).scatter_(1, token, 1.0)


def ratio(p: Tensor, q: Tensor) -> Tensor:
    """min(1, p / q), and 0 where q is 0 or p is NaN: such a token was not drawn from q."""
    return torch.where((q > 0) & (p == p), (p / q).clamp(max=1.0), 0.0)


def normalised(weights: Tensor, fallback: Tensor) -> Tensor:
    """[B, V]: the positive part of weights, brought to sum 1; the fallback where there is none, or NaN."""
    positive = weights.clamp(min=0)
    total = positive.sum(-1, keepdim=True)
    return torch.where(total > 0, positive / total, fallback)


def without_token(law: Tensor, token: Tensor) -> Tensor:
    """[B, V]: law without token [B, 1], renormalised; zero where nothing is left."""
    rest = law.scatter(1, token, 0.0)
    return normalised(rest, rest)
