"""Rows filled up to round numbers: the same logits, hidden states and cache as without, and few numbers of rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from specdec.round_rows import RoundRows, filled_up, prepares_rows, round_number
from specdec.runner import ModelRunner, RunnerOptions
from specdec.types import TokenTree
from tests.support_models import FAMILIES, prompts, tiny_model

# Sums of fp32 products in another order.
TOLERANCE = 2e-4
TEXTS = prompts((23, 18, 9))


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[ModelRunner, ModelRunner]]:
    """A runner that fills rows up and one that is told not to, on a machine that would gain by it."""
    monkeypatch.setattr("specdec.runner.prepares_rows", lambda model: True)

    def make(family: str, taps: tuple[str, ...] = ()) -> tuple[ModelRunner, ModelRunner]:
        model = tiny_model(family)
        return ModelRunner(model, taps=taps), ModelRunner(model, taps=taps, options=RunnerOptions(round_rows="off"))

    return make


def _chains(size: int) -> TokenTree:
    """A chain behind each text, the second one a node shorter."""
    tokens = torch.randint(3, 61, (3, size), generator=torch.Generator().manual_seed(0))
    parents = (torch.arange(size) - 1).expand(3, size).contiguous()
    return TokenTree(tokens, parents, (size, size - 1, size))


def _widths(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each forward of the model from now on."""
    seen: list[int] = []
    inner = runner.twin.model.forward

    def forward(**kwargs: torch.Tensor) -> object:
        seen.append(kwargs["input_ids"].shape[1])
        return inner(**kwargs)

    monkeypatch.setattr(runner.twin.model, "forward", forward)
    return seen


def test_few_numbers_of_rows_come_and_none_is_much_larger() -> None:
    numbers = [round_number(rows) for rows in range(1, 1025)]
    assert numbers[:16] == list(range(1, 17))
    assert all(rows <= number <= max(rows + 7, rows * 1.25) for rows, number in enumerate(numbers, 1))
    assert len(set(numbers)) <= 16 + 6 + 16
    assert [round_number(number) for number in numbers] == numbers


def test_filling_up_leaves_what_is_there() -> None:
    values = torch.tensor([[5, 6, 7]])
    assert filled_up(values, 5).tolist() == [[5, 6, 7, 0, 0]]
    assert filled_up(values, 3) is values


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_are_filled_up_say_the_same(
    family: str, pairs: Callable[..., tuple[ModelRunner, ModelRunner]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, plain = pairs(family)
    widths = _widths(ours, monkeypatch), _widths(plain, monkeypatch)
    for runner in (ours, plain):
        runner.begin(3, 64)
        runner.prefill(TEXTS)
    for _ in range(2):
        found = [runner.score(_chains(7)).logits for runner in (ours, plain)]
        for b, size in enumerate((7, 6, 7)):
            torch.testing.assert_close(found[0][b, :size], found[1][b, :size], atol=TOLERANCE, rtol=TOLERANCE)
        for runner in (ours, plain):
            runner.commit([[1, 2], [1], []])
        behind = [runner.extend([[4, 5], [6] * 20, [7]]) for runner in (ours, plain)]
        torch.testing.assert_close(*behind, atol=TOLERANCE, rtol=TOLERANCE)
    assert widths == ([56, 24, 24, 24, 24], [50, 20, 23, 20, 23])
    for mine, theirs in zip(ours.cache.layers, plain.cache.layers, strict=True):
        # Keys of the live rows, and nothing anywhere else.
        torch.testing.assert_close(mine, theirs, atol=TOLERANCE, rtol=TOLERANCE)


def test_taps_are_of_the_live_rows(pairs: Callable[..., tuple[ModelRunner, ModelRunner]]) -> None:
    found = []
    for runner in pairs("llama", ("last_hidden",)):
        runner.begin(3, 64)
        runner.prefill(TEXTS)
        found.append(runner.score(_chains(7)).taps["last_hidden"])
    torch.testing.assert_close(found[0][:, :6], found[1][:, :6], atol=TOLERANCE, rtol=TOLERANCE)


def test_numbers_of_rows_that_are_filled_up_alike_are_captured_as_one(
    pairs: Callable[..., tuple[ModelRunner, ModelRunner]],
) -> None:
    ours, _ = pairs("llama")
    ours.begin(3, 200)
    ours.prefill(TEXTS)
    # 20 and 17 rows.
    for size in (7, 6) * 6:
        again = ours.score(_chains(size)).logits
    assert ours.flat.recorded == 1
    assert 24 in ours.flat
    ours.flat.clear()
    torch.testing.assert_close(ours.score(_chains(6)).logits, again, atol=0, rtol=0)


def test_models_in_fp32_are_left_alone() -> None:
    assert not prepares_rows(tiny_model("llama"))


def test_bf16_is_filled_up_where_the_cpu_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").bfloat16()
    for fast in (True, False):
        monkeypatch.setattr("specdec.round_rows.cpu_has_fast_bf16", lambda fast=fast: fast)
        assert prepares_rows(model) is fast


def test_numbers_that_did_not_come_take_one_that_is_captured_until_they_came_often() -> None:
    captured: set[int] = set()
    rows = RoundRows(captured.__contains__)
    assert [rows(n) for n in (1, 5, 12, 20, 100)] == [1, 5, 12, 24, 112]
    captured |= {4, 12, 24}
    # At most four more or a quarter, and the nearest one.
    assert [rows(n) for n in (1, 3, 4, 5, 7, 8, 11, 12, 13, 16, 20, 25)] == [4, 4, 4, 5, 7, 12, 12, 12, 13, 16, 24, 32]
    captured |= {112}
    assert [rows(n) for n in (88, 90, 97)] == [88 + 8, 112, 112]
    assert [rows(9) for _ in range(40)] == [12] * 32 + [9] * 8
    captured.add(9)
    assert rows(9) == 9


def test_prompts_are_filled_up_to_round_numbers_only(
    pairs: Callable[..., tuple[ModelRunner, ModelRunner]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = pairs("llama")
    ours.begin(3, 200)
    ours.prefill(TEXTS)
    for _ in range(6):
        ours.score(_chains(5))
    assert 14 in ours.flat
    widths = _widths(ours, monkeypatch)
    # Prompts are never run captured, so 12 rows gain nothing by being 14.
    for length in (12, 22):
        ours.begin(1, 64)
        ours.prefill(prompts((length,)))
    assert widths == [12, 24]


def test_a_batch_that_shrinks_takes_the_forward_that_is_captured(
    pairs: Callable[..., tuple[ModelRunner, ModelRunner]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, plain = pairs("llama")
    for runner in (ours, plain):
        runner.begin(1, 128)
        runner.prefill(TEXTS[:1])
    tree = TokenTree(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[-1, 0, 1, 2]]), (4,))
    for _ in range(4):
        ours.score(tree)
    assert 4 in ours.flat
    cold, widths = ours.cold, _widths(plain, monkeypatch)
    small = TokenTree(tree.tokens[:, :3], tree.parents[:, :3], (3,))
    found = [runner.score(small).logits for runner in (ours, plain)]
    torch.testing.assert_close(*found, atol=TOLERANCE, rtol=TOLERANCE)
    assert ours.cold == cold
    assert 3 not in ours.flat
    assert widths == [3]
