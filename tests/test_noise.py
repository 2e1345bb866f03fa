"""Busy hosts for replays: what a planner sees is noisy, what it is judged by is not, and a seed is one host."""

from __future__ import annotations

import random
from statistics import median

import pytest

from specdec.bench.noise import Busy
from specdec.bench.replay import LENGTHS, Recording, Times, Took, fixed, replay
from specdec.goodput import GoodputPlanner
from specdec.planner import FixedPlanner
from tests.support_replay import text

TEXTS = {name: tuple(text(random.Random(seed), rate) for seed in range(8)) for name, rate in (("bad", 0.0), ("good", 0.75))}
TIMES = tuple(Times(b, tuple(1 + 0.05 * b * (n + 1) for n in LENGTHS), tuple(0.1 * n for n in LENGTHS)) for b in (1, 4))
KNOWN = Recording(TIMES, TEXTS)


def _rounds(seed: int, drafted: tuple[int, ...], count: int, behind: int = 0) -> list[Took]:
    host = Busy(KNOWN, seed)
    return [host.took(drafted, behind) for _ in range(count)]


def test_a_seed_is_one_host() -> None:
    assert _rounds(1, (2,), 50) == _rounds(1, (2,), 50)
    assert _rounds(1, (2,), 50) != _rounds(2, (2,), 50)


def test_the_clock_shows_another_pace_and_stops_while_what_counts_stays() -> None:
    rounds = [took for took in _rounds(0, (2,), 4000) if not took.cold_target and not took.cold_draft]
    right = KNOWN.target_s(1, 2) + KNOWN.draft_s(1, 2)
    assert {took.counted_s for took in rounds} == {right}
    shown = [(took.target_s + took.draft_s) / right for took in rounds]
    assert median(shown) > 1.05
    assert max(shown) > 2.5
    assert sum(one < 1.1 for one in shown) > 500
    assert sum(1.25 < one < 1.5 for one in shown) > 500


def test_a_size_is_cold_until_its_fourth_round_which_captures_it() -> None:
    rounds = _rounds(0, (2,), 8)
    assert [took.cold_target for took in rounds] == [True] * 4 + [False] * 4
    assert [took.cold_draft for took in rounds] == [took.cold_target for took in rounds]
    slower, last = rounds[0].counted_s / rounds[7].counted_s, rounds[3].counted_s - rounds[0].counted_s
    assert slower == pytest.approx(1.35)
    assert last == pytest.approx(4 * KNOWN.target_s(1, 0))


def test_plain_decoding_is_charged_what_was_recorded() -> None:
    busy = replay(KNOWN, "bad", 4, FixedPlanner(nodes=0), machine=Busy(KNOWN, 3))
    assert busy.seconds == pytest.approx(replay(KNOWN, "bad", 4, FixedPlanner(nodes=0)).seconds)
    assert sum(stats.seconds for stats in busy.rounds) != pytest.approx(busy.seconds, rel=0.01)


def test_a_drafter_that_lags_behind_has_to_read() -> None:
    near, far = _rounds(0, (2, 2), 10, behind=16)[-1], _rounds(0, (2, 2), 10, behind=116)[-1]
    assert far.counted_s == pytest.approx(near.counted_s + 100 * 0.02 * KNOWN.target_s(1, 0))
    assert far.cold_draft
    assert not near.cold_draft


@pytest.mark.parametrize("name", list(TEXTS))
@pytest.mark.parametrize("batch", [1, 4])
def test_the_planner_is_not_slower_on_busy_hosts(name: str, batch: int) -> None:
    lengths = fixed(KNOWN, name, batch)
    for seed in range(4):
        ours = replay(KNOWN, name, batch, GoodputPlanner(), turns=batch, machine=Busy(KNOWN, seed))
        assert ours.goodput >= 0.95 * lengths[0]
        assert name == "bad" or ours.goodput >= 0.85 * max(lengths.values())
