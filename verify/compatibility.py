"""Which rule may verify which draft; asked once, when the parts are put together."""

from __future__ import annotations

from typing import Protocol

from specdec.errors import IncompatibleRuleError
from specdec.types import Draft, Law, Scores, Verdict
from specdec.verify.block import Block
from specdec.verify.chooser import Chooser
from specdec.verify.coupled import Coupled
from specdec.verify.greedy import Greedy
from specdec.verify.k_sequential import KSequential
from specdec.verify.lenient import LenientLossy
from specdec.verify.multi_path_block import MultiPathBlock
from specdec.verify.recursive import Recursive, RecursiveWithoutReplacement
from specdec.verify.rejection import TokenRejection
from specdec.verify.sample_and_match import SampleAndMatch
from specdec.verify.traversal import Traversal
from specdec.verify.typical import TypicalLossy


class Rule(Protocol):
    """A verification rule. laws: the draws it verifies.  trees: whether nodes may have several children."""

    @property
    def name(self) -> str:
        """What `verifier=` calls it."""

    @property
    def lossless(self) -> bool:
        """Whether the output's law is exactly the target's."""

    @property
    def laws(self) -> frozenset[Law]:
        """The draws it verifies."""

    @property
    def trees(self) -> bool:
        """Whether a node may have several children."""

    @property
    def uses_q(self) -> bool:
        """Whether it looks at the law of the draw."""

    def verify(self, draft: Draft, scores: Scores, chooser: Chooser) -> Verdict:
        """Keep a path of each request's tree and add one token. scores.logits: processed, [B, N, V]."""


_RULES: tuple[Rule, ...] = (
    TokenRejection(),
    Block(),
    Recursive(),
    RecursiveWithoutReplacement(),
    KSequential(),
    Traversal(),
    MultiPathBlock(),
    SampleAndMatch(),
    Coupled(),
    TypicalLossy(),
    LenientLossy(),
)
_SAMPLING = {rule.name: rule for rule in _RULES}
NAMES = ("auto", "greedy", *_SAMPLING)
_PREFERENCE = (Law.INDEPENDENT, Law.COUPLED, Law.DETERMINISTIC, Law.WITHOUT_REPLACEMENT)
# What a rule asks of a drafter that can draw in several ways: siblings that differ reach more, but a q is only of use to a rule
# that looks at it.
_BY_Q = (Law.WITHOUT_REPLACEMENT, Law.INDEPENDENT, Law.DETERMINISTIC)
_WITHOUT_Q = (Law.DETERMINISTIC, Law.INDEPENDENT, Law.COUPLED, Law.WITHOUT_REPLACEMENT)


def rule_for(name: str, laws: frozenset[Law], shape: str, sampling: bool, seeded: bool, post_draw: bool) -> tuple[Rule, Law]:
    """The rule of a call and the law that the drafter should draw by.

    laws, shape: the drafter's.  seeded: the caller gave a seed.  post_draw: the planner drops drawn tokens. Raises
    IncompatibleRuleError, naming rule and draft, when they do not fit.
    """
    if name not in NAMES:
        raise IncompatibleRuleError(f"verifier={name!r} is unknown; allowed: {', '.join(NAMES)}")
    deterministic = Law.DETERMINISTIC if Law.DETERMINISTIC in laws else next(law for law in _PREFERENCE if law in laws)
    if name == "greedy" and sampling:
        raise IncompatibleRuleError("verifier='greedy' cannot sample; use 'auto', or do_sample=False")
    if name in _SAMPLING and shape == "tree" and not _SAMPLING[name].trees:
        fitting = [repr(rule.name) for rule in _RULES if rule.trees and rule.lossless and rule.laws & laws]
        raise IncompatibleRuleError(
            f"verifier={name!r} verifies chains, and this drafter draws trees; use 'auto', or {', '.join(fitting)}"
        )
    if not sampling:
        return Greedy(), deterministic
    if name == "auto":
        name = _automatic(laws, shape, seeded, post_draw)
    rule = _SAMPLING[name]
    law = _law_for(rule, laws)
    if post_draw and rule.uses_q and law is not Law.DETERMINISTIC:
        raise IncompatibleRuleError(f"verifier={name!r} needs q, but the planner drops tokens after they were drawn")
    return rule, law


def _automatic(laws: frozenset[Law], shape: str, seeded: bool, post_draw: bool) -> str:
    """Coupled with a seed; else the exact rule that keeps most of what the drafter can draw: with q where there is one."""
    if seeded and laws & Coupled().laws:
        return "coupled"
    if shape == "chain" and Law.INDEPENDENT in laws and not post_draw:
        return "block"
    if shape == "tree" and laws & {Law.INDEPENDENT, Law.WITHOUT_REPLACEMENT} and not post_draw:
        return "traversal"
    return "sample-and-match"


def _law_for(rule: Rule, laws: frozenset[Law]) -> Law:
    order = (Law.COUPLED, Law.DETERMINISTIC) if rule.name == "coupled" else _BY_Q if rule.uses_q else _WITHOUT_Q
    wanted = [law for law in order if law in rule.laws]
    for law in wanted:
        if law in laws:
            return law
    have = ", ".join(sorted(laws))
    raise IncompatibleRuleError(f"verifier={rule.name!r} verifies {', '.join(wanted)} drafts; this drafter's are {have}")
