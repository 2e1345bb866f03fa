"""`specdec trace`: one generation as a page to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from specdec.bundled import BUNDLED, checkpoint
from specdec.errors import InvalidRequestError
from specdec.generator import SpeculativeGenerator
from specdec.loading import no_tokenizer
from specdec.planner import planner_of
from specdec.trace import Trace, trace
from specdec.trace_page import write_trace

# Tokens generated before the trace: the first rounds of a process are slow, and the page would show little else.
_WARM_UP = 8


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """The command's options. drafters: none for the bundled draft.  sampling: empty for greedy decoding, else of `generate`."""

    target: str | None
    drafters: tuple[str, ...]
    max_new_tokens: int
    sampling: dict[str, Any]
    seed: int | None
    verifier: str
    nodes: int | None
    output: Path


def run_trace(prompt: str, options: TraceOptions, console: Console) -> None:
    """Generate, write the page and say where it is. Raises SpecDecError, as for an empty prompt and a bad --output."""
    if not options.output.parent.is_dir() or options.output.is_dir():
        raise InvalidRequestError(f"--output {options.output}: give a file in a folder that exists, such as trace.html")
    generator = _generator(options)
    tokenizer = generator.tokenizer
    if tokenizer is None:
        raise no_tokenizer(options.target or BUNDLED)
    tokens = tokenizer(prompt)["input_ids"]
    if not tokens:
        raise InvalidRequestError("the prompt has no tokens; give some text")
    ids = torch.tensor([tokens], device=generator.target.device)

    def call(new: int) -> Trace:
        return trace(generator, ids, max_new_tokens=new, do_sample=bool(options.sampling), seed=options.seed, **options.sampling)

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    call(min(_WARM_UP, options.max_new_tokens))
    found = call(options.max_new_tokens)
    write_trace(found, decode, options.output, about=_about(options))
    rounds = f"{len(found.rounds)} rounds, {found.mean_acceptance_length:.2f} a round"
    console.print(f"{len(found.tokens)} tokens in {rounds}; wrote {options.output}", markup=False, highlight=False, soft_wrap=True)


def _generator(options: TraceOptions) -> SpeculativeGenerator:
    target = checkpoint(options.target or BUNDLED, "target")
    found = [checkpoint(name, "draft") for name in options.drafters or _default(options) if name != "none"]
    drafter: Any = found if len(found) > 1 else next(iter(found), None)
    return SpeculativeGenerator.from_pretrained(target, drafter, verifier=options.verifier, planner=planner_of(options.nodes))


def _about(options: TraceOptions) -> str:
    """Which models, without the folders that they lie in."""
    parts = [(options.target or BUNDLED, "target"), *((name, "draft") for name in options.drafters or _default(options))]
    return ", ".join(f"the bundled {role}" if name == BUNDLED else Path(name).name for name, role in parts)


def _default(options: TraceOptions) -> tuple[str, ...]:
    """The drafters of a command that names none: the bundled draft fits only the bundled target."""
    return () if options.target else (BUNDLED,)
