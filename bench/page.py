"""A benchmark run as one self-contained HTML page: no network, no scripts, light and dark, every chart with its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specdec.bench.markdown import stolen
from specdec.bench.records import ALL, HF, PLAIN, Gate, Interval, Results, Row
from specdec.bench.svg import Bar, Line, bars, document, escape, figure, lines, number, stacked, table

# Rows that tell of rounds have all of these.
_PHASES = ("draft", "target", "verify", "other")
_MISSING = "–"
_STATUS = {
    "exact": "exact",
    "within": "within rounding",
    "refused": "refused",
    "unavailable": "cannot run here",
    "unchecked": "not checked",
}


def write_page(results: Results, path: Path) -> None:
    """Write the page of a run."""
    path.write_text(page(results), encoding="utf-8")


def page(results: Results) -> str:
    """The page as text. A method without rows has no speed on it, only the reason."""
    grids = [(batch, temperature) for temperature in results.settings.temperatures for batch in results.settings.batches]
    parts = ["<h1>Speculative decoding: speed at the same output</h1>", _lead(results, grids), _refusals(results), _facts(results)]
    for batch, temperature in grids:
        parts += [f"<h2>Speedup{_at(results, batch, temperature)}</h2>", _speedups(results, batch, temperature)]
    parts.append(_against_batch(results))
    for batch, temperature in grids:
        parts += [f"<h2>Where it comes from{_at(results, batch, temperature)}</h2>", _inside(results, batch, temperature)]
        parts.append(_synthetic(results, batch, temperature))
    parts += ["<h2>Methods and checks</h2>", _methods(results), _gates(results)]
    parts += ["<h2>Prompts</h2>", _workloads(results), _left_out(results)]
    return document("specdec benchmark", "".join(parts), style=_RULES)


def _at(results: Results, batch: int, temperature: float) -> str:
    """Behind a heading, where a run has several settings."""
    several = len(results.settings.batches) > 1 or len(results.settings.temperatures) > 1
    return f", batch {batch}, temperature {temperature:g}" if several else ""


def _lead(results: Results, grids: Sequence[tuple[int, float]]) -> str:
    """What came out, in a sentence for each setting."""
    found = []
    for batch, temperature in grids:
        rows = [r for r in _rows(results, batch, temperature) if r.vs_plain is not None and r.method not in (HF, PLAIN)]
        best = max(rows, key=lambda row: row.vs_plain.value if row.vs_plain else 0.0, default=None)
        said = "no method besides the bases has a speed" if best is None else _verdict(best)
        found.append(f'<p class="lead">{escape(f"Batch {batch}, temperature {temperature:g}: {said}.")}</p>')
    note = "Ratios of tokens a second over all prompts, prompt reading included; in brackets the 95 % interval over prompts."
    return "".join(found) + f'<p class="muted">{note}</p>'


def _verdict(best: Row) -> str:
    """As much as the interval allows. best: of the methods with a ratio to plain decoding."""
    assert best.vs_plain is not None, "chosen by it"
    ratios = f"{_times(best.vs_plain)} plain decoding" + (
        f" and {_times(best.vs_generate)} HF generate" if best.vs_generate else ""
    )
    if best.vs_plain.low > 1:
        return f"{best.method} is fastest, {ratios}"
    clearly = "" if best.vs_plain.high < 1 else "clearly "
    return f"no method is {clearly}faster than plain decoding; the best is {best.method}, {ratios}"


def _refusals(results: Results) -> str:
    """What has no number, at the top, so that nobody misses it."""
    said = [
        f"{_whose(results, gate)} was refused: {gate.reason or 'its output differs'}."
        for gate in results.gates
        if gate.status == "refused"
    ]
    if not results.complete:
        said.append("This run is not complete; go on with --resume.")
    if results.refused_prompts:
        count = len(results.refused_prompts)
        said.append(
            f"{count} prompt{'s' if count > 1 else ''} did not fit and {'were' if count > 1 else 'was'} left out whole; see below."
        )
    return f'<div class="notice"><ul>{"".join(f"<li>{escape(text)}</li>" for text in said)}</ul></div>' if said else ""


def _whose(results: Results, gate: Gate) -> str:
    return f"{gate.method}{_at(results, gate.batch, gate.temperature)}"


def _facts(results: Results) -> str:
    machine, settings = results.machine, results.settings
    prompts = sum(load.prompts for load in results.workloads)
    facts = {
        "machine": f"{machine.gpu or machine.cpu}, {machine.threads} of {machine.cores} cores, {machine.memory_mib / 1024:.0f} GiB",
        "system": f"{machine.system}, Python {machine.python}",
        "versions": f"specdec {machine.specdec}, torch {machine.torch}, transformers {machine.transformers}",
        "commit": machine.commit or "not from a checkout",
        "measured": machine.created,
        "target": f"{settings.target}, {settings.dtype}",
        "workload": f"{prompts} prompts, {settings.max_new_tokens} new tokens each",
        "host": f"its other guests took {stolen(results)}",
        "times": f"{f'medians of {settings.repeats} repeats' if settings.repeats > 1 else 'one run'}, intervals over prompts",
        "seed": settings.seed,
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f'<dl class="facts">{rows}<dt>command</dt><dd><code>{escape(machine.command)}</code></dd></dl>'


def _rows(results: Results, batch: int, temperature: float, scope: str = ALL, name: str = ALL) -> list[Row]:
    """One for each method that has one, in the order of the methods."""
    found = (
        results.row(method.name, batch, temperature, scope, name) for method in results.methods if method.family != "synthetic"
    )
    return [row for row in found if row is not None]


def _synthetic(results: Results, batch: int, temperature: float) -> str:
    """Imitations, apart from everything real."""
    found = (results.row(method.name, batch, temperature) for method in results.methods if method.family == "synthetic")
    rows = [row for row in found if row is not None]
    if not rows:
        return ""
    title = "Synthetic acceptance: cost alone"
    shown = [Bar(row.method, row.vs_plain.value, row.vs_plain.low, row.vs_plain.high, 6) for row in rows if row.vs_plain]
    numbers = table(title, _HEADINGS, [_cells("All tasks", row) for row in rows], words=(1,))
    note = "What a drafter of that cost would give if its tokens were right that often. No drafter did this."
    body = bars(title, shown, unit="×", reference=1.0)
    return f"<h2>Synthetic{_at(results, batch, temperature)}</h2>{figure(title, body, note=note, numbers=numbers)}"


def _scopes(results: Results, batch: int, temperature: float) -> list[tuple[str, str, str]]:
    """(scope, name, heading) of what there are rows of: everything, the tasks, and the trained length."""
    present = {(row.scope, row.name) for row in results.rows if (row.batch, row.temperature) == (batch, temperature)}
    wanted = [(ALL, ALL, "All tasks"), *(("task", task, task) for task in results.tasks())]
    trained = results.settings.trained_length
    wanted += [
        ("length", name, f"Prompts {name} the trained length{f' of {trained}' if trained else ''}") for name in ("within", "beyond")
    ]
    return [scope for scope in wanted if scope[:2] in present]


def _speedups(results: Results, batch: int, temperature: float) -> str:
    at, charts = (batch, temperature), []
    total: list[tuple[str, ...]] = []
    rows: list[tuple[str, ...]] = []
    ratios = [r.vs_plain.high for r in results.rows if r.vs_plain and (r.batch, r.temperature) == at]
    scale = max(ratios, default=0.0)
    for scope, name, heading in _scopes(results, batch, temperature):
        own = _rows(results, batch, temperature, scope, name)
        charts.append(_speedup(results, own, f"{heading}: over plain decoding", PLAIN, at, scale))
        if scope == ALL:
            charts.append(_speedup(results, own, f"{heading}: over HF generate", HF, at, 0.0))
        (total if scope == ALL else rows).extend(_cells(heading, row) for row in own)
    every = table("All figures by task and method", _HEADINGS, rows, words=(1,))
    below = f"<details><summary>All figures by task and method</summary>{every}</details>" if rows else ""
    return f'<div class="grid2">{"".join(charts)}</div>' + table("All figures over all tasks", _HEADINGS, total, words=(1,)) + below


def _speedup(results: Results, rows: Sequence[Row], title: str, base: str, at: tuple[int, float], scale: float) -> str:
    """Bars of one scope against a base, which is the dashed line; who was refused is named, without a bar."""
    shown = []
    for row in rows:
        found = row.vs_plain if base == PLAIN else row.vs_generate
        if found is not None and row.method != base:
            # One prompt has no interval over prompts.
            low, high = (found.low, found.high) if row.prompts > 1 else (None, None)
            shown.append(Bar(row.method, found.value, low, high, _colour(results, row.method)))
    for gate in results.gates:
        if (gate.batch, gate.temperature) == at and not gate.counts and not results.is_synthetic(gate.method):
            shown.append(Bar(gate.method, None, note=_STATUS[gate.status]))
    return figure(title, bars(title, shown, unit="×", reference=1.0, scale=scale)) if shown else ""


_HEADINGS = (
    "task",
    "method",
    "tokens/s",
    "over HF generate",
    "over plain",
    "over plain, without the prompt",
    "mean acceptance length",
    "the same by request",
    "acceptance rate",
    "tokens a target forward",
    "drafting",
    "outside forwards",
    "joules a token",
)


def _cells(heading: str, row: Row) -> tuple[str, ...]:
    return (
        heading,
        row.method,
        number(row.tokens_per_s.value, 1),
        _times(row.vs_generate),
        _times(row.vs_plain),
        _times(row.decode_vs_plain),
        _figure(row.acceptance_length),
        _figure(row.acceptance_length_by_request),
        _share(row.acceptance_rate),
        number(row.tokens_per_forward),
        _share(row.draft_share),
        _share(row.overhead_share),
        _figure(row.joules_per_token),
    )


def _against_batch(results: Results) -> str:
    """Speedup by batch size, where a run has several."""
    if len(results.settings.batches) < 2:
        return ""
    charts = []
    for temperature in results.settings.temperatures:
        series, rows = [], []
        for method in results.methods:
            found = [results.row(method.name, batch, temperature) for batch in results.settings.batches]
            own = [(row.batch, row.vs_plain) for row in found if row is not None and row.vs_plain is not None]
            if own and method.name != PLAIN and method.family != "synthetic":
                points = tuple((float(batch), ratio.value) for batch, ratio in own)
                series.append(Line(method.name, points, _colour(results, method.name)))
                rows += [(method.name, batch, _times(ratio)) for batch, ratio in own]
        if series:
            title = f"Over plain decoding, temperature {temperature:g}"
            numbers = table(title, ("method", "batch", "speedup"), rows)
            charts.append(figure(title, lines(title, series, x="batch", y="times plain decoding", digits=2), numbers=numbers))
    return f'<h2>Speedup against batch size</h2><div class="grid2 wide">{"".join(charts)}</div>'


def _inside(results: Results, batch: int, temperature: float) -> str:
    rows = _rows(results, batch, temperature)
    charts = [_positions(results, rows), _phases(rows), _goodput(rows), _memory(results, rows)]
    return f'<div class="grid2 wide">{"".join(charts)}</div>'


def _positions(results: Results, rows: Sequence[Row]) -> str:
    told = [row for row in rows if row.per_position]
    if not told:
        return ""
    title = "Acceptance by position"
    series = [
        Line(row.method, tuple((i + 1.0, share) for i, share in enumerate(row.per_position)), _colour(results, row.method))
        for row in told
    ]
    deepest = max(len(row.per_position) for row in told)
    cells = [(row.method, *map(_share, row.per_position), *[_MISSING] * (deepest - len(row.per_position))) for row in told]
    numbers = table(title, ("method", *map(str, range(1, deepest + 1))), cells)
    note = "Of the rounds with room to draft that deep, the part that accepted a token there."
    return figure(title, lines(title, series, x="position", y="accepted", digits=2), note=note, numbers=numbers)


def _phases(rows: Sequence[Row]) -> str:
    told = [(row.method, found) for row in rows if (found := _milliseconds(row)) is not None]
    if not told:
        return ""
    title = "Time of a round by phase"
    numbers = table(f"{title}, ms", ("method", *_PHASES), [(name, *(number(ms) for ms in found)) for name, found in told])
    return figure(title, stacked(title, told, _PHASES, unit=" ms"), numbers=numbers)


def _milliseconds(row: Row) -> tuple[float, ...] | None:
    found = [row.draft_ms, row.target_ms, row.verify_ms, row.other_ms]
    known = tuple(ms for ms in found if ms is not None)
    return known if len(known) == len(found) else None


def _goodput(rows: Sequence[Row]) -> str:
    shown, cells = [], []
    for row in rows:
        expected, realised = row.expected_tokens_per_s, row.realised_tokens_per_s
        if expected is None or realised is None:
            continue
        shown += [Bar(f"{row.method}: expected", expected), Bar(f"{row.method}: realised", realised, colour=1)]
        cells.append(
            (row.method, number(expected, 1), number(realised, 1), f"{expected / realised - 1:+.1%}" if realised else _MISSING)
        )
    if not shown:
        return ""
    title = "Goodput: what the planner expected and what came of it"
    numbers = table(f"{title}, tokens/s", ("method", "expected", "realised", "difference"), cells)
    note = "Tokens a second of the rounds whose time was forecast."
    return figure(title, bars(title, shown, digits=1), note=note, numbers=numbers)


def _memory(results: Results, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    title = "Memory against speed"
    weights = {method.name: method.weights_mib for method in results.methods}
    series = [Line(row.method, ((weights[row.method], row.tokens_per_s.value),), _colour(results, row.method)) for row in rows]
    cells = [
        (row.method, number(weights[row.method], 1), _figure(row.peak_mib, 0), number(row.tokens_per_s.value, 1)) for row in rows
    ]
    numbers = table(title, ("method", "MiB beside the target", "peak MiB", "tokens/s"), cells)
    chart = lines(title, series, x="MiB of weights beside the target", y="tokens/s", joined=False)
    return figure(title, chart, note="Up is faster, right needs more memory.", numbers=numbers)


def _methods(results: Results) -> str:
    rows = [(m.name, m.about, m.drafter or _MISSING, m.planner or _MISSING, number(m.weights_mib, 1)) for m in results.methods]
    return table("Methods", ("method", "what it is", "drafter", "planner", "MiB beside the target"), rows, words=(1, 2, 3))


def _gates(results: Results) -> str:
    rows = [
        (g.method, g.batch, f"{g.temperature:g}", _STATUS[g.status], g.checked, g.exact, g.within, g.reason or _MISSING)
        for g in results.gates
    ]
    headings = ("method", "batch", "temperature", "outputs", "checked", "exact", "within rounding", "reason")
    return table("Outputs against plain decoding, checked before any time counts", headings, rows, words=(3, 7))


def _workloads(results: Results) -> str:
    rows = [(w.task, w.source, w.licence, w.prompts, w.prompt_tokens, w.refused) for w in results.workloads]
    return table("Tasks", ("task", "source", "licence", "prompts", "tokens", "left out"), rows, words=(1, 2))


def _left_out(results: Results) -> str:
    if not results.refused_prompts:
        return "<p>No prompt was left out, and none was cut.</p>"
    rows = [(p.task, p.source, p.line, p.tokens, p.reason) for p in results.refused_prompts]
    return table("Prompts left out", ("task", "source", "line", "tokens", "reason"), rows, words=(1, 4))


def _colour(results: Results, method: str) -> int:
    return [known.name for known in results.methods].index(method)


def _times(found: Interval | None) -> str:
    return _MISSING if found is None else f"{found.value:.2f}× ({found.low:.2f} to {found.high:.2f})"


def _figure(value: float | None, digits: int = 2) -> str:
    return _MISSING if value is None else number(value, digits)


def _share(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.0%}"


_RULES = """
.notice{border:1px solid var(--c1);border-left-width:6px;border-radius:6px;padding:8px 14px;margin:12px 0}
.notice ul{margin:0;padding-left:18px}
h2+.grid2{margin-bottom:16px}
td{max-width:420px}
"""
