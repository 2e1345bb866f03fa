"""Cost alone: a drafter whose tokens are right as often as it is told, around a real one that does its work all the same.

Its numbers are what a drafter of that cost would give if it were that good. They are imitations, never measurements of a drafter:
records mark them by their family, and no table or chart has them beside real ones. Outputs stay the target's, and are checked.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from specdec import SpeculativeGenerator
from specdec.bench.energy import meter_of
from specdec.bench.methods import Answer, Ask, NamedDrafter, Ours, Selection
from specdec.bench.records import MethodInfo
from specdec.drafters.base import Drafter, DraftSetup
from specdec.errors import SpecDecError
from specdec.kernels.transfer import on_device
from specdec.types import Budget, Committed, Draft, DrafterTraits, Law

Texts = tuple[tuple[int, ...], ...]


class Imitation:
    """Proposes as many tokens as the inner drafter, which are what the target says next with a given probability each.

    Whether the token at a place is right is drawn once for the place, whatever the rounds are, so the expected acceptance rate of
    tokens that are reached is `rate`. Its state is the inner drafter's and the lengths of the texts. Deterministic chains.
    """

    name = "synthetic"
    shape: Literal["chain", "tree"] = "chain"
    laws = frozenset({Law.DETERMINISTIC})

    def __init__(self, inner: Drafter, rate: float, seed: int = 0) -> None:
        """inner: of chains; its own tokens are thrown away.  rate: from 0 to 1.  Raises SpecDecError."""
        if not 0 <= rate <= 1:
            raise SpecDecError(f"the synthetic acceptance rate is {rate}; give one from 0 to 1")
        if inner.shape != "chain":
            raise SpecDecError(f"the drafter {inner.name} draws trees; synthetic acceptance imitates chains only")
        self.inner, self.rate, self.seed, self.taps = inner, rate, seed, inner.taps
        self.traits = (DrafterTraits("", "chain"),)
        for optional in ("vocabulary", "runner"):
            if hasattr(inner, optional):
                setattr(self, optional, getattr(inner, optional))
        self._answers: Texts = ()

    def know(self, answers: Texts) -> None:
        """What the target will say to each prompt of the next batch."""
        self._answers = answers

    def begin(self, prompts: Texts, setup: DraftSetup) -> None:
        """Start a batch; see `Drafter.begin`."""
        assert len(self._answers) == len(prompts), "told what the target says"
        self.inner.begin(prompts, replace(setup, law=Law.DETERMINISTIC, sampling=None))
        self._said = [0] * len(prompts)
        self._drafts = [self._spoilt(answer, request, setup.vocabulary) for request, answer in enumerate(self._answers)]

    def propose(self, budget: Budget) -> Draft:
        """The inner draft with other tokens."""
        draft = self.inner.propose(budget)
        width = draft.tree.tokens.shape[1] - 1
        if not width:
            return draft
        assert draft.tree.is_chain, "the inner drafter's shape"
        rows = []
        for request in budget.requests:
            own = self._drafts[request][self._said[request] :][:width]
            rows.append([*own, *[0] * (width - len(own))])
        tokens = draft.tree.tokens.clone()
        tokens[:, 1:] = on_device(rows, tokens.device)
        return Draft(replace(draft.tree, tokens=tokens), Law.DETERMINISTIC)

    def commit(self, committed: Committed) -> None:
        """Take in what the round added to the text."""
        self.inner.commit(committed)
        for request, tokens in zip(committed.requests, committed.tokens, strict=True):
            self._said[request] += len(tokens)

    def _spoilt(self, answer: Sequence[int], request: int, vocabulary: int) -> list[int]:
        draws = random.Random(f"{self.seed} {request}")
        return [token if draws.random() < self.rate else (token + 1) % vocabulary for token in answer]


@dataclass
class Synthetic:
    """A `Method` that decodes with an imitation; plain decoding tells it the answers first, untimed."""

    plain: Ours
    ours: Ours
    drafter: Imitation
    known: dict[tuple[Texts, int], Texts] = field(default_factory=dict)

    @property
    def info(self) -> MethodInfo:
        """See `Method.info`."""
        return self.ours.info

    def why_not(self, batch: int, temperature: float) -> str:
        """Sampled text is not known before."""
        return "synthetic acceptance needs to know the text, so it decodes greedily only" if temperature else ""

    def run(self, ask: Ask) -> Answer:
        """See `Method.run`."""
        key = (ask.prompts, ask.new)
        if key not in self.known:
            self.known[key] = self.plain.run(ask).tokens
        self.drafter.know(self.known[key])
        return self.ours.run(ask)


def synthetic_methods(
    target: Any, drafters: Sequence[NamedDrafter], rates: Sequence[float], selection: Selection
) -> tuple[Synthetic, ...]:
    """Each drafter of chains at each acceptance rate. Raises SpecDecError for a rate that is none, and where no drafter fits."""
    able = [(own.name, own.drafter) for own in drafters if not isinstance(own.drafter, str) and own.drafter.shape == "chain"]
    if rates and not able:
        raise SpecDecError("synthetic acceptance imitates a loaded drafter of chains, and there is none; add --drafter draft")
    meter = meter_of(target.device)
    plain = Ours(SpeculativeGenerator(target), MethodInfo("plain, for synthetic acceptance", "synthetic", ""))
    found = []
    for rate in dict.fromkeys(rates):
        for name, inner in able:
            drafter = Imitation(inner, rate)
            generator = SpeculativeGenerator(target, drafter, planner=selection.planner)
            about = f"SYNTHETIC: costs what {name} costs, accepted with probability {rate:g} a token"
            info = MethodInfo(f"synthetic {rate:g}: {name}", "synthetic", about, None, selection.planner or "default")
            found.append(Synthetic(plain, Ours(generator, info, meter), drafter))
    return tuple(found)
