"""Runs a batch of requests to its end: prefill, rounds, stopping, and what each round emits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from specdec.controller import Controller, Judged, Step
from specdec.drafters.base import Drafter, DraftSampling, DraftSetup
from specdec.errors import IncompatibleRuleError, SpecDecError, VocabularyMismatchError
from specdec.goodput import GoodputPlanner
from specdec.metrics import SpeculationStats, StatsCollector
from specdec.noise import Noise
from specdec.past import Past, RowPast, ingest, row_past
from specdec.planner import FixedPlanner, Planner
from specdec.processing import Processing
from specdec.runner import ModelRunner, RunnerOptions
from specdec.stopping import Stopping
from specdec.types import DrafterTraits, Law, Load
from specdec.verify.compatibility import rule_for

_ALL_LAWS = frozenset(Law)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of `generate`, prepared. prompts: committed tokens without padding, one or more each.

    sampling: draw from the processed logits, else take their argmax.  seeded: the caller gave a seed.
    emit: told (request, kept new tokens) after each round.  prefill_chunk: most prompt rows in one forward.
    past: what is known of the prompts, and how they are padded.  keep_past: the result is to have every request's keys and values.
    """

    prompts: tuple[tuple[int, ...], ...]
    processing: Processing
    stopping: Stopping
    sampling: bool
    noise: Noise
    seeded: bool = False
    emit: Callable[[int, tuple[int, ...]], None] | None = None
    keep_scores: bool = False
    keep_logits: bool = False
    prefill_chunk: int | None = None
    past: Past | None = None
    keep_past: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """New tokens of each request, and per token its processed scores and raw logits [V] in fp32, when kept.

    past: each request's keys and values, when kept; None for one that never ran.
    """

    tokens: tuple[tuple[int, ...], ...]
    scores: tuple[tuple[Tensor, ...], ...] | None
    logits: tuple[tuple[Tensor, ...], ...] | None
    stats: SpeculationStats
    past: tuple[RowPast | None, ...] = ()


class Engine:
    """A target, a drafter, a rule's name and a planner, checked against each other once. One call at a time."""

    def __init__(
        self,
        target: nn.Module,
        drafter: Drafter | None,
        verifier: str,
        planner: Planner,
        options: RunnerOptions | None = None,
    ) -> None:
        """Raises when the target is unsupported, or draft, rule and planner do not fit together."""
        self.drafter, self.verifier, self.planner = drafter, verifier, planner
        for sampling, seeded in ((True, False), (True, True), (False, False)):
            if not (sampling and verifier == "greedy"):
                self._rule(sampling, seeded)
        self.runner = ModelRunner(target, taps=drafter.taps if drafter is not None else (), options=options)
        vocabulary = getattr(drafter, "vocabulary", self.runner.vocabulary)
        if vocabulary != self.runner.vocabulary:
            raise VocabularyMismatchError(
                f"the draft model has {vocabulary} tokens, the target {self.runner.vocabulary}; use a draft of the "
                "same family, or specdec.VocabMap with both tokenizers"
            )
        device = getattr(getattr(drafter, "runner", None), "device", self.runner.device)
        if device != self.runner.device:
            raise SpecDecError(f"the draft model is on {device}, the target on {self.runner.device}; move one of them")
        self.traits = _traits(drafter)
        if isinstance(planner, GoodputPlanner) and drafter is not None:
            planner.bind(target, drafter)

    def _rule(self, sampling: bool, seeded: bool):  # type: ignore[no-untyped-def]
        laws = self.drafter.laws if self.drafter is not None else _ALL_LAWS
        shape = self.drafter.shape if self.drafter is not None else "chain"
        rule, law = rule_for(self.verifier, laws, shape, sampling, seeded, self.planner.post_draw)
        drawn = getattr(self.drafter, "drawn", None)
        beyond = drawn(law) - rule.laws if drawn is not None else frozenset()
        if beyond:
            raise IncompatibleRuleError(
                f"verifier={rule.name!r} verifies {', '.join(sorted(rule.laws))} drafts; some of these drafters give "
                f"{', '.join(sorted(beyond))}; use 'auto', or leave them out"
            )
        return rule, law

    @torch.no_grad()
    def run(self, call: Call) -> Result:
        """Decode every request of the call until it is finished."""
        return _Run(self, call).result()

    def controller(self, call: Call) -> Controller:
        """The parts of one call, begun: target and drafter hold the prompts."""
        rule, law = self._rule(call.sampling, call.seeded)
        process = None if call.processing.identity else call.processing
        drafter = None if call.processing.lockstep else self.drafter
        capacity = max(len(p) + min(call.stopping.room(i), 1 << 20) for i, p in enumerate(call.prompts)) + 64
        self.runner.begin(len(call.prompts), capacity)
        known = [0] * len(call.prompts)
        if call.past is not None:
            ingest(call.past, self.runner.cache)
            known = [call.past.held(request) for request in range(len(known))]
        self.runner.prefill([prompt[n:-1] for prompt, n in zip(call.prompts, known, strict=True)], call.prefill_chunk)
        if drafter is not None:
            sampling = None
            if call.sampling:
                sampling = DraftSampling(process or _upcast, call.noise)
            drafter.begin(call.prompts, DraftSetup(self.runner.device, self.runner.vocabulary, capacity, law, sampling))
        planner = FixedPlanner(nodes=0) if drafter is None or call.processing.undecided else self.planner
        needs_scores = call.keep_scores or call.keep_logits
        return Controller(self.runner, drafter, rule, planner, call.noise, process, needs_scores=needs_scores)


def _traits(drafter: Drafter | None) -> tuple[DrafterTraits, ...]:
    """What a planner may choose from; the only drafter goes without a name."""
    if drafter is None:
        return ()
    several: tuple[DrafterTraits, ...] | None = getattr(drafter, "traits", None)
    return several or (DrafterTraits("", drafter.shape),)


def _upcast(logits: Tensor, paths: object) -> Tensor:
    return logits.float()


class _Run:
    """The state of one call: which requests are active, in the order of the cache's rows, and what they have said."""

    def __init__(self, engine: Engine, call: Call) -> None:
        self.engine, self.call = engine, call
        count = len(call.prompts)
        self.active = [i for i in range(count) if call.stopping.room(i) > 0]
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.scores: list[list[Tensor]] = [[] for _ in range(count)]
        self.logits: list[list[Tensor]] = [[] for _ in range(count)]
        self.past: list[RowPast | None] = [None] * count
        self.stats = StatsCollector(count)

    def result(self) -> Result:
        """Run rounds until no request is active."""
        began = perf_counter()
        controller = self.engine.controller(self.call)
        self.engine.runner.cache.arrange(self.active)
        ended = perf_counter()
        self.stats.prefill_s = ended - began
        while self.active:
            began = ended
            undecided = self.call.processing.undecided
            step = controller.step(self._load(), [self._last(i) for i in self.active])
            if undecided:
                self._settle(controller)
            self._take(step)
            ended = perf_counter()
            self.stats.add(step.stats, ended - began)
        return Result(
            tuple(map(tuple, self.tokens)),
            tuple(map(tuple, self.scores)) if self.call.keep_scores else None,
            tuple(map(tuple, self.logits)) if self.call.keep_logits else None,
            self.stats.stats(),
            tuple(self.past),
        )

    def _settle(self, controller: Controller) -> None:
        """Speculate after a first step without, unless that showed a processor to keep state."""
        if self.call.processing.lockstep:
            controller.drafter = None
        elif controller.drafter is not None:
            controller.planner = self.engine.planner

    def _load(self) -> Load:
        prompts, room = self.call.prompts, self.call.stopping.room
        lengths = tuple([len(prompts[i]) + len(self.tokens[i]) for i in self.active])
        return Load(tuple(self.active), lengths, tuple([room(i) for i in self.active]), self.engine.traits)

    def _last(self, request: int) -> int:
        own = self.tokens[request]
        return own[-1] if own else self.call.prompts[request][-1]

    def _take(self, step: Step) -> None:
        """Cut each request's new tokens where it stops, keep and emit them, and retire the finished requests."""
        remaining: list[int] = []
        committed = step.judged.committed
        for row, (request, new) in enumerate(zip(committed.requests, committed.tokens, strict=True)):
            kept, finished = self.call.stopping.cut(request, new)
            tokens = new[:kept]
            self.tokens[request].extend(tokens)
            self.call.processing.commit(request, tokens)
            if self.call.keep_scores or self.call.keep_logits:
                self._keep_rows(step.judged, row, request, kept)
            if self.call.emit is not None and tokens:
                self.call.emit(request, tokens)
            if not finished:
                remaining.append(row)
            elif self.call.keep_past:
                length = len(self.call.prompts[request]) + len(self.tokens[request]) - 1
                self.past[request] = row_past(self.engine.runner.cache, row, length)
        if len(remaining) < len(self.active):
            remaining = self.engine.runner.cache.closed_up(remaining)
            self.active = [self.active[row] for row in remaining]
            self.engine.runner.cache.arrange(remaining)

    def _keep_rows(self, judged: Judged, row: int, request: int, kept: int) -> None:
        assert judged.scores is not None
        assert judged.raw is not None
        nodes: Sequence[int] = (0, *judged.committed.paths[row])[:kept]
        if self.call.keep_scores:
            self.scores[request].extend(judged.scores.logits[row, n].float() for n in nodes)
        if self.call.keep_logits:
            self.logits[request].extend(judged.raw.logits[row, n].float() for n in nodes)
