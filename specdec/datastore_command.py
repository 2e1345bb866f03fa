"""`specdec datastore`: build one from texts with a tokenizer, and say what one holds."""

from __future__ import annotations

import lzma
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from specdec.bench.workloads import json_lines
from specdec.bundled import bundled_path
from specdec.drafters.datastore import Datastore, tokenizer_fingerprint
from specdec.drafters.datastore_build import build_datastore, check_out
from specdec.errors import SpecDecError
from specdec.loading import need_tokenizer

# A tokenizer is given this many characters at a time, cut behind a line.
_PIECE = 1 << 20
_NAMED = 5


def run_build(out: Path, inputs: Sequence[Path], tokenizer: str | None, overwrite: bool, console: Console) -> Datastore:
    """Build a datastore at `out` from files and folders; the bundled target's tokenizer by default.

    Raises SpecDecError for what the user can mend: nothing to read, broken JSON, a folder that is in the way.
    """
    check_out(out, overwrite)
    loaded = need_tokenizer(tokenizer or bundled_path("target"), "--tokenizer")
    files = _files(inputs)
    vocabulary = max(loaded.get_vocab().values()) + 1
    skipped: list[Path] = []
    with Progress(console=console, transient=True) as progress:
        texts = progress.add_task("reading", total=len(files))
        sorting = progress.add_task("sorting", total=1, visible=False)

        def documents() -> Iterator[list[int]]:
            for file in files:
                for document in _documents(file, skipped):
                    yield _encode(loaded, document)
                progress.advance(texts)
            if len(skipped) == len(files):
                raise SpecDecError(f"none of the {len(files)} files is text: {_named(skipped)}")

        store = build_datastore(
            out,
            documents(),
            vocabulary,
            tokenizer=tokenizer_fingerprint(loaded),
            overwrite=overwrite,
            progress=lambda done, total: progress.update(sorting, completed=done, total=total, visible=True),
        )
    if skipped:
        console.print(f"skipped {len(skipped)} file(s) that are not UTF-8 text: {_named(skipped)}", markup=False, highlight=False)
    console.print(f"{out}: {store.meta.num_tokens} tokens of {store.meta.num_documents} documents", markup=False, highlight=False)
    return store


def show_info(path: Path, console: Console) -> None:
    """Print what a datastore holds."""
    meta = Datastore(path).meta
    table = Table("what", str(path))
    table.add_row("tokens", str(meta.num_tokens))
    table.add_row("documents", str(meta.num_documents))
    table.add_row("vocabulary", str(meta.vocabulary))
    table.add_row("longest match", f"{meta.order} tokens")
    table.add_row("tokenizer", meta.tokenizer[:16] or "unknown")
    table.add_row("on disk", f"{sum(file.stat().st_size for file in path.iterdir()) / 1e6:.1f} MB")
    table.add_row("format", str(meta.version))
    console.print(table)


def _files(inputs: Sequence[Path]) -> list[Path]:
    """The files named, and those in the folders named, hidden ones left out, sorted within a folder."""
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += _walk(path)
        elif path.is_file():
            files.append(path)
        else:
            raise SpecDecError(f"{path}: no such file or folder; give text files, .jsonl files or folders of them")
    if not files:
        raise SpecDecError(
            f"{', '.join(map(str, inputs)) or 'nothing'}: no files there; give text files, .jsonl files or folders of them"
        )
    return files


def _walk(folder: Path) -> list[Path]:
    found: list[Path] = []
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(at, name) for name in sorted(names) if not name.startswith(".")]
    return [path for path in found if path.is_file()]


def _documents(file: Path, skipped: list[Path]) -> Iterator[Any]:
    """The documents of a file: a text, or a list of messages. A file that is not text gives none and is put among the skipped."""
    packed = file.suffix == ".xz"
    try:
        data = lzma.decompress(file.read_bytes()) if packed else file.read_bytes()
    except (OSError, lzma.LZMAError) as error:
        raise SpecDecError(f"{file} cannot be read: {error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        skipped.append(file)
    elif (file.with_suffix("") if packed else file).suffix == ".jsonl":
        yield from _lines(file, text)
    else:
        yield text


def _lines(file: Path, text: str) -> Iterator[Any]:
    for number, entry in json_lines(text, str(file)):
        entry = entry if isinstance(entry, dict) else {}
        if isinstance(entry.get("text"), str):
            yield entry["text"]
        elif _is_conversation(entry.get("messages")):
            yield entry["messages"]
        else:
            raise SpecDecError(f'{file}, line {number}: has neither "text" nor "messages" of {{"role", "content"}}')


def _is_conversation(messages: Any) -> bool:
    return isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )


def _encode(tokenizer: PreTrainedTokenizerBase, document: Any) -> list[int]:
    """Token ids. A conversation is written by the tokenizer's chat template, or its contents one after the other."""
    if isinstance(document, list):
        if tokenizer.chat_template and document:
            text: Any = tokenizer.apply_chat_template(document, tokenize=False)
        else:
            text = "\n".join(message["content"] for message in document)
    else:
        text = document
    ids: list[int] = []
    for piece in _pieces(text):
        encoded: Any = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        ids += encoded
    return ids


def _pieces(text: str) -> Iterator[str]:
    at = 0
    while at < len(text):
        end = at + _PIECE
        if end < len(text):
            end = text.rfind("\n", at, end) + 1 or end
        yield text[at:end]
        at = end


def _named(files: Sequence[Path]) -> str:
    more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
    return ", ".join(map(str, files[:_NAMED])) + more
