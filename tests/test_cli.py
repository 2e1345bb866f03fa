"""The commands as a user types them, on the bundled pair."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def _run(*arguments: str, expect: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "specdec", *arguments],
        capture_output=True,
        text=True,
        input=stdin,
        env=environment,
        check=False,
    )
    assert done.returncode == expect, done.stderr
    return done


def test_generate_streams_the_same_text_with_and_without_a_draft(tmp_path: Path) -> None:
    text = "Once upon a time, there was a little girl"
    fast = json.loads(_run("generate", text, "--json", "--max-new-tokens", "24").stdout.splitlines()[-1])
    file = tmp_path / "prompt.txt"
    file.write_text(text)
    plain = json.loads(
        _run("generate", "--file", str(file), "--drafter", "none", "--json", "--max-new-tokens", "24").stdout.splitlines()[-1]
    )
    assert fast["tokens"] == plain["tokens"]
    assert fast["stats"]["accepted"] > 0
    assert plain["stats"]["drafted"] == 0
    assert fast["stats"]["mean_acceptance_length"] > 1


def test_sampling_repeats_with_a_seed() -> None:
    arguments = ("generate", "Hello", "--temperature", "0.8", "--seed", "3", "--max-new-tokens", "12", "--json")
    first, second = (json.loads(_run(*arguments).stdout.splitlines()[-1])["tokens"] for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--target", "./no-such-folder"), "no-such-folder"),
        (("--file", "missing.txt"), "missing.txt"),
        (("--drafter", "./no-such-draft"), "no-such-draft"),
        (("hello", "--verifier", "magic"), "magic"),
        (("hello", "--temperature", "1", "--verifier", "greedy"), "greedy"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_errors_are_one_line_that_names_the_cause(arguments: tuple[str, ...], what: str) -> None:
    done = _run("generate", *arguments, expect=2)
    assert what in done.stderr
    assert "Traceback" not in done.stderr


def test_an_empty_prompt_is_told() -> None:
    assert "prompt" in _run("generate", expect=2, stdin="").stderr


def test_doctor_and_version() -> None:
    assert "torch" in _run("doctor").stdout
    assert _run("--version").stdout.strip()


@pytest.mark.slow
def test_demo_says_identical_and_times_every_method() -> None:
    out = _run("demo", "--quick", "--max-new-tokens", "16").stdout
    assert "identical: yes" in out
    for name in ("model.generate", "plain decoding", "draft model", "suffix lookup"):
        assert name in out
