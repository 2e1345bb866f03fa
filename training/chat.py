"""Conversations to token ids by the tokenizer's chat template, with the assistant's tokens marked."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray

from specdec.errors import SpecDecError

ROLES = ("system", "developer", "user", "assistant", "tool")
Message = dict[str, Any]
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\b")


class ChatError(SpecDecError):
    """A conversation that is malformed, or that the template refuses; the message does not say where it stands."""


def check_messages(messages: Any) -> list[Message]:
    """The messages, each with a known role and text, the first after the system's being the user's.

    Fields beside role and content go to the template as they are, those that hold None are left out.
    """
    if not isinstance(messages, list) or not messages:
        raise ChatError(f"the conversation is {_short(messages)}; it has to be a list of messages, one or more")
    for number, one in enumerate(messages, 1):
        if not isinstance(one, dict) or not isinstance(one.get("role"), str) or not isinstance(one.get("content"), str):
            raise ChatError(f'message {number} is {_short(one)}; it has to be {{"role": ..., "content": ...}}, both of them text')
        if one["role"] not in ROLES:
            raise ChatError(f"message {number} has the role {one['role']!r}; the roles are {', '.join(ROLES)}")
    first = next((one["role"] for one in messages if one["role"] not in ("system", "developer")), None)
    if first != "user":
        came = f"the first turn is the {first}'s" if first else "there is no turn beside the system's"
        raise ChatError(f"{came}; a conversation begins with the user, after the system message if it has one")
    return [{key: value for key, value in one.items() if value is not None} for one in messages]


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of the messages and of what asks the assistant to answer."""
    return list(_ids(tokenizer, _renderer(tokenizer)(messages, True)))


def encode_chat(tokenizer: Any, messages: Sequence[Message]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Token ids [T] of the whole conversation, and which of them the assistant says, its end-of-turn included.

    By the template's generation blocks where it has them, else by rendering: the assistant's part of turn i is what the
    text of messages[: i + 1] has beyond that of messages[:i] with the generation prompt. Raises ChatError when there is
    no template or no assistant turn, when the template refuses, and when it renders turns in a way that hides where they end.
    """
    if not any(one["role"] == "assistant" for one in messages):
        raise ChatError("there is no assistant turn to learn from; remove the row, or have the target answer it first")
    render = _renderer(tokenizer)
    if _GENERATION_BLOCK.search(tokenizer.get_chat_template()):
        return _by_blocks(tokenizer, messages)
    text = render(messages, False)
    ids = np.asarray(_ids(tokenizer, text), dtype=np.int32)
    mask = np.zeros(len(ids), dtype=np.bool_)
    spans = [_span(render, text, messages, i) for i, one in enumerate(messages) if one["role"] == "assistant"]
    for first, end in _token_spans(tokenizer, text, ids, spans):
        mask[first:end] = True
    return ids, mask


def _renderer(tokenizer: Any) -> Callable[[Sequence[Message], bool], str]:
    if not tokenizer.chat_template:
        raise ChatError("the tokenizer has no chat template for conversations; give one by data.chat_template")

    def render(messages: Sequence[Message], ask: bool) -> str:
        try:
            return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask))
        except (TemplateError, TypeError, KeyError) as error:
            raise ChatError(f"the chat template refuses the conversation: {error}; correct the row or remove it") from error

    return render


def _ids(tokenizer: Any, text: str) -> Sequence[int]:
    # A template writes the special tokens itself.
    ids: Sequence[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _by_blocks(tokenizer: Any, messages: Sequence[Message]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    try:
        out = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    except (TemplateError, TypeError, KeyError) as error:
        raise ChatError(f"the chat template refuses the conversation: {error}; correct the row or remove it") from error
    return np.asarray(out["input_ids"], dtype=np.int32), np.asarray(out["assistant_masks"], dtype=np.bool_)


def _span(render: Callable[[Sequence[Message], bool], str], text: str, messages: Sequence[Message], turn: int) -> tuple[int, int]:
    """First character of the assistant's part of that turn, and the one after its last."""
    before = render(messages[:turn], True)
    after = text if turn == len(messages) - 1 else render(messages[: turn + 1], False)
    first = len(before)
    if not text.startswith(before):
        # Some templates open a block for thoughts that an answer without them does not have.
        plain = render(messages[:turn], False)
        differs = (i for i, (one, other) in enumerate(zip(text, before, strict=False)) if one != other)
        first = next(differs, len(text)) if text.startswith(plain) else -1
    end = len(after) if text.startswith(after) else _end_elsewhere(text, after, first, messages[turn]["content"].strip())
    if first < 0 or end <= first:
        raise ChatError(
            f"the chat template renders message {turn + 1} unlike the same message at the end of a conversation, so that the "
            "assistant's part cannot be found; give a template with {% generation %} blocks by data.chat_template"
        )
    return first, end


def _end_elsewhere(text: str, after: str, first: int, content: str) -> int:
    """End of a turn that is rendered with less around it when others follow, as where thoughts are dropped; -1 if not found."""
    at = after.rfind(content)
    if first < 0 or at < 0 or not content:
        return -1
    ending = after[at:]
    found = text.find(ending, first, len(after))
    return found + len(ending) if found >= 0 else -1


def _token_spans(tokenizer: Any, text: str, ids: NDArray[np.int32], spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same spans counted in tokens of the whole text; a token belongs where its first character stands."""
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        starts = np.maximum.accumulate(np.asarray([first for first, _ in offsets], dtype=np.int64))
        return [tuple(np.searchsorted(starts, span).tolist()) for span in spans]

    def tokens_before(place: int) -> int:
        part = np.asarray(_ids(tokenizer, text[:place]), dtype=np.int32)
        size = min(len(part), len(ids))
        different = np.flatnonzero(part[:size] != ids[:size])
        return int(different[0]) if len(different) else size

    return [(tokens_before(first), tokens_before(end)) for first, end in spans]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
