"""Several drafters of which each round uses one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from specdec.drafters.base import Drafter, DraftSetup
from specdec.errors import IncompatibleRuleError, SpecDecError, VocabularyMismatchError
from specdec.types import Budget, Committed, Draft, DrafterTraits, Law


class SeveralDrafters:
    """Several drafters; each round uses the one that `Budget.drafter` names, None the first.

    A rule stays exact if it verifies all that `drawn` tells for the law of the call.

    All of them begin and commit, so the state of each is a function of the committed tokens and taps, whichever was asked. A
    drafter that runs a model of its own only notes the tokens of the rounds in between, and reads them when it is next asked.

    names: in order.  traits: for the planner.  laws: see `common_laws`.  shape: "tree" if any draws trees.  taps: of all.
    vocabulary, runner: only where a drafter has one; runner adds up the drafters' own.
    """

    name = "several"
    vocabulary: int
    runner: Runners

    def __init__(self, drafters: Mapping[str, Drafter] | Sequence[Drafter]) -> None:
        """drafters: by name, or in a sequence, where the second of a name becomes "name-2".

        Raises SpecDecError for what is not several drafters or lies on several devices, VocabularyMismatchError for different
        vocabularies, IncompatibleRuleError when no law serves all.
        """
        self._drafters = named(drafters)
        self.names = tuple(self._drafters)
        every = tuple(self._drafters.values())
        self.traits = tuple([DrafterTraits(name, drafter.shape) for name, drafter in self._drafters.items()])
        self.shape: Literal["chain", "tree"] = "tree" if any(drafter.shape == "tree" for drafter in every) else "chain"
        self.taps: tuple[str, ...] = tuple(dict.fromkeys([tap for drafter in every for tap in drafter.taps]))
        self.laws = common_laws(self._drafters)
        found = common_vocabulary(self._drafters)
        if found is not None:
            self.vocabulary = found
        runners = {name: drafter.runner for name, drafter in self._drafters.items() if hasattr(drafter, "runner")}
        if runners:
            self.runner = Runners(runners)

    def drawn(self, law: Law) -> frozenset[Law]:
        """How drafts come when this is the law of the call: who cannot draw by it is deterministic."""
        every = [drafter.laws for drafter in self._drafters.values()]
        return frozenset([law if law in laws else Law.DETERMINISTIC for laws in every])

    def begin(self, prompts: tuple[tuple[int, ...], ...], setup: DraftSetup) -> None:
        """Start a batch; see `Drafter.begin`."""
        for drafter in self._drafters.values():
            able = setup.law in drafter.laws
            assert able or Law.DETERMINISTIC in drafter.laws, "`laws` promises it"
            drafter.begin(prompts, setup if able else replace(setup, law=Law.DETERMINISTIC))

    def propose(self, budget: Budget) -> Draft:
        """What the drafter of the budget proposes; see `Drafter.propose`. Raises SpecDecError for a name that is not there."""
        name = self.names[0] if budget.drafter is None else budget.drafter
        if name not in self._drafters:
            raise SpecDecError(f"the budget names drafter {name!r}; there are: {', '.join(self.names)}; plan one of them, or None")
        return self._drafters[name].propose(budget)

    def commit(self, committed: Committed) -> None:
        """Tell all of them what the round added to the text."""
        for drafter in self._drafters.values():
            drafter.commit(committed)


class Runners:
    """What several drafters run, seen as one. device: of all."""

    def __init__(self, runners: Mapping[str, Any]) -> None:
        """runners: by the drafter's name. Raises SpecDecError where devices differ."""
        self._runners = tuple(runners.values())
        first, *others = runners
        self.device: torch.device = runners[first].device
        for name in others:
            if runners[name].device != self.device:
                raise SpecDecError(
                    f"drafter {first!r} is on {self.device}, drafter {name!r} on {runners[name].device}; move one of them"
                )

    @property
    def forward_s(self) -> float:
        """Seconds spent in all their forwards so far."""
        return float(sum([runner.forward_s for runner in self._runners]))

    @property
    def cold(self) -> int:
        """Their calls so far whose times say nothing of later ones."""
        return int(sum([runner.cold for runner in self._runners]))


def named(drafters: Mapping[str, Drafter] | Sequence[Drafter]) -> dict[str, Drafter]:
    """The drafters by name, in order; of a sequence, the second "suffix" is "suffix-2". Raises SpecDecError for anything else."""
    found: dict[str, Drafter] = {}
    if isinstance(drafters, Mapping):
        found.update(drafters)
    else:
        for drafter in drafters:
            name, number = getattr(drafter, "name", "drafter"), 1
            while (full := name if number == 1 else f"{name}-{number}") in found:
                number += 1
            found[full] = drafter
    if not found:
        raise SpecDecError("there is no drafter among the several; give one or more, or drafter=None for plain decoding")
    for name, drafter in found.items():
        if not isinstance(name, str) or not name:
            raise SpecDecError(f"a drafter is named {name!r}; give a word for each")
        if not isinstance(drafter, Drafter) or isinstance(drafter, SeveralDrafters):
            raise SpecDecError(f"drafter {name!r} of several is a {type(drafter).__name__}; give one flat list or dict of Drafters")
    if len(set(map(id, found.values()))) < len(found):
        raise SpecDecError(f"one drafter stands under two of the names {', '.join(found)}; it would be told every round twice")
    return found


def common_laws(drafters: Mapping[str, Drafter]) -> frozenset[Law]:
    """The laws by which some drafter draws, while all others draw by the same law or are deterministic.

    Rules that know a law usually verify deterministic drafts as well, as draws from a law that is one-hot; see
    `SeveralDrafters.drawn`. Raises IncompatibleRuleError where there is none.
    """
    every = [drafter.laws for drafter in drafters.values()]
    found: frozenset[Law] = frozenset().union(*every)
    shared = frozenset([law for law in found if all(law in laws or Law.DETERMINISTIC in laws for laws in every)])
    if not shared:
        told = "; ".join(f"{name}: {', '.join(sorted(drafter.laws))}" for name, drafter in drafters.items())
        raise IncompatibleRuleError(f"no rule verifies all of these drafters, which draw by {told}; leave one out")
    return shared


def common_vocabulary(drafters: Mapping[str, Drafter]) -> int | None:
    """The vocabulary of those that have one, None where none has. Raises VocabularyMismatchError naming two that differ."""
    sizes = {name: drafter.vocabulary for name, drafter in drafters.items() if hasattr(drafter, "vocabulary")}
    for name, size in sizes.items():
        first, expected = next(iter(sizes.items()))
        if size != expected:
            raise VocabularyMismatchError(
                f"drafter {first!r} has {expected} tokens, drafter {name!r} {size}; all have to share the target's vocabulary"
            )
    return next(iter(sizes.values()), None)
