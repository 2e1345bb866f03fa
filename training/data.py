"""Training text: rows from files, folders and datasets, as token ids with a loss mask, split by content."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from specdec.bundled import checkpoint
from specdec.errors import SpecDecError
from specdec.training.chat import ChatError, Message, check_messages, encode_chat
from specdec.training.config import DataConfig

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.xz", ".jsonl.xz", ".parquet")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}


class DataError(SpecDecError):
    """Training data that cannot be used; the message names the file, the line and what to do."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it was read. line: counted from 1; unit: "line", or "row" in files without lines."""

    value: dict[str, Any]
    file: str
    line: int
    unit: str = "line"

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return f"{self.file}, {self.unit} {self.line}"


@dataclass(frozen=True, slots=True)
class Content:
    """What a row holds: messages, or prompt and text, or text alone. text: None where a prompt has no completion."""

    messages: tuple[Message, ...] | None
    prompt: str | None
    text: str | None


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A document. ids: [T] int32.  loss_mask: [T], which tokens are trained on as labels, an end of sequence included.

    source: file and line.  key: hash of what is asked (of the whole, for plain text), by which training and held-out
    rows are kept apart.
    """

    ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    source: str
    key: str


@dataclass(frozen=True, slots=True)
class DataReport:
    """Counts of rows: read, cut, left out for length, left out since no token of them is trained on, left out of training
    since they are in the held-out files. tokens and loss_tokens: of the rows for training.
    """

    rows: int
    truncated: int
    dropped: int
    without_loss: int
    repeated: int
    tokens: int
    loss_tokens: int


@dataclass(frozen=True, slots=True)
class Examples:
    """Rows for training in shuffled order, rows for evaluation, and what became of the others."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    report: DataReport


def load_examples(config: DataConfig, tokenizer: Any) -> Examples:
    """Everything that the configuration names, encoded. The same files and settings give the same result, in the same order.

    No document that is asked the same is both in train and in held_out. Raises DataError.
    """
    counts: Counter[str] = Counter()
    train = _encoded(read_rows(config), config, tokenizer, counts)
    if config.held_out_files:
        others = replace(config, files=config.held_out_files, limit=None)
        held_out = _encoded(read_rows(others), others, tokenizer, Counter())
        keys = {example.key for example in held_out}
        counts["repeated"] = sum(example.key in keys for example in train)
        train = [example for example in train if example.key not in keys]
    else:
        train, held_out = _split(train, config.held_out)
    if not train:
        raise DataError(f"no row is left for training of {counts['rows']} in {', '.join(config.files)}: {dict(counts)}")
    counts["tokens"] = sum(len(example.ids) for example in train)
    counts["loss_tokens"] = sum(int(example.loss_mask.sum()) for example in train)
    report = DataReport(**{one.name: counts[one.name] for one in fields(DataReport)})
    return Examples(tuple(train), tuple(held_out), report)


def read_rows(config: DataConfig) -> list[Row]:
    """The rows of every source, shuffled by config.seed, at most config.limit of them. Raises DataError."""
    if not config.files:
        raise DataError(f"data.files is empty; name files ({', '.join(SUFFIXES)}), folders of them, or a hub dataset owner/name")
    rows = [row for name in config.files for row in _source(name, config.split)]
    random.Random(config.seed).shuffle(rows)
    return rows[: config.limit]


def data_tokenizer(config: DataConfig, target: str) -> Any:
    """The tokenizer that the configuration names, else the target's, with the configuration's chat template.

    target: a checkpoint's folder, a hub name or "bundled". Raises DataError.
    """
    path = config.tokenizer or target
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(checkpoint(path, "target")), trust_remote_code=False)
        if config.chat_template is not None:
            tokenizer.chat_template = Path(config.chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"no tokenizer can be loaded from {path}; name one by data.tokenizer: {error}") from error
    return tokenizer


def content_of(row: Row, config: DataConfig) -> Content:
    """The row's messages ({"messages"} or {"conversations"}), prompt and completion, or text. Raises DataError."""
    value = {name: field for name, field in row.value.items() if field is not None}
    prompt, completion = value.get("prompt"), value.get("completion")
    try:
        if config.messages_field in value:
            return Content(tuple(check_messages(value[config.messages_field])), None, None)
        if "conversations" in value:
            return Content(tuple(check_messages(_from_sharegpt(value["conversations"]))), None, None)
        if isinstance(prompt, list) and isinstance(completion, list | None):
            return Content(tuple(check_messages(prompt + (completion or []))), None, None)
    except ChatError as error:
        raise DataError(f"{row.where}: {error}") from error
    if isinstance(prompt, str) and isinstance(completion, str | None) and (prompt or completion):
        return Content(None, prompt, completion)
    if isinstance(value.get(config.text_field), str) and value[config.text_field]:
        return Content(None, None, value[config.text_field])
    wanted = f'"{config.messages_field}", "conversations", "prompt" with "completion", or "{config.text_field}"'
    raise DataError(
        f"{row.where}: the fields are {', '.join(row.value) or 'none'}; needed is {wanted}, not empty; see data.text_field"
    )


def encode_row(row: Row, tokenizer: Any, config: DataConfig) -> Example:
    """The whole row as a document, however long. Raises DataError.

    A row that says "finished": false holds an answer cut by a limit: its end is then no label.
    """
    content = content_of(row, config)
    if content.messages is not None:
        try:
            ids, mask = encode_chat(tokenizer, content.messages)
        except ChatError as error:
            raise DataError(f"{row.where}: {error}") from error
    else:
        ids, mask = _encode_text(row, content, tokenizer)
    if row.value.get("finished") is False:
        mask = _without_end(ids, mask, tokenizer.eos_token_id)
    asked = ids[: int(mask.argmax())] if mask.any() else ids
    key = hashlib.blake2b((asked if len(asked) else ids).tobytes(), digest_size=16).hexdigest()
    return Example(ids, np.ones_like(mask) if config.loss_on == "all" else mask, row.where, key)


def _encode_text(row: Row, content: Content, tokenizer: Any) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    if content.text is None:
        raise DataError(f'{row.where}: there is a "prompt" and no "completion"; add it, or have the target answer first')
    # The prompt is encoded by itself, as it will be when it is answered.
    prompt = tokenizer(content.prompt, verbose=False)["input_ids"] if content.prompt else []
    text = tokenizer(content.text, verbose=False, add_special_tokens=not prompt)["input_ids"]
    end = tokenizer.eos_token_id
    ids = [*prompt, *text, *([end] if end is not None and text[-1:] != [end] else [])]
    mask = np.ones(len(ids), dtype=np.bool_)
    mask[: len(prompt)] = False
    return np.asarray(ids, dtype=np.int32), mask


def _without_end(ids: NDArray[np.int32], mask: NDArray[np.bool_], end: int | None) -> NDArray[np.bool_]:
    ends = np.flatnonzero((ids == end) & mask)
    cut = mask.copy()
    if len(ends):
        cut[int(ends[-1]) :] = False
    return cut


def _encoded(rows: Sequence[Row], config: DataConfig, tokenizer: Any, counts: Counter[str]) -> list[Example]:
    found: list[Example] = []
    counts["rows"] += len(rows)
    for row in rows:
        example = encode_row(row, tokenizer, config)
        if len(example.ids) > config.max_length:
            if config.too_long == "error":
                raise DataError(
                    f"{row.where}: {len(example.ids)} tokens, above data.max_length {config.max_length}; "
                    "raise it, or set data.too_long to truncate or drop"
                )
            counts["truncated" if config.too_long == "truncate" else "dropped"] += 1
            if config.too_long == "drop":
                continue
            example = replace(example, ids=example.ids[: config.max_length], loss_mask=example.loss_mask[: config.max_length])
        # A document's first token has nothing before it that could predict it.
        if not example.loss_mask[1:].any():
            counts["without_loss"] += 1
            continue
        found.append(example)
    return found


def _split(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """By the key's own value, so that a row stays on its side when others come and go; one key at least where share > 0."""
    if not share or not examples:
        return examples, []
    bound = max(f"{int(share * 2**64):016x}", min(example.key for example in examples)[:16])
    held_out = [example for example in examples if example.key[:16] <= bound]
    return [example for example in examples if example.key[:16] > bound], held_out


def _from_sharegpt(turns: Any) -> Any:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return turns
    return [
        {"role": _SHAREGPT.get(turn["from"], turn["from"]), "content": turn.get("value")} if "from" in turn else turn
        for turn in turns
    ]


def _source(name: str, split: str) -> Iterator[Row]:
    path = Path(name).expanduser()
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        yield from _from_dataset(name, datasets.load_from_disk(str(path)), split)
    elif path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES))
        if not found:
            raise DataError(f"{name} is a folder without {', '.join(SUFFIXES)} files and no saved dataset")
        for file in found:
            yield from _from_file(file)
    elif path.is_file():
        yield from _from_file(path)
    elif _HUB_NAME.fullmatch(name) and not name.endswith(SUFFIXES):
        try:
            loaded = datasets.load_dataset(name, split=split)
        except (OSError, ValueError) as error:
            raise DataError(f"{name} is no local path and cannot be loaded from the hub: {error}") from error
        yield from _from_dataset(name, loaded, split)
    else:
        raise DataError(f"{name} does not exist; give a file ({', '.join(SUFFIXES)}), a folder, or a hub name written owner/name")


def _from_dataset(name: str, loaded: Any, split: str) -> Iterator[Row]:
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{name} has no split {split!r}; its splits are {', '.join(loaded)}; choose by data.split")
        loaded = loaded[split]
    yield from _not_empty(name, (Row(value, name, number, "row") for number, value in enumerate(loaded, 1)))


def _from_file(path: Path) -> Iterator[Row]:
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path} ends in {path.suffix or 'nothing'}; known are {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        yield from _not_empty(str(path), _from_parquet(path))
    else:
        yield from _not_empty(str(path), _from_json(path) if ".jsonl" not in path.name else _from_lines(path))


def _not_empty(name: str, rows: Iterable[Row]) -> Iterator[Row]:
    number = 0
    for number, row in enumerate(rows, 1):  # noqa: B007 (counts what was yielded)
        yield row
    if not number:
        raise DataError(f"{name} holds no rows; remove it from data.files or write it again")


def _from_parquet(path: Path) -> Iterator[Row]:
    try:
        # Streaming reads the file where it lies; otherwise a copy of it would go to the datasets cache.
        loaded = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, value in enumerate(loaded, 1):
            yield Row(value, str(path), number, "row")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as Parquet; write it again: {error}") from error


def _from_lines(path: Path) -> Iterator[Row]:
    place = 0
    for number, line in enumerate(_lines(path), 1):
        text = _decoded(line, f"{path}, line {number}", place)
        place += len(line)
        if text.strip():
            yield Row(_object(_parsed(text, f"{path}, line {number}"), f"{path}, line {number}"), str(path), number)


def _from_json(path: Path) -> Iterator[Row]:
    """A list of objects; a file of one object a line has this ending at times, too."""
    text = _decoded(b"".join(_lines(path)), str(path), 0)
    try:
        rows = json.loads(text or "[]")
    except ValueError as error:
        if "Extra data" in str(error):
            yield from _from_lines(path)
            return
        raise DataError(f"{path}: not JSON: {error}; mend the file, which has to hold a list of objects") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} holds one {type(rows).__name__}; it has to hold a list of objects, or one object a line as .jsonl")
    for number, value in enumerate(rows, 1):
        yield Row(_object(value, f"{path}, row {number}"), str(path), number, "row")


def _lines(path: Path) -> Iterator[bytes]:
    opened: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opened(path, "rb") as file:
            yield from file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; the file may be cut short, get or write it again") from error


def _decoded(raw: bytes, where: str, place: int) -> str:
    try:
        return raw.decode("utf-8-sig" if place == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {place + error.start} of the file is not UTF-8; convert the file to UTF-8") from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}; each line has to be one JSON object") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a {type(value).__name__}; each row has to be an object with named fields")
    return value
