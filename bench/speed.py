"""Speed of plain and speculative decoding at batch 1, greedy: `python -P -m specdec.bench.speed`.

Every prompt runs through every method before the next prompt, in rotating order, so that a machine that changes pace changes
it for all; the whole is repeated and each prompt counts by its median run. End-of-sequence is ignored, so that every method
makes the same number of tokens. Ratios are of tokens a second, with 95 % bootstrap intervals over prompts. Outputs are compared
first: ours with plain decoding on the same runtime token for token, and with `model.generate` by the margin of
`specdec.bench.margin`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec import FixedPlanner, RunnerOptions, SpeculativeGenerator
from specdec.bench.machine import machine
from specdec.bench.margin import explain
from specdec.bench.timing import Sample, medians, ratio_interval, rotation, timed
from specdec.bench.workloads import json_lines
from specdec.bundled import bundled_path
from specdec.drafters.draft_model import DraftModelDrafter

HF, PLAIN = "transformers generate", "plain"
# Plain decoding without what makes it say the same as speculative decoding in half precision; see docs/numerics.md.
FREE = "plain, rows not invariant"
ASSISTED = "transformers assisted "
# With the default planner, which goes on learning from prompt to prompt.
PLANNED = "planned"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as token ids, and the group that it is reported under."""

    group: str
    ids: tuple[int, ...]


Method = Callable[[Prompt], tuple[list[int], Any]]


def load_prompts(
    path: Path | None, tokenizer: Any, limit: int | None, longest: int, group: str | None = None
) -> tuple[list[Prompt], int]:
    """Prompts of a JSONL file and how many were left out for being longer than `longest` tokens; none is cut.

    A line holds "messages", or "text" or "prompt" (and "chat"), and "group" or "src"; else the file's name is the group.
    """
    text = path.read_text() if path else files("specdec.bench").joinpath("prompts.jsonl").read_text()
    prompts, skipped = [], 0
    for _, line in json_lines(text, str(path or "the built-in prompts")):
        text_of = line.get("text") or line.get("prompt")
        messages = line.get("messages") or [{"role": "user", "content": text_of}]
        if "messages" in line or line.get("chat"):
            asked = messages[: max(1, len(messages) - (messages[-1]["role"] == "assistant"))]
            ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            ids = tokenizer(text_of)["input_ids"]
        if len(ids) > longest:
            skipped += 1
            continue
        name = line.get("group") or (line["src"].split("/")[0] if "src" in line or path is None else path.stem)
        prompts.append(Prompt(name, tuple(ids)))
    return _spread([p for p in prompts if group in (None, p.group)], limit), skipped


def _of_each_group(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    """At most `limit` prompts of each group, evenly from it."""
    groups = dict.fromkeys(prompt.group for prompt in prompts)
    return [prompt for name in groups for prompt in _spread([p for p in prompts if p.group == name], limit)]


def _spread(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    """At most `limit` prompts, evenly from the whole file."""
    if limit is None or limit >= len(prompts):
        return prompts
    return [prompts[i * len(prompts) // limit] for i in range(limit)]


def _hf(target: Any, new: int, draft: Any = None, num_draft: int | None = None) -> Method:
    def run(prompt: Prompt) -> tuple[list[int], Any]:
        options: dict[str, Any] = {}
        if draft is not None:
            options["assistant_model"] = draft
            draft.generation_config.num_assistant_tokens = num_draft or 20
            draft.generation_config.num_assistant_tokens_schedule = "constant"
        ids = torch.tensor([prompt.ids], device=target.device)
        out = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **options)
        return out[0, ids.shape[1] :].tolist(), None

    return run


def _ours(generator: SpeculativeGenerator, new: int) -> Method:
    def run(prompt: Prompt) -> tuple[list[int], Any]:
        ids = torch.tensor([prompt.ids], device=generator.target.device)
        out = generator.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        return out[0, ids.shape[1] :].tolist(), generator.stats

    return run


def methods(target: Any, draft: Any, new: int, plans: list[int]) -> dict[str, Method]:
    """Every method by name; the first two are the bases of the ratios, beside the best of the assisted ones."""
    chosen: dict[str, Method] = {HF: _hf(target, new), PLAIN: _ours(SpeculativeGenerator(target), new)}
    chosen[FREE] = _ours(SpeculativeGenerator(target, options=RunnerOptions(row_invariant=False, pack="off")), new)
    for count in (2, 3, 5, None):
        chosen[f"{ASSISTED}{count or 'default'}"] = _hf(target, new, draft, count)
    for count in plans:
        planner = FixedPlanner(nodes=count, depth=count)
        chosen[f"draft model {count}"] = _ours(SpeculativeGenerator(target, DraftModelDrafter(draft), planner=planner), new)
    chosen[f"draft model, {PLANNED}"] = _ours(SpeculativeGenerator(target, DraftModelDrafter(draft)), new)
    for name, role in (("Medusa", "medusa"), ("PARD", "pard")):
        for count in plans:
            planner = FixedPlanner(nodes=count, depth=count)
            chosen[f"{name} {count}"] = _ours(SpeculativeGenerator(target, bundled_path(role), planner=planner), new)  # type: ignore[arg-type]
        chosen[f"{name}, {PLANNED}"] = _ours(SpeculativeGenerator(target, bundled_path(role)), new)  # type: ignore[arg-type]
    for name in ("prompt-lookup", "suffix"):
        chosen[name] = _ours(SpeculativeGenerator(target, name, planner=FixedPlanner(nodes=2, depth=2, width=2)), new)
    chosen[f"suffix, {PLANNED}"] = _ours(SpeculativeGenerator(target, "suffix"), new)
    return chosen


def _sample(name: str, index: int, prompt: Prompt, repeat: int, method: Method) -> Sample:
    (out, stats), seconds = timed(lambda: method(prompt))
    if stats is None:
        return Sample(name, index, prompt.group, len(out), seconds, len(out), 0.0, 0.0, tuple(out), repeat)
    round_s = sum(own.total_s for own in stats.requests)
    return Sample(name, index, prompt.group, len(out), seconds, stats.rounds, round_s, stats.forward_s, tuple(out), repeat)


def _measure(prompts: list[Prompt], chosen: dict[str, Method], repeats: int, store: Path | None, console: Console) -> list[Sample]:
    """Samples of every method on every prompt; runs that the store already holds are not repeated."""
    samples: list[Sample] = []
    if store and store.exists():
        samples = [Sample(**{**json.loads(s), "tokens": tuple(json.loads(s)["tokens"])}) for s in store.read_text().splitlines()]
    done = {(s.method, s.prompt, s.repeat) for s in samples}
    for method in chosen.values():
        for prompt in prompts[:1]:
            method(prompt)
    for turn in track(range(len(prompts) * repeats), "prompts", console=console):
        repeat, index = divmod(turn, len(prompts))
        for name in rotation(list(chosen), turn):
            if (name, index, repeat) in done:
                continue
            samples.append(_sample(name, index, prompts[index], repeat, chosen[name]))
            if store:
                with store.open("a") as file:
                    file.write(json.dumps(samples[-1].as_dict()) + "\n")
    return samples


def _rows(samples: list[Sample], groups: set[str]) -> list[dict[str, Any]]:
    """A row for each method over the prompts of these groups."""
    names = list(dict.fromkeys(s.method for s in sorted(samples, key=lambda s: s.method not in (HF, PLAIN))))
    picked = {n: sorted((s for s in samples if s.method == n and s.group in groups), key=lambda s: s.prompt) for n in names}
    seconds = {n: [s.seconds for s in picked[n]] for n in names}
    tokens = {n: [s.num_tokens for s in picked[n]] for n in names}
    best_assisted = min((n for n in names if n.startswith(ASSISTED)), key=lambda n: sum(seconds[n]) / sum(tokens[n]))
    rows = []
    for name in names:
        own = picked[name]
        round_s, forward_s = sum(s.round_s for s in own), sum(s.forward_s for s in own)
        rows.append(
            {
                "method": name,
                "tokens_per_s": sum(tokens[name]) / sum(seconds[name]),
                "vs_generate": ratio_interval(seconds, tokens, name, HF),
                "vs_plain": ratio_interval(seconds, tokens, name, PLAIN),
                "vs_best_assisted": ratio_interval(seconds, tokens, name, best_assisted),
                "tokens_per_round": sum(tokens[name]) / sum(s.rounds for s in own) if round_s else None,
                "outside_forwards": 1 - forward_s / round_s if round_s else None,
            }
        )
    return rows


def _equality(samples: list[Sample], prompts: list[Prompt], target: Any) -> dict[str, Any]:
    """How many outputs equal plain decoding on our runtime, and how those that differ from `generate` do."""
    outputs = {(s.method, s.prompt): s.tokens for s in samples}
    ours = sorted({s.method for s in samples if s.round_s and s.method not in (PLAIN, FREE)})
    same = {m: sum(outputs[m, i] == outputs[PLAIN, i] for i in range(len(prompts))) for m in ours}
    within, beyond = 0, []
    for i, prompt in enumerate(prompts):
        found = explain(target, prompt.ids, outputs[PLAIN, i], outputs[HF, i])
        within += found is not None and found.within
        if found is not None and not found.within:
            beyond.append({"prompt": i, "place": found.place, "gap": found.gap, "noise": found.noise})
    equal = sum(outputs[PLAIN, i] == outputs[HF, i] for i in range(len(prompts)))
    return {"prompts": len(prompts), "equal_to_plain": same, "plain_equals_generate": equal, "within": within, "beyond": beyond}


def _show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for heading in ("method", "tokens/s", "vs generate", "vs plain", "vs best assisted", "tokens a round", "outside forwards"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        ratios = [f"{r[0]:.2f}x ({r[1]:.2f}-{r[2]:.2f})" for r in (row["vs_generate"], row["vs_plain"], row["vs_best_assisted"])]
        length = "" if row["tokens_per_round"] is None else f"{row['tokens_per_round']:.2f}"
        outside = "" if row["outside_forwards"] is None else f"{row['outside_forwards']:.1%}"
        table.add_row(row["method"], f"{row['tokens_per_s']:.1f}", *ratios, length, outside)
    console.print(table)


def main(
    prompts: Annotated[list[Path] | None, typer.Option(help="JSONL of prompts, once or several times; default: built-in")] = None,
    limit: Annotated[int | None, typer.Option(help="most prompts of a file, evenly from it")] = None,
    per_group: Annotated[int | None, typer.Option(help="most prompts of a group, evenly from it")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to make for each prompt")] = 128,
    group: Annotated[str | None, typer.Option(help="only prompts of this group")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="runs of each method on each prompt; the median counts")] = 3,
    longest: Annotated[int, typer.Option(help="leave out prompts of more tokens than this")] = 384,
    plans: Annotated[str, typer.Option(help="drafted tokens a round to try, separated by commas")] = "1,2,3",
    output: Annotated[Path | None, typer.Option(help="JSON to write; OUTPUT.samples.jsonl beside it lets a run resume")] = None,
) -> None:
    """Measure the bundled pair in its own dtype on this machine."""
    console = Console()
    target = AutoModelForCausalLM.from_pretrained(bundled_path("target")).eval()
    draft = AutoModelForCausalLM.from_pretrained(bundled_path("draft")).eval()
    for model in (target, draft):
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    tokenizer = AutoTokenizer.from_pretrained(bundled_path("target"))
    paths: list[Path | None] = list(prompts or []) or [None]
    found = [load_prompts(path, tokenizer, limit, longest, group) for path in paths]
    chosen_prompts = _of_each_group([prompt for own, _ in found for prompt in own], per_group)
    skipped = sum(count for _, count in found)
    store = output.with_suffix(".samples.jsonl") if output else None
    chosen = methods(target, draft, max_new_tokens, [int(p) for p in plans.split(",")])
    samples = medians(_measure(chosen_prompts, chosen, repeats, store, console))
    report: dict[str, Any] = {"machine": machine(), "dtype": str(target.dtype)}
    report |= {"max_new_tokens": max_new_tokens, "repeats": repeats}
    report |= {"left_out_for_length": skipped, "equality": _equality(samples, chosen_prompts, target)}
    groups = sorted({s.group for s in samples})
    report["groups"] = {name: _rows(samples, {name}) for name in groups} | {"all": _rows(samples, set(groups))}
    for name, rows in report["groups"].items():
        _show(console, f"{name} ({sum(s.group == name or name == 'all' for s in samples if s.method == HF)} prompts)", rows)
    console.print_json(data={k: v for k, v in report.items() if k != "groups"})
    if output:
        output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    typer.run(main)
