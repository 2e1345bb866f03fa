"""Reports of training runs, and uploads to the hub with an interface that only pretends to be one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specdec.errors import SpecDecError
from specdec.training.hub import HubError, push
from specdec.training.report import read_run, write_report


def _run(folder: Path, name: str, *lines: dict[str, Any]) -> Path:
    place = folder / name
    place.mkdir()
    (place / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (place / "training.json").write_text(json.dumps({"kind": "PardTraining", "command": ["specdec", "train", "a b"]}))
    return place


def _step(step: int, loss: float, **more: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": loss, "tokens_per_s": 100.0, "rate": 1e-3, "token 1": 0.5, **more}


def test_a_report_has_a_row_a_curve_and_the_command_of_each_run(tmp_path: Path) -> None:
    held = {"kind": "held_out", "step": 2, "loss": 1.25, "token 1": 0.625, "acceptance_length": 2.125, "acceptance_rate": 0.5}
    one = _run(tmp_path, "one", _step(1, 3.0), _step(2, 2.0), held)
    two = _run(tmp_path, "two", _step(1, 4.0))
    page = write_report([one, two], tmp_path / "out").read_text()
    assert "| one | 2 | 1.250 | 0.62 | 2.12 | 100 |" in page
    assert "| two | 1 | not measured | not measured | not measured | 100 |" in page
    assert page.count("specdec train 'a b'") == 2
    drawn = (tmp_path / "out" / "curves.svg").read_text()
    assert "tokens a round, held out" in drawn
    assert "two" in drawn
    again = write_report([one, two], tmp_path / "again")
    assert (again.parent / "curves.svg").read_text() == drawn


def test_a_step_logged_again_after_a_stop_counts_once(tmp_path: Path) -> None:
    run = read_run(_run(tmp_path, "run", _step(1, 3.0), _step(2, 2.0), _step(2, 1.0)))
    assert run.losses() == [(1, 3.0), (2, 1.0)]


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecDecError, match=r"nothing is not a run's folder.*--run\.output"):
        read_run(tmp_path / "nothing")


class _Hub:
    """Remembers what it was asked for; repositories exist as told."""

    def __init__(self, *, exists: bool, broken: bool = False) -> None:
        self.exists, self.broken, self.calls = exists, broken, list[tuple[str, Any]]()

    def repo_exists(self, name: str) -> bool:
        return self.exists

    def create_repo(self, name: str, *, private: bool) -> None:
        self.calls.append(("create", private))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        if self.broken:
            raise OSError("no route")
        self.calls.append(("upload", (repo_id, folder_path)))
        return SimpleNamespace(commit_url="https://hub.example/one")


@pytest.mark.parametrize("exists", [True, False])
def test_a_new_repository_is_private_and_one_that_exists_stays_as_it_is(exists: bool, tmp_path: Path) -> None:
    hub: Any = _Hub(exists=exists)
    assert push(tmp_path, "me/drafter", hub) == "https://hub.example/one"
    upload = ("upload", ("me/drafter", tmp_path))
    assert hub.calls == ([upload] if exists else [("create", True), upload])


def test_an_upload_that_fails_says_that_nothing_is_lost(tmp_path: Path) -> None:
    hub: Any = _Hub(exists=True, broken=True)
    with pytest.raises(HubError, match=r"me/drafter.*no route.*complete on disk"):
        push(tmp_path, "me/drafter", hub)
