"""The guard: off where drafting does not pay, tried again at growing distances, on again after a trial that goes well."""

from __future__ import annotations

import pytest

from specdec.guard import TRIAL, Guard, Judged

GOOD, BAD = Judged(1, 2, 2, 1.5), Judged(1, 2, 0, 1.5)


def _off() -> Guard:
    """After a draft that was accepted and eight that were not worth it."""
    guard = Guard()
    guard.observe(Judged(1, 2, 1, 8.0), 1.0)
    for _ in range(7):
        assert guard.on
        guard.observe(BAD, 1.0)
    assert not guard.on
    return guard


def _wait(guard: Guard) -> int:
    rounds = 0
    while not guard.trying:
        guard.observe_plain()
        rounds += 1
    return rounds


def test_rounds_that_pay_keep_it_on() -> None:
    guard = Guard()
    for _ in range(200):
        assert not guard.observe(GOOD, 1.0)
    assert guard.on
    assert not guard.trying


def test_first_rounds_in_which_nothing_is_accepted_are_a_trial_that_failed() -> None:
    guard = Guard()
    guard.observe(Judged(1, 0, 0, 1.0), 1.0)
    for _ in range(TRIAL):
        assert guard.on
        guard.observe(BAD, 1.0)
    assert not guard.on
    assert _wait(guard) == 16


def test_what_cold_rounds_took_is_not_held_against_drafting_unless_nothing_is_accepted() -> None:
    guard = Guard()
    guard.observe(Judged(1, 2, 1, 20.0, cold=True), 1.0)
    for turn in range(100):
        guard.observe(Judged(1, 2, 2, 20.0, cold=True) if turn % 2 else GOOD, 1.0)
        assert guard.on
    barren = Guard()
    for _ in range(TRIAL):
        assert barren.on
        barren.observe(Judged(1, 2, 0, 20.0, cold=True), 1.0)
    assert not barren.on


def test_bad_luck_of_a_few_rounds_does_not_turn_it_off() -> None:
    guard = Guard()
    for turn in range(100):
        guard.observe(GOOD if turn % 3 else BAD, 1.0)
        assert guard.on


def test_trials_that_fail_are_spaced_so_that_they_cost_little() -> None:
    guard, waits, tried = _off(), list[int](), 0
    for _ in range(12):
        waits.append(_wait(guard))
        while guard.trying:
            assert not guard.observe(BAD, 1.0)
            tried += 1
    assert waits[:2] == [16, 32]
    assert waits == sorted(waits)
    assert tried == 12 * TRIAL
    # Half a round is lost in each trial round; that over the last wait is the share that trials may cost.
    assert TRIAL * 0.5 / waits[-1] == pytest.approx(0.006, rel=0.1)


def test_a_trial_that_goes_well_turns_it_on_and_says_so() -> None:
    guard = _off()
    _wait(guard)
    assert guard.observe(GOOD, 1.0)
    assert guard.on
    assert not guard.observe(GOOD, 1.0)


def test_a_pause_of_the_planner_waits_too() -> None:
    guard = Guard()
    guard.pause(1.0)
    assert not guard.on
    assert _wait(guard) == 16


def test_a_new_text_is_tried_soon() -> None:
    guard = _off()
    guard.new_text()
    assert _wait(guard) == 1


def test_one_long_round_is_not_held_against_drafting() -> None:
    guard = Guard()
    for turn in range(40):
        guard.observe(Judged(1, 2, 2, 60.0 if turn == 20 else 1.5), 1.0)
        assert guard.on
