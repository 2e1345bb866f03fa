"""Forwards written out flat: two recordings of a kind serve every other number of rows, and never where they do not agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.flat import FlatForwards
from specdec.linear import group_sizes, kind_of
from specdec.runner import ModelRunner, RunnerOptions
from specdec.types import TokenTree
from tests.support_models import FAMILIES, prompts, tiny_model

TABLE = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Eager = Callable[[Tensor, Tensor, Any], tuple[Tensor, ...]]


def plain(tokens: Tensor, positions: Tensor, context: Any) -> tuple[Tensor, ...]:
    rows = tokens.shape[1]
    x = TABLE[tokens].view(1, rows, 2, 3).transpose(1, 2).reshape(2 * rows, 3)
    return ((x * positions.repeat(1, 2).view(-1, 1)).view(2, rows, 3).sum(0),)


def in_blocks(tokens: Tensor, positions: Tensor, context: Any) -> tuple[Tensor, ...]:
    """Scaled by how many blocks of 8 the rows need, which two small sizes have in common."""
    return (TABLE[tokens[0]] * -(-tokens.shape[1] // 8),)


def in_parts(tokens: Tensor, positions: Tensor, context: Any) -> tuple[Tensor, ...]:
    """Two parts, the second one a row smaller at odd sizes."""
    rows = tokens.shape[1]
    return (torch.cat([part + 1 for part in TABLE[tokens[0]].split([rows - rows // 2, rows // 2])]),)


def four_at_most(tokens: Tensor, positions: Tensor, context: Any) -> tuple[Tensor, ...]:
    return (TABLE[tokens[0]].narrow(0, 0, 4) if tokens.shape[1] >= 4 else TABLE[tokens[0]],)


def by_number(tokens: Tensor, positions: Tensor, context: Any) -> tuple[Tensor, ...]:
    return (TABLE[tokens[0]] * (1.0 / tokens.shape[1]),)


class Context:
    """No attention."""

    def attend(self, *args: Any) -> Tensor:
        raise NotImplementedError


def ids(rows: int) -> tuple[Tensor, Tensor]:
    return torch.arange(3, 3 + rows)[None], torch.arange(rows)[None]


def flat_of(after: int = 1, most: int = 64, trusted_after: int | None = None) -> FlatForwards:
    return FlatForwards("a model", lambda rows: 0, after=after, most=most, trusted_after=trusted_after)


def check(flat: FlatForwards, eager: Eager, rows: int, times: int = 2) -> None:
    for _ in range(times):
        assert torch.equal(flat(eager, *ids(rows), Context)[0], eager(*ids(rows), None)[0])


def colds(flat: FlatForwards, sizes: Sequence[int]) -> list[int]:
    found = [flat.cold]
    for rows in sizes:
        check(flat, plain, rows, times=1)
        found.append(flat.cold)
    return [after - before for before, after in pairwise(found)]


def test_the_third_size_needs_no_recording() -> None:
    flat = flat_of()
    for rows in (4, 7, 5, 30, 1, 9):
        check(flat, plain, rows)
        assert rows in flat
    assert flat.recorded == 2
    assert flat.refused is None


def test_forwards_that_are_not_yet_as_later_ones_will_be_are_cold() -> None:
    assert colds(flat_of(after=3), (4, 4, 4, 4, 7, 7, 7, 7, 5, 5, 5, 5)) == [1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0, 0]


def test_where_nothing_more_is_recorded_only_the_first_forward_of_a_size_is_cold() -> None:
    assert colds(flat_of(after=3, most=0), (4, 4, 4, 4, 7, 7)) == [1, 0, 0, 0, 1, 0]


def test_a_size_that_comes_once_is_not_compared() -> None:
    flat = flat_of()
    for rows in (4, 7, 5):
        check(flat, plain, rows, times=1)
    assert flat.recorded == 2
    assert 5 not in flat
    check(flat, plain, 5, times=1)
    assert flat.recorded == 2
    assert 5 in flat


def test_a_kind_that_comes_now_and_then_is_not_recorded() -> None:
    flat = FlatForwards("a model", lambda rows: rows > 4, after=3, most=64)
    check(flat, plain, 4, times=3)
    for _ in range(5):
        check(flat, plain, 9, times=2)
        check(flat, plain, 4, times=16)
    assert (4 in flat, 9 in flat) == (True, False)
    check(flat, plain, 9, times=3)
    assert 9 in flat


@pytest.mark.parametrize(("eager", "sizes"), [(in_blocks, (4, 7, 20, 30)), (in_parts, (4, 8, 5, 9)), (by_number, (4, 7, 5, 9))])
def test_a_size_that_does_not_agree_is_recorded_itself(eager: Eager, sizes: tuple[int, ...]) -> None:
    flat = flat_of()
    for rows in sizes:
        check(flat, eager, rows)
    # The second forward says that it does not agree, and the next is recorded.
    for rows in sizes:
        check(flat, eager, rows)
        assert rows in flat
    assert flat.recorded > 2
    assert flat.refused is None


def test_sizes_of_a_kind_count_together_until_the_next_recording() -> None:
    flat = flat_of(after=3)
    for rows in (4, 5, 6, 7, 8, 9, 10):
        check(flat, plain, rows, times=1)
    assert [rows for rows in range(4, 11) if rows in flat] == [6, 9]
    check(flat, plain, 4, times=1)
    assert (flat.recorded, 4 in flat) == (2, True)


def test_enough_sizes_that_agreed_speak_for_all() -> None:
    counted: list[int] = []

    def watched(tokens: Tensor, positions: Tensor, context: Any) -> tuple[Tensor, ...]:
        counted.append(tokens.shape[1])
        return plain(tokens, positions, context)

    flat = flat_of(trusted_after=2)
    for rows in (4, 7, 5, 30, 12, 13):
        for _ in range(2):
            assert torch.equal(flat(watched, *ids(rows), Context)[0], plain(*ids(rows), None)[0])
    assert counted == [4, 7, 5, 30]
    assert all(rows in flat for rows in (12, 13))
    # A size that is trusted runs for the first time, too.
    assert flat.cold == 6


def test_a_trusted_function_that_does_not_fit_gives_way_to_the_eager_forward() -> None:
    flat = flat_of(trusted_after=2)
    for rows in (4, 7, 5, 6, 30):
        check(flat, four_at_most, rows)
    assert flat.recorded == 2
    for rows in (3, 2):
        check(flat, four_at_most, rows)
        assert rows in flat
    assert flat.recorded == 4
    # What the last two have in common has to be trusted anew, and does not fit this one.
    check(flat, four_at_most, 9)


def test_other_kinds_and_other_weights_share_nothing() -> None:
    flat = FlatForwards("a model", lambda rows: rows % 2, after=1, most=64)
    for rows in (4, 6, 5):
        check(flat, plain, rows)
    assert flat.recorded == 3
    flat.clear()
    assert 4 not in flat
    check(flat, plain, 4, times=1)
    assert flat.recorded == 1


def test_keys_and_values_are_those_of_the_forward_that_counts() -> None:
    kept: list[Tensor] = []

    class Keeps:
        def attend(self, query: Tensor, key: Tensor, value: Tensor, *how: Any) -> Tensor:
            kept.append(value.clone())
            return value

    def noisy(tokens: Tensor, positions: Tensor, context: Any) -> tuple[Tensor, ...]:
        x = TABLE[tokens[0]] + torch.rand(1)
        return (context.attend(x, x, x, 0, 1.0, None, None, None),)

    flat = flat_of()
    for _ in range(3):
        assert torch.equal(flat(noisy, *ids(4), Keeps)[0], kept[-1])
    assert flat.refused == "the captured forward differs from the eager one"


def test_a_model_that_is_not_captured_tells_the_first_forward_of_a_size() -> None:
    flat = FlatForwards("a model", lambda rows: 0, after=1, most=64, refused="switched off")
    assert colds(flat, (4, 4, 7, 4)) == [1, 0, 1, 0]
    assert flat.recorded == 0


def test_recordings_end_at_the_most() -> None:
    flat = flat_of(most=2)
    for rows in (4, 7, 5):
        check(flat, by_number, rows)
    assert (flat.recorded, 5 in flat) == (2, False)


def test_kinds_tell_how_linear_layers_group_their_rows() -> None:
    for a in range(2, 9):
        for b in range(a, 9):
            alike = len(group_sizes(a)) == len(group_sizes(b)) == 1 or group_sizes(a) == group_sizes(b)
            assert (kind_of(a, grouped=True) == kind_of(b, grouped=True)) == alike
    assert len({kind_of(rows, grouped=True) for rows in (1, 2, 9)}) == 3
    assert {kind_of(rows, grouped=False) for rows in (4, 8, 9, 300)} == {kind_of(9, grouped=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_size_of_a_real_forward_is_bit_identical(family: str, dtype: torch.dtype) -> None:
    model, texts = tiny_model(family).to(dtype), prompts((9,))
    eager = ModelRunner(model, options=RunnerOptions(capture="off", round_rows="off"))
    flat = ModelRunner(model, options=RunnerOptions(capture_after=1, round_rows="off"))
    for runner in (eager, flat):
        runner.begin(1, 128)
        runner.prefill(texts)
    for size in (9, 12, 10, 15, 20, 3, 2, 10, 15, 20, 3, 2, 10, 15):
        tokens = torch.arange(3, 3 + size)[None]
        tree = TokenTree(tokens, torch.tensor([[-1, 0, 0, *range(1, size - 2)][:size]]), (size,))
        assert torch.equal(eager.score(tree).logits, flat.score(tree).logits)
        for runner in (eager, flat):
            runner.commit([[1]])
    assert flat.flat.refused is None, flat.flat.refused
    assert all(size in flat.flat for size in (9, 12, 10, 15, 20, 3, 2))
    assert flat.flat.recorded == 4
