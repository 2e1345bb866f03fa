"""How long a round takes: measured where it was run, between and beyond that fitted, and following a machine that changes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate

# Samples that a size begins with: their median is where it starts. Until there are so many the least counts, since the first runs
# of a size also prepare it; until there are so many as the second number it is not known.
_FIRST, _KNOWN = 5, 3
# Seconds below which nothing is told apart.
_SHORTEST = 1e-7
# Rounds without a sample after which a size is not known any more, and begins anew.
_STALE = 384
# How fast a size, and the pace of all sizes, follow what a round took against what was expected of it; and how much longer or
# shorter a round may be taken to be, so that a single one says little. Pace and size move in proportion: what a size shows of
# itself cannot wander off into the pace.
_SIZE_FOLLOWS, _PACE_FOLLOWS, _MOST = 0.03, 0.1, 1.5
# Growth for each row or step of the first size measured, while nothing else is known.
_GUESSED_GROWTH = 0.05
# Share of the expected growth that an unmeasured size is hoped to show.
_HOPED_GROWTH = 0.5
# Share that a size is taken to need longer which never came: its first forward is a slow one.
_NEW = 0.04
# Share of the largest size from which its growth is told.
_APART = 0.75
# Sizes that lie so near to a measured one count as measured.
_NEAR = 0.12
# Rounds that a drift is the mean of, about, and how many times as long as expected a round of them counts, at most.
_DRIFT_ROUNDS, _DRIFT_MOST = 48, 3.0
# Batch sizes that share their measurements; above them steps of a third.
_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# A round that took longer or shorter by a larger share than this counts as one by this share, where contexts are compared.
_OUTLIES = 0.25
# How much of what was seen of contexts stays from round to round; how fast the means of a size follow; deviation of contexts, in
# tokens of a request, from which on their slope is believed: within one text a machine that changes its pace looks like a slope.
_CONTEXT_STAYS, _MEANS_FOLLOW, _SURE = 0.99, 0.005, 200.0
# Share of a round's time that is left when what its context takes is taken away, at least.
_BASE = 0.1


class Drift:
    """What late rounds took over what was expected of them: times are medians, and rounds take longer than those on average.

    For what is forecast; what is decided compares medians with medians.
    """

    def __init__(self) -> None:
        self._expected = self._took = 0.0

    def observe(self, expected_s: float, took_s: float) -> None:
        """A finished round."""
        if not self._expected:
            self._expected = self._took = _DRIFT_ROUNDS * expected_s
        self._expected += expected_s - self._expected / _DRIFT_ROUNDS
        self._took += min(took_s, _DRIFT_MOST * expected_s) - self._took / _DRIFT_ROUNDS

    @property
    def factor(self) -> float:
        """1 to begin with."""
        return self._took / self._expected if self._expected else 1.0


class Curve:
    """Seconds by size: as measured where that was, and not falling with size between and beyond measured ones."""

    def __init__(self, known: Mapping[int, float] | None = None, *, in_steps: bool = False) -> None:
        """known: seconds by size that count as measured well enough.  in_steps: taken to grow with size from nothing."""
        self._in_steps = in_steps
        self._samples: dict[int, list[float]] = {}
        self._typical: dict[int, float] = {}
        self._last: dict[int, int] = {}
        self._bounds: set[int] = set()
        self._now = 0
        self._sizes: list[int] = []
        self._values: list[float] = []
        for size, seconds in (known or {}).items():
            self.add(size, seconds, rounds=_KNOWN)

    def add(self, size: int, seconds: float, follow: float = _SIZE_FOLLOWS, rounds: int = 1) -> None:
        """A measurement. rounds: that it is the median of."""
        seconds = max(seconds, _SHORTEST)
        self._now += rounds
        if self._now - self._last.get(size, self._now) > _STALE:
            self._samples[size] = []
        self._last[size] = self._now
        samples = self._samples.setdefault(size, [])
        if len(samples) < _FIRST:
            samples += [seconds] * min(rounds, _FIRST - len(samples))
            self._typical[size] = min(samples) if len(samples) < _FIRST else sorted(samples)[_FIRST // 2]
        else:
            self._typical[size] *= within(seconds / self._typical[size]) ** _after(follow, rounds)
        self._bounds.discard(size)
        for bound in self._bounds:
            if bound < size:
                self._typical[bound] = min(self._typical[bound], self._typical[size])
        self._note(size)

    def bound(self, size: int, seconds: float) -> None:
        """A cold run, which takes longer than later ones: what this size takes at most, until it is measured itself."""
        if not self._sizes or self._samples.get(size) or seconds >= self.at(size):
            return
        self._samples[size], self._last[size], self._typical[size] = [], self._now, max(seconds, _SHORTEST)
        self._bounds.add(size)
        self._note(size)

    def _note(self, size: int) -> None:
        """What is known of this size has changed."""
        if len(self._sizes) < len(self._typical):
            insort(self._sizes, size)
        self._values = []

    def _seconds(self) -> list[float]:
        """Of each measured size, not falling; put together when first asked for after a measurement."""
        if not self._values:
            self._values = list(accumulate([self._typical[known] for known in self._sizes], max))
        return self._values

    def settled(self, size: int) -> float | None:
        """Where this size stands; None until it was measured so often that it can tell the pace."""
        return self._typical[size] if len(self._samples.get(size, ())) >= _FIRST else None

    def __bool__(self) -> bool:
        """Whether anything is known."""
        return bool(self._sizes)

    @property
    def largest(self) -> int:
        """Of the sizes that are known; 0 for none."""
        return max([size for size in self._sizes if self._fresh(size) >= _KNOWN], default=0)

    def knows(self, size: float) -> bool:
        """Whether this size, or those about as large, were measured often enough, and lately."""
        place, count = bisect_left(self._sizes, size - _NEAR * size), 0
        while place < len(self._sizes) and self._sizes[place] <= size + _NEAR * size:
            count += self._fresh(self._sizes[place])
            place += 1
        return count >= _KNOWN

    def came(self, size: float) -> bool:
        """Whether a round of this very size was measured."""
        return size in self._typical

    def _fresh(self, size: int) -> int:
        """Samples of a size that was measured lately."""
        return len(self._samples[size]) if self._now - self._last[size] <= _STALE else 0

    def hoped(self, size: float) -> float:
        """The least that it may take: growing half as fast as expected beyond the largest known size."""
        return self.all_hoped((size,))[0]

    def all_hoped(self, sizes: Sequence[float]) -> list[float]:
        """As `hoped`, of each of these sizes, which ascend."""
        fresh = [own for own in self._sizes if self._fresh(own) >= _KNOWN]
        found, below = [], 0
        for size, expected in zip(sizes, self.all_at(sizes), strict=True):
            while below < len(fresh) and fresh[below] <= size:
                below += 1
            known = self._typical[fresh[below - 1]] if below else min(self._seconds()[0], expected)
            grows = below >= 2 or (below and self._in_steps)
            found.append(known + _HOPED_GROWTH * max(expected - known, 0.0) if grows else known)
        return found

    def at(self, size: float) -> float:
        """Seconds: measured, interpolated between measured neighbours, or carried on beyond the last ones."""
        return self.all_at((size,))[0]

    def all_at(self, sizes: Sequence[float]) -> list[float]:
        """As `at`, of each of these sizes, which ascend."""
        known, values, steep = self._sizes, self._seconds(), self._steep()
        found, right = [], 0
        for size in sizes:
            while right < len(known) and known[right] < size:
                right += 1
            if size in self._typical:
                seconds = self._typical[int(size)]
            elif not right:
                seconds = values[0] * size / known[0] if self._in_steps else values[0]
            elif right == len(known):
                seconds = values[-1] + steep * (size - known[-1])
            else:
                share = (size - known[right - 1]) / (known[right] - known[right - 1])
                seconds = values[right - 1] + share * (values[right] - values[right - 1])
            found.append(seconds)
        return found

    def _steep(self) -> float:
        """Growth behind the largest size, as it was from a size that is not too near to tell."""
        sizes, values = self._sizes, self._seconds()
        if len(sizes) == 1:
            return values[0] / sizes[0] if self._in_steps else _GUESSED_GROWTH * values[0]
        before = max(bisect_right(sizes, _APART * sizes[-1]) - 1, 0)
        return (values[-1] - values[before]) / (sizes[-1] - sizes[before])


@cache
def _after(follow: float, rounds: int) -> float:
    """How far so many rounds lead that each go this part of the way."""
    return float(1 - (1 - follow) ** rounds)


def within(ratio: float) -> float:
    """The ratio, but neither much larger nor much smaller than 1."""
    return min(max(ratio, 1 / _MOST), _MOST)


class ContextSlope:
    """Seconds for each committed token of a round's requests: how they move together within rounds of one size."""

    def __init__(self, seconds: float = 0.0) -> None:
        """seconds: for each token, from a profile, until rounds show their own."""
        self._first = seconds
        self._means: dict[int, tuple[float, float]] = {}
        self._both, self._own, self._apart, self._weight = 0.0, 0.0, 0.0, 0.0

    def observe(self, size: int, context: int, seconds: float, requests: int = 1) -> None:
        """A round. context: of all its requests."""
        where, took = self._means.get(size, (float(context), seconds))
        # What else the machine did in a round says nothing of its context.
        off, late = context - where, max(min(seconds - took, took * _OUTLIES), -took * _OUTLIES)
        self._means[size] = where + _MEANS_FOLLOW * off, took + _MEANS_FOLLOW * late
        self._both = _CONTEXT_STAYS * self._both + off * late
        self._own = _CONTEXT_STAYS * self._own + off * off
        self._apart = _CONTEXT_STAYS * self._apart + (off / requests) ** 2
        self._weight = _CONTEXT_STAYS * self._weight + 1

    @property
    def seconds(self) -> float:
        """For each token; not below zero."""
        sure = min(self._apart / (self._weight * _SURE**2), 1.0) if self._weight else 0.0
        own = max(self._both / self._own, 0.0) if self._own else 0.0
        return sure * own + (1 - sure) * self._first


class CostModel:
    """Seconds of a round: the target with all around it by packed rows and context, the draft by arm and depth.

    Batch sizes that are nearly equal share their measurements. The pace is common to all: a machine that slows down slows what was
    measured earlier, too.
    """

    def __init__(self) -> None:
        """Knows nothing yet."""
        self._target: dict[int, Curve] = {}
        self._draft: dict[tuple[str, int, int], Curve] = {}
        self._by_rows = Curve()
        self._slope = ContextSlope()
        self._pace = 1.0
        self._knows_plain: dict[int, bool] = {}

    def begin_with(self, target_s: Mapping[int, Mapping[int, float]], context_s: float) -> None:
        """What a profile knows. target_s: seconds by batch size and drafted nodes in all.  context_s: for a committed token."""
        self._knows_plain.clear()
        for batch, by_nodes in target_s.items():
            curve = self._target.setdefault(bucket(batch), Curve())
            for nodes, seconds in by_nodes.items():
                for each in (curve, self._by_rows):
                    each.add(batch + nodes, seconds, rounds=_KNOWN)
        self._slope = ContextSlope(context_s)

    def begin_draft_with(self, name: str, width: int, draft_s: Mapping[int, Mapping[int, float]]) -> None:
        """What a profile knows of a drafter. draft_s: seconds by batch size and depth."""
        for batch, by_depth in draft_s.items():
            self._draft[name, width, bucket(batch)] = Curve(by_depth, in_steps=True)

    def observe(self, batch: int, nodes: int, context: int, target_s: float, rounds: int = 1) -> None:
        """A finished round. nodes: drafted in all.  context: committed tokens of all requests.  target_s: all but the drafting.

        rounds: of this size that it is the median of.
        """
        rows = batch + nodes
        self._knows_plain.clear()
        self._slope.observe(rows, context, target_s, batch)
        base = self._base(context, target_s)
        curve = self._target.setdefault(bucket(batch), Curve())
        known, pace = curve.settled(rows), self._pace
        self._by_rows.add(rows, base / pace, rounds=rounds)
        if known:
            self._pace *= within(base / (known * pace)) ** _after(_PACE_FOLLOWS, rounds)
        curve.add(rows, base / pace, rounds=rounds)

    def observe_cold(self, batch: int, nodes: int, context: int, target_s: float) -> None:
        """A finished round whose size runs faster later on."""
        for curve in (self._target.get(bucket(batch)), self._by_rows):
            if curve is not None:
                curve.bound(batch + nodes, self._base(context, target_s) / self._pace)

    def _base(self, context: int, target_s: float) -> float:
        """What a round took without what its context takes."""
        return max(target_s - self._slope.seconds * context, _BASE * target_s)

    def observe_draft(
        self, name: str, width: int, batch: int, depth: int, draft_s: float, *, at_most: bool = False, rounds: int = 1
    ) -> None:
        """A finished draft of this depth. at_most: it had more to do than draft, so it counts only where it was still faster.

        rounds: of this depth that it is the median of.
        """
        curve, seconds = self._draft.setdefault((name, width, bucket(batch)), Curve(in_steps=True)), draft_s / self._pace
        if not at_most or not curve or seconds < curve.at(depth):
            curve.add(depth, seconds, _PACE_FOLLOWS, rounds)

    @property
    def any_known(self) -> bool:
        """Whether any round was measured, so that there is something to estimate plain decoding from."""
        return bool(self._target)

    def lends(self, batch: int) -> bool:
        """Whether plain rounds of another batch size were measured, so that those of this one can be estimated."""
        return any(self.knows_plain(other) for other in self._target if other != bucket(batch))

    def measured(self, batch: int, nodes: float) -> bool:
        """Whether rounds of about this size were measured often enough."""
        curve, rows = self._curve_of(batch), batch + nodes
        return curve.knows(rows) or (curve is self._by_rows and rows <= curve.largest)

    def settled(self, batch: int, nodes: int) -> bool:
        """Whether rounds of this very size were measured so often that one more says little."""
        curve = self._target.get(bucket(batch))
        return curve is not None and curve.settled(batch + nodes) is not None

    def plain(self, batch: int, context: int) -> float:
        """Seconds of a round without a draft."""
        return self._pace * self._curve_of(batch).at(batch) + self._slope.seconds * context

    def alone(self, batch: int, context: int) -> float:
        """Share of a plain round's time that grows with its requests: their rows, and what each reads of its context."""
        if batch == 1 or not self.any_known:
            return 1.0
        curve, read = self._curve_of(batch), self._slope.seconds * context
        rows = self._pace * max(curve.at(2 * batch) - curve.at(batch), 0.0)
        return min((rows + read) / self.plain(batch, context), 1.0)

    def target(self, batch: int, most: int, context: int, *, share: float = 1.0, hoped: bool = False) -> list[float]:
        """Seconds of rounds with 0, 1, ..., most nodes asked for, the drafting left out.

        share: of what is asked for that is drafted.  hoped: the least that they can take, see `Curve.hoped`.
        """
        curve, pace, always = self._curve_of(batch), self._pace, self._slope.seconds * context
        sizes = [batch + share * nodes for nodes in range(most + 1)]
        if hoped:
            return [pace * own + always for own in curve.all_hoped(sizes)]
        expected = curve.all_at(sizes)
        if share == 1.0:
            expected = [own if curve.came(size) else own * (1 + _NEW) for own, size in zip(expected, sizes, strict=True)]
        return [pace * own + always for own in expected]

    def draft(self, name: str, width: int, batch: int, depth: int) -> float:
        """Seconds of a draft of this depth."""
        return self.drafts(name, width, batch, depth)[-1]

    def drafts(self, name: str, width: int, batch: int, deepest: int, *, hoped: bool = False) -> list[float]:
        """Seconds of drafts of depth 1, 2, ..., deepest; a drafter of which little was measured is hoped to be free."""
        curve, depths = self._curve(name, width, batch), range(1, deepest + 1)
        if curve is None or (hoped and not curve.largest):
            return [0.0] * deepest
        return [self._pace * own for own in (curve.all_hoped(depths) if hoped else curve.all_at(depths))]

    def deepest(self, name: str, width: int, batch: int) -> int:
        """The deepest draft that was measured."""
        curve = self._curve(name, width, batch)
        return 0 if curve is None else curve.largest

    def _curve_of(self, batch: int) -> Curve:
        """Of this batch size; until its plain rounds are measured, of all batch sizes together, which packed rows nearly decide."""
        return self._target[bucket(batch)] if self.knows_plain(batch) else self._by_rows

    def knows_plain(self, batch: int) -> bool:
        """Whether plain rounds of this very batch size were measured, and lately."""
        known = self._knows_plain.get(batch)
        if known is None:
            own = self._target.get(bucket(batch))
            known = self._knows_plain[batch] = own is not None and own.knows(batch)
        return known

    def _curve(self, name: str, width: int, batch: int) -> Curve | None:
        own = [known for arm, across, known in self._draft if arm == name and across == width]
        if not own:
            return None
        return self._draft[name, width, min(own, key=lambda known: abs(known - batch))]


@cache
def bucket(batch: int) -> int:
    """The batch sizes that share measurements with this one, by the largest of them."""
    place = bisect_left(_BATCHES, batch)
    return _BATCHES[place] if place < len(_BATCHES) else -(-batch // 128) * 128
