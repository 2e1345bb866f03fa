"""Lenient acceptance: token rejection that asks for less; lossy, never the default, and named so."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specdec.errors import SpecDecError
from specdec.types import Draft, Law, Scores, Verdict
from specdec.verify.chooser import Chooser
from specdec.verify.rejection import TokenRejection


@dataclass(frozen=True, slots=True)
class LenientLossy:
    """NOT lossless: keeps a drafted token with min(1, p / (lenience q)) instead of min(1, p / q), the residual left as it is.

    The lenience of arXiv 2211.17192 (appendix). lenience: above 0, and at most 1, where the rule is token rejection; the less
    the more is kept and the nearer the output comes to the draft's.
    """

    name: str = "lenient-lossy"
    lossless: bool = False
    laws: frozenset[Law] = frozenset({Law.INDEPENDENT, Law.DETERMINISTIC})
    trees: bool = False
    uses_q: bool = True
    lenience: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.lenience <= 1:
            raise SpecDecError(f"lenience={self.lenience!r}: give a number above 0, at most 1 (1 is lossless)")

    def verify(self, draft: Draft, scores: Scores, chooser: Chooser) -> Verdict:
        """See `Rule.verify`; one accept over all drafted tokens and one pick."""
        return TokenRejection().verify(draft, scores, _Lenient(chooser, self.lenience))


@dataclass(frozen=True, slots=True)
class _Lenient:
    """A chooser that says yes more often."""

    chooser: Chooser
    lenience: float

    def accept(self, prob: Tensor) -> Tensor:
        return self.chooser.accept((prob / self.lenience).clamp(max=1.0))

    def pick(self, weights: Tensor) -> Tensor:
        return self.chooser.pick(weights)

    def coupled(self, log_p: Tensor, depth: Tensor) -> Tensor:
        return self.chooser.coupled(log_p, depth)
