"""What the request that ends last gets of all that is accepted in a batch."""

from __future__ import annotations

import pytest

from specdec.stragglers import Stragglers


def _batch(stragglers: Stragglers, accepted: tuple[int, ...], rounds: int) -> None:
    """As many rounds of all, and one in which the first request is left."""
    for _ in range(rounds):
        stragglers.observe(4, tuple(range(len(accepted))), accepted)
    stragglers.observe(1, (0,), (0,))
    stragglers.end()


def test_larger_batches_are_guessed_to_wait_longer_and_one_request_waits_for_none() -> None:
    shares = [Stragglers().share(size) for size in (1, 2, 4, 16, 10_000)]
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] > 0.0


@pytest.mark.parametrize(("accepted", "share"), [((1, 2, 2, 3), 0.5), ((2, 2, 2, 2), 1.0), ((0, 4, 4, 4), 0.05)])
def test_the_share_is_that_of_the_request_that_was_left(accepted: tuple[int, ...], share: float) -> None:
    stragglers = Stragglers()
    for _ in range(12):
        _batch(stragglers, accepted, 400)
    assert stragglers.share(4) == pytest.approx(share, abs=0.01)
    assert stragglers.share(16) == Stragglers().share(16)


def test_later_batches_count_for_more() -> None:
    stragglers = Stragglers()
    _batch(stragglers, (2, 2, 2, 2), 100)
    before = stragglers.share(4)
    for _ in range(12):
        _batch(stragglers, (1, 3, 3, 3), 100)
    assert before > 0.95
    assert stragglers.share(4) == pytest.approx(0.4, abs=0.05)


def test_rounds_that_nothing_was_accepted_in_say_nothing() -> None:
    stragglers = Stragglers()
    _batch(stragglers, (0, 0, 0, 0), 100)
    assert stragglers.share(4) == Stragglers().share(4)
