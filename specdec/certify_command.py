"""`specdec certify`: check the user's own target, drafter, rule and sampling, with a plain verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.bundled import BUNDLED, checkpoint
from specdec.certify import CHECKS, FAIL, PASS, Certificate, certify, room_of
from specdec.errors import SpecDecError
from specdec.loading import load_model, need_tokenizer
from specdec.planner import planner_of
from specdec.tune_command import read_prompts

# Prompts that are compared, and tokens of each, at most.
_PROMPTS, _LONGEST = 4, 192
_COLOURS = {PASS: "green", FAIL: "bold red"}


@dataclass(frozen=True, slots=True)
class CertifyOptions:
    """The command's options. dtype: None is the checkpoint's own.  nodes: None is `certify`'s own plan.  checks: none is all."""

    target: str
    drafter: str | None
    verifier: str
    temperature: float
    top_k: int | None
    top_p: float | None
    samples: int
    seed: int
    max_new_tokens: int
    nodes: int | None
    dtype: str | None
    prompts: Path | None
    checks: tuple[str, ...]
    as_json: bool


def run_certify(options: CertifyOptions, console: Console) -> Certificate:
    """Run the checks and show them; with --json the document alone goes to standard output. Raises SpecDecError."""
    drafter = options.drafter
    if drafter is None and options.target != BUNDLED:
        raise SpecDecError("--drafter is missing, and the bundled draft fits no other target; name a checkpoint, or 'suffix'")
    path = checkpoint(options.target, "target")
    target = load_model(path, dtype=options.dtype)
    shown = Console(stderr=True) if options.as_json else console
    with Progress(console=shown, transient=True) if shown.is_terminal else nullcontext() as bar:
        certificate = certify(
            target,
            checkpoint(drafter or BUNDLED, "draft"),
            prompts=_token_ids(options, target, need_tokenizer(path)),
            verifier=options.verifier,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            samples=options.samples,
            seed=options.seed,
            max_new_tokens=options.max_new_tokens,
            planner=planner_of(options.nodes),
            checks=options.checks or CHECKS,
            progress=None if bar is None else _Bars(bar),
        )
    if options.as_json:
        print(json.dumps(document(certificate), ensure_ascii=False))
    else:
        show_certificate(certificate, console)
    return certificate


def document(certificate: Certificate) -> dict[str, Any]:
    """A certificate for JSON, its verdict included."""
    return {"certified": certificate.certified, "verdict": certificate.verdict, **asdict(certificate)}


def show_certificate(certificate: Certificate, console: Console) -> None:
    """A table of the checks, what was checked and where, and the verdict."""
    table = Table()
    for heading in ("check", "verdict", "what was found"):
        table.add_column(heading)
    for check in certificate.checks:
        colour = _COLOURS.get(check.verdict, "dim")
        table.add_row(check.name, Text(check.verdict, style=colour), Text(check.detail))
    console.print(table)
    for name, value in {**certificate.settings, **certificate.versions}.items():
        console.print(f"{name}: {value}", style="dim", markup=False, highlight=False)
    console.print(certificate.verdict, style="bold green" if certificate.certified else "bold red", markup=False, highlight=False)


class _Bars:
    """A bar for each check that has begun."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}

    def __call__(self, name: str, share: float) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=1.0)
        self._progress.update(self._tasks[name], completed=share)


def _token_ids(options: CertifyOptions, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Sequence[tuple[int, ...]]:
    """A few prompts from the whole file, those left out that are too long for the checks."""
    texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in read_prompts(options.prompts)]
    every = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    longest = min(_LONGEST, room_of(target, options.max_new_tokens))
    fitting = [ids for ids in every if 0 < len(ids) <= longest]
    if not fitting:
        raise SpecDecError(
            f"{options.prompts or 'built-in prompts'}: none of {len(every)} prompts has 1 to {longest} tokens; give others, or "
            "lower --max-new-tokens"
        )
    return [fitting[i * len(fitting) // _PROMPTS] for i in range(_PROMPTS)] if len(fitting) > _PROMPTS else fitting
