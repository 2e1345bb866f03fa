"""Blocks are cut where HF, asking after every token, would have stopped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from specdec.stopping import Stopping


class _AfterToken(StoppingCriteria):
    """Row b stops after the token 10 + b."""

    def __init__(self) -> None:
        self.seen: list[list[list[int]]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seen.append(input_ids.tolist())
        return input_ids[:, -1] == 10 + torch.arange(len(input_ids))


def _stopping(*criteria: StoppingCriteria, rows: int = 1) -> Stopping:
    return Stopping(StoppingCriteriaList(criteria), [[0, 5]] * rows)


@pytest.mark.parametrize(
    ("tokens", "kept", "finished"), [((4, 5), 2, False), ((4, 2, 5), 2, True), ((3,), 1, True), ((), 0, False)]
)
def test_an_end_of_sequence_token_of_a_list_cuts_the_block(tokens: tuple[int, ...], kept: int, finished: bool) -> None:
    stopping = _stopping(EosTokenCriteria([2, 3]), MaxLengthCriteria(100))
    assert stopping.cut(0, tokens) == (kept, finished)
    assert stopping.finished(0) is finished


def test_the_maximal_length_cuts_the_block_and_counts_pads() -> None:
    stopping = _stopping(MaxLengthCriteria(5))
    assert stopping.room(0) == 3
    assert stopping.cut(0, (1, 1)) == (2, False)
    assert stopping.room(0) == 1
    assert stopping.cut(0, (1, 1, 1)) == (1, True)


def test_time_that_is_up_leaves_one_token() -> None:
    stopping = _stopping(MaxTimeCriteria(0.0, initial_timestamp=0.0))
    assert stopping.cut(0, (1, 1, 1)) == (1, True)


def test_a_users_criterion_sees_every_token_at_its_place_in_the_batch() -> None:
    own = _AfterToken()
    stopping = _stopping(own, EosTokenCriteria(2), rows=2)
    assert stopping.cut(1, (10, 11, 12)) == (2, True)
    assert stopping.cut(0, (11, 7)) == (2, False)
    assert [batch[1] for batch in own.seen[:2]] == [[0, 5, 10], [0, 5, 10, 11]]
    assert [batch[0] for batch in own.seen[2:]] == [[0, 5, 11], [0, 5, 11, 7]]


def test_a_criterion_may_answer_with_a_plain_bool() -> None:
    class Plain(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
            return input_ids.shape[1] >= 4

    assert _stopping(Plain(), EosTokenCriteria(2)).cut(0, (1, 1, 1)) == (2, True)


def test_without_an_end_of_sequence_criterion_rows_end_together() -> None:
    stopping = _stopping(_AfterToken(), MaxLengthCriteria(100), rows=2)
    assert stopping.cut(0, (10, 1)) == (2, False)
    assert stopping.total() is None
    assert stopping.cut(1, (1, 1, 1)) == (3, False)
    assert stopping.cut(1, (11, 1)) == (1, True)
    assert stopping.total() == 4
    assert stopping.cut(0, (1, 1, 1)) == (2, True)
