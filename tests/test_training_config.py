"""Settings: recipe, file and flags, what is refused and with what words, and the round trip through training.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from specdec.errors import SpecDecError
from specdec.training.config import (
    DataConfig,
    DraftConfig,
    DraftTraining,
    MedusaTraining,
    OptimConfig,
    PardTraining,
    RegenerateConfig,
)
from specdec.training.settings import ConfigError, list_flags, load_config, load_saved, recipes, resolved, save_resolved

KINDS: tuple[type, ...] = (MedusaTraining, PardTraining, DraftTraining)


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(("kind", "recipe"), list(zip(KINDS, ("medusa", "pard", "draft_model"), strict=True)))
def test_every_recipe_loads(kind: type, recipe: str) -> None:
    assert recipe in recipes()
    assert load_config(kind, recipe=recipe).run.output.startswith("runs/")


def test_a_flag_beats_the_file_and_the_file_beats_the_recipe(tmp_path: Path) -> None:
    mine = written(tmp_path, "optim: {learning_rate: 2e-4, epochs: 7}\nmedusa:\n  num_heads: 3\n")
    config = load_config(MedusaTraining, recipe="medusa", file=mine, flags=["--optim.epochs", "9"])
    assert (config.optim.learning_rate, config.optim.epochs, config.medusa.num_heads) == (2e-4, 9, 3)
    assert config.optim.schedule == "cosine"
    assert config.optim.warmup_steps == load_config(MedusaTraining, recipe="medusa").optim.warmup_steps


@pytest.mark.parametrize(
    ("words", "section", "name", "value"),
    [
        (["--optim.learning_rate", "1e-3"], "optim", "learning_rate", 1e-3),
        (["--optim.learning-rate=2"], "optim", "learning_rate", 2.0),
        (["--optim.max_steps", "12"], "optim", "max_steps", 12),
        (["--optim.max_steps", "none"], "optim", "max_steps", None),
        (["--data.pack", "false"], "data", "pack", False),
        (["--run.resume"], "run", "resume", True),
        (["--data.files", "a b.jsonl", "c,d.jsonl"], "data", "files", ("a b.jsonl", "c,d.jsonl")),
        (["--draft.keep_layers", "0,3", "7"], "draft", "keep_layers", (0, 3, 7)),
        (["--run.target", "123"], "run", "target", "123"),
        (["--draft.loss", "tv"], "draft", "loss", "tv"),
    ],
)
def test_flags_become_values_of_their_types(words: list[str], section: str, name: str, value: Any) -> None:
    got = getattr(getattr(load_config(DraftTraining, flags=words), section), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim:\n  learning_rat: 1", "optim.learning_rat is not a setting; did you mean optim.learning_rate?"),
        ("medusa: {epochs: 3}", "medusa.epochs is not a setting; did you mean optim.epochs?"),
        ("lora: 3", "did you mean medusa.lora_rank?"),
        ("optim: 3", "section optim holds 3"),
        ("- 1", "the file holds [1]"),
        ("optim: {epochs: 1.5}", "optim.epochs is 1.5; allowed is a whole number, at least 1"),
        ("optim: {epochs: true}", "optim.epochs is True; allowed is a whole number"),
        ("optim: {epochs: '3'}", "optim.epochs is '3'; allowed is a whole number"),
        ("optim: {learning_rate: .nan}", "optim.learning_rate is nan; allowed is a number, at least 0"),
        ("optim: {learning_rate: .inf}", "optim.learning_rate is inf"),
        ("optim: {learning_rate: [1]}", "optim.learning_rate is [1]; allowed is a number"),
        ("optim: {schedule: step}", "allowed is one of cosine, linear, constant"),
        ("data: {files: a.jsonl}", "data.files is 'a.jsonl'; allowed is a list, each text"),
        ("data: {files: [1]}", "data.files is [1]"),
        ("data: {held_out: 0.9}", "data.held_out is 0.9; allowed is a number, at least 0, at most 0.5"),
        ("data: {pack: 1}", "data.pack is 1; allowed is true or false"),
        ("data: {limit: no}", "data.limit is False; allowed is a whole number or none, at least 1"),
        ("data: [", "cannot be read as YAML"),
        ("run: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_the_key(tmp_path: Path, text: str, expected: str) -> None:
    mine = written(tmp_path, text)
    with pytest.raises(ConfigError, match=re.escape(expected)) as caught:
        load_config(MedusaTraining, recipe="medusa", file=mine)
    assert str(mine) in str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--optim.epoch", "2"], "command line: optim.epoch is not a setting; did you mean optim.epochs?"),
        (["--epochs", "2"], "did you mean optim.epochs?"),
        (["--optim.epochs", "two"], "optim.epochs is 'two'; allowed is a whole number, at least 1"),
        (["--optim.epochs", "2", "3"], "--optim.epochs got 2 values"),
        (["--optim.epochs"], "--optim.epochs got 0 values"),
        (["--data.pack", "maybe"], "data.pack is 'maybe'; allowed is true or false"),
        (["2"], "'2' belongs to no flag"),
        (["--pard.num_tokens", "0"], "pard.num_tokens is 0"),
    ],
)
def test_a_bad_flag_is_refused(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_config(PardTraining, flags=words)


def test_a_missing_file_and_an_unknown_recipe_name_the_recipes() -> None:
    for argument in ("recipe", "file"):
        with pytest.raises(ConfigError, match="draft_model, medusa, pard"):
            load_config(PardTraining, **{argument: "missing.yaml"})


def test_bounds_and_combinations_hold_for_configurations_built_in_python() -> None:
    with pytest.raises(SpecDecError, match="learning_rate is -1"):
        OptimConfig(learning_rate=-1)
    with pytest.raises(ConfigError, match="keep_layers"):
        DraftConfig(init="cut")
    with pytest.raises(ConfigError, match="on_policy"):
        DraftConfig(data="on_policy", loss="ce")
    with pytest.raises(ConfigError, match="joint"):
        load_config(MedusaTraining, flags=["--medusa.self_distill"])


@pytest.mark.parametrize("kind", [*KINDS, RegenerateConfig])
def test_every_setting_says_what_it_is_for(kind: type) -> None:
    flags = list_flags(kind)
    assert len({flag.name for flag in flags}) == len(flags)
    assert all(flag.opt.about and flag.allowed for flag in flags)


@pytest.mark.parametrize("kind", [*KINDS, RegenerateConfig])
def test_the_saved_settings_load_to_an_equal_configuration(kind: type, tmp_path: Path) -> None:
    config = load_config(kind, flags=["--data.files", "a.jsonl", "bü.jsonl", "--data.limit", "5", "--data.held_out", "0.1"])
    path = save_resolved(config, ["specdec", "train", "x"], tmp_path / "new" / "run")
    assert load_saved(kind, path.parent) == config
    assert config.data == DataConfig(files=("a.jsonl", "bü.jsonl"), limit=5, held_out=0.1)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["command"] == ["specdec", "train", "x"]
    assert set(content["versions"]) == {"specdec", "torch", "transformers"}
    assert content["config"] == resolved(config)


def test_a_list_that_is_named_again_grows_and_of_one_value_the_last_counts() -> None:
    flags = ["--data.files", "a.jsonl", "b.jsonl", "--data.files=c.jsonl", "--data.limit", "5", "--data.limit", "6"]
    config = load_config(DraftTraining, flags=flags)
    assert (config.data.files, config.data.limit) == (("a.jsonl", "b.jsonl", "c.jsonl"), 6)


def test_saved_settings_of_another_kind_are_refused(tmp_path: Path) -> None:
    save_resolved(MedusaTraining(), [], tmp_path)
    with pytest.raises(ConfigError, match="settings of a PardTraining"):
        load_saved(PardTraining, tmp_path)
    with pytest.raises(ConfigError, match="settings of a PardTraining"):
        load_saved(PardTraining, tmp_path / "none")
