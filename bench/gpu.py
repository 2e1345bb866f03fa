"""The GPU suite: `python -P -m specdec.bench.gpu STAGE`, what `make gpu` runs.

Needs the package's own dependencies (and pytest for `tests`), no network, no checkpoint: prompts and the bundled pair are in
the package. Each stage saves every point at once into RESULTS/<stage>.json, skips what that file holds, and stops in time.
"""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from specdec.errors import SpecDecError


class Stage(StrEnum):
    """What to run; `report` only renders what is there."""

    TESTS = "tests"
    KERNELS = "kernels"
    STEP = "step"
    DECODE = "decode"
    REPORT = "report"


class Device(StrEnum):
    """Where to run."""

    CUDA = "cuda"
    CPU = "cpu"


def _default_results(device: torch.device, small: bool) -> Path:
    """bench/results/<gpu>; smoke tests have a folder of their own."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    name += "-small" if small else ""
    return Path("bench") / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _checked(device: Device, small: bool, stage: Stage) -> torch.device:
    if device is Device.CUDA and not torch.cuda.is_available() and stage is not Stage.REPORT:
        raise typer.BadParameter(
            "torch finds no CUDA device here; run this on a machine with one, or try the suite with --small --device cpu"
        )
    if device is Device.CPU and not small:
        raise typer.BadParameter("--device cpu only tries the suite out and measures nothing of use; give --small as well")
    if device is Device.CPU:
        # Read when a kernel is defined, so before any of them is imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    return torch.device(device.value if device is Device.CPU or torch.cuda.is_available() else "cpu")


def main(
    stage: Annotated[Stage, typer.Argument(help="what to run")],
    results: Annotated[Path | None, typer.Option(help="folder of the JSON files; bench/results/<gpu> by default")] = None,
    device: Annotated[Device, typer.Option(help="cuda, or cpu together with --small")] = Device.CUDA,
    small: Annotated[bool, typer.Option("--small", help="tiny shapes: tries the suite out, measures nothing of use")] = False,
    minutes: Annotated[float, typer.Option(min=0.0, help="start no further point after this long")] = 5.5,
) -> None:
    """Run one stage and render the report of all that have run.

    Exits with 1 when a test fails or an output differs from plain decoding by more than rounding.
    """
    where = _checked(device, small, stage)
    from specdec.bench import gpu_decode, gpu_kernels, gpu_report, gpu_step, gpu_tests
    from specdec.bench.gpu_store import Setup

    console = Console()
    setup = Setup(where, small, results or _default_results(where, small), 60 * minutes, console)
    runs = {Stage.TESTS: gpu_tests.run, Stage.KERNELS: gpu_kernels.run, Stage.STEP: gpu_step.run, Stage.DECODE: gpu_decode.run}
    if stage in runs:
        try:
            store = runs[stage](setup)
        except SpecDecError as error:
            raise typer.BadParameter(str(error)) from error
        console.print(f"{stage}: {store.added} points measured, {len(store.points)} saved, {store.left} left out for time")
        if store.left:
            console.print("run the same command again to measure the rest")
    text = gpu_report.render(setup.results)
    if text.strip():
        (setup.results / "report.md").write_text(text)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    wrong = gpu_tests.failing(gpu_report.load(setup.results, "tests")) if stage in (Stage.TESTS, Stage.REPORT) else []
    if stage in (Stage.DECODE, Stage.REPORT):
        wrong += gpu_report.beyond_rounding(gpu_report.load(setup.results, "decode"))
    if wrong:
        console.print(f"{len(wrong)} result(s) are wrong: {wrong[0]}", style="red", markup=False)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
