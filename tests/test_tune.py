"""Tuning tiny random pairs: what is measured, that it can be stopped and gone on with, and what is recommended from it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from specdec.cli import app
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.errors import SpecDecError
from specdec.generator import SpeculativeGenerator
from specdec.profile import Profile, read_profile, write_profile
from specdec.trees.plans import expected_tokens
from specdec.tune import Cell, RecordingPlanner, Tally, cells_of, profile_of, recommend, tune
from specdec.tune_command import read_prompts
from specdec.types import Load, RoundStats
from tests.support_models import noised, prompts, tiny_model

TEXTS = prompts((5, 9, 7))


def _generator(shape: Any = "chain", noise: float = 0.0) -> SpeculativeGenerator:
    target = tiny_model()
    return SpeculativeGenerator(target, DraftModelDrafter(noised(target, noise), shape=shape))


def _round(batch: int, drafted: int, accepted: int, depth: int, target_s: float, draft_s: float) -> RoundStats:
    every = (tuple(range(batch)), (drafted,) * batch, (accepted,) * batch, (depth,) * batch)
    return RoundStats(*every, batch * (1 + drafted), draft_s, target_s / 2, target_s / 4, target_s / 4)


def _load(batch: int, length: int = 10, room: int = 40) -> Load:
    return Load(tuple(range(batch)), (length,) * batch, (room,) * batch)


def _recorded(cells: Sequence[Cell], rounds: int, lengths: Sequence[int] = (10,), slope: float = 0.0) -> RecordingPlanner:
    """What a machine of known times gives: 10 ms and 1 ms a node, 2 ms a level, two tokens of a draft right."""
    planner, turn = RecordingPlanner(cells, rounds, width=1, rng=random.Random(0)), 0
    while not planner.done():
        batch = cells[turn % len(cells)].batch
        length = lengths[turn % len(lengths)]
        budget = planner.plan(_load(batch, length))
        nodes, depth = budget.nodes[0], budget.depth[0] if budget.nodes[0] else 0
        target_s = 0.010 + 0.001 * batch * nodes + slope * batch * length
        planner.observe(_round(batch, nodes, min(nodes, 2), depth, target_s, 0.002 * depth))
        turn += 1
    return planner


def _simulated(cells: Sequence[Cell], rounds: int = 4, **machine: Any) -> Profile:
    generator = _generator()
    drafter = generator.engine.drafter
    assert drafter is not None
    return profile_of(_recorded(cells, rounds, **machine), generator.target, drafter)


def test_every_budget_is_measured_equally_often_in_mixed_order() -> None:
    cells = cells_of((1, 2), (0, 1, 3), "chain")
    planner = _recorded(cells, 5)
    assert set(planner.counts.values()) == {5}
    assert planner.measured == planner.wanted == 30
    order = [(sample.batch, sample.nodes) for sample in planner.samples]
    assert sorted(order) != order
    assert {(batch, nodes): order.count((batch, nodes)) for batch, nodes in set(order)} == dict.fromkeys(
        [(1, 0), (1, 1), (1, 3), (2, 0), (2, 2), (2, 6)], 5
    )


def test_a_budget_never_goes_beyond_the_room_or_a_batch_that_is_none_to_measure() -> None:
    planner = RecordingPlanner(cells_of((2,), (0, 2, 8), "chain"), 3, width=1, rng=random.Random(0))
    for room in range(1, 12):
        for batch in (1, 2):
            budget = planner.plan(_load(batch, room=room))
            assert max(budget.nodes) <= max(room - 1, 0)
            planner.observe(_round(batch, budget.nodes[0], 0, budget.depth[0], 0.01, 0.0))
    assert {sample.batch for sample in planner.samples} <= {2}


def test_times_of_a_known_machine_are_found() -> None:
    profile = _simulated(cells_of((1, 2), (0, 1, 4), "chain"))
    assert profile.target_s[1] == pytest.approx({0: 0.010, 1: 0.011, 4: 0.014})
    assert profile.target_s[2] == pytest.approx({0: 0.010, 2: 0.012, 8: 0.018})
    assert profile.draft_s[2] == pytest.approx({0: 0.0, 1: 0.002, 4: 0.008})
    assert profile.target_rounds[2] == {0: 4, 2: 4, 8: 4}
    assert profile.context == pytest.approx(0.0, abs=1e-12)
    assert (profile.length, profile.rounds) == (10.0, 24)


def test_the_cost_of_context_is_found_and_taken_out_of_the_times() -> None:
    profile = _simulated(cells_of((1,), (0, 2), "chain"), rounds=20, lengths=(100, 700, 400), slope=1e-5)
    assert profile.context == pytest.approx(1e-5, rel=1e-6)
    assert profile.target_s[1] == pytest.approx({0: 0.010, 2: 0.012})
    # Contexts that were all alike say nothing of longer ones.
    alike = _simulated(cells_of((1,), (0, 2), "chain"), rounds=20, lengths=(10, 11), slope=1e-5)
    assert alike.context < 1e-8


def test_acceptance_counts_only_what_was_reached() -> None:
    tally = Tally()
    tally.add([(2, 1), (2, 0), (1, -1)])
    tally.add([(2, -1)])
    tally.add([(3, 0), (1, 0)])
    accuracies, reached = tally.rates()
    assert reached == ((3, 3, 1), (2, 1), (1,))
    assert accuracies == ((1 / 3, 1 / 3, 0.0), (1.0, 0.0), (0.0,))
    again = Tally()
    again.start(accuracies, reached)
    assert again.rates() == (accuracies, reached)


def test_trees_are_measured_flat_and_deep() -> None:
    cells = cells_of((1,), (0, 1, 4, 8), "tree")
    assert {(cell.nodes, cell.depth) for cell in cells} == {(0, 0), (1, 1), (4, 1), (4, 2), (4, 3), (4, 4)} | {
        (8, depth) for depth in (2, 3, 4, 6, 8)
    }


def test_a_run_measures_what_was_asked_and_leaves_the_planner(tmp_path: Path) -> None:
    generator = _generator()
    planner, out = generator.engine.planner, tmp_path / "pair.json"
    profile = tune(generator, TEXTS, batches=(1,), nodes=(3,), rounds=3, out=out)
    assert generator.engine.planner is planner
    assert set(profile.target_s[1]) == set(profile.target_rounds[1]) >= {0, 3}
    assert min(profile.target_rounds[1][size] for size in (0, 3)) >= 3
    # The draft is the target, so all that is drafted is right.
    assert profile.accuracies == ((1.0,),) * 3
    assert (profile.asked, profile.shape) == (profile.proposed, "chain")
    saved = read_profile(out)
    assert (saved.target, saved.target_s.keys()) == (profile.target, profile.target_s.keys())


@pytest.mark.slow
def test_trees_give_accuracies_by_rank() -> None:
    profile = tune(_generator("tree", 0.3), TEXTS, batches=(1,), nodes=(4,), rounds=2)
    assert max(map(len, profile.accuracies)) > 1
    assert all(0 <= value <= 1 for row in profile.accuracies for value in row)
    assert all(
        sum(row) <= 1 + 1e-9 for row, counts in zip(profile.accuracies, profile.reached, strict=True) if len(set(counts)) == 1
    )
    assert profile.accuracies[0][0] > profile.accuracies[0][-1]


@pytest.mark.slow
def test_what_an_interrupt_leaves_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, out = _generator(), tmp_path / "pair.json"
    original, calls = generator.generate, [0]

    def stops(*arguments: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return original(*arguments, **kwargs)

    monkeypatch.setattr(generator, "generate", stops)
    first = tune(generator, TEXTS, batches=(1, 2), nodes=(2,), rounds=4, out=out)
    assert set(first.target_s) == {1}
    assert read_profile(out).target_s == first.target_s
    whole = tune(generator, TEXTS, batches=(1, 2), nodes=(2,), rounds=4, out=out, resume=read_profile(out))
    assert whole.target_rounds[1][0] >= first.target_rounds[1][0]
    assert min(whole.target_rounds[2][size] for size in (0, 4)) >= 4
    assert whole.rounds > first.rounds
    calls[0] = 5
    again = tune(generator, TEXTS, batches=(1, 2), nodes=(2,), rounds=4, resume=whole)
    assert calls[0] == 5, "nothing was left to measure"
    assert (again.target_s, again.accuracies, again.rounds) == (whole.target_s, whole.accuracies, whole.rounds)


def test_times_of_another_machine_are_measured_anew_and_acceptance_is_kept() -> None:
    generator = _generator()
    there = _simulated(cells_of((1,), (0, 1), "chain"), rounds=40)
    there = replace(there, machine=replace(there.machine, device="another"))
    profile = tune(generator, TEXTS, batches=(1,), nodes=(1,), rounds=2, resume=there)
    assert profile.rounds < 80
    assert profile.machine != there.machine
    assert profile.reached[0][0] > there.reached[0][0]
    with pytest.raises(SpecDecError, match="target"):
        tune(SpeculativeGenerator(tiny_model("qwen2"), "suffix"), TEXTS, rounds=2, resume=there)


def test_a_lookup_without_matches_says_so() -> None:
    generator = SpeculativeGenerator(tiny_model(), PromptLookupDrafter())
    profile = tune(generator, [prompts((6,))[0]], batches=(1,), nodes=(2,), rounds=2, seconds=2)
    assert profile.asked > 0
    assert profile.proposed < profile.asked


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": [[]]}, "prompts"),
        ({"batches": ()}, "batches"),
        ({"batches": (0,)}, "batches"),
        ({"nodes": (0,)}, "nodes"),
        ({"nodes": (-1, 2)}, "nodes"),
        ({"rounds": 0}, "rounds"),
        ({"seconds": 0.0}, "seconds"),
        ({"prompts": [list(range(3, 60)) * 5]}, "shorter prompts"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_told(change: dict[str, Any], what: str) -> None:
    arguments: dict[str, Any] = {"prompts": TEXTS, "batches": (1,), "nodes": (1,), **change}
    with pytest.raises(SpecDecError, match=what):
        tune(_generator(), **arguments)


def test_a_generator_without_a_drafter_or_with_several_is_refused() -> None:
    with pytest.raises(SpecDecError, match="no drafter"):
        tune(SpeculativeGenerator(tiny_model()), TEXTS)
    several: Any = ["suffix", "prompt-lookup"]
    with pytest.raises(SpecDecError, match="several"):
        tune(SpeculativeGenerator(tiny_model(), several), TEXTS)


def test_the_recommended_plan_is_the_best_of_the_known_machine() -> None:
    profile = _simulated(cells_of((1, 2), (0, 1, 2, 4, 8), "chain"))
    # Two tokens are always right and the third never: goodputs are 1/10, 2/13, 3/16, 3/19, ...
    plan = recommend(replace(profile, accuracies=((1.0,), (1.0,), (0.0,)), reached=((999999,),) * 3), 1)
    assert (plan.nodes, plan.depth, plan.width) == (2, 2, 1)
    assert (plan.tokens, plan.seconds) == pytest.approx((3.0, 0.016), rel=1e-4)
    assert expected_tokens(plan.tree, ((1.0,), (1.0,))) == 3.0
    assert recommend(replace(profile, accuracies=(), reached=()), 2).nodes == 0


def test_rounds_without_a_draft_count_in_the_plan() -> None:
    profile = _simulated(cells_of((1,), (0, 1, 2), "chain"))
    profile = replace(profile, accuracies=((1.0,), (1.0,)), reached=((99,), (99,)), asked=10, proposed=5)
    plan = recommend(profile, 1)
    assert plan.tokens == pytest.approx(0.5 * 3 + 0.5 * 1)
    assert plan.seconds == pytest.approx(0.5 * 0.016 + 0.5 * 0.010)


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["tune", *arguments], env={"COLUMNS": "160", "HF_HUB_OFFLINE": "1"})


@pytest.mark.slow
def test_the_command_writes_a_profile_and_prints_a_plan(tmp_path: Path) -> None:
    out, asked = tmp_path / "pair.json", tmp_path / "asked.txt"
    asked.write_text("Once upon a time\n\nThe cat sat on\n")
    small = ("--batch", "1", "--nodes", "2", "--rounds", "2", "--out", str(out), "--prompts", str(asked))
    found = json.loads(_run(*small, "--json").stdout)
    assert found["file"] == str(out)
    assert [plan["batch"] for plan in found["plans"]] == [1]
    assert read_profile(out).rounds == found["profile"]["rounds"] > 0
    text = _run(*small, "--resume").stdout
    assert "recommended static plan" in text
    assert "pair.json" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--target", "./no-such-folder", "--drafter", "suffix"), "no-such-folder"),
        (("--drafter", "suffix", "--shape", "chain"), "suffix draws trees"),
        (("--drafter", "suffix", "--shape", "bush"), "bush"),
        (("--prompts", "missing.txt"), "missing.txt"),
    ],
    ids=str,
)
def test_errors_of_the_command_name_the_cause(
    arguments: tuple[str, ...], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    error = _run(*arguments).exception
    assert isinstance(error, SpecDecError)
    assert what in str(error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "what"),
    [("{", "line 2: not JSON"), ('{"n": 1}', 'line 2: has neither "text"'), ('{"text": ""}', "line 2"), ("[]", "line 2")],
)
def test_a_broken_line_of_prompts_is_named(tmp_path: Path, line: str, what: str) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(SpecDecError, match=re.escape(f"asked.jsonl, {what}")):
        list(read_prompts(file))


def test_prompts_come_from_lines_texts_and_conversations(tmp_path: Path) -> None:
    plain, lines = tmp_path / "asked.txt", tmp_path / "asked.jsonl"
    plain.write_text("one\n\ntwo\n")
    assert list(read_prompts(plain)) == ["one", "two"]
    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
    entries = [{"text": "one"}, {"prompt": "two"}, {"messages": [user, answer]}, {"text": "three", "chat": True}]
    lines.write_text("\n".join(map(json.dumps, entries)))
    assert list(read_prompts(lines)) == ["one", "two", [user], [{"role": "user", "content": "three"}]]
    assert len(list(read_prompts(None))) > 10


def test_a_written_profile_of_a_run_is_read_back_whole(tmp_path: Path) -> None:
    profile = _simulated(cells_of((1,), (0, 1), "chain"))
    write_profile(profile, tmp_path / "pair.json")
    assert read_profile(tmp_path / "pair.json") == profile
    assert torch.__version__ in profile.versions.values()
