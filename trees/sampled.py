"""Trees whose tokens are drawn: K children per node, independently or without replacement, and by stochastic beam search.

Pure functions of logits and given noise. What is drawn where is decided by slots and by perturbed scores, never by what a token's
own probability turned out to be, so that q stays the law of the draw. Without replacement by the Gumbel top-k trick and by
stochastic beam search (arXiv 1903.06059), as in recursive speculative decoding (arXiv 2402.14160).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import SpecDecError
from specdec.kernels.transfer import on_device
from specdec.noise import Noise, Stream
from specdec.types import Draft, Law, TokenTree


@dataclass(frozen=True, slots=True)
class Level:
    """The nodes of one depth. tokens: [B, M].  parents: [B, M], which node of the level above, siblings in the order of draws.

    q: [B, W, V], the law behind each of the W nodes of the level above; the level above the first is the root, W = 1.
    """

    tokens: Tensor
    parents: Tensor
    q: Tensor


@dataclass(frozen=True, slots=True)
class Beam:
    """Where stochastic beam search stands. log_probs: [B, W] float64, of each node's path.  scores: [B, W], the same, perturbed."""

    log_probs: Tensor
    scores: Tensor


def level_gumbel(noise: Noise, requests: Tensor, starts: Tensor, depth: int, slots: int, vocabulary: int) -> Tensor:
    """[B, slots, V] float64 Gumbel noise of the draft stream for one depth. requests, starts: [B], slots and committed lengths."""
    device = requests.device
    slot = torch.arange(slots, device=device)
    return noise.gumbel(Stream.DRAFT, vocabulary, requests[:, None], starts[:, None], on_device(depth, device), slot)


def independent_level(logits: Tensor, gumbel: Tensor) -> Level:
    """K children behind each node, each drawn on its own, equal ones kept apart. logits: [B, W, V].  gumbel: [B, W * K, V]."""
    batch, width, vocabulary = logits.shape
    drawn = (_log_law(logits)[:, :, None] + gumbel.view(batch, width, -1, vocabulary)).argmax(-1)
    return _level(drawn, logits)


def level_without_replacement(logits: Tensor, gumbel: Tensor, children: int) -> Level:
    """Children behind each node drawn without replacement, in the order of their draws. logits, gumbel: [B, W, V].

    Where a law holds fewer tokens, the last children have tokens of probability 0, which rules pass over.
    """
    drawn = (_log_law(logits) + gumbel).topk(min(children, logits.shape[2]), dim=-1).indices
    return _level(drawn, logits)


def start_beam(batch: int, device: torch.device) -> Beam:
    """The root alone."""
    nothing = torch.zeros(batch, 1, dtype=torch.float64, device=device)
    return Beam(nothing, nothing)


def beam_level(beam: Beam, logits: Tensor, gumbel: Tensor, width: int) -> tuple[Level, Beam]:
    """The paths of one more depth drawn without replacement among all, `width` of them or as many as there are.

    logits, gumbel: [B, W, V]. A node's children are Gumbel variables of location log q(path), given that the largest of them is
    the node's own score; the best of the level are kept, highest first, so that siblings stand in the order of their draws.
    """
    log_probs = beam.log_probs[..., None] + _log_law(logits)
    scores = _given_largest(log_probs + gumbel, beam.scores[..., None])
    best = scores.flatten(1).topk(min(width, scores[0].numel()), dim=1)
    parents = best.indices // logits.shape[2]
    level = Level(best.indices % logits.shape[2], parents, logits.softmax(-1))
    return level, Beam(log_probs.flatten(1).gather(1, best.indices), best.values)


def sampled_draft(roots: Tensor, levels: Sequence[Level], law: Law, counts: tuple[int, ...]) -> Draft:
    """The first counts[b] drafted nodes of each request, level by level, with q behind every node. roots: [B].

    A cut by number only is a choice of slots, known before the draws, or for a beam a smaller width of its last level. Raises
    SpecDecError for a law that is not drawn.
    """
    if law not in (Law.INDEPENDENT, Law.WITHOUT_REPLACEMENT):
        raise SpecDecError(f"law={law}: a sampled tree is {Law.INDEPENDENT} or {Law.WITHOUT_REPLACEMENT}")
    tokens, parents, above, size = [roots[:, None]], [torch.full_like(roots[:, None], -1)], 0, 1
    for level in levels:
        tokens.append(level.tokens)
        parents.append(level.parents + above)
        above, size = size, size + level.tokens.shape[1]
    counts = tuple([min(count, size - 1) for count in counts])
    nodes = 1 + max(counts)
    flat = torch.stack((torch.cat(tokens, 1), torch.cat(parents, 1)))[:, :, :nodes]
    if min(counts) != max(counts):
        beyond = torch.arange(nodes, device=roots.device) > on_device(counts, roots.device)[:, None]
        flat = flat.masked_fill(beyond, 0)
    is_chain = all(level.tokens.shape[1] == 1 for level in levels)
    tree = TokenTree(flat[0], flat[1], tuple([count + 1 for count in counts]), is_chain)
    return Draft(tree, law, _laws(levels, nodes) if levels else None)


def _log_law(logits: Tensor) -> Tensor:
    """Of the probabilities that rules are told, so that what is 0 there is never drawn while anything else is left."""
    return logits.softmax(-1).double().log()


def _level(drawn: Tensor, logits: Tensor) -> Level:
    """drawn: [B, W, K]."""
    batch, width, children = drawn.shape
    parents = torch.arange(width, device=drawn.device).repeat_interleave(children).expand(batch, -1)
    return Level(drawn.flatten(1), parents, logits.softmax(-1))


def _laws(levels: Sequence[Level], nodes: int) -> Tensor:
    """[B, N, V]: q behind every node, zero behind those of the last level."""
    q = torch.cat([level.q for level in levels], 1)[:, :nodes]
    return torch.nn.functional.pad(q, (0, 0, 0, nodes - q.shape[1]))


def _given_largest(scores: Tensor, largest: Tensor) -> Tensor:
    """Gumbel scores [..., V] moved so that the largest is the given one [..., 1], in the form that does not overflow."""
    gap = scores - scores.amax(-1, keepdim=True)
    shift = largest - scores + torch.log(-torch.expm1(gap))
    moved = largest - shift.clamp(min=0) - torch.log1p(torch.exp(-shift.abs()))
    return torch.where(scores == float("-inf"), scores, moved).nan_to_num(nan=float("-inf"))
