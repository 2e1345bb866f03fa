"""Regeneration: whose words the rows hold, and that a run stopped anywhere ends in the same file."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from specdec import SpeculativeGenerator, bundled_path
from specdec.training.config import DataConfig, RegenerateConfig
from specdec.training.data import DataError, load_examples
from specdec.training.regenerate import RegenerateReport, regenerate

pytestmark = pytest.mark.slow

END = 1
QUIET = Console(file=StringIO())


class Scripted:
    """A generator whose answer is the length of its prompt and the place in the batch, as text, and then an end."""

    def __init__(self, tokenizer: Any, *, stop_after: int | None = None, positions: int = 2048) -> None:
        self.tokenizer, self.stop_after, self.calls = tokenizer, stop_after, 0
        self.target = SimpleNamespace(
            config=SimpleNamespace(max_position_embeddings=positions),
            generation_config=SimpleNamespace(eos_token_id=END),
            device=torch.device("cpu"),
        )

    def generate(self, ids: Any, *, attention_mask: Any, max_new_tokens: int, **kwargs: Any) -> Any:
        self.calls += 1
        if self.stop_after is not None and self.calls > self.stop_after:
            raise KeyboardInterrupt
        said = [self.tokenizer(f"{n} {i}")["input_ids"] + [END] for i, n in enumerate(attention_mask.sum(1).tolist())]
        width = min(max(map(len, said)), max_new_tokens)
        rows = [(one + [kwargs["pad_token_id"]] * width)[:width] for one in said]
        return torch.cat((ids, torch.tensor(rows)), 1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(bundled_path("target")))


@pytest.fixture(scope="module")
def real() -> SpeculativeGenerator:
    return SpeculativeGenerator.from_pretrained(bundled_path("target"), "suffix", dtype=torch.float32)


def chat(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def settings(folder: Path, *rows: dict[str, Any], **kwargs: Any) -> RegenerateConfig:
    file = folder / "in.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RegenerateConfig(data=DataConfig(files=(str(file),)), out=str(folder / "out.jsonl"), **{"batch": 2, **kwargs})


def run(config: RegenerateConfig, generator: Any) -> RegenerateReport:
    return regenerate(config, generator=generator, console=QUIET)


def lines(config: RegenerateConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(config.out).read_text(encoding="utf-8").splitlines()]


ROWS = tuple(chat(f"Say {'many ' * i}words", "no") for i in range(7))


@pytest.mark.slow
def test_every_row_is_answered_by_the_target(tmp_path: Path, real: SpeculativeGenerator, tokenizer: Any) -> None:
    config = settings(tmp_path, chat("What is 2 + 2?", "old"), chat("Hi"), chat("a", "b", "What now?", "old"), max_new_tokens=6)
    report = run(config, real)
    assert (report.rows, report.written, report.too_long) == (3, 3, 0)
    for line in lines(config):
        *before, last = line["messages"]
        ids = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
        expected = real.target.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        assert last == {"role": "assistant", "content": tokenizer.decode(expected, skip_special_tokens=True)}
        assert line["finished"] is (END in expected)
    assert {line["id"] for line in lines(config)} == {"in.jsonl:1", "in.jsonl:2", "in.jsonl:3"}


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_run_cut_anywhere_ends_in_the_same_file(tmp_path: Path, real: SpeculativeGenerator, temperature: float) -> None:
    config = settings(tmp_path, *ROWS[:5], max_new_tokens=4, temperature=temperature, seed=3)
    run(config, real)
    out = Path(config.out)
    whole = out.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    assert len(ends) == 5
    for cut in (0, 9, ends[0], ends[2] - 1, ends[3] + 30, len(whole)):
        out.write_bytes(whole[:cut])
        report = run(config, real)
        assert out.read_bytes() == whole
        assert report.written == 5 - whole[:cut].count(b"\n")


def test_a_stop_between_batches_loses_nothing(tmp_path: Path, tokenizer: Any) -> None:
    config = settings(tmp_path, *ROWS)
    run(config, Scripted(tokenizer))
    other = replace(config, out=str(tmp_path / "other.jsonl"))
    with pytest.raises(KeyboardInterrupt):
        run(other, Scripted(tokenizer, stop_after=2))
    assert len(lines(other)) == 4
    again = Scripted(tokenizer)
    assert run(other, again).written == 3
    assert again.calls == 2
    assert Path(other.out).read_bytes() == Path(config.out).read_bytes()


def test_all_turns_are_answered_in_order_each_after_the_new_ones(tmp_path: Path, tokenizer: Any) -> None:
    config = settings(tmp_path, chat("a", "long old answer " * 9, "b", "old", "c"), chat("d", "old"), turns="all")
    run(config, Scripted(tokenizer))
    for line in lines(config):
        messages = line["messages"]
        assert line["finished"] is True
        for i in range(1, len(messages), 2):
            asked = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=True)["input_ids"]
            assert messages[i]["content"].split()[0] == str(len(asked))
    assert sorted(len(line["messages"]) for line in lines(config)) == [2, 6]


def test_a_conversation_ends_where_an_answer_was_cut(tmp_path: Path, tokenizer: Any) -> None:
    config = settings(tmp_path, chat("a", "x", "b", "y"), turns="all", max_new_tokens=1)
    assert run(config, Scripted(tokenizer)).unfinished == 1
    (line,) = lines(config)
    assert (len(line["messages"]), line["finished"]) == (2, False)


def test_texts_are_continued_and_prompts_completed(tmp_path: Path, tokenizer: Any) -> None:
    text = "日本語 once upon a time there was a tree"
    config = settings(tmp_path, {"text": text}, {"prompt": "One two", "completion": "old"}, {"prompt": "Three"}, text_prompt=2)
    run(config, Scripted(tokenizer))
    by_id = {line["id"]: line for line in lines(config)}
    size = len(tokenizer("One two")["input_ids"])
    assert by_id["in.jsonl:2"]["prompt"] == "One two"
    assert by_id["in.jsonl:2"]["completion"].split()[0] == str(size)
    kept = tokenizer(text)["input_ids"][:2]
    assert by_id["in.jsonl:1"]["text"].startswith(tokenizer.decode(kept) + "2 ")
    assert set(by_id["in.jsonl:3"]) == {"id", "prompt", "completion", "finished", "seed"}


def test_a_limit_may_grow(tmp_path: Path, tokenizer: Any) -> None:
    config = settings(tmp_path, *ROWS, limit=3)
    assert run(config, Scripted(tokenizer)).rows == 3
    assert run(replace(config, limit=None), Scripted(tokenizer)).written == 4
    grown = Path(config.out).read_bytes()
    run(replace(config, limit=None, out=str(tmp_path / "other.jsonl")), Scripted(tokenizer))
    assert (tmp_path / "other.jsonl").read_bytes() == grown


def test_other_settings_data_or_files_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    config = settings(tmp_path, *ROWS)
    run(config, Scripted(tokenizer))
    before = Path(config.out).read_bytes()
    with pytest.raises(DataError, match=r"other settings \(batch, temperature\)"):
        run(replace(config, batch=3, temperature=0.5), Scripted(tokenizer))
    with pytest.raises(DataError, match=r"other settings \(the data's rows\)"):
        run(settings(tmp_path, *ROWS[:5], chat("new"), ROWS[6]), Scripted(tokenizer))
    config = settings(tmp_path, *ROWS)
    Path(config.out).write_bytes(b'{"id": "other"}\n' + before)
    with pytest.raises(DataError, match="holds other rows"):
        run(config, Scripted(tokenizer))
    (tmp_path / "out.jsonl.settings.json").write_text("[")
    with pytest.raises(DataError, match="cannot be read as the settings"):
        run(config, Scripted(tokenizer))
    (tmp_path / "out.jsonl.settings.json").unlink()
    with pytest.raises(DataError, match="was not written by this command"):
        run(config, Scripted(tokenizer))
    assert Path(config.out).read_bytes() == b'{"id": "other"}\n' + before


def test_a_prompt_without_room_for_an_answer_is_left_out_or_an_error(tmp_path: Path, tokenizer: Any) -> None:
    config = settings(tmp_path, chat("word " * 60), chat("short"), max_new_tokens=10)
    assert run(config, Scripted(tokenizer, positions=50)).too_long == 1
    assert len(lines(config)) == 1
    strict = replace(config, data=replace(config.data, too_long="error"))
    with pytest.raises(DataError, match=r"in\.jsonl, line 1: a prompt of \d+ tokens; at most 40"):
        run(strict, Scripted(tokenizer, positions=50))
    with pytest.raises(DataError, match="leaves no room for a prompt"):
        run(config, Scripted(tokenizer, positions=10))
    with pytest.raises(DataError, match="no row is left to answer"):
        run(settings(tmp_path, chat("word " * 60), max_new_tokens=10), Scripted(tokenizer, positions=50))


def test_the_file_can_be_trained_on(tmp_path: Path, tokenizer: Any) -> None:
    config = settings(tmp_path, *ROWS)
    run(config, Scripted(tokenizer))
    found = load_examples(DataConfig(files=(config.out,), held_out=0), tokenizer)
    assert len(found.train) == len(ROWS)
