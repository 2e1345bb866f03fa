"""What trying sizes may cost."""

from __future__ import annotations

from specdec.hopes import Hopes


def test_tries_end_when_they_have_cost_too_much_and_go_on_with_time() -> None:
    hopes = Hopes()
    assert hopes.due(1.0)
    for _ in range(4):
        hopes.observe(1.0, 2.0, 1.0, hoped=True, cold=False)
    assert not hopes.due(1.0)
    hopes.total_s = 1000.0
    assert hopes.due(1.0)


def test_what_drafting_gains_pays_for_tries_and_what_it_loses_is_no_try() -> None:
    hopes = Hopes()
    for _ in range(4):
        hopes.observe(1.0, 2.0, 1.0, hoped=True, cold=False)
    for _ in range(30):
        hopes.observe(2.0, 1.0, 1.0, hoped=False, cold=False)
    assert hopes.due(1.0)
    other = Hopes()
    for _ in range(9):
        other.observe(1.0, 2.0, 1.0, hoped=False, cold=False)
    assert other.due(1.0)


def test_preparing_has_a_budget_of_its_own() -> None:
    for cold in (True, False):
        hopes = Hopes()
        hopes.observe(2.0, 12.0, 1.0, hoped=True, cold=cold)
        assert hopes.due(1.0) is not cold


def test_unmeasured_sizes_are_thought_of_each_time_first_and_seldom_later() -> None:
    hopes = Hopes()
    due = [hopes.due(1.0) for _ in range(40)]
    assert all(due[:32])
    assert sum(due[32:]) == 2
