"""The length controllers that others use: their published schedules, their limits, and that text does not depend on them."""

from __future__ import annotations

from typing import Any

import pytest

from specdec.bass import BassPlanner, HeuristicPlanner
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.errors import SpecDecError
from specdec.generator import SpeculativeGenerator
from specdec.types import Load, RoundStats
from tests.support_compare import assert_same_greedy
from tests.support_models import left_padded, noised, prompts, tiny_model

Controller = BassPlanner | HeuristicPlanner


def _after(planner: Controller, accepted: tuple[int, ...], room: tuple[int, ...] | None = None) -> int:
    """The length after a round with these accepted lengths."""
    batch = len(accepted)
    load = Load(tuple(range(batch)), (10,) * batch, room or (1000,) * batch)
    drafted = planner.plan(load).nodes
    kept = tuple(map(min, accepted, drafted))
    planner.observe(RoundStats(load.requests, drafted, kept, drafted, batch + sum(drafted), 0.1, 1.0, 0.0, 0.0))
    return planner.length


def test_bass_grows_by_two_up_to_its_limit_when_one_request_accepts_all() -> None:
    planner = BassPlanner()
    assert planner.length == 7
    assert [_after(planner, (0, 99, 1)) for _ in range(14)] == [9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 32, 32]


def test_bass_falls_faster_from_the_second_time_on_and_never_under_the_most_accepted() -> None:
    planner = BassPlanner(first=22)
    # 22 - 3, then 19 - 2 - 1, 16 - 2 - 1 and so on.
    assert [_after(planner, (0, 0)) for _ in range(8)] == [19, 16, 13, 10, 8, 6, 4, 2]
    assert [_after(planner, (0, 0)) for _ in range(2)] == [1, 1]
    held = BassPlanner(first=12)
    assert _after(held, (11, 3)) == 11
    assert _after(held, (10, 0)) == 10


def test_bass_forgets_that_it_fell_when_it_grows() -> None:
    planner = BassPlanner(first=10)
    assert [_after(planner, (n,)) for n in (0, 0, 99, 0)] == [9, 7, 9, 8]


def test_the_heuristic_grows_by_two_and_falls_by_one() -> None:
    planner = HeuristicPlanner()
    assert [_after(planner, (n, 0)) for n in (99, 99, 0, 3, 99)] == [7, 9, 8, 7, 9]
    short = HeuristicPlanner(first=2, limit=3)
    assert [_after(short, (n,)) for n in (99, 99, 0, 0, 0)] == [3, 3, 2, 1, 1]


@pytest.mark.parametrize("kind", [BassPlanner, HeuristicPlanner])
def test_a_round_that_says_nothing_changes_nothing(kind: type[Controller]) -> None:
    planner = kind(first=6)
    assert _after(planner, (0, 0), room=(1, 1)) == 6
    assert _after(planner, (99, 0), room=(4, 4)) == 6
    assert _after(planner, (0, 0), room=(4, 4)) == 5


@pytest.mark.parametrize("kind", [BassPlanner, HeuristicPlanner])
@pytest.mark.parametrize("sizes", [(0, 8), (9, 8), (2.5, 8)], ids=str)
def test_lengths_that_cannot_be_are_refused(kind: type[Controller], sizes: tuple[Any, Any]) -> None:
    with pytest.raises(SpecDecError, match=f"{kind.__name__} first"):
        kind(*sizes)


@pytest.mark.parametrize("kind", [BassPlanner, HeuristicPlanner])
def test_text_does_not_depend_on_the_length(kind: type[Controller]) -> None:
    model = tiny_model()
    inputs = left_padded(prompts((9, 3, 14)))
    planner = kind(first=3)
    generator = SpeculativeGenerator(model, DraftModelDrafter(noised(model, 0.03)), planner=planner)
    ours = generator.generate(**inputs, max_new_tokens=40, do_sample=False)
    expected = model.generate(**inputs, max_new_tokens=40, do_sample=False)  # type: ignore[operator]
    assert_same_greedy(model, inputs, ours, expected)
    assert planner.length != 3
