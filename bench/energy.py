"""Energy that the device tells of: NVIDIA's own counter, else the processor's (RAPL), else none."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

_RAPL = Path("/sys/class/powercap")


class Meter(Protocol):
    """Counts energy from some moment on."""

    def joules(self) -> float:
        """Energy so far; only differences mean something."""


def meter_of(device: torch.device, *, rapl: Path = _RAPL) -> Meter | None:
    """What counts a device's energy; None where nothing does, or where reading it is not allowed.

    A GPU's counter is of the whole board and needs the package nvidia-ml-py; RAPL is of the processor's packages, memory and idle
    cores included, whoever uses them. rapl: the kernel's folder.
    """
    if device.type == "cuda":
        return _nvml(device.index or 0)
    packages = tuple(_readable(sorted(rapl.glob("intel-rapl:[0-9]*"))))
    return Rapl(packages) if packages else None


def _nvml(index: int) -> Meter | None:
    try:
        library = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        library.nvmlInit()
        handle = library.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        library.nvmlDeviceGetTotalEnergyConsumption(handle)
    except library.NVMLError:
        return None
    return _Nvml(library, handle)


@dataclass
class _Nvml:
    """A GPU's counter, in thousandths of a joule."""

    library: Any
    handle: Any

    def joules(self) -> float:
        """See `Meter.joules`."""
        return float(self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1000


def _readable(folders: Sequence[Path]) -> Iterator[Path]:
    """Packages themselves, not their parts, which they include."""
    for folder in folders:
        if folder.name.count(":") == 1:
            try:
                int((folder / "energy_uj").read_text()), int((folder / "max_energy_range_uj").read_text())
            except (OSError, ValueError):
                continue
            yield folder


@dataclass
class Rapl:
    """The processor's counters, which begin again at a range that the kernel names. packages: folders of the kernel's."""

    packages: tuple[Path, ...]
    _last: dict[Path, int] = field(default_factory=dict)
    _total: int = 0

    def joules(self) -> float:
        """See `Meter.joules`; right where a counter has begun again at most once since the call before."""
        for package in self.packages:
            now = int((package / "energy_uj").read_text())
            before = self._last.get(package, now)
            span = int((package / "max_energy_range_uj").read_text()) if now < before else 0
            self._total += now - before + span
            self._last[package] = now
        return self._total / 1e6
