"""What a cell of the never-slower grid says of seconds that are known."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from specdec.bench.grid_cell import METHODS, OURS, PLAIN, Cell, losers, paired_ratio, verdict
from specdec.bench.lockstep import Ran
from specdec.metrics import StatsCollector
from specdec.types import RoundStats

_ROUND = RoundStats((0,), (0,), (0,), (0,), 1, 0.1, 0.8, 0.05, 0.05)


def _ran(cell: Cell, seconds: dict[str, float], *, slow: dict[str, int] | None = None) -> dict[str, Ran]:
    """A turn of 32 segments, or as many as `slow` says for methods that were given up."""
    collector = StatsCollector(1)
    for _ in range(100):
        collector.add(_ROUND, 1.0)
    found = {}
    for name in cell.methods:
        count = (slow or {}).get(name, 32)
        result: Any = ([[1, 2]], collector.stats(), 0.5) if count == 32 else None
        found[name] = Ran((seconds.get(name, 1.0) / 32,) * count, result)
    return found


def test_a_turn_that_the_machine_was_slow_in_moves_the_ratio_little_and_what_starting_costs_counts_whole() -> None:
    even = paired_ratio([1.0] * 10, [1.0] * 10)
    assert even == (1.0, 1.0, 1.0)
    ratio, low, high = paired_ratio([1.0] * 10, [*[1.0] * 9, 5.0])
    assert math.log(ratio) == pytest.approx(-0.03)
    assert low < ratio < high
    started = paired_ratio([1.0] * 10, [1.25, *[1.0] * 9])[0]
    assert math.log(started) == pytest.approx(-math.log(1.25) / 10)


def test_a_cell_ends_when_its_interval_is_narrow_and_shares_are_of_the_best_length() -> None:
    cell, seconds = Cell(), {PLAIN: 1.0, OURS: 0.6, "fixed 2": 0.5, "fixed 3": 0.53}
    for _ in range(8):
        assert not cell.done
        cell.add(_ran(cell, seconds))
        assert cell.turns > 1 or cell.methods == list(METHODS)
        assert cell.turns in (1, 8) or cell.methods == [PLAIN, OURS, "fixed 2", "fixed 3"]
    assert cell.done
    report = cell.report()
    assert report["ratio"] == pytest.approx((1 / 0.6,) * 3)
    assert report["best_fixed"] == "fixed 2"
    assert report["share_of_best"] == pytest.approx(0.5 / 0.6)
    assert report["fixed"]["fixed 1"] == pytest.approx(1.0)
    assert report["equal"] == report["turns"] == 8
    assert report["own_share"] == pytest.approx(0.5 / 800)
    json.dumps(report)


def test_an_interval_that_is_wide_is_narrowed_by_turns_of_two_methods_alone() -> None:
    cell, seconds = Cell(), {PLAIN: 1.0, "fixed 2": 0.98}
    while not cell.done:
        assert ("fixed 2" in cell.methods) == (cell.turns < 8)
        cell.add(_ran(cell, seconds | {OURS: 0.97 if cell.turns % 2 else 1.07}))
    report = cell.report()
    low, high = report["ratio"][1:]
    assert 8 < report["turns"] < 32
    assert high - low <= 0.06
    assert report["fixed"]["fixed 2"] == pytest.approx(1 / 0.98)
    assert report["share_of_best"] == pytest.approx(0.98 / (0.97 * 1.07) ** 0.5)


def test_a_cell_that_stays_wide_ends_and_counts_as_wide() -> None:
    cell = Cell()
    while not cell.done:
        cell.add(_ran(cell, {OURS: 0.8 if cell.turns % 2 else 1.25}))
    report = cell.report()
    assert report["turns"] == 32
    assert verdict({"cell": report})["neither_narrow_nor_above_0.97"] == ["cell"]


def test_where_no_length_pays_the_best_is_plain_decoding() -> None:
    cell, seconds = Cell(), dict.fromkeys(METHODS, 4.0) | {PLAIN: 1.0, OURS: 1.02}
    for _ in range(2):
        assert cell.methods == list(METHODS)
        cell.add(_ran(cell, seconds, slow=dict.fromkeys([name for name in METHODS if name.startswith("fixed")], 10)))
    assert cell.methods == [PLAIN, OURS]
    while not cell.done:
        cell.add(_ran(cell, seconds))
    report = cell.report()
    assert report["best_fixed"] == PLAIN
    assert report["share_of_best"] == pytest.approx(1 / 1.02)
    assert report["fixed"]["fixed 8"] == pytest.approx(0.25)


def test_a_length_that_does_badly_in_one_text_may_still_be_the_best() -> None:
    cell, seconds = Cell(), {PLAIN: 1.0, OURS: 0.6, "fixed 4": 0.5}
    cell.add(_ran(cell, seconds | {"fixed 4": 1.6}, slow={"fixed 4": 10}))
    for _ in range(7):
        cell.add(_ran(cell, seconds))
    report = cell.report()
    assert report["best_fixed"] == "fixed 4"
    assert report["fixed"]["fixed 4"] == pytest.approx(math.exp((7 * math.log(2) - math.log(1.6)) / 8))


def test_a_segment_in_which_the_machine_stood_still_counts_as_a_few() -> None:
    cell = Cell()
    for turn in range(12):
        ran = _ran(cell, {})
        if turn == 3:
            ran[OURS] = Ran((*ran[OURS].seconds[:-1], 20.0), ran[OURS].result)
        cell.add(ran)
    report = cell.report()
    assert report["seconds"][OURS][3] == pytest.approx(20 + 31 / 32, abs=1e-3)
    assert report["counted"][OURS][3] == pytest.approx(33 / 32, abs=1e-4)
    assert report["ratio"][0] == pytest.approx(math.exp(-math.log(33 / 32) / 12))


def test_a_round_of_many_tokens_is_no_pause_of_the_machine() -> None:
    """Eight tokens a round are two segments, of which the second takes no time."""
    cell = Cell()
    for _ in range(5):
        ran = _ran(cell, {})
        ran["fixed 8"] = Ran((1 / 32, 1e-5) * 16, ran["fixed 8"].result) if "fixed 8" in ran else ran[PLAIN]
        cell.add(ran)
    assert cell.report()["fixed"]["fixed 8"] == pytest.approx(2.0, rel=1e-3)


def test_what_starting_costs_counts_whole() -> None:
    cell = Cell()
    for turn in range(5):
        ran = _ran(cell, {})
        if not turn:
            ran[OURS] = Ran((*[5 / 32] * 4, *ran[OURS].seconds[4:]), ran[OURS].result)
        cell.add(ran)
    assert cell.report()["counted"][OURS] == pytest.approx([1 + 16 / 32, 1, 1, 1, 1])


def test_only_fixed_lengths_are_given_up() -> None:
    slow = {name: [9.0] * 10 for name in METHODS} | {PLAIN: [1.0] * 10}
    assert set(losers(slow)) == {name for name in METHODS if name.startswith("fixed")}
    assert losers({name: own[:2] for name, own in slow.items()}) == []
    assert losers({name: [1.4] * 10 for name in METHODS} | {PLAIN: [1.0] * 10}) == []


def test_the_verdict_names_cells_that_are_slower_unsure_or_different() -> None:
    good = {"ratio": (1.5, 1.4, 1.6), "share_of_best": 1.0, "forecast_errors": (0.05, 0.2), "own_share": 0.004}
    good |= {"equal": 5, "explained": 0, "unexplained": 0, "turns": 5}
    slower, unsure = good | {"ratio": (0.9, 0.88, 0.92)}, good | {"ratio": (1.0, 0.9, 1.1), "equal": 4, "unexplained": 1}
    found = verdict({"good": good, "slower": slower, "unsure": unsure})
    assert found["wholly_below_0.97"] == ["slower"]
    assert found["neither_narrow_nor_above_0.97"] == ["unsure"]
    assert found["not_equal"] == found["beyond_rounding"] == ["unsure"]
    assert found["forecasts_within_10_percent"] == 0.5
    assert found["forecasts_within_10_percent_after_the_first"] == 0.0
    assert found["least_ratio"] == 0.9
