"""One generation round by round: what was drafted, what the target kept, what it took, and what the planner expected."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.errors import InvalidRequestError
from specdec.generator import SpeculativeGenerator
from specdec.planner import Planner
from specdec.types import Budget, Draft, Forecast, Load, RoundStats

PHASES = ("draft", "target", "verify", "other")
# A request's tree on the host: tokens and parents, root included.
Nodes = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class TracedRound:
    """One round of one request.

    tokens, parents: of the tree that was scored; node 0 is the last token of the text before the round, its parent is -1.  path:
    the accepted nodes in order of depth, root excluded.  added: the tokens that went into the text, fewer than accepted and next
    where the text ended among them.  drafter: who drafted.  seconds: of each of `PHASES`.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    path: tuple[int, ...]
    added: tuple[int, ...]
    drafter: str
    forecast: Forecast | None
    seconds: tuple[float, float, float, float]

    @property
    def drafted(self) -> int:
        """Drafted tokens."""
        return len(self.tokens) - 1

    @property
    def accepted(self) -> int:
        """Accepted draft tokens."""
        return len(self.path)

    @property
    def next_token(self) -> int | None:
        """The token behind the accepted ones; None where the text ended before it."""
        return self.added[-1] if len(self.added) > self.accepted else None

    @property
    def next_kind(self) -> str:
        """What the next token is: "plain" where nothing was drafted, "bonus" behind a path to its end, else "recovered"."""
        if not self.drafted:
            return "plain"
        last = self.path[-1] if self.path else 0
        return "recovered" if last in self.parents else "bonus"

    @property
    def total_s(self) -> float:
        """All phases."""
        return sum(self.seconds)


@dataclass(frozen=True, slots=True)
class Trace:
    """A prompt, the tokens that followed, and the rounds that made them. drafters: all that a round could use.

    planner, verifier: what they are called.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    rounds: tuple[TracedRound, ...]
    prefill_s: float
    drafters: tuple[str, ...]
    planner: str
    verifier: str

    @property
    def drafted(self) -> int:
        """Drafted tokens of all rounds."""
        return sum(r.drafted for r in self.rounds)

    @property
    def accepted(self) -> int:
        """Accepted draft tokens of all rounds."""
        return sum(r.accepted for r in self.rounds)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens a round, the recovered or bonus token included; 0 without rounds."""
        return (self.accepted + len(self.rounds)) / len(self.rounds) if self.rounds else 0.0

    @property
    def total_s(self) -> float:
        """All rounds, the prompt left out."""
        return sum(r.total_s for r in self.rounds)


class _Recorder:
    """A planner that asks another one everything, and keeps each tree that is scored: after `select`, so what was left out is not
    in it."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._last: tuple[Tensor, int] | None = None
        self.trees: list[Nodes] = []

    @property
    def post_draw(self) -> bool:
        return self._planner.post_draw

    def plan(self, load: Load) -> Budget:
        return self._planner.plan(load)

    def select(self, draft: Draft) -> Draft:
        draft = self._planner.select(draft)
        # A copy, as a drafter may draw into the same memory again; read after the round, so that nobody waits for it.
        self._last = torch.stack((draft.tree.tokens[0], draft.tree.parents[0])), draft.tree.num_nodes[0]
        return draft

    def observe(self, stats: RoundStats) -> None:
        self._planner.observe(stats)
        assert self._last is not None, "a round selects before it is observed"
        nodes, size = self._last
        tokens, parents = nodes.tolist()
        self.trees.append((tuple(tokens[:size]), tuple(parents[:size])))


def trace(generator: SpeculativeGenerator, input_ids: Tensor, **kwargs: Any) -> Trace:
    """The tokens that `generator.generate` gives for the same arguments, and how they came about.

    The generator is left as it was, but for its planner, which learns as in every call. One more small read each round.
    input_ids: [1, length].  kwargs: of `generate`. Raises InvalidRequestError for more than one request, and what `generate`
    raises.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1:
        raise InvalidRequestError(
            f"a trace is of one request, and input_ids have the shape {tuple(input_ids.shape)}; give [1, length]"
        )
    recorder = _Recorder(generator.engine.planner)
    twin = copy.copy(generator)
    twin.engine = copy.copy(generator.engine)
    twin.engine.planner = recorder
    output = twin.generate(input_ids, **{"attention_mask": torch.ones_like(input_ids), **kwargs})
    stats = twin.stats
    assert stats is not None, "a call that returns leaves stats"
    if len(stats.requests) != 1:
        raise InvalidRequestError(
            f"a trace is of one request, and this call had {len(stats.requests)}; leave num_return_sequences away"
        )
    sequence = output if isinstance(output, Tensor) else output.sequences
    prompt, tokens = input_ids[0].tolist(), sequence[0, input_ids.shape[1] :].tolist()
    drafter = generator.engine.drafter
    names = tuple([traits.name or getattr(drafter, "name", "") for traits in generator.engine.traits])
    return Trace(
        prompt=tuple(prompt),
        tokens=tuple(tokens),
        rounds=_rounds(prompt[-1], tokens, stats.history, recorder.trees, names),
        prefill_s=stats.prefill_s,
        drafters=names,
        planner=type(generator.engine.planner).__name__,
        verifier=generator.engine.verifier,
    )


def _rounds(
    root: int, tokens: list[int], history: tuple[RoundStats, ...], trees: list[Nodes], names: tuple[str, ...]
) -> tuple[TracedRound, ...]:
    """Rounds from what was told of them. root: the prompt's last token.  trees: empty where no planner was asked."""
    found, at = [], 0
    for i, stats in enumerate(history):
        last = tokens[at - 1] if at else root
        nodes = trees[i] if trees else ((last,), (-1,))
        added = tuple(tokens[at : at + stats.accepted[0] + 1])
        at += len(added)
        drafter = stats.drafter or (names[0] if names else "")
        seconds = stats.draft_s, stats.target_s, stats.verify_s, stats.other_s
        found.append(TracedRound(*nodes, stats.paths[0], added, drafter, stats.forecast, seconds))
    return tuple(found)
