"""How likely a drafted token is accepted, by depth and request: known before it is drawn, learned from finished rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# What a count keeps of its weight from round to round: of one request, and of all.
_OWN, _SHARED = 0.93, 0.96
# How many observations the shared rate counts for in a request's own, and how many the first guess counts for in the shared one.
_PRIOR, _FIRST_WEIGHT = 2.0, 2.0
_FIRST_GUESS = 0.7


@dataclass(slots=True)
class _Counts:
    """Discounted numbers of tokens that were accepted, and that were reached, by depth."""

    accepted: list[float] = field(default_factory=list)
    reached: list[float] = field(default_factory=list)

    def fade(self, keep: float) -> None:
        """A round has gone by: what was seen counts for less, also where nothing was drafted in it."""
        self.accepted = [keep * value for value in self.accepted]
        self.reached = [keep * value for value in self.reached]

    def add(self, accepted: int, drafted: int) -> None:
        """A round in which `accepted` of a chain of `drafted` were accepted: depths behind the first refusal were not reached."""
        missing = drafted - len(self.reached)
        self.accepted += [0.0] * missing
        self.reached += [0.0] * missing
        for depth in range(min(accepted + 1, drafted)):
            self.accepted[depth] += depth < accepted
            self.reached[depth] += 1.0

    def rate(self, depth: int, guess: float, weight: float) -> float:
        """Of the depth, with a guess that counts for `weight` observations; a depth that was never reached is the guess."""
        if depth >= len(self.reached):
            return guess
        return (self.accepted[depth] + weight * guess) / (self.reached[depth] + weight)


class AcceptanceModel:
    """Moving averages by depth: one over all requests, and one of each request that starts from it.

    Everything is a function of finished rounds, so a plan made from it depends on no token that it is about.
    """

    def __init__(self) -> None:
        """Knows nothing yet."""
        self._shared = _Counts()
        self._own: dict[int, _Counts] = {}

    def forget(self, request: int) -> None:
        """The slot holds another text now."""
        self._own.pop(request, None)

    def observe(self, requests: Sequence[int], drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """Learn from a round."""
        self._shared.fade(_SHARED)
        for counts in self._own.values():
            counts.fade(_OWN)
        for request, proposed, kept in zip(requests, drafted, accepted, strict=True):
            if proposed:
                self._shared.add(kept, proposed)
                self._own.setdefault(request, _Counts()).add(kept, proposed)

    def rates(self, request: int, depth: int) -> list[float]:
        """Of each depth, the probability of acceptance given that all before it were accepted; a new depth is as the one before."""
        own, found, guess = self._own.get(request, _Counts()), list[float](), _FIRST_GUESS
        for level in range(depth):
            guess = self._shared.rate(level, guess, _FIRST_WEIGHT)
            found.append(own.rate(level, guess, _PRIOR))
        return found
