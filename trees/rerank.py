"""The likeliest continuations of nodes, and the likeliest nodes of an expanded tree (EAGLE-2, arXiv 2406.16858, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.transfer import on_device
from specdec.types import TokenTree


def likeliest(logits: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """[B, M, W] each: log-probabilities, highest first, and tokens of the likeliest continuations of M nodes.

    logits: [B, M, V].  widths: of each request; W is the largest, or V. What is beyond a request's width, or stands where the
    logits hold NaN, is never likely (minus infinity), so that it never takes the place of a node.
    """
    width = min(max(widths), logits.shape[-1])
    values, tokens = logits.float().log_softmax(-1).topk(width, dim=-1)
    never = values.isnan()
    if min(widths) < width:
        limits = on_device(widths, logits.device)[:, None, None]
        never = never | (torch.arange(width, device=logits.device) >= limits)
    return values.masked_fill(never, float("-inf")), tokens


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
