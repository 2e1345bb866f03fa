"""Does `specdec bench compare --against` tell right? The same program against itself, and against itself made slower.

`python -P -m specdec.bench.aa --out aa.jsonl`. Every comparison starts its processes anew. A verdict is kept as soon as it is
there; a second call goes on where the first ended.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import time
from typing import Annotated, Any

import typer
from transformers import AutoTokenizer

from specdec.bench.against import Judged, Plan, Side, run_against, working_tree
from specdec.bench.compare import whole
from specdec.bench.workloads import QUICK, load_prompts
from specdec.bundled import bundled_path
from specdec.errors import SpecDecError

SAME, SLOWED = "same", "slowed"
_RIGHT = {SAME: "no difference", SLOWED: "slower"}


@dataclass(frozen=True, slots=True)
class Trial:
    """One comparison. kind: what was compared.  number: of the comparison, from 0."""

    kind: str
    number: int
    verdict: str
    took_s: float
    methods: tuple[dict[str, Any], ...]


def main(
    out: Annotated[Path, typer.Option(help="JSONL file, one comparison a line")],
    runs: Annotated[int, typer.Option(help="comparisons of each kind")] = 20,
    seconds: Annotated[float, typer.Option(help="of measuring, in one comparison")] = 60.0,
    slow: Annotated[float, typer.Option(help="the planted slowdown, as a part of the time")] = 0.05,
    starts: Annotated[int, typer.Option(help="how often a comparison starts its processes")] = 2,
    new: Annotated[int, typer.Option(help="tokens of a piece")] = 24,
    drafter: Annotated[str, typer.Option(help="draft, medusa, pard, or none for plain decoding")] = "draft",
    planner: Annotated[str | None, typer.Option(help="by default the package's own default")] = None,
    threads: Annotated[int, typer.Option(help="with several, any other work on the machine stalls them all")] = 1,
) -> None:
    """Run what is missing and say how many verdicts were right."""
    target = bundled_path("target")
    prompts = load_prompts(QUICK, AutoTokenizer.from_pretrained(target), None, new).prompts
    methods: dict[str, str | None] = {"plain": None} if drafter == "none" else {drafter: f"bundled:{drafter}"}
    ids = tuple(prompt.ids for prompt in prompts)
    plan = Plan(str(target), methods, ids, new, seconds, starts, planner=planner, threads=threads)
    # The file may be shown to others: it says what was run, not where that lies here.
    header = {"plan": {**asdict(plan), "target": target.name, "prompts": len(ids)}, "slow": slow}
    trials, root = read_trials(out, header), working_tree()
    known = {(own.kind, own.number) for own in trials}
    for kind, number in ((kind, number) for number in range(runs) for kind in (SAME, SLOWED)):
        if (kind, number) in known:
            continue
        began = time()
        sides = Side("one", root), Side("other", root, slow if kind == SLOWED else 0.0)
        trials.append(_trial(kind, number, run_against(*sides, plan), time() - began))
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(trials[-1])) + "\n")
        print(said(trials), flush=True)
    print(said(trials))


def _trial(kind: str, number: int, found: Sequence[Judged], took_s: float) -> Trial:
    return Trial(kind, number, whole([own.verdict for own in found]), took_s, tuple(map(asdict, found)))


def said(trials: Sequence[Trial]) -> str:
    """How many verdicts were right, and the ratios that were measured."""
    parts = []
    for kind, right in _RIGHT.items():
        own = [trial for trial in trials if trial.kind == kind]
        ratios = [m["ratio"]["value"] for trial in own for m in trial.methods if m["ratio"]]
        span = f", ratios {min(ratios):.3f} to {max(ratios):.3f}" if ratios else ""
        parts.append(f"{kind}: {sum(trial.verdict == right for trial in own)} of {len(own)} say {right!r}{span}")
    return "; ".join(parts)


def read_trials(path: Path, header: dict[str, Any]) -> list[Trial]:
    """What an earlier call kept; a new file gets the header. Raises SpecDecError for a file of other options."""
    if not path.exists() or not path.stat().st_size:
        path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return []
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    if json.loads(first) != json.loads(json.dumps(header)):
        raise SpecDecError(f"{path} is of other options; name another --out, or give the same ones")
    found = [json.loads(line) for line in lines]
    return [Trial(**{**own, "methods": tuple(own["methods"])}) for own in found]


if __name__ == "__main__":
    typer.run(main)
