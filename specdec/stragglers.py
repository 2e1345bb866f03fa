"""What an accepted token is worth in a batch that ends with its last request, for which all others wait."""

from __future__ import annotations

from collections.abc import Sequence
from math import log2

# What of a mean acceptance the last request is taken to have: less by this for each doubling of the batch, but this at least;
# tokens of a request that the guess counts for against what batches showed; and what of those stays with each later batch.
_BEHIND, _LEAST, _GUESSED, _STAYS = 0.08, 0.05, 8.0, 0.7


class Stragglers:
    """How much of what is accepted in a batch goes to the request that ends last, which is known only at the end.

    Where a round takes about as long for one request as for many, drafts that only some requests profit from gain nothing: those
    end sooner, and the others take as many rounds as before, each of them longer.
    """

    def __init__(self) -> None:
        """No batch has ended."""
        self._known: dict[int, tuple[float, float]] = {}
        self._own: dict[int, dict[int, float]] = {}
        self._last: tuple[int, ...] = ()

    def observe(self, size: int, requests: tuple[int, ...], accepted: Sequence[int]) -> None:
        """A round. size: of the batch, as times are kept for."""
        self._last = requests
        if any(accepted):
            own = self._own.setdefault(size, {})
            for request, count in zip(requests, accepted, strict=True):
                own[request] = own.get(request, 0.0) + count

    def end(self) -> None:
        """The batch has ended, and its last round was that of the requests that all others waited for."""
        for size, own in self._own.items():
            mean = sum(own.values()) / len(own)
            last = min([own.get(request, mean) for request in self._last])
            ours, all_ = self._known.get(size, (0.0, 0.0))
            self._known[size] = _STAYS * ours + last, _STAYS * all_ + mean
        self._own, self._last = {}, ()

    def share(self, size: int) -> float:
        """Accepted tokens of the last request over those of a mean one, 1 at most and never 0."""
        ours, all_ = self._known.get(size, (0.0, 0.0))
        guess = max(1 - _BEHIND * log2(size), _LEAST)
        return min(max((ours + _GUESSED * guess) / (all_ + _GUESSED), _LEAST), 1.0)
