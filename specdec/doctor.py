"""`specdec doctor`: versions, devices, what runs the attention and why, and whether a target and a drafter fit together."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import get_args

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from specdec import __version__
from specdec.bundled import BUNDLED, Role, bundled_path, checkpoint
from specdec.errors import SpecDecError
from specdec.generator import SpeculativeGenerator, as_drafter
from specdec.kernels.dispatch import choose_backend
from specdec.linear import cpu_has_fast_bf16
from specdec.loading import load_model
from specdec.profile import check_fits, default_path, machine_of, read_profile
from specdec.verify.compatibility import rule_for

# Width of the heads that most models have; used where no target is named.
_HEAD = 128

Row = tuple[str, str]


def versions(device: torch.device) -> dict[str, str]:
    """What would run a model on this device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "specdec": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": _version_of("triton"),
        "device": f"{device.type}, {name}",
    }


def show_doctor(console: Console, target: str | None = None, drafter: str | None = None) -> bool:
    """Show what this machine has and, for a target or a drafter that is named, whether they fit; returns that, True without them.

    target, drafter: a checkpoint's folder, a hub name, "bundled", or for the drafter a name as in `specdec generate`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [*versions(device).items(), *_machine_rows(device)]
    fits = True
    if target is None and drafter is None:
        rows += [("attention", _attention(device, {(_HEAD, _HEAD)})), ("bundled models", _bundled())]
    else:
        found, fits = _pair_rows(target or BUNDLED, drafter)
        rows += found
    table = Table("what", "here")
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False)
    return fits


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _machine_rows(device: torch.device) -> list[Row]:
    rows = [("threads", str(torch.get_num_threads()))]
    rows.append(("bf16 products on the CPU", "in hardware" if cpu_has_fast_bf16() else "no: linear layers keep fp32 copies"))
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        rows.append((f"cuda:{index}", f"{card.name}, {memory}, sm_{card.major}{card.minor}, CUDA {torch.version.cuda}"))
    if device.type == "cpu":
        built = torch.version.cuda
        rows.append(("GPU", f"none is seen by torch, which was built {f'for CUDA {built}' if built else 'without CUDA'}"))
    return rows


def _bundled() -> str:
    """The bundled models, or why there are none."""
    try:
        return ", ".join(bundled_path(role).name for role in get_args(Role))
    except SpecDecError as error:
        return str(error)


def _attention(device: torch.device, widths: set[tuple[int, int]]) -> str:
    """What runs tree attention, and why."""
    backend = choose_backend("auto", device, widths)
    if backend == "triton":
        return "triton: the tree attention kernel"
    if device.type != "cuda":
        return f"{backend}: the tree attention kernel is for CUDA, and this is {device.type}"
    if _version_of("triton") == "not installed":
        return f"{backend}: triton is not installed; install it for the tree attention kernel"
    return f"{backend}: the tree attention kernel does not take heads of {sorted(widths)} (keys, values)"


def _pair_rows(target: str, drafter: str | None) -> tuple[list[Row], bool]:
    """What comes of building the pair, and whether it fits."""
    try:
        model = load_model(checkpoint(target, "target"))
        generator = SpeculativeGenerator(model)
    except SpecDecError as error:
        return [("target", f"cannot be used: {error}")], False
    rows = _target_rows(model, generator)
    if drafter is None:
        return rows, True
    try:
        pair = SpeculativeGenerator(model, as_drafter(checkpoint(drafter, "draft"), model))
    except SpecDecError as error:
        return [*rows, ("drafter", f"does not fit: {error}")], False
    return [*rows, *_drafter_rows(pair)], True


def _target_rows(model: PreTrainedModel, generator: SpeculativeGenerator) -> list[Row]:
    runner = generator.engine.runner
    count = sum(parameter.numel() for parameter in model.parameters())
    heads = {(spec.key_width, spec.value_width) for spec in runner.specs}
    dtype = str(runner.dtype).removeprefix("torch.")
    shared = "shares the model's weights" if runner.twin.copied else "switches the model's own attention, under a lock"
    return [
        ("target", f"{type(model).__name__}, {count / 1e6:.1f} M parameters, {dtype}, {runner.vocabulary} tokens"),
        ("target's device", str(runner.device)),
        ("target's attention", _attention(runner.device, heads)),
        ("target's forwards", shared),
        ("positions", "no limit of its own" if runner.max_positions is None else str(runner.max_positions)),
    ]


def _drafter_rows(generator: SpeculativeGenerator) -> list[Row]:
    drafter = generator.engine.drafter
    assert drafter is not None, "the pair has one"
    rules = [
        rule_for("auto", drafter.laws, drafter.shape, *how, False)[0].name for how in ((False, False), (True, False), (True, True))
    ]
    laws = ", ".join(sorted(drafter.laws))
    return [
        ("drafter", f"{drafter.name}, fits: draws {drafter.shape}s, {laws}"),
        ("rules by default", "{} for greedy decoding, {} for sampling, {} with a seed".format(*rules)),
        ("profile", _profile(generator)),
    ]


def _profile(generator: SpeculativeGenerator) -> str:
    """What `specdec tune` left here for this pair."""
    target, drafter = generator.target, generator.engine.drafter
    assert drafter is not None, "the pair has one"
    path = default_path(target, drafter)
    if not path.is_file():
        return f"none for this pair on {machine_of(target).device}; `specdec tune` makes one"
    try:
        profile = read_profile(path)
        other = check_fits(profile, target, drafter)
    except SpecDecError as error:
        return f"not usable: {error}"
    return f"{path}, of {profile.created}{'; ' + other if other else ''}"
