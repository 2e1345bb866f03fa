"""Training data: what a row becomes, which of its tokens are trained on, what is refused, and the split."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from specdec import bundled_path
from specdec.errors import SpecDecError
from specdec.training.chat import encode_chat, prompt_ids
from specdec.training.config import DataConfig
from specdec.training.data import DataError, Example, data_tokenizer, encode_row, load_examples, read_rows

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <there>, ünïcödé 🙂?"},
    {"role": "assistant", "content": "Hello! 日本"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "end"},
]
# As Qwen3's: the last answer gets an empty block for thoughts, the earlier ones do not.
THOUGHTS = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content.strip() }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As DeepSeek's: the generation prompt opens a block that the rendered answer does not have.
OPENED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}"
)
BLOCKS = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
STRICT = (
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
HIDDEN = "{% for m in messages %}{{ loop.index }} of {{ messages | length }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(bundled_path("target")))


@pytest.fixture
def templated(tokenizer: Any) -> Any:
    own = AutoTokenizer.from_pretrained(str(bundled_path("target")))

    def use(template: str | None) -> Any:
        own.chat_template = template
        return own

    return use


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def said(tokenizer: Any, ids: Any, mask: Any) -> list[str]:
    """The text of each run of tokens that are trained on."""
    runs: list[list[int]] = []
    for i, token in enumerate(ids.tolist()):
        if mask[i]:
            if i == 0 or not mask[i - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def one(config: DataConfig, tokenizer: Any) -> Example:
    (row,) = read_rows(config)
    return encode_row(row, tokenizer, config)


def test_the_assistants_tokens_are_trained_on_and_nothing_else(tokenizer: Any) -> None:
    ids, mask = encode_chat(tokenizer, CHAT)
    whole = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert ids.tolist() == whole
    assert said(tokenizer, ids, mask) == ["Hello! 日本<|end|>\n", "end<|end|>\n"]
    first = int(mask.argmax())
    assert ids[:first].tolist() == prompt_ids(tokenizer, CHAT[:2])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (THOUGHTS, ["Hello! 日本<|end|>\n", "<think>\n\n</think>\n\nend<|end|>\n"]),
        (OPENED, ["Hello! 日本<|end|>\n", "end<|end|>\n"]),
        (BLOCKS, ["Hello! 日本<|end|>", "end<|end|>"]),
    ],
)
def test_templates_that_render_the_last_turn_in_another_way(templated: Any, template: str, expected: list[str]) -> None:
    tokenizer = templated(template)
    ids, mask = encode_chat(tokenizer, CHAT)
    assert ids.tolist() == tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert said(tokenizer, ids, mask) == expected


def test_a_tokenizer_without_offsets_marks_the_same_tokens(tokenizer: Any) -> None:
    class Slow:
        is_fast = False
        chat_template = tokenizer.chat_template

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, text: str, **kwargs: Any) -> Any:
            assert "return_offsets_mapping" not in kwargs
            return tokenizer(text, **kwargs)

    expected, got = encode_chat(tokenizer, CHAT), encode_chat(Slow(), CHAT)
    assert all((a == b).all() for a, b in zip(expected, got, strict=True))


def test_every_form_of_a_row(tokenizer: Any, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "name": None}]
    rows = ({"conversations": turns}, {"messages": chat}, {"prompt": chat[:1], "completion": chat[1:]})
    examples = [one(DataConfig(files=(jsonl(tmp_path / f"{i}.jsonl", row),)), tokenizer) for i, row in enumerate(rows)]
    assert len({e.ids.tobytes() for e in examples}) == len({e.loss_mask.tobytes() for e in examples}) == 1
    pair = one(DataConfig(files=(jsonl(tmp_path / "p.jsonl", {"prompt": "One two", "completion": " three"}),)), tokenizer)
    assert said(tokenizer, pair.ids, pair.loss_mask) == [" three<|end|>"]
    text = one(DataConfig(files=(jsonl(tmp_path / "t.jsonl", {"story": "Once upon"}),), text_field="story"), tokenizer)
    assert said(tokenizer, text.ids, text.loss_mask) == ["Once upon<|end|>"]
    everything = one(DataConfig(files=(str(tmp_path / "p.jsonl"),), loss_on="all"), tokenizer)
    assert everything.loss_mask.all()
    assert everything.key == pair.key


def test_an_end_of_sequence_stays_a_label_when_padding_has_the_same_id(templated: Any, tmp_path: Path) -> None:
    tokenizer = templated(None)
    tokenizer.pad_token = tokenizer.eos_token
    example = one(DataConfig(files=(jsonl(tmp_path / "t.jsonl", {"text": "Once"}),)), tokenizer)
    assert example.ids[-1] == tokenizer.eos_token_id
    assert example.loss_mask[-1]


def test_the_end_of_an_answer_that_a_limit_cut_is_no_label(tokenizer: Any, tmp_path: Path) -> None:
    config = DataConfig(files=(jsonl(tmp_path / "t.jsonl", {"messages": CHAT, "finished": False}),))
    example = one(config, tokenizer)
    assert said(tokenizer, example.ids, example.loss_mask) == ["Hello! 日本<|end|>\n", "end"]


def test_all_kinds_of_files_give_the_same_rows(tmp_path: Path) -> None:
    rows = [{"text": f"row {i} ü\u2028x"} for i in range(5)]
    plain = Path(jsonl(tmp_path / "a.jsonl", *rows)).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(b"\xef\xbb\xbf" + plain + b"\n"))
    (tmp_path / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "e.json").write_bytes(plain)
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "f.parquet"))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "g"))
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "h"))
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "part.jsonl").write_bytes(plain)
    for path in sorted(tmp_path.iterdir()):
        got = [row.value for row in read_rows(DataConfig(files=(str(path),), seed=7))]
        assert sorted(value["text"] for value in got) == [row["text"] for row in rows], path.name


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", r"a\.jsonl holds no rows"),
        ("a.json", b"", r"a\.json holds no rows"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": }\n', r"a\.jsonl, line 3: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a\.jsonl, line 2: a list; each row has to be an object"),
        ("a.json", b'{"text": "x"}', r"a\.json holds one dict"),
        ("a.json", b'[{"text": "x"', r"a\.json: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: byte 24 of the file is not UTF-8"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16"), r"a\.jsonl, line 1: byte 0 of the file is not UTF-8"),
        ("a.jsonl.gz", b'{"text": "x"}', r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-9], r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "x"}\n' * 9)[:-9], r"a\.jsonl\.xz cannot be read"),
        ("a.parquet", b"PAR", r"a\.parquet cannot be read as Parquet"),
        ("a.csv", b"x", r"a\.csv ends in \.csv; known are"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_place(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected):
        read_rows(DataConfig(files=(str(tmp_path / name),)))


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    for files, expected in (
        ((), "data.files is empty"),
        ((str(tmp_path),), "folder without"),
        (("data/train.jsonl",), "data/train.jsonl does not exist"),
        (("nothing",), "nothing does not exist"),
    ):
        with pytest.raises(DataError, match=expected):
            read_rows(DataConfig(files=files))
    datasets.DatasetDict({"test": datasets.Dataset.from_list([{"text": "x"}])}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match="no split 'train'; its splits are test"):
        read_rows(DataConfig(files=(str(tmp_path / "d"),)))


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        ("own", {"question": "x"}, "the fields are question; needed is"),
        ("own", {"text": ""}, "the fields are text; needed is"),
        ("own", {"prompt": "x"}, 'there is a "prompt" and no "completion"'),
        ("own", {"messages": []}, "a list of messages, one or more"),
        ("own", {"messages": [USER, {"role": "assistant"}]}, "message 2 is"),
        ("own", {"messages": [{"role": "User", "content": "a"}]}, "message 1 has the role 'User'; the roles are"),
        ("own", {"conversations": [{"from": "owl", "value": "a"}]}, "the role 'owl'"),
        ("own", {"messages": [ASSISTANT, USER]}, "the first turn is the assistant's"),
        ("own", {"messages": [USER]}, "no assistant turn to learn from"),
        (STRICT, {"messages": [USER, USER, ASSISTANT]}, "refuses the conversation: roles must alternate"),
        (HIDDEN, {"messages": [USER, ASSISTANT]}, "the assistant's part cannot be found"),
        (None, {"messages": [USER, ASSISTANT]}, "the tokenizer has no chat template"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    tokenizer: Any, templated: Any, tmp_path: Path, template: Any, row: Any, expected: str
) -> None:
    file = jsonl(tmp_path / "bad.jsonl", row)
    with pytest.raises(DataError, match=expected) as caught:
        one(DataConfig(files=(file,)), tokenizer if template == "own" else templated(template))
    assert f"{file}, line 1" in str(caught.value)
    assert isinstance(caught.value, SpecDecError)


def texts(tmp_path: Path, count: int) -> str:
    return jsonl(tmp_path / "many.jsonl", *({"text": f"story number {i}"} for i in range(count)))


def test_long_rows_are_cut_dropped_or_an_error_as_asked(tokenizer: Any, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "long.jsonl", {"text": "word " * 50}, {"text": "short one"})
    cut = load_examples(DataConfig(files=(file,), max_length=16, held_out=0), tokenizer)
    assert sorted(len(example.ids) for example in cut.train)[-1] == 16
    assert (cut.report.rows, cut.report.truncated, cut.report.dropped) == (2, 1, 0)
    dropped = load_examples(DataConfig(files=(file,), max_length=16, too_long="drop", held_out=0), tokenizer)
    assert (len(dropped.train), dropped.report.truncated, dropped.report.dropped) == (1, 0, 1)
    with pytest.raises(DataError, match=r"long\.jsonl, line 1: \d+ tokens, above data\.max_length 16"):
        load_examples(DataConfig(files=(file,), max_length=16, too_long="error", held_out=0), tokenizer)


def test_a_row_whose_answer_was_cut_away_is_left_out_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    long = [{"role": "user", "content": "word " * 50}, ASSISTANT]
    file = jsonl(tmp_path / "long.jsonl", {"messages": long}, {"messages": [USER, ASSISTANT]})
    found = load_examples(DataConfig(files=(file,), max_length=16, held_out=0), tokenizer)
    assert (len(found.train), found.report.without_loss) == (1, 1)
    only = jsonl(tmp_path / "only.jsonl", {"messages": long})
    with pytest.raises(DataError, match="no row is left for training"):
        load_examples(DataConfig(files=(only,), max_length=16, held_out=0), tokenizer)


def test_the_order_repeats_for_a_seed_and_changes_with_it(tokenizer: Any, tmp_path: Path) -> None:
    file = texts(tmp_path, 40)
    runs = [[e.source for e in load_examples(DataConfig(files=(file,), seed=seed), tokenizer).train] for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert len(read_rows(DataConfig(files=(file,), limit=7))) == 7


def test_the_split_shares_no_content_and_does_not_depend_on_the_order(tokenizer: Any, tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": f"q {i % 25}"}, {"role": "assistant", "content": f"{i}"}]} for i in range(100)
    ]
    file = jsonl(tmp_path / "chats.jsonl", *chats)
    splits = [load_examples(DataConfig(files=(file,), held_out=0.3, seed=seed), tokenizer) for seed in (0, 5)]
    for split in splits:
        assert len(split.train) + len(split.held_out) == 100
        assert not {e.key for e in split.train} & {e.key for e in split.held_out}
        assert 4 <= len(split.held_out) <= 60
    assert {e.source for e in splits[0].held_out} == {e.source for e in splits[1].held_out}
    small = load_examples(DataConfig(files=(file,), held_out=0.001), tokenizer)
    assert len(small.held_out) == 4, "all answers to one question, where the share is below one row"


def test_rows_of_held_out_files_are_taken_out_of_training(tokenizer: Any, tmp_path: Path) -> None:
    other = jsonl(tmp_path / "other.jsonl", {"text": "story number 3"}, {"text": "another"})
    found = load_examples(DataConfig(files=(texts(tmp_path, 10),), held_out_files=(other,)), tokenizer)
    assert (len(found.train), len(found.held_out), found.report.repeated) == (9, 2, 1)
    assert found.report.tokens == found.report.loss_tokens == sum(len(e.ids) for e in found.train)


def test_the_tokenizer_and_its_template_are_the_targets_unless_named(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(BLOCKS)
    assert data_tokenizer(DataConfig(), "bundled").chat_template != BLOCKS
    assert data_tokenizer(DataConfig(chat_template=str(tmp_path / "t.jinja")), "bundled").chat_template == BLOCKS
    with pytest.raises(DataError, match="name one by"):
        data_tokenizer(DataConfig(), str(tmp_path))
