"""Every stage of the GPU suite in its small form: points are saved, a second run measures nothing, the report renders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from specdec.bench import gpu, gpu_report, gpu_tests
from specdec.bench.enlarge import enlarge
from specdec.bench.gpu_decode import SMALL_NOTE, UNFUSED, known_tokens_only
from specdec.bench.gpu_kernels import COPY, FLEX, HF, OURS, PLAIN
from specdec.bench.gpu_step import CAPTURED, EAGER
from specdec.bench.gpu_store import Setup, Store
from specdec.bench.margin import explain
from tests.support_models import VOCABULARY, prompts, tiny_model

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
APP = typer.Typer()
APP.command()(gpu.main)


def _run(stage: str, results: Path, *more: str) -> str:
    """What a stage prints; it has to succeed."""
    arguments = [stage, "--small", "--device", DEVICE, "--results", str(results), *more]
    done = CliRunner().invoke(APP, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def _points(results: Path, stage: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((results / f"{stage}.json").read_text())
    return found


def _assert_sound(points: list[dict[str, Any]]) -> None:
    """Flat, nothing failed, and each says what it was measured on."""
    for point in points:
        assert "failed" not in point
        assert all(value is None or isinstance(value, str | int | float) for value in point.values())
        assert point.keys() >= {"device", "torch", "triton", "transformers", "commit"}


def _assert_repeats(stage: str, results: Path) -> None:
    before = (results / f"{stage}.json").read_text()
    assert f"{stage}: 0 points measured" in _run(stage, results)
    assert (results / f"{stage}.json").read_text() == before


def test_kernels(tmp_path: Path) -> None:
    _run("kernels", tmp_path)
    points = _points(tmp_path, "kernels")
    _assert_sound(points)
    assert {p["method"] for p in points} == {OURS, HF, PLAIN, FLEX, COPY}
    assert all(p["largest_error"] < 1e-4 for p in points if p["method"] != COPY)
    _assert_repeats("kernels", tmp_path)
    assert "| batch | prefix | nodes |" in (tmp_path / "report.md").read_text()


def test_step(tmp_path: Path) -> None:
    assert "0 points measured" in _run("step", tmp_path, "--minutes", "0")
    assert "run the same command again" in _run("step", tmp_path, "--minutes", "0")
    _run("step", tmp_path)
    points = _points(tmp_path, "step")
    _assert_sound(points)
    found = {(p["forward"], p["nodes"]) for p in points if "nodes" in p}
    assert found == {(mode, n) for mode in (EAGER, CAPTURED) for n in (1, 5)}
    _assert_repeats("step", tmp_path)
    assert "t(5)/t(1)" in (tmp_path / "report.md").read_text()


def test_decode(tmp_path: Path) -> None:
    _run("decode", tmp_path)
    points = _points(tmp_path, "decode")
    _assert_sound(points)
    runs, profiled = [p for p in points if "prompt" in p], [p for p in points if "profiled" in p]
    assert [p["method"] for p in runs] == list(UNFUSED)
    assert [p["method"] for p in profiled] == list(UNFUSED[1:])
    assert all(p["same_as_plain"] and p["note"] == SMALL_NOTE for p in runs)
    # Each round tells the host its tokens, which on a CPU is no copy from a device.
    assert (max(p["copies_to_host_a_round"] for p in profiled) > 0) == (DEVICE == "cuda")
    assert (max(p["busy_ms_a_round"] for p in profiled) > 0) == (DEVICE == "cuda")
    assert sum(p.get("accepted", 0) for p in points) > 0
    _assert_repeats("decode", tmp_path)
    assert SMALL_NOTE in (tmp_path / "report.md").read_text()


def test_tests_are_run_and_failures_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "tests").mkdir(parents=True)
    source = checkout / "tests" / "test_compaction_kernel.py"
    source.write_text("def test_a():\n    assert 'torch.cuda.is_available'\n")
    monkeypatch.chdir(checkout)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    _run("tests", tmp_path)
    assert [(p["passed"], p["failures"]) for p in _points(tmp_path, "tests")] == [(1, 0)]
    _assert_repeats("tests", tmp_path)
    source.write_text("def test_a():\n    assert not 'torch.cuda.is_available'\n")
    done = CliRunner().invoke(APP, ["tests", "--small", "--device", DEVICE, "--results", str(tmp_path)])
    assert done.exit_code == 1
    assert [p["failures"] for p in gpu_tests.failing(_points(tmp_path, "tests"))] == [1]


def test_a_failure_is_a_point_with_its_reason(tmp_path: Path) -> None:
    setup = Setup(torch.device("cpu"), True, tmp_path, 60.0, Console(quiet=True))
    store = Store("kernels", setup)

    def refuse() -> dict[str, float]:
        raise RuntimeError("out of memory,\n by far")

    store.measure({"method": "big", "nodes": 4}, refuse)
    assert store.points[0]["failed"] == "RuntimeError: out of memory, by far"
    again = Store("kernels", setup)
    assert again.find({"method": "big", "nodes": 4}) == store.points[0]
    assert again.find({"method": "big", "nodes": 5}) is None
    assert "method big, nodes 4: RuntimeError: out of memory, by far" in gpu_report.render(tmp_path)


def test_the_margin_leaves_new_tokens_out() -> None:
    small = tiny_model()
    big = enlarge(small, {"hidden_size": 48, "vocab_size": 70})
    prompt = prompts((9,))[0]
    ids = torch.tensor([prompt])
    text = big.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[0, 9:].tolist()  # type: ignore[operator]
    wrong = [*text[:5], (text[5] + 1) % VOCABULARY, *text[6:]]
    head = big.lm_head
    with known_tokens_only(big, VOCABULARY):
        assert big(ids).logits.shape[-1] == VOCABULARY
        found = explain(big, prompt, wrong, text)
    assert big.lm_head is head
    assert found is not None
    assert found.place == 5
    assert found.noise < 1e-2 * found.gap


def test_a_machine_without_a_gpu_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(APP, ["kernels"])
    assert done.exit_code == 2
    assert "--small --device cpu" in " ".join(done.output.replace("│", " ").split())
    assert CliRunner().invoke(APP, ["kernels", "--device", "cpu"]).exit_code == 2
