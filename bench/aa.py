"""Does `specdec bench compare --against` tell right? The same program against itself, and against itself made slower.

    python -m specdec.bench.aa --out aa.jsonl [--runs 20] [--seconds 60] [--slow 0.05]

Every comparison starts its processes anew. A verdict is kept as soon as it is there; a second call goes on where the first ended.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import time
from typing import Any

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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and say how many verdicts were right."""
    options = _parser().parse_args(arguments)
    plan, root = _plan(options), working_tree()
    header = {"plan": {**asdict(plan), "prompts": len(plan.prompts)}, "slow": options.slow}
    trials = read_trials(options.out, header)
    for number in range(options.runs):
        for kind in (SAME, SLOWED):
            if any((own.kind, own.number) == (kind, number) for own in trials):
                continue
            began = time()
            sides = Side("one", root), Side("other", root, options.slow if kind == SLOWED else 0.0)
            trial = _trial(kind, number, run_against(*sides, plan), time() - began)
            trials.append(trial)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(trial)) + "\n")
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


def _plan(options: argparse.Namespace) -> Plan:
    target = bundled_path("target")
    prompts = load_prompts(QUICK, AutoTokenizer.from_pretrained(target), None, options.new).prompts
    return Plan(
        target=str(target),
        methods={"plain": None} if options.drafter == "none" else {options.drafter: f"bundled:{options.drafter}"},
        prompts=tuple(prompt.ids for prompt in prompts),
        new=options.new,
        seconds=options.seconds,
        starts=options.starts,
        planner=options.planner,
        threads=options.threads,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m specdec.bench.aa", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file, one comparison a line")
    parser.add_argument("--runs", type=int, default=20, help="comparisons of each kind")
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring, in one comparison")
    parser.add_argument("--slow", type=float, default=0.05, help="the planted slowdown, as a part of the time")
    parser.add_argument("--starts", type=int, default=2, help="how often a comparison starts its processes")
    parser.add_argument("--new", type=int, default=24, help="tokens of a piece")
    parser.add_argument("--drafter", default="draft", help="draft, medusa, pard, or none for plain decoding")
    parser.add_argument("--planner", help="by default the package's own default")
    parser.add_argument("--threads", type=int, default=1, help="with several, any other work on the machine stalls them all")
    return parser


if __name__ == "__main__":
    main()
