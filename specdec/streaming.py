"""Feeds a transformers streamer from blocks of tokens as HF's loop would, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from specdec.stopping import Stopping


class StepStream:
    """Gives the prompt [B, length], then one [B] tensor a step, then the end.

    Requests advance by blocks of different sizes, so a step is given when every request has its token; a finished
    one has the pad token.
    """

    def __init__(self, streamer: BaseStreamer, input_ids: Tensor, stopping: Stopping, pad: int) -> None:
        self._streamer: Any = streamer
        self._stopping, self._pad = stopping, pad
        self._tokens: list[list[int]] = [[] for _ in range(len(input_ids))]
        self._given = 0
        self._put(input_ids.cpu())

    def emit(self, request: int, tokens: Sequence[int]) -> None:
        """Take in a request's new tokens."""
        self._tokens[request].extend(tokens)
        running = [len(own) for r, own in enumerate(self._tokens) if not self._stopping.finished(r)]
        if running:
            self._give(min(running))

    def end(self) -> None:
        """Give the rest, and tell the streamer that this is all."""
        total = self._stopping.total()
        longest = max(map(len, self._tokens))
        self._give(longest if total is None else min(total, longest))
        self._streamer.end()

    def _give(self, until: int) -> None:
        for step in range(self._given, until):
            self._put(torch.tensor([own[step] if step < len(own) else self._pad for own in self._tokens]))
        self._given = max(self._given, until)

    def _put(self, tokens: Tensor) -> None:
        self._streamer.put(tokens)
