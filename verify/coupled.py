"""Gumbel coupling (arXiv 2408.07978): draft and target draw with the same noise, keyed by position."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specdec.noise import Noise, Stream
from specdec.trees.layout import depths
from specdec.types import Draft, Law, Scores, Verdict
from specdec.verify.chooser import Chooser
from specdec.verify.walk import accept_matches


def coupled_pick(noise: Noise, requests: Tensor, positions: Tensor, logits: Tensor) -> Tensor:
    """[R] int64: argmax(logits + G), the draw for the token at each absolute position. logits: [R, V] processed."""
    gumbel = noise.gumbel(Stream.COUPLED, logits.shape[-1], requests, positions)
    return (logits.log_softmax(-1) + gumbel).argmax(-1)


@dataclass(frozen=True, slots=True)
class Coupled:
    """Lossless, and the output given the seed does not depend on drafter, tree, planner or batch."""

    name: str = "coupled"
    lossless: bool = True
    laws: frozenset[Law] = frozenset({Law.COUPLED, Law.DETERMINISTIC})
    trees: bool = True
    uses_q: bool = False

    def verify(self, draft: Draft, scores: Scores, chooser: Chooser) -> Verdict:
        """See `Rule.verify`; the token behind each node is the target's own draw at its position."""
        log_p = scores.logits.log_softmax(-1)
        chosen = chooser.coupled(log_p, depths(draft.tree.parents))
        return accept_matches(draft.tree, chosen.masked_fill(log_p[..., 0].isnan(), -1))
