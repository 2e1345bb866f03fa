"""Training end to end on the bundled pair, in a few short steps: it learns, goes on after a stop, and leaves what users load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from rich.console import Console
from safetensors.torch import load_file

from specdec import SpeculativeGenerator, bundled_path
from specdec.drafters.checkpoints import load_medusa
from specdec.errors import CheckpointError, SpecDecError
from specdec.training import loop
from specdec.training.config import DraftTraining, MedusaTraining, PardTraining
from specdec.training.export import export
from specdec.training.loop import Run, train
from specdec.training.models import Body, load_lm, make_draft
from specdec.training.objective_draft import DraftObjective, continued
from specdec.training.objective_medusa import MedusaObjective
from specdec.training.objective_pard import PardObjective
from specdec.training.optimiser import rate_at
from specdec.training.packing import PackedRows
from specdec.training.pard_layout import bool_mask
from specdec.training.settings import ConfigError, load_config

pytestmark = pytest.mark.slow

KINDS: dict[str, tuple[Any, Any]] = {
    "medusa": (MedusaTraining, MedusaObjective),
    "pard": (PardTraining, PardObjective),
    "draft": (DraftTraining, DraftObjective),
}
FLAGS = [
    *("--data.max_length=48", "--data.held_out=0.2", "--optim.batch_rows=2", "--optim.warmup_steps=0", "--optim.max_steps=4"),
    *("--optim.epochs=9", "--run.log_every=1", "--run.eval_every=0", "--run.save_every=2"),
]
RECIPES = {"medusa": "medusa", "pard": "pard", "draft": "draft_model"}
METHOD = {"medusa": ["--medusa.shared_head"], "pard": ["--pard.num_tokens=3"], "draft": []}
QUIET = Console(quiet=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    turns = [("What is two and two?", "It is four, as every child knows."), ("Name a colour.", "Blue is one, and so is red.")]
    rows = [
        {"messages": [{"role": "user", "content": f"{ask} {i}"}, {"role": "assistant", "content": say}]}
        for i in range(12)
        for ask, say in turns
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _config(kind: str, data: Path, output: Path, *more: str) -> Any:
    flags = [*FLAGS, *METHOD[kind], f"--data.files={data}", f"--run.output={output}", *more]
    return load_config(KINDS[kind][0], recipe=RECIPES[kind], flags=flags)


def _train(kind: str, data: Path, output: Path, *more: str) -> Any:
    return train(_config(kind, data, output, *more), KINDS[kind][1], ["test"], QUIET)


def _losses(output: Path, kind: str = "train") -> list[float]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == kind]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_loss_falls_and_the_result_drafts_losslessly(kind: str, data: Path, tmp_path: Path) -> None:
    report = _train(kind, data, tmp_path / "run", "--optim.max_steps=8", "--optim.learning_rate=1e-3", "--run.save_every=0")
    losses = _losses(tmp_path / "run")
    assert len(losses) == report.steps == 8
    assert losses[-1] < 0.9 * losses[0]
    assert report.held_out["acceptance_length"] >= 1
    assert json.loads((report.folder / "training.json").read_text())["command"] == ["test"]
    generator = SpeculativeGenerator.from_pretrained(bundled_path("target"), report.folder, dtype=torch.float32)
    ids = torch.tensor([[2, 300, 400, 1, 3]])
    plain = SpeculativeGenerator(generator.target)
    arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(generator.generate(ids, **arguments), plain.generate(ids, **arguments))
    assert generator.stats is not None
    assert generator.stats.drafted > 0


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_stopped_run_gives_the_weights_of_one_that_was_not(kind: str, data: Path, tmp_path: Path) -> None:
    whole = _train(kind, data, tmp_path / "whole")
    config = _config(kind, data, tmp_path / "parts")
    stopped = _Stop(KINDS[kind][1], after=3)
    with pytest.raises(KeyboardInterrupt):
        train(config, stopped, ["test"], QUIET)
    assert sorted(p.name for p in (tmp_path / "parts" / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    report = train(config, KINDS[kind][1], ["test"], QUIET)
    assert report.steps == 4
    ours, theirs = _weights(report.folder), _weights(whole.folder)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")


def test_a_sharded_run_goes_on_from_accelerates_own_checkpoints(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _train("draft", data, tmp_path / "whole")
    # accelerate shards on GPUs only: here every run counts as sharded, and the one process holds all parts.
    monkeypatch.setattr(loop, "DistributedType", SimpleNamespace(FSDP=DistributedType.NO, DEEPSPEED=None))
    config = _config("draft", data, tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        train(config, _Stop(DraftObjective, after=3), ["test"], QUIET)
    report = train(config, DraftObjective, ["test"], QUIET)
    ours, theirs = _weights(report.folder), _weights(whole.folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    assert not list((tmp_path / "parts" / "checkpoints").glob("*/weights.safetensors"))


@pytest.mark.parametrize("kind", ["pard", "draft"])
def test_activations_made_anew_change_nothing(kind: str, data: Path, tmp_path: Path) -> None:
    _train(kind, data, tmp_path / "kept", "--optim.max_steps=2", "--data.held_out=0")
    _train(kind, data, tmp_path / "anew", "--optim.max_steps=2", "--data.held_out=0", "--optim.checkpoint_activations")
    torch.testing.assert_close(_losses(tmp_path / "anew"), _losses(tmp_path / "kept"), rtol=1e-6, atol=0)


def test_deepspeed_is_refused_by_name(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "DistributedType", SimpleNamespace(DEEPSPEED=DistributedType.NO))
    with pytest.raises(ConfigError, match=r"DeepSpeed, whose engine .* choose FSDP"):
        train(_config("draft", data, tmp_path / "run"), DraftObjective, ["test"], QUIET)


class _Stop:
    """An objective whose user loses patience in the batch after so many."""

    def __init__(self, make: Any, after: int) -> None:
        self._make, self._left = make, after

    def __call__(self, *arguments: Any) -> Any:
        objective = self._make(*arguments)
        prepare = objective.prepare

        def impatient(*more: Any) -> Any:
            if not self._left:
                raise KeyboardInterrupt
            self._left -= 1
            return prepare(*more)

        objective.prepare = impatient
        return objective


def test_two_processes_learn_what_one_learns_from_twice_as_many_batches(data: Path, tmp_path: Path) -> None:
    one = _train("pard", data, tmp_path / "one", "--optim.accumulate=2")
    flags = [*FLAGS, *METHOD["pard"], f"--data.files={data}", f"--run.output={tmp_path / 'two'}"]
    launch = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29631"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launch, "--no-python", sys.executable, "-P", "-m", "specdec", "train", "pard", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(_losses(tmp_path / "two"), _losses(tmp_path / "one"), rtol=1e-4, atol=0)
    assert len(_losses(tmp_path / "one")) == one.steps


def test_joint_heads_wait_for_no_one_but_adapters_for_heads(data: Path, tmp_path: Path) -> None:
    more = [
        "--medusa.joint",
        "--medusa.self_distill",
        "--medusa.heads_warmup_steps=2",
        "--medusa.lora_rank=4",
        "--optim.max_steps=3",
    ]
    report = _train("medusa", data, tmp_path / "run", *more, "--run.save_every=1", "--run.keep=9")
    places = sorted((tmp_path / "run" / "checkpoints").iterdir())
    adapters = [{n: v for n, v in load_file(p / "weights.safetensors").items() if "lora_B" in n} for p in places]
    assert adapters[1], "there are adapters"
    assert not any(value.any() for value in adapters[1].values()), "they begin at zero and wait for two steps"
    assert any(value.any() for value in adapters[2].values())
    target = load_lm(str(report.folder / "target"), device=torch.device("cpu"))
    generator = SpeculativeGenerator(target, report.folder, planner=2)
    assert generator.generate(torch.tensor([[2, 300, 3]]), max_new_tokens=6, do_sample=False).shape[1] > 3


def test_deeper_heads_begin_as_the_heads_they_are_given(data: Path, tmp_path: Path) -> None:
    given = _train("medusa", data, tmp_path / "one", "--optim.max_steps=2", "--run.save_every=0").folder
    config = _config("medusa", data, tmp_path / "two", f"--medusa.init={given}", "--medusa.num_layers=2")
    deeper = MedusaObjective(config, None, torch.device("cpu")).heads
    heads, _ = load_medusa(given)
    hidden = torch.randn(5, heads.hidden_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(deeper.hidden(hidden), heads.float().hidden(hidden))
    assert deeper.num_layers == 2
    with pytest.raises(ConfigError, match=r"4 heads of 1 layers.*wants 2 of"):
        MedusaObjective(
            _config("medusa", data, tmp_path / "x", f"--medusa.init={given}", "--medusa.num_heads=2"), None, torch.device("cpu")
        )


def test_on_policy_rows_keep_all_but_what_is_trained_on() -> None:
    draft = load_lm(str(bundled_path("draft")), device=torch.device("cpu"))
    ids = torch.tensor([[2, 300, 301, 3, 302, 303, 2, 304, 3, 305]])
    documents = torch.tensor([[1, 1, 1, 1, 1, 1, 2, 2, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    mask = torch.tensor([[False] * 4 + [True] * 2 + [False] * 3 + [True]])
    rows = continued(draft, PackedRows(ids, positions, documents, mask), 0.0, torch.Generator())
    assert torch.equal(rows.ids[~mask], ids[~mask])
    for start, place in ((0, 4), (0, 5), (6, 9)):
        own = rows.ids[:, start:place]
        assert rows.ids[0, place] == draft(own).logits[0, -1].argmax()


@pytest.mark.parametrize("loss", ["ce", "reverse_kl", "jsd", "tv", "hybrid"])
def test_every_divergence_trains(loss: str, data: Path, tmp_path: Path) -> None:
    _train(
        "draft", data, tmp_path / "run", f"--draft.loss={loss}", "--optim.max_steps=2", "--run.save_every=0", "--data.held_out=0"
    )
    assert all(value > 0 for value in _losses(tmp_path / "run"))


@pytest.mark.parametrize("kind", ["medusa", "pard"])
def test_what_is_taught_is_the_targets_law_in_front_of_each_label(kind: str, data: Path, tmp_path: Path) -> None:
    flags = [f"--{kind}.loss=forward_kl", f"--{kind}.temperature=2", "--data.held_out=0"]
    config = _config(kind, data, tmp_path / "run", *flags)
    run = Run(config, KINDS[kind][1], QUIET)
    (micro,) = run._micros(0)
    figures = run.objective(micro, torch.ones(()))
    target, layout = run.objective.target(), micro.layout
    rows = micro.rows
    p = (Body(target).of_rows(rows) @ Body(target).head_weight.T / 2).log_softmax(-1)
    if kind == "pard":
        q = (
            Body(run.objective.model).hidden(layout.ids, layout.positions, bool_mask(layout))
            @ Body(run.objective.model).head_weight.T
        )
        found = [(p[m, layout.places[m, i]], (q[m, i] / 2).log_softmax(-1)) for m, i in layout.weights.nonzero().tolist()]
        wanted = sum((a.exp() * (a - b)).sum() for a, b in found)
    else:
        hidden = Body(target).of_rows(rows).flatten(0, 1)
        q = (run.objective.heads.hidden(hidden) @ Body(target).head_weight.T / 2).log_softmax(-1)
        flat = p.flatten(0, 1)
        pairs = zip(layout.rows.tolist(), layout.heads.tolist(), layout.labels.tolist(), strict=True)
        wanted = torch.zeros(())
        for place, head, label in pairs:
            assert rows.ids.flatten()[place + 2 + head] == label
            a, b = flat[place + 1 + head], q[head, place]
            wanted = wanted + 0.8 ** (head + 1) * (a.exp() * (a - b)).sum()
    torch.testing.assert_close(figures.loss, wanted, rtol=1e-4, atol=1e-4)


def test_a_cut_draft_begins_as_layers_of_the_target() -> None:
    target = load_lm(str(bundled_path("target")), device=torch.device("cpu"))
    settings = load_config(DraftTraining, flags=["--draft.init=cut", "--draft.num_layers=3"]).draft
    draft = make_draft(settings, target, torch.device("cpu"))
    assert draft.config.num_hidden_layers == 3
    for new, old in enumerate((0, 4, 7)):
        ours, theirs = draft.model.layers[new].state_dict(), target.model.layers[old].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(SpecDecError, match="9, and the target has 8 layers"):
        make_draft(replace(settings, num_layers=9), target, torch.device("cpu"))


def test_a_draft_from_scratch_has_the_sizes_asked_for_and_the_targets_vocabulary() -> None:
    target = load_lm(str(bundled_path("target")), device=torch.device("cpu"))
    sizes = {"num_layers": 2, "hidden_size": 96, "intermediate_size": 160, "num_heads": 2, "num_kv_heads": 1}
    flags = ["--draft.init=scratch", *(f"--draft.{name}={value}" for name, value in sizes.items())]
    draft = make_draft(load_config(DraftTraining, flags=flags).draft, target, torch.device("cpu"))
    config = draft.config
    assert [config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads] == [2, 96, 160, 2]
    assert draft.get_input_embeddings().weight.shape == (target.config.vocab_size, 96)
    assert draft(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, target.config.vocab_size)
    assert type(draft) is type(target)


def test_rates_rise_and_fall() -> None:
    config = load_config(
        PardTraining, flags=["--optim.schedule=cosine", "--optim.warmup_steps=4", "--optim.min_rate_share=0.1"]
    ).optim
    rates = [rate_at(step, 20, config) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(a >= b for a, b in pairwise(rates[4:]))
    assert 0.1 <= rates[-1] < 0.12


def test_exports_come_back_the_same(data: Path, tmp_path: Path) -> None:
    medusa = _train("medusa", data, tmp_path / "m", "--optim.max_steps=1").folder
    pard = _train("pard", data, tmp_path / "p", "--optim.max_steps=1").folder
    for source, to in ((medusa, "medusa"), (medusa, "vllm-medusa"), (pard, "pard"), (pard, "hf-assistant")):
        assert "are the same" in export(source, to, tmp_path / to)
    heads, config = load_medusa(tmp_path / "vllm-medusa")
    assert (config.layout, heads.num_heads) == ("vllm", 4)
    with pytest.raises(CheckpointError, match="not empty"):
        export(pard, "pard", tmp_path / "pard")


def test_a_checkpoint_of_another_model_is_refused(data: Path, tmp_path: Path) -> None:
    _train("medusa", data, tmp_path / "run", "--optim.max_steps=2")
    with pytest.raises(CheckpointError, match="another model or configuration"):
        _train("medusa", data, tmp_path / "run", "--medusa.num_heads=2", "--optim.max_steps=3")
