"""Keep the most likely nodes of an expanded tree (EAGLE-2, arXiv 2406.16858, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.transfer import on_device
from specdec.types import TokenTree


def rerank(roots: Tensor, tokens: Tensor, parents: Tensor, scores: Tensor, counts: tuple[int, ...]) -> TokenTree:
    """The counts[b] candidates of highest path probability, the ancestors of each among them.

    tokens, parents, scores: [B, M]; candidates come parents first, parents[b, m] is a candidate or -1 for the root, and
    scores are path log-probabilities, which never rise from parent to child: so the best are closed under ancestors, ties
    going to the earlier candidate. No synchronisation: counts are host integers.
    """
    batch, candidates = tokens.shape
    widest = min(max(counts), candidates)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :widest]
    counts = tuple(min(n, candidates) for n in counts)
    if min(counts) != widest:
        beyond = torch.arange(widest, device=tokens.device) >= on_device(counts, tokens.device)[:, None]
        order = order.masked_fill(beyond, candidates)
    order = order.sort(1).values
    live = order < candidates
    safe = order.clamp(max=candidates - 1)
    number = torch.zeros(batch, candidates + 1, dtype=torch.long, device=tokens.device)
    places = torch.arange(1, widest + 1, device=tokens.device).expand(batch, -1)
    number.scatter_(1, torch.where(live, order + 1, 0), places * live)
    number[:, 0] = 0
    own = number.gather(1, parents.gather(1, safe) + 1)
    kept = tokens.gather(1, safe)
    root = torch.full_like(roots[:, None], -1)
    return TokenTree(torch.cat((roots[:, None], kept * live), 1), torch.cat((root, own * live), 1), tuple(n + 1 for n in counts))
