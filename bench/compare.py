"""Is one run faster than another? By each method's ratio to plain decoding within its own run, paired over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from statistics import fmean
from typing import Literal

from specdec.bench.records import PLAIN, Interval, Results
from specdec.bench.statistics import FEWEST_ITEMS, Cell, Key, log_ratios, paired
from specdec.errors import SpecDecError

# Smaller changes than this are no difference, whatever their interval: two starts of one program differ by as much.
MARGIN = 0.02
# What the same method gains or loses on plain decoding from one start of the program to another, as a deviation of logs.
_STARTS = 0.006
Verdict = Literal["faster", "slower", "no difference", "too few prompts", "outputs differ"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One method in one cell. before, after: its speed over plain decoding in each run, geometric means over shared items.

    ratio: after over before, with an interval that holds for all methods together; None with too few prompts.  resolution: a
    change by this factor would be found nine times in ten.
    """

    method: str
    batch: int
    temperature: float
    items: int
    verdict: Verdict
    before: float
    after: float
    ratio: Interval | None = None
    resolution: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """All of a comparison. notes: what the two runs do not share, in plain words.  missing: methods with speed in one run only."""

    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """Of the whole: slower when any method is, else faster when any is."""
        return whole([comparison.verdict for comparison in self.comparisons])


def whole(verdicts: Sequence[Verdict]) -> Verdict:
    """Of several methods' verdicts, at least one: outputs that differ first, then slower when any is, else faster when any is."""
    order: tuple[Verdict, ...] = ("outputs differ", "slower", "faster", "no difference", "too few prompts")
    return next(verdict for verdict in order if verdict in verdicts)


def compare(before: Results, after: Results, *, margin: float = MARGIN) -> Report:
    """Compare what two runs share. margin: smaller changes than this part are no difference.

    A run's other load and its machine's pace are in both numbers of a ratio and drop out. A change of plain decoding itself shows
    as the opposite change of every other method. Raises SpecDecError when nothing is shared.
    """
    pairs = _pairs(before, after)
    enough = sum(len(found) >= FEWEST_ITEMS for _, _, found in pairs)
    comparisons = tuple(_compared(method, cell, found, max(enough, 1), margin) for method, cell, found in pairs)
    if not comparisons:
        raise SpecDecError(
            "the two runs share no method with the same prompts, batch size and temperature, so there is nothing to compare; "
            "measure both with the same options"
        )
    return Report(comparisons, _notes(before, after), _missing(before, after))


def _pairs(before: Results, after: Results) -> list[tuple[str, Cell, list[tuple[float, float]]]]:
    """Of each method and cell that both have, the log ratios to plain decoding of the items that both have."""
    same = _same_items(before, after)
    found = []
    for method in [info.name for info in before.methods if info.name != PLAIN and info.family != "synthetic"]:
        old, new = log_ratios(before.trials, method, PLAIN), log_ratios(after.trials, method, PLAIN)
        shared = [key for key in old if key in new and key in same]
        for cell in dict.fromkeys(key[:2] for key in shared):
            found.append((method, cell, [(old[key], new[key]) for key in shared if key[:2] == cell]))
    return found


def _same_items(before: Results, after: Results) -> set[Key]:
    """Items whose prompts are as long in both runs and got as many tokens."""
    shapes = []
    for results in (before, after):
        own = {}
        for trial in results.trials:
            own[trial.batch, trial.temperature, trial.task, trial.item] = (trial.prompt_tokens, trial.num_tokens)
        shapes.append(own)
    return {key for key, shape in shapes[0].items() if shapes[1].get(key) == shape}


def _compared(method: str, cell: Cell, found: list[tuple[float, float]], comparisons: int, margin: float) -> Comparison:
    before, after = (_geometric(values) for values in zip(*found, strict=True))
    if len(found) < FEWEST_ITEMS:
        return Comparison(method, *cell, len(found), "too few prompts", before, after)
    difference = paired([new - old for old, new in found], comparisons, _STARTS)
    return Comparison(
        method, *cell, len(found), verdict_of(difference.ratio, margin), before, after, difference.ratio, difference.resolution
    )


def _geometric(logs: tuple[float, ...]) -> float:
    return exp(fmean(logs))


def verdict_of(ratio: Interval, margin: float) -> Verdict:
    """Of after over before: a difference has an interval without 1 and is larger than the margin."""
    if ratio.low > 1 and ratio.value > 1 + margin:
        return "faster"
    if ratio.high < 1 and ratio.value < 1 - margin:
        return "slower"
    return "no difference"


def _notes(before: Results, after: Results) -> tuple[str, ...]:
    found = []
    for name in ("target", "dtype", "max_new_tokens", "repeats"):
        old, new = getattr(before.settings, name), getattr(after.settings, name)
        if old != new:
            found.append(f"{name}: {old} before, {new} after")
    for name in ("cpu", "gpu", "threads", "torch", "transformers", "commit"):
        old, new = getattr(before.machine, name), getattr(after.machine, name)
        if old != new:
            found.append(f"{name}: {old or 'unknown'} before, {new or 'unknown'} after")
    return tuple(found)


def _missing(before: Results, after: Results) -> tuple[str, ...]:
    """Methods whose speed only one run has, and why where its gate says so."""
    found = []
    for own, other, which in ((before, after, "after"), (after, before, "before")):
        have = {trial.method for trial in other.trials}
        for name in dict.fromkeys(trial.method for trial in own.trials):
            if name not in have:
                why = next((f"{gate.status}: {gate.reason}" for gate in other.gates if gate.method == name), "not measured")
                found.append(f"{name} has no speed in the run {which} ({why})")
    return tuple(found)
