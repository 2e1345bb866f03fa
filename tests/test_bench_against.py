"""Comparing two checkouts in turns: chance is no difference, a planted slowdown is found, other outputs are refused."""

from __future__ import annotations

import json
import math
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from specdec import bench_command
from specdec.bench import aa, against, machine
from specdec.bench.against import Judged, Pair, Piece, Plan, Side, checkout, run_against, working_tree
from specdec.bench.compare import whole
from specdec.bench.gpu_store import describe
from specdec.bench_command import AgainstOptions, compare_command
from specdec.bundled import bundled_path
from specdec.cli import app
from specdec.errors import SpecDecError

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = tuple(tuple(range(5 + i, 15 + 2 * i)) for i in range(5))
PLAN = Plan(str(bundled_path("target")), {"plain": None}, PROMPTS, new=8, seconds=1.0, starts=2)
# A machine with other work: of a piece, of a program's start, of the machine's pace, and how often something else runs.
PIECE, START, PACE, PAUSES = 0.08, 0.005, 0.05, 0.05


class Simulated:
    """A worker that says what it is asked to, in times that wander; pauses the clock of the comparison accordingly."""

    clock = 0.0
    pace = 0.0
    wrong = False
    stolen = 0.0
    random = np.random.default_rng(0)

    def __init__(self, side: Side, plan: Plan) -> None:
        self.side, self.luck = side, float(np.exp(self.random.normal(0, START)))

    def ready(self) -> None: ...

    def close(self) -> None: ...

    def decode(self, method: str, prompt: Any, new: int) -> Piece:
        own = type(self)
        own.pace = 0.95 * own.pace + self.random.normal(0, PACE / 3)
        seconds = 0.15 * self.luck * (1 + self.side.slow) * math.exp(own.pace + self.random.normal(0, PIECE))
        seconds *= 2.0 if self.random.random() < PAUSES else 1.0
        stolen, busy = 0.5 if self.random.random() < own.stolen else 0.0, seconds
        seconds *= self.random.uniform(1, 6) if stolen else 1.0
        own.clock += seconds
        first = 1 if own.wrong and self.side.name == "after" else 0
        return Piece((first, *range(1, new)), seconds, busy, stolen)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> type[Simulated]:
    """Two minutes of the comparison pass in a moment."""
    own = type("Own", (Simulated,), {"random": np.random.default_rng(1)})
    monkeypatch.setattr(against, "Worker", own)
    monkeypatch.setattr(against, "monotonic", lambda: own.clock)  # type: ignore[attr-defined]
    return own


def _compared(slow: float, **changed: Any) -> tuple[Judged, ...]:
    methods = {"plain": None, "draft model": "bundled:draft"}
    plan = Plan("nowhere", methods, PROMPTS, new=8, seconds=120.0, dtype="float32", **changed)
    return run_against(Side("before", ROOT), Side("after", ROOT, slow), plan)


@pytest.mark.usefixtures("simulated")
def test_the_same_program_is_no_difference_and_five_percent_are_found_on_a_noisy_machine() -> None:
    same = [whole([own.verdict for own in _compared(0.0)]) for _ in range(20)]
    assert same.count("no difference") >= 19
    slower = [whole([own.verdict for own in _compared(0.05)]) for _ in range(20)]
    assert slower.count("slower") >= 18


@pytest.mark.parametrize(("stolen", "clock"), [(0.03, "wall"), (0.3, "processor"), (0.95, "processor")])
def test_a_host_that_gives_much_to_others_changes_no_verdict(simulated: type[Simulated], stolen: float, clock: str) -> None:
    simulated.stolen = stolen
    assert _compared(0.0)[0].clock == clock
    same = [whole([own.verdict for own in _compared(0.0)]) for _ in range(20)]
    assert same.count("no difference") >= 19
    slower = [whole([own.verdict for own in _compared(0.05)]) for _ in range(20)]
    assert slower.count("slower") >= 18


def test_a_comparison_ends_when_the_host_gives_next_to_nothing(simulated: type[Simulated], monkeypatch: pytest.MonkeyPatch) -> None:
    class Starved(simulated):  # type: ignore[valid-type,misc]
        def decode(self, method: str, prompt: Any, new: int) -> Piece:
            return replace(super().decode(method, prompt, new), busy=0.001)

    simulated.stolen = 1.0
    monkeypatch.setattr(against, "Worker", Starved)
    monkeypatch.setattr(against, "monotonic", lambda: Starved.clock)  # type: ignore[attr-defined]
    _compared(0.0)
    assert 600 <= Starved.clock < 700


@pytest.mark.usefixtures("simulated")
def test_a_ratio_is_after_over_before_and_both_run_as_often() -> None:
    own, other = _compared(0.25)
    assert own.ratio is not None
    assert own.ratio.low < 1 / 1.25 < own.ratio.high
    assert own.ratio.value == pytest.approx(1 / 1.25, rel=0.04)
    assert own.after < own.before
    assert abs(own.pairs - other.pairs) <= 2 * len(PROMPTS) * PLAN.starts


def test_other_outputs_are_refused_and_the_ratio_with_them(simulated: type[Simulated], monkeypatch: pytest.MonkeyPatch) -> None:
    simulated.wrong = True

    class Target:
        dtype = None

        def eval(self) -> Target:
            return self

    monkeypatch.setattr(against.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: Target())
    found = _compared(0.0)
    assert {own.verdict for own in found} == {"outputs differ"}
    assert all(own.ratio is None for own in found)
    assert "another token at place 1" in found[0].reason


def test_a_piece_that_stalls_on_one_side_does_not_decide() -> None:
    random = np.random.default_rng(0)
    pairs = [_pair(*np.exp(random.normal(0, 0.02, 2))) for _ in range(60)]
    for i in range(8):
        pairs[7 * i] = _pair(0.9, 150.0)
    gate = against._Gate(PLAN)
    assert against._judged("plain", pairs, PLAN, gate, 0.02).verdict == "no difference"
    assert against._judged("plain", pairs[:4], PLAN, gate, 0.02).verdict == "too few prompts"


@pytest.mark.parametrize(
    ("disturbed", "threads", "verdict", "counted"),
    [(6, 1, "no difference", 54), (59, 1, "no difference", 60), (59, 2, "slower", 60)],
)
def test_pieces_that_others_disturbed_count_by_processor_time_or_not(
    disturbed: int, threads: int, verdict: str, counted: int
) -> None:
    random = np.random.default_rng(0)
    pairs = [_pair(*np.exp(random.normal(0, 0.02, 2))) for _ in range(60)]
    for i in range(disturbed):
        pairs[i] = _pair(1.0, 1.3, stolen=0.4)
    found = against._judged("plain", pairs, replace(PLAN, threads=threads), against._Gate(PLAN), 0.02)
    assert (found.verdict, found.pairs) == (verdict, counted)


def _pair(before_s: float, after_s: float, stolen: float = 0.0) -> Pair:
    """The same work on both sides, in times that differ."""
    return Pair("plain", 0, Piece((1,), before_s, 1.0, stolen), Piece((1,), after_s, 1.0, stolen))


def _git(folder: Path, *arguments: str) -> str:
    known = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(folder), *known, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits: one without the package, one with it; and a change that is not committed."""
    folder = tmp_path / "repository"
    folder.mkdir()
    _git(folder, "init", "-q")
    (folder / "readme").touch()
    _git(folder, "add", ".")
    _git(folder, "commit", "-q", "-m", "no package")
    (folder / "specdec").mkdir()
    (folder / "specdec" / "__init__.py").write_text("AGE = 'old'\n")
    _git(folder, "add", ".")
    _git(folder, "commit", "-q", "-m", "package")
    (folder / "specdec" / "__init__.py").write_text("AGE = 'new'\n")
    return folder


def test_a_commit_is_taken_out_and_the_repository_left_alone(repository: Path) -> None:
    with checkout(repository, "HEAD") as folder:
        assert "old" in (folder / "specdec" / "__init__.py").read_text()
        assert "new" in (repository / "specdec" / "__init__.py").read_text()
    assert not folder.exists()
    for reference, said in (("nowhere", "git does not give it"), ("HEAD~1", "no specdec package")):
        with pytest.raises(SpecDecError, match=said), checkout(repository, reference):
            pass


def test_the_working_tree_is_the_checkout_of_this_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(against.specdec, "__file__", str(tmp_path / "specdec" / "__init__.py"))
    with pytest.raises(SpecDecError, match="needs specdec in a git checkout"):
        working_tree()
    (tmp_path / ".git").mkdir()
    assert working_tree() == tmp_path


def test_the_commit_is_of_the_packages_own_checkout_wherever_the_program_runs(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPECDEC_COMMIT", raising=False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(machine.specdec, "__file__", str(repository / "specdec" / "__init__.py"))
    assert machine.commit() == f"{_git(repository, 'describe', '--always')}-dirty"
    installed = repository / "packages" / "specdec" / "__init__.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    monkeypatch.setattr(machine.specdec, "__file__", str(installed))
    assert machine.commit() == "", "another repository's commit says nothing of an installed package"
    assert describe(torch.device("cpu"))["commit"] == "unknown"
    monkeypatch.setenv("SPECDEC_COMMIT", "abc1234")
    assert machine.commit() == "abc1234"


@pytest.mark.nightly
def test_two_processes_load_two_checkouts_and_a_planted_slowdown_is_found(tmp_path: Path) -> None:
    """The other checkout's own code runs: it takes half as long again, and its package is another folder's."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("drafters", "trees", "verify", "kernels", "training", "bench"):
        (copy / name).symlink_to(ROOT / name)
    (copy / "specdec").mkdir()
    for path in (ROOT / "specdec").iterdir():
        (copy / "specdec" / path.name).symlink_to(path)
    plan = Plan(PLAN.target, {"draft model": "bundled:draft"}, PROMPTS[:3], new=8, seconds=2.0, starts=1, dtype="float32")
    (found,) = run_against(Side("this", ROOT), Side("copy", copy, slow=0.8), plan)
    assert found.verdict == "slower"
    assert found.ratio is not None
    assert found.ratio.value < 0.75


@pytest.mark.slow
def test_a_checkout_that_cannot_run_is_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "specdec").mkdir()
    (tmp_path / "specdec" / "__init__.py").write_text("raise RuntimeError('broken at this commit')\n")
    with pytest.raises(SpecDecError, match="broken at this commit"):
        run_against(Side("this", tmp_path), Side("that", tmp_path), PLAN)


def test_verdicts_of_the_trial_are_kept_and_not_measured_again(
    simulated: type[Simulated], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(aa, "working_tree", lambda: ROOT)
    out = tmp_path / "aa.jsonl"
    asked = ["--out", str(out), "--seconds", "30", "--threads", "1", "--runs"]
    trial = typer.Typer()
    trial.command()(aa.main)
    CliRunner().invoke(trial, [*asked, "1"], catch_exceptions=False)
    first = out.read_text().splitlines()
    said = CliRunner().invoke(trial, [*asked, "2"], catch_exceptions=False).output
    every = out.read_text().splitlines()
    assert every[:3] == first
    assert json.loads(first[0])["plan"]["target"] == bundled_path("target").name, "no folder of this machine"
    assert [(t["kind"], t["number"]) for t in map(json.loads, every[1:])] == [(k, n) for n in (0, 1) for k in ("same", "slowed")]
    assert "same: 2 of 2 say 'no difference'" in said.splitlines()[-1]
    with pytest.raises(SpecDecError, match="of other options"):
        CliRunner().invoke(trial, [*asked, "2", "--slow", "0.1"], catch_exceptions=False)


def test_a_comparison_is_of_two_runs_or_against_a_commit() -> None:
    console = Console(quiet=True)
    commit = AgainstOptions("HEAD")
    for before, after, asked in ((None, None, None), (ROOT, None, None), (ROOT, ROOT, commit), (ROOT, None, commit)):
        with pytest.raises(SpecDecError, match="give two runs to compare, or --against"):
            compare_command(before, after, asked, 0.02, console)


def test_the_command_hands_on_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def run(before: Side, after: Side, plan: Plan, *, margin: float, advance: Any) -> tuple[Judged, ...]:
        asked.update(sides=(before.name, after.name), plan=plan, margin=margin)
        return (Judged("plain", 3, "slower", 2.0, 1.0),)

    monkeypatch.setattr(bench_command, "working_tree", lambda: ROOT)
    monkeypatch.setattr(bench_command, "checkout", lambda root, reference: nullcontext(root))
    monkeypatch.setattr(bench_command, "run_against", run)
    drafters = ("draft", "suffix", "models/other", "mine=medusa", "a=prompt-lookup", "b=models/other")
    options = ["--seconds", "5", "--planner", "bass", "--dtype", "float32", "--threads", "2", "--margin", "0.1"]
    options += [word for drafter in drafters for word in ("--drafter", drafter)]
    done = CliRunner().invoke(app, ["bench", "compare", "--against", "HEAD", *options, "--fail-if-slower"], catch_exceptions=False)
    assert done.exit_code == 1
    assert "verdict: slower" in done.output
    plan = asked["plan"]
    assert (asked["sides"], asked["margin"]) == (("HEAD", "working tree"), 0.1)
    assert (plan.target, plan.seconds, plan.planner, plan.dtype, plan.threads) == (PLAN.target, 5.0, "bass", "float32", 2)
    assert plan.methods == {
        "plain": None,
        "draft model": "bundled:draft",
        "suffix": "suffix",
        "other": "models/other",
        "mine": "bundled:medusa",
        "a": "prompt-lookup",
        "b": "models/other",
    }


@pytest.mark.parametrize("names", [("suffix", "suffix"), ("a=suffix", "a=draft"), ("plain=draft",)], ids=" ".join)
def test_two_drafters_of_one_name_are_refused(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_command, "working_tree", lambda: ROOT)
    with pytest.raises(SpecDecError, match="is taken; give another as NAME="):
        compare_command(None, None, AgainstOptions("HEAD", drafters=names), 0.02, Console(quiet=True))
