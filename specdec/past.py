"""Keys and values between our cache and transformers' own, in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, StaticCache

from specdec.cache import KVCache
from specdec.errors import InvalidRequestError
from specdec.runner import ModelRunner


@dataclass(frozen=True, slots=True)
class Past:
    """A cache of transformers that a call goes on from, and fills. pads: left pads of each request, which it holds too.

    length: slots that it has when the call begins, pads included; the requests' texts begin with what it holds.
    """

    cache: Cache
    pads: tuple[int, ...]
    length: int

    def held(self, request: int) -> int:
        """Committed tokens of the request that the cache holds."""
        return max(0, self.length - self.pads[request])


@dataclass(frozen=True, slots=True)
class RowPast:
    """A finished request's keys and values, one tensor [L, 2, H, length, D] for each group of like layers."""

    groups: tuple[Tensor, ...]
    length: int


def length_of(cache: Any) -> int:
    """Slots that a cache of transformers holds, pads included; 0 without one.

    Raises InvalidRequestError, by its name, for a cache that we cannot read or fill.
    """
    if cache is None:
        return 0
    name = type(cache).__name__
    if type(cache) not in (DynamicCache, StaticCache) or getattr(cache, "offloading", False):
        raise InvalidRequestError(
            f"past_key_values is a {name}{' with offloading' if getattr(cache, 'offloading', False) else ''}: only an ordinary "
            "DynamicCache is read and only that or a StaticCache is filled; leave it out and give the whole text as input_ids"
        )
    length = int(cache.get_seq_length())
    if length and type(cache) is not DynamicCache:
        raise InvalidRequestError(f"past_key_values is a {name} that holds {length} tokens; give a DynamicCache, or the whole text")
    return length


def past_of(
    model_kwargs: Mapping[str, Any], config: GenerationConfig, slots: int, prompts: tuple[tuple[int, ...], ...], length: int
) -> Past | None:
    """The cache to read and fill: the user's own, or the one that transformers prepared where it is to be returned.

    slots: of the whole text, pads included.  length: those that the cache holds.
    """
    cache = model_kwargs.get("past_key_values")
    if cache is None or not (config.return_dict_in_generate or length or getattr(cache, "_is_user_defined", False)):
        return None
    if length >= slots:
        raise InvalidRequestError(
            f"past_key_values holds {length} tokens, input_ids and mask {slots}; give one token or more that it does not hold"
        )
    return Past(cache, tuple(slots - len(prompt) for prompt in prompts), length)


def ingest(past: Past, into: KVCache) -> None:
    """Take in what the cache holds, without its left pads: row b then has `past.held(b)` tokens. The cache is only read.

    A layer with a sliding window holds its last keys alone; ours masks by position, so that the others are never looked at.
    Raises InvalidRequestError where it is another model's.
    """
    cache: Any = past.cache
    if past.length == 0:
        return
    if len(cache.layers) != len(into.specs):
        raise InvalidRequestError(
            f"past_key_values has {len(cache.layers)} layers, the target {len(into.specs)}; give its own cache"
        )
    if any(_shares(cache)):
        raise InvalidRequestError(
            "past_key_values is of a model whose layers share keys, and holds those of some layers only; give the whole text"
        )
    for layer, pair in zip(cache.layers, into.layers, strict=True):
        for theirs, ours in zip((layer.keys, layer.values), pair, strict=True):
            _check_shape(theirs, ours)
            first = past.length - theirs.shape[2]
            for row, pads in enumerate(past.pads):
                begin = max(pads, first)
                if begin < past.length:
                    ours[row, :, begin - pads : past.length - pads] = theirs[row, :, begin - first :]
    into.lengths = [past.held(row) for row in range(len(past.pads))]


def _shares(cache: Any) -> list[bool]:
    """For each layer that the cache has so far, whether it looks at another one's keys, which it has none of (Gemma 3n and 4)."""
    return list(getattr(cache, "is_dummy", ()))


def _check_shape(theirs: Tensor, ours: Tensor) -> None:
    if (theirs.shape[0], theirs.shape[1], theirs.shape[3]) != (ours.shape[0], ours.shape[1], ours.shape[3]):
        raise InvalidRequestError(
            f"past_key_values holds {tuple(theirs.shape)}: requests, heads, tokens, width; this call needs {ours.shape[0]}, "
            f"{ours.shape[1]} and width {ours.shape[3]}; give the cache that the target made for this batch"
        )


def row_past(cache: KVCache, row: int, length: int) -> RowPast:
    """A copy of the row's first slots, before the row is given up."""
    return RowPast(tuple(group[:, :, row, :, :length].clone() for group in cache.groups), length)


def complete(runner: ModelRunner, rows: Sequence[RowPast | None], texts: Sequence[Sequence[int]]) -> KVCache:
    """A cache whose row b holds texts[b]: what rows[b] has of it, and a forward over the rest (the pads behind a finished text).

    None is a row of which nothing was kept.  The batch that the runner had is over.
    """
    runner.begin(len(rows), max(map(len, texts)) + 1)
    cache = runner.cache
    lengths = [0 if row is None else min(row.length, len(text)) for row, text in zip(rows, texts, strict=True)]
    for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if row is not None:
            for group, kept in zip(cache.groups, row.groups, strict=True):
                group[:, :, b, :, :length] = kept[..., :length, :]
    cache.lengths = lengths
    rest = [text[length:] for text, length in zip(texts, lengths, strict=True)]
    if any(rest):
        runner.prefill(rest)
    return cache


def fill(past: Past, ours: KVCache, length: int) -> None:
    """Append to the cache what it lacks of the first `length` slots, pads included, as transformers' loop would have.

    Pads have zeros for keys and values; the attention mask hides them.
    """
    cache: Any = past.cache
    shares = _shares(cache)
    for index, pair in enumerate(ours.layers):
        if index < len(shares) and shares[index]:
            continue
        new: list[Tensor] = []
        for held in pair:
            rows = held.new_zeros(held.shape[0], held.shape[1], length - past.length, held.shape[3])
            for b, pads in enumerate(past.pads):
                begin = max(pads, past.length)
                rows[b, :, begin - past.length :] = held[b, :, begin - pads : length - pads]
            new.append(rows)
        cache.update(new[0], new[1], index)
