"""From trials to figures: medians over repeats, bootstrap intervals over prompts, and paired differences between two runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import NormalDist, fmean, median
from typing import Any

import numpy as np

from specdec.bench.measuring import disturbed_by
from specdec.bench.records import ALL, HF, PLAIN, Gate, Interval, Row, Settings, Trial

_DRAWS = 2000
# Part of the items that is left out at each end of a paired difference, so that a pause of the machine does not decide.
_TRIM = 0.1
# Items that were not disturbed count alone where a task has so many of them, and half of its own.
_FEWEST_CALM = 10
# Fewer items than these give no verdict.
FEWEST_ITEMS = 5

# Batch size and temperature; one item in one of them.
Cell = tuple[int, float]
Key = tuple[int, float, str, int]


@dataclass(frozen=True, slots=True)
class Difference:
    """A ratio of two rates over paired items, and its interval. resolution: a ratio this far from 1 is found nine times in ten."""

    ratio: Interval
    items: int
    resolution: float


def middle(trials: Sequence[Trial]) -> list[Trial]:
    """For every method, cell and item the repeat of median time, in order of the items."""
    groups: dict[tuple[str, int, float, int], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.method, trial.batch, trial.temperature, trial.item), []).append(trial)
    found = [sorted(own, key=lambda t: t.seconds)[len(own) // 2] for own in groups.values()]
    return sorted(found, key=lambda t: (t.batch, t.temperature, t.item))


def summarise(trials: Sequence[Trial], gates: Sequence[Gate], settings: Settings) -> tuple[Row, ...]:
    """Rows of the methods that their gates let through: over all prompts, by task, and by the trained length where it is known.

    In each cell only items count that every one of these methods has, so that an unfinished run is compared fairly; and of a task
    only those that other guests of the host left alone, where these are enough: at least 10 and half of the task's.
    """
    passed = {(gate.method, gate.batch, gate.temperature) for gate in gates if gate.counts}
    counted = middle([t for t in trials if (t.method, t.batch, t.temperature) in passed])
    rows: list[Row] = []
    for cell in dict.fromkeys((t.batch, t.temperature) for t in counted):
        own = _calm(_shared([t for t in counted if (t.batch, t.temperature) == cell]))
        for scope, name, inside in _scopes(own, settings):
            rows += _rows_of(scope, name, [t for t in own if inside(t)], settings.seed)
    return tuple(rows)


def _shared(trials: Sequence[Trial]) -> list[Trial]:
    methods = {t.method for t in trials}
    have = {item: {t.method for t in trials if t.item == item} for item in {t.item for t in trials}}
    return [t for t in trials if have[t.item] == methods]


def _calm(trials: Sequence[Trial]) -> list[Trial]:
    disturbed = {t.item for t in trials if disturbed_by(t.stolen)}
    items: dict[str, set[int]] = {}
    for trial in trials:
        items.setdefault(trial.task, set()).add(trial.item)
    left = {task: own - disturbed for task, own in items.items()}
    counted = {task: left[task] if len(left[task]) >= max(_FEWEST_CALM, len(own) / 2) else own for task, own in items.items()}
    return [t for t in trials if t.item in counted[t.task]]


def _scopes(trials: Sequence[Trial], settings: Settings) -> list[tuple[str, str, Callable[[Trial], bool]]]:
    found: list[tuple[str, str, Callable[[Trial], bool]]] = [(ALL, ALL, lambda t: True)]
    for task in dict.fromkeys(t.task for t in trials):
        found.append(("task", task, lambda t, task=task: t.task == task))  # type: ignore[misc]  # binds the task of this turn
    if settings.trained_length is not None:
        longest: int = settings.trained_length
        found.append(("length", "within", lambda t: _length(t) <= longest))
        found.append(("length", "beyond", lambda t: _length(t) > longest))
    return found


def _length(trial: Trial) -> int:
    return max(trial.prompt_tokens) + trial.num_tokens // trial.batch


def _rows_of(scope: str, name: str, trials: Sequence[Trial], seed: int) -> list[Row]:
    by_method: dict[str, list[Trial]] = {}
    for trial in trials:
        by_method.setdefault(trial.method, []).append(trial)
    return [_row(scope, name, method, by_method, seed) for method in by_method]


def _row(scope: str, name: str, method: str, by_method: dict[str, list[Trial]], seed: int) -> Row:
    own = by_method[method]
    decoded, decode_s = sum(t.decode_tokens for t in own), sum(t.decode_s for t in own)
    hf, plain = by_method.get(HF), by_method.get(PLAIN)
    return Row(
        scope=scope,
        name=name,
        method=method,
        batch=own[0].batch,
        temperature=own[0].temperature,
        prompts=sum(t.batch for t in own),
        tokens_per_s=bootstrap(own, None, _whole, seed),
        vs_generate=None if hf is None else bootstrap(own, hf, _whole, seed),
        vs_plain=None if plain is None else bootstrap(own, plain, _whole, seed),
        decode_vs_plain=None if plain is None else bootstrap(own, plain, _decode, seed),
        prefill_s=median(t.prefill_s for t in own),
        decode_tokens_per_s=decoded / decode_s,
        tokens_per_forward=decoded / sum(t.forwards for t in own),
        peak_mib=max((t.peak_mib for t in own if t.peak_mib is not None), default=None),
        joules_per_token=_energy(own),
        **_of_rounds(own),
    )


def _energy(own: Sequence[Trial]) -> float | None:
    known = [t.energy_j for t in own if t.energy_j is not None]
    return sum(known) / sum(t.num_tokens for t in own) if len(known) == len(own) else None


def _of_rounds(own: Sequence[Trial]) -> dict[str, Any]:
    """What rounds tell, for a `Row`; nothing for methods that do not tell of them."""
    rounds = sum(t.request_rounds for t in own)
    if not rounds:
        return {}
    calls, drafted, accepted = sum(t.forwards for t in own), sum(t.drafted for t in own), sum(t.accepted for t in own)
    phases = {name: sum(getattr(t, f"{name}_s") for t in own) for name in ("draft", "target", "verify", "other")}
    round_s, forward_s = sum(phases.values()), sum(t.forward_s for t in own)
    reached, passed = sums([t.reached_at for t in own]), sums([t.accepted_at for t in own])
    expected_s, realised_s = sum(t.expected_s for t in own), sum(t.realised_s for t in own)
    return {
        "acceptance_length": (accepted + rounds) / rounds,
        "acceptance_length_by_request": fmean(length for t in own for length in t.lengths),
        "acceptance_rate": accepted / drafted if drafted else None,
        "per_position": tuple(a / r if r else 0.0 for a, r in zip(passed, reached, strict=True)),
        "draft_share": phases["draft"] / round_s,
        "overhead_share": 1 - forward_s / round_s,
        **{f"{name}_ms": 1000 * seconds / calls for name, seconds in phases.items()},
        "expected_tokens_per_s": sum(t.expected_tokens for t in own) / expected_s if expected_s else None,
        "realised_tokens_per_s": sum(t.realised_tokens for t in own) / realised_s if realised_s else None,
    }


def sums(columns: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Sums by place; shorter columns end in zeros."""
    return tuple(map(sum, zip_longest(*columns, fillvalue=0)))


def _whole(trial: Trial) -> tuple[float, float]:
    return trial.num_tokens, trial.seconds


def _decode(trial: Trial) -> tuple[float, float]:
    return trial.decode_tokens, trial.decode_s


def bootstrap(
    own: Sequence[Trial], base: Sequence[Trial] | None, part: Callable[[Trial], tuple[float, float]], seed: int
) -> Interval:
    """Tokens a second, over those of the base where there is one, with its 95 % bootstrap interval over items.

    own and base are of the same items in the same order.  part: tokens and seconds of a trial.
    """
    draws = np.random.default_rng(seed).integers(0, len(own), size=(_DRAWS, len(own)))

    def rates(trials: Sequence[Trial], picks: Any) -> Any:
        tokens, seconds = np.asarray([part(t) for t in trials]).T
        return tokens[picks].sum(-1) / seconds[picks].sum(-1)

    def ratio(picks: Any) -> Any:
        return rates(own, picks) / (1.0 if base is None else rates(base, picks))

    low, high = np.quantile(ratio(draws), [0.025, 0.975])
    return Interval(float(ratio(np.arange(len(own)))), float(low), float(high))


def log_ratios(trials: Sequence[Trial], method: str, base: str) -> dict[Key, float]:
    """For each item, the log of the method's tokens a second over the base's: the median over repeats of ratios within a repeat.

    Both runs of such a ratio lie close in time, so that a machine which changes pace changes both.
    """
    rates: dict[tuple[Key, int], dict[str, float]] = {}
    for trial in trials:
        key = (trial.batch, trial.temperature, trial.task, trial.item)
        rates.setdefault((key, trial.repeat), {})[trial.method] = trial.num_tokens / trial.seconds
    found: dict[Key, list[float]] = {}
    for (key, _), own in rates.items():
        if method in own and base in own:
            found.setdefault(key, []).append(math.log(own[method] / own[base]))
    return {key: median(values) for key, values in found.items()}


def paired(
    differences: Sequence[float], comparisons: int, starts: float = 0.0, trim: float = _TRIM, level: float = 0.95
) -> Difference:
    """The mean of paired log differences as a ratio, with an interval of this level for all of so many comparisons together.

    A trimmed mean and its t interval (Tukey and McLaughlin 1963); the level is shared evenly (Bonferroni), so that many methods
    do not find a difference by chance. starts: deviation of what the items of a run have in common, which they cannot tell of.
    trim: part left out at each end. At least FEWEST_ITEMS differences.
    """
    values = sorted(differences)
    count, cut = len(values), int(trim * len(values))
    assert count >= FEWEST_ITEMS
    kept = values[cut : count - cut]
    winsorised = [kept[0]] * cut + kept + [kept[-1]] * cut
    mean, centre = fmean(kept), fmean(winsorised)
    spread = math.sqrt(sum((value - centre) ** 2 for value in winsorised) / (count - 1))
    error = math.hypot(spread / ((len(kept) / count) * math.sqrt(count)), starts)
    half = t_quantile(1 - (1 - level) / 2 / comparisons, len(kept) - 1) * error
    ratio = Interval(math.exp(mean), math.exp(mean - half), math.exp(mean + half))
    return Difference(ratio, count, math.exp(half + NormalDist().inv_cdf(0.9) * error))


def t_quantile(level: float, freedom: int) -> float:
    """Student's t by its expansion in the normal quantile (Abramowitz and Stegun 26.7.5), good to 2 % from 4 degrees on."""
    z = NormalDist().inv_cdf(level)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / freedom**power for power, term in enumerate(terms, 1)))
