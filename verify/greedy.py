"""Greedy verification: the output is the target's argmax at every place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specdec.types import Draft, Law, Scores, Verdict
from specdec.verify.chooser import Chooser
from specdec.verify.walk import accept_matches


@dataclass(frozen=True, slots=True)
class Greedy:
    """Lossless for every draft: accept a node when it is the argmax behind its parent; ties go to the lowest token."""

    name: str = "greedy"
    lossless: bool = True
    laws: frozenset[Law] = frozenset(Law)
    trees: bool = True
    uses_q: bool = False

    def verify(self, draft: Draft, scores: Scores, chooser: Chooser) -> Verdict:
        """See `Rule.verify`; draws nothing."""
        return accept_matches(draft.tree, greedy_choice(scores.logits))


def greedy_choice(logits: Tensor) -> Tensor:
    """[...] int64: the argmax of logits [..., V], -1 where the row holds NaN."""
    best, chosen = logits.max(-1)
    return chosen.masked_fill_(best != best, -1)
