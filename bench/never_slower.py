"""Is the goodput planner ever slower than plain decoding? `python -P -m specdec.bench.never_slower`.

A grid of batch sizes, drafters from good to adversarial, temperatures and kinds of text. In every cell a fresh planner and plain
decoding take turns over the same prompts until the 95 % interval of their ratio is narrow, or clearly above 1; the first turns also
run every fixed length. Everything that a planner does counts, its first rounds and its trials included. Output must equal plain
decoding. `record` notes times and accepted drafts for `replay`, which plays the grid without noise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import exp, log, sqrt
from pathlib import Path
from statistics import fmean, median, stdev
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec import FixedPlanner, GoodputPlanner, SpeculativeGenerator, bundled_path
from specdec.bench.opponents import KINDS, Watched, opponent
from specdec.bench.replay import LENGTHS, Recording, Times, played
from specdec.bench.speed import Prompt, load_prompts, machine
from specdec.bench.statistics import t_quantile
from specdec.bench.timing import timed
from specdec.types import Budget, Draft, Load, RoundStats

BATCHES, TEMPERATURES, WORKLOADS = (1, 4, 16), (0.0, 1.0), ("dialogue", "code", "docs")
PLAIN, OURS = "plain", "goodput"
# Turns of a cell: at least, and at most; and those that every fixed length takes part in.
_FEWEST, _MOST, _SWEPT = 5, 16, 2
# How far from the median turn a turn counts, in the logarithm of its ratio.
_HIT = 0.3
# Turns after which a cell ends whose interval lies above 1: prompts differ in what they gain, and it is not slower.
_DECIDED = 6
_NARROW = 0.03
_DEPTH = max(LENGTHS)

app = typer.Typer(add_completion=False)
Files = Annotated[list[Path] | None, typer.Option("--prompts", help="JSONL with the groups dialogue, code and docs")]


class Timed:
    """A planner that says how long it took itself. own_s: seconds in all its calls."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.own_s, self.post_draw = inner, 0.0, False

    def plan(self, load: Load) -> Budget:
        """As the inner planner."""
        began = perf_counter()
        budget: Budget = self.inner.plan(load)
        self.own_s += perf_counter() - began
        return budget

    def select(self, draft: Draft) -> Draft:
        """As the inner planner."""
        return draft

    def observe(self, stats: RoundStats) -> None:
        """As the inner planner."""
        began = perf_counter()
        self.inner.observe(stats)
        self.own_s += perf_counter() - began


class Bench:
    """The bundled target and every drafter, and prompts by kind of text."""

    def __init__(self, prompts: Sequence[Path] | None, new: int) -> None:
        """prompts: files; by default those that ship.  new: tokens to generate for each."""
        self.target: Any = AutoModelForCausalLM.from_pretrained(bundled_path("target")).eval()
        self.target.generation_config.eos_token_id, self.target.generation_config.pad_token_id = None, 0
        self.drafters = {kind: opponent(kind, self.target.dtype) for kind in KINDS}
        tokenizer, self.new = AutoTokenizer.from_pretrained(bundled_path("target")), new
        paths: list[Path | None] = list(prompts or []) or [None]
        found: list[Prompt] = [prompt for path in paths for prompt in load_prompts(path, tokenizer, None, 192)[0]]
        self.prompts = {name: [p.ids for p in found if p.group == name] for name in WORKLOADS}

    def batch(self, workload: str, size: int, turn: int) -> list[tuple[int, ...]]:
        """The prompts of a turn."""
        own = self.prompts[workload]
        return [own[(turn * size + i) % len(own)] for i in range(size)]

    def run(self, generator: SpeculativeGenerator, prompts: Sequence[tuple[int, ...]], temperature: float) -> list[list[int]]:
        """New tokens of each."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        how: dict[str, Any] = (
            {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_k": 0}
        )
        out = generator.generate(ids, attention_mask=mask, max_new_tokens=self.new, seed=1, **how)
        return [row[width:] for row in out.tolist()]

    def generators(self, kind: str) -> dict[str, SpeculativeGenerator]:
        """Every method, with a fresh planner."""
        made = {PLAIN: SpeculativeGenerator(self.target, None)}
        made[OURS] = SpeculativeGenerator(self.target, self.drafters[kind], planner=Timed(GoodputPlanner()))
        for length in LENGTHS[1:]:
            planner = FixedPlanner(nodes=length, depth=length)
            made[f"fixed {length}"] = SpeculativeGenerator(self.target, self.drafters[kind], planner=planner)
        return made


def _measured(bench: Bench, batch: int, kind: str, temperature: float, workload: str) -> dict[str, Any]:
    """A cell: ratios with intervals, and how good the forecasts were."""
    made = bench.generators(kind)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    history, equal, interval = list[RoundStats](), 0, (0.0, 0.0, 0.0)
    stats: Any = None
    bench.run(made[PLAIN], bench.batch(workload, batch, 0), temperature)
    for turn in range(_MOST):
        prompts, said = bench.batch(workload, batch, turn), {}
        pair = [OURS, PLAIN] if turn % 2 else [PLAIN, OURS]
        for name in [*pair, *[n for n in made if n not in pair and turn < _SWEPT]]:
            said[name], took = timed(lambda name=name, prompts=prompts: bench.run(made[name], prompts, temperature))  # type: ignore[misc]
            seconds[name].append(took)
        equal += said[OURS] == said[PLAIN]
        stats = made[OURS].stats
        history += stats.history
        if turn + 1 < _FEWEST:
            continue
        interval = paired_ratio(seconds[PLAIN], seconds[OURS])
        if interval[2] - interval[1] <= 2 * _NARROW or (turn + 1 >= _DECIDED and interval[1] > 1.0):
            break
    planner: Any = made[OURS].engine.planner
    whole = replace(stats, history=tuple(history))
    return {
        "ratio": interval,
        "turns": len(seconds[OURS]),
        "seconds": {name: [round(own, 4) for own in took] for name, took in seconds.items()},
        "equal": equal,
        "fixed": {n: _against(seconds, n) for n in made if n.startswith("fixed")},
        "ours_when_swept": _against(seconds, OURS),
        "forecast_errors": whole.forecast_errors(),
        "own_share": planner.own_s / sum(s.draft_s + s.target_s + s.verify_s + s.other_s for s in history),
        "reasons": whole.reasons,
    }


def paired_ratio(plain: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """Plain seconds over ours, and its 95 % t interval: the mean of the logarithms of each turn's ratio.

    A turn that another load on the machine hit counts as _HIT away from the median turn: what starting costs is less than that.
    """
    logs = [log(a / b) for a, b in zip(plain, ours, strict=True)]
    middle = median(logs)
    kept = [min(max(own, middle - _HIT), middle + _HIT) for own in logs]
    half = t_quantile(0.975, len(kept) - 1) * stdev(kept) / sqrt(len(kept))
    return exp(fmean(kept)), exp(fmean(kept) - half), exp(fmean(kept) + half)


def _against(seconds: dict[str, list[float]], name: str) -> float:
    """Plain decoding's seconds over those of `name`, in the turns that all took part in."""
    return exp(fmean([log(a / b) for a, b in zip(seconds[PLAIN][:_SWEPT], seconds[name][:_SWEPT], strict=True)]))


def _verdict(cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the grid shows as a whole."""
    shares = [own["ours_when_swept"] / max(1.0, *own["fixed"].values()) for own in cells.values()]
    errors = [error for own in cells.values() for error in own["forecast_errors"]]
    return {
        "cells": len(cells),
        "wholly_below_0.97": [key for key, own in cells.items() if own["ratio"][2] < 0.97],
        "not_narrow": [key for key, own in cells.items() if own["ratio"][2] - own["ratio"][1] > 2 * _NARROW],
        "not_equal": [key for key, own in cells.items() if own["equal"] < own["turns"]],
        "mean_share_of_best_fixed": sum(shares) / len(shares),
        "forecasts_within_10_percent": sum(abs(e) <= 0.1 for e in errors) / len(errors) if errors else None,
        "median_own_share": median(own["own_share"] for own in cells.values()),
        "largest_own_share": max(own["own_share"] for own in cells.values()),
    }


@app.command()
def live(
    output: Annotated[Path, typer.Option(help="JSON; a cell that it holds is not measured again")],
    prompts: Files = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to generate for each prompt")] = 128,
    only: Annotated[str, typer.Option(help="measure cells whose name holds this")] = "",
) -> None:
    """Measure the grid; interrupt and go on as you like."""
    bench, console = Bench(prompts, max_new_tokens), Console()
    report = json.loads(output.read_text()) if output.exists() else {"machine": machine(), "cells": {}}
    keys = [(b, k, t, w) for w, t, b, k in product(WORKLOADS, TEMPERATURES, BATCHES, KINDS) if only in f"{b}/{k}/{t:g}/{w}"]
    for batch, kind, temperature, workload in track(keys, "cells", console=console):
        key = f"{batch}/{kind}/{temperature:g}/{workload}"
        if key in report["cells"]:
            continue
        own = report["cells"][key] = _measured(bench, batch, kind, temperature, workload)
        report["verdict"] = _verdict(report["cells"])
        output.write_text(json.dumps(report, indent=1))
        console.print(f"{key}: {own['ratio'][0]:.3f} ({own['ratio'][1]:.3f}-{own['ratio'][2]:.3f}) in {own['turns']}")
    console.print_json(data=report["verdict"])


@app.command()
def record(
    output: Annotated[Path, typer.Option(help="JSON for `replay`")],
    prompts: Files = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to generate for each prompt")] = 128,
    texts: Annotated[int, typer.Option(help="texts of each kind")] = 16,
) -> None:
    """Note what rounds take here, and what is accepted at every token."""
    bench = Bench(prompts, max_new_tokens)
    times = tuple(_times(bench, batch) for batch in track(BATCHES, "times"))
    noted = {}
    for kind, temperature, workload in track(list(product(KINDS, TEMPERATURES, WORKLOADS)), "texts"):
        noted[f"{kind}/{temperature:g}/{workload}"] = _accepted(bench, kind, temperature, bench.batch(workload, texts, 0))
    Recording(times, noted).write(output)


def _times(bench: Bench, batch: int) -> Times:
    """Medians over rounds of every fixed length, interleaved."""
    target: dict[int, list[float]] = {length: [] for length in LENGTHS}
    draft: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for turn in range(3):
        for length in LENGTHS:
            planner = FixedPlanner(nodes=length, depth=max(length, 1))
            generator = SpeculativeGenerator(bench.target, bench.drafters["good"], planner=planner)
            bench.run(generator, bench.batch("dialogue", batch, turn), 0.0)
            assert generator.stats is not None
            for stats in generator.stats.history:
                if len(stats.requests) == batch and sum(stats.drafted) == batch * length:
                    target[length].append(stats.target_s + stats.verify_s + stats.other_s)
                    draft[length].append(stats.draft_s)
    return Times(batch, tuple(median(target[n]) for n in LENGTHS), tuple(median(draft[n]) for n in LENGTHS))


def _accepted(bench: Bench, kind: str, temperature: float, prompts: list[tuple[int, ...]]) -> tuple[str, ...]:
    """For every text, at each of its tokens, how many of the drafted ones are those that follow."""
    watched = Watched(bench.drafters[kind], _DEPTH)
    said = bench.run(SpeculativeGenerator(bench.target, watched), prompts, temperature)
    return tuple(_agreed(tokens, len(prompt), own) for tokens, prompt, own in zip(said, prompts, watched.drafts, strict=True))


def _agreed(tokens: list[int], start: int, drafts: dict[int, list[int]]) -> str:
    found = []
    for place in range(len(tokens)):
        drafted, follows = drafts[start + place], tokens[place:]
        agree = [a == b for a, b in zip(drafted, follows, strict=False)]
        found.append(str((*agree, False).index(False)))
    return "".join(found)


@app.command(name="replay")
def replayed(
    recording: Annotated[Path, typer.Argument(help="what `record` wrote")],
    output: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
    rounds: Annotated[int, typer.Option(help="plain rounds that a cell lasts for, at least")] = 1024,
) -> None:
    """Play the grid without noise, a fresh planner for each cell."""
    known, console = Recording.read(recording), Console()
    rows = {f"{batch}/{key}": played(known, key, batch, rounds) for batch, key in product(BATCHES, known.texts)}
    table = Table("cell", "over plain decoding", "best fixed length", "over that")
    for name, row in rows.items():
        table.add_row(name, f"{row['vs_plain']:.3f}", str(row["best_fixed"]), f"{row['vs_best_fixed']:.3f}")
    console.print(table)
    lowest, mean = min(row["vs_plain"] for row in rows.values()), sum(row["vs_best_fixed"] for row in rows.values()) / len(rows)
    console.print(f"least over plain decoding {lowest:.3f}; mean over the best fixed length {mean:.3f}")
    if output:
        output.write_text(json.dumps({"cells": rows, "least_vs_plain": lowest, "mean_vs_best_fixed": mean}, indent=1))


if __name__ == "__main__":
    app()
