"""`specdec demo`: real prompts, plain and speculative side by side, timed in one interleaved run."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from specdec.bench.margin import explain
from specdec.bench.speed import Prompt, load_prompts
from specdec.bench.timing import timed
from specdec.bundled import bundled_path
from specdec.drafters.base import Drafter
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.registry import load_drafter
from specdec.generator import SpeculativeGenerator
from specdec.loading import load_model, need_tokenizer
from specdec.planner import planner_of

HF, PLAIN, MODEL, LOOKUP, MEDUSA, PARD = "model.generate", "plain decoding", "draft model", "suffix lookup", "Medusa heads", "PARD"
# One prompt of each kind from the built-in file: dialogue, story, maths, code, docs, and text that repeats itself.
_SHOWN = (0, 6, 10, 13, 16, 21)


@dataclass(frozen=True, slots=True)
class _Run:
    tokens: list[int]
    seconds: float
    stats: Any


Method = Callable[[Prompt], _Run]


def run_demo(target_path: str | None, draft_path: str | None, new: int, nodes: int | None, quick: bool, console: Console) -> None:
    """Show the demo; the figures are medians of interleaved repeats after a warm-up. nodes: None lets the planner decide."""
    target = load_model(target_path or str(bundled_path("target")), dtype=None, device=None)
    draft = load_model(draft_path or str(bundled_path("draft")), dtype=None, device=None)
    tokenizer = need_tokenizer(target_path or str(bundled_path("target")))
    prompts = [load_prompts(None, tokenizer, None, 384)[0][i] for i in (_SHOWN[:2] if quick else _SHOWN)]
    methods = _methods(target, _drafters(target, draft, bundled=target_path is None), new, nodes)
    runs = _measure(methods, prompts, 1 if quick else 3, console)
    for i, prompt in enumerate(prompts):
        _show_prompt(console, tokenizer, prompt, {name: runs[name][i] for name in methods})
    _show_table(console, target, prompts, runs)


def _drafters(target: Any, draft: Any, *, bundled: bool) -> dict[str, Drafter | str | None]:
    """Every drafter by name; the heads and the PARD model were made for the bundled target and its vocabulary."""
    found: dict[str, Drafter | str | None] = {PLAIN: None, MODEL: DraftModelDrafter(draft), LOOKUP: "suffix"}
    if bundled:
        found |= {MEDUSA: load_drafter(bundled_path("medusa"), target), PARD: load_drafter(bundled_path("pard"), target)}
    return found


def _methods(target: Any, drafters: dict[str, Drafter | str | None], new: int, nodes: int | None) -> dict[str, Method]:

    def ours(name: str) -> Method:
        generator = SpeculativeGenerator(target, drafters[name], planner=planner_of(nodes))

        def run(prompt: Prompt) -> _Run:
            tokens, seconds = timed(lambda: _decode(generator, target, prompt, new))
            return _Run(tokens, seconds, generator.stats)

        return run

    def theirs(prompt: Prompt) -> _Run:
        tokens, seconds = timed(lambda: _decode(target, target, prompt, new))
        return _Run(tokens, seconds, None)

    return {HF: theirs, **{name: ours(name) for name in drafters}}


def _decode(model: Any, target: Any, prompt: Prompt, new: int) -> list[int]:
    ids = torch.tensor([prompt.ids], device=target.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens


def _measure(methods: dict[str, Method], prompts: list[Prompt], repeats: int, console: Console) -> dict[str, list[_Run]]:
    """For every method and prompt the run of median time; methods alternate, the first pass is warm-up."""
    every: dict[str, list[list[_Run]]] = {name: [[] for _ in prompts] for name in methods}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("decoding", total=(repeats + 1) * len(prompts))
        for repeat in range(repeats + 1):
            for i, prompt in enumerate(prompts):
                for name, method in methods.items():
                    run = method(prompt)
                    if repeat:
                        every[name][i].append(run)
                progress.advance(task)
    middle = {name: [sorted(runs, key=lambda r: r.seconds)[len(runs) // 2] for runs in own] for name, own in every.items()}
    return middle


def _coloured(tokenizer: Any, run: _Run) -> Text:
    """The text, accepted draft tokens in green."""
    text, at = Text(), 0
    for accepted in [stats.accepted[0] for stats in run.stats.history]:
        text.append(tokenizer.decode(run.tokens[at : at + accepted]), style="bold green")
        text.append(tokenizer.decode(run.tokens[at + accepted : at + accepted + 1]))
        at += accepted + 1
    return text


def _show_prompt(console: Console, tokenizer: Any, prompt: Prompt, runs: dict[str, _Run]) -> None:
    console.rule(f"{prompt.group}")
    console.print(Text(tokenizer.decode(prompt.ids, skip_special_tokens=True).strip()[-300:], style="dim"))
    width = max(24, console.width // 3 - 2)
    panels = [Panel(Text(tokenizer.decode(runs[PLAIN].tokens)), title=PLAIN, width=width)]
    for name in [name for name in runs if name not in (HF, PLAIN)]:
        one = runs[name].stats.requests[0]
        panels.append(
            Panel(_coloured(tokenizer, runs[name]), title=f"{name}: {one.mean_acceptance_length:.2f} tokens a round", width=width)
        )
    console.print(Columns(panels))


def _rate(runs: list[_Run]) -> float:
    return sum(len(r.tokens) for r in runs) / sum(r.seconds for r in runs)


def _show_table(console: Console, target: Any, prompts: list[Prompt], runs: dict[str, list[_Run]]) -> None:
    table = Table(title=f"{target.dtype}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    headings = ("method", "tokens/s", "tokens a round", "accepted", "vs plain", "vs model.generate", "identical to plain")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, own in runs.items():
        lengths = [r.stats.requests[0] for r in own if r.stats]
        drafted = sum(one.drafted for one in lengths)
        same = [r.tokens == p.tokens for r, p in zip(own, runs[PLAIN], strict=True)]
        table.add_row(
            name,
            f"{_rate(own):.1f}",
            f"{statistics.fmean(one.mean_acceptance_length for one in lengths):.2f}" if lengths else "",
            f"{sum(one.accepted for one in lengths) / drafted:.0%}" if drafted else "",
            f"{_rate(own) / _rate(runs[PLAIN]):.2f}x",
            f"{_rate(own) / _rate(runs[HF]):.2f}x",
            "yes" if all(same) else f"{sum(same)} of {len(same)}",
        )
    console.print(table)
    ours = [name for name in runs if name not in (HF, PLAIN)]
    identical = all(r.tokens == p.tokens for name in ours for r, p in zip(runs[name], runs[PLAIN], strict=True))
    console.print(f"identical: {'yes' if identical else 'no'} (speculative against plain decoding, token for token)")
    _show_differences(console, target, prompts, runs)


def _show_differences(console: Console, target: Any, prompts: list[Prompt], runs: dict[str, list[_Run]]) -> None:
    """Where plain decoding and transformers round differently in half precision, and by how much."""
    for i, prompt in enumerate(prompts):
        found = explain(target, prompt.ids, runs[PLAIN][i].tokens, runs[HF][i].tokens)
        if found is not None:
            verdict = "within" if found.within else "BEYOND"
            console.print(
                f"prompt {i + 1}: differs from model.generate at token {found.place + 1}, where the two tokens' logits are "
                f"{found.gap:.3g} apart, {verdict} the rounding noise of {found.noise:.3g}"
            )
