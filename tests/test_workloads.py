"""Prompts: none is cut, each is chosen as asked, and those from the hub are pinned to a commit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest

from specdec.bench.hub_prompts import HubSet, hub_rows, hub_set
from specdec.bench.workloads import Choice, load_prompts
from specdec.errors import SpecDecError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Words:
    """A tokenizer of words without a chat template."""

    chat_template = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def _file(folder: Path, *entries: dict[str, Any]) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)))
    return path


def test_prompts_that_do_not_fit_are_listed_and_none_is_cut(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        {"text": "one two three"},
        {"prompt": "one two three four five", "group": "b"},
        {"turns": ["a question", "and another"], "category": "writing"},
        {"question": " ".join(["word"] * 30), "category": "qa"},
    )
    (tmp_path / "LICENSE").write_text("\n  Some License\n")
    found = load_prompts(Choice((path,), longest=4), Words(), 24, 4)
    assert [(p.task, p.line, len(p.ids)) for p in found.prompts] == [("mine", 1, 3), ("MT-bench", 3, 2)]
    assert [(r.task, r.line, r.tokens) for r in found.refused] == [("b", 2, 5), ("MT-bench", 3, 2), ("qa", 4, 30)]
    assert "limit of 4" in found.refused[0].reason
    assert "turn 2" in found.refused[1].reason
    assert "24 positions" in found.refused[2].reason
    counts = {w.task: (w.prompts, w.refused) for w in found.workloads}
    assert counts == {"mine": (1, 0), "MT-bench": (1, 1), "b": (0, 1), "qa": (0, 1)}
    assert {w.licence for w in found.workloads} == {"Some License"}


def test_prompts_are_chosen_by_task_and_evenly(tmp_path: Path) -> None:
    path = _file(tmp_path, *({"text": "word " * (i + 1), "group": "a" if i < 6 else "b"} for i in range(8)))
    found = load_prompts(Choice((path,), tasks=("a",), per_task=3), Words(), None, 4)
    assert [prompt.line for prompt in found.prompts] == [1, 3, 5]
    with pytest.raises(SpecDecError, match="tasks c"):
        load_prompts(Choice((path,), tasks=("c",)), Words(), None, 4)
    with pytest.raises(SpecDecError, match="line 1, has id; one of messages"):
        load_prompts(Choice((_file(tmp_path, {"id": 3}),)), Words(), None, 4)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"text": "fine"}\n\n{"text":\n', "line 3: not JSON"),
        ('["text"]\n', "line 1, is a list; give one object a line"),
        ("", "there are no prompts"),
    ],
    ids=["broken", "a list", "empty"],
)
def test_a_file_that_holds_no_prompts_is_an_error_that_names_the_line(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(SpecDecError, match=what):
        load_prompts(Choice((path,)), Words(), None, 4)


def test_a_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "one\u2028two"}\n{"text": "three"}', encoding="utf-8")
    assert [len(prompt.ids) for prompt in load_prompts(Choice((path,)), Words(), None, 4).prompts] == [2, 1]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub of two rows; what was asked of it."""
    asked: list[tuple[Any, ...]] = []

    def load(repo: str, config: str | None, *, split: str, revision: str) -> Any:
        asked.append((repo, config, split, revision))
        return datasets.Dataset.from_list([{"question": "how many"}, {"question": "and why so"}])

    def info(self: Any, repo: str, *, revision: str) -> Any:
        asked.append((repo, revision))
        return SimpleNamespace(card_data={"license": ["mit", "cc-by-4.0"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    return asked


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"owner/name@{COMMIT}", HubSet("owner/name", None, COMMIT, "test")),
        (f"owner/na.me/main@{COMMIT}:train", HubSet("owner/na.me", "main", COMMIT, "train")),
    ],
)
def test_a_name_says_what_is_read(text: str, expected: HubSet) -> None:
    assert hub_set(text) == expected
    assert hub_set(expected.said) == expected


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("owner/name", "has no revision; a commit's 40 digits"),
        ("owner/name@main", "has the revision 'main'"),
        (f"name@{COMMIT}", "no file here and no name of a dataset"),
        ("prompts", "no file here and no name of a dataset"),
    ],
)
def test_a_name_that_is_not_pinned_is_refused(text: str, what: str, hub: list[Any]) -> None:
    with pytest.raises(SpecDecError, match=re.escape(what)):
        load_prompts(Choice((Path(text),)), Words(), None, 4)
    assert not hub


def test_rows_become_prompts_with_their_source_and_licence(hub: list[Any]) -> None:
    name = f"owner/name/main@{COMMIT}"
    found = load_prompts(Choice((Path(name),)), Words(), None, 4)
    assert hub == [("owner/name", "main", "test", COMMIT), ("owner/name", COMMIT)]
    assert [(p.task, p.source, p.line, len(p.ids)) for p in found.prompts] == [
        ("name", f"{name}:test", 1, 2),
        ("name", f"{name}:test", 2, 3),
    ]
    assert found.workloads[0].licence == "mit and cc-by-4.0"


def test_a_mistyped_file_is_not_looked_for_on_the_hub(hub: list[Any]) -> None:
    with pytest.raises(SpecDecError, match="cannot be read"):
        load_prompts(Choice((Path("data/missing.jsonl"),)), Words(), None, 4)
    assert not hub


def test_what_the_hub_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: Any, **more: Any) -> Any:
        raise FileNotFoundError("no such dataset")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(SpecDecError, match=f"owner/name@{COMMIT}:test cannot be loaded from the hub: no such dataset"):
        hub_rows(hub_set(f"owner/name@{COMMIT}"))
