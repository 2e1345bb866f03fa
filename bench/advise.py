"""Which drafter to use, in plain words, from a run's results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdec.bench.records import ALL, PLAIN, Interval, MethodInfo, Results, Row
from specdec.bench.statistics import FEWEST_ITEMS, log_ratios, paired
from specdec.bundled import BUNDLED
from specdec.errors import SpecDecError

# Below this a drafter's gain is not worth having it.
_WORTH = 1.02


@dataclass(frozen=True, slots=True)
class Advice:
    """What to use at a batch size and temperature. method: `plain` where no drafter pays.

    vs_plain, vs_generate: the expected speedup.  why: sentences.  by_task: another choice that a task's own figures ask for.
    use: the call that makes the generator.
    """

    batch: int
    temperature: float
    method: str
    vs_plain: Interval | None
    vs_generate: Interval | None
    why: tuple[str, ...]
    by_task: tuple[str, ...]
    use: str


def advise(results: Results) -> tuple[Advice, ...]:
    """Advice for each batch size and temperature that was measured. Raises SpecDecError when no method has a speed."""
    cells = dict.fromkeys((row.batch, row.temperature) for row in results.rows)
    if not cells:
        raise SpecDecError("these results hold no speed: every method was refused or none ran to the end; see the gates")
    return tuple(_advice(results, *cell) for cell in cells)


def _advice(results: Results, batch: int, temperature: float) -> Advice:
    infos = {info.name: info for info in results.methods}
    rows = [r for r in results.rows if (r.batch, r.temperature, r.scope) == (batch, temperature, ALL)]
    ours = [r for r in rows if infos[r.method].family == "drafter" and r.vs_plain is not None]
    plain = next((r for r in rows if r.method == PLAIN), None)
    paying = sorted((r for r in ours if _pays(r)), key=lambda r: -_gain(r))
    refused = _refused(results, batch, temperature)
    if not paying:
        found = (*(_against(row) for row in sorted(ours, key=lambda r: -_gain(r))[:2]), *refused)
        generate = plain.vs_generate if plain else None
        said = found or ("no drafter was measured",)
        return Advice(batch, temperature, PLAIN, None, generate, said, (), "SpeculativeGenerator(target)")
    best, alike = paying[0], _alike(results, paying)
    chosen = min(alike, key=lambda r: (infos[r.method].weights_mib, -_gain(r)))
    why = [_for(chosen)]
    if chosen.method != best.method:
        why.append(f"{best.method} measured {_times(_gain(best))}, but the difference is within noise and it holds more weights.")
    others = [r.method for r in alike if r.method not in (chosen.method, best.method)]
    if others:
        why.append(f"Not told apart from it: {', '.join(others)}.")
    why += [*_caution(results, chosen), *refused]
    use = _use(infos[chosen.method])
    tasks = _by_task(results, chosen, infos)
    return Advice(batch, temperature, chosen.method, chosen.vs_plain, chosen.vs_generate, tuple(why), tasks, use)


def _pays(row: Row) -> bool:
    return row.vs_plain is not None and row.vs_plain.low > 1 and row.vs_plain.value > _WORTH


def _gain(row: Row) -> float:
    return row.vs_plain.value if row.vs_plain is not None else 0.0


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def _alike(results: Results, paying: Sequence[Row]) -> list[Row]:
    """The best one and those whose paired difference from it may be chance; few prompts tell nothing apart but by intervals."""
    best, found = paying[0], [paying[0]]
    for row in paying[1:]:
        logs = log_ratios(results.trials, row.method, best.method)
        own = [value for key, value in logs.items() if key[:2] == (best.batch, best.temperature)]
        if len(own) >= FEWEST_ITEMS:
            same = paired(own, len(paying) - 1).ratio.high >= 1
        else:
            same = row.vs_plain is not None and best.vs_plain is not None and row.vs_plain.high >= best.vs_plain.low
        found += [row] if same else []
    return found


def _for(row: Row) -> str:
    """Why a drafter pays."""
    said = f"{row.method} makes {row.acceptance_length or 1:.2f} tokens a round"
    if row.acceptance_rate is not None:
        said += f" ({row.acceptance_rate:.0%} of the drafted ones are accepted)"
    if row.draft_share is not None and row.overhead_share is not None:
        said += f"; {row.draft_share:.0%} of a round goes into drafting, {row.overhead_share:.0%} is outside the models' forwards"
    return said + "."


def _against(row: Row) -> str:
    low, high = (row.vs_plain.low, row.vs_plain.high) if row.vs_plain is not None else (0.0, 0.0)
    verdict = "which may be chance" if _gain(row) > _WORTH else "which is no gain"
    return f"{_for(row)[:-1]}: {_times(_gain(row))} of plain decoding ({low:.2f} to {high:.2f}), {verdict}."


def _refused(results: Results, batch: int, temperature: float) -> tuple[str, ...]:
    own = [g for g in results.gates if (g.batch, g.temperature, g.status) == (batch, temperature, "refused")]
    return tuple(f"{gate.method} was refused, its output is not the target's: {gate.reason}." for gate in own)


def _caution(results: Results, row: Row) -> list[str]:
    said = []
    if row.prompts < 4 * FEWEST_ITEMS:
        said.append(f"Only {row.prompts} prompts were measured; measure your own with --prompts before you rely on it.")
    if not results.complete:
        said.append("The run is not finished.")
    return said


def _by_task(results: Results, chosen: Row, infos: dict[str, MethodInfo]) -> tuple[str, ...]:
    """Tasks whose figures ask for something else by intervals that do not meet."""
    found = []
    for task in results.tasks():
        where = (chosen.batch, chosen.temperature, "task", task)
        rows = [r for r in results.rows if (r.batch, r.temperature, r.scope, r.name) == where]
        own = next((r for r in rows if r.method == chosen.method), None)
        able = [r for r in rows if r.vs_plain is not None and infos[r.method].family in ("plain", "drafter")]
        top = max(able, key=_gain, default=None)
        if own is None or own.vs_plain is None or top is None or top.vs_plain is None or top.method == own.method:
            continue
        if top.vs_plain.low > own.vs_plain.high:
            found.append(f"{task}: {top.method} ({_times(_gain(top))}, {chosen.method} {_times(_gain(own))})")
    return tuple(found)


def _use(info: MethodInfo) -> str:
    kind, _, role = (info.drafter or "").partition(":")
    source = f"bundled_path({role!r})" if kind == BUNDLED and role else repr(info.drafter)
    planner = "" if info.planner in (None, "default") else f", planner={info.planner!r}"
    return f"SpeculativeGenerator(target, {source}{planner})"
