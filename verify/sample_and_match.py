"""Sample-and-match: draw from the target at every node, and descend where a child has the drawn token."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.types import Draft, Law, Scores, Verdict
from specdec.verify.chooser import Chooser
from specdec.verify.walk import accept_matches


@dataclass(frozen=True, slots=True)
class SampleAndMatch:
    """Lossless for every proposal and every pruning, since the output is the target's own draw; q is ignored."""

    name: str = "sample-and-match"
    lossless: bool = True
    laws: frozenset[Law] = frozenset(Law)
    trees: bool = True
    uses_q: bool = False

    def verify(self, draft: Draft, scores: Scores, chooser: Chooser) -> Verdict:
        """See `Rule.verify`; one pick over all nodes."""
        p = scores.logits.softmax(-1)
        chosen = chooser.pick(p.nan_to_num(nan=0.0))
        return accept_matches(draft.tree, chosen.masked_fill(p[..., 0].isnan(), -1))
