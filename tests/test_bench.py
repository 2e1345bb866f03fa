"""The benchmark's own parts: intervals, medians, what counts as a rounding matter, and what a machine is called."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from specdec.bench import cross_vocabulary, machine, speed
from specdec.bench.gpu_store import describe
from specdec.bench.margin import Margins, explain, first_difference
from specdec.bench.suite import this_machine
from specdec.bench.timing import Sample, loaded_aside, medians, ratio_interval, rotation
from specdec.bundled import bundled_path
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.errors import SpecDecError
from specdec.generator import SpeculativeGenerator
from specdec.planner import FixedPlanner
from tests.support_models import prompts, tiny_model


def _sample(prompt: int, repeat: int, seconds: float) -> Sample:
    return Sample("a", prompt, "g", 10, seconds, 10, 0.0, 0.0, (), repeat)


def test_the_median_run_of_each_prompt_counts() -> None:
    samples = [_sample(0, 0, 3.0), _sample(0, 1, 1.0), _sample(0, 2, 2.0), _sample(1, 0, 5.0)]
    assert [(s.prompt, s.seconds) for s in medians(samples)] == [(0, 2.0), (1, 5.0)]


def test_a_ratio_is_of_rates_over_all_prompts() -> None:
    seconds, tokens = {"a": [1.0, 3.0], "b": [2.0, 8.0]}, {"a": [10, 10], "b": [10, 10]}
    ratio, low, high = ratio_interval(seconds, tokens, "a", "b")
    assert ratio == pytest.approx(10 / 4)
    assert (low, high) == (pytest.approx(2.0), pytest.approx(8 / 3))
    assert ratio_interval(seconds, tokens, "b", "b") == (1.0, 1.0, 1.0)


def test_every_method_goes_first_once() -> None:
    assert {rotation(["a", "b", "c"], turn)[0] for turn in range(3)} == {"a", "b", "c"}
    assert sorted(rotation(["a", "b", "c"], 7)) == ["a", "b", "c"]


def test_the_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1, 2], [1, 2, 4]) is None


def test_a_wrong_token_is_beyond_the_margin_and_equal_texts_need_none() -> None:
    model = tiny_model()
    prompt = prompts((9,))[0]
    ids = torch.tensor([prompt])
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0, 9:].tolist()  # type: ignore[operator]
    wrong = [*text[:5], (text[5] + 1) % 64, *text[6:]]
    assert explain(model, prompt, text, text) is None  # type: ignore[arg-type]
    found = explain(model, prompt, wrong, text)  # type: ignore[arg-type]
    assert found is not None
    assert found.place == 5
    assert not found.within
    assert found.noise < 1e-2 * found.gap


def test_a_texts_rounding_is_measured_once_for_all_that_is_compared_with_it() -> None:
    model, forwards = tiny_model(), []
    model.register_forward_hook(lambda *_: forwards.append(1))
    margins, (prompt, other) = Margins(model), prompts((9, 7))  # type: ignore[arg-type]
    text = [5, 6, 7, 8]
    for wrong, place in (([5, 6, 9, 8], 2), ([4, 6, 7, 8], 0)):
        found = margins.explain(prompt, wrong, text)
        assert found == explain(tiny_model(), prompt, wrong, text)  # type: ignore[arg-type]
        assert found is not None
        assert found.place == place
    assert len(forwards) == 1 + len(text) + 1, "the prompt, each token, and all at once"
    for ids, theirs in ((other, text), (prompt, [5, 6, 7])):
        assert margins.explain(ids, [1, 2, 3], theirs) == explain(tiny_model(), ids, [1, 2, 3], theirs)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["chain", "tree", "prompt-lookup", "suffix"])
def test_bf16_differences_lie_within_the_margin(drafter: str) -> None:
    """The bundled pair in its own bf16: speculative against plain, and plain against `model.generate`."""
    target = AutoModelForCausalLM.from_pretrained(bundled_path("target"), dtype=torch.bfloat16).eval()
    made = drafter
    if drafter in ("chain", "tree"):
        draft = AutoModelForCausalLM.from_pretrained(bundled_path("draft"), dtype=torch.bfloat16).eval()
        made = DraftModelDrafter(draft, shape=drafter)  # type: ignore[assignment, arg-type]
    fast = SpeculativeGenerator(target, made, planner=FixedPlanner(nodes=4, depth=3, width=2))
    plain = SpeculativeGenerator(target)
    tokenizer = AutoTokenizer.from_pretrained(bundled_path("target"))
    asked, _ = speed.load_prompts(None, tokenizer, 4, 96)
    for prompt in asked:
        ids = torch.tensor([prompt.ids])
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False}
        outputs = [g.generate(ids, **settings)[0, ids.shape[1] :].tolist() for g in (fast, plain, target)]
        for ours, theirs in ((outputs[0], outputs[1]), (outputs[1], outputs[2])):
            found = explain(target, prompt.ids, ours, theirs)
            assert found is None or found.within, f"differs at {found.place}: gap {found.gap}, noise {found.noise}"


@pytest.mark.slow
def test_the_benchmark_runs_reports_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    arguments = ["--limit", "1", "--max-new-tokens", "4", "--repeats", "1", "--plans", "1", "--output", str(out)]
    app = typer.Typer()
    app.command()(speed.main)
    first = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert first.exit_code == 0
    report = json.loads(out.read_text())
    assert report["equality"]["prompts"] == 1
    fixed = {"draft model 1", "Medusa 1", "PARD 1", "prompt-lookup", "suffix"}
    planned = {f"{name}, {speed.PLANNED}" for name in ("draft model", "Medusa", "PARD", "suffix")}
    assert set(report["equality"]["equal_to_plain"]) == fixed | planned
    assert set(report["equality"]["equal_to_plain"].values()) == {1}
    methods = {row["method"] for row in report["groups"]["all"]}
    assert {speed.HF, speed.PLAIN, speed.FREE, "draft model 1"} <= methods
    samples = out.with_suffix(".samples.jsonl")
    kept = samples.read_text()
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert again.exit_code == 0
    assert samples.read_text() == kept


def test_every_report_says_the_same_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_COMMIT", "abc1234")
    known = machine.machine()
    assert list(known) == ["cpu", "threads", "cores", "torch", "transformers", "commit"]
    assert json.loads(json.dumps(known)) == known
    suite, point = this_machine("typed"), describe(torch.device("cpu"))
    assert {key: getattr(suite, key) for key in known} == known
    assert [point[key] for key in ("device", "torch", "transformers", "commit")] == [
        known[key] for key in ("cpu", "torch", "transformers", "commit")
    ]


def test_a_broken_line_of_prompts_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "fine"}\n\n{"text": \n')
    with pytest.raises(SpecDecError, match=r"mine\.jsonl, line 3: not JSON"):
        speed.load_prompts(path, lambda text: {"input_ids": [1]}, None, 9)


class _Scripted:
    """Says these tokens for each prompt, in these seconds, one after the other; the first is of the warm-up."""

    def __init__(self, texts: list[list[int]], seconds: list[float]) -> None:
        self._texts, self._seconds, self._calls = texts, seconds, 0
        own = SimpleNamespace(drafted=4, accepted=2, rounds=2, draft_s=0.25)
        self.stats = SimpleNamespace(rounds=2, requests=[own])

    def generate(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The output and the seconds."""
        self._calls += 1
        turn = (self._calls - 1) % len(self._seconds)
        text = self._texts[(self._calls - 1) // len(self._seconds)]
        return torch.cat((input_ids, torch.tensor([text])), 1), self._seconds[turn]


def test_of_each_way_the_median_run_counts_and_other_texts_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_vocabulary, "timed", lambda run: run())
    asked = [{"input_ids": torch.tensor([[1, 2]])}, {"input_ids": torch.tensor([[3]])}]
    ways: dict[str, Any] = {
        "plain": _Scripted([[5, 6, 7, 8], [5, 6]], [99.0, 1.0, 50.0, 2.0]),
        "string": _Scripted([[5, 6, 7, 8], [5, 9]], [99.0, 0.1, 1.0, 30.0]),
    }
    plain, other = cross_vocabulary.rows(cross_vocabulary.measure(ways, asked, {}, 3), list(ways), 0.0)
    assert (plain.by, other.by) == ("plain", "string")
    assert (plain.same, other.same, other.prompts) == (2, 1, 2)
    assert plain.speedup is None
    assert other.speedup == pytest.approx((2.0, 2.0, 2.0))
    assert (plain.tokens_per_second, other.tokens_per_second) == (6 / 4.0, 6 / 2.0)
    assert (other.acceptance, other.tokens_per_round, other.drafting) == (0.5, 6 / 4, 0.25)


@pytest.mark.slow
def test_every_way_of_a_pair_is_measured_and_its_text_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_COMMIT", "abc1234")
    texts, out = tmp_path / "prompts.txt", tmp_path / "ways.json"
    texts.write_text("Once upon a time\n\nTom had a ball\n")
    app = typer.Typer()
    app.command()(cross_vocabulary.main)
    pair = [str(bundled_path("target")), str(bundled_path("draft"))]
    more = ["--new", "8", "--turns", "1", "--prompts", str(texts), "--json", str(out)]
    done = CliRunner().invoke(app, [*pair, *more], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert report["machine"] == machine.machine()
    assert str(bundled_path("target").parent) not in out.read_text()
    assert {row["temperature"] for row in report["rows"]} == {0.0, 1.0}
    assert {"plain", "intersection", "string"} <= {row["by"] for row in report["rows"]}
    assert all(row["same"] == row["prompts"] == 2 for row in report["rows"])
    assert all(row["tokens_per_round"] > 1 for row in report["rows"] if row["by"] == "intersection")


class _Ring:
    """Garbage that only a collection finds, once it is dropped."""

    def __init__(self) -> None:
        self.own = self


def test_what_is_loaded_is_left_out_of_collections_while_measuring() -> None:
    loaded = _Ring()
    old = weakref.ref(loaded)
    with loaded_aside():
        del loaded
        new = weakref.ref(_Ring())
        gc.collect()
        assert old() is not None
        assert new() is None
    gc.collect()
    assert old() is None
