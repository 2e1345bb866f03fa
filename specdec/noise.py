"""Counter-based noise: a function of (seed, request, position, stream), never of when it was asked for.

Draft, accept, residual and coupled noise are independent streams (promise 3 of the design).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from specdec.kernels.transfer import on_device


class Stream(IntEnum):
    """What a draw is for; draws of different streams are independent."""

    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3
    COUPLED = 4


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64, wrapping; a bijection whose output bits pass standard batteries."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


@dataclass(frozen=True, slots=True)
class Noise:
    """Uniform and Gumbel noise for one call of `generate`. seed: any 63-bit integer."""

    seed: int

    def key(self, stream: Stream, *counters: Tensor) -> Tensor:
        """One int64 key per element of the broadcast counters."""
        key = mix(on_device(self.seed, counters[0].device) + int(stream))
        for counter in counters:
            key = mix(key ^ mix(counter))
        return key

    def uniform(self, stream: Stream, *counters: Tensor) -> Tensor:
        """Float64 in (0, 1), 53 bits, one per element of the broadcast counters."""
        bits = _shift_right(self.key(stream, *counters), 11)
        return (bits.to(torch.float64) + 0.5) * 2.0**-53

    def gumbel(self, stream: Stream, size: int, *counters: Tensor) -> Tensor:
        """Standard Gumbel noise, float64, [*counters' shape, size]: entry v belongs to token v."""
        tokens = torch.arange(size, device=counters[0].device)
        wide = [counter.unsqueeze(-1) for counter in counters]
        return -torch.log(-torch.log(self.uniform(stream, *wide, tokens)))
