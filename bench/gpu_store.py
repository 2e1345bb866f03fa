"""What the stages of `specdec.bench.gpu` share: points saved one by one, the time they may take, device timing.

A stage's file is one JSON list of flat objects. A point's settings are its key: a point that the file holds is not measured
again, so a run that was cut short goes on where it stopped. To measure anew, delete the file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import triton
from rich.console import Console
from triton.errors import TritonError

from specdec.bench.machine import machine

Value = str | int | float | bool | None
Point = dict[str, Value]

# Datasheet bandwidth in bytes a second, by a part of the device's name; the longer name first.
_NOMINAL = {"H200": 4.8e12, "H100 PCIe": 2.0e12, "H100": 3.35e12, "A100-SXM4-80GB": 2.039e12}
_FLUSH_BYTES, _LEAD_S = 512 << 20, 1e-3


@dataclass(frozen=True, slots=True)
class Setup:
    """How a stage is run. device: "cuda" or "cpu".  small: shapes of a smoke test.  results: folder of the JSON files.

    seconds: the stage starts no further point when it has taken that long.
    """

    device: torch.device
    small: bool
    results: Path
    seconds: float
    console: Console


def describe(device: torch.device) -> Point:
    """What a point was measured on."""
    host = machine()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else host["cpu"],
        "torch": host["torch"],
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "transformers": host["transformers"],
        "commit": host["commit"] or "unknown",
    }


def nominal_bandwidth(device: str) -> float | None:
    """Bytes a second by the datasheet; None for a device that is not in the table."""
    return next((rate for name, rate in _NOMINAL.items() if name in device), None)


class Store:
    """The points of one stage."""

    def __init__(self, stage: str, setup: Setup) -> None:
        """Reads what an earlier run left in RESULTS/stage.json."""
        self._path = setup.results / f"{stage}.json"
        self._about = describe(setup.device)
        self._console, self._end, self._stage = setup.console, perf_counter() + setup.seconds, stage
        self.points: list[Point] = json.loads(self._path.read_text()) if self._path.exists() else []
        self.left, self.added = 0, 0

    @property
    def late(self) -> bool:
        """The stage has had its time: nothing further is measured."""
        return self.seconds_left < 0

    @property
    def seconds_left(self) -> float:
        """Of the stage's time."""
        return self._end - perf_counter()

    def find(self, settings: Mapping[str, Value]) -> Point | None:
        """The saved point of these settings."""
        return next((p for p in self.points if all(key in p and p[key] == value for key, value in settings.items())), None)

    def measure(self, settings: Mapping[str, Value], run: Callable[[], Mapping[str, Value]]) -> Point | None:
        """The saved point, else what `run` measures, saved at once; None, and counted in `left`, when time is up.

        What a method cannot do (memory, an unsupported case) is a point with the reason under "failed".
        """
        found = self.find(settings)
        if found is not None:
            return found
        if self.late:
            self.left += 1
            return None
        try:
            results: Mapping[str, Value] = run()
        except (RuntimeError, ValueError, TritonError) as error:
            results = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        point = {**settings, **results, **self._about}
        self.points.append(point)
        self._save()
        self.added += 1
        self._say(settings, results)
        if "failed" in results and torch.cuda.is_available():
            # After an illegal access every call fails: this raises, so that the points behind it are not saved as failed.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return point

    def _save(self) -> None:
        """Replace the file in one step, so that a run that is killed leaves a whole one."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._path.with_suffix(".json.tmp")
        lines = ",\n".join(json.dumps(point) for point in self.points)
        scratch.write_text(f"[\n{lines}\n]\n")
        scratch.replace(self._path)

    def _say(self, settings: Mapping[str, Value], results: Mapping[str, Value]) -> None:
        what = " ".join(f"{key}={value}" for key, value in settings.items())
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in results.items()}
        text = " ".join(f"{key}={value}" for key, value in shown.items() if value not in (None, ""))
        self._console.print(f"{self._stage}: {what} -> {text}", highlight=False, markup=False, soft_wrap=True)


class DeviceTimer:
    """Times work on a device: median milliseconds, caches flushed before each repetition."""

    def __init__(self, device: torch.device, small: bool) -> None:
        """On a GPU the flush also keeps it busy for about a millisecond, so that the host's launches are ahead of it."""
        self._cuda = device.type == "cuda"
        self._repeats, self._warm = (2, 1) if small else (25, 3)
        self._scratch = torch.empty(_FLUSH_BYTES if self._cuda else 1, dtype=torch.uint8, device=device)
        self._fills = max(1, round(_LEAD_S / self._fill_seconds())) if self._cuda else 1

    def _fill_seconds(self) -> float:
        for _ in range(2):
            self._scratch.zero_()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        self._scratch.zero_()
        ended.record()
        torch.cuda.synchronize()
        return float(began.elapsed_time(ended)) / 1e3

    def __call__(self, run: Callable[[], object], repeats: int | None = None) -> float:
        """Median milliseconds of `run` on the device: between events on a GPU, by the clock on a CPU."""
        for _ in range(self._warm):
            run()
        return median(self._once(run) for _ in range(repeats or self._repeats))

    def _once(self, run: Callable[[], object]) -> float:
        if not self._cuda:
            start = perf_counter()
            run()
            return (perf_counter() - start) * 1e3
        for _ in range(self._fills):
            self._scratch.zero_()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        torch.cuda.synchronize()
        return float(began.elapsed_time(ended))


def copy_point(setup: Setup, timer: DeviceTimer) -> Point:
    """Bandwidth of one big device copy, bytes read and bytes written both counted: what shares are of."""
    size = (1 << 20) if setup.small else (4 << 30)
    source = torch.empty(size, dtype=torch.uint8, device=setup.device).zero_()
    target = torch.empty_like(source)
    ms = timer(lambda: target.copy_(source))
    rate = 2 * size / ms * 1e3
    return {"ms": ms, "bytes": 2 * size, "bytes_per_s": rate}


@contextmanager
def specdec_warnings(said: list[str]) -> Iterator[None]:
    """Adds to `said` what specdec warns of meanwhile: why a forward is not captured, why a kernel does not run."""

    class _Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener, logger = _Listener(logging.WARNING), logging.getLogger("specdec")
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)
