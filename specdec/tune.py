"""Measures what a target and a drafter take and give on this machine, by running them: the profile that planners start from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress

from specdec import __version__
from specdec.drafters.base import Drafter
from specdec.errors import SpecDecError
from specdec.generator import SpeculativeGenerator
from specdec.profile import Cells, Counts, Profile, check_fits, drafter_identity, identity_of, machine_of, write_profile
from specdec.trees.plans import Plan, best_tree
from specdec.trees.static import most_nodes
from specdec.types import Budget, Draft, Load, RoundStats

BATCHES, NODES = (1, 4), (0, 1, 2, 3, 4, 6, 8)
# Rounds of a budget that are not counted: sizes are captured when they have been met a few times, and first runs are slow.
_WARM = 6
# Most children of a node in trees, and tokens of a call, so that short and long contexts take turns.
_TREE_WIDTH, _CALL_TOKENS = 4, 48
# What takes longer than so many medians was something else on the machine.
_OUTLIER = 2.0
# Deviation of contexts, in tokens, from which on their slope is believed whole, and the part of a time that it leaves at least.
_SURE, _BASE = 50.0, 0.1
# Rounds below which a size is no measurement, where others have more.
_FEW = 3


@dataclass(frozen=True, slots=True)
class Cell:
    """A budget to measure: so many requests, and for each of them so many nodes on so many levels."""

    batch: int
    nodes: int
    depth: int


@dataclass(frozen=True, slots=True)
class Sample:
    """A round. nodes: drafted by all requests.  depth: levels.  tokens: committed by all requests before it."""

    batch: int
    nodes: int
    depth: int
    target_s: float
    draft_s: float
    tokens: float


class Tally:
    """How often the child of each depth and rank was accepted where its parent was."""

    def __init__(self) -> None:
        """Nothing has been seen."""
        self.accepted: list[list[int]] = []
        self.reached: list[list[int]] = []

    def add(self, levels: Iterable[tuple[int, int]]) -> None:
        """A request's round. levels: children of the accepted path's node there, and the accepted one's rank or -1."""
        for depth, (children, rank) in enumerate(levels):
            if depth == len(self.reached):
                self.accepted.append([])
                self.reached.append([])
            accepted, reached = self.accepted[depth], self.reached[depth]
            missing = [0] * (children - len(reached))
            accepted += missing
            reached += missing
            for other in range(children):
                accepted[other] += other == rank
                reached[other] += 1

    def start(self, accuracies: Sequence[Sequence[float]], reached: Sequence[Sequence[int]]) -> None:
        """Go on from what an earlier run has seen."""
        self.reached = [list(row) for row in reached]
        pairs = zip(accuracies, reached, strict=True)
        self.accepted = [[round(a * n) for a, n in zip(row, own, strict=True)] for row, own in pairs]

    def rates(self) -> tuple[tuple[tuple[float, ...], ...], tuple[tuple[int, ...], ...]]:
        """Accuracies and how many children each is of, up to the last depth that was reached."""
        deep = [(a, n) for a, n in zip(self.accepted, self.reached, strict=True) if n]
        rates = tuple(tuple(x / y for x, y in zip(a, n, strict=True)) for a, n in deep)
        return rates, tuple(tuple(n) for _, n in deep)


class RecordingPlanner:
    """Walks through budgets in mixed order, the least measured first, and keeps what every round took and gave.

    Its choice depends on nothing that was drawn, so every rule stays what it is. done: every budget was measured often enough.
    """

    def __init__(self, cells: Sequence[Cell], rounds: int, *, width: int, rng: random.Random) -> None:
        """rounds: to measure of each cell.  width: of the trees, 1 for chains.  rng: mixes the order."""
        self.post_draw = False
        self.counts = dict.fromkeys(cells, 0)
        self.samples: list[Sample] = []
        self.tally = Tally()
        self.asked = self.proposed = 0
        self._rounds, self._width, self._rng = rounds, width, rng
        self._met = dict.fromkeys(cells, 0)
        self._now: tuple[Cell | None, int] = (None, 0)

    @property
    def wanted(self) -> int:
        """Rounds to measure in all."""
        return self._rounds * len(self.counts)

    @property
    def measured(self) -> int:
        """Of those, how many were."""
        return sum(min(count, self._rounds) for count in self.counts.values())

    @property
    def met(self) -> int:
        """Rounds of the batch sizes to measure, those that are not counted included."""
        return sum(self._met.values())

    @property
    def deepest(self) -> int:
        """Levels of the deepest budget."""
        return max(cell.depth for cell in self.counts)

    def done(self, batch: int | None = None) -> bool:
        """Whether all cells of the batch size, or of every one, were measured."""
        return all(n >= self._rounds for cell, n in self.counts.items() if batch in (None, cell.batch))

    def plan(self, load: Load) -> Budget:
        """The least measured budget of this batch size; the deepest where the batch size is none to measure."""
        batch, room = len(load.requests), min(load.room) - 1
        fitting = [cell for cell in self.counts if cell.depth <= room]
        own = [cell for cell in fitting if cell.batch == batch]
        cell = min(own, key=lambda each: (self.counts[each], self._rng.random())) if own else None
        shown = cell or max(fitting, key=lambda each: (each.depth, each.nodes), default=Cell(batch, 0, 0))
        self._now = cell, sum(load.lengths)
        self.asked += batch if shown.nodes else 0
        return Budget(load.requests, (shown.nodes,) * batch, (max(shown.depth, 1),) * batch, (self._width,) * batch)

    def select(self, draft: Draft) -> Draft:
        """The draft as it came."""
        return draft

    def observe(self, stats: RoundStats) -> None:
        """Keep a finished round."""
        cell, tokens = self._now
        self.proposed += sum(drafted > 0 for drafted in stats.drafted)
        for levels in _levels(stats):
            self.tally.add(levels)
        if cell is None:
            return
        self._met[cell] += 1
        if self._met[cell] <= _WARM:
            return
        self.counts[cell] += 1
        nodes = sum(stats.drafted)
        if cell.nodes and not nodes:
            return  # Looking and finding nothing is neither plain decoding nor a draft.
        depth = max(stats.depth) if cell.nodes else 0
        self.samples.append(Sample(cell.batch, nodes, depth, stats.undrafted_s, stats.draft_s, tokens))


def _levels(stats: RoundStats) -> Iterable[Sequence[tuple[int, int]]]:
    """Of each request, see `RoundStats.levels`; a chain has one child on every level."""
    if stats.levels is not None:
        return stats.levels
    pairs = zip(stats.drafted, stats.accepted, strict=True)
    return [[(1, 0 if depth < kept else -1) for depth in range(min(kept + 1, drafted))] for drafted, kept in pairs]


def cells_of(batches: Sequence[int], nodes: Sequence[int], shape: str) -> list[Cell]:
    """What to measure: chains of every length; trees of every size, flat to deep."""
    found = []
    for batch in batches:
        for count in nodes:
            depths = [count] if shape == "chain" or count == 0 else [d for d in (1, 2, 3, 4, 6, 8, 12, 16) if d <= count]
            fitting = [d for d in depths if shape == "chain" or count <= most_nodes(d, _TREE_WIDTH, _TREE_WIDTH)]
            found += [Cell(batch, count, depth) for depth in fitting]
    return found


def tune(
    generator: SpeculativeGenerator,
    prompts: Sequence[Sequence[int]],
    *,
    batches: Sequence[int] = BATCHES,
    nodes: Sequence[int] = NODES,
    rounds: int = 24,
    seconds: float = 60.0,
    out: Path | None = None,
    resume: Profile | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> Profile:
    """Measure rounds of this generator, decoding greedily, with every batch size and number of nodes a request.

    prompts: token ids, used over and over.  rounds: to measure of each budget.  seconds: most time, looked at between calls; what
    was measured by then, or when the user interrupts, is the profile.  out: written after every call.  resume: what an
    earlier run measured, so that only the rest is; its times are left out where they are of another machine.
    The generator's planner is as before afterwards. Raises SpecDecError where there is nothing to measure.
    """
    drafter = _tunable(generator)
    _check(prompts, batches, nodes, rounds, seconds)
    cells = cells_of(sorted(set(batches)), sorted({0, *nodes}), drafter.shape)
    width = _TREE_WIDTH if drafter.shape == "tree" else 1
    planner = RecordingPlanner(cells, rounds, width=width, rng=random.Random(seed))
    if resume is not None:
        resume = _resumed(resume, planner, generator.target, drafter)
    old, generator.engine.planner = generator.engine.planner, planner

    def save() -> None:
        if out is not None and planner.samples:
            write_profile(profile_of(planner, generator.target, drafter, resume), out)

    try:
        _run(generator, planner, prompts, seconds, save, console or Console(quiet=True))
    finally:
        generator.engine.planner = old
    if not planner.samples and resume is None:
        raise SpecDecError("no round was measured: give longer prompts, more seconds, or a model that does not stop at once")
    return profile_of(planner, generator.target, drafter, resume)


def _tunable(generator: SpeculativeGenerator) -> Drafter:
    drafter = generator.engine.drafter
    if drafter is None or hasattr(drafter, "traits"):
        many = "no drafter" if drafter is None else "several drafters"
        raise SpecDecError(f"this generator has {many}; tune one drafter at a time, in a generator of its own")
    return drafter


def _check(prompts: Sequence[Sequence[int]], batches: Sequence[int], nodes: Sequence[int], rounds: int, seconds: float) -> None:
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise SpecDecError("tune needs one or more prompts, none of them empty")
    if not batches or min(batches) < 1 or not nodes or min(nodes) < 0 or max(nodes) < 1:
        raise SpecDecError(
            f"batches={list(batches)}, nodes={list(nodes)}: give batch sizes from 1 on, and a number of nodes above 0"
        )
    if rounds < 1 or not seconds > 0:
        raise SpecDecError(f"rounds={rounds}, seconds={seconds}: both must be above 0")


def _resumed(old: Profile, planner: RecordingPlanner, target: Any, drafter: Drafter) -> Profile:
    """What holds here of an earlier profile; the planner starts with its acceptance and leaves out what was measured enough."""
    if check_fits(old, target, drafter):
        old = replace(old, target_s={}, target_rounds={}, draft_s={}, draft_rounds={}, context=0.0, rounds=0)
    planner.tally.start(old.accuracies, old.reached)
    planner.asked, planner.proposed = old.asked, old.proposed
    for cell in planner.counts:
        sharing = sum((other.batch, other.nodes) == (cell.batch, cell.nodes) for other in planner.counts)
        planner.counts[cell] = old.target_rounds.get(cell.batch, {}).get(cell.batch * cell.nodes, 0) // sharing
    return old


def _run(
    generator: SpeculativeGenerator,
    planner: RecordingPlanner,
    prompts: Sequence[Sequence[int]],
    seconds: float,
    save: Callable[[], None],
    console: Console,
) -> None:
    """Calls of `generate`, batch sizes in turn, until all is measured, the time is over or the user stops it."""
    began, at, idle = perf_counter(), 0, 0
    batches = sorted({cell.batch for cell in planner.counts})
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=planner.wanted, completed=planner.measured)
        try:
            # Prompts that all end at once would never fill the larger batch sizes.
            while not planner.done() and idle <= len(prompts):
                before = planner.met
                for batch in [batch for batch in batches if not planner.done(batch)]:
                    _generate(generator, [prompts[(at + i) % len(prompts)] for i in range(batch)], planner.deepest)
                    at += batch
                    save()
                    progress.update(task, completed=planner.measured)
                    if perf_counter() - began > seconds:
                        return
                idle = idle + 1 if planner.met == before else 0
        except KeyboardInterrupt:
            console.print("stopped; what was measured is kept")


def _generate(generator: SpeculativeGenerator, prompts: Sequence[Sequence[int]], deepest: int) -> None:
    """Decode greedily; what is said does not matter."""
    width = max(map(len, prompts))
    device = generator.target.device
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    new = max(_CALL_TOKENS, 4 * deepest)
    most = generator.engine.runner.max_positions
    if most is not None:
        new = min(new, most - width)
    if new < 1:
        raise SpecDecError(f"a prompt has {width} tokens, and the target holds {most}; give shorter prompts")
    generator.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)


def profile_of(planner: RecordingPlanner, target: Any, drafter: Drafter, before: Profile | None = None) -> Profile:
    """The profile of what a planner has recorded. before: what an earlier run gave, each of whose times counts for its rounds."""
    samples = planner.samples
    rounds = before.rounds if before else 0
    context, length = _context(samples), fmean(s.tokens / s.batch for s in samples) if samples else 0.0
    if before is not None and rounds:
        share = rounds / (rounds + len(samples))
        context, length = [share * old + (1 - share) * new for old, new in ((before.context, context), (before.length, length))]
    # A slope is a fit: it does not take everything from what was measured.
    of_target = [(s.batch, s.nodes, max(s.target_s - context * s.tokens, _BASE * s.target_s)) for s in samples]
    of_draft = [(s.batch, s.depth, s.draft_s) for s in samples]
    target_s, target_rounds = _times(of_target, before.target_s if before else {}, before.target_rounds if before else {})
    draft_s, draft_rounds = _times(of_draft, before.draft_s if before else {}, before.draft_rounds if before else {})
    accuracies, reached = planner.tally.rates()
    return Profile(
        machine=machine_of(target),
        versions={"specdec": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        target=identity_of(target),
        drafter=drafter_identity(drafter),
        shape=drafter.shape,
        target_s=target_s,
        target_rounds=target_rounds,
        draft_s=draft_s,
        draft_rounds=draft_rounds,
        context=context,
        length=length,
        accuracies=accuracies,
        reached=reached,
        asked=planner.asked,
        proposed=planner.proposed,
        rounds=rounds + len(samples),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _context(samples: Sequence[Sample]) -> float:
    """Seconds for each committed token: the slope common to all sizes, by least squares; less of it where contexts were alike."""
    groups: dict[tuple[int, int], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.batch, sample.nodes), []).append(sample)
    products = squares = 0.0
    for own in groups.values():
        typical = median(sample.target_s for sample in own)
        kept = [sample for sample in own if sample.target_s <= _OUTLIER * typical]
        tokens, seconds = fmean(s.tokens for s in kept), fmean(s.target_s for s in kept)
        products += sum((s.tokens - tokens) * (s.target_s - seconds) for s in kept)
        squares += sum((s.tokens - tokens) ** 2 for s in kept)
    sure = min(squares / (len(samples) * _SURE**2), 1.0) if samples else 0.0
    return sure * max(products / squares, 0.0) if squares else 0.0


def _times(
    samples: Iterable[tuple[int, int, float]], times: Cells, rounds: Counts
) -> tuple[dict[int, dict[int, float]], dict[int, dict[int, int]]]:
    """Medians by batch size and size, and of how many rounds. times, rounds: earlier medians, each counts for its rounds.

    Sizes that were met by chance and only a few times are left out.
    """
    found = {b: {n: [own[n]] * rounds[b][n] for n in own} for b, own in times.items()}
    for batch, size, seconds in samples:
        found.setdefault(batch, {}).setdefault(size, []).append(seconds)
    medians, counts = {}, {}
    for batch, sizes in sorted(found.items()):
        least = min(_FEW, max(map(len, sizes.values())))
        kept = {size: own for size, own in sorted(sizes.items()) if len(own) >= least or size == 0}
        medians[batch] = {size: median(own) for size, own in kept.items()}
        counts[batch] = {size: len(own) for size, own in kept.items()}
    return medians, counts


def recommend(profile: Profile, batch: int) -> Plan:
    """The static plan of the largest goodput for each of `batch` requests, of the sizes and depths that were measured.

    Where the drafter had nothing to propose in some rounds, these count: such a round takes and gives what a plain one does.
    Plain decoding where no acceptance was measured.
    """
    share, (first, *rest) = profile.proposed_share, profile.expected or ((0.0,),)
    measured = min(profile.target_s, key=lambda known: (abs(known - batch), known), default=batch)
    context = batch * profile.length
    plain_s = profile.seconds(batch, 0, 0, context)

    def seconds(nodes: int, depth: int) -> float:
        return share * profile.seconds(batch, batch * nodes, depth, context) + (1 - share) * plain_s

    most = max(profile.target_s[measured]) // measured
    return best_tree([[share * value for value in first], *rest], seconds, most, max(profile.draft_s[measured]))
