"""The goodput planner on simulated machines: optimal allocations, plans near the best, speed never given away, changes followed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from specdec.acceptance import AcceptanceModel
from specdec.allocation import allocate, chain_scores
from specdec.costs import CostModel, Curve
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.errors import SpecDecError
from specdec.generator import SpeculativeGenerator
from specdec.goodput import GoodputPlanner
from specdec.planner import FixedPlanner, Planner
from specdec.types import Load, RoundStats
from tests.support_models import left_padded, noised, prompts, tiny_model


def _brute_force(scores: Sequence[Sequence[float]], seconds: Sequence[float]) -> float:
    """The best goodput over all numbers of nodes of all requests."""
    best = 0.0
    for counts in product(*(range(len(row) + 1) for row in scores)):
        if sum(counts) < len(seconds):
            tokens = len(scores) + sum(sum(row[:count]) for row, count in zip(scores, counts, strict=True))
            best = max(best, tokens / seconds[sum(counts)])
    return best


@pytest.mark.parametrize("seed", range(60))
def test_allocations_are_the_best_there_are(seed: int) -> None:
    rng = random.Random(seed)
    scores = [
        chain_scores([rng.choice([0.0, 0.3, 0.5, 0.9, 1.0, rng.random()]) for _ in range(4)]) for _ in range(rng.randint(1, 4))
    ]
    steps = sorted(rng.uniform(1.0, 3.0) for _ in range(3))
    seconds = [steps[min(n // 5, 2)] + rng.choice([0.0, 0.05]) * n for n in range(rng.randint(1, 17))]
    found = allocate(scores, seconds)
    assert found.goodput == pytest.approx(_brute_force(scores, seconds))
    assert sum(found.nodes) < len(seconds)
    tokens = len(scores) + sum(sum(row[:count]) for row, count in zip(scores, found.nodes, strict=True))
    assert found.tokens == pytest.approx(tokens)


def test_of_equals_the_smallest_wins_and_zero_scores_cost_nothing() -> None:
    assert allocate([[1.0, 1.0], [1.0]], [1.0, 1.5, 2.0, 2.5]).nodes == (0, 0)
    assert allocate([[0.0], [0.0]], [1.0, 1.0, 1.0]).nodes == (0, 0)


@dataclass
class _Machine:
    """Times of rounds and acceptance, in place of models."""

    target_s: Callable[[int], float]
    draft_s: Callable[[int], float]
    rate: float
    rng: random.Random
    seconds: float = 0.0
    tokens: int = 0

    def run(self, planner: Planner, rounds: int, batch: int = 1, noise: float = 0.0) -> float:
        """Goodput of so many rounds."""
        self.seconds, self.tokens = 0.0, 0
        lengths = [10] * batch
        for _ in range(rounds):
            stats = self._round(planner, lengths, noise)
            planner.observe(stats)
            lengths = [n + 1 + a for n, a in zip(lengths, stats.accepted, strict=True)]
        return self.tokens / self.seconds

    def _round(self, planner: Planner, lengths: list[int], noise: float) -> RoundStats:
        batch = len(lengths)
        requests = tuple(range(batch))
        budget = planner.plan(Load(requests, tuple(lengths), (1000,) * batch))
        drafted = tuple(map(min, budget.nodes, budget.depth))
        accepted = tuple(next((i for i in range(n) if self.rng.random() >= self.rate), n) for n in drafted)
        factor = 1.0 + noise * abs(self.rng.gauss(0, 1))
        target, draft = factor * self.target_s(sum(drafted)), factor * self.draft_s(max(drafted))
        self.seconds, self.tokens = self.seconds + target + draft, self.tokens + batch + sum(accepted)
        return RoundStats(requests, drafted, accepted, drafted, batch + sum(drafted), draft, target, 0.0, 0.0)


def _machine(name: str, draft: float, rate: float, batch: int, seed: int = 0) -> _Machine:
    """flat: rows are free, as on a GPU.  linear: each costs.  steps: groups of three rows cost, as on a CPU."""
    times: dict[str, Callable[[int], float]] = {
        "flat": lambda n: 1.0 + 0.002 * n,
        "linear": lambda n: 1.0 + 0.12 * n / batch,
        "steps": lambda n: 0.7 + 0.3 * -(-(batch + n) // (3 * batch)),
    }
    return _Machine(times[name], lambda depth: draft * depth, rate, random.Random(seed))


def _fixed(nodes: int) -> FixedPlanner:
    return FixedPlanner(nodes=nodes, depth=max(nodes, 1))


GRID = list(product(["flat", "linear", "steps"], [0.0, 0.05, 0.3], [0.0, 0.3, 0.6, 0.9], [1, 4]))


def test_never_slower_than_plain_and_on_average_near_the_best_fixed_length() -> None:
    shares = []
    for name, draft, rate, batch in GRID:
        ours = _machine(name, draft, rate, batch).run(GoodputPlanner(), 400, batch)
        fixed = [
            _machine(name, draft, rate, batch).run(FixedPlanner(nodes=n, depth=max(n, 1)), 200, batch) for n in (0, 1, 2, 4, 8)
        ]
        assert ours >= 0.97 * fixed[0], (name, draft, rate, batch)
        shares.append(ours / max(fixed))
    assert min(shares) >= 0.9
    assert sum(shares) / len(shares) >= 0.95


@pytest.mark.parametrize("name", ["flat", "linear", "steps"])
def test_a_jump_of_acceptance_is_followed_within_fifty_rounds_and_back(name: str) -> None:
    planner, machine = GoodputPlanner(), _machine(name, 0.05, 0.1, 1)
    machine.run(planner, 300)
    machine.rate = 0.9
    machine.run(planner, 50)
    good = machine.run(planner, 200)
    fresh = _machine(name, 0.05, 0.9, 1)
    assert good >= 0.9 * max(fresh.run(_fixed(n), 200) for n in range(9))
    machine.rate = 0.1
    machine.run(planner, 50)
    assert machine.run(planner, 200) >= 0.97 * _machine(name, 0.05, 0.1, 1).run(FixedPlanner(nodes=0), 200)


def test_a_machine_that_slows_down_is_followed() -> None:
    costs = CostModel()
    for nodes in (0, 2, 4):
        for _ in range(9):
            costs.observe(1, nodes, nodes, 0.1 * nodes, 1.0 + 0.1 * nodes)
    for _ in range(60):
        costs.observe(1, 0, 0, 0.0, 2.0)
    seconds = costs.seconds(1, 4, (2,))[0]
    assert seconds[0] == pytest.approx(2.0, rel=0.1)
    assert seconds[4] > 1.5


def test_times_between_and_beyond_measurements_do_not_fall() -> None:
    curve = Curve()
    for size, seconds in ((0, 1.0), (4, 0.9), (8, 2.0)):
        curve.add(size, seconds)
    assert curve.at(np.array([0, 2, 4, 6, 8, 12])).tolist() == pytest.approx([1.0, 1.0, 1.0, 1.5, 2.0, 3.0])
    assert curve.hoped(np.array([0, 2, 4, 6, 8, 12])).tolist() == [1.0, 1.0, 1.0, 1.0, 2.0, 2.0]


def test_rates_are_shared_until_a_request_has_its_own() -> None:
    model = AcceptanceModel()
    for _ in range(100):
        model.observe((0, 1), (4, 4), (4, 0))
    assert model.rates(0, 4)[0] > 0.9 > 0.2 > model.rates(1, 4)[0]
    assert 0.3 < model.rates(2, 1)[0] < 0.7
    model.forget(0)
    assert model.rates(0, 4) == model.rates(2, 4)


def test_no_draft_runs_past_the_end() -> None:
    planner = GoodputPlanner(4)
    machine = _machine("flat", 0.0, 0.9, 2)
    machine.run(planner, 40, 2)
    budget = planner.plan(Load((0, 1), (100, 100), (1, 3)))
    assert budget.nodes[0] == 0
    assert budget.nodes[1] <= 2


@pytest.mark.parametrize("most", [0, -1, 2.5, "4"])
def test_a_wrong_limit_is_refused(most: object) -> None:
    with pytest.raises(SpecDecError, match="most="):
        GoodputPlanner(most)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampling", [False, True], ids=["greedy", "coupled"])
@pytest.mark.parametrize("accepted", [0.2, 0.9])
def test_the_text_is_that_of_plain_decoding(sampling: bool, accepted: float) -> None:
    target = tiny_model()
    drafter = DraftModelDrafter(noised(target, 0.02 if accepted > 0.5 else 0.5))
    planner = GoodputPlanner(4)
    arguments: dict[str, Any] = {**left_padded(prompts((9, 3, 14))), "max_new_tokens": 60, "do_sample": sampling}
    plain = SpeculativeGenerator(target, None, seed=3, verifier="coupled" if sampling else "auto").generate(**arguments)
    ours = SpeculativeGenerator(target, drafter, seed=3, verifier="coupled" if sampling else "auto", planner=planner)
    drafted = []
    for _ in range(2):
        assert torch.equal(ours.generate(**arguments), plain)
        assert ours.stats is not None
        drafted.append(ours.stats.drafted)
    assert drafted[0] > 0


def test_the_name_makes_one_and_another_name_is_refused() -> None:
    target = tiny_model()
    assert isinstance(SpeculativeGenerator(target, "suffix", planner="goodput").engine.planner, GoodputPlanner)
    with pytest.raises(SpecDecError, match="'goodput'"):
        SpeculativeGenerator(target, "suffix", planner="best")
