"""A datastore finds what a search of every document would find, and appears whole or not at all."""

from __future__ import annotations

import json
import lzma
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from specdec.bundled import bundled_path
from specdec.cli import app
from specdec.drafters.datastore import Datastore, tokenizer_fingerprint
from specdec.drafters.datastore_build import ORDER, build_datastore, sorted_suffixes
from specdec.drafters.retrieval import Stored
from specdec.errors import CheckpointError, SpecDecError, VocabularyMismatchError
from specdec.loading import load_tokenizer

pytestmark = pytest.mark.slow

V = 4
# Ids beyond 16 bits take the other width.
VOCABULARIES = (V, 70_000)


def _documents(seed: int = 0, vocabulary: int = V, lengths: tuple[int, ...] = (60, 1, 33, 0, 7)) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [(generator.integers(0, V, n) + vocabulary - V).tolist() for n in lengths]


def _occurrences(documents: list[list[int]], piece: list[int]) -> list[tuple[int, ...]]:
    """What follows the piece, to the end of its document, wherever it stands."""
    size = len(piece)
    return [tuple(d[i + size :]) for d in documents for i in range(len(d) - size + 1) if d[i : i + size] == piece]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_longest_match_and_what_follows_are_those_of_a_full_search(tmp_path: Path, vocabulary: int) -> None:
    documents = _documents(vocabulary=vocabulary)
    store = build_datastore(tmp_path / "store", documents, vocabulary)
    lengths = set()
    for text in _documents(1, vocabulary, (11,) * 300):
        expected = max(n for n in range(0, 9) if _occurrences(documents, text[-n:] if n else []))
        found = store.longest(text, 1, 8)
        lengths.add(found.length)
        assert found.length == expected
        following = _occurrences(documents, text[-expected:])
        assert found.count == len(following)
        assert Counter(map(tuple, store.continuations(found, 5, 100))) == Counter(row[:5] for row in following)
    assert len(lengths) > 2


def test_a_text_of_the_store_is_found_at_full_length(tmp_path: Path) -> None:
    document = _documents(2, lengths=(400,))[0]
    store = build_datastore(tmp_path / "store", [document], V)
    assert store.longest(document[:300], 1, 50).length == 50
    assert store.longest(document[:300], 1, 1000).length == ORDER
    assert store.continuations(store.longest(document[:300], 1, 50), 4, 9) == [document[300:304]]


def test_too_short_a_match_and_unknown_tokens_are_no_match(tmp_path: Path) -> None:
    store = build_datastore(tmp_path / "store", [[0, 1, 2, 3]], 5)
    assert store.longest([9, 4, 1, 2], 2, 8).length == 2
    assert store.longest([0, 1, 3], 2, 8).length == 0
    assert store.longest([1, 5], 1, 8).length == 0, "the separator is not a token of a text"
    assert store.longest([1, -1], 1, 8).length == 0
    assert store.longest([], 1, 8).length == 0
    assert store.longest([4], 1, 8).length == 0, "an id that no document holds"


def test_no_match_and_no_continuation_crosses_documents(tmp_path: Path) -> None:
    store = build_datastore(tmp_path / "store", [[0, 1], [2, 3], [0, 1]], V)
    assert store.longest([0, 1, 2], 1, 8).length == 1
    found = store.longest([0, 1], 2, 8)
    assert found.count == 2
    assert store.continuations(found, 4, 9) == [[], []]
    assert store.continuations(store.longest([2], 1, 8), 4, 9) == [[3]]


def test_at_most_so_many_occurrences_are_taken_evenly(tmp_path: Path) -> None:
    documents = [[0, 1, 2]] * 6 + [[3, 1, 2]] * 2 + [[0, 1, 3]] * 2
    store = build_datastore(tmp_path / "store", documents, V)
    found = store.longest([1], 1, 8)
    assert found.count == 10
    taken = store.continuations(found, 1, 5)
    assert len(taken) == 5
    assert Counter(map(tuple, taken)) == {(2,): 4, (3,): 1}


def test_counts_become_a_tree_best_first(tmp_path: Path) -> None:
    documents = [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 3, 0]]
    source = Stored(build_datastore(tmp_path / "store", documents, V), 2, 16)
    assert source.longest([0, 1]) == 2
    assert source.tree(9, 9, 2) == ([2, 3, 3, 0], [0, 1, 0, 3])
    assert source.tree(9, 9, 1) == ([2, 3], [0, 1])
    assert source.tree(2, 9, 2) == ([2, 3], [0, 1])
    assert source.tree(9, 1, 2) == ([2, 3], [0, 0])


@pytest.mark.parametrize("tokens", ["random", "the same", "period"])
def test_suffixes_are_in_order(tokens: str) -> None:
    text = {"random": _documents(3, lengths=(500,))[0], "the same": [1] * 300, "period": [0, 1, 1] * 100}[tokens]
    order = sorted_suffixes(np.array(text, np.uint32), V, 8)
    assert sorted(order.tolist()) == list(range(len(text)))
    heads = [text[i : i + 8] for i in order]
    # The end of the text is not a document's end: only whole heads have their place by what they say.
    whole = [head for head in heads if len(head) == 8]
    assert whole == sorted(whole)


def test_opening_maps_the_files_again(tmp_path: Path) -> None:
    documents = _documents()
    first = build_datastore(tmp_path / "store", documents, V, tokenizer="abc")
    again = Datastore(str(tmp_path / "store"))
    assert again.meta == first.meta
    assert (again.meta.num_tokens, again.meta.num_documents) == (101, 4)
    text = documents[0][:20]
    assert again.longest(text) == first.longest(text)
    assert isinstance(np.load(tmp_path / "store" / "tokens.npy", mmap_mode="r", allow_pickle=False), np.memmap)


def test_a_build_that_fails_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    def broken() -> Iterator[list[int]]:
        yield [1, 2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_datastore(tmp_path / "store", broken(), V)
    with pytest.raises(SpecDecError, match="0 to 3"):
        build_datastore(tmp_path / "store", [[1], [4]], V)
    with pytest.raises(SpecDecError, match="nothing to store"):
        build_datastore(tmp_path / "store", [[]], V)
    assert not list(tmp_path.iterdir())
    build_datastore(tmp_path / "store", [[1, 2, 3]], V)
    with pytest.raises(SpecDecError, match="exists"):
        build_datastore(tmp_path / "store", [[1, 2]], V)
    with pytest.raises(KeyboardInterrupt):
        build_datastore(tmp_path / "store", broken(), V, overwrite=True)
    assert Datastore(tmp_path / "store").meta.num_tokens == 3
    assert build_datastore(tmp_path / "store", [[1, 2]], V, overwrite=True).meta.num_tokens == 2
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_write_that_fails_keeps_the_old_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_datastore(tmp_path / "store", [[1, 2, 3]], V)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="no space"):
        build_datastore(tmp_path / "store", [[1]], V, overwrite=True)
    assert Datastore(tmp_path / "store").meta.num_tokens == 3
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_another_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(SpecDecError, match="not a datastore"):
        build_datastore(tmp_path / "mine", [[1]], V, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"version": 99}, "version 99"),
        ({"kind": "else"}, "something else"),
        ({"num_tokens": "many"}, "wrong entries"),
        ({"extra": 1}, "wrong entries"),
        ({"num_tokens": 7}, "is expected"),
        ({"vocabulary": 70_000}, "is expected"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_meta_file_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    build_datastore(tmp_path / "store", _documents(), V)
    meta = tmp_path / "store" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | change))
    with pytest.raises(CheckpointError, match=what):
        Datastore(tmp_path / "store")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    build_datastore(tmp_path / "store", _documents(), V)
    with pytest.raises(CheckpointError, match="not a datastore"):
        Datastore(tmp_path)
    for name, text in {"meta.json": b"{", "tokens.npy": b"", "suffixes.npy": b"\x80\x04N.", "starts.npy": None}.items():
        copy = tmp_path / name.replace(".", "-")
        shutil.copytree(tmp_path / "store", copy)
        if text is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(text)
        with pytest.raises(CheckpointError, match=name):
            Datastore(copy)
    pickled = tmp_path / "store" / "tokens.npy"
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"tokens\.npy"):
        Datastore(tmp_path / "store")


def test_another_target_is_told(tmp_path: Path) -> None:
    store = build_datastore(tmp_path / "store", _documents(vocabulary=20_000), 20_000, tokenizer="abc")
    store.check_vocabulary(20_000)
    store.check_vocabulary(20_480)  # an embedding padded to a round number
    for other in (19_999, 32_000):
        with pytest.raises(VocabularyMismatchError, match=str(other)):
            store.check_vocabulary(other)
    with pytest.raises(VocabularyMismatchError, match="another tokenizer"):
        store.check_tokenizer(load_tokenizer(bundled_path("target")))


def _invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["datastore", *map(str, arguments)], env={"COLUMNS": "300"})


def _corpus(folder: Path) -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "story.txt").write_text("Once upon a time, there was a little girl.\n")
    (folder / "deep" / "code.py").write_text("def double(number):\n    return 2 * number\n")
    (folder / "empty.md").write_text("")
    (folder / "picture.bin").write_bytes(b"\x89PNG\x00\xff")
    (folder / ".hidden" / "secret.txt").write_text("secret secret secret")
    talk = {"messages": [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Good morning to you"}]}
    lines = json.dumps({"text": "A line\u2028of separators", "id": 3}) + "\n\n" + json.dumps(talk) + "\n"
    (folder / "talk.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    return folder


def test_the_command_builds_what_the_tokenizer_says(tmp_path: Path) -> None:
    done = _invoke("build", tmp_path / "store", "--tokenizer", bundled_path("target"), _corpus(tmp_path / "corpus"))
    assert done.exit_code == 0, done.exception
    assert "skipped 1 file(s)" in done.output
    assert "picture.bin" in done.output
    store, tokenizer = Datastore(tmp_path / "store"), load_tokenizer(bundled_path("target"))
    assert tokenizer is not None
    store.check_tokenizer(tokenizer)
    assert store.meta.tokenizer == tokenizer_fingerprint(tokenizer)
    assert store.meta.num_documents == 4
    for text in ("Once upon a time, there was a little girl.\n", "def double(number):\n    return 2 * number\n"):
        ids = tokenizer(text)["input_ids"]
        found = store.longest(ids[:5], 5)
        assert store.continuations(found, len(ids), 9) == [ids[5:]]
    talk = tokenizer("Good morning to you", add_special_tokens=False)["input_ids"]
    assert store.longest(talk, len(talk)).length >= len(talk)
    secret = tokenizer("secret secret secret", add_special_tokens=False)["input_ids"]
    assert store.longest(secret).length < len(secret)
    told = _invoke("info", tmp_path / "store")
    assert str(store.meta.num_tokens) in told.output
    again = _invoke("build", tmp_path / "store", tmp_path / "corpus")
    assert "exists" in str(again.exception)
    assert _invoke("build", tmp_path / "store", tmp_path / "corpus", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"a.txt": b""}, "nothing to store"),
        ({"a.bin": b"\xff\xfe", "b.bin": b"\x00"}, r"none of the 2 files is text: .*a\.bin, .*b\.bin"),
        ({"a.jsonl": b'{"text": "fine"}\n{"text": '}, r"a\.jsonl, line 2: not JSON"),
        ({"a.jsonl": b'\n{"texts": "fine"}\n'}, r"a\.jsonl, line 2: has neither"),
        ({"a.jsonl": b'{"messages": ["hello"]}'}, r"a\.jsonl, line 1: has neither"),
        ({"a.jsonl": b"[]"}, r"a\.jsonl, line 1: has neither"),
        ({"a.jsonl.xz": b"not packed"}, r"a\.jsonl\.xz cannot be read"),
        ({".a.txt": b"hidden"}, "no files there"),
    ],
    ids=["empty", "binary", "broken JSON", "no text", "no messages", "a list", "broken xz", "no files"],
)
def test_the_command_tells_what_is_wrong(tmp_path: Path, files: dict[str, bytes], what: str) -> None:
    (tmp_path / "corpus").mkdir()
    for name, data in files.items():
        (tmp_path / "corpus" / name).write_bytes(data)
    done = _invoke("build", tmp_path / "store", tmp_path / "corpus")
    assert isinstance(done.exception, SpecDecError)
    with pytest.raises(SpecDecError, match=what):
        raise done.exception
    assert not (tmp_path / "store").exists()


def test_the_command_tells_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert "missing.txt" in str(_invoke("build", tmp_path / "store", tmp_path / "missing.txt").exception)
    done = _invoke("build", tmp_path / "store", tmp_path / "a.txt", "--tokenizer", tmp_path)
    assert isinstance(done.exception, CheckpointError)
    assert "no tokenizer" in str(done.exception)
    assert isinstance(_invoke("info", tmp_path).exception, CheckpointError)
