"""Typical acceptance (Medusa, arXiv 2401.10774, section 2.3.1): lossy, never the default, and named so."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specdec.types import Draft, Law, Scores, Verdict
from specdec.verify.chooser import Chooser
from specdec.verify.walk import accept_nodes

# Inside the logarithm of the entropy, as the published code has it.
_SMALL = 1e-5


@dataclass(frozen=True, slots=True)
class TypicalLossy:
    """NOT lossless: accepts a token that the target finds likely enough, whether or not it would have drawn it.

    A node is accepted where p(token) > min(epsilon, delta exp(-H(p))), H the entropy of the target's processed law behind
    its parent: the surer the target, the more is asked. Of the deepest accepted paths the first counts; the next token is the
    target's own draw behind it. epsilon, delta: the published 0.09 and 0.3.
    """

    name: str = "typical-lossy"
    lossless: bool = False
    laws: frozenset[Law] = frozenset(Law)
    trees: bool = True
    uses_q: bool = False
    epsilon: float = 0.09
    delta: float = 0.3

    def verify(self, draft: Draft, scores: Scores, chooser: Chooser) -> Verdict:
        """See `Rule.verify`; one pick over all nodes."""
        p = scores.logits.softmax(-1)
        drawn = chooser.pick(p.nan_to_num(nan=0.0)).masked_fill(p[..., 0].isnan(), -1)
        tree = draft.tree
        behind = tree.parents.clamp(min=0)
        token = p.gather(1, behind[..., None].expand_as(p)).gather(2, tree.tokens[..., None])[..., 0]
        return accept_nodes(tree, token > self._asked(p).gather(1, behind), drawn)

    def _asked(self, p: Tensor) -> Tensor:
        """[B, N]: what a token behind each node has to exceed."""
        entropy = -(p * (p + _SMALL).log()).sum(-1)
        return (self.delta * (-entropy).exp()).clamp(max=self.epsilon)
