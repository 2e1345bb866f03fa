"""Packing: nothing is lost or split, documents do not see each other, and a step number brings its batch back."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import torch

from specdec.errors import SpecDecError
from specdec.training.data import Example
from specdec.training.packing import PackedRows, additive, batches, document_mask, in_order, num_batches, pack
from tests.support_models import VOCABULARY, tiny_model

# fp32: a masked sum in another order.
ROUNDING = 1e-5
PAD = 9


def examples(lengths: tuple[int, ...], seed: int = 0) -> list[Example]:
    random = np.random.default_rng(seed)
    return [
        Example(random.integers(0, VOCABULARY, n).astype(np.int32), random.random(n) < 0.5, f"file, line {i}", str(i))
        for i, n in enumerate(lengths)
    ]


def documents_of(rows: PackedRows) -> list[tuple[int, slice]]:
    """Row and place of every document."""
    found = []
    for row in range(len(rows)):
        numbers = rows.documents[row].tolist()
        for number in range(1, max(numbers) + 1):
            first, size = numbers.index(number), numbers.count(number)
            assert numbers[first : first + size] == [number] * size
            found.append((row, slice(first, first + size)))
    return found


LENGTHS = (5, 12, 1, 7, 3, 12, 4, 6, 2, 2)


@pytest.mark.parametrize("together", [True, False])
def test_every_example_is_in_the_rows_whole_and_once(together: bool) -> None:
    given = examples(LENGTHS)
    rows = pack(given, 12, pad=PAD, together=together)
    got = sorted((tuple(rows.ids[r, p].tolist()), tuple(rows.loss_mask[r, p].tolist())) for r, p in documents_of(rows))
    assert got == sorted((tuple(e.ids.tolist()), tuple(e.loss_mask.tolist())) for e in given)
    assert all(rows.positions[r, p].tolist() == list(range(p.stop - p.start)) for r, p in documents_of(rows))
    padding = rows.documents == 0
    assert (rows.ids[padding] == PAD).all()
    assert not rows.loss_mask[padding].any()
    assert not rows.positions[padding].any()


def test_packing_wastes_little_and_repeats() -> None:
    given = examples(LENGTHS)
    rows = pack(given, 12, pad=PAD)
    assert len(rows) == 5, "54 tokens need five rows of 12"
    assert len(pack(given, 12, pad=PAD, together=False)) == len(given)
    again = pack(given, 12, pad=PAD)
    assert all(torch.equal(a, b) for a, b in zip(astuple(rows), astuple(again), strict=True))


def test_an_example_that_is_longer_than_a_row_is_refused_with_its_line() -> None:
    with pytest.raises(SpecDecError, match="file, line 1: 12 tokens do not fit into rows of 11"):
        pack(examples(LENGTHS), 11, pad=PAD)


@pytest.mark.parametrize(("family", "window"), [("llama", None), ("mistral", 7), ("gpt2", None)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_forward_equals_a_forward_for_every_document(family: str, window: int | None, attention: str) -> None:
    model: Any = tiny_model(family)
    model.set_attn_implementation(attention)
    rows = pack(examples((9, 14, 3, 11, 1)), 24, pad=PAD)
    mask = document_mask(rows.documents, rows.positions, window)
    given = mask if attention == "sdpa" else additive(mask, torch.float32)
    with torch.no_grad():
        packed = model(rows.ids, attention_mask=given, position_ids=rows.positions, use_cache=False).logits
        assert torch.isfinite(packed).all()
        for row, place in documents_of(rows):
            alone = model(rows.ids[row, place][None], use_cache=False).logits[0]
            assert (packed[row, place] - alone).abs().max() <= ROUNDING * alone.std()


def test_the_mask_shows_a_document_its_own_past_and_padding_itself() -> None:
    rows = pack(examples((2, 3)), 6, pad=PAD)
    mask = document_mask(rows.documents, rows.positions)[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def numbered(count: int) -> PackedRows:
    return PackedRows(*(torch.arange(count)[:, None].expand(count, 4).clone() for _ in range(4)))


def epoch_of(rows: PackedRows, **kwargs: Any) -> list[list[int]]:
    return [batch.ids[:, 0].tolist() for batch in batches(rows, 3, **kwargs)]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("count", [1, 6, 20])
def test_every_row_is_in_an_epoch_and_all_processes_have_equally_many_batches(count: int, world: int) -> None:
    rows = numbered(count)
    parts = [epoch_of(rows, epoch=0, seed=1, rank=rank, world=world) for rank in range(world)]
    assert {len(part) for part in parts} == {num_batches(count, 3, world)}
    seen = [row for part in parts for batch in part for row in batch]
    assert set(seen) == set(range(count))
    assert len(seen) == num_batches(count, 3, world) * 3 * world


def test_a_batch_depends_on_its_number_and_not_on_those_before_it() -> None:
    rows = numbered(20)
    whole = epoch_of(rows, epoch=2, seed=5)
    assert [epoch_of(rows, epoch=2, seed=5, skip=i)[0] for i in range(len(whole))] == whole
    assert epoch_of(rows, epoch=3, seed=5) != whole
    assert epoch_of(rows, epoch=2, seed=6) != whole


def test_evaluation_sees_every_row_once() -> None:
    rows = numbered(7)
    seen = [b.ids[:, 0].tolist() for rank in range(3) for b in in_order(rows, 2, rank=rank, world=3)]
    assert sorted(row for batch in seen for row in batch) == list(range(7))
    assert [b.ids[:, 0].tolist() for b in in_order(rows, 4)] == [[0, 1, 2, 3], [4, 5, 6]]
    assert list(in_order(numbered(1), 2, rank=1, world=2)) == []


def test_no_rows_are_refused() -> None:
    with pytest.raises(SpecDecError, match="no rows"):
        next(batches(numbered(0), 2, epoch=0, seed=0))
