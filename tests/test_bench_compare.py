"""Comparing runs and advising: what is chance is not called a difference, and what is planted is found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from specdec.bench.advise import advise
from specdec.bench.compare import compare
from specdec.bench.markdown import stolen
from specdec.bench.records import HF, PLAIN, Gate, Machine, MethodInfo, Results, Settings, Trial, Workload
from specdec.bench.statistics import bootstrap, log_ratios, paired, summarise, t_quantile
from specdec.errors import SpecDecError

TOKENS = 48
SPEEDS = {HF: 45.0, PLAIN: 55.0, "draft model": 88.0, "Medusa": 80.0, "suffix": 58.0}
FAMILIES = {HF: "transformers", PLAIN: "plain"}
# Of one call, of the start of a program, and of the machine's pace from turn to turn; and how often something else runs meanwhile.
CALL, START, PACE, PAUSES = 0.03, 0.003, 0.04, 0.02


def _trial(method: str, item: int, seconds: float, **more: Any) -> Trial:
    known: dict[str, Any] = {"task": "a", "batch": 1, "temperature": 0.0, "repeat": 0, "prompt_tokens": (20,), **more}
    return Trial(
        method=method, item=item, num_tokens=TOKENS, decode_tokens=TOKENS, seconds=seconds, prefill_s=0.0, forwards=24, **known
    )


def _results(trials: list[Trial], **changed: Any) -> Results:
    names = list(dict.fromkeys(trial.method for trial in trials))
    infos = tuple(
        MethodInfo(n, FAMILIES.get(n, "drafter"), "", n, "default", 20.0 if n == "draft model" else 1.0)  # type: ignore[arg-type]
        for n in names
    )
    gates = tuple(Gate(n, 1, 0.0, "exact", 1, 1, 0) for n in names)
    machine = Machine("a CPU", 2, 2, 1e4, None, "Linux", "3.11", "2", "5", "0", "abc", "specdec bench run", "2026-01-01")
    settings = Settings("tiny", "float32", (1,), (0.0,), TOKENS, 3, 0)
    tasks = tuple(Workload(t, "test", "none", 1, 0, 20) for t in dict.fromkeys(trial.task for trial in trials))
    rows = summarise(trials, gates, settings)
    return replace(Results(machine, settings, tasks, (), infos, gates, rows, tuple(trials)), **changed)


def _simulated(seed: int, slower: Mapping[str, float] | None = None, items: int = 24, repeats: int = 3) -> Results:
    """A run of every method on the same prompts: prompts suit methods differently, and all that disturbs timing is there.

    slower: by which factor methods take longer.
    """
    gains = np.exp(np.random.default_rng(0).normal(0, 0.2, (len(SPEEDS), items)))
    random, trials = np.random.default_rng(seed), []
    starts, pace = np.exp(random.normal(0, START, len(SPEEDS))), 0.0
    for repeat in range(repeats):
        for item in range(items):
            pace = 0.9 * pace + random.normal(0, PACE)
            for i, (method, speed) in enumerate(SPEEDS.items()):
                seconds = TOKENS / (speed * gains[i, item]) * starts[i] * math.exp(pace + random.normal(0, CALL))
                seconds *= 1.5 if random.random() < PAUSES else 1.0
                trials.append(_trial(method, item, seconds * (slower or {}).get(method, 1.0), repeat=repeat))
    empty = _results([])
    return replace(empty, trials=tuple(trials), methods=_results([_trial(m, 0, 1.0) for m in SPEEDS]).methods)


@pytest.mark.parametrize(("disturbed", "counted"), [(0, 24), (10, 14), (13, 24)], ids=["none", "some", "most"])
def test_items_that_others_disturbed_do_not_count_while_enough_are_left(disturbed: int, counted: int) -> None:
    trials = [_trial(method, item, 1.0, stolen=0.0) for item in range(24) for method in (HF, PLAIN)]
    for item in range(disturbed):
        trials[2 * item] = replace(trials[2 * item], seconds=60.0, stolen=0.6)
    found = _results(trials)
    assert {row.prompts for row in found.rows} == {counted}
    assert (found.row(PLAIN, 1, 0.0).vs_generate.value == 1.0) == (disturbed != 13)  # type: ignore[union-attr]
    assert (f"{disturbed} of 24 items" in stolen(found)) == (disturbed == 10)


@pytest.mark.slow
def test_the_same_program_twice_is_no_difference_and_a_planted_slowdown_is_found() -> None:
    same = [compare(_simulated(2 * i), _simulated(2 * i + 1)).verdict for i in range(20)]
    assert same.count("no difference") >= 19
    found = 0
    for i in range(20):
        report = compare(_simulated(100 + 2 * i), _simulated(101 + 2 * i, {"draft model": 1.05}))
        slower = [own.method for own in report.comparisons if own.verdict == "slower"]
        found += slower == ["draft model"]
    assert found >= 18


def test_a_slower_plain_decoding_shows_as_the_opposite_in_the_others() -> None:
    report = compare(_simulated(1), _simulated(2, {PLAIN: 1.1}))
    assert {own.verdict for own in report.comparisons} == {"faster"}


def test_a_slower_machine_is_no_difference() -> None:
    after = _simulated(4)
    halved = replace(after, trials=tuple(replace(t, seconds=2 * t.seconds) for t in after.trials))
    assert compare(_simulated(3), halved).verdict == "no difference"


def test_small_changes_are_no_difference_however_sure() -> None:
    before = _results([_trial(m, i, s) for i in range(30) for m, s in ((PLAIN, 1.0), ("x", 0.5 + 1e-4 * i))])
    after = _results([replace(t, seconds=t.seconds * 1.018) if t.method == "x" else t for t in before.trials])
    report = compare(before, after)
    assert report.comparisons[0].ratio is not None
    assert report.comparisons[0].ratio.high < 1
    assert report.verdict == "no difference"
    assert compare(before, after, margin=0.0).verdict == "slower"


def test_few_prompts_give_no_verdict_and_other_prompts_none_at_all() -> None:
    few = _results([_trial(m, i, 1.0) for i in range(4) for m in (PLAIN, "x")])
    assert compare(few, few).verdict == "too few prompts"
    other = _results([replace(t, prompt_tokens=(21,)) for t in few.trials])
    with pytest.raises(SpecDecError, match="share no method"):
        compare(few, other)


def test_what_the_runs_do_not_share_is_said() -> None:
    before = _results([_trial(m, i, 1.0) for i in range(6) for m in (PLAIN, "x", "gone")])
    after = _results([t for t in before.trials if t.method != "gone"])
    after = replace(after, machine=replace(after.machine, torch="3"), gates=(Gate("gone", 1, 0.0, "refused", 1, 0, 0, "wrong"),))
    report = compare(before, after)
    assert "torch: 2 before, 3 after" in report.notes
    assert report.missing == ("gone has no speed in the run after (refused: wrong)",)


def test_students_t_and_the_trimmed_mean() -> None:
    for freedom in (4, 9, 30):
        for level in (0.975, 0.995):
            assert t_quantile(level, freedom) == pytest.approx(stats.t.ppf(level, freedom), rel=0.02)
    values = [0.01 * i for i in range(9)]
    found = paired(values, 1).ratio
    mean, error = np.mean(values), np.std(values, ddof=1) / 3
    assert found.value == pytest.approx(math.exp(mean))
    assert math.log(found.high) == pytest.approx(mean + t_quantile(0.975, 8) * error)
    assert paired([*values, 0.04, 9.0], 1).ratio.value < 1.1, "one broken prompt does not decide"
    assert paired(values, 8).ratio.high > found.high


def test_ratios_are_within_a_repeat() -> None:
    trials = [_trial(m, 0, s * pace, repeat=r) for r, pace in enumerate((1.0, 7.0, 2.0)) for m, s in ((PLAIN, 1.0), ("x", 0.5))]
    assert log_ratios(trials, "x", PLAIN) == {(1, 0.0, "a", 0): pytest.approx(math.log(2))}


def test_a_bootstrap_interval_holds_the_ratio_and_is_the_same_each_time() -> None:
    random = np.random.default_rng(0)
    own, base = ([_trial("x", i, float(s)) for i, s in enumerate(random.uniform(low, low + 0.5, 12))] for low in (0.5, 1.0))

    def part(trial: Trial) -> tuple[float, float]:
        return trial.num_tokens, trial.seconds

    first = bootstrap(own, base, part, 0)
    assert first == bootstrap(own, base, part, 0)
    assert first.low < first.value < first.high
    assert first.value == pytest.approx(sum(t.seconds for t in base) / sum(t.seconds for t in own))


def test_rows_weigh_acceptance_by_token_and_by_request_and_use_shared_items_only() -> None:
    told = [
        _trial("x", 0, 1.0, request_rounds=24, drafted=48, accepted=24, lengths=(2.0,), accepted_at=(20, 4), reached_at=(24, 24)),
        _trial("x", 1, 1.0, request_rounds=8, drafted=40, accepted=40, lengths=(6.0,), accepted_at=(8,), reached_at=(8,)),
        _trial("x", 2, 9.0),
    ]
    told = [replace(t, target_s=0.6, draft_s=0.2, forward_s=0.7) for t in told]
    rows = _results([*told, _trial(PLAIN, 0, 2.0), _trial(PLAIN, 1, 2.0)]).rows
    row = next(r for r in rows if r.method == "x" and r.scope == "all")
    assert row.prompts == 2
    assert row.acceptance_length == (64 + 32) / 32
    assert row.acceptance_length_by_request == 4.0
    assert row.per_position == (28 / 32, 4 / 24)
    assert row.draft_share == pytest.approx(0.25)
    assert row.overhead_share == pytest.approx(1 - 0.7 / 0.8)
    assert row.vs_plain is not None
    assert row.vs_plain.value == pytest.approx(2.0)


def _advised(**seconds: float) -> Results:
    random, trials = np.random.default_rng(0), []
    for item in range(24):
        for method, took in {PLAIN: 1.0, HF: 1.2, **seconds}.items():
            trials.append(_trial(method.replace("_", " "), item, took * math.exp(random.normal(0, 0.01))))
    return _results(trials)


def test_the_advice_is_the_fastest_and_says_why() -> None:
    advice = advise(_advised(draft_model=0.5, suffix=0.9))[0]
    assert advice.method == "draft model"
    assert advice.vs_plain is not None
    assert advice.vs_plain.value == pytest.approx(2.0, rel=0.05)
    assert "tokens a round" in advice.why[0]
    assert advice.use == "SpeculativeGenerator(target, 'draft model')"


def test_of_two_that_are_alike_the_lighter_one_is_advised() -> None:
    advice = advise(_advised(draft_model=0.5, suffix=0.5))[0]
    assert advice.method == "suffix"
    assert any("draft model" in sentence for sentence in advice.why)


def test_where_nothing_pays_plain_decoding_is_advised_and_refusals_are_named() -> None:
    results = _advised(suffix=1.01)
    gates = (*results.gates, Gate("typical", 1, 0.0, "refused", 2, 1, 0, "another token at place 3"))
    advice = advise(replace(results, gates=gates))[0]
    assert advice.method == PLAIN
    assert advice.use == "SpeculativeGenerator(target)"
    assert "no gain" in advice.why[0]
    assert "typical was refused" in advice.why[-1]
    with pytest.raises(SpecDecError, match="no speed"):
        advise(replace(results, rows=()))


def test_a_task_that_asks_for_another_drafter_is_named() -> None:
    random, trials = np.random.default_rng(0), []
    speeds = {"chat": {PLAIN: 1.0, "draft model": 0.4, "suffix": 0.9}, "copying": {PLAIN: 1.0, "draft model": 0.5, "suffix": 0.25}}
    for item in range(30):
        task = "copying" if item % 5 == 0 else "chat"
        for method, took in speeds[task].items():
            trials.append(_trial(method, item, took * math.exp(random.normal(0, 0.01)), task=task))
    advice = advise(_results(trials))[0]
    assert advice.method == "draft model"
    assert [said.split(":")[0] for said in advice.by_task] == ["copying"]
