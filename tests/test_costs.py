"""What the planner learns of times and of acceptance."""

from __future__ import annotations

import random

import pytest

from specdec.acceptance import AcceptanceModel
from specdec.costs import ContextSlope, CostModel, Curve, Drift, bucket
from specdec.types import RoundStats


def _stats(requests: tuple[int, ...], drafted: tuple[int, ...], accepted: tuple[int, ...], **more: object) -> RoundStats:
    return RoundStats(requests, drafted, accepted, drafted, 1, 0.0, 0.0, 0.0, 0.0, **more)  # type: ignore[arg-type]


def test_a_machine_that_slows_down_is_followed() -> None:
    costs = CostModel()
    for nodes in (0, 2, 4):
        for _ in range(9):
            costs.observe(1, nodes, 100, 1.0 + 0.1 * nodes)
            costs.observe_draft("", 1, 1, nodes, 0.1 * nodes)
    for _ in range(60):
        costs.observe(1, 0, 100, 2.0)
    assert costs.plain(1, 100) == pytest.approx(2.0, rel=0.1)
    assert costs.target(1, 4, 100)[4] > 2.0
    assert costs.draft("", 1, 1, 4) > 0.5


def test_times_between_and_beyond_measurements_do_not_fall() -> None:
    curve = Curve({0: 1.0, 4: 0.9, 8: 2.0})
    assert [curve.at(size) for size in (0, 2, 4, 6, 8, 12)] == pytest.approx([1.0, 1.0, 0.9, 1.5, 2.0, 3.0])
    assert [curve.hoped(size) for size in (0, 2, 4, 6, 8, 12)] == [1.0, 1.0, 0.9, 1.2, 2.0, 2.5]
    assert curve.knows(8)
    assert not curve.knows(6)


def test_one_slow_round_changes_nothing_nor_does_a_first_one() -> None:
    for times in ((1.0, 1.0, 50.0, 1.0, 1.0), (50.0, 1.0), (50.0, 1.0, 1.0)):
        curve = Curve()
        for seconds in times:
            curve.add(3, seconds)
        assert curve.at(3) == 1.0
        assert curve.knows(3) is (len(times) >= 3)


def test_a_median_of_several_rounds_counts_as_several() -> None:
    one, many = Curve(), Curve()
    for seconds in (1.0, 1.2):
        many.add(3, seconds, rounds=8)
        for _ in range(8):
            one.add(3, seconds)
    assert many.knows(3)
    assert many.at(3) == pytest.approx(one.at(3), rel=0.02)
    assert 1.0 < many.at(3) < 1.2


def test_a_cold_round_says_what_a_size_takes_at_most_until_it_is_measured() -> None:
    curve = Curve({4: 1.0, 16: 4.0})
    for cold in (9.0, 2.0, 1.5, 1.8):
        curve.bound(12, cold)
    assert (curve.at(12), curve.knows(12), curve.at(16)) == (1.5, False, 4.0)
    assert curve.at(8) == pytest.approx(1.25)
    curve.add(14, 1.2)
    assert curve.at(12) == 1.2
    curve.add(12, 1.3)
    curve.bound(12, 1.0)
    assert curve.at(12) == 1.3


def test_nothing_is_bounded_where_nothing_is_known() -> None:
    costs = CostModel()
    costs.observe_cold(4, 8, 0, 1.0)
    assert not costs.any_known
    costs.observe(4, 0, 0, 1.0)
    guessed = costs.target(4, 8, 0)[-1]
    costs.observe_cold(4, 8, 0, 1.1)
    assert costs.target(4, 8, 0)[-1] == pytest.approx(1.1)
    assert guessed > 1.1
    assert not costs.measured(4, 8)


def test_plain_rounds_are_lent_by_other_batch_sizes_only() -> None:
    costs = CostModel()
    for _ in range(3):
        assert not costs.lends(8)
        costs.observe(16, 0, 0, 3.0)
    assert costs.lends(8)
    assert not costs.lends(16)


def test_nearly_equal_batches_share_and_others_begin_from_the_nearest() -> None:
    assert [bucket(size) for size in (1, 4, 5, 6, 13, 16, 17, 300)] == [1, 4, 6, 6, 16, 16, 24, 384]
    costs = CostModel()
    for _ in range(3):
        costs.observe(16, 0, 0, 3.0)
    assert costs.knows_plain(15)
    assert not costs.knows_plain(8)
    # Packed rows nearly decide: until a batch size has its own times, what others took for as many rows counts.
    assert costs.measured(8, 8)
    assert not costs.measured(8, 16)
    assert costs.target(8, 8, 0)[-1] == 3.0
    for _ in range(3):
        costs.observe(8, 0, 0, 2.0)
    assert costs.knows_plain(8)
    assert costs.target(8, 0, 0) == [2.0]


def test_a_drafter_in_steps_is_guessed_to_take_as_many_times_as_long_and_hoped_to_take_half_of_that_more() -> None:
    curve = Curve(in_steps=True)
    for _ in range(3):
        curve.add(2, 1.0)
    assert curve.at(6) == pytest.approx(3.0)
    assert curve.hoped(6) == pytest.approx(2.0)


def test_one_round_that_took_long_is_no_slope() -> None:
    slope = ContextSlope()
    for step in range(200):
        slope.observe(1, step, 100.0 if step == 150 else 1.0)
    assert slope.seconds < 1e-3


def test_what_rounds_take_over_what_was_expected_is_followed_and_a_standstill_counts_little() -> None:
    drift = Drift()
    assert drift.factor == 1.0
    for _ in range(200):
        drift.observe(0.01, 0.011)
    assert drift.factor == pytest.approx(1.1, rel=0.02)
    drift.observe(0.01, 5.0)
    assert drift.factor < 1.15


def test_time_grows_with_context_where_it_was_seen_to() -> None:
    slope, rng = ContextSlope(), random.Random(0)
    assert slope.seconds == 0.0
    for step in range(2000):
        slope.observe(1, step, 1.0 + 1e-3 * step + rng.gauss(0, 0.01))
    assert slope.seconds == pytest.approx(1e-3, rel=0.2)
    flat = ContextSlope(5e-4)
    assert flat.seconds == 5e-4
    for step in range(2000):
        flat.observe(1, step, 1.0)
    assert flat.seconds < 1e-4


def test_a_machine_that_changes_its_pace_within_a_text_is_no_slope() -> None:
    """Sixteen requests, whose contexts grow together while rounds come to take a third longer."""
    costs = CostModel()
    for step in range(40):
        costs.observe(16, 0 if step % 2 else 32, 16 * (100 + step), (1.0 if step < 20 else 1.35) * (1.0 if step % 2 else 1.3))
    assert 0.95 < costs.plain(16, 16 * 140) < 1.45
    assert costs.target(16, 32, 16 * 140)[32] / costs.plain(16, 16 * 140) == pytest.approx(1.3, rel=0.05)


def test_growth_behind_the_largest_size_is_not_told_from_two_that_are_nearly_equal() -> None:
    curve = Curve()
    for size, seconds in ((16, 1.0), (47, 1.3), (48, 1.4)):
        for _ in range(9):
            curve.add(size, seconds)
    assert curve.at(80) == pytest.approx(1.8)


def test_a_shorter_draft_than_any_measured_is_taken_to_be_as_much_faster() -> None:
    drafts = Curve({2: 2.0, 4: 4.0}, in_steps=True)
    assert drafts.at(1) == pytest.approx(1.0)
    assert drafts.hoped(1) == pytest.approx(1.0)
    assert Curve({2: 2.0, 4: 4.0}).at(1) == pytest.approx(2.0)


def test_rates_are_shared_until_a_request_has_its_own() -> None:
    model = AcceptanceModel()
    for _ in range(100):
        model.observe(_stats((0, 1), (4, 4), (4, 0)), (4, 4))
    assert model.rates(0, 4)[0][0] > 0.9 > 0.2 > model.rates(1, 4)[0][0]
    assert 0.3 < model.rates(2, 1)[0][0] < 0.7
    model.forget(0)
    assert model.rates(0, 4) == model.rates(2, 4)


def test_a_draft_shorter_than_asked_counts_as_refused_behind_its_end() -> None:
    model = AcceptanceModel()
    for _ in range(100):
        model.observe(_stats((0,), (2,), (2,)), (4,))
    assert model.rates(0, 3)[1][0] > 0.9 > 0.1 > model.rates(0, 3)[2][0]


def test_ranks_of_trees_are_learned_apart() -> None:
    model, parents = AcceptanceModel(), ((0, 0, 1, 1),)
    for turn in range(200):
        path = ((1, 4), (2,), (1, 3), ())[turn % 4]
        model.observe(_stats((0,), (4,), (len(path),), paths=(path,), parents=parents), (4,))
    rates = model.rates(0, 2, 2)
    assert rates[0] == pytest.approx([0.5, 0.25], abs=0.08)
    assert rates[1] == pytest.approx([0.5, 0.5], abs=0.08)
    assert all(sum(row) <= 1 + 1e-9 for row in rates)


def test_a_profile_is_the_first_guess_and_gives_way() -> None:
    model = AcceptanceModel([[0.9, 0.05], [0.4, 0.3]])
    assert model.rates(0, 3, 2)[1] == pytest.approx([0.4, 0.3])
    for _ in range(100):
        model.observe(_stats((0,), (1,), (0,)), (1,))
    assert model.rates(0, 1)[0][0] < 0.1


def test_doubt_lets_new_rounds_count() -> None:
    model = AcceptanceModel()
    for _ in range(100):
        model.observe(_stats((0,), (1,), (0,)), (1,))
    model.forget(0)
    model.doubt()
    for _ in range(4):
        model.observe(_stats((1,), (1,), (1,)), (1,))
    assert model.rates(1, 1)[0][0] > 0.6


def test_a_size_that_never_came_is_taken_to_need_a_little_longer() -> None:
    costs = CostModel()
    for nodes in (0, 4):
        for _ in range(5):
            costs.observe(2, nodes, 0, 1.0 + nodes)
    assert costs.target(2, 4, 0)[4] == pytest.approx(5.0)
    assert costs.target(2, 4, 0)[2] == pytest.approx(3.0 * 1.04)
    # Where a drafter offers less than is asked for, sizes are averages.
    assert costs.target(2, 4, 0, share=0.75)[2] == pytest.approx(2.5)
