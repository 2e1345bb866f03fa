"""One timed call: its seconds, the most memory while it ran, and its energy where the device tells."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from specdec.bench.energy import Meter


@dataclass(frozen=True, slots=True)
class Measured:
    """What a call gave. peak_mib: of the device, else of this process.  energy_j: None where nothing counts it."""

    out: Any
    seconds: float
    peak_mib: float | None
    energy_j: float | None


def measured(run: Callable[[], Any], device: torch.device, meter: Meter | None = None) -> Measured:
    """Run it and wait until the device is done."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    else:
        _reset_peak()
    before = meter.joules() if meter is not None else 0.0
    began = perf_counter()
    out = run()
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = perf_counter() - began
    energy = meter.joules() - before if meter is not None else None
    return Measured(out, seconds, torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else _peak_mib(), energy)


def _reset_peak() -> None:
    """Linux forgets a process's peak when told so; elsewhere the peak is that of the whole run."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_mib() -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    found = next((line.split() for line in lines if line.startswith("VmHWM:")), None)
    if found is not None:
        return int(found[1]) / 1024
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return whole / 2**20 if sys.platform == "darwin" else whole / 1024
