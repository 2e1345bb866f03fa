"""Prompts for the benchmark suite: built-in, local files or hub datasets, by task; what does not fit is listed, never cut."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from specdec.bench.hub_prompts import hub_rows, hub_set
from specdec.bench.records import RefusedPrompt, Workload
from specdec.errors import SpecDecError

BUILT_IN = "built-in"
# One prompt of each of five kinds, for `--quick`: dialogue, story, maths, code, and text that repeats itself.
_QUICK = ("dialogue", "story", "maths", "code", "repeats")
# Spec-Bench gives MT-bench's kinds of question one column.
_MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
_FIELDS = ("text", "prompt", "question", "context")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as token ids. line: in its source, from 1."""

    task: str
    source: str
    line: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """Prompts of one task that are decoded together. number: from 0, over all tasks of a batch size."""

    number: int
    task: str
    prompts: tuple[Prompt, ...]

    @property
    def ids(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of each request."""
        return tuple(prompt.ids for prompt in self.prompts)


@dataclass(frozen=True, slots=True)
class Prompts:
    """What was read. workloads: a description of each task, in order."""

    prompts: tuple[Prompt, ...]
    refused: tuple[RefusedPrompt, ...]
    workloads: tuple[Workload, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """Which prompts are asked for. paths: files, or names as `hub_set` reads them; none means the built-in ones.

    tasks: none means all.  per_task: at most, evenly from each.
    longest: prompts of more tokens are refused, on top of what the model's positions refuse.
    """

    paths: tuple[Path, ...] = ()
    tasks: tuple[str, ...] = ()
    per_task: int | None = None
    longest: int | None = None


QUICK = Choice(tasks=_QUICK, per_task=1)


@dataclass(frozen=True, slots=True)
class _Asked:
    task: str
    line: int
    text: str | None
    messages: tuple[dict[str, str], ...]
    later_turns: tuple[str, ...]
    licence: str


def load_prompts(choice: Choice, tokenizer: Any, positions: int | None, new: int) -> Prompts:
    """The prompts of a choice, whole. positions: of the model, None for no limit.  new: tokens to make behind each.

    A line of a .jsonl file holds "messages", "turns", or one of "text", "prompt", "question" and "context" (and "chat"); and
    "group", "category" or "task", else the file's name is the task; so does a row of a hub dataset. A .tsv file holds a question
    and an answer. Only first turns are asked; later ones are listed as refused, for they need an answer first. Raises SpecDecError.
    """
    prompts: list[Prompt] = []
    refused: list[RefusedPrompt] = []
    licences: dict[str, str] = {}
    for source, found in _sources(choice.paths):
        if choice.tasks:
            found = [asked for asked in found if asked.task in choice.tasks]
        for asked in _of_each_task(found, choice.per_task):
            licences.setdefault(asked.task, asked.licence)
            ids = _encode(tokenizer, asked)
            reason = _why_refused(len(ids), positions, new, choice.longest)
            if reason:
                refused.append(RefusedPrompt(asked.task, source, asked.line, len(ids), reason))
            else:
                prompts.append(Prompt(asked.task, source, asked.line, ids))
            for turn, text in enumerate(asked.later_turns, 2):
                count = len(tokenizer(text)["input_ids"])
                reason = f"turn {turn} of a conversation needs the answer before it; only first turns are asked"
                refused.append(RefusedPrompt(asked.task, source, asked.line, count, reason))
    _check(choice, prompts, refused)
    return Prompts(tuple(prompts), tuple(refused), _described(prompts, refused, licences))


def json_lines(text: str, where: str) -> Iterator[tuple[int, Any]]:
    """The value of every line that is not blank, and the line's number from 1. where: the text's name, for errors.

    Raises SpecDecError that names the line.
    """
    # Only "\n" ends a line of JSON: str.splitlines would also cut at separators that stand inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise SpecDecError(f"{where}, line {number}: not JSON ({error}); mend the line or remove it") from error
        yield number, value


def items(prompts: Sequence[Prompt], batch: int) -> tuple[Item, ...]:
    """Items of `batch` prompts each; a task whose last item is short fills it from its first prompts, so that none is left out."""
    found: list[Item] = []
    for task in dict.fromkeys(prompt.task for prompt in prompts):
        own = [prompt for prompt in prompts if prompt.task == task]
        for start in range(0, len(own), batch):
            picked = tuple(own[i % len(own)] for i in range(start, start + batch))
            found.append(Item(len(found), task, picked))
    return tuple(found)


def _check(choice: Choice, prompts: list[Prompt], refused: list[RefusedPrompt]) -> None:
    if prompts:
        return
    if refused:
        raise SpecDecError(f"no prompt fits: {refused[0].reason}; {len(refused)} are refused, give shorter ones")
    wanted = f" of the tasks {', '.join(choice.tasks)}" if choice.tasks else ""
    raise SpecDecError(f"there are no prompts{wanted}; the built-in tasks are {', '.join(_built_in_tasks())}")


def _built_in_tasks() -> list[str]:
    return list(dict.fromkeys(asked.task for asked in _lines(_built_in(), BUILT_IN, BUILT_IN, "")))


def _built_in() -> str:
    return files("specdec.bench").joinpath("prompts.jsonl").read_text(encoding="utf-8")


def _sources(paths: Sequence[Path]) -> Iterator[tuple[str, list[_Asked]]]:
    if not paths:
        yield BUILT_IN, _lines(_built_in(), BUILT_IN, BUILT_IN, "")
    for path in paths:
        if not path.exists() and path.suffix not in (".jsonl", ".tsv"):
            yield _from_hub(str(path))
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise SpecDecError(f"--prompts {path} cannot be read ({error}); give a .jsonl or .tsv file, or a hub set") from error
        read = _table if path.suffix == ".tsv" else _lines
        yield path.name, read(text, path.stem, str(path), _licence_beside(path))


def _from_hub(name: str) -> tuple[str, list[_Asked]]:
    wanted = hub_set(name)
    rows, licence = hub_rows(wanted)
    stem = wanted.repo.rpartition("/")[2]
    return wanted.said, [_asked(row, number, stem, wanted.said, licence) for number, row in enumerate(rows, 1)]


def _licence_beside(path: Path) -> str:
    """The first words of a LICENSE file in the same folder."""
    file = path.with_name("LICENSE")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    return next((line.strip() for line in lines if line.strip()), "not stated")


def _table(text: str, stem: str, where: str, licence: str) -> list[_Asked]:
    """Questions of a table with tabs; it has no heading. where: unused, a table cannot be malformed."""
    rows = [line.split("\t") for line in text.split("\n")]
    return [_Asked(stem, n, None, _user(row[0]), (), licence) for n, row in enumerate(rows, 1) if row[0].strip()]


def _lines(text: str, stem: str, where: str, licence: str) -> list[_Asked]:
    found = []
    for number, entry in json_lines(text, where):
        if not isinstance(entry, dict):
            raise SpecDecError(f"{where}, line {number}, is a {type(entry).__name__}; give one object a line")
        found.append(_asked(entry, number, stem, where, licence))
    return found


def _asked(entry: dict[str, Any], number: int, stem: str, where: str, licence: str) -> _Asked:
    name = str(entry.get("group") or entry.get("category") or entry.get("task") or stem)
    task = "MT-bench" if name in _MT_BENCH and "turns" in entry else name
    licence = str(entry.get("licence") or entry.get("license") or licence or "not stated").split(",")[0]
    if messages := entry.get("messages"):
        asked = messages[: max(1, len(messages) - (messages[-1].get("role") == "assistant"))]
        return _Asked(task, number, None, tuple(asked), (), licence)
    if turns := entry.get("turns"):
        return _Asked(task, number, None, _user(turns[0]), tuple(turns[1:]), licence)
    field = next((field for field in _FIELDS if isinstance(entry.get(field), str) and entry[field]), None)
    if field is None:
        known = ", ".join(sorted(entry)) or "nothing"
        raise SpecDecError(f"{where}, line {number}, has {known}; one of messages, turns, {', '.join(_FIELDS)} is needed")
    if entry.get("chat", field in ("question", "context")):
        return _Asked(task, number, None, _user(entry[field]), (), licence)
    return _Asked(task, number, entry[field], (), (), licence)


def _user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def _encode(tokenizer: Any, asked: _Asked) -> tuple[int, ...]:
    """Chats by the tokenizer's template; without one their texts, one below the other."""
    if asked.text is not None:
        return tuple(tokenizer(asked.text)["input_ids"])
    if tokenizer.chat_template is None:
        return tuple(tokenizer("\n".join(message["content"] for message in asked.messages))["input_ids"])
    messages = list(asked.messages)
    return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def _why_refused(count: int, positions: int | None, new: int, longest: int | None) -> str:
    if count == 0:
        return "the prompt has no tokens"
    if positions is not None and count + new > positions:
        return f"{count} tokens and {new} new ones do not fit the model's {positions} positions"
    if longest is not None and count > longest:
        return f"{count} tokens are more than the limit of {longest}"
    return ""


def _of_each_task(found: Sequence[_Asked], most: int | None) -> list[_Asked]:
    """At most so many of each task, evenly from it."""
    picked = []
    for task in dict.fromkeys(asked.task for asked in found):
        own = [asked for asked in found if asked.task == task]
        count = len(own) if most is None else min(most, len(own))
        picked += [own[i * len(own) // count] for i in range(count)]
    return picked


def _described(prompts: Sequence[Prompt], refused: Sequence[RefusedPrompt], licences: dict[str, str]) -> tuple[Workload, ...]:
    found = []
    every: list[Prompt | RefusedPrompt] = [*prompts, *refused]
    for task in dict.fromkeys(entry.task for entry in every):
        own = [prompt for prompt in prompts if prompt.task == task]
        left_out = [entry for entry in refused if entry.task == task]
        source = ", ".join(dict.fromkeys(entry.source for entry in every if entry.task == task))
        tokens = sum(len(prompt.ids) for prompt in own)
        found.append(Workload(task, source, licences.get(task, "not stated"), len(own), len(left_out), tokens))
    return tuple(found)
