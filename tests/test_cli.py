"""The commands as a user types them, on the bundled pair."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specdec import __version__
from specdec.cli import app

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


def test_generate_gives_the_same_tokens_with_and_without_a_draft_and_streams_their_text(tmp_path: Path) -> None:
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
    assert _run("generate", text, "--max-new-tokens", "24").stdout.strip() == fast["text"].strip()


def test_sampling_repeats_with_a_seed() -> None:
    arguments = ("generate", "Hello", "--temperature", "0.8", "--max-new-tokens", "12", "--json", "--seed")
    done = [CliRunner().invoke(app, [*arguments, seed], catch_exceptions=False) for seed in ("3", "3", "4")]
    first, second, other = (json.loads(each.stdout.splitlines()[-1])["tokens"] for each in done)
    assert first == second != other


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
    (told,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert what in told
    assert done.stderr.endswith(told + "\n")
    assert "Traceback" not in done.stderr


def test_an_empty_prompt_is_told() -> None:
    assert "prompt" in _run("generate", expect=2, stdin="").stderr


def test_doctor_and_version() -> None:
    assert "torch" in _run("doctor").stdout
    assert _run("--version").stdout.strip() == __version__


def test_demo_says_identical_and_times_every_method() -> None:
    out = _run("demo", "--quick", "--max-new-tokens", "16").stdout
    assert "identical: yes" in out
    for name in ("model.generate", "plain decoding", "draft model", "suffix lookup", "Medusa heads", "PARD"):
        assert name in out
