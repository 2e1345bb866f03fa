"""Where a request ends, inside a block of new tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

_FOREVER = 1 << 62


class Stopping:
    """Cuts new tokens as if HF's criteria had been asked after every single one.

    Criteria of the user's own are called for every token with the row that HF would show, pads included, at the
    request's own place in a batch of all requests (the others hold their own text at that length), and with
    scores=None; they are taken as pure. Without an end-of-sequence criterion HF's loop goes on for every row until
    the last one has met a criterion; so do we: `total` is then the number of new tokens that all rows have.
    """

    def __init__(
        self,
        criteria: StoppingCriteriaList,
        rows: Sequence[Sequence[int]],
        *,
        pad: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """rows: HF's input_ids, pads included, one a request.  pad: what a finished row is continued with."""
        self._rows = [list(row) for row in rows]
        self._starts = [len(row) for row in rows]
        self._pad, self._device = pad, torch.device(device)
        self._stops: list[int | None] = [None] * len(rows)
        self._max_length = min((c.max_length for c in criteria if type(c) is MaxLengthCriteria), default=_FOREVER)
        self._eos = frozenset(t for c in criteria if type(c) is EosTokenCriteria for t in c.eos_token_id.view(-1).tolist())
        self._deadline = min(
            (c.initial_timestamp + c.max_time for c in criteria if type(c) is MaxTimeCriteria), default=float("inf")
        )
        self._strings = [c for c in criteria if type(c) is StopStringCriteria]
        known = (MaxLengthCriteria, EosTokenCriteria, MaxTimeCriteria, StopStringCriteria)
        self._others: list[StoppingCriteria] = [c for c in criteria if type(c) not in known]
        self._together = len(rows) > 1 and not any(hasattr(c, "eos_token_id") for c in criteria)

    def room(self, request: int) -> int:
        """How many tokens the request may still get before its maximal length."""
        return max(0, self._max_length - len(self._rows[request]))

    def cut(self, request: int, tokens: Sequence[int]) -> tuple[int, bool]:
        """How many of the new tokens are kept, and whether the request is finished with them."""
        for count, token in enumerate(tokens):
            if self.finished(request):
                return count, True
            self._rows[request].append(token)
            if self._stops[request] is None and self._is_done(request, token):
                self._stops[request] = len(self._rows[request])
        return len(tokens), self.finished(request)

    def finished(self, request: int) -> bool:
        """Whether the request gets no more tokens."""
        if not self._together:
            return self._stops[request] is not None
        total = self.total()
        length = len(self._rows[request])
        return length >= self._max_length or (total is not None and length - self._starts[request] >= total)

    def total(self) -> int | None:
        """New tokens of the longest request, once every request has met a criterion."""
        if any(stop is None for stop in self._stops):
            return None
        return max(stop - start for stop, start in zip(self._stops, self._starts, strict=True) if stop is not None)

    def _is_done(self, request: int, token: int) -> bool:
        row = self._rows[request]
        if token in self._eos or len(row) >= self._max_length or time.time() > self._deadline:
            return True
        if any(bool(c(torch.tensor([row[-c.maximum_token_len :]]), None)[0]) for c in self._strings):
            return True
        return bool(self._others) and self._ask(request)

    def _ask(self, request: int) -> bool:
        """The user's criteria, on a batch in which every request stands at its own place."""
        length = len(self._rows[request])
        batch = [(row + [self._pad] * (length - len(row)))[:length] for row in self._rows]
        answers: list[Tensor | bool] = [c(torch.tensor(batch, device=self._device), None) for c in self._others]
        return any(bool(torch.as_tensor(answer).expand(len(batch))[request]) for answer in answers)
