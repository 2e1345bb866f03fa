"""Building a datastore: documents in, a folder of memory-mapped arrays out, all of it or nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from specdec.drafters.datastore import (
    META,
    STARTS,
    SUFFIXES,
    TOKENS,
    Datastore,
    DatastoreMeta,
    place_dtype,
    token_dtype,
)
from specdec.errors import SpecDecError

# Longest match that can be looked up.
ORDER = 64
Array = np.ndarray[Any, Any]
# Told (tokens whose place is known, all tokens) while the suffixes are sorted.
Progress = Callable[[int, int], None]


def build_datastore(
    out: str | Path,
    documents: Iterable[Sequence[int]],
    vocabulary: int,
    *,
    tokenizer: str = "",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Datastore:
    """Write the documents' tokens and sorted suffixes to the folder `out`, and open it.

    The folder appears complete or not at all: it is written beside its place and renamed. documents: token ids below
    `vocabulary`, read once; empty ones are left out.  tokenizer: its fingerprint.  overwrite: replace an older datastore,
    never another folder. Needs about 50 bytes of memory a token; see `sorted_suffixes` for the time.
    Raises SpecDecError when there is nothing to store, an id is out of range, or `out` exists.
    """
    out = Path(out)
    check_out(out, overwrite)
    tokens, count = _joined(documents, vocabulary)
    meta = DatastoreMeta(vocabulary, len(tokens) - count - 1, count, ORDER, tokenizer)
    suffixes = sorted_suffixes(tokens, vocabulary + 1, ORDER, progress)
    # Separators are the greatest token, so theirs are the last.
    suffixes = suffixes[: meta.num_tokens]
    counts = np.bincount(tokens, minlength=vocabulary)[:vocabulary]
    starts = np.concatenate(([0], np.cumsum(counts)))
    place = place_dtype(len(tokens))
    arrays = {TOKENS: tokens.astype(token_dtype(vocabulary)), SUFFIXES: suffixes.astype(place), STARTS: starts.astype(place)}
    _write(out, arrays, meta)
    return Datastore(out)


def check_out(out: Path, overwrite: bool) -> None:
    """Raises SpecDecError unless a datastore may be written to `out`: it is not there, or is one and may be replaced."""
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise SpecDecError(f"{out} exists; give another folder, or ask to overwrite it")
    if out.is_symlink() or not (out / META).is_file():
        raise SpecDecError(f"{out} exists and is not a datastore, so it is not overwritten; give another folder")


def sorted_suffixes(tokens: Array, base: int, depth: int, progress: Progress | None = None) -> Array:
    """Where each suffix begins, sorted by its first `depth` tokens at least, then by place. tokens: [n] below base.

    Prefix doubling (Manber and Myers, 1993), in which a round sorts only what is not told apart yet: O(n log n) each, at most
    1 + log2(depth) rounds however repetitive the text is.
    """
    size = len(tokens)
    key, told = _packed(tokens, base)
    order = np.argsort(key, kind="stable")
    rank = np.empty(size, np.int64)
    rank[order] = _group_starts(key[order], np.arange(size))
    del key
    open_ = np.flatnonzero(_shared(rank[order]))
    while len(open_) and told < depth:
        if progress is not None:
            progress(size - len(open_), size)
        places = order[open_]
        after = places + told
        second = np.where(after < size, rank[np.minimum(after, size - 1)] + 1, 0)
        both = rank[places] * (size + 1) + second
        by_both = np.argsort(both, kind="stable")
        order[open_] = places[by_both]
        ranks = _group_starts(both[by_both], open_)
        rank[order[open_]] = ranks
        open_ = open_[_shared(ranks)]
        told *= 2
    if progress is not None:
        progress(size, size)
    return order


def _packed(tokens: Array, base: int) -> tuple[Array, int]:
    """As many tokens from each place on as an int64 holds, in one number, and how many these are."""
    bits = max(1, (base - 1).bit_length())
    count = 63 // bits
    # A depth that is no power of two times this is passed, never missed.
    key = np.zeros(len(tokens), np.int64)
    padded = np.concatenate((tokens, np.zeros(count, tokens.dtype))).astype(np.int64)
    for i in range(count):
        key = (key << bits) | padded[i : i + len(tokens)]
    return key, count


def _group_starts(keys: Array, places: Array) -> Array:
    """For each of the sorted keys the place of the first that equals it."""
    new = np.concatenate(([True], keys[1:] != keys[:-1]))
    return places[np.maximum.accumulate(np.where(new, np.arange(len(keys)), 0))]


def _shared(ranks: Array) -> Array:
    """Which of the sorted ranks are not alone."""
    same = ranks[1:] == ranks[:-1]
    return np.concatenate(([False], same)) | np.concatenate((same, [False]))


def _joined(documents: Iterable[Sequence[int]], vocabulary: int) -> tuple[Array, int]:
    """A separator, then every document reversed and a separator behind it, and how many documents there are."""
    separator = np.array([vocabulary], np.uint32)
    parts: list[Array] = [separator]
    for number, document in enumerate(documents):
        ids = np.asarray(document, np.int64)
        if not len(ids):
            continue
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise SpecDecError(
                f"document {number + 1} holds token ids from {ids.min()} to {ids.max()}; they must lie in 0 to {vocabulary - 1}"
            )
        parts += [ids[::-1].astype(np.uint32), separator]
    if len(parts) == 1:
        raise SpecDecError("there is nothing to store: every document is empty; give some text")
    return np.concatenate(parts), len(parts) // 2


def _write(out: Path, arrays: dict[str, Array], meta: DatastoreMeta) -> None:
    """Into a folder beside `out`, which then takes its name; an older datastore stays until that moment."""
    out.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid4().hex[:8]
    building, old = (out.with_name(f".{out.name}.{mark}.{what}") for what in ("building", "old"))
    building.mkdir()
    try:
        for name, array in arrays.items():
            np.save(building / name, array, allow_pickle=False)
        (building / META).write_text(meta.to_json(), encoding="utf-8")
        if out.exists():
            out.rename(old)
        building.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
