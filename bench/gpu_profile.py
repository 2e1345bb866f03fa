"""What a round waits for, by torch's profiler: copies to the host, waits of the host, and how long the device is busy.

Two runs of different length are compared, so that the prompt and whatever a call does once drop out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from specdec.bench.gpu_store import Point

_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True, slots=True)
class _Counts:
    rounds: int
    copies: int
    waits: int
    busy_ms: float


def per_round(run: Callable[[int], int], short: int, long: int, device: torch.device) -> Point:
    """Copies from the device, waits and busy milliseconds of the device in a round. run: (new tokens) to rounds taken."""
    few, many = (_count(run, tokens, device) for tokens in (short, long))
    rounds = max(many.rounds - few.rounds, 1)
    return {
        "copies_to_host_a_round": (many.copies - few.copies) / rounds,
        "waits_a_round": (many.waits - few.waits) / rounds,
        "busy_ms_a_round": (many.busy_ms - few.busy_ms) / rounds,
    }


def _count(run: Callable[[int], int], tokens: int, device: torch.device) -> _Counts:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as found:
        rounds = run(tokens)
        if device.type == "cuda":
            torch.cuda.synchronize()
    events = list(found.events() or ())
    on_device = [e for e in events if e.device_type.name == "CUDA"]
    copies = sum(e.name.startswith("Memcpy DtoH") for e in on_device)
    waits = sum(e.name in _WAITS for e in events)
    return _Counts(rounds, copies, waits, sum(e.time_range.elapsed_us() for e in on_device) / 1e3)
