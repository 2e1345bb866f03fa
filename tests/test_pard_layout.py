"""PARD's training rows: the model sees in them what it sees when it drafts, and what is dropped leaves every chain whole."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from specdec.errors import SpecDecError
from specdec.training.pard_layout import PardLayout, PardRows, additive_mask, bool_mask, mask_mod, pard_rows
from tests.support_models import VOCABULARY, tiny_model

MASK = VOCABULARY - 1
PAPER, NONE = {"retain": 0.7, "retain_min": 0.2}, {"retain": 1.0}
# Two orders of the sums of a row's attention in fp32, on logits of size 10.
FP32_ERROR = 1e-5


def _packed(lengths: list[list[int]], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of documents of these lengths behind each other, padded; the loss mask holds every token."""
    documents = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, sizes in enumerate(lengths):
        numbers = [number for number, size in enumerate(sizes, 3) for _ in range(size)]
        documents[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.long)
    ids = torch.randint(3, MASK, documents.shape)
    return ids * (documents != 0), documents, documents != 0


def _rows(lengths: list[list[int]], width: int, drop: dict[str, float], num_tokens: int, **given: Any) -> PardRows:
    generator = torch.Generator().manual_seed(5)
    return pard_rows(*_packed(lengths, width), PardLayout(num_tokens, MASK, **drop, **given), generator)


def _triples(rows: PardRows, m: int) -> list[tuple[int, int, int]]:
    """(document, anchor, depth) of the rows that are not padding."""
    vectors = (rows.documents[m].tolist(), rows.anchors[m].tolist(), rows.depths[m].tolist())
    return [place for place in zip(*vectors, strict=True) if place[0] != 0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("drop", [NONE, PAPER], ids=["all", "dropped"])
def test_every_row_sees_what_it_sees_when_drafting(drop: dict[str, float], attention: str) -> None:
    """Against a separate forward of the text up to the anchor and then the masks, for every row."""
    model = tiny_model("llama")
    model.set_attn_implementation(attention)  # type: ignore[operator]
    ids, documents, loss_mask = _packed([[7, 5], [11]], 13)
    generator = torch.Generator().manual_seed(5)
    rows = pard_rows(ids, documents, loss_mask, PardLayout(4, MASK, **drop), generator)
    mask = bool_mask(rows) if attention == "sdpa" else additive_mask(rows, torch.float32)
    with torch.no_grad():
        packed = model(input_ids=rows.ids, attention_mask=mask, position_ids=rows.positions).logits
        for m in range(2):
            for place, (document, anchor, depth) in enumerate(_triples(rows, m)):
                text = ids[m][documents[m] == document][: anchor + 1]
                alone = model(input_ids=torch.cat([text, torch.full((depth,), MASK)])[None]).logits[0, -1]
                assert (packed[m, place] - alone).abs().max() < FP32_ERROR * alone.abs().max().clamp(min=1.0)
                assert rows.positions[m, place] == anchor + depth


@pytest.mark.parametrize("drop", [NONE, PAPER], ids=["all", "dropped"])
def test_ids_and_labels(drop: dict[str, float]) -> None:
    ids, documents, loss_mask = _packed([[9, 1, 4], [14]], 16)
    loss_mask &= torch.rand(loss_mask.shape) < 0.6
    rows = pard_rows(ids, documents, loss_mask, PardLayout(5, MASK, **drop, decay=0.5), torch.Generator().manual_seed(1))
    for m in range(2):
        for place, (document, anchor, depth) in enumerate(_triples(rows, m)):
            text, counts = ids[m][documents[m] == document], loss_mask[m][documents[m] == document]
            there = anchor + depth + 1
            labelled = there < len(text) and bool(counts[there])
            assert rows.ids[m, place] == (text[anchor] if depth == 0 else MASK)
            assert rows.labels[m, place] == (text[there] if labelled else -100)
            if labelled:
                assert documents[m, rows.places[m, place]] == document
                assert ids[m, rows.places[m, place] + 1] == text[there]
            assert rows.weights[m, place] == (0.5**depth if labelled else 0.0)


def test_an_end_of_text_is_a_label_also_where_it_is_the_padding() -> None:
    ids = torch.tensor([[5, 6, 7, 0, 0, 0]])
    documents = torch.tensor([[1, 1, 1, 1, 0, 0]])
    rows = pard_rows(ids, documents, documents != 0, PardLayout(3, MASK, **NONE))
    assert rows.labels[rows.weights > 0].tolist().count(0) == 3
    assert rows.ids[0, :4].tolist() == [5, 6, 7, 0]


@pytest.mark.parametrize("num_tokens", [1, 2, 6])
def test_without_a_drop_there_is_a_row_for_every_place_in_a_document(num_tokens: int) -> None:
    lengths = [[4, 1, 6], [9], [0]]
    rows = _rows(lengths, 12, NONE, num_tokens)
    for m, sizes in enumerate(lengths):
        expected = [
            (number, position - depth, depth)
            for depth in range(num_tokens)
            for number, size in enumerate(sizes, 3)
            for position in range(depth, size)
        ]
        assert _triples(rows, m) == expected


def test_the_paper_keeps_3_37_rows_a_token() -> None:
    length, num_tokens = 400, 8
    rows = _rows([[length], [250, 150], [100]], length, PAPER, num_tokens)
    for m, total in enumerate((400, 400, 100)):
        per_depth = Counter(depth for _, _, depth in _triples(rows, m))
        expected = [int(total * max(0.7**depth, 0.2)) for depth in range(num_tokens)]
        assert [per_depth[depth] for depth in range(6)] == expected[:6]
        # From here on all that is left is kept, but for the chains that reach the end of their document.
        assert all(expected[depth] - 2 * depth <= per_depth[depth] <= expected[depth] for depth in (6, 7))
    assert rows.ids.shape[1] / length == pytest.approx(3.37, abs=0.02)
    assert (rows.documents[2] != 0).sum() / 100 == pytest.approx(3.37, abs=0.05)


@pytest.mark.parametrize("drop", [NONE, PAPER, {"retain": 0.5, "retain_min": 0.0}], ids=str)
def test_every_chain_is_complete_and_in_order(drop: dict[str, float]) -> None:
    rows = _rows([[30, 3, 17], [50], [1, 1, 1]], 55, drop, 8)
    for m in range(3):
        places = _triples(rows, m)
        assert len(set(places)) == len(places)
        for document, anchor, depth in places:
            assert anchor >= 0
            assert depth == 0 or (document, anchor, depth - 1) in places
        assert places == sorted(places, key=lambda place: (place[2], place[0], place[1]))


def test_rows_are_drawn_uniformly() -> None:
    """Over many draws every anchor that can have a row of a depth has it equally often."""
    draws, length = 4000, 10
    ids, documents, mask = _packed([[length]], length)
    layout, generator = PardLayout(3, MASK, retain=0.6, retain_min=0.0), torch.Generator().manual_seed(0)
    rows = pard_rows(ids.expand(draws, -1), documents.expand(draws, -1), mask.expand(draws, -1), layout, generator)
    for depth, kept, able in ((1, 6, 9), (2, 3, 8)):
        counts = torch.bincount(rows.anchors[rows.depths == depth], minlength=length)[:length]
        assert int(counts.sum()) == draws * kept
        assert (counts[able:] == 0).all()
        if depth == 1:
            # Five deviations of a binomial count.
            expected, deviation = draws * kept / able, (draws * kept / able * (1 - kept / able)) ** 0.5
            assert (counts[:able] - expected).abs().max() < 5 * deviation


def test_only_chains_that_lead_to_a_label() -> None:
    """A long prompt costs its own rows and the few masks that reach into the answer."""
    length, answer, num_tokens = 60, 20, 4
    ids, documents, _ = _packed([[length]], length)
    mask = torch.arange(length)[None] >= length - answer
    whole = PardLayout(num_tokens, MASK, retain=1.0, labelled_only=True)
    every = _triples(pard_rows(ids, documents, mask, whole), 0)
    for depth in range(1, num_tokens):
        # From the chain whose last row predicts the first token of the answer to the last that has a label at this depth.
        first, last = length - answer - num_tokens, length - 2 - depth
        anchors = [anchor for _, anchor, its_depth in every if its_depth == depth]
        assert anchors == list(range(first, last + 1))
    halved = PardLayout(num_tokens, MASK, retain=0.5, retain_min=0.0, labelled_only=True)
    dropped = pard_rows(ids, documents, mask, halved, torch.Generator().manual_seed(0))
    per_depth = Counter(depth for _, _, depth in _triples(dropped, 0))
    assert [per_depth[depth] for depth in range(num_tokens)] == [length, 10, 5, 2]
    assert int((dropped.weights > 0).sum()) >= answer
    complete = _triples(dropped, 0)
    assert all(depth == 0 or (document, anchor, depth - 1) in complete for document, anchor, depth in complete)


def test_the_generator_decides() -> None:
    first, again = (_rows([[40]], 40, PAPER, 8) for _ in range(2))
    assert torch.equal(first.anchors, again.anchors)
    other = pard_rows(*_packed([[40]], 40), PardLayout(8, MASK, **PAPER), torch.Generator().manual_seed(6))
    assert not torch.equal(first.anchors, other.anchors)


def _slow_mask(rows: PardRows) -> Tensor:
    """The rule in words, one pair at a time; padding sees padding."""
    batch, size = rows.ids.shape
    mask = torch.zeros(batch, 1, size, size, dtype=torch.bool)
    for m in range(batch):
        vectors = (rows.documents[m].tolist(), rows.anchors[m].tolist(), rows.depths[m].tolist())
        places = list(zip(*vectors, strict=True))
        for q, (document, anchor, depth) in enumerate(places):
            for k, (other, its_anchor, its_depth) in enumerate(places):
                text = its_depth == 0 and its_anchor <= anchor
                chain = its_anchor == anchor and its_depth <= depth
                mask[m, 0, q, k] = document == other and (text or chain)
    return mask


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_masks_agree(block: int) -> None:
    rows = _rows([[9, 4], [6], []], 13, PAPER, 4, multiple=8)
    expected = _slow_mask(rows)
    assert rows.ids.shape[1] % 8 == 0
    assert torch.equal(bool_mask(rows, block), expected)
    assert torch.equal(additive_mask(rows, torch.float32, block) == 0, expected)
    size = rows.ids.shape[1]
    assert torch.equal(create_mask(mask_mod(rows), 3, None, size, size, device="cpu"), expected)
    assert expected.any(-1).all(), "a row that sees nothing is NaN in a softmax"


def test_documents_and_padding_never_see_each_other() -> None:
    rows = _rows([[9, 4, 5], [6]], 20, PAPER, 5, multiple=16)
    mask = bool_mask(rows)[:, 0]
    same = rows.documents[:, :, None] == rows.documents[:, None, :]
    assert not (mask & ~same).any()
    assert (rows.documents[1] == 0).any()
    assert (rows.weights[rows.documents == 0] == 0).all()


def test_rows_beyond_every_place_are_padding() -> None:
    rows = _rows([[2]], 2, NONE, 2, multiple=64)
    assert rows.ids.shape == (1, 64)
    assert (rows.documents != 0).sum() == 3


def test_a_move_keeps_the_rows() -> None:
    rows = _rows([[6]], 6, PAPER, 3)
    moved = rows.to(torch.device("meta"))
    assert moved.ids.device.type == "meta"
    assert moved.weights.shape == rows.weights.shape


def test_what_does_not_fit_is_refused() -> None:
    ids, documents, mask = _packed([[10]], 10)
    with pytest.raises(SpecDecError, match="generator"):
        pard_rows(ids, documents, mask, PardLayout(4, MASK))
    with pytest.raises(SpecDecError, match=r"\[M, L\]"):
        pard_rows(ids, documents[:, :9], mask, PardLayout(4, MASK, retain=1.0))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num_tokens": 0}, "num_tokens 0"),
        ({"multiple": 0}, "multiple 0"),
        ({"retain": 0.0}, "retain 0.0"),
        ({"retain": 1.1}, "retain 1.1"),
        ({"retain_min": -0.1}, "retain_min -0.1"),
        ({"retain_min": 1.5}, "retain_min 1.5"),
        ({"decay": 0.0}, "decay 0.0"),
    ],
)
def test_values_outside_their_range_are_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecDecError, match=named):
        PardLayout(**({"num_tokens": 4, "mask_id": MASK} | wrong))
