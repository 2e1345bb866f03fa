"""Markdown tables of what `specdec.bench.gpu` measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from specdec.bench.gpu_decode import HF as GENERATE
from specdec.bench.gpu_decode import METHODS
from specdec.bench.gpu_decode import PLAIN as NO_DRAFTER
from specdec.bench.gpu_kernels import COPY, FLEX, FLEX_DEFAULT, HF, OURS, PLAIN
from specdec.bench.timing import Sample, medians, ratio_interval

Points = list[dict[str, Any]]
STAGES = ("tests", "kernels", "step", "decode")


def load(results: Path, stage: str) -> Points:
    """The saved points of a stage, none where it has not run."""
    path = results / f"{stage}.json"
    found: Points = json.loads(path.read_text()) if path.exists() else []
    return found


def render(results: Path) -> str:
    """All stages that have points, one section each, and every method that failed with its reason."""
    parts = []
    for stage, section in zip(STAGES, (_tests, _kernels, _step, _decode), strict=True):
        points = load(results, stage)
        if points:
            parts += [f"## {stage}", _about(points), section(points), _failures(points)]
    return "\n\n".join(filter(None, parts)) + "\n"


def beyond_rounding(points: Points) -> Points:
    """Decoding runs whose output differs from plain decoding by more than rounding explains."""
    return [p for p in points if p.get("within") is False]


def _table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    ruler = ["---"] + ["---:"] * (len(headings) - 1)
    lines = [headings, ruler, *rows]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def _about(points: Points) -> str:
    """What the points were measured on: one line, however many commits there were."""
    parts = []
    for key in ("device", "torch", "cuda", "triton", "transformers", "commit"):
        seen = dict.fromkeys(str(p[key]) for p in points if p.get(key) is not None)
        if seen:
            parts.append(", ".join(seen) if key == "device" else f"{key} {', '.join(seen)}")
    return "; ".join(parts) + "."


def _failures(points: Points) -> str:
    """What could not be measured, and why."""
    names = ("method", "model", "batch", "prefix", "nodes", "forward", "prompt", "file")
    failed = [p for p in points if "failed" in p]
    lines = [f"- {', '.join(f'{n} {p[n]}' for n in names if n in p)}: {p['failed']}" for p in failed]
    return "\n".join(["Not measured:", "", *lines]) if lines else ""


def _good(points: Points) -> Points:
    return [p for p in points if "failed" not in p]


def _format(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _tests(points: Points) -> str:
    latest = {p["file"]: p for p in _good(points)}
    rows = [[p["file"], p["passed"], p["failures"], p["skipped"], f"{p['seconds']:.0f}"] for p in latest.values()]
    return _table(["file", "passed", "failed", "skipped", "seconds"], rows)


def _kernels(points: Points) -> str:
    found = {(p["method"], p.get("batch"), p.get("prefix"), p.get("nodes")): p for p in _good(points)}
    cases = sorted({key[1:] for key in found if key[0] != COPY})
    rows = []
    for batch, prefix, nodes in cases:
        ours, plain = found.get((OURS, batch, prefix, nodes)), found.get((PLAIN, batch, prefix, 1))
        others = [found.get((HF, batch, prefix, nodes))]
        others.append(found.get((FLEX, batch, prefix, nodes)) or found.get((FLEX_DEFAULT, batch, prefix, nodes)))
        rows.append([batch, prefix, nodes, *_kernel_cells(ours, others, plain)])
    headings = ["batch", "prefix", "nodes", "specdec, µs", "of copy bandwidth", "masked SDPA, µs", "flex decoding, µs"]
    table = _table(
        [*headings, "plain decode SDPA, µs", "specdec over plain", "largest error, specdec", "largest error, masked SDPA"], rows
    )
    copy = found.get((COPY, None, None, None))
    note = f"One big copy: {copy['bytes_per_s'] / 1e12:.2f} TB/s, read and written.\n\n" if copy else ""
    return note + table


def _kernel_cells(ours: Any, others: list[Any], plain: Any) -> list[str | None]:
    """Cells of one case; plain decode attends with a single row, whatever the nodes."""
    own, single = (None if p is None else p["ms"] * 1e3 for p in (ours, plain))
    times = [_format(None if p is None else p["ms"] * 1e3, ".1f") for p in others]
    ratio = None if own is None or single is None else own / single
    errors = [_format(None if p is None else p["largest_error"], ".1e") for p in (ours, others[0])]
    share = None if ours is None else _format(ours.get("share_of_copy"), ".0%")
    return [_format(own, ".1f"), share, *times, _format(single, ".1f"), _format(ratio, ".2f"), *errors]


def _step(points: Points) -> str:
    found = {(p["model"], p["prefix"], p["forward"], p["nodes"]): p for p in _good(points) if "nodes" in p}
    nodes = sorted({key[3] for key in found})
    rows = []
    for model, prefix, forward in dict.fromkeys(key[:3] for key in found):
        one = found.get((model, prefix, forward, 1))
        cells: list[str | None] = [_format(one["ms"] if one else None, ".2f")]
        cells += [_format(one.get("share_of_nominal") if one else None, ".0%")]
        for m in nodes[1:]:
            many = found.get((model, prefix, forward, m))
            cells.append(_format(many["ms"] / one["ms"] if many and one else None, ".2f"))
        warned = one["warned"] if one else None
        rows.append([model, prefix, forward, *cells, warned])
    headings = ["model", "prefix", "forward", "t(1), ms", "of nominal bandwidth", *(f"t({m})/t(1)" for m in nodes[1:])]
    return _table([*headings, "warnings"], rows)


def _decode(points: Points) -> str:
    rounds_of = {p["method"]: p for p in _good(points) if "waits_a_round" in p}
    good = [p for p in _good(points) if "prompt" in p]
    samples = medians([_sample(p) for p in good])
    complete = _prompts_of_all(samples)
    rows = []
    for name in METHODS:
        own = sorted((s for s in samples if s.method == name and s.prompt in complete), key=lambda s: s.prompt)
        if own:
            rate = sum(s.num_tokens for s in own) / sum(s.seconds for s in own)
            ratios = [_ratio(samples, complete, name, base) for base in (GENERATE, NO_DRAFTER)]
            rounds = sum(s.rounds for s in own)
            length = _format(sum(s.num_tokens for s in own) / rounds if rounds else None, ".2f")
            outputs = _outputs([p for p in good if p["method"] == name])
            rows.append([name, f"{rate:.1f}", *ratios, length, *outputs, *_waits(own, rounds_of.get(name))])
    headings = ["method", "tokens/s", "over `generate`", "over specdec without a drafter", "tokens a round", "as plain"]
    notes = "; ".join(dict.fromkeys(p["note"] for p in good))
    note = f"Greedy, batch 1, {len(complete)} prompts; {notes}. In brackets: 95 % bootstrap intervals over prompts."
    return (
        note
        + "\n\n"
        + _table(
            [*headings, "differ within rounding", "beyond", "copies to the host a round", "waits a round", "device idle"], rows
        )
    )


def _waits(samples: list[Sample], profiled: dict[str, Any] | None) -> list[str | None]:
    """Copies and waits of a round, and the share of a round in which the device does nothing."""
    rounds = sum(s.rounds for s in samples)
    if profiled is None or not rounds:
        return [None, None, None]
    round_ms = 1e3 * sum(s.seconds for s in samples) / rounds
    counts = [f"{profiled[key]:.2f}" for key in ("copies_to_host_a_round", "waits_a_round")]
    return [*counts, f"{max(0.0, 1 - profiled['busy_ms_a_round'] / round_ms):.1%}"]


def _sample(point: dict[str, Any]) -> Sample:
    return Sample(
        point["method"],
        point["prompt"],
        "",
        point["tokens"],
        point["seconds"],
        point.get("rounds") or 0,
        0.0,
        0.0,
        (),
        point["repeat"],
    )


def _prompts_of_all(samples: list[Sample]) -> set[int]:
    """Prompts that every measured method has run, so that ratios compare like with like."""
    by_method: dict[str, set[int]] = {}
    for sample in samples:
        by_method.setdefault(sample.method, set()).add(sample.prompt)
    return set.intersection(*by_method.values()) if by_method else set()


def _ratio(samples: list[Sample], complete: set[int], name: str, base: str) -> str | None:
    picked = {
        n: sorted((s for s in samples if s.method == n and s.prompt in complete), key=lambda s: s.prompt) for n in (name, base)
    }
    if not picked[base]:
        return None
    seconds = {n: [s.seconds for s in own] for n, own in picked.items()}
    tokens = {n: [s.num_tokens for s in own] for n, own in picked.items()}
    ratio, low, high = ratio_interval(seconds, tokens, name, base)
    return f"{ratio:.2f}x ({low:.2f}-{high:.2f})"


def _outputs(points: Points) -> list[str]:
    """Runs whose output is plain decoding's, and compared differences that rounding explains or does not."""
    same = sum(p["same_as_plain"] for p in points)
    within = sum(p.get("within") is True for p in points)
    return [f"{same} of {len(points)} runs", str(within), str(len(beyond_rounding(points)))]
