"""A store of token ids on disk that finds where the last tokens of a text occurred, and what followed (REST, arXiv 2311.08252)."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from mmap import ACCESS_READ, mmap
from pathlib import Path
from struct import pack, unpack
from typing import Any

import numpy as np

from specdec.errors import CheckpointError, VocabularyMismatchError

KIND = "specdec datastore"
VERSION = 1
META, TOKENS, SUFFIXES, STARTS = "meta.json", "tokens.npy", "suffixes.npy", "starts.npy"
# A model's embedding may be padded beyond its tokenizer, commonly by up to some hundred rows; far more is another vocabulary.
_PADDING, _PADDING_SHARE = 1024, 16


@dataclass(frozen=True, slots=True)
class DatastoreMeta:
    """What meta.json says. vocabulary: ids are below it.  num_tokens: separators left out.

    tokenizer: see `tokenizer_fingerprint`; empty when unknown.  order: suffixes are sorted by this many tokens.
    """

    vocabulary: int
    num_tokens: int
    num_documents: int
    order: int
    tokenizer: str = ""
    kind: str = KIND
    version: int = VERSION

    def to_json(self) -> str:
        """The text of meta.json."""
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True, slots=True)
class Occurrences:
    """Where the last `length` tokens of a text occur: places first to end - 1 of the sorted suffixes. length 0: nowhere."""

    length: int = 0
    first: int = 0
    end: int = 0

    @property
    def count(self) -> int:
        """How often they occur."""
        return self.end - self.first


class Datastore:
    """Documents as token ids and their sorted suffixes, both memory-mapped: opening reads no more than the headers.

    The folder holds `tokens.npy` (each document reversed, so that the end of a text is the beginning of a suffix; between two,
    and at both ends, the separator, which is the id `vocabulary`; big-endian, so that the order of the bytes is the order of
    the tokens), `suffixes.npy` (where each suffix begins, sorted), `starts.npy` (the first suffix of each token) and
    `meta.json`. Nothing in it is pickled. No match crosses from one document into the next.
    """

    def __init__(self, path: str | Path) -> None:
        """path: a folder written by `build_datastore`. Raises CheckpointError when it is not one, or is damaged."""
        self.path = Path(path)
        self.meta = _read_meta(self.path)
        tokens, suffixes, starts = (_mapped(self.path / name) for name in (TOKENS, SUFFIXES, STARTS))
        _check_arrays(self.path, self.meta, tokens, suffixes, starts)
        # The same memory without the cost that numpy's subclass, or numpy itself, has for each element.
        self._tokens, self._suffixes = np.asarray(tokens), np.asarray(suffixes)
        self._places, self._starts = _view(suffixes), _view(starts)
        self._width = tokens.dtype.itemsize
        self._letter = "H" if self._width == 2 else "I"
        self._offset = tokens.offset
        with (self.path / TOKENS).open("rb") as file:
            self._bytes = mmap(file.fileno(), 0, access=ACCESS_READ)

    def check_vocabulary(self, vocabulary: int) -> None:
        """Raises VocabularyMismatchError when the store was plainly not made for a target with this vocabulary.

        Sizes tell no more than that: two tokenizers of one size pass. `check_tokenizer` tells them apart.
        """
        own = self.meta.vocabulary
        if not own <= vocabulary <= own + max(_PADDING, own // _PADDING_SHARE):
            raise VocabularyMismatchError(
                f"datastore {self.path} was built with a vocabulary of {own} tokens, the target has {vocabulary}; "
                "build one with the target's own tokenizer: specdec datastore build"
            )

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raises VocabularyMismatchError when the store was built with another tokenizer than this."""
        if self.meta.tokenizer and self.meta.tokenizer != tokenizer_fingerprint(tokenizer):
            raise VocabularyMismatchError(
                f"datastore {self.path} was built with another tokenizer than the one given; build it anew with this one"
            )

    def longest(self, text: Sequence[int], least: int = 1, most: int = 16) -> Occurrences:
        """The longest suffix of the text, of `least` to `most` tokens, that occurs here. More than `meta.order` is not looked up.

        Three binary searches, O(log tokens): where the reversed suffix would stand, one of its neighbours shares the longest
        beginning with it; then the first and the last that share as much.
        """
        tail = self._known(text[-min(most, self.meta.order) :])[::-1]
        if not 1 <= least <= min(most, len(tail)):
            return Occurrences()
        start, end = self._starts[tail[0]], self._starts[tail[0] + 1]
        at = self._search(tail, start, end)
        neighbours = self._places[max(at - 1, start) : min(at + 1, end)]
        length = max((self._agreement(tail, place) for place in neighbours), default=0)
        if length < least:
            return Occurrences()
        shared = tail[:length]
        return Occurrences(length, self._search(shared, start, at), self._search(shared, at, end, behind=True))

    def continuations(self, found: Occurrences, depth: int, most: int) -> list[list[int]]:
        """What followed: up to `depth` tokens after each of at most `most` occurrences, taken evenly from the sorted ones.

        A continuation ends with its document, so it may be shorter, or empty.
        """
        if found.count > most:
            picked = self._suffixes[found.first + np.arange(most) * found.count // most]
        else:
            picked = self._suffixes[found.first : found.end]
        # Documents lie reversed, and a separator comes first: what lies before the beginning reads as one.
        places = picked.astype(np.int64)[:, None] - np.arange(1, depth + 1)
        block = self._tokens.take(places, mode="clip")
        rows: list[list[int]] = block.tolist()
        ended = block.size and block.max() >= self.meta.vocabulary
        return [_cut(row, self.meta.vocabulary) for row in rows] if ended else rows

    def _known(self, tail: Sequence[int]) -> Sequence[int]:
        """The part of the tail behind its last id that is not of this vocabulary, the separator among them."""
        for back in range(len(tail) - 1, -1, -1):
            if not 0 <= tail[back] < self.meta.vocabulary:
                return tail[back + 1 :]
        return tail

    def _search(self, tail: Sequence[int], start: int, end: int, *, behind: bool = False) -> int:
        """Where the tail belongs among the sorted suffixes start to end - 1: before those that begin with it, or behind them."""
        pattern = pack(f">{len(tail)}{self._letter}", *tail)
        data, width, offset, size = self._bytes, self._width, self._offset, len(pattern)

        def begin(place: int) -> bytes:
            at = offset + place * width
            return data[at : at + size]

        return (bisect_right if behind else bisect_left)(self._places, pattern, start, end, key=begin)

    def _agreement(self, tail: Sequence[int], place: int) -> int:
        """How many tokens from this place on are those of the tail."""
        at = self._offset + place * self._width
        there = self._bytes[at : at + len(tail) * self._width]
        tokens = unpack(f">{len(there) // self._width}{self._letter}", there)
        return next((n for n, (a, b) in enumerate(zip(tail, tokens, strict=False)) if a != b), min(len(tail), len(tokens)))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Equal for two tokenizers when they give every token, added ones included, the same id: SHA-256 of the sorted vocabulary."""
    entries = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(entries, ensure_ascii=True).encode()).hexdigest()


def token_dtype(vocabulary: int) -> np.dtype[Any]:
    """The narrowest big-endian type that holds every id and the separator."""
    return np.dtype(">u2" if vocabulary < 1 << 16 else ">u4")


def place_dtype(places: int) -> np.dtype[Any]:
    """The narrowest native type that holds a place among so many tokens."""
    return np.dtype(np.uint32 if places < 1 << 32 else np.uint64)


def _cut(row: list[int], vocabulary: int) -> list[int]:
    for i, token in enumerate(row):
        if token >= vocabulary:
            return row[:i]
    return row


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"datastore {path}: {why}; build it anew: specdec datastore build --overwrite")


def _read_meta(path: Path) -> DatastoreMeta:
    if not (path / META).is_file():
        raise CheckpointError(f"{path} is not a datastore: it has no {META}; make one with: specdec datastore build")
    try:
        values = json.loads((path / META).read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, f"{META} is not JSON ({error})") from error
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise CheckpointError(f"{path} is not a datastore: its {META} is of something else")
    if values.get("version") != VERSION:
        raise _damaged(path, f"format version {values.get('version')!r} is not {VERSION}, the one that is read here")
    kinds = {f.name: (str if f.name in ("kind", "tokenizer") else int) for f in fields(DatastoreMeta)}
    if values.keys() != kinds.keys() or any(type(values[name]) is not kind for name, kind in kinds.items()):
        raise _damaged(path, f"{META} has missing, unknown or wrong entries")
    return DatastoreMeta(**values)


def _view(array: Any) -> memoryview[int]:
    return memoryview(array)


def _mapped(path: Path) -> np.memmap[Any, Any]:
    try:
        array: np.memmap[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path.parent, f"{path.name} cannot be read ({error})") from error
    return array


def _check_arrays(path: Path, meta: DatastoreMeta, *arrays: np.ndarray[Any, Any]) -> None:
    """The sizes and types that meta.json implies; contents are not read."""
    total = meta.num_tokens + meta.num_documents + 1
    place = place_dtype(total)
    expected = ((total, token_dtype(meta.vocabulary)), (meta.num_tokens, place), (meta.vocabulary + 1, place))
    for name, array, (size, dtype) in zip((TOKENS, SUFFIXES, STARTS), arrays, expected, strict=True):
        if array.shape != (size,) or array.dtype != dtype or not size:
            raise _damaged(path, f"{name} holds {array.dtype} {list(array.shape)} where {dtype} [{size}] is expected")
