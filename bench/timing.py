"""Timing of methods against each other in one interleaved run, and intervals for their ratios."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one method on one prompt. rounds: target forwards after the prompt.  round_s: seconds of all rounds, and
    forward_s those inside the models' forwards, 0 for methods that do not tell.  tokens: the new ones."""

    method: str
    prompt: int
    group: str
    num_tokens: int
    seconds: float
    rounds: int
    round_s: float
    forward_s: float
    tokens: tuple[int, ...] = ()
    repeat: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def set_loaded_aside() -> None:
    """Leave what is loaded so far, models and libraries, out of Python's garbage collections.

    A full one looks at 400,000 objects, took 270 ms on two cores, and falls on whichever method is running when enough was made.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@contextmanager
def loaded_aside() -> Iterator[None]:
    """As `set_loaded_aside`, until the block ends."""
    set_loaded_aside()
    try:
        yield
    finally:
        gc.unfreeze()


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the seconds it took."""
    began = perf_counter()
    out = run()
    return out, perf_counter() - began


def medians(samples: Sequence[Sample]) -> list[Sample]:
    """For every method and prompt the run of median time, so that a pause of the machine does not count."""
    groups: dict[tuple[str, int], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.method, sample.prompt), []).append(sample)
    return [sorted(own, key=lambda s: s.seconds)[len(own) // 2] for own in groups.values()]


def rotation(names: Sequence[str], turn: int) -> list[str]:
    """The names beginning at another place each turn, so that no method always follows the same one."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]


def ratio_interval(
    seconds: Mapping[str, Sequence[float]], tokens: Mapping[str, Sequence[int]], method: str, base: str, seed: int = 0
) -> tuple[float, float, float]:
    """Tokens a second of `method` over `base`: the ratio over all prompts, and its 95 % bootstrap interval over prompts."""
    draws = np.random.default_rng(seed).integers(0, len(seconds[base]), size=(2000, len(seconds[base])))

    def rate(name: str, picks: Any) -> Any:
        return np.asarray(tokens[name])[picks].sum(-1) / np.asarray(seconds[name])[picks].sum(-1)

    everything = np.arange(len(seconds[base]))
    ratios = rate(method, draws) / rate(base, draws)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(rate(method, everything) / rate(base, everything)), float(low), float(high)
