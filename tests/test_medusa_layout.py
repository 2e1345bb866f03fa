"""The rows of Medusa's heads against a loop over heads, rows and positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec.errors import SpecDecError
from specdec.training.medusa_layout import medusa_rows, per_head


def _packed(lengths: list[list[int]], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of documents of these lengths, padded, with a random loss mask, set in the padding too."""
    documents = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, sizes in enumerate(lengths):
        numbers = [number for number, size in enumerate(sizes, 1) for _ in range(size)]
        documents[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.long)
    return torch.randint(3, 60, documents.shape), documents, torch.rand(documents.shape) < 0.7


def _loop(ids: Tensor, documents: Tensor, mask: Tensor, num_heads: int) -> list[tuple[int, int, int]]:
    """(head, row, label) as the definition says, one by one."""
    found, (rows, length) = [], ids.shape
    for head in range(num_heads):
        for m in range(rows):
            for t in range(length):
                there = t + 2 + head
                if there < length and documents[m, t] != 0 and documents[m, t] == documents[m, there] and mask[m, there]:
                    found.append((head, m * length + t, int(ids[m, there])))
    return found


@pytest.mark.parametrize("lengths", [[[12]], [[5, 4], [12], [1, 2, 3, 4]], [[2], [1, 1, 1]], [[0]]], ids=str)
@pytest.mark.parametrize("num_heads", [1, 5, 14])
def test_against_a_loop(lengths: list[list[int]], num_heads: int) -> None:
    ids, documents, mask = _packed(lengths, 12)
    layout = medusa_rows(ids, documents, mask, num_heads=num_heads, decay=0.8)
    found = list(zip(layout.heads.tolist(), layout.rows.tolist(), layout.labels.tolist(), strict=True))
    assert found == _loop(ids, documents, mask, num_heads)
    for head in range(num_heads):
        part = layout.of_head(head)
        assert (layout.heads[part] == head).all()
        assert torch.allclose(layout.weights[part], torch.tensor(0.8 ** (head + 1)))
    assert layout.bounds[-1] == len(found)
    assert layout.num_heads == num_heads


def test_the_mask_is_that_of_the_predicted_token() -> None:
    ids, documents = torch.arange(10, 18)[None], torch.ones(1, 8, dtype=torch.long)
    mask = torch.zeros(1, 8, dtype=torch.bool)
    mask[0, 5] = True
    layout = medusa_rows(ids, documents, mask, num_heads=4)
    assert layout.rows.tolist() == [3, 2, 1, 0]
    assert layout.labels.tolist() == [15] * 4
    assert layout.heads.tolist() == [0, 1, 2, 3]


def test_statistics_per_head() -> None:
    ids, documents, mask = _packed([[6, 3]], 10)
    layout = medusa_rows(ids, documents, mask, num_heads=8)
    values = torch.rand(len(layout.rows))
    means = per_head(values, layout)
    for head in range(8):
        part = values[layout.of_head(head)]
        expected = part.mean() if len(part) else torch.tensor(0.0)
        assert torch.allclose(means[head], expected)
    assert per_head(values > 2, layout).tolist() == [0.0] * 8


def test_what_does_not_fit_is_refused() -> None:
    ids, documents, mask = _packed([[6, 3]], 10)
    with pytest.raises(SpecDecError, match=r"\[M, L\]"):
        medusa_rows(ids[:, :9], documents, mask, num_heads=2)
    with pytest.raises(SpecDecError, match="num_heads 0"):
        medusa_rows(ids, documents, mask, num_heads=0)
    with pytest.raises(SpecDecError, match="decay"):
        medusa_rows(ids, documents, mask, num_heads=1, decay=0.0)
