"""What the commands share in telling a user's mistakes: one message for one mistake, whichever command meets it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from specdec import cli
from specdec.bundled import bundled_path
from specdec.errors import CheckpointError, SpecDecError
from specdec.loading import load_model
from specdec.planner import FixedPlanner, planner_of
from tests.support_models import tiny_model


@pytest.fixture(scope="module")
def mute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without a tokenizer, in a folder whose name a console would take for markup."""
    folder = tmp_path_factory.mktemp("models") / "mute[/b]"
    tiny: Any = tiny_model()
    tiny.save_pretrained(folder)
    return folder


WITHOUT_TOKENIZER = {
    "generate": ("generate", "Hello", "--drafter", "suffix"),
    "trace": ("trace", "Hello", "--drafter", "suffix"),
    "demo": ("demo", "--quick"),
    "certify": ("certify", "--drafter", "suffix"),
    "tune": ("tune", "--drafter", "suffix"),
    "bench": ("bench", "run", "--quick", "--drafter", "suffix"),
}


@pytest.mark.parametrize("command", WITHOUT_TOKENIZER)
def test_a_target_without_a_tokenizer_is_told_alike(
    command: str, mute: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*WITHOUT_TOKENIZER[command], "--target", str(mute)]
    arguments += ["--draft", str(mute)] if command == "demo" else []
    with pytest.raises(CheckpointError, match=r"finds no tokenizer there.*save_pretrained") as told:
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert f"--target {mute}" in str(told.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [("certify",), ("bench", "run", "--quick")], ids=" ".join)
def test_a_dtype_that_is_none_is_told_with_those_allowed(command: tuple[str, ...]) -> None:
    with pytest.raises(SpecDecError, match=r"dtype 'fp16': allowed are .*float32, bfloat16, float16"):
        CliRunner().invoke(cli.app, [*command, "--dtype", "fp16"], catch_exceptions=False)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16], ids=str)
def test_a_dtype_is_given_by_name_or_as_it_is(dtype: Any) -> None:
    assert load_model(bundled_path("draft"), dtype=dtype).dtype == torch.bfloat16


def test_an_error_is_one_line_and_is_not_read_as_markup(
    mute: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["specdec", "generate", "Hello", "--drafter", "suffix", "--target", str(mute)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if "error:" in line]
    assert len(told) == 1
    assert f"--target {mute}: transformers finds no tokenizer there" in told[0]
    assert told[0].endswith("or name a checkpoint that has it")


@pytest.mark.parametrize(
    ("nodes", "planner"), [(None, None), (0, FixedPlanner(0, 1, 2)), (1, FixedPlanner(1, 1, 2)), (5, FixedPlanner(5, 5, 2))]
)
def test_nodes_asked_for_by_hand_are_a_fixed_plan(nodes: int | None, planner: FixedPlanner | None) -> None:
    assert planner_of(nodes) == planner


def test_fewer_than_no_nodes_are_refused() -> None:
    with pytest.raises(SpecDecError, match="nodes=-1"):
        planner_of(-1)
