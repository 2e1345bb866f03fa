"""Stop rules that see the draft's law and not the token: calibrated, worth their time, exact, and asked per request."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from specdec.confidence import Calibrator, ConfidencePlanner, entropy_bound
from specdec.drafters.base import DraftSampling
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.slots import SlotDrafts
from specdec.errors import SpecDecError
from specdec.generator import SpeculativeGenerator
from specdec.noise import Noise
from specdec.planner import FixedPlanner, Planner
from specdec.tetris import TetrisPlanner
from specdec.types import Budget, Draft, Law, Load, RoundStats, TokenTree
from specdec.verify.compatibility import Rule
from specdec.verify.rejection import TokenRejection
from tests.support_compare import assert_same_greedy
from tests.support_drafters import flattened, setup_of
from tests.support_enumeration import Law1, Replay, Table, continue_law, enumerate_all, extend, joint, scores_of, total_variation
from tests.support_models import VOCABULARY, left_padded, noised, prompts, tiny_model

MODEL = tiny_model()
Acceptance = Callable[[int, float, float], float]

LAWS: dict[str, Acceptance] = {
    "as sure as it says": lambda depth, sure, entropy: sure,
    "too sure": lambda depth, sure, entropy: 1 / (1 + math.exp(0.6 - 0.5 * math.log(sure / (1 - sure)))),
    "worse with depth": lambda depth, sure, entropy: sure / (1 + 0.3 * depth),
    "never": lambda depth, sure, entropy: 0.0,
}


def _slot(rng: random.Random) -> tuple[float, float]:
    """A largest probability and the entropy of a law that has it and is otherwise flat over a few tokens."""
    sure = rng.uniform(0.05, 0.995)
    others = max(rng.randint(2, 30), math.ceil(1 / sure))
    return sure, -sure * math.log(sure) - (1 - sure) * math.log((1 - sure) / others)


def _teach(calibrator: Calibrator, law: Acceptance, rounds: int, rng: random.Random) -> list[tuple[float, float]]:
    """(probability, outcome) of every slot that was reached, each asked before its round was seen."""
    found = []
    for _ in range(rounds):
        slots = [_slot(rng) for _ in range(4)]
        predicted = [calibrator.probability(0, depth, *slot) for depth, slot in enumerate(slots)]
        accepted = next((d for d, slot in enumerate(slots) if rng.random() >= law(d, *slot)), len(slots))
        found += [(predicted[d], float(d < accepted)) for d in range(min(accepted + 1, len(slots)))]
        calibrator.observe(0, slots, accepted)
    return found


def _worst_decile(found: Sequence[tuple[float, float]]) -> float:
    deciles = np.array_split(np.array(sorted(found)), 10)
    return max(abs(float(part[:, 0].mean() - part[:, 1].mean())) for part in deciles)


@pytest.mark.parametrize("name", LAWS)
def test_predicted_is_realised_in_every_decile(name: str) -> None:
    rng, calibrator = random.Random(1), Calibrator()
    _teach(calibrator, LAWS[name], 500, rng)
    assert _worst_decile(_teach(calibrator, LAWS[name], 2500, rng)) < 0.06


def test_a_changed_law_is_followed() -> None:
    rng, calibrator = random.Random(2), Calibrator()
    for law in (LAWS["as sure as it says"], LAWS["never"], LAWS["too sure"]):
        _teach(calibrator, law, 600, rng)
        found = np.array(_teach(calibrator, law, 600, rng))
        assert abs(float(found[:, 0].mean() - found[:, 1].mean())) < 0.03


def test_the_first_guess_is_sane_and_what_is_no_number_is_never_accepted() -> None:
    guess = Calibrator().probability
    assert 0.9 < guess(0, 0, 0.99, 0.06) < 1.0
    assert 0.4 < guess(0, 0, 0.5, math.log(2)) < 0.8
    assert guess(0, 0, 0.01, math.log(100)) < 0.2
    assert guess(0, 0, math.nan, 0.1) == guess(0, 0, 0.5, math.inf) == 0.0


def test_requests_have_averages_of_their_own_and_refusals_behind_the_first_teach_nothing() -> None:
    calibrator = Calibrator()
    for _ in range(20):
        calibrator.observe(1, [(0.5, 1.0)] * 2, 0)
        calibrator.observe(2, [(0.5, 1.0)] * 2, 2)
    bad, new, good = (calibrator.probability(r, 0, 0.5, 1.0) for r in (1, 3, 2))
    assert bad < new < good
    calibrator.forget(1)
    assert calibrator.probability(1, 0, 0.5, 1.0) == new
    short, long = Calibrator(), Calibrator()
    short.observe(0, [(0.4, 1.0)], 0)
    long.observe(0, [(0.4, 1.0), (0.9, 0.2)], 0)
    assert short.probability(0, 1, 0.7, 0.5) == long.probability(0, 1, 0.7, 0.5)


def test_the_entropy_bound() -> None:
    assert entropy_bound(0.0) == 1.0
    assert entropy_bound(1.25) == pytest.approx(0.5)
    assert entropy_bound(9.0) == 0.0
    assert entropy_bound(1.0, scale=0.01) == pytest.approx(0.9)


def _load(batch: int, room: int = 100) -> Load:
    return Load(tuple(range(batch)), (10,) * batch, (room,) * batch)


def _round(slots: Sequence[tuple[float, float, float]], accepted: int, draft_s: float, target_s: float) -> RoundStats:
    """One request's chain."""
    count = len(slots)
    return RoundStats((0,), (count,), (accepted,), (count,), 1 + count, draft_s, target_s, 0.0, 0.0, slots=(tuple(slots),))


def _rule(planner: Planner, load: Load) -> Any:
    stop = planner.plan(load).stop
    assert stop is not None
    return stop


def test_a_request_stops_where_its_token_is_not_worth_its_row_and_all_where_they_are_not_worth_the_step() -> None:
    sure, unsure = (0.99, 0.05), (0.02, 4.0)
    rows = _rule(ConfidencePlanner(step_s=0.0, row_s=0.3, goodput=1.0), _load(2))
    assert rows(0, [sure[0], unsure[0]], [sure[1], unsure[1]]) == [False, True]
    assert rows(1, [sure[0], sure[0]], [sure[1], sure[1]]) == [False, True]
    alone = _rule(ConfidencePlanner(step_s=1.5, row_s=0.0, goodput=1.0), _load(1))
    assert alone(0, [sure[0]], [sure[1]]) == [True]
    shared = _rule(ConfidencePlanner(step_s=1.5, row_s=0.0, goodput=1.0), _load(2))
    assert shared(0, [sure[0]] * 2, [sure[1]] * 2) == [False, False]
    last = _rule(ConfidencePlanner(FixedPlanner(1, 1), step_s=1.5, row_s=0.0, goodput=1.0), _load(1))
    assert last(0, [sure[0]], [sure[1]]) == [False]


def test_before_anything_was_measured_nothing_stops_and_where_all_stops_it_is_tried_again() -> None:
    assert _rule(ConfidencePlanner(), _load(1))(0, [0.01], [4.0]) == [False]
    planner, tried = ConfidencePlanner(step_s=100.0, goodput=1.0), []
    for _ in range(70):
        stopped = _rule(planner, _load(1))(0, [0.5], [1.0])[0]
        tried.append(not stopped)
        planner.observe(_round([(0.5, 1.0, 0.5)] * (not stopped), 0, 1.0, 1.0))
    assert sum(tried) == 2


@pytest.mark.parametrize("change", [{"step_s": -1.0}, {"row_s": math.nan}, {"goodput": math.inf}], ids=str)
def test_what_is_no_cost_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(SpecDecError, match=next(iter(change))):
        ConfidencePlanner(**change)


def test_a_planner_that_drops_drawn_tokens_cannot_be_wrapped() -> None:
    with pytest.raises(SpecDecError, match="TetrisPlanner"):
        ConfidencePlanner(TetrisPlanner(4))


def _simulate(planner: Planner, step_s: float, row_s: float, rounds: int, seed: int = 5) -> float:
    """Tokens over seconds of a machine whose draft is as sure as it is right: half its places are hard, half easy."""
    rng, tokens, seconds = random.Random(seed), 0, 0.0
    for _ in range(rounds):
        budget = planner.plan(_load(1))
        slots: list[tuple[float, float, float]] = []
        while len(slots) < budget.nodes[0]:
            sure = rng.choice([0.3, 0.97])
            entropy = -sure * math.log(sure) - (1 - sure) * math.log((1 - sure) / 10)
            if budget.stop is not None and budget.stop(len(slots), [sure], [entropy])[0]:
                break
            slots.append((sure, entropy, sure))
        count = len(slots)
        accepted = next((d for d, slot in enumerate(slots) if rng.random() >= slot[0]), count)
        draft_s, target_s = step_s * min(count + 1, budget.nodes[0]), 1.0 + row_s * (1 + count)
        tokens, seconds = tokens + 1 + accepted, seconds + draft_s + target_s
        planner.observe(_round(slots, accepted, draft_s, target_s))
    return tokens / seconds


@pytest.mark.parametrize(("step_s", "row_s", "share"), [(0.15, 0.02, 0.96), (0.02, 0.1, 1.03)], ids=str)
def test_stopping_costs_nothing_and_spares_the_choice_of_a_length(step_s: float, row_s: float, share: float) -> None:
    fixed = {n: _simulate(FixedPlanner(nodes=n, depth=n), step_s, row_s, 600) for n in (1, 2, 3, 4, 8)}
    ours = {n: _simulate(ConfidencePlanner(FixedPlanner(nodes=n, depth=n)), step_s, row_s, 600) for n in (2, 4, 8)}
    assert all(ours[n] > 0.97 * fixed[n] for n in ours)
    assert ours[8] > share * max(fixed.values())
    assert ours[8] > 1.2 * fixed[8]


Q, P = Table(2, 4), Table(2, 3)


def _join(contexts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return (*contexts[0], -1, *contexts[1])


def _split(text: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [text[: text.index(-1)], text[text.index(-1) + 1 :]]


def _stopped_chains(contexts: list[tuple[int, ...]], budget: Budget, replay: Replay, late: bool) -> tuple[Draft, list[list[Any]]]:
    """Chains that the budget's rule ends. late: the known mistake, it is asked with the drawn tokens' probabilities."""
    counts, texts, slots = list(budget.nodes), list(contexts), [[], []]  # type: ignore[var-annotated]
    tokens = torch.zeros(2, max(counts) + 1, dtype=torch.long)
    laws = torch.zeros(2, max(counts) + 1, Q.vocabulary, dtype=torch.float64)
    for depth in range(max(counts)):
        rows = [Q(text) for text in texts]
        drawn = [int(replay.pick(row[None])) if late and depth < n else 0 for row, n in zip(rows, counts, strict=True)]
        known = [float(row[token] if late else row.max()) for row, token in zip(rows, drawn, strict=True)]
        entropy = [float(torch.special.entr(row).sum()) for row in rows]
        assert budget.stop is not None
        stopped = budget.stop(depth, known, entropy)
        counts = [min(n, depth) if done else n for n, done in zip(counts, stopped, strict=True)]
        for b in range(2):
            if depth < counts[b]:
                token = drawn[b] if late else int(replay.pick(rows[b][None]))
                laws[b, depth], tokens[b, depth + 1] = rows[b], token
                texts[b] = (*texts[b], token)
                slots[b].append((known[b], entropy[b], float(rows[b][token])))
    width = max(counts) + 1
    parents = torch.arange(-1, width - 1).expand(2, -1)
    tree = TokenTree(tokens[:, :width], parents, (counts[0] + 1, counts[1] + 1), True)
    return Draft(tree, Law.INDEPENDENT, laws[:, :width]), slots


@dataclass(frozen=True)
class _Others:
    """Stops a request where the other one is unsure: a fixed rule that ties the requests together at every depth."""

    inner: FixedPlanner
    post_draw: bool = False

    def plan(self, load: Load) -> Budget:
        return replace(self.inner.plan(load), stop=lambda depth, sure, entropy: [value < 0.7 for value in reversed(sure)])

    def select(self, draft: Draft) -> Draft:
        return draft

    def observe(self, stats: RoundStats) -> None: ...


PLANNERS: dict[str, tuple[Callable[[], Planner], int]] = {
    "fixed rule": (lambda: _Others(FixedPlanner(nodes=2, depth=2)), 3),
    "calibrated": (lambda: ConfidencePlanner(FixedPlanner(nodes=1, depth=1), row_s=0.77, goodput=1.0), 2),
}


def _law_with_stops(rule: Rule, name: str, late: bool = False) -> tuple[Law1, Law1, set[tuple[int, ...]]]:
    """Two rounds of two requests that stop each other, the second one token deep: the law of their texts, and p's own."""
    make, room = PLANNERS[name]
    seen: set[tuple[int, ...]] = set()
    memo: dict[Any, Law1] = {}

    def one_round(planner: Planner, contexts: list[tuple[int, ...]], room: int, replay: Replay) -> tuple[Any, RoundStats]:
        draft, slots = _stopped_chains(contexts, planner.plan(_load(2, room)), replay, late)
        verdict = rule.verify(draft, scores_of(P, contexts, draft.tree), replay)
        drafted = tuple(n - 1 for n in draft.tree.num_nodes)
        accepted = tuple(verdict.num_accepted.tolist())
        seen.add(drafted)
        times = (0.1 * max(drafted), 1.0, 0.0, 0.0)
        stats = RoundStats((0, 1), drafted, accepted, drafted, 2 + sum(drafted), *times, slots=tuple(map(tuple, slots)))
        return extend(contexts, draft.tree, verdict), stats

    def run(replay: Replay) -> Law1:
        contexts, stats = one_round(make(), [(0,), (1,)], room, replay)
        key = (tuple(contexts), (stats.drafted, stats.accepted, stats.slots) if name == "calibrated" else None)
        if key not in memo:

            def again(later: Replay) -> tuple[int, ...]:
                planner = make()
                planner.observe(stats)
                return _join(one_round(planner, contexts, 2, later)[0])

            memo[key] = enumerate_all(again)
        return memo[key]

    ours: Law1 = {}
    length = room + 3
    for text, weight in enumerate_all(run).items():
        for whole, rest in joint([continue_law(P, c, length) for c in _split(text)]).items():
            ours[whole] = ours.get(whole, 0.0) + weight * rest
    return ours, joint([continue_law(P, (b,), length) for b in range(2)]), seen


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANNERS)
def test_two_requests_that_stop_each_other_keep_the_target_s_law(name: str) -> None:
    ours, exact, seen = _law_with_stops(TokenRejection(), name)
    assert len(seen) >= 3
    assert total_variation(ours, exact) < 1e-12


@pytest.mark.slow
def test_a_rule_that_looks_at_the_drawn_token_is_seen() -> None:
    ours, exact, _ = _law_with_stops(TokenRejection(), "calibrated", late=True)
    assert total_variation(ours, exact) > 1e-3


def _slots_of(drafter: Any, law: Law, budget: Budget, sampled: bool) -> Draft:
    drafter.begin(tuple(map(tuple, prompts((9, 4)))), setup_of(law, DraftSampling(flattened, Noise(1)) if sampled else None))
    draft: Draft = drafter.propose(budget)
    return draft


def test_slots_are_what_the_law_of_the_draw_says() -> None:
    budget = Budget((0, 1), (3, 2), (3, 2), (1, 1), slots=True)
    draft = _slots_of(DraftModelDrafter(MODEL), Law.INDEPENDENT, budget, sampled=True)
    assert draft.slots is not None
    assert draft.q is not None
    q = draft.q[:, :-1]
    assert torch.allclose(draft.slots.largest, q.amax(-1))
    assert torch.allclose(draft.slots.entropy, torch.special.entr(q).sum(-1))
    drawn = q.gather(2, draft.tree.tokens[:, 1:, None])[..., 0]
    assert torch.allclose(draft.slots.drawn[0], drawn[0])
    assert torch.allclose(draft.slots.drawn[1, :2], drawn[1, :2])
    greedy = _slots_of(DraftModelDrafter(MODEL), Law.DETERMINISTIC, budget, sampled=False)
    assert greedy.slots is not None
    assert torch.equal(greedy.slots.drawn, greedy.slots.largest)
    plain = replace(budget, slots=False)
    assert _slots_of(DraftModelDrafter(MODEL), Law.INDEPENDENT, plain, sampled=True).slots is None


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_places_predicted_at_once_have_slots_in_chains_and_trees(sampled: bool) -> None:
    setup = setup_of(Law.INDEPENDENT if sampled else Law.DETERMINISTIC, DraftSampling(flattened, Noise(1)) if sampled else None)
    logits, roots = torch.randn(2, 3, VOCABULARY), torch.tensor([[5], [6]])
    budget = Budget((0, 1), (3, 3), (3, 3), (2, 2), slots=True)
    chain = SlotDrafts(setup, "chain", 2).chain(roots, logits, budget, (9, 4))
    q = (logits / 3.0 if sampled else logits).softmax(-1)
    assert chain.slots is not None
    assert torch.allclose(chain.slots.largest, q.amax(-1))
    assert torch.allclose(chain.slots.drawn, q.gather(2, chain.tree.tokens[:, 1:, None])[..., 0])
    tree = SlotDrafts(setup, "tree", 2).tree(roots, logits, budget)
    assert tree.slots is not None
    depth, own = [0], logits[0].softmax(-1)
    for node, parent in enumerate(tree.tree.parents[0, 1:].tolist(), 1):
        depth.append(depth[parent] + 1)
        row = own[depth[node] - 1]
        assert float(tree.slots.drawn[0, node - 1]) == pytest.approx(float(row[tree.tree.tokens[0, node]]), rel=1e-5)
        assert float(tree.slots.largest[0, node - 1]) == pytest.approx(float(row.max()), rel=1e-5)


@pytest.mark.parametrize("law", [Law.DETERMINISTIC, Law.INDEPENDENT, Law.COUPLED], ids=str)
def test_a_request_that_stopped_drafts_no_further_and_the_others_go_on(law: Law) -> None:
    asked: list[int] = []

    def stop(depth: int, confidence: Sequence[float], entropy: Sequence[float]) -> list[bool]:
        assert len(confidence) == len(entropy) == 2
        asked.append(depth)
        return [depth == 1, depth == 2]

    budget = Budget((0, 1), (5, 5), (5, 5), (1, 1), stop=stop)
    sampled = law is not Law.DETERMINISTIC
    drafter = DraftModelDrafter(MODEL)
    draft = _slots_of(drafter, law, budget, sampled)
    free = _slots_of(drafter, law, replace(budget, stop=None), sampled)
    assert draft.tree.num_nodes == (2, 3)
    assert asked == [0, 1, 2]
    for b, count in enumerate(draft.tree.num_nodes):
        assert torch.equal(draft.tree.tokens[b, :count], free.tree.tokens[b, :count])
    at_once = _slots_of(drafter, law, replace(budget, stop=lambda *known: [True, True]), sampled)
    assert at_once.tree.num_nodes == (1, 1)


class _Recording(ConfidencePlanner):
    """Keeps the rounds."""

    def __init__(self) -> None:
        super().__init__(FixedPlanner(nodes=4, depth=4), step_s=0.02, row_s=0.2, goodput=1.0)
        self.rounds: list[RoundStats] = []

    def observe(self, stats: RoundStats) -> None:
        self.rounds.append(stats)
        super().observe(stats)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(9,), (9, 3, 14)], ids=str)
def test_text_does_not_depend_on_the_stops(lengths: tuple[int, ...]) -> None:
    inputs = left_padded(prompts(lengths))
    drafter = DraftModelDrafter(noised(MODEL, 0.03))
    planner = _Recording()
    ours = SpeculativeGenerator(MODEL, drafter, planner=planner).generate(**inputs, max_new_tokens=30, do_sample=False)
    assert_same_greedy(MODEL, inputs, ours, MODEL.generate(**inputs, max_new_tokens=30, do_sample=False))  # type: ignore[operator]
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": True, "temperature": 0.9, "top_k": 20, "seed": 11}
    expected = SpeculativeGenerator(MODEL, verifier="coupled").generate(**inputs, **options)
    found = SpeculativeGenerator(MODEL, drafter, verifier="coupled", planner=planner).generate(**inputs, **options)
    assert torch.equal(found, expected)
    drafted = {n for stats in planner.rounds for n in stats.drafted}
    assert len(drafted) >= 3
    for stats in planner.rounds:
        assert stats.slots is None if not max(stats.drafted) else tuple(map(len, stats.slots or ())) == stats.drafted
