"""Every processor gives a packed row what HF's own loop would give it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    EncoderRepetitionPenaltyLogitsProcessor,
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation import logits_process

from specdec.errors import InvalidRequestError
from specdec.processing import Processing
from specdec.processing_table import BUILT_IN, Kind, kind_of

V = 23
ROWS = [[0, 0, 5, 6, 5, 6], [1, 2, 3, 4, 3, 4]]
# Nodes of both requests, of several lengths, two of one request with the same length, and one twice.
NODES = [(0, ()), (0, (5,)), (0, (7,)), (0, (5, 6)), (1, ()), (1, (3,)), (1, ())]


class _ByPlace(LogitsProcessor):
    """Prefers, in each row of the batch, the token of the row's number, by how long the row is."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert len(input_ids) == len(scores) == len(ROWS)
        scores = scores.clone()
        for b in range(len(scores)):
            scores[b, b] += input_ids.shape[1] + float(input_ids[b, -1])
        return scores


class _Counting(LogitsProcessor):
    stateful = True

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return scores + self.calls


def _processors() -> dict[str, LogitsProcessor]:
    prefix = PrefixConstrainedLogitsProcessor(lambda b, text: [b, int(text[-1]), len(text)], 1)
    return {
        "temperature": TemperatureLogitsWarper(0.7),
        "top-k": TopKLogitsWarper(4),
        "top-p": TopPLogitsWarper(0.6),
        "top-h": TopHLogitsWarper(0.5),
        "typical": TypicalLogitsWarper(0.6),
        "eta": EtaLogitsWarper(0.05),
        "repetition": RepetitionPenaltyLogitsProcessor(1.7),
        "n-gram": NoRepeatNGramLogitsProcessor(2),
        "min-length": MinLengthLogitsProcessor(7, eos_token_id=3),
        "bias": SequenceBiasLogitsProcessor({(5, 6): 4.0, (3,): 1.0}),
        "prefix": prefix,
        "encoder": EncoderRepetitionPenaltyLogitsProcessor(2.0, torch.tensor(ROWS)),
        "by place": _ByPlace(),
    }


def _one_at_a_time(processors: LogitsProcessorList, logits: Tensor) -> Tensor:
    """HF's way: for each node, the whole batch at that node's length, and the node's row of the result."""
    rows = []
    for node, (request, path) in enumerate(NODES):
        text = [*ROWS[request], *path]
        batch = torch.tensor([text] * len(ROWS))
        rows.append(processors(batch, logits[node].repeat(len(ROWS), 1))[request])
    return torch.stack(rows)


def _logits() -> Tensor:
    logits = torch.randn(len(NODES), V, generator=torch.Generator().manual_seed(0)) * 3
    logits[6] = logits[4]  # the same node
    return logits


def test_every_processor_of_transformers_is_in_the_table() -> None:
    classes = {
        name
        for name, cls in inspect.getmembers(logits_process, inspect.isclass)
        if issubclass(cls, LogitsProcessor) and cls is not LogitsProcessor and cls.__module__ == logits_process.__name__
    }
    assert classes
    assert classes <= set(BUILT_IN), f"sort these into the table: {sorted(classes - set(BUILT_IN))}"


@pytest.mark.parametrize("name", list(_processors()))
def test_packed_rows_equal_one_at_a_time(name: str) -> None:
    processors = LogitsProcessorList([_processors()[name]])
    logits = _logits()
    before = logits.clone()
    mine = Processing(processors, ROWS)(logits, lambda: list(NODES))
    assert torch.allclose(mine, _one_at_a_time(processors, logits), atol=1e-6, rtol=1e-6)
    assert torch.equal(logits, before)


def test_a_chain_of_processors_keeps_its_order_and_follows_committed_text() -> None:
    names = ("repetition", "by place", "temperature", "prefix", "top-k")
    processors = LogitsProcessorList([_processors()[name] for name in names])
    processing = Processing(processors, [row[:3] for row in ROWS])
    for request, row in enumerate(ROWS):
        processing.commit(request, row[3:5])
        processing(_logits()[:2], lambda: [(0, ()), (1, ())])
        processing.commit(request, row[5:])
    mine = processing(_logits(), lambda: list(NODES))
    assert torch.allclose(mine, _one_at_a_time(processors, _logits()), atol=1e-6, rtol=1e-6)


def test_requests_of_different_lengths() -> None:
    rows = [ROWS[0], ROWS[1][:4]]
    processors = LogitsProcessorList([_ByPlace(), RepetitionPenaltyLogitsProcessor(1.7)])
    nodes = [(0, ()), (1, ()), (1, (9, 8))]
    logits = _logits()[:3]
    mine = Processing(processors, rows)(logits, lambda: list(nodes))
    for row, (request, path) in enumerate(nodes):
        text = torch.tensor([[*rows[request], *path]] * 2)
        assert torch.allclose(mine[row], processors(text, logits[row].repeat(2, 1))[request])


def test_scores_are_fp32_and_text_is_not_asked_for_without_need() -> None:
    def never() -> Any:
        raise AssertionError("asked")

    processing = Processing(LogitsProcessorList([TemperatureLogitsWarper(0.5)]), ROWS)
    assert processing(_logits().bfloat16(), never).dtype == torch.float32
    assert not processing.identity
    assert Processing(LogitsProcessorList(), ROWS).identity


def test_a_stateful_processor_is_called_once_a_step_on_the_whole_batch() -> None:
    processor = _Counting()
    with pytest.warns(UserWarning, match="_Counting keeps state") as caught:
        processing = Processing(LogitsProcessorList([processor]), ROWS)
    assert len(caught) == 1
    assert processing.lockstep
    processing.commit(1, [7])  # request 0 has finished
    mine = processing(torch.zeros(1, V), lambda: [(1, ())])
    assert processor.calls == 1
    assert torch.equal(mine, torch.ones(1, V))


def test_kinds_of_processors_outside_transformers() -> None:
    class Own(TopKLogitsWarper):
        pass

    assert kind_of(TopKLogitsWarper(3)) is Kind.NO_IDS
    assert kind_of(Own(3)) is Kind.INDEXED
    assert kind_of(_Counting()) is Kind.STATEFUL
    by_request = RepetitionPenaltyLogitsProcessor(1.2)
    by_request.prompt_ignore_length = torch.tensor([1, 2])
    assert kind_of(by_request) is Kind.INDEXED


def test_processors_that_cannot_be_called_are_refused() -> None:
    class Needy(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor, more: int) -> Tensor:
            return scores

    for processor in (Needy(), logits_process.ClassifierFreeGuidanceLogitsProcessor(2.0)):
        with pytest.raises(InvalidRequestError):
            Processing(LogitsProcessorList([processor]), ROWS)
