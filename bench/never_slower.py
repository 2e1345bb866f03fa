"""Is the goodput planner ever slower than plain decoding? `python -P -m specdec.bench.never_slower`.

A grid of batch sizes, drafters from good to adversarial, temperatures and kinds of text. In every cell a fresh planner, plain
decoding and every fixed length decode the same prompts side by side, 16 tokens each in turn, until the 95 % interval of planner
to plain decoding is narrow, or above 0.97; the fixed lengths in the first eight turns, and those that cannot be the best in fewer.
Everything that a planner does counts, its first rounds and its trials included. Output must equal plain decoding; where it does
not under greedy decoding, the gap of the logits is compared with rounding in a few texts. `record` notes times and accepted drafts
for `replay`, which plays the grid without noise, or with that of made-up hosts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from specdec import FixedPlanner, GoodputPlanner, SpeculativeGenerator, bundled_path
from specdec.bench.grid_cell import METHODS, OURS, PLAIN, Cell, losers, verdict
from specdec.bench.lockstep import Lockstep
from specdec.bench.machine import machine
from specdec.bench.margin import explain
from specdec.bench.noise import Busy
from specdec.bench.opponents import KINDS, Watched, opponent
from specdec.bench.replay import LENGTHS, Machine, Recording, Times, played
from specdec.bench.speed import Prompt, load_prompts
from specdec.bench.timing import set_loaded_aside
from specdec.types import Budget, Draft, Load, RoundStats

BATCHES, TEMPERATURES, WORKLOADS = (1, 4, 16), (0.0, 1.0), ("dialogue", "code", "docs")
_DEPTH = max(LENGTHS)
# Texts that differ from plain decoding's, of which so many of a cell are looked at: each takes a forward a token.
_EXPLAINED = 3
# Tokens that a process decodes before a cell.
_WARM = 16

app = typer.Typer(add_completion=False)
Files = Annotated[
    list[Path] | None, typer.Option("--prompts", help="JSONL with the groups dialogue, code and docs [default: built-in]")
]


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
    """The bundled target, its drafters, and prompts by kind of text."""

    def __init__(self, prompts: Sequence[Path] | None, new: int) -> None:
        """prompts: files; by default those that ship for the grid.  new: tokens to generate for each."""
        self.target: Any = AutoModelForCausalLM.from_pretrained(bundled_path("target")).eval()
        self.target.generation_config.eos_token_id, self.target.generation_config.pad_token_id = None, 0
        self._drafters: dict[str, Any] = {}
        tokenizer, self.new = AutoTokenizer.from_pretrained(bundled_path("target")), new
        paths = list(prompts or []) or [Path(str(files("specdec.bench").joinpath("grid_prompts.jsonl")))]
        found: list[Prompt] = [prompt for path in paths for prompt in load_prompts(path, tokenizer, None, 192)[0]]
        self.prompts = {name: [p.ids for p in found if p.group == name] for name in WORKLOADS}

    def drafter(self, kind: str) -> Any:
        """One of KINDS, loaded when it is first asked for."""
        if kind not in self._drafters:
            self._drafters[kind] = opponent(kind, self.target.dtype)
        return self._drafters[kind]

    def batch(self, workload: str, size: int, turn: int) -> list[tuple[int, ...]]:
        """The prompts of a turn."""
        own = self.prompts[workload]
        return [own[(turn * size + i) % len(own)] for i in range(size)]

    def run(
        self,
        generator: SpeculativeGenerator,
        prompts: Sequence[tuple[int, ...]],
        temperature: float,
        streamer: BaseStreamer | None = None,
        new: int | None = None,
    ) -> list[list[int]]:
        """New tokens of each. new: how many, other than the bench's own number."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        how: dict[str, Any] = (
            {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_k": 0}
        )
        out = generator.generate(ids, attention_mask=mask, max_new_tokens=new or self.new, seed=1, streamer=streamer, **how)
        return [row[width:] for row in out.tolist()]

    def generator(self, kind: str, method: str) -> SpeculativeGenerator:
        """One of METHODS, with a fresh planner."""
        if method == PLAIN:
            return SpeculativeGenerator(self.target, None)
        length = METHODS[method]
        planner: Any = Timed(GoodputPlanner()) if length is None else FixedPlanner(nodes=length, depth=length)
        return SpeculativeGenerator(self.target, self.drafter(kind), planner=planner)


@dataclass(frozen=True, slots=True)
class _Job:
    """A method's part of a turn. prompts: None to get ready for a cell: a warm process, and a fresh generator and planner."""

    method: str
    kind: str
    temperature: float
    prompts: tuple[tuple[int, ...], ...] | None = None


class _Worker:
    """Decodes in one method's process. generator: of the cell that the last job without prompts was of."""

    generator: SpeculativeGenerator

    def __init__(self, prompts: Sequence[Path] | None, new: int) -> None:
        """See `Bench`."""
        self.bench = Bench(prompts, new)

    def __call__(self, job: _Job, streamer: BaseStreamer) -> Any:
        """New tokens of each; of a planner that is timed, also what the rounds did and the seconds of its own so far."""
        if job.prompts is None:
            warm = self.bench.generator(job.kind, PLAIN)
            self.bench.run(warm, self.bench.batch(WORKLOADS[0], 1, 0), job.temperature, new=_WARM)
            # What sizes take to get ready is paid by every method, plain decoding too.
            self.generator = self.bench.generator(job.kind, job.method)
            set_loaded_aside()
            return None
        said = self.bench.run(self.generator, job.prompts, job.temperature, streamer)
        planner = self.generator.engine.planner
        return (said, self.generator.stats, planner.own_s) if isinstance(planner, Timed) else (said,)


def _measured(bench: Bench, side_by_side: Lockstep, batch: int, kind: str, temperature: float, workload: str) -> dict[str, Any]:
    """A cell: ratios with intervals, and how good the forecasts were."""
    side_by_side.run({method: _Job(method, kind, temperature) for method in METHODS})
    cell = Cell()
    while not cell.done:
        prompts = tuple(bench.batch(workload, batch, cell.turns))
        ran = side_by_side.run({method: _Job(method, kind, temperature, prompts) for method in cell.methods}, losers)
        cell.add(ran)
        texts = zip(prompts, ran[OURS].result[0], ran[PLAIN].result[0], strict=True)
        other = [(prompt, ours, plain) for prompt, ours, plain in texts if ours != plain]
        # Sampled tokens are no argmax, whose gap could be looked at.
        for prompt, ours, plain in other[: 0 if temperature else _EXPLAINED - cell.explained - cell.unexplained]:
            found = explain(bench.target, prompt, ours, plain)
            cell.explained += found is not None and found.within
            cell.unexplained += found is not None and not found.within
    return cell.report()


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
    with Lockstep(list(METHODS), partial(_Worker, prompts, max_new_tokens)) as side_by_side:
        for batch, kind, temperature, workload in track(keys, "cells", console=console):
            key = f"{batch}/{kind}/{temperature:g}/{workload}"
            if key in report["cells"]:
                continue
            own = report["cells"][key] = _measured(bench, side_by_side, batch, kind, temperature, workload)
            report["verdict"] = verdict(report["cells"])
            output.write_text(json.dumps(report, indent=1))
            told = f"{own['ratio'][0]:.3f} ({own['ratio'][1]:.3f}-{own['ratio'][2]:.3f}) in {own['turns']}"
            console.print(f"{key}: {told}; {own['share_of_best']:.3f} of {own['best_fixed']}")
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
            generator = SpeculativeGenerator(bench.target, bench.drafter("good"), planner=planner)
            bench.run(generator, bench.batch("dialogue", batch, turn), 0.0)
            assert generator.stats is not None
            for stats in generator.stats.history:
                if len(stats.requests) == batch and sum(stats.drafted) == batch * length:
                    target[length].append(stats.undrafted_s)
                    draft[length].append(stats.draft_s)
    return Times(batch, tuple(median(target[n]) for n in LENGTHS), tuple(median(draft[n]) for n in LENGTHS))


def _accepted(bench: Bench, kind: str, temperature: float, prompts: list[tuple[int, ...]]) -> tuple[str, ...]:
    """For every text, at each of its tokens, how many of the drafted ones are those that follow."""
    watched = Watched(bench.drafter(kind), _DEPTH)
    said = bench.run(SpeculativeGenerator(bench.target, watched, planner=1), prompts, temperature)
    return tuple(_agreed(tokens, len(prompt), own) for tokens, prompt, own in zip(said, prompts, watched.drafts, strict=True))


def _agreed(tokens: list[int], start: int, drafts: dict[int, list[int]]) -> str:
    """Nothing is drafted where only one token is left."""
    found = []
    for place in range(len(tokens)):
        drafted, follows = drafts.get(start + place, []), tokens[place:]
        agree = [a == b for a, b in zip(drafted, follows, strict=False)]
        found.append(str((*agree, False).index(False)))
    return "".join(found)


@app.command(name="replay")
def replayed(
    recording: Annotated[Path, typer.Argument(help="what `record` wrote")],
    output: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
    rounds: Annotated[int, typer.Option(help="plain rounds that a cell lasts for, at least")] = 1024,
    busy: Annotated[int, typer.Option(help="hosts that others use, made up, to play each cell on; 0 for one quiet host")] = 0,
) -> None:
    """Play the grid on what was recorded, a fresh planner for each cell, without noise or with one that is made up."""
    known, console = Recording.read(recording), Console()
    keys = list(product(BATCHES, known.texts))
    rows = {}
    for batch, key in track(keys, "cells", console=console):
        hosts: list[Machine] = [Busy(known, seed) for seed in range(busy)]
        rows[f"{batch}/{key}"] = played(known, key, batch, rounds, hosts)
    table = Table("cell", "over plain decoding", "best fixed length", "over that")
    for name, row in rows.items():
        table.add_row(name, f"{row['vs_plain']:.3f}", str(row["best_fixed"]), f"{row['vs_best_fixed']:.3f}")
    console.print(table)
    lowest, mean = min(row["vs_plain"] for row in rows.values()), sum(row["vs_best_fixed"] for row in rows.values()) / len(rows)
    console.print(f"least over plain decoding {lowest:.3f}; mean over the best fixed length {mean:.3f}")
    if output:
        whole = {"busy_hosts": busy, "least_vs_plain": lowest, "mean_vs_best_fixed": mean}
        output.write_text(json.dumps({"cells": rows, **whole}, indent=1))


if __name__ == "__main__":
    app()
