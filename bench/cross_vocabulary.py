"""What does a draft model with another vocabulary give? `python -P -m specdec.bench.cross_vocabulary TARGET DRAFT`.

Both are checkpoints with their tokenizers. Each way to map the vocabularies is compared with plain decoding on the same kernels:
the text must be the same token for token, greedy and sampled by the same seed, before its speed is worth a line. The runs take
turns, the first turn is not counted, and each prompt counts by its median run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec import FixedPlanner, SpeculativeGenerator
from specdec.bench.machine import machine
from specdec.bench.timing import Sample, medians, ratio_interval, rotation, timed
from specdec.drafters.vocab_map import WAYS, VocabMap
from specdec.errors import SpecDecError, VocabularyMismatchError

PLAIN = "plain"
_OPENINGS = (
    "Once upon a time, there was a little girl named Lily.",
    "Tom had a big red ball. One day, he went to the park",
    "The old dog liked to sleep in the sun. But then",
    '"Mom, can we go to the beach?" asked Ben.',
    "There was a small bird who could not fly. She",
    "One night, a boy saw a bright star. He wished",
    "Sara and her brother wanted to bake a cake.",
    "A frog lived near the pond. Every day he",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One way at one temperature. same: prompts whose tokens are plain decoding's, of `prompts`.

    acceptance: accepted of drafted tokens.  tokens_per_round: the bonus token included.  drafting: share of the time.
    speedup: of tokens a second over plain decoding, with its 95 % interval over prompts; None for plain decoding.
    """

    by: str
    temperature: float
    prompts: int
    same: int
    acceptance: float
    tokens_per_round: float
    drafting: float
    tokens_per_second: float
    speedup: tuple[float, float, float] | None


@dataclass(frozen=True, slots=True)
class Runs:
    """What was timed. samples: every counted run.  stats: `RequestStats` of each, by way, prompt and repeat."""

    samples: list[Sample]
    stats: dict[tuple[str, int, int], Any]


def measure(generators: dict[str, SpeculativeGenerator], prompts: Sequence[Any], options: dict[str, Any], turns: int) -> Runs:
    """Every generator on every prompt, in turns; the first turn warms up and is not kept."""
    samples, told = [], {}
    for number, prompt in enumerate(prompts):
        for turn in range(turns + 1):
            for name in rotation(list(generators), number + turn):
                out, seconds = timed(partial(generators[name].generate, **prompt, **options))
                if turn == 0:
                    continue
                stats = generators[name].stats
                assert stats is not None
                text = tuple(out[0, prompt["input_ids"].shape[1] :].tolist())
                samples.append(Sample(name, number, "", len(text), seconds, stats.rounds, 0.0, 0.0, text, turn))
                told[name, number, turn] = stats.requests[0]
    return Runs(samples, told)


def rows(runs: Runs, names: Sequence[str], temperature: float) -> list[Row]:
    """The table's lines in the order of the names. The run of median time counts for each prompt."""
    middle = medians(runs.samples)
    own = {name: [sample for sample in middle if sample.method == name] for name in names}
    seconds = {name: [sample.seconds for sample in picked] for name, picked in own.items()}
    tokens = {name: [sample.num_tokens for sample in picked] for name, picked in own.items()}
    made = []
    for name, picked in own.items():
        stats = [runs.stats[name, sample.prompt, sample.repeat] for sample in picked]
        made.append(
            Row(
                by=name,
                temperature=temperature,
                prompts=len(picked),
                same=sum(ours.tokens == theirs.tokens for ours, theirs in zip(picked, own[PLAIN], strict=True)),
                acceptance=sum(s.accepted for s in stats) / max(sum(s.drafted for s in stats), 1),
                tokens_per_round=sum(tokens[name]) / max(sum(s.rounds for s in stats), 1),
                drafting=sum(s.draft_s for s in stats) / sum(seconds[name]),
                tokens_per_second=sum(tokens[name]) / sum(seconds[name]),
                speedup=None if name == PLAIN else ratio_interval(seconds, tokens, name, PLAIN),
            )
        )
    return made


def main(
    target: Annotated[Path, typer.Argument(help="the target's folder, with its tokenizer")],
    draft: Annotated[Path, typer.Argument(help="the draft model's folder, with its tokenizer")],
    length: Annotated[int, typer.Option(min=1, help="target tokens to draft each round")] = 4,
    new: Annotated[int, typer.Option(min=1, help="tokens to generate for each prompt")] = 96,
    turns: Annotated[int, typer.Option(min=1, help="timed runs of every prompt")] = 3,
    temperatures: Annotated[list[float] | None, typer.Option("--temperature", min=0.0, help="0 is greedy; repeatable")] = None,
    prompts: Annotated[Path | None, typer.Option(help="a text file, one prompt a line; by default eight short stories")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="where to write the figures")] = None,
) -> None:
    """Plain decoding against every way to map the draft's vocabulary. Ends with an error where any text differs."""
    model, tokenizer = _load(target)
    other, other_tokenizer = _load(draft)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    texts = _OPENINGS if prompts is None else [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    inputs = [tokenizer([text], return_tensors="pt", return_token_type_ids=False) for text in texts]
    maps = _maps(tokenizer, other_tokenizer, other)
    made: list[Row] = []
    for temperature in temperatures or [0.0, 1.0]:
        options: dict[str, Any] = {"max_new_tokens": new, "do_sample": temperature > 0}
        options |= {"temperature": temperature, "top_k": 0, "seed": 7} if temperature > 0 else {}
        planner = FixedPlanner(nodes=length, depth=length)
        plain = SpeculativeGenerator(model, verifier="coupled" if temperature > 0 else "auto")
        ways = {PLAIN: plain} | {by: SpeculativeGenerator(model, drafter, planner=planner) for by, drafter in maps.items()}
        made += rows(measure(ways, inputs, options, turns), list(ways), temperature)
    shared = {"target": model.config.vocab_size, "draft": other.config.vocab_size, "shared": next(iter(maps.values())).shared}
    _show(f"{target.name} with {draft.name}: {shared['shared']} tokens of {shared['target']} and {shared['draft']}", made)
    if out is not None:
        report = {"target": target.name, "draft": draft.name, "length": length, "new": new, "vocabulary": shared}
        out.write_text(json.dumps({**report, "machine": machine(), "rows": [asdict(row) for row in made]}, indent=2) + "\n")
    if any(row.same < row.prompts for row in made):
        raise SpecDecError("some text is not plain decoding's; in half precision compare in float32")


def _maps(tokenizer: Any, other_tokenizer: Any, other: Any) -> dict[str, VocabMap]:
    """Every way that this pair allows; the others are told with the reason."""
    found: dict[str, VocabMap] = {}
    for by in WAYS:
        try:
            found[by] = VocabMap(tokenizer, other_tokenizer, other, by)
        except VocabularyMismatchError as reason:
            print(f"left out: {reason}")
    if not found:
        raise SpecDecError("no way fits these two vocabularies; the reasons are above")
    return found


def _load(path: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def _show(title: str, made: Sequence[Row]) -> None:
    table = Table(title=title)
    for heading in ("way", "temperature", "same text", "acceptance", "tokens a round", "drafting", "tokens/s", "over plain"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for row in made:
        over = "" if row.speedup is None else "{:.2f}x ({:.2f}-{:.2f})".format(*row.speedup)
        acceptance = "" if row.by == PLAIN else f"{row.acceptance:.2f}"
        cells = [f"{row.same}/{row.prompts}", acceptance, f"{row.tokens_per_round:.2f}", f"{row.drafting:.0%}"]
        table.add_row(row.by, f"{row.temperature:g}", *cells, f"{row.tokens_per_second:.0f}", over)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
