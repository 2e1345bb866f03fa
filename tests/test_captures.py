"""Captured forwards of fixed buffers: which calls are cold, and which are replayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specdec.graphs import Captures
from specdec.runner import ModelRunner
from tests.support_models import tiny_model


def _cold(captures: Captures[None], keys: Sequence[int]) -> list[tuple[int, bool]]:
    """Of each call: how much `cold` grew, and whether there was a capture."""
    cache, found = ModelRunner(tiny_model()).cache, []
    for key in keys:
        before = captures.cold
        captured = captures.get((key,), cache, lambda: (None, lambda: ()))
        found.append((captures.cold - before, captured is not None))
    return found


def _record(run: Any) -> Any:
    return lambda: None, run()


def test_calls_are_cold_until_their_key_is_captured_and_the_capturing_one_is() -> None:
    captures: Captures[None] = Captures(3, 8, _record)
    assert _cold(captures, (4, 4, 4, 4, 7, 7)) == [(1, False), (1, False), (1, True), (0, True), (1, False), (1, False)]


def test_where_nothing_more_is_captured_only_the_first_call_of_a_key_is_cold() -> None:
    captures: Captures[None] = Captures(1, 1, _record)
    assert _cold(captures, (4, 4, 7, 7, 7)) == [(1, True), (0, True), (1, False), (0, False), (0, False)]


def test_nothing_is_cold_once_capturing_is_given_up() -> None:
    def refuse(run: Any) -> Any:
        raise RuntimeError("an operation that a graph cannot hold")

    captures: Captures[None] = Captures(1, 8, refuse)
    assert _cold(captures, (4, 4)) == [(1, False), (0, False)]
    assert captures.refused == "an operation that a graph cannot hold"
