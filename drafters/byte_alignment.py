"""Vocabularies as bytes: what each token stands for, text in tokens without a prefix, and one text in another's tokens.

Two tokenizers are aligned on bytes, never on the strings of their vocabularies: "Ġthe" of one and "▁the" of another are the same
four bytes. Special tokens stand for no bytes. The recipe follows arXiv 2502.05202; what is new is that nothing committed is
encoded a second time in the target's vocabulary, and that text may end inside a character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from specdec.errors import VocabularyMismatchError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_KNOWN_DECODERS = frozenset({"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"})
# A segment of text ends before a space behind at least so many bytes, and at the latest behind about so many.
_SHORTEST_SEGMENT, _LONGEST_SEGMENT = 48, 192
_SPACES = b" \t\r\n"


class ByteVocabulary:
    """A tokenizer's vocabulary as bytes.

    table: of each id, its bytes; None for special tokens and for ids without a token.  ids: the token of given bytes; of several,
    the ordinary one before a byte token like <0x20>, then the lowest id.  prepends: whether a space is put before a text.
    begin: special tokens that are put before it.  unknown: the token of what has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
        """tokenizer: byte-level BPE, or sentencepiece's kind (BPE or unigram).  whose: "target" or "draft", for errors.

        Raises VocabularyMismatchError for a tokenizer whose tokens do not stand for bytes of their own, as WordPiece.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise VocabularyMismatchError(
                f"the {whose}'s tokenizer is a {type(tokenizer).__name__} that does not run on the tokenizers library, so its "
                "tokens cannot be read as bytes; load it with AutoTokenizer, which converts most of them"
            )
        spec = json.loads(backend.to_str())
        decoders = list(_parts(spec["decoder"], "decoders"))
        kinds = {part["type"] for part in decoders}
        kinds |= {mark for mark in ("continuing_subword_prefix", "end_of_word_suffix") if spec["model"].get(mark)}
        if not kinds & {"ByteLevel", "Metaspace", "Replace"} or kinds - _KNOWN_DECODERS:
            raise VocabularyMismatchError(
                f"the {whose}'s tokenizer is a {spec['model']['type']} whose tokens do not stand for bytes of their own (decoders: "
                f"{', '.join(sorted(kinds)) or 'none'}); byte-level BPE and sentencepiece tokenizers can be mapped"
            )
        special = {*tokenizer.all_special_ids, *[token["id"] for token in spec["added_tokens"] if token["special"]]}
        names = {i: name for name, i in backend.get_vocab(with_added_tokens=True).items() if i not in special}
        unknown = _unknown_name(spec["model"])
        reader = _Reader(decoders, kinds)
        self.table: tuple[bytes | None, ...] = tuple(
            [reader.bytes_of(names[i]) if i in names and names[i] != unknown else None for i in range(max(names, default=-1) + 1)]
        )
        self.unknown: int | None = backend.token_to_id(unknown) if unknown is not None else None
        self.begin = _begin(tokenizer, self.table)
        self.prepends = _prepends(spec)
        order = sorted(names, key=lambda i: (reader.is_byte(names[i]), i), reverse=True)
        self.ids: dict[bytes, int] = {data: i for i in order if (data := self.table[i])}
        self._longest = max(map(len, self.ids), default=0)
        self._encoder = _plain(spec)

    def bytes_of(self, token: int) -> bytes | None:
        """Of a token; None for special tokens and for ids beyond the tokenizer's, which padded vocabularies have."""
        return self.table[token] if token < len(self.table) else None

    def encode(self, data: bytes) -> tuple[list[int], int]:
        """Tokens of text that goes on behind other text, and how many bytes of it they are: their bytes are exactly data[:used].

        The tokenizer's own choice of tokens, where those keep the bytes; else, and for bytes that are no whole character, the
        longest tokens that fit. Ends early at the first byte that no token stands for.
        """
        tokens: list[int] = []
        used = 0
        while used < len(data):
            new, length = self._own(data[used:])
            if not new:
                new, length = self._fitting(data[used : used + self._longest])
            if not new:
                break
            tokens.extend(new)
            used += length
        return tokens, used

    def _own(self, data: bytes) -> tuple[list[int], int]:
        """The tokenizer's own tokens, as long as their bytes are those of the text."""
        tokens: list[int] = []
        used = 0
        for token in self._encoder.encode(data[: whole_characters(data)].decode(), add_special_tokens=False).ids:
            own = self.bytes_of(token)
            if not own or not data.startswith(own, used):
                break
            tokens.append(token)
            used += len(own)
        return tokens, used

    def _fitting(self, data: bytes) -> tuple[list[int], int]:
        """The longest token that the text begins with."""
        for length in range(len(data), 0, -1):
            if data[:length] in self.ids:
                return [self.ids[data[:length]]], length
        return [], 0


class ByteText:
    """A growing text in target tokens, read as draft tokens: a function of the target's tokens, however they came.

    The text is cut into segments at places that later text cannot move, so only the last, open one is encoded again.

    tokens: of the target.  closed: draft tokens of the closed segments, which never change.
    """

    def __init__(self, target: ByteVocabulary, draft: ByteVocabulary) -> None:
        """An empty text."""
        self._target, self._draft = target, draft
        self.tokens: list[int] = []
        self.closed: list[int] = list(draft.begin)
        self._open = bytearray()
        # Whether there are bytes of the target's tokens, and whether there is text: the space put before it is none.
        self._begun, self._empty = False, True

    def add(self, tokens: Sequence[int]) -> None:
        """Append target tokens. A special token ends a segment."""
        self.tokens.extend(tokens)
        for token in tokens:
            data = self._target.bytes_of(token)
            if data is None:
                self._close(len(self._open))
            else:
                self._feed(self._first(data) if self._empty else data)

    def draft_tokens(self) -> list[int]:
        """The text in draft tokens, one or more."""
        found = self.closed + self._encoded(bytes(self._open))
        return found or [self._draft.unknown or 0]

    def ahead(self, data: bytes) -> bytes:
        """Drafted bytes as the target would write them behind this text: only at its very beginning is there a difference."""
        if not self._empty:
            return data
        plain = data.removeprefix(b" ") if self._draft.prepends else data
        return b" " + plain if self._target.prepends and not self._begun and plain else plain

    def _first(self, data: bytes) -> bytes:
        """The beginning of the text: the space that one tokenizer puts there goes, that of the other comes."""
        plain = data.removeprefix(b" ") if self._target.prepends and not self._begun else data
        self._begun = True
        if not plain:
            return plain
        self._empty = False
        return b" " + plain if self._draft.prepends else plain

    def _feed(self, data: bytes) -> None:
        start = len(self._open)
        self._open += data
        place = max(start, 1)
        while place < len(self._open):
            if self._ends(place):
                self._close(place)
                place = 1
            else:
                place += 1

    def _ends(self, place: int) -> bool:
        """Whether the open segment ends before this byte. Looks at nothing behind it."""
        byte, before = self._open[place], self._open[place - 1]
        if byte == 0x20:
            return place >= _SHORTEST_SEGMENT and before not in _SPACES
        return place >= _LONGEST_SEGMENT and byte & 0xC0 != 0x80

    def _close(self, place: int) -> None:
        self.closed.extend(self._encoded(bytes(self._open[:place])))
        del self._open[:place]

    def _encoded(self, data: bytes) -> list[int]:
        """Draft tokens of a segment; a character that the draft does not know is its unknown token, or nothing."""
        tokens, used = self._draft.encode(data)
        while used < len(data):
            if len(data) - used < _width(data[used]):
                # A character that is not whole yet, and a draft without byte tokens: the rest of it comes later.
                break
            if self._draft.unknown is not None:
                tokens.append(self._draft.unknown)
            used += 1
            while used < len(data) and data[used] & 0xC0 == 0x80:
                used += 1
            new, length = self._draft.encode(data[used:])
            tokens.extend(new)
            used += length
        return tokens


def shared_tokens(target: ByteVocabulary, draft: ByteVocabulary) -> tuple[list[int], list[int]]:
    """Target ids and draft ids, pair by pair, of the tokens with the same bytes in both; one pair for the same bytes."""
    both = sorted((i, draft.ids[data]) for data, i in target.ids.items() if data in draft.ids)
    return [i for i, _ in both], [j for _, j in both]


def whole_characters(data: bytes) -> int:
    """How many bytes at the beginning are whole UTF-8 characters."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(data)


def without_open_end(data: bytes) -> bytes:
    """The bytes without a last character that is not whole yet. Other bytes that are no characters stay."""
    for back in range(1, min(3, len(data)) + 1):
        if data[-back] & 0xC0 != 0x80:
            return data[:-back] if _width(data[-back]) > back else data
    return data


def _width(byte: int) -> int:
    """Bytes of the character that this byte begins; 1 for what begins none."""
    return 4 if 0xF0 <= byte < 0xF8 else 3 if 0xE0 <= byte < 0xF0 else 2 if 0xC0 <= byte < 0xE0 else 1


class _Reader:
    """Reads a token's string as bytes, the way its decoder would."""

    def __init__(self, decoders: Sequence[dict[str, Any]], kinds: set[str]) -> None:
        self._byte_level = _byte_characters() if "ByteLevel" in kinds else None
        self._fallback = "ByteFallback" in kinds
        self._replace: list[tuple[str, str]] = []
        for part in decoders:
            if part["type"] == "Metaspace":
                self._replace.append((part["replacement"], " "))
            elif part["type"] == "Replace" and "String" in part["pattern"]:
                self._replace.append((part["pattern"]["String"], part["content"]))

    def is_byte(self, name: str) -> bool:
        """Whether the token is one of a fallback's bytes."""
        return self._fallback and _BYTE_TOKEN.fullmatch(name) is not None

    def bytes_of(self, name: str) -> bytes:
        """The bytes that the token stands for."""
        if self.is_byte(name):
            return bytes([int(name[3:5], 16)])
        if self._byte_level is not None:
            known = self._byte_level
            return bytes([known[c] for c in name]) if all(c in known for c in name) else name.encode()
        for pattern, content in self._replace:
            name = name.replace(pattern, content)
        return name.encode()


def _byte_characters() -> dict[str, int]:
    """Byte-level BPE writes printable bytes as themselves, and the others, in order, as the characters from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _parts(part: dict[str, Any] | None, inner: str) -> Iterator[dict[str, Any]]:
    """The parts of a sequence of sequences, or the one part itself."""
    if part is not None:
        if part["type"] == "Sequence":
            for own in part[inner]:
                yield from _parts(own, inner)
        else:
            yield part


def _unknown_name(model: dict[str, Any]) -> str | None:
    if model["type"] == "Unigram":
        return None if model.get("unk_id") is None else str(model["vocab"][model["unk_id"]][0])
    name: str | None = model.get("unk_token")
    return name


def _begin(tokenizer: PreTrainedTokenizerBase, table: Sequence[bytes | None]) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before a text."""
    found: list[int] = []
    for token in tokenizer("a").input_ids:
        if token < len(table) and table[token] is not None:
            return tuple(found)
        found.append(token)
    # Nothing stands for the letter: what was found may be the unknown token.
    return tuple(found[:1]) if found[:1] == [tokenizer.bos_token_id] else ()


def _prepends(spec: dict[str, Any]) -> bool:
    parts = [*_parts(spec["normalizer"], "normalizers"), *_parts(spec["pre_tokenizer"], "pretokenizers")]
    return any(
        part["type"] == "Prepend"
        or (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        or (part["type"] == "ByteLevel" and part.get("add_prefix_space", False))
        for part in parts
    )


def _plain(spec: dict[str, Any]) -> Tokenizer:
    """The tokenizer for text that goes on: no space put before it, no special tokens read or written, nothing at random."""
    spec = {**spec, "truncation": None, "padding": None, "post_processor": None}
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["special"]]
    spec["normalizer"] = _without_prefix(spec["normalizer"], "normalizers")
    spec["pre_tokenizer"] = _without_prefix(spec["pre_tokenizer"], "pretokenizers")
    if spec["model"].get("dropout") is not None:
        spec["model"] = {**spec["model"], "dropout": None}
    return Tokenizer.from_str(json.dumps(spec))


def _without_prefix(part: dict[str, Any] | None, inner: str) -> dict[str, Any] | None:
    if part is None:
        return None
    kept = []
    for own in _parts(part, inner):
        if own["type"] == "Metaspace":
            kept.append({**own, "prepend_scheme": "never"})
        elif own["type"] == "ByteLevel" and "add_prefix_space" in own:
            kept.append({**own, "add_prefix_space": False})
        elif own["type"] not in ("Prepend", "Strip"):
            kept.append(own)
    return {"type": "Sequence", inner: kept} if kept else None
