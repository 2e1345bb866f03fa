"""How speedup grows with the draft's size, its training tokens and the batch: measured on one family, fitted and drawn.

    python -P -m specdec.bench.scaling --out scaling --draft small=PATH@5e6 --draft large=PATH@5e6 --batch 1 --batch 4

The fit is the log-linear law of Scylla (arXiv 2505.07858): a figure is linear in the logarithms of the draft's parameters and of
its training tokens. The batch is a third axis of the same kind. Each draft decodes with a fixed length, so that acceptance can be
compared, and with the default planner, which is what a user gets.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec import SpeculativeGenerator
from specdec.bench.markdown import table
from specdec.bench.methods import Method, Ours, Selection, make_methods
from specdec.bench.records import MethodInfo, Results, Settings, write_results
from specdec.bench.suite import run_suite, this_machine
from specdec.bench.svg import Line, document, escape, figure, lines
from specdec.bench.svg import table as html_table
from specdec.bench.workloads import QUICK, Choice, load_prompts
from specdec.bundled import BUNDLED, checkpoint
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.errors import SpecDecError

FIXED, DEFAULT = "fixed", "default"
# What is fitted, and along what.
FIGURES = {"tokens_a_round": "tokens a round", "speedup": "times plain decoding"}
AXES = {"parameters": "log10 parameters", "tokens": "log10 training tokens", "batch": "log2 batch"}


@dataclass(frozen=True, slots=True)
class DraftOf:
    """A draft of the study. path: a checkpoint, or "bundled".

    tokens: it was trained on, None where unknown, which leaves it out of fits along tokens.
    """

    name: str
    path: str
    tokens: float | None


@dataclass(frozen=True, slots=True)
class Point:
    """A draft at a batch size. tokens_a_round: mean acceptance length at the fixed length.  speedup: of the default planner, over
    plain decoding; fixed_speedup: of the fixed length. None where the outputs were refused."""

    draft: str
    parameters: int
    tokens: float | None
    batch: int
    tokens_a_round: float | None
    speedup: float | None
    fixed_speedup: float | None


@dataclass(frozen=True, slots=True)
class Fit:
    """A figure as intercept + sum of slope times axis. errors: standard errors of the slopes, None without spare points.

    axes: names of AXES, those that the points vary along.  r2: part of the variance that is explained.
    """

    figure: str
    axes: tuple[str, ...]
    intercept: float
    slopes: tuple[float, ...]
    errors: tuple[float | None, ...]
    r2: float
    points: int

    def at(self, point: Point) -> float | None:
        """The fitted figure; None where an axis of the point is unknown."""
        values = [_along(axis, point) for axis in self.axes]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        return self.intercept + sum(slope * value for slope, value in zip(self.slopes, known, strict=True))


def fit(points: Sequence[Point], figure: str) -> Fit | None:
    """Least squares over the points that have the figure, along the axes that vary; None where there are too few points."""
    known = [point for point in points if getattr(point, figure) is not None]
    axes = tuple(axis for axis in AXES if _varies(axis, known))
    used = [point for point in known if all(_along(axis, point) is not None for axis in axes)]
    axes = tuple(axis for axis in axes if _varies(axis, used))
    if not axes or len(used) <= len(axes):
        return None
    columns = np.asarray([[1.0, *(_along(axis, point) or 0.0 for axis in axes)] for point in used])
    if np.linalg.matrix_rank(columns) < columns.shape[1]:
        return None
    found = np.asarray([getattr(point, figure) for point in used])
    solved = np.linalg.lstsq(columns, found, rcond=None)[0]
    left = float(((found - columns @ solved) ** 2).sum())
    whole = float(((found - found.mean()) ** 2).sum())
    spare = len(used) - columns.shape[1]
    errors: list[float | None] = [None] * len(axes)
    if spare:
        errors = [float(e) for e in np.sqrt(np.diag(np.linalg.inv(columns.T @ columns)) * left / spare)[1:]]
    slopes = tuple(float(value) for value in solved[1:])
    return Fit(figure, axes, float(solved[0]), slopes, tuple(errors), 1 - left / whole if whole else 1.0, len(used))


def _along(axis: str, point: Point) -> float | None:
    value = getattr(point, axis)
    if value is None:
        return None
    return math.log2(value) if axis == "batch" else math.log10(value)


def _varies(axis: str, points: Sequence[Point]) -> bool:
    return len({getattr(point, axis) for point in points} - {None}) > 1


def methods_of(target: Any, drafts: Sequence[DraftOf], drafted: int) -> tuple[tuple[Method, ...], dict[str, int]]:
    """The bases, each draft at a fixed length and by the default planner, and each draft's parameters.

    Raises SpecDecError for a draft that does not fit the target.
    """
    found: list[Method] = list(make_methods(target, (), Selection(static=False)))
    parameters = {}
    for draft in drafts:
        model = AutoModelForCausalLM.from_pretrained(checkpoint(draft.path, "draft"), dtype=target.dtype).eval()
        source = f"{BUNDLED}:draft" if draft.path == BUNDLED else draft.path
        parameters[draft.name] = sum(weight.numel() for weight in model.parameters())
        for kind, planner in ((FIXED, drafted), (DEFAULT, None)):
            generator = SpeculativeGenerator(target, DraftModelDrafter(model), planner=planner)
            info = MethodInfo(f"{draft.name}, {kind}", "drafter", "a draft of the study", source, str(planner or "default"))
            found.append(Ours(generator, info))
    return tuple(found), parameters


def points_of(results: Results, drafts: Sequence[DraftOf], parameters: dict[str, int]) -> tuple[Point, ...]:
    """The study's points from a run of `methods_of`."""
    found = []
    for batch in results.settings.batches:
        for draft in drafts:
            fixed, default = (results.row(f"{draft.name}, {kind}", batch, 0.0) for kind in (FIXED, DEFAULT))
            speedups = [row.vs_plain.value if row is not None and row.vs_plain is not None else None for row in (default, fixed)]
            length = None if fixed is None else fixed.acceptance_length
            found.append(Point(draft.name, parameters[draft.name], draft.tokens, batch, length, *speedups))
    return tuple(found)


def sentence(own: Fit) -> str:
    """A fit in words."""
    told = []
    for axis, slope, error in zip(own.axes, own.slopes, own.errors, strict=True):
        spread = "" if error is None else f" ± {error:.3f}"
        told.append(f"{slope:+.3f}{spread} for each {'doubling' if axis == 'batch' else 'tenfold'} of {axis}")
    return f"{FIGURES[own.figure]}: {', '.join(told)} (R² {own.r2:.3f}, {own.points} points)"


def charts(points: Sequence[Point], fits: Sequence[Fit]) -> str:
    """Each figure along each axis that varies, one line for what shares the other axes, and the fit beside it."""
    parts = []
    for name, words in FIGURES.items():
        law = next((own for own in fits if own.figure == name), None)
        for axis in AXES:
            if _varies(axis, points):
                title = f"{words.capitalize()} against {axis}"
                own = _series(points, name, axis, law)
                parts.append(figure(title, lines(title, own, x=_unit(axis), y=words, digits=2)) if own else "")
    return f'<div class="grid2 wide">{"".join(parts)}</div>'


def _unit(axis: str) -> str:
    return {"parameters": "million parameters", "tokens": "million training tokens", "batch": "batch"}[axis]


def _series(points: Sequence[Point], name: str, axis: str, law: Fit | None) -> list[Line]:
    others = [other for other in AXES if other != axis]
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        if getattr(point, axis) is not None:
            groups.setdefault(tuple(getattr(point, other) for other in others), []).append(point)
    scale = 1.0 if axis == "batch" else 1e-6
    found = []
    for colour, (key, own) in enumerate(sorted(groups.items(), key=lambda item: tuple(v or 0 for v in item[0]))):
        own.sort(key=lambda point: float(getattr(point, axis)))
        label = ", ".join(_said(other, value) for other, value in zip(others, key, strict=True))
        values: tuple[tuple[str, Callable[[Point], float | None]], ...] = ((label, lambda p: getattr(p, name)),)
        if law is not None and axis in law.axes:
            values += ((f"{label}: fit", law.at),)
        for text, value in values:
            line = tuple((scale * float(getattr(point, axis)), told) for point in own if (told := value(point)) is not None)
            if len(line) > 1:
                found.append(Line(text, line, colour if value is not getattr(law, "at", None) else colour + 4))
    return found


def _said(axis: str, value: float | None) -> str:
    if value is None:
        return "unknown tokens"
    return f"batch {value:g}" if axis == "batch" else f"{value / 1e6:.3g} M {axis}"


_HEADINGS = ("draft", "parameters", "training tokens", "batch", "tokens a round", "default planner", "fixed length")


def _rows(points: Sequence[Point]) -> list[list[str]]:
    def told(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    return [
        [
            p.draft,
            f"{p.parameters:,}",
            "" if p.tokens is None else f"{p.tokens:,.0f}",
            str(p.batch),
            told(p.tokens_a_round),
            told(p.speedup),
            told(p.fixed_speedup),
        ]
        for p in points
    ]


def write_study(folder: Path, results: Results, points: Sequence[Point]) -> tuple[Fit, ...]:
    """results.json, scaling.json, scaling.md and scaling.html."""
    fits = tuple(own for own in (fit(points, name) for name in FIGURES) if own is not None)
    said = [sentence(own) for own in fits] or ["there are too few points for a fit: two of an axis at least, and one to spare"]
    write_results(results, folder / "results.json")
    study = {"points": [asdict(p) for p in points], "fits": [asdict(f) for f in fits]}
    (folder / "scaling.json").write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
    machine = results.machine
    where = f"{machine.gpu or machine.cpu}, {machine.threads} threads, torch {machine.torch}, specdec {machine.commit}; "
    where += f"{results.settings.dtype}, {results.settings.max_new_tokens} new tokens. {machine.command}"
    text = ["# Speedup against draft size, training tokens and batch", table(_HEADINGS, _rows(points)), *said, where]
    (folder / "scaling.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    body = "<h1>Speedup against draft size, training tokens and batch</h1>" + "".join(f"<p>{escape(line)}</p>" for line in said)
    body += charts(points, fits) + html_table("All points", _HEADINGS, _rows(points)) + f'<p class="muted">{escape(where)}</p>'
    (folder / "scaling.html").write_text(document("specdec scaling study", body), encoding="utf-8")
    return fits


def draft_of(text: str) -> DraftOf:
    """NAME=PATH@TOKENS or NAME=PATH, or "bundled" for a PATH. Raises SpecDecError."""
    name, named, rest = text.partition("=")
    path, _, tokens = rest.rpartition("@") if "@" in rest else (rest, "", "")
    try:
        count = float(tokens) if tokens else None
    except ValueError:
        count = -1.0
    if not (name and named and path) or (count is not None and not (count > 0 and math.isfinite(count))):
        raise SpecDecError(f"--draft {text}: write NAME=PATH@TOKENS, or NAME=PATH where the training tokens are unknown")
    return DraftOf(name, path, count)


def main(
    out: Annotated[Path, typer.Option(help="a folder; a second call goes on with what is there")],
    draft: Annotated[list[str], typer.Option(help="NAME=PATH@TOKENS; may be repeated; PATH may be 'bundled'")],
    target: Annotated[str, typer.Option(help="checkpoint folder; the bundled one by default")] = BUNDLED,
    batch: Annotated[list[int] | None, typer.Option(help="may be repeated; 1 by default")] = None,
    drafted: Annotated[int, typer.Option(help="tokens a round of the fixed length")] = 3,
    new: Annotated[int, typer.Option(help="new tokens of a prompt")] = 64,
    repeats: Annotated[int, typer.Option(help="runs of each method on each prompt")] = 3,
    prompts: Annotated[list[Path] | None, typer.Option(help=".jsonl or .tsv; five built-in ones by default")] = None,
    per_task: Annotated[int | None, typer.Option(help="most prompts of a task, with --prompts")] = None,
    dtype: Annotated[str | None, typer.Option(help="by default the checkpoint's")] = None,
) -> None:
    """Measure, fit and draw."""
    drafts = [draft_of(text) for text in draft]
    if len({own.name for own in drafts}) < len(drafts):
        raise SpecDecError("two drafts have one name; give each its own")
    path, console = checkpoint(target, "target"), Console()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto").eval()
    methods, parameters = methods_of(model, drafts, drafted)
    choice = Choice(tuple(prompts), per_task=per_task) if prompts else QUICK
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    asked = load_prompts(choice, AutoTokenizer.from_pretrained(path), positions, new)
    precision = str(model.dtype).removeprefix("torch.")
    settings = Settings(target, precision, tuple(batch or (1,)), (0.0,), new, repeats, 0)
    here = this_machine(shlex.join(["python", "-P", "-m", "specdec.bench.scaling", *sys.argv[1:]]))
    out.mkdir(parents=True, exist_ok=True)
    store = out / "trials.jsonl"
    results = run_suite(model, methods, asked, settings, here, store=store, resume=store.exists(), console=console)
    points = points_of(results, drafts, parameters)
    for own in write_study(out, results, points):
        console.print(sentence(own), highlight=False)
    console.print(f"in {out}: scaling.html, scaling.md, scaling.json, results.json", highlight=False)


if __name__ == "__main__":
    typer.run(main)
