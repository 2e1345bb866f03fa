"""A report of training runs: their curves side by side, where they ended, and the commands that made them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from specdec.errors import SpecDecError
from specdec.training.settings import SAVED_AS

# Of a log line, what is no acceptance by head or position.
_NO_SLOT = frozenset({"kind", "step", "loss", "tokens_per_s", "rate", "acceptance_length", "acceptance_rate"})
Points = list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class RunLog:
    """One run as its folder tells it. train, held_out: lines of its log, steps ascending."""

    name: str
    kind: str
    command: tuple[str, ...]
    train: tuple[dict[str, Any], ...]
    held_out: tuple[dict[str, Any], ...]

    def losses(self) -> Points:
        """Of the training data, by step."""
        return [(line["step"], line["loss"]) for line in self.train]

    def accepted(self) -> Points:
        """The mean over heads or positions of how often the draft was right, by step."""
        return [(line["step"], sum(slots_of(line).values()) / max(len(slots_of(line)), 1)) for line in self.train]

    def lengths(self) -> Points:
        """Tokens a round of the real decoder on held-out prompts, by step."""
        return [(line["step"], line["acceptance_length"]) for line in self.held_out if "acceptance_length" in line]


# Letters in a line of the legend.
_LEGEND = 150
_PANELS = (
    ("loss, training", RunLog.losses),
    ("share right, training", RunLog.accepted),
    ("tokens a round, held out", RunLog.lengths),
)


def slots_of(line: dict[str, Any]) -> dict[str, float]:
    """Of a log line, the acceptance by head or position."""
    return {name: value for name, value in line.items() if name not in _NO_SLOT}


def read_run(folder: str | Path) -> RunLog:
    """A run's log and settings; of a step that was logged again after a stop, the last line counts.

    Raises SpecDecError for a folder that is no run's.
    """
    place = Path(folder).expanduser()
    try:
        settings = json.loads((place / SAVED_AS).read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (place / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        by_step = {kind: {line["step"]: line for line in lines if line["kind"] == kind} for kind in ("train", "held_out")}
        train, held_out = (tuple(found[step] for step in sorted(found)) for found in by_step.values())
        return RunLog(place.name, settings["kind"], tuple(settings["command"]), train, held_out)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecDecError(f"{place} is not a run's folder ({error!r}); give what --run.output named") from error


def write_report(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write report.md and curves.svg into `out`; returns the former. Raises SpecDecError where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise SpecDecError("a report's curves need matplotlib; install specdec-toolkit[plots]")
    runs = [read_run(folder) for folder in folders]
    place = Path(out).expanduser()
    place.mkdir(parents=True, exist_ok=True)
    _draw(runs, place / "curves.svg")
    page = place / "report.md"
    page.write_text(_page(runs), encoding="utf-8")
    return page


def _draw(runs: Sequence[RunLog], path: Path) -> None:
    """Three panels, a line a run."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Text as text, and no date or random ids: the same runs give the same file.
    with rc_context({"svg.hashsalt": "specdec", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        for axes, (title, points_of) in zip(figure.subplots(1, 3), _PANELS, strict=True):
            for run in runs:
                points = points_of(run)
                axes.plot(
                    *zip(*points, strict=True) if points else ([], []), label=run.name, marker="." if len(points) < 20 else ""
                )
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        columns = max(1, min(len(runs), _LEGEND // max(len(run.name) + 6 for run in runs)))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
        figure.savefig(path, metadata={"Date": None})


def _page(runs: Sequence[RunLog]) -> str:
    rows = ["| run | steps | held-out loss | right, by head or position | tokens a round | tokens/s |"]
    rows += ["|---|---:|---:|---|---:|---:|", *map(_row, runs)]
    commands = [f"**{run.name}**\n\n```sh\n{shlex.join(run.command)}\n```\n" for run in runs]
    return "\n".join(["# Training runs", "", *rows, "", "![curves](curves.svg)", "", "## Commands", "", *commands])


def _row(run: RunLog) -> str:
    last = run.held_out[-1] if run.held_out else {}
    slots = " ".join(f"{value:.2f}" for value in slots_of(last).values()) or "not measured"
    speeds = sorted(line["tokens_per_s"] for line in run.train)
    length = f"{last['acceptance_length']:.2f}" if "acceptance_length" in last else "not measured"
    loss = f"{last['loss']:.3f}" if last else "not measured"
    steps = run.train[-1]["step"] if run.train else 0
    return f"| {run.name} | {steps:,} | {loss} | {slots} | {length} | {speeds[len(speeds) // 2] if speeds else 0:,.0f} |"
