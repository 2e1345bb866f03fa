"""Profiles: monotone fits, JSON that comes back as it went, errors that name file and key, and what fits where."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from itertools import combinations_with_replacement, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.errors import SpecDecError
from specdec.profile import (
    Identity,
    Machine,
    Profile,
    check_fits,
    default_path,
    drafter_identity,
    identity_of,
    machine_of,
    monotone,
    read_profile,
    write_profile,
)
from tests.support_models import noised, tiny_model


def _profile(**changes: Any) -> Profile:
    profile = Profile(
        machine=Machine("a machine", 2, "float32"),
        versions={"specdec": "0", "torch": "2"},
        target=Identity("big", "00ff"),
        drafter=Identity("small", "11ee"),
        shape="chain",
        target_s={1: {0: 0.010, 2: 0.012, 4: 0.016}, 4: {0: 0.020, 8: 0.030}},
        target_rounds={1: {0: 9, 2: 9, 4: 9}, 4: {0: 5, 8: 5}},
        draft_s={1: {0: 0.0, 2: 0.004, 4: 0.008}, 4: {0: 0.0, 2: 0.006}},
        draft_rounds={1: {0: 9, 2: 9, 4: 9}, 4: {0: 5, 2: 5}},
        context=1e-6,
        length=100.0,
        accuracies=((0.5, 0.25), (0.75,)),
        reached=((40, 20), (12,)),
        asked=40,
        proposed=30,
        rounds=37,
        created="2026-01-01T00:00:00+00:00",
    )
    return replace(profile, **changes)


def _loss(values: Any, seconds: Any, weights: Any) -> float:
    return float((np.asarray(weights) * (np.asarray(values) - np.asarray(seconds)) ** 2).sum())


@pytest.mark.parametrize("seed", range(30))
def test_the_fit_is_the_nearest_that_rises(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 5)
    seconds = [rng.choice([-1.0, 0.0, 1.0, 2.0, 3.0]) for _ in range(count)]
    weights = [rng.choice([1, 2, 5]) for _ in range(count)]
    fitted = monotone(range(count), seconds, weights)
    assert all(a <= b for a, b in pairwise(fitted))
    assert min(fitted) >= 0
    grid = np.linspace(0, 3, 13)
    best = min(_loss(rising, seconds, weights) for rising in combinations_with_replacement(grid, count))
    assert _loss(fitted, seconds, weights) <= best + 1e-9


def test_what_rises_already_stays_and_a_fit_fits_itself() -> None:
    assert monotone([0, 1, 5], [1.0, 1.0, 2.5], [1, 1, 1]) == [1.0, 1.0, 2.5]
    once = monotone(range(6), [3.0, 1.0, 2.0, 5.0, 4.0, 6.0], [1, 2, 1, 1, 3, 1])
    assert monotone(range(6), once, [1, 2, 1, 1, 3, 1]) == pytest.approx(once)
    assert monotone([0, 1], [3.0, 1.0], [3, 1]) == [2.5, 2.5]


@pytest.mark.parametrize(("sizes", "weights"), [([1, 1], [1, 1]), ([2, 1], [1, 1]), ([0], [1, 1]), ([0, 1], [1, 0])])
def test_fits_of_what_is_no_curve_are_refused(sizes: list[int], weights: list[float]) -> None:
    with pytest.raises(SpecDecError, match="sizes"):
        monotone(sizes, [1.0, 2.0], weights)


def test_times_are_measured_interpolated_carried_on_and_never_fall() -> None:
    profile = _profile(context=0.0)
    assert profile.seconds(1, 0, 0) == pytest.approx(0.010)
    assert profile.seconds(1, 3, 3) == pytest.approx(0.014 + 0.006)
    assert profile.seconds(1, 6, 4) == pytest.approx(0.020 + 0.008)
    assert profile.seconds(3, 4, 2) == pytest.approx(0.025 + 0.006)
    falling = replace(profile, target_s={1: {0: 0.02, 2: 0.01}}, target_rounds={1: {0: 1, 2: 1}})
    assert falling.seconds(1, 0, 0) == falling.seconds(1, 2, 0) == pytest.approx(0.015)
    assert _profile().seconds(1, 0, 0, context=500) == pytest.approx(0.010 + 500e-6)
    with pytest.raises(SpecDecError, match="no times"):
        _profile(target_s={}, target_rounds={}).seconds(1, 0, 0)


def test_few_observations_are_drawn_to_the_level_above() -> None:
    (first, second) = _profile(accuracies=((0.5,), (1.0,)), reached=((1000,), (1,))).expected
    assert first == pytest.approx((0.5,))
    assert 0.5 < second[0] < 0.75
    (many,) = _profile(accuracies=((0.2, 0.1),), reached=((9, 9),)).expected
    assert many == pytest.approx((0.2, 0.1))


def test_a_profile_comes_back_as_it_went(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder" / "pair.json"
    write_profile(_profile(), path)
    assert read_profile(path) == _profile()
    write_profile(_profile(rounds=38), path)
    assert read_profile(path).rounds == 38
    assert [file.name for file in path.parent.iterdir()] == ["pair.json"]


def test_a_write_that_fails_leaves_the_old_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pair.json"
    write_profile(_profile(), path)

    def fails(*arguments: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("specdec.profile.os.replace", fails)
    with pytest.raises(SpecDecError, match="the disk is full"):
        write_profile(_profile(rounds=1), path)
    assert read_profile(path) == _profile()
    assert [file.name for file in tmp_path.iterdir()] == ["pair.json"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"format": "other"}, "format"),
        ({"version": 2}, "version: 2"),
        ({"version": "1"}, "version"),
        ({"surprise": 1}, "surprise: unknown"),
        ({"rounds": None}, "rounds: missing"),
        ({"rounds": True}, "rounds"),
        ({"rounds": -1}, "rounds"),
        ({"shape": "bush"}, "shape"),
        ({"machine": {"device": "x", "threads": 1.5, "dtype": "float32"}}, r"machine\.threads"),
        ({"machine": {"device": "x", "threads": 1, "dtype": "float32", "colour": "red"}}, r"machine\.colour: unknown"),
        ({"target": "big"}, "target"),
        ({"target_s": {"one": {"0": 0.1}}}, "target_s"),
        ({"target_s": {"1": {"0": "fast"}}}, r"target_s\.1\.0"),
        ({"target_s": {"1": {"0": 0.1}}}, "target_rounds"),
        ({"target_s": {"1": {"0": 0, "2": 1, "4": 1}, "4": {"0": 1, "8": 1}}}, "target_s: .*above 0"),
        ({"draft_s": {"1": {"0": -0.1}}}, r"draft_s\.1\.0"),
        ({"context": float("nan")}, "context"),
        ({"accuracies": [[1.5, 0.1], [0.1]]}, "accuracies"),
        ({"accuracies": [0.5]}, "accuracies"),
        ({"reached": [[1], [1]]}, "reached"),
        ({"proposed": 41}, "proposed"),
        ({"versions": {"torch": 2}}, r"versions\.torch"),
    ],
    ids=str,
)
def test_errors_name_the_file_and_the_key(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    path = tmp_path / "pair.json"
    write_profile(_profile(), path)
    data = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    with pytest.raises(SpecDecError, match=rf"pair\.json: {what}"):
        read_profile(path)


@pytest.mark.parametrize(("text", "what"), [("{", "not JSON"), ("[]", "format"), (None, "tune")])
def test_what_is_no_profile_is_told(tmp_path: Path, text: str | None, what: str) -> None:
    path = tmp_path / "pair.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SpecDecError, match=rf"pair\.json.*{what}"):
        read_profile(path)


def _own(target: nn.Module, drafter: Any) -> Profile:
    return _profile(machine=machine_of(target), target=identity_of(target), drafter=drafter_identity(drafter))


def test_the_pair_it_was_measured_with_fits_whatever_the_weights() -> None:
    target = tiny_model()
    drafter = DraftModelDrafter(noised(target, 0.1))
    profile = _own(target, drafter)
    assert check_fits(profile, target, drafter) == ""
    assert check_fits(profile, tiny_model(seed=9), DraftModelDrafter(tiny_model(seed=8))) == ""
    moved = tiny_model()
    moved.config._name_or_path, moved.config.use_cache = "elsewhere/copy", False
    assert check_fits(profile, moved, drafter) == ""


def test_another_target_or_drafter_is_an_error() -> None:
    target = tiny_model()
    drafter = DraftModelDrafter(target)
    profile = _own(target, drafter)
    with pytest.raises(SpecDecError, match="target"):
        check_fits(profile, tiny_model("qwen2"), drafter)
    with pytest.raises(SpecDecError, match="drafter"):
        check_fits(profile, target, DraftModelDrafter(tiny_model("qwen2")))
    with pytest.raises(SpecDecError, match="prompt-lookup"):
        check_fits(profile, target, PromptLookupDrafter())
    with pytest.raises(SpecDecError, match="drafter"):
        check_fits(profile, target, DraftModelDrafter(target, shape="tree"))


@pytest.mark.parametrize("change", [{"device": "another"}, {"threads": 99}, {"dtype": "float16"}])
def test_another_machine_is_a_warning_that_names_what_differs(change: dict[str, Any]) -> None:
    target = tiny_model()
    drafter = PromptLookupDrafter()
    profile = _own(target, drafter)
    warning = check_fits(replace(profile, machine=replace(profile.machine, **change)), target, drafter)
    (key, value), now = *change.items(), asdict(profile.machine)
    assert f"{key} {value}, here {now[key]}" in warning


def test_the_default_place_follows_cache_home_pair_and_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_model()
    lookup, model = PromptLookupDrafter(), DraftModelDrafter(target)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = default_path(target, lookup)
    assert path.parent == tmp_path / "specdec" / "profiles"
    assert path == default_path(tiny_model(seed=9), lookup)
    assert len({path, default_path(target, model), default_path(target.to(torch.float64), lookup)}) == 3
    assert default_path(target, lookup, tmp_path / "own").parent == tmp_path / "own"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_path(target, lookup).parent == Path.home() / ".cache" / "specdec" / "profiles"
