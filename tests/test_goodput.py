"""The goodput planner on simulated machines: optimal allocations, plans near the best, speed never given away, changes followed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, product
from typing import Any

import pytest
import torch

from specdec.acceptance import AcceptanceModel
from specdec.allocation import path_scores
from specdec.bass import BassPlanner
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.errors import SpecDecError
from specdec.generator import SpeculativeGenerator
from specdec.goodput import GoodputPlanner
from specdec.planner import FixedPlanner, Planner
from specdec.types import Budget, Draft, DrafterTraits, Load, RoundStats
from tests.support_models import left_padded, noised, prompts, tiny_model


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


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_models_best_within_two_percent(seed: int) -> None:
    """Random tables of times, stepped ones among them, and random rates: against every way to share nodes."""
    rng = random.Random(seed)
    batch, deepest = rng.randint(1, 3), 4
    planner = GoodputPlanner(deepest)
    load = Load(tuple(range(batch)), (50,) * batch, (1000,) * batch)
    planner.plan(load)
    steps = sorted(rng.uniform(1.0, 3.0) for _ in range(4))
    target = [steps[min(n // 3, 3)] if seed % 2 else 1.0 + 0.1 * n * rng.random() for n in range(batch * deepest + 1)]
    target = list(accumulate(target, max))
    drafting = list(accumulate(rng.uniform(0.0, 0.3) for _ in range(deepest + 1)))
    for nodes, seconds in list(enumerate(target)) * 3:
        planner._costs.observe(batch, nodes, 50 * batch, seconds)
    for depth in [*range(1, deepest + 1)] * 3:
        planner._costs.observe_draft("", 1, batch, depth, drafting[depth])
    arm = planner._arms[0]
    arm.rates = AcceptanceModel([[rng.random()] for _ in range(deepest)])
    found = planner._choose(load)
    scores = [[score for score, _ in path_scores(arm.rates.rates(r, deepest), deepest)] for r in range(batch)]
    best = 0.0
    for counts in product(range(deepest + 1), repeat=batch):
        tokens = batch + planner._worth(load) * sum(sum(row[:n]) for row, n in zip(scores, counts, strict=True))
        seconds = planner._costs.target(batch, sum(counts), 50 * batch)[-1] + (drafting[max(counts)] if max(counts) else 0.0)
        best = max(best, tokens / seconds)
    assert found.goodput >= 0.98 * best
    assert found.goodput <= best * (1 + 1e-9)


def test_a_trial_in_a_batch_asks_one_request_in_four_and_the_next_trial_others() -> None:
    planner, machine = GoodputPlanner(), _machine("flat", 0.3, 0.0, 8)
    tried = []
    for round_ in range(200):
        budget = planner.plan(Load(tuple(range(8)), (10 + round_,) * 8, (1000,) * 8))
        drafted = tuple(map(min, budget.nodes, budget.depth))
        seconds = machine.target_s(sum(drafted))
        planner.observe(RoundStats(budget.requests, drafted, (0,) * 8, drafted, 8 + sum(drafted), 0.3, seconds, 0.0, 0.0))
        if budget.forecast is not None and budget.forecast.why == "trial":
            tried.append([request for request, nodes in enumerate(drafted) if nodes])
    assert len(tried) >= 6
    assert all(first == second for first, second in zip(tried[::2], tried[1::2], strict=True))
    assert {tuple(own) for own in tried} <= {(0, 4), (1, 5), (2, 6), (3, 7)}
    assert len({tuple(own) for own in tried}) > 1


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


class _Clockwork(GoodputPlanner):
    """Is told what rounds take instead of measuring it, so that its choices do not hang on the machine."""

    def observe(self, stats: RoundStats) -> None:
        """As if a row took a hundredth of a round, and a drafted token a twentieth."""
        draft_s, target_s = 0.05 * max(stats.drafted), 1.0 + 0.01 * stats.num_rows
        timed = replace(stats, draft_s=draft_s, target_s=target_s, verify_s=0.0, other_s=0.0)
        super().observe(replace(timed, cold_draft=False, cold_target=False))


@pytest.mark.parametrize("accepted", [0.02, 0.5], ids=["good", "poor"])
def test_it_chooses_between_several_drafters_and_the_text_stays(accepted: float) -> None:
    target = tiny_model()
    several = {"suffix": "suffix", "model": noised(target, accepted), "tree": DraftModelDrafter(noised(target, 0.05), shape="tree")}
    arguments: dict[str, Any] = {**left_padded(prompts((9, 3))), "max_new_tokens": 90, "do_sample": False}
    plain = SpeculativeGenerator(target, None).generate(**arguments)
    ours = SpeculativeGenerator(target, several, planner=_Clockwork())  # type: ignore[arg-type]
    used: set[str | None] = set()
    for _ in range(3):
        assert torch.equal(ours.generate(**arguments), plain)
        assert ours.stats is not None
        used |= {stats.drafter for stats in ours.stats.history if any(stats.drafted)}
    assert used <= {"suffix", "model", "tree"}
    assert len(used) > 1


@pytest.mark.parametrize("rounds", [21, 24, 60])
def test_one_planner_may_serve_generators_with_other_drafters(rounds: int) -> None:
    """Rounds of the first that it has not learned from yet, and its plans, name drafters that the second does not have."""
    target, planner = tiny_model(), GoodputPlanner()
    arguments: dict[str, Any] = {**left_padded(prompts((9,))), "max_new_tokens": rounds, "do_sample": False}
    plain = SpeculativeGenerator(target, None).generate(**arguments)
    several = SpeculativeGenerator(target, [noised(target, 0.6), noised(target, 0.02), "suffix"], planner=planner)  # type: ignore[list-item]
    one = SpeculativeGenerator(target, noised(target, 0.02), planner=planner)
    for generator in (several, one, several):
        assert torch.equal(generator.generate(**arguments), plain)
        assert generator.stats is not None
        own = {None} if generator is one else {"draft-model", "draft-model-2", "suffix"}
        assert {stats.drafter for stats in generator.stats.history} <= own


def test_a_round_that_drafts_nothing_does_not_ask_the_drafter() -> None:
    target, inputs = tiny_model(), left_padded(prompts((9, 4)))
    drafter = DraftModelDrafter(target)
    asked, propose = list[tuple[int, ...]](), drafter.propose

    def noted(budget: Budget) -> Draft:
        asked.append(budget.nodes)
        return propose(budget)

    drafter.propose = noted  # type: ignore[method-assign]
    generator = SpeculativeGenerator(target, drafter)
    out = generator.generate(**inputs, max_new_tokens=40, do_sample=False)
    assert torch.equal(out, SpeculativeGenerator(target, None).generate(**inputs, max_new_tokens=40, do_sample=False))
    assert generator.stats is not None
    drafting = [stats for stats in generator.stats.history if any(stats.drafted)]
    assert len(asked) == len(drafting) < len(generator.stats.history)
    assert all(map(any, asked))


def test_of_several_drafters_the_best_is_used_most_and_a_change_is_noticed() -> None:
    planner, rates = GoodputPlanner(), {"a": 0.2, "b": 0.8}
    rng, traits = random.Random(0), (DrafterTraits("a", "chain"), DrafterTraits("b", "chain"))

    def run(rounds: int) -> list[str | None]:
        used: list[str | None] = []
        length = 10
        for _ in range(rounds):
            budget = planner.plan(Load((0,), (length,), (1000,), traits))
            (drafted,) = map(min, budget.nodes, budget.depth)
            accepted = next((i for i in range(drafted) if rng.random() >= rates[budget.drafter or "a"]), drafted)
            seconds = 1.0 + 0.05 * drafted
            planner.observe(RoundStats((0,), (drafted,), (accepted,), (drafted,), 1, 0.05 * drafted, seconds, 0.0, 0.0))
            used += [budget.drafter] if drafted else []
            length += 1 + accepted
        return used

    run(100)
    settled = run(300)
    assert settled.count("b") > 0.9 * len(settled)
    rates["a"], rates["b"] = 0.8, 0.1
    run(400)
    later = run(300)
    assert later.count("a") > 0.8 * len(later)


def test_the_name_makes_one_and_another_name_is_refused() -> None:
    target = tiny_model()
    assert isinstance(SpeculativeGenerator(target, "suffix").engine.planner, GoodputPlanner)
    assert isinstance(SpeculativeGenerator(target, "suffix", planner="goodput").engine.planner, GoodputPlanner)
    assert isinstance(SpeculativeGenerator(target, "suffix", planner="bass").engine.planner, BassPlanner)
    with pytest.raises(SpecDecError, match="'goodput'"):
        SpeculativeGenerator(target, "suffix", planner="best")


def test_what_preparing_a_size_takes_is_not_taken_for_what_drafting_takes() -> None:
    """The first rounds of every size take twenty times as long, and say so; later ones pay."""
    machine, planner, seen = _machine("flat", 0.2, 0.7, 1), GoodputPlanner(), dict[int, int]()
    drafted = 0
    for step in range(300):
        stats = machine._round(planner, [10 + step], 0.0)
        rows = stats.num_rows
        seen[rows] = seen.get(rows, 0) + 1
        if seen[rows] in (1, 4):
            stats = replace(stats, target_s=20 * stats.target_s, draft_s=20 * stats.draft_s, cold_target=True, cold_draft=rows > 1)
        planner.observe(stats)
        drafted += step >= 100 and any(stats.drafted)
    assert drafted > 180


def test_a_size_is_gone_on_with_until_its_cold_rounds_are_over() -> None:
    """The first four rounds of every size measure nothing; sizes tried in turn would never be known."""
    machine, planner, seen = _machine("flat", 0.05, 0.9, 1), GoodputPlanner(), list[int]()
    hoped = list[int]()
    for step in range(60):
        stats = machine._round(planner, [10 + step], 0.0)
        seen.append(stats.num_rows)
        planner.observe(replace(stats, cold_target=seen.count(stats.num_rows) <= 4))
        assert planner._asked is not None
        hoped += [stats.num_rows] * (planner._asked.why == "hope")
    changes = sum(one != other for one, other in pairwise(hoped))
    assert len(set(hoped)) >= 2
    assert changes == len(set(hoped)) - 1


def test_a_batch_that_shrinks_drafts_on_and_measures_plain_rounds_now_and_then() -> None:
    machine, planner = _machine("flat", 0.05, 0.8, 4), GoodputPlanner()
    machine.run(planner, 60, batch=4)
    whys = []
    for step in range(12):
        planner.observe(machine._round(planner, [200 + step] * 2, 0.0))
        assert planner._asked is not None
        whys.append(planner._asked.why)
    assert [place for place, why in enumerate(whys) if why in ("plain", "first")] == [0, 3, 7]
