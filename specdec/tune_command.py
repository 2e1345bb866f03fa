"""`specdec tune`: measure a pair of models on this machine, write the profile, and show the plan that it recommends."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.bench.workloads import json_lines
from specdec.bundled import BUNDLED, checkpoint
from specdec.drafters.base import Drafter
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.pard import PardDrafter
from specdec.drafters.registry import FACTORIES, load_drafter, make_drafter
from specdec.errors import SpecDecError
from specdec.generator import SpeculativeGenerator
from specdec.loading import load_model, need_tokenizer
from specdec.profile import Profile, default_path, read_profile, write_profile
from specdec.trees.plans import Plan, positional, sequoia_tree
from specdec.tune import recommend, tune

# Prompts are left out beyond this, and where fewer positions than these are left to decode.
_LONGEST, _ROOM = 384, 64
# A tree wide and deep enough to measure every head's first guesses, from a guess at their accuracies.
_GUESSED, _MEASURED_NODES = (0.6, 0.2, 0.1, 0.05), 64


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """The command's options. shape: None is the drafter's own, chains where it draws both.  out: None is the user's cache."""

    target: str
    drafter: str | None
    shape: str | None
    prompts: Path | None
    batches: tuple[int, ...]
    nodes: tuple[int, ...]
    rounds: int
    seconds: float
    out: Path | None
    resume: bool
    as_json: bool


def run_tune(options: TuneOptions, console: Console) -> Profile:
    """Measure, write the profile and show it; with --json the document alone goes to standard output. Raises SpecDecError."""
    path = checkpoint(options.target, "target")
    target = load_model(path)
    drafter = _drafter(options, target)
    generator = SpeculativeGenerator(target, drafter)
    prompts = _prompts(options.prompts, need_tokenizer(path), generator.engine.runner.max_positions)
    out = options.out or default_path(target, drafter)
    before = read_profile(out) if options.resume and out.exists() else None
    profile = tune(
        generator,
        prompts,
        batches=options.batches,
        nodes=options.nodes,
        rounds=options.rounds,
        seconds=options.seconds,
        out=out,
        resume=before,
        console=Console(stderr=True) if options.as_json else console,
    )
    write_profile(profile, out)
    plans = {batch: recommend(profile, batch) for batch in profile.target_s}
    if options.as_json:
        document = {"file": str(out), "profile": asdict(profile), "plans": [plan_numbers(profile, *item) for item in plans.items()]}
        print(json.dumps(document, ensure_ascii=False))
    else:
        show_profile(profile, plans, console)
        console.print(f"wrote {out}", markup=False, highlight=False)
    return profile


def plan_numbers(profile: Profile, batch: int, plan: Plan) -> dict[str, Any]:
    """A plan for JSON. speedup: over plain decoding, expected."""
    return {
        "batch": batch,
        "nodes": plan.nodes,
        "depth": plan.depth,
        "width": plan.width,
        "tokens": plan.tokens,
        "seconds": plan.seconds,
        "speedup": _speedup(profile, batch, plan),
        "choices": [list(choice) for choice in plan.tree.choices],
    }


def _speedup(profile: Profile, batch: int, plan: Plan) -> float:
    return plan.goodput * profile.seconds(batch, 0, 0, batch * profile.length)


def _drafter(options: TuneOptions, target: PreTrainedModel) -> Drafter:
    """The drafter that was asked for, in its shape."""
    name, known = options.drafter, ", ".join(sorted(FACTORIES))
    if name is None and options.target != BUNDLED:
        raise SpecDecError(f"--drafter is missing, and the bundled draft fits no other target; name a checkpoint, or {known}")
    name = checkpoint(name or BUNDLED, "draft")
    if options.shape not in (None, "chain", "tree"):
        raise SpecDecError(f"--shape {options.shape!r}: allowed are 'chain' and 'tree'")
    if name in FACTORIES:
        drafter = make_drafter(name)
        if options.shape not in (None, drafter.shape):
            raise SpecDecError(f"--shape {options.shape}: {name} draws {drafter.shape}s; leave --shape away")
        return drafter
    drafter = load_drafter(name, target)
    if options.shape != "tree":
        return drafter
    if isinstance(drafter, MedusaDrafter):
        heads = drafter.heads.num_heads
        # Trees of fixed ranks: those that follow the heads' own laws would offer a guess only where it is likely.
        choices = sequoia_tree(positional(_GUESSED, heads), _MEASURED_NODES, heads).choices
        return MedusaDrafter.from_pretrained(name, target, choices=choices, shape="tree")
    if isinstance(drafter, PardDrafter):
        return PardDrafter.from_pretrained(name, shape="tree", device=target.device)
    return DraftModelDrafter(load_model(name, device=target.device), shape="tree")


def _prompts(path: Path | None, tokenizer: PreTrainedTokenizerBase, most: int | None) -> list[list[int]]:
    """Token ids in mixed order, so that the first ones are not all of one kind. path: None for the built-in ones."""
    longest = _LONGEST if most is None else min(_LONGEST, most - _ROOM)
    every = [_encode(tokenizer, prompt) for prompt in read_prompts(path)]
    fitting = [ids for ids in every if 0 < len(ids) <= longest]
    if not fitting:
        raise SpecDecError(f"{path or 'built-in prompts'}: none of {len(every)} prompts has 1 to {longest} tokens; give others")
    random.Random(0).shuffle(fitting)
    return fitting


def read_prompts(path: Path | None) -> Iterator[Any]:
    """Texts and lists of messages. A .jsonl file holds "messages", "text" or "prompt" a line; another one a prompt a line."""
    try:
        text = (path or files("specdec.bench").joinpath("prompts.jsonl")).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecDecError(f"--prompts {path}: cannot be read: {error}; give a text file or a .jsonl file") from error
    if path is not None and path.suffix != ".jsonl":
        yield from (line for line in text.split("\n") if line.strip())
        return
    for number, entry in json_lines(text, str(path)):
        yield _prompt_of(entry, f"{path}, line {number}")


def _prompt_of(entry: Any, where: str) -> Any:
    entry = entry if isinstance(entry, dict) else {}
    messages, text = entry.get("messages"), entry.get("text") or entry.get("prompt")
    if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
        # What is asked, without the last answer.
        return messages[: max(1, len(messages) - (messages[-1]["role"] == "assistant"))]
    if not isinstance(text, str) or not text:
        raise SpecDecError(f'{where}: has neither "text" nor "prompt" nor "messages" of {{"role", "content"}}')
    return [{"role": "user", "content": text}] if entry.get("chat") else text


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> list[int]:
    """Token ids; messages by the chat template, one after the other where there is none."""
    if not isinstance(prompt, str) and tokenizer.chat_template:
        encoded: Any = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    else:
        text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
        encoded = tokenizer(text)
    ids: list[int] = encoded["input_ids"]
    return ids


def show_profile(profile: Profile, plans: Mapping[int, Plan], console: Console) -> None:
    """Tables of what was measured, and of the recommended plans."""
    here = profile.machine
    where = ", ".join((here.device, here.dtype, *([f"{here.threads} threads"] if here.threads else [])))
    console.print(f"medians of {profile.rounds} rounds on {where}", markup=False, highlight=False)
    console.print(_cost_table(profile))
    if profile.accuracies:
        console.print("how often a child is accepted where its parent was", highlight=False)
        console.print(_acceptance_table(profile.accuracies))
    if profile.proposed < profile.asked:
        console.print(f"a draft in {profile.proposed_share:.0%} of the rounds that asked for one", highlight=False)
    console.print("recommended static plan, for each request", highlight=False)
    table = Table()
    for heading in ("requests", "nodes", "depth", "tokens a round", "ms a round", "vs plain"):
        table.add_column(heading, justify="right")
    for batch, plan in plans.items():
        numbers = (f"{plan.tokens:.2f}", f"{1000 * plan.seconds:.2f}", f"{_speedup(profile, batch, plan):.2f}x")
        table.add_row(str(batch), str(plan.nodes), str(plan.depth), *numbers)
    console.print(table)
    for batch, plan in plans.items():
        if plan.width > 1:
            choices = [list(choice) for choice in plan.tree.choices]
            console.print(f"tree choices for {batch} at once: {choices}", markup=False, highlight=False)


def _cost_table(profile: Profile) -> Table:
    """The target's times by nodes beside the drafter's by levels, each with its rounds."""
    table = Table()
    for heading in ("requests", "drafted nodes", "round without drafting, ms", "rounds", "levels", "drafting, ms", "rounds"):
        table.add_column(heading, justify="right")
    for batch, times in profile.target_s.items():
        always = profile.context * batch * profile.length
        left = [(str(n), f"{1000 * (s + always):.2f}", str(profile.target_rounds[batch][n])) for n, s in times.items()]
        drafts = profile.draft_s[batch].items()
        right = [(str(d), f"{1000 * s:.2f}", str(profile.draft_rounds[batch][d])) for d, s in drafts]
        for row in range(max(len(left), len(right))):
            cells = [*(left[row] if row < len(left) else ("",) * 3), *(right[row] if row < len(right) else ("",) * 3)]
            table.add_row("" if row else str(batch), *cells, end_section=row == max(len(left), len(right)) - 1)
    return table


def _acceptance_table(accuracies: Sequence[Sequence[float]]) -> Table:
    ranks = max(map(len, accuracies))
    table = Table()
    for heading in ("depth", *(f"rank {rank}" for rank in range(ranks))):
        table.add_column(heading, justify="right")
    for depth, row in enumerate(accuracies, 1):
        table.add_row(str(depth), *(f"{value:.0%}" for value in row))
    return table
