"""How likely a drafted token is accepted, by depth, rank and request: known before it is drawn, learned from finished rounds."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.types import RoundStats

# What a count keeps of its weight from round to round: of one request, and of all.
_OWN, _SHARED = 0.96, 0.98
# How many observations the shared rate counts for in a request's own, and how many the first guess counts for in the shared one.
_PRIOR, _FIRST_WEIGHT = 6.0, 2.0
# Of the likeliest guess; a further one has a share of what those before it left.
_FIRST_GUESS, _NEXT_SHARE = 0.7, 0.4
# What is left of the shared counts when a trial went against them.
_DOUBT = 0.1
# Weights grow instead of counts shrinking; beyond this they are brought back.
_LARGEST = 1e30


class _Counts:
    """Discounted numbers of guesses that were accepted, and that were reached, by depth and rank."""

    def __init__(self) -> None:
        self._accepted: list[list[float]] = []
        self._reached: list[list[float]] = []
        self._weight = 1.0

    def fade(self, keep: float) -> None:
        """What was seen so far counts for less."""
        self._weight /= keep
        if self._weight > _LARGEST:
            self._scale(1 / self._weight)
            self._weight = 1.0

    def _scale(self, by: float) -> None:
        for rows in (self._accepted, self._reached):
            for row in rows:
                row[:] = [value * by for value in row]

    def _at(self, depth: int, ranks: int) -> None:
        while len(self._reached) <= depth:
            self._accepted.append([0.0])
            self._reached.append([0.0])
        missing = ranks - len(self._reached[depth])
        if missing > 0:
            self._accepted[depth] += [0.0] * missing
            self._reached[depth] += [0.0] * missing

    def add_chain(self, accepted: int, planned: int) -> None:
        """A chain of which so many were accepted: depths behind the first refusal were not reached.

        planned: a drafter that had less to offer is taken as refused there.
        """
        reached, weight = min(accepted + 1, planned), self._weight
        if reached > len(self._reached):
            self._at(reached - 1, 1)
        for row in self._reached[:reached]:
            row[0] += weight
        for row in self._accepted[: min(accepted, planned)]:
            row[0] += weight

    def add_levels(self, levels: Sequence[tuple[int, int]]) -> None:
        """A tree: see `RoundStats.levels`."""
        for depth, (children, rank) in enumerate(levels):
            self._at(depth, children)
            for other in range(children):
                self._reached[depth][other] += self._weight
            if rank >= 0:
                self._accepted[depth][rank] += self._weight

    def reached(self, depth: int) -> float:
        """Discounted observations of the first rank."""
        return self._reached[depth][0] / self._weight if depth < len(self._reached) else 0.0

    def rate(self, depth: int, rank: int, guess: float, weight: float) -> float:
        """Of this depth and rank, with a guess that counts for `weight` observations; one never reached is the guess."""
        if depth >= len(self._reached) or rank >= len(self._reached[depth]):
            return guess
        weight *= self._weight
        return (self._accepted[depth][rank] + weight * guess) / (self._reached[depth][rank] + weight)


class AcceptanceModel:
    """Moving averages by depth and rank: one over all requests, and one of each request that starts from it.

    Everything is a function of finished rounds, so a plan made from it depends on no token that it is about.
    """

    def __init__(self, known: Sequence[Sequence[float]] = ()) -> None:
        """known: probabilities by depth and rank that a profile gives, taken as the first guess."""
        self._known = known
        self._shared = _Counts()
        self._own: dict[int, _Counts] = {}

    def forget(self, request: int) -> None:
        """The slot holds another text now."""
        self._own.pop(request, None)

    def doubt(self) -> None:
        """What is known of all requests seems out of date: it counts for little from now on."""
        self._shared.fade(_DOUBT)

    def observe(self, stats: RoundStats, planned: Sequence[int]) -> None:
        """Learn from a round in which something was asked for; requests that drafted nothing are forgotten a little, too.

        planned: depth asked for, by request.
        """
        self._shared.fade(_SHARED)
        for counts in self._own.values():
            counts.fade(_OWN)
        levels = stats.levels
        for place, (request, drafted) in enumerate(zip(stats.requests, stats.drafted, strict=True)):
            if not drafted:
                continue
            for counts in (self._shared, self._own.setdefault(request, _Counts())):
                if levels is None:
                    counts.add_chain(stats.accepted[place], planned[place])
                else:
                    counts.add_levels(levels[place])

    def rates(self, request: int, depth: int, width: int = 1) -> list[list[float]]:
        """[depth][width]: the probability that this guess is the accepted one, given that its parent was accepted.

        A depth that was never reached is as likely as the one before. The rows sum to 1 at most.
        """
        return self.of(request, self.shared(depth, width))

    def shared(self, depth: int, width: int = 1) -> list[list[float]]:
        """As `rates`, of all requests together."""
        found, row = list[list[float]](), list[float]()
        for level in range(depth):
            row = [self._shared.rate(level, r, guess, _FIRST_WEIGHT) for r, guess in enumerate(self._guesses(level, width, row))]
            found.append(_at_most_one(row))
        return found

    def reached(self, depth: int) -> float:
        """How many observations there are of this depth, from 1, recent ones counting most; 0 of depth 0."""
        return self._shared.reached(depth - 1) if depth else 0.0

    def of(self, request: int, shared: Sequence[list[float]]) -> list[list[float]]:
        """As `rates`, from what `shared` gave."""
        own = self._own.get(request)
        if own is None:
            return list(shared)
        return [
            _at_most_one([own.rate(level, r, guess, _PRIOR) for r, guess in enumerate(row)]) for level, row in enumerate(shared)
        ]

    def _guesses(self, level: int, width: int, before: list[float]) -> list[float]:
        known = list(self._known[level][:width]) if level < len(self._known) else list(before)
        for rank in range(len(known), width):
            known = [*known, _FIRST_GUESS if not rank else _NEXT_SHARE * max(1 - sum(known), 0.0)]
        return known


def _at_most_one(row: list[float]) -> list[float]:
    total = sum(row)
    return row if total <= 1 else [value / total for value in row]
