"""A run's results as Markdown: speed by task and method, what was refused and why, and what it was measured on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from specdec.bench.records import ALL, HF, PLAIN, Interval, Results, Row

_HEADINGS = (
    "method",
    "tokens/s",
    "over generate",
    "over plain",
    "decode only, over plain",
    "prompt s",
    "tokens a round",
    "by request",
    "a target forward",
    "drafting",
    "outside forwards",
    "peak MiB",
    "joules a token",
)


def markdown(results: Results) -> str:
    """The whole report. Refused methods have no speed in it, only their reasons."""
    parts = [f"# Benchmark of {results.settings.target}", _about(results)]
    for batch, temperature in dict.fromkeys((row.batch, row.temperature) for row in results.rows):
        parts.append(f"## Batch {batch}, temperature {temperature:g}")
        parts.append(_methods(results, batch, temperature))
        parts += ["Speed over plain decoding, by task:", by_task(results, batch, temperature, PLAIN)]
        parts += ["Speed over `model.generate`, by task:", by_task(results, batch, temperature, HF)]
        parts += [_positions(results, batch, temperature), _synthetic(results, batch, temperature)]
    parts += [_gates(results), _prompts(results), _machine(results)]
    return "\n\n".join(filter(None, parts)) + "\n"


def by_task(results: Results, batch: int, temperature: float, base: str) -> str:
    """A table with a line for each method and a column for each task, "all", and the trained length. base: HF or PLAIN."""
    rows = [r for r in results.rows if (r.batch, r.temperature) == (batch, temperature) and not results.is_synthetic(r.method)]
    columns = list(dict.fromkeys((r.scope, r.name) for r in rows))
    names = [name if scope != "length" else f"{name} {results.settings.trained_length}" for scope, name in columns]
    lines = []
    for method in dict.fromkeys(r.method for r in rows):
        found = {(r.scope, r.name): r.vs_generate if base == HF else r.vs_plain for r in rows if r.method == method}
        lines.append([method, *(_ratio(found.get(column)) for column in columns)])
    return table(["method", *names], lines)


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    marks = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (headings, marks, *lines))


def _ratio(interval: Interval | None) -> str:
    if interval is None:
        return ""
    # One prompt, or the base itself, has no spread to tell of.
    return (
        f"{interval.value:.2f}"
        if interval.low == interval.high
        else f"{interval.value:.2f} ({interval.low:.2f}–{interval.high:.2f})"
    )


def _number(value: float | None, form: str = ".2f", scale: float = 1.0) -> str:
    return "" if value is None else format(value * scale, form)


def _about(results: Results) -> str:
    settings = results.settings
    said = (
        f"{settings.dtype}, {settings.max_new_tokens} new tokens for each prompt, end of sequence ignored, median of "
        f"{settings.repeats} runs; 95 % bootstrap intervals over prompts in brackets. Every output was compared before its time "
        "counted."
    )
    return said if results.complete else said + " **The run is not finished.**"


def _methods(results: Results, batch: int, temperature: float) -> str:
    rows = [r for r in _overall(results, batch, temperature) if not results.is_synthetic(r.method)]
    return table(_HEADINGS, [_line(row) for row in rows])


def _overall(results: Results, batch: int, temperature: float) -> list[Row]:
    return [r for r in results.rows if (r.batch, r.temperature, r.scope) == (batch, temperature, ALL)]


def _synthetic(results: Results, batch: int, temperature: float) -> str:
    """Apart from the real ones, and marked."""
    rows = [r for r in _overall(results, batch, temperature) if results.is_synthetic(r.method)]
    said = "**Synthetic acceptance**: what a drafter of that cost would give if it were right that often. No drafter did this."
    return f"{said}\n\n{table(_HEADINGS, [_line(row) for row in rows])}" if rows else ""


def _line(row: Row) -> list[str]:
    return [
        row.method,
        f"{row.tokens_per_s.value:.1f}",
        _ratio(row.vs_generate),
        _ratio(row.vs_plain),
        _ratio(row.decode_vs_plain),
        f"{row.prefill_s:.3f}",
        _number(row.acceptance_length),
        _number(row.acceptance_length_by_request),
        _number(row.tokens_per_forward),
        _number(row.draft_share, ".0%"),
        _number(row.overhead_share, ".0%"),
        _number(row.peak_mib, ".0f"),
        _number(row.joules_per_token, ".2f"),
    ]


def _positions(results: Results, batch: int, temperature: float) -> str:
    rows = [r for r in _overall(results, batch, temperature) if r.per_position and not results.is_synthetic(r.method)]
    if not rows:
        return ""
    depth = max(len(row.per_position) for row in rows)
    lines = [[r.method, *(_number(p, ".0%") for p in r.per_position), *[""] * (depth - len(r.per_position))] for r in rows]
    return "Accepted, by position in the draft:\n\n" + table(["method", *map(str, range(1, depth + 1))], lines)


def _gates(results: Results) -> str:
    headings = ["method", "batch", "temperature", "outputs", "the same", "by rounding", "verdict"]
    lines = []
    for gate in results.gates:
        verdict = f"{gate.status}: {gate.reason}" if gate.reason else gate.status
        counts = [str(number) for number in (gate.checked, gate.exact, gate.within)]
        lines.append([gate.method, str(gate.batch), f"{gate.temperature:g}", *counts, verdict])
    return "## Equality\n\n" + table(headings, lines)


def _prompts(results: Results) -> str:
    headings = ["task", "source", "licence", "prompts", "tokens", "refused"]
    lines = [[w.task, w.source, w.licence, str(w.prompts), str(w.prompt_tokens), str(w.refused)] for w in results.workloads]
    said = "## Prompts\n\n" + table(headings, lines)
    if not results.refused_prompts:
        return said
    refused = [[r.task, r.source, str(r.line), str(r.tokens), r.reason] for r in results.refused_prompts]
    return said + "\n\nRefused, whole:\n\n" + table(["task", "source", "line", "tokens", "why"], refused)


def _machine(results: Results) -> str:
    machine = results.machine
    gpu = f", {machine.gpu}" if machine.gpu else ""
    return (
        f"## Measured on\n\n{machine.cpu}, {machine.cores} cores, {machine.threads} threads{gpu}, {machine.system}; Python "
        f"{machine.python}, torch {machine.torch}, transformers {machine.transformers}, specdec {machine.specdec} "
        f"{machine.commit}; {machine.created}. Other guests of the host took {stolen(results)}.\n\n    {machine.command}"
    )


def stolen(results: Results) -> str:
    """How much of the processor time others took while calls were timed, in words."""
    parts = [trial.stolen for trial in results.trials if trial.stolen is not None]
    if not parts:
        return "an unknown part of the time"
    told = f"{median(parts):.0%} of the processor time of the median call and {max(parts):.0%} of the worst"
    asked = len({(t.batch, t.temperature, t.item) for t in results.trials})
    counted = {(row.batch, row.temperature): row.prompts // row.batch for row in results.rows if row.scope == ALL}
    left_out = asked - sum(counted.values())
    return f"{told}; {left_out} of {asked} items, which it disturbed, do not count" if left_out else told
