"""One timed call: its seconds, the most memory while it ran, its energy where the device tells, and what others took of it."""

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

# A call that lost a larger part of its processor time to other guests of the host is disturbed.
_DISTURBED = 0.1


@dataclass(frozen=True, slots=True)
class Measured:
    """What a call gave. peak_mib: of the device, else of this process.  energy_j: None where nothing counts it.

    stolen: the part of the processor time wanted meanwhile that the host gave to other guests; None where the system does not tell.
    """

    out: Any
    seconds: float
    peak_mib: float | None
    energy_j: float | None
    stolen: float | None


def measured(run: Callable[[], Any], device: torch.device, meter: Meter | None = None) -> Measured:
    """Run it and wait until the device is done."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    else:
        _reset_peak()
    before = meter.joules() if meter is not None else 0.0
    wanted = ticks()
    began = perf_counter()
    out = run()
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = perf_counter() - began
    stolen = stolen_between(wanted, ticks())
    energy = meter.joules() - before if meter is not None else None
    return Measured(out, seconds, torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else _peak_mib(), energy, stolen)


def disturbed_by(stolen: float | None) -> bool:
    """Whether others took so much of a call that its time says little."""
    return stolen is not None and stolen > _DISTURBED


def ticks() -> tuple[int, int] | None:
    """Processor time since the machine started, in ticks: what was worked or waited for, and what of it the host gave to others."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        user, nice, system, _, _, interrupts, soft, stolen = map(int, first[1:9])
    except (OSError, ValueError):
        return None
    return user + nice + system + interrupts + soft + stolen, stolen


def stolen_between(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    """The part that others took between two readings of `ticks`; None where it is unknown or nothing was wanted."""
    if before is None or after is None or after[0] <= before[0]:
        return None
    return (after[1] - before[1]) / (after[0] - before[0])


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
