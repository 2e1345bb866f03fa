"""Tokens a round of trained drafters, beside untrained ones and the plain draft model: `python -P -m specdec.bench.acceptance`.

Greedy, one prompt at a time; nothing is timed, so the numbers do not depend on the machine's pace. An untrained PARD model is the
draft model with a mask token that it has never seen, untrained heads say what the target's own output matrix says.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec import FixedPlanner, SpeculativeGenerator, bundled_path
from specdec.bench.machine import machine
from specdec.bench.speed import Prompt, load_prompts
from specdec.drafters.base import Drafter
from specdec.drafters.checkpoints import load_pard
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.medusa_heads import MedusaHeads
from specdec.drafters.pard import PardDrafter
from specdec.drafters.registry import load_drafter
from specdec.errors import SpecDecError


def drafters(target: Any, more: list[str]) -> dict[str, Callable[[], Drafter]]:
    """The bundled drafters and untrained ones by name, and what the user names as NAME=PATH."""
    draft = AutoModelForCausalLM.from_pretrained(bundled_path("draft"))
    _, mask = load_pard(bundled_path("pard"))
    weight = target.get_output_embeddings().weight.detach()
    untrained = MedusaHeads(weight.shape[1], weight.shape[0], 4, shared_head=True, dtype=weight.dtype)
    found: dict[str, Callable[[], Drafter]] = {
        "draft model": lambda: DraftModelDrafter(draft),
        "PARD, untrained": lambda: PardDrafter(draft, mask),
        "PARD": lambda: load_drafter(bundled_path("pard"), target),
        "Medusa, untrained": lambda: MedusaDrafter(untrained, weight),
        "Medusa": lambda: load_drafter(bundled_path("medusa"), target),
    }
    for text in more:
        name, equals, path = text.partition("=")
        if not equals:
            raise SpecDecError(f"{text!r} is not NAME=PATH; name each drafter to add, as mine=runs/pard/final")
        found[name] = lambda path=path: load_drafter(path, target)  # type: ignore[misc]  # binds the path of this turn
    return found


def tokens_a_round(target: Any, drafter: Drafter, prompts: list[Prompt], nodes: int, new: int) -> dict[str, float]:
    """By group of prompts, and of all: emitted tokens over rounds."""
    generator = SpeculativeGenerator(target, drafter, planner=FixedPlanner(nodes=nodes, depth=nodes))
    sums: dict[str, list[int]] = {}
    for prompt in track(prompts, f"{drafter.name}, {nodes}", transient=True):
        ids = torch.tensor([prompt.ids], device=target.device)
        generator.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        stats = generator.stats
        assert stats is not None
        for name in (prompt.group, "all"):
            own = sums.setdefault(name, [0, 0])
            own[0], own[1] = own[0] + stats.accepted, own[1] + stats.rounds
    return {name: 1 + accepted / rounds for name, (accepted, rounds) in sums.items()}


def main(
    add: Annotated[list[str] | None, typer.Argument(help="further drafters, each NAME=PATH")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL of prompts; the built-in ones by default")] = None,
    limit: Annotated[int | None, typer.Option(help="most prompts, evenly from the file")] = None,
    longest: Annotated[int, typer.Option(help="leave out prompts of more tokens than this")] = 384,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to make for each prompt")] = 128,
    nodes: Annotated[str, typer.Option(help="drafted tokens a round to try, separated by commas")] = "2,4,8",
    output: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Measure on the bundled target."""
    console = Console()
    target: Any = AutoModelForCausalLM.from_pretrained(bundled_path("target")).eval()
    target.generation_config.eos_token_id, target.generation_config.pad_token_id = None, 0
    tokenizer = AutoTokenizer.from_pretrained(bundled_path("target"))
    asked, skipped = load_prompts(prompts, tokenizer, limit, longest)
    counts = [int(n) for n in nodes.split(",")]
    table, rows = Table("drafter", *(f"{n} tokens" for n in counts), title=f"tokens a round, {len(asked)} prompts"), []
    for name, make in drafters(target, add or []).items():
        found = {n: tokens_a_round(target, make(), asked, n, max_new_tokens) for n in counts}
        rows += [{"drafter": name, "nodes": n, **groups} for n, groups in found.items()]
        table.add_row(name, *(f"{found[n]['all']:.2f}" for n in counts))
    console.print(table)
    if output:
        report = {"machine": machine(), "prompts": len(asked), "left_out_for_length": skipped, "max_new_tokens": max_new_tokens}
        output.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
