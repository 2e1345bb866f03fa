"""The benchmark suite: outputs are judged before times count, nothing is cut or lost, and results survive their file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from specdec.bench.margin import Divergence
from specdec.bench.markdown import markdown
from specdec.bench.methods import ASSISTED, LOOKUP, Answer, Ask, Method, NamedDrafter, Selection, make_methods
from specdec.bench.records import ALL, HF, PLAIN, MethodInfo, Results, Settings, read_results, write_results
from specdec.bench.suite import Store, run_suite, this_machine
from specdec.bench.workloads import Prompt, Prompts, items
from specdec.cli import app
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.errors import SpecDecError
from tests.support_models import noised, prompts, tiny_model

NEW = 10
DRAFT, SUFFIX = "draft model", "suffix"


def _asked(count: int = 3) -> Prompts:
    texts = prompts(tuple(6 + i for i in range(count)))
    own = tuple(Prompt("even" if i % 2 == 0 else "odd", "test", i + 1, tuple(ids)) for i, ids in enumerate(texts))
    return Prompts(own, (), ())


def _settings(**changed: Any) -> Settings:
    return replace(Settings("tiny", "float32", (1,), (0.0,), NEW, 2, 0), **changed)


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def methods(target: Any) -> tuple[Method, ...]:
    model = noised(target, 0.3)
    drafters = [NamedDrafter(DRAFT, "a path", DraftModelDrafter(model), model), NamedDrafter(SUFFIX, SUFFIX, SUFFIX)]
    return make_methods(target, drafters, Selection(static=False))


def _run(target: Any, methods: tuple[Method, ...], store: Path, settings: Settings, *, resume: bool = False) -> Results:
    console = Console(quiet=True)
    return run_suite(
        target, methods, _asked(), settings, this_machine("specdec bench run"), store=store, resume=resume, console=console
    )


@dataclass
class Spoiled:
    """A method whose output is another one from a call on."""

    inner: Method
    info: MethodInfo
    wrong_from: int
    calls: int = 0

    def why_not(self, batch: int, temperature: float) -> str:
        return ""

    def run(self, ask: Ask) -> Answer:
        self.calls += 1
        answer = self.inner.run(ask)
        if self.calls < self.wrong_from:
            return answer
        return replace(answer, tokens=tuple((*own[:4], (own[4] + 1) % 61, *own[5:]) for own in answer.tokens))


@dataclass
class Counted:
    """A method that notes what it was asked, and stops the program at a call."""

    inner: Method
    stop_at: int | None = None
    asked: list[tuple[Ask, str]] = field(default_factory=list)

    @property
    def info(self) -> MethodInfo:
        return self.inner.info

    def why_not(self, batch: int, temperature: float) -> str:
        return self.inner.why_not(batch, temperature)

    def run(self, ask: Ask) -> Answer:
        if len(self.asked) + 1 == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append((ask, self.info.name))
        return self.inner.run(ask)


@dataclass
class Disturbed:
    """A method whose calls lose time to others, by turns: so much of each."""

    inner: Method
    parts: list[float | None]

    @property
    def info(self) -> MethodInfo:
        return self.inner.info

    def why_not(self, batch: int, temperature: float) -> str:
        return ""

    def run(self, ask: Ask) -> Answer:
        return replace(self.inner.run(ask), stolen=self.parts.pop(0))


@pytest.mark.parametrize(
    ("parts", "kept"),
    [((0.5, 0.02), 0.02), ((0.3, 0.6), 0.3), ((0.05,), 0.05), ((None,), None)],
    ids=["then not", "then more", "little", "unknown"],
)
def test_a_call_that_others_took_much_of_is_made_once_more(
    target: Any, methods: tuple[Method, ...], tmp_path: Path, parts: tuple[float | None, ...], kept: float | None
) -> None:
    # The first call is the warm-up, and its times do not count.
    method = Disturbed(methods[0], [0.9, *parts])
    one = replace(_asked(1), prompts=_asked(1).prompts[:1])
    console, store = Console(quiet=True), tmp_path / "trials.jsonl"
    settings, here = _settings(repeats=1), this_machine("specdec bench run")
    results = run_suite(target, (method,), one, settings, here, store=store, resume=False, console=console)
    assert [trial.stolen for trial in results.trials] == [kept]
    assert not method.parts
    assert ("unknown" in markdown(results)) == (kept is None)


def test_a_resumed_run_measures_again_what_was_disturbed_and_judges_it_still(
    target: Any, methods: tuple[Method, ...], tmp_path: Path
) -> None:
    settings, store = _settings(repeats=1), tmp_path / "trials.jsonl"
    parts: tuple[list[float | None], ...] = ([0.0, 0.4, 0.3, 0.2, 0.0, 0.0], [0.0, 0.1], [0.0])
    seen = []
    for turn, own in enumerate(parts):
        results = _run(target, (Disturbed(methods[0], own),), store, settings, resume=turn > 0)
        assert not own
        seen.append([trial.stolen for trial in results.trials])
        assert results.gates[0].checked == (6, 5, 4)[turn]
    assert seen == [[0.3, 0.0, 0.0], [0.1, 0.0, 0.0], [0.1, 0.0, 0.0]]


def test_every_method_is_measured_judged_and_summed_up(target: Any, methods: tuple[Method, ...], tmp_path: Path) -> None:
    results = _run(target, methods, tmp_path / "trials.jsonl", _settings())
    names = {HF, ASSISTED, LOOKUP, PLAIN, DRAFT, SUFFIX}
    assert {gate.method for gate in results.gates if gate.status == "exact"} == names
    assert Counter(trial.method for trial in results.trials) == dict.fromkeys(names, 6)
    assert all(trial.num_tokens == NEW for trial in results.trials)
    plain, fast = results.row(PLAIN, 1, 0.0), results.row(DRAFT, 1, 0.0)
    assert plain is not None
    assert fast is not None
    assert plain.vs_plain is not None
    assert plain.vs_plain.value == plain.vs_plain.low == 1.0
    assert plain.tokens_per_forward == plain.acceptance_length == 1.0
    assert results.row(HF, 1, 0.0).tokens_per_forward == 1.0  # type: ignore[union-attr]
    assert fast.draft_share is not None
    assert 0 <= fast.draft_share < 1
    assert {(r.scope, r.name) for r in results.rows} == {(ALL, ALL), ("task", "even"), ("task", "odd")}
    assert all(0 < trial.prefill_s < trial.seconds for trial in results.trials)


@pytest.mark.slow
def test_acceptance_is_told_when_tokens_are_drafted(target: Any, tmp_path: Path) -> None:
    model = noised(target, 0.05)
    drafters = [NamedDrafter(DRAFT, "a path", DraftModelDrafter(model))]
    made = make_methods(target, drafters, Selection("heuristic", static=False))
    row = _run(target, made, tmp_path / "trials.jsonl", _settings()).row(DRAFT, 1, 0.0)
    assert row is not None
    assert row.acceptance_length is not None
    assert row.acceptance_length > 1.2
    assert row.tokens_per_forward > 1.2
    assert row.per_position
    assert max(row.per_position) <= 1


@pytest.mark.slow
def test_batches_and_temperatures_have_rows_of_their_own(target: Any, methods: tuple[Method, ...], tmp_path: Path) -> None:
    results = _run(target, methods, tmp_path / "t.jsonl", _settings(batches=(1, 2), temperatures=(0.0, 0.9), repeats=1))
    status = {(g.method, g.batch, g.temperature): g.status for g in results.gates}
    assert status[ASSISTED, 2, 0.0] == status[LOOKUP, 2, 0.9] == "unavailable"
    assert status[HF, 1, 0.9] == status[PLAIN, 2, 0.9] == "unchecked"
    assert {status[DRAFT, batch, t] for batch in (1, 2) for t in (0.0, 0.9)} == {"exact"}
    assert results.row(ASSISTED, 2, 0.0) is None
    assert results.row(SUFFIX, 2, 0.9) is not None


@pytest.mark.parametrize("wrong_from", [1, 5], ids=["at once", "later"])
def test_a_method_that_changes_the_output_gets_no_speed(
    target: Any, methods: tuple[Method, ...], tmp_path: Path, wrong_from: int
) -> None:
    bad = Spoiled(methods[-1], MethodInfo("spoiled", "drafter", "wrong", "nowhere"), wrong_from)
    results = _run(target, (*methods[:1], methods[-3], bad), tmp_path / "trials.jsonl", _settings())
    gate = next(gate for gate in results.gates if gate.method == "spoiled")
    assert gate.status == "refused"
    assert "place 5" in gate.reason
    assert not [trial for trial in results.trials if trial.method == "spoiled"]
    assert results.row("spoiled", 1, 0.0) is None
    assert bad.calls == wrong_from, "a refused method is not run again"
    report = markdown(results)
    assert gate.reason in report
    assert sum(line.startswith("| spoiled") for line in report.splitlines()) == 1


def test_when_plain_decoding_is_wrong_so_is_all_that_is_compared_with_it(
    target: Any, methods: tuple[Method, ...], tmp_path: Path
) -> None:
    by_name = {method.info.name: method for method in methods}
    plain = Spoiled(by_name[PLAIN], by_name[PLAIN].info, 1)
    results = _run(target, (by_name[HF], plain, by_name[SUFFIX]), tmp_path / "trials.jsonl", _settings())
    status = {gate.method: gate.status for gate in results.gates}
    assert status == {HF: "exact", PLAIN: "refused", SUFFIX: "refused"}


@pytest.mark.slow
def test_a_lossy_rule_is_refused(target: Any, tmp_path: Path) -> None:
    model = noised(target, 0.3)
    drafters = [NamedDrafter(DRAFT, "a path", DraftModelDrafter(model))]
    made = make_methods(target, drafters, Selection("heuristic", "typical-lossy", static=False))
    results = _run(target, made, tmp_path / "trials.jsonl", _settings(temperatures=(1.0,)))
    assert {gate.method for gate in results.gates if gate.status == "refused"} == {DRAFT}


@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_run_goes_on_without_measuring_anything_twice(
    target: Any, methods: tuple[Method, ...], tmp_path: Path, torn: bool
) -> None:
    store, settings = tmp_path / "trials.jsonl", _settings()
    chosen = (methods[0], methods[-3], methods[-1])
    with pytest.raises(KeyboardInterrupt):
        _run(target, (*chosen[:2], Counted(chosen[2], stop_at=4)), store, settings)
    before = store.read_text()
    if torn:
        store.write_text(before + '{"trial": {"meth')
    counted = tuple(Counted(method) for method in chosen)
    results = _run(target, counted, store, settings, resume=True)
    assert store.read_text().startswith(before)
    measured = Counter((t.method, t.item, t.repeat) for t in results.trials)
    assert len(measured) == 3 * 3 * 2
    assert set(measured.values()) == {1}
    kept = len(before.splitlines()) - 1
    assert kept > 0
    assert sum(len(own.asked) for own in counted) == 3 + 18 - kept, "the warm-up, and what was not there"


def test_a_resumed_run_does_not_explain_again_what_it_knows(tmp_path: Path) -> None:
    class Counting:
        asked = 0

        def explain(self, prompt: Any, ours: Any, theirs: Any) -> Divergence | None:
            self.asked += 1
            return None if ours[0] == theirs[0] else Divergence(0, 0.5, 0.25)

    store, counting = tmp_path / "trials.jsonl", Counting()
    for resume in (False, True):
        kept = Store(store, {"run": 1}, resume=resume)
        assert kept.explained(counting, (1, 2), (3, 4), (5, 4)) == Divergence(0, 0.5, 0.25)  # type: ignore[arg-type]  # a stand-in
        assert kept.explained(counting, (1, 2), (3, 4), (3,)) is None  # type: ignore[arg-type]  # a stand-in
        assert counting.asked == 2
        assert kept.kept == []


def test_a_store_of_another_run_is_not_mixed_in(target: Any, methods: tuple[Method, ...], tmp_path: Path) -> None:
    store = tmp_path / "trials.jsonl"
    _run(target, (methods[0], methods[-3]), store, _settings(repeats=1))
    with pytest.raises(SpecDecError, match="--resume"):
        _run(target, (methods[0], methods[-3]), store, _settings(repeats=1))
    with pytest.raises(SpecDecError, match="methods, settings differ"):
        _run(target, methods, store, _settings(repeats=2), resume=True)


def test_results_come_back_from_their_file(target: Any, methods: tuple[Method, ...], tmp_path: Path) -> None:
    results = _run(target, methods, tmp_path / "trials.jsonl", _settings(repeats=1, trained_length=17))
    path = tmp_path / "results.json"
    write_results(results, path)
    assert read_results(path) == results
    assert {r.name for r in results.rows if r.scope == "length"} == {"within", "beyond"}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda found: found.update(schema=99), "schema 99"),
        (lambda found: found.update(kind="other"), "not a benchmark result"),
        (lambda found: found["settings"].pop("dtype"), "missing.*dtype"),
        (lambda found: found["gates"][0].update(status="fine"), r"gates\[0\].status"),
        (lambda found: found["trials"][0].update(seconds="slow"), r"trials\[0\].seconds"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_the_place(
    target: Any, methods: tuple[Method, ...], tmp_path: Path, change: Callable[[Any], object], what: str
) -> None:
    path = tmp_path / "results.json"
    write_results(_run(target, (methods[0], methods[-3]), tmp_path / "t.jsonl", _settings(repeats=1)), path)
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(SpecDecError, match=what):
        read_results(path)


def test_items_hold_every_prompt_and_are_full() -> None:
    found = items(_asked(7).prompts, 3)
    assert [item.number for item in found] == [0, 1, 2]
    assert all(len(item.prompts) == 3 and len({p.task for p in item.prompts}) == 1 for item in found)
    assert {p.line for item in found for p in item.prompts} == set(range(1, 8))


@pytest.mark.slow
def test_the_commands_measure_compare_advise_and_report(tmp_path: Path) -> None:
    asked = ["--quick", "--drafter", "suffix", "--max-new-tokens", "6", "--repeats", "1", "--output"]
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        done = CliRunner().invoke(app, ["bench", "run", *asked, str(folder)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert {"results.json", "report.md", "report.html", "trials.jsonl"} == {path.name for path in folder.iterdir()}
    said = CliRunner().invoke(app, ["bench", "compare", str(first), str(second / "results.json")], catch_exceptions=False)
    assert said.exit_code == 0
    assert "verdict:" in said.output
    advised = CliRunner().invoke(app, ["bench", "advise", str(first)], catch_exceptions=False)
    assert advised.exit_code == 0
    assert "SpeculativeGenerator(target" in advised.output
    (first / "report.md").unlink()
    CliRunner().invoke(app, ["bench", "report", str(first)], catch_exceptions=False)
    assert "| suffix" in (first / "report.md").read_text()


@pytest.mark.slow
def test_several_dtypes_are_runs_in_folders_of_their_own(tmp_path: Path) -> None:
    dtypes = ("float32", "bfloat16")
    asked = ["--quick", "--workload", "story", "--drafter", "suffix", "--max-new-tokens", "4", "--repeats", "1"]
    asked += [*(word for dtype in dtypes for word in ("--dtype", dtype)), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["bench", "run", *asked], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert [read_results(tmp_path / "out" / dtype / "results.json").settings.dtype for dtype in dtypes] == list(dtypes)
    again = CliRunner().invoke(app, ["bench", "run", *asked, "--resume"], catch_exceptions=False)
    assert again.exit_code == 0, again.output
    kept = [(tmp_path / "out" / dtype / "trials.jsonl").read_text().count("\n") for dtype in dtypes]
    assert len(set(kept)) == 1


@pytest.mark.slow
def test_the_command_fails_when_an_output_is_not_the_targets(tmp_path: Path) -> None:
    asked = ["--quick", "--workload", "story", "--drafter", "draft", "--temperature", "1", "--verifier", "typical-lossy"]
    more = ["--planner", "heuristic", "--repeats", "1", "--max-new-tokens", "24", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["bench", "run", *asked, *more], catch_exceptions=False)
    assert done.exit_code == 1
    assert "refused" in done.output
    results = read_results(tmp_path / "out" / "results.json")
    assert not [row for row in results.rows if row.method == DRAFT]
