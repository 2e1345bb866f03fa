"""How rules draw: `accept(prob)` and `pick(weights)`, so that the shipped rules can be enumerated exactly."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from specdec.kernels.transfer import on_device
from specdec.noise import Noise, Stream


class Chooser(Protocol):
    """The only source of randomness that a rule may use."""

    def accept(self, prob: Tensor) -> Tensor:
        """Bool of prob's shape: True with that probability, independently; probability 0 is never True."""

    def pick(self, weights: Tensor) -> Tensor:
        """[...] int64: an index drawn in proportion to weights [..., V], unnormalised and not negative."""

    def coupled(self, log_p: Tensor, depth: Tensor) -> Tensor:
        """[B, N] int64: argmax of log_p [B, N, V] plus the noise of the position that each node predicts."""


class NoiseChooser:
    """Draws from counter-based noise, keyed by request, committed length, call and element: no two draws share a key.

    requests, starts: [B] int64, slots and committed lengths (node 0 included).  One object serves one round.
    """

    def __init__(self, noise: Noise, requests: Tensor, starts: Tensor, stream: Stream) -> None:
        """stream: what accepts draw from; picks draw from RESIDUAL unless this chooser drafts."""
        self._noise, self._requests, self._starts = noise, requests, starts
        self._accept = stream
        self._pick = stream if stream is Stream.DRAFT else Stream.RESIDUAL
        self._calls = 0

    def _uniform(self, stream: Stream, shape: torch.Size) -> Tensor:
        device = self._requests.device
        self._calls += 1
        call = on_device(self._calls, device)
        element = torch.arange(shape[1:].numel(), device=device)
        drawn = self._noise.uniform(stream, self._requests[:, None], self._starts[:, None], call, element)
        return drawn.view(shape)

    def accept(self, prob: Tensor) -> Tensor:
        """Strictly u < prob with u in (0, 1); see `Chooser.accept`."""
        return self._uniform(self._accept, prob.shape) < prob

    def pick(self, weights: Tensor) -> Tensor:
        """By Gumbel noise, so weights need no normalisation; see `Chooser.pick`."""
        uniform = self._uniform(self._pick, weights.shape)
        return (weights.double().log() - torch.log(-torch.log(uniform))).argmax(-1)

    def coupled(self, log_p: Tensor, depth: Tensor) -> Tensor:
        """See `Chooser.coupled`."""
        positions = self._starts[:, None] + depth
        noise = self._noise.gumbel(Stream.COUPLED, log_p.shape[-1], self._requests[:, None], positions)
        return (log_p + noise).argmax(-1)
