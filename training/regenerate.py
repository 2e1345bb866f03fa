"""Answers in the target's own words: every prompt of a data set is answered anew, into a JSONL file that can go on after a stop.

A draft learns best from text that its target wrote, so this runs before training. The generator is speculative itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from specdec.bundled import checkpoint
from specdec.generator import SpeculativeGenerator
from specdec.training.chat import ChatError, Message, prompt_ids
from specdec.training.config import RegenerateConfig
from specdec.training.data import DataError, Row, content_of, data_tokenizer, read_rows
from specdec.training.settings import resolved

# Where a run may differ from the one that it goes on with.
_FREE = ("out", "limit", "device")


@dataclass(frozen=True, slots=True)
class RegenerateReport:
    """rows: in the file now.  written: by this run.  too_long: rows left out, their prompts leaving no room for an answer.

    unfinished: answers of this run that the limit of tokens cut.  tokens: that this run generated.
    """

    rows: int
    written: int
    too_long: int
    unfinished: int
    tokens: int


@dataclass(frozen=True, slots=True)
class _Job:
    """A row to answer. turns: numbers of the messages to write, ascending; empty for text.  ids: the first prompt's."""

    id: str
    messages: tuple[Message, ...]
    turns: tuple[int, ...]
    prompt: str | None
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Answer:
    text: str
    finished: bool
    tokens: tuple[int, ...]


def regenerate(
    config: RegenerateConfig, *, generator: SpeculativeGenerator | None = None, console: Console | None = None
) -> RegenerateReport:
    """Write config.out, one line a row in the order of `read_rows`: {"id", "messages" | "prompt" and "completion" | "text",
    "finished", "seed"}; "finished" is false where config.max_new_tokens cut the last answer, and a conversation ends there.

    A run that was stopped anywhere goes on with what is missing, and the file ends up the same as without the stop. Beside
    the file lies `<out>.settings.json`; with other settings or other data a run does not go on. Raises DataError.
    generator: the target and drafter in place of those that the configuration names.
    """
    own = generator or _generator(config)
    tokenizer = data_tokenizer(config.data, config.target)
    jobs, too_long = _jobs(config, tokenizer, _longest_prompt(config, own))
    out = Path(config.out).expanduser()
    done = _take_up(out, config, jobs)
    total = len(jobs) if config.limit is None else min(config.limit, len(jobs))
    written = unfinished = tokens = 0
    with Progress(console=console or Console(stderr=True)) as progress, out.open("a", encoding="utf-8") as file:
        task = progress.add_task("answering", total=total, completed=done)
        # Batches are those of a run without a stop, as sampled text depends on a row's place in its batch.
        for first in range(done - done % config.batch, total, config.batch):
            batch = jobs[first : first + config.batch]
            seed = _seed(config.seed, first)
            for number, (line, answers) in enumerate(_answered(own, tokenizer, config, batch, seed), first):
                if done <= number < total:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    written, unfinished = written + 1, unfinished + (not line["finished"])
                    tokens += sum(len(answer.tokens) for answer in answers)
            file.flush()
            os.fsync(file.fileno())
            progress.update(task, completed=min(first + len(batch), total))
    return RegenerateReport(done + written, written, too_long, unfinished, tokens)


def _generator(config: RegenerateConfig) -> SpeculativeGenerator:
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    drafter = None if config.drafter is None else checkpoint(config.drafter, "draft")
    return SpeculativeGenerator.from_pretrained(checkpoint(config.target, "target"), drafter, device=device)


def _longest_prompt(config: RegenerateConfig, generator: SpeculativeGenerator) -> int:
    positions = getattr(generator.target.config, "max_position_embeddings", None) or 1 << 30
    if positions <= config.max_new_tokens:
        raise DataError(f"max_new_tokens {config.max_new_tokens} leaves no room for a prompt: the target has {positions} positions")
    return min(config.data.max_length, int(positions) - config.max_new_tokens)


def _jobs(config: RegenerateConfig, tokenizer: Any, longest: int) -> tuple[list[_Job], int]:
    """What to answer, and how many rows were left out as their prompts are longer than `longest` tokens."""
    jobs, too_long = [], 0
    for row in read_rows(config.data):
        job = _job(row, config, tokenizer)
        if len(job.ids) <= longest:
            jobs.append(job)
        elif config.data.too_long == "error":
            raise DataError(
                f"{row.where}: a prompt of {len(job.ids)} tokens; at most {longest} leave room for an answer; "
                "lower max_new_tokens, raise data.max_length, or set data.too_long to drop"
            )
        else:
            too_long += 1
    if not jobs:
        raise DataError(f"no row is left to answer: all {too_long} prompts are longer than {longest} tokens")
    return jobs, too_long


def _job(row: Row, config: RegenerateConfig, tokenizer: Any) -> _Job:
    content, name = content_of(row, config.data), f"{Path(row.file).name}:{row.line}"
    if content.messages is not None:
        messages = list(content.messages)
        if messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        turns = tuple(i for i, one in enumerate(messages) if one["role"] == "assistant")
        turns = turns if config.turns == "all" else turns[-1:]
        try:
            return _Job(name, tuple(messages), turns, None, tuple(prompt_ids(tokenizer, messages[: turns[0]])))
        except ChatError as error:
            raise DataError(f"{row.where}: {error}") from error
    ids = tokenizer(content.prompt or content.text, verbose=False)["input_ids"]
    ids = ids if content.prompt else ids[: config.text_prompt]
    return _Job(name, (), (), content.prompt, tuple(ids))


def _take_up(out: Path, config: RegenerateConfig, jobs: Sequence[_Job]) -> int:
    """How many rows the file holds already; a line that a stop cut is removed. Raises DataError for a file of another run."""
    settings = {name: value for name, value in resolved(config).items() if name not in _FREE}
    settings["rows"] = hashlib.blake2b(repr([(job.id, job.messages, job.ids) for job in jobs]).encode(), digest_size=16).hexdigest()
    beside = out.with_name(f"{out.name}.settings.json")
    if beside.is_file():
        other = _differences(beside, settings)
        if other:
            came = ", ".join("the data's rows" if name == "rows" else name for name in other)
            raise DataError(f"{out} was begun with other settings ({came}); give another --out, or remove it and {beside.name}")
    elif out.exists() and out.stat().st_size:
        raise DataError(f"{out} exists and was not written by this command, as {beside.name} is missing; give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    new = beside.with_suffix(".new")
    new.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(new, beside)
    raw = out.read_bytes() if out.exists() else b""
    whole = raw[: raw.rfind(b"\n") + 1]
    lines = whole.split(b"\n")[:-1]
    for line, job in zip(lines, jobs, strict=False):
        if not line.startswith(f'{{"id": {json.dumps(job.id, ensure_ascii=False)},'.encode()):
            raise DataError(f"{out} holds other rows than this run writes, from {line[:60]!r} on; give another --out")
    if len(whole) < len(raw):
        os.truncate(out, len(whole))
    return min(len(lines), len(jobs))


def _differences(beside: Path, settings: dict[str, Any]) -> list[str]:
    try:
        before = json.loads(beside.read_text(encoding="utf-8"))
        return [name for name in settings if before.get(name) != settings[name]]
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{beside} cannot be read as the settings of a run; remove it and its output: {error}") from error


def _seed(seed: int, first: int) -> int:
    """One seed a batch, within torch's range."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{first}".encode(), digest_size=8).digest()) >> 2


def _answered(
    generator: SpeculativeGenerator, tokenizer: Any, config: RegenerateConfig, batch: Sequence[_Job], seed: int
) -> Iterator[tuple[dict[str, Any], list[_Answer]]]:
    """The line of each row of the batch, and its answers; a turn of all conversations is one call of the generator."""
    said: list[list[_Answer]] = [[] for _ in batch]
    messages = [list(job.messages) for job in batch]
    for step in range(max(max(len(job.turns), 1) for job in batch)):
        going = [i for i, job in enumerate(batch) if step < max(len(job.turns), 1) and all(answer.finished for answer in said[i])]
        prompts = {i: _prompt(tokenizer, batch[i], messages[i], step) for i in going}
        going = [i for i in going if step == 0 or len(prompts[i]) <= _longest_prompt(config, generator)]
        answers = _generate(generator, tokenizer, config, [prompts[i] for i in going], seed + step)
        for i, answer in zip(going, answers, strict=True):
            said[i].append(answer)
            if batch[i].turns:
                turn = batch[i].turns[step]
                messages[i][turn] = {**messages[i][turn], "content": answer.text}
    for job, turns, answers in zip(batch, messages, said, strict=True):
        end = {"finished": answers[-1].finished, "seed": config.seed}
        if job.turns:
            yield {"id": job.id, "messages": turns[: job.turns[len(answers) - 1] + 1], **end}, answers
        elif job.prompt is not None:
            yield {"id": job.id, "prompt": job.prompt, "completion": answers[0].text, **end}, answers
        else:
            # In one piece, as the prompt may end within a character.
            text = tokenizer.decode([*job.ids, *answers[0].tokens], skip_special_tokens=True)
            yield {"id": job.id, "text": text, **end}, answers


def _prompt(tokenizer: Any, job: _Job, messages: Sequence[Message], step: int) -> Sequence[int]:
    return job.ids if step == 0 else prompt_ids(tokenizer, messages[: job.turns[step]])


def _generate(
    generator: SpeculativeGenerator, tokenizer: Any, config: RegenerateConfig, prompts: Sequence[Sequence[int]], seed: int
) -> list[_Answer]:
    if not prompts:
        return []
    ends = _ends(generator, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    width = max(map(len, prompts))
    device = generator.target.device
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    sampling: dict[str, Any] = (
        {"temperature": config.temperature, "top_k": 0, "top_p": 1.0, "seed": seed} if config.temperature > 0 else {}
    )
    out = generator.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=config.max_new_tokens,
        do_sample=bool(sampling),
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        **sampling,
    )
    return [_answer(tokenizer, row, ends) for row in out[:, width:].tolist()]


def _ends(generator: SpeculativeGenerator, tokenizer: Any) -> frozenset[int]:
    known: Any = generator.target.generation_config.eos_token_id
    known = [known] if isinstance(known, int) else known or []
    return frozenset([*known, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])])


def _answer(tokenizer: Any, tokens: list[int], ends: frozenset[int]) -> _Answer:
    size = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    text = str(tokenizer.decode(tokens[:size], skip_special_tokens=True))
    return _Answer(text, size < len(tokens), tuple(tokens[:size]))
