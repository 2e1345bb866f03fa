"""Checkpoints to go on from: weights, moments and a step number. Randomness is a function of the step, so there is nothing else.

Where every process holds a part of the model (FSDP), accelerate writes and reads the parts.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specdec.errors import CheckpointError
from specdec.training.objectives import Objective

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def newest(folder: Path) -> Path | None:
    """The last complete checkpoint of a run, None where there is none."""
    found = sorted(folder.glob("checkpoints/step-*/state.json"))
    return found[-1].parent if found else None


def save_checkpoint(folder: Path, objective: Objective, optimiser: Any, step: int, keep: int, state: dict[str, Any]) -> Path:
    """Write checkpoints/step-<n>: it appears complete or not at all. Older ones beyond `keep` go."""
    place = folder / "checkpoints" / f"step-{step:08d}"
    new = place.with_name(f".{place.name}.{os.getpid()}")
    new.mkdir(parents=True)
    named = _trained(objective)
    save_file({name: _plain(p) for name, p in named.items()}, new / "weights.safetensors")
    save_file(_moments(named, optimiser), new / "optimiser.safetensors")
    _publish(new, place, keep, {"step": step, **state})
    return place


def save_sharded(folder: Path, accelerator: Any, step: int, keep: int, state: dict[str, Any]) -> None:
    """The same for a model of which every process holds a part, in accelerate's own layout; all processes call it."""
    place = folder / "checkpoints" / f"step-{step:08d}"
    new = place.with_name(f".{place.name}.new")
    if accelerator.is_main_process and new.exists():
        shutil.rmtree(new)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(new))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _publish(new, place, keep, {"step": step, **state})


def _publish(new: Path, place: Path, keep: int, state: dict[str, Any]) -> None:
    """Give a written checkpoint its name, and remove older ones."""
    (new / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
    if place.exists():
        shutil.rmtree(place)
    os.replace(new, place)
    for old in sorted(path for path in place.parent.glob("step-*") if path.is_dir())[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(place: Path, objective: Objective, optimiser: Any) -> dict[str, Any]:
    """Put weights and moments back; returns the state that was saved. Raises CheckpointError for a checkpoint of another run."""
    named = _trained(objective)
    weights, moments = load_file(place / "weights.safetensors"), load_file(place / "optimiser.safetensors")
    wrong = sorted(weights.keys() ^ named.keys()) or [n for n, p in named.items() if weights[n].shape != p.shape]
    if wrong:
        raise CheckpointError(
            f"{place} is of another model or configuration (first difference: {wrong[0]}); choose another run.output, or set "
            "run.resume to false"
        )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])
            own = {part: moments[f"{name}:{part}"] for part in _MOMENTS if f"{name}:{part}" in moments}
            if own:
                optimiser.state[parameter] = {
                    part: value if part == "step" else value.to(parameter.device) for part, value in own.items()
                }
    return read_state(place)


def load_sharded(place: Path, accelerator: Any) -> dict[str, Any]:
    """Put back what `save_sharded` wrote, with as many processes as then; all of them call it."""
    accelerator.load_state(str(place))
    return read_state(place)


def read_state(place: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, its step among it."""
    state: dict[str, Any] = json.loads((place / "state.json").read_text(encoding="utf-8"))
    return state


def _trained(objective: Objective) -> dict[str, nn.Parameter]:
    return {name: p for named, _ in objective.groups() for name, p in named}


def _moments(named: dict[str, nn.Parameter], optimiser: Any) -> dict[str, Tensor]:
    return {
        f"{name}:{part}": _plain(optimiser.state[p][part])
        for name, p in named.items()
        if p in optimiser.state
        for part in _MOMENTS
        if part in optimiser.state[p]
    }


def _plain(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().clone()
