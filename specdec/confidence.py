"""When a chain should end: how likely the next token is accepted, seen from the draft's own law before it is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from specdec.errors import SpecDecError
from specdec.planner import FixedPlanner, Planner
from specdec.types import Budget, Draft, Load, RoundStats

# Weights before anything was seen: of 1, the logit of q's largest probability, the entropy bound, log(1 + depth), and how far the
# request's moving average lies from the first guess. A sure draft starts at 0.97, an even choice of two at 0.6, a flat one at 0.2.
_WEIGHTS = (-0.3, 0.5, 1.5, 0.0, 0.5)
# Their variances at first, and the share of it by which a weight may wander from one observation to the next.
_VARIANCES, _DRIFT = (1.0, 0.25, 1.0, 0.25, 0.25), 4e-5
# Of a request's accepted share: the first guess, and what the average keeps of itself at each observation.
_FIRST_GUESS, _KEEP = 0.7, 0.9
# Probabilities nearer to 0 and 1 than this are taken as this.
_EDGE = 1e-4
# What averages of times keep from round to round; a round counts as at most so many times as long as the average one.
_KEEP_TIMES, _LONGEST = 0.97, 3.0
# Observations that the first guess of a slope counts for.
_RIDGE = 0.05
# Rounds without a draft after which one token is drafted whatever is expected of it.
_TRY_AGAIN = 32


def entropy_bound(entropy: float, scale: float = 0.2) -> float:
    """An estimate from below of the probability that a token drawn from a law of this entropy (in nats) is accepted.

    1 - sqrt(KL / 2) bounds it (Pinsker), and scale * entropy stands in for the unknown half of the divergence from the target
    (AdaEDL, arXiv 2410.18351): so it is a bound only as far as that guess holds. Never below 0.
    """
    return max(0.0, 1.0 - math.sqrt(scale * max(entropy, 0.0)))


class Calibrator:
    """The probability that a token is accepted, given that all before it were: known before it is drawn.

    An online logistic regression, the smallest form of DISCO's classifier (arXiv 2405.04304), kept as a mean and a covariance
    of five weights that may wander, so that what was seen long ago counts for less. It learns from finished rounds only: its
    answers within a round depend on no token that they are about. One instance serves one drafter.
    """

    def __init__(self) -> None:
        """Knows nothing but the first guess."""
        # A tuple: it is asked for single slots many times a round, and five products are sooner done than an array is made.
        self._weights: tuple[float, ...] = _WEIGHTS
        self._limit: NDArray[np.float64] = np.array(_VARIANCES)
        self._covariance: NDArray[np.float64] = np.diag(self._limit)
        # A view of it: it follows what is done to the covariance in place, and may be written.
        self._variances: NDArray[np.float64] = np.einsum("ii->i", self._covariance)
        self._drift = _DRIFT * self._limit
        self._averages: dict[int, float] = {}

    def probability(self, request: int, depth: int, confidence: float, entropy: float) -> float:
        """confidence, entropy: largest probability and entropy of the law that is drawn from. 0 where they are no numbers."""
        if not (math.isfinite(confidence) and math.isfinite(entropy)):
            return 0.0
        return self._expected(self._features(request, depth, confidence, entropy))

    def observe(self, request: int, slots: Sequence[Sequence[float]], accepted: int) -> None:
        """A chain's round. slots: (confidence, entropy, ...) of its drafted tokens; behind the first refusal nothing is learned."""
        reached = [(depth, slot[0], slot[1]) for depth, slot in enumerate(slots[: accepted + 1])]
        for depth, confidence, entropy in reached:
            if math.isfinite(confidence) and math.isfinite(entropy):
                self._learn(self._features(request, depth, confidence, entropy), float(depth < accepted))
        for depth, _, _ in reached:
            self._averages[request] = _KEEP * self.average(request) + (1 - _KEEP) * (depth < accepted)

    def average(self, request: int) -> float:
        """The accepted share of the request's tokens of late, of those whose forerunners were accepted."""
        return self._averages.get(request, _FIRST_GUESS)

    def forget(self, request: int) -> None:
        """The slot holds another text now."""
        self._averages.pop(request, None)

    def _features(self, request: int, depth: int, confidence: float, entropy: float) -> tuple[float, ...]:
        average = _logit(self.average(request)) - _logit(_FIRST_GUESS)
        return 1.0, _logit(confidence), entropy_bound(entropy), math.log1p(depth), average

    def _expected(self, features: tuple[float, ...]) -> float:
        return _sigmoid(sum([weight * value for weight, value in zip(self._weights, features, strict=True)]))

    def _learn(self, features: tuple[float, ...], outcome: float) -> None:
        """One step of an extended Kalman filter: Newton's step with the curvature seen so far."""
        expected, x = self._expected(features), np.array(features)
        spread = self._covariance @ x
        curvature = max(expected * (1 - expected), _EDGE)
        gain = spread / (1.0 + curvature * float(x @ spread))
        self._weights = tuple((np.array(self._weights) + gain * (outcome - expected)).tolist())
        self._covariance -= (curvature * gain)[:, None] * spread
        self._variances += np.minimum(self._drift, np.maximum(self._limit - self._variances, 0.0))


def _sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-min(max(value, -30.0), 30.0)))


def _logit(probability: float) -> float:
    inside = min(max(probability, _EDGE), 1 - _EDGE)
    return math.log(inside / (1 - inside))


class _Slope:
    """Seconds that one more of something takes: a faded straight line through what rounds took, never falling."""

    def __init__(self) -> None:
        self._sums: NDArray[np.float64] = np.zeros(5)

    def observe(self, count: float, seconds: float) -> None:
        """A round with so many of it."""
        if self._sums[0]:
            seconds = min(seconds, _LONGEST * self._sums[2] / self._sums[0])
        self._sums = _KEEP_TIMES * self._sums + np.array((1.0, count, seconds, count * count, count * seconds))

    def each(self, *, share: float) -> float:
        """Where counts never differed: this share of what one took on average."""
        weight, count, seconds, squares, products = self._sums.tolist()
        if not weight or not count:
            return 0.0
        x, y = count / weight, seconds / weight
        guess = share * y / x
        along = weight * max(squares / weight - x * x, 0.0)
        return float(max((weight * (products / weight - x * y) + _RIDGE * guess) / (along + _RIDGE), 0.0))


class _Times:
    """What rounds of one batch size took, and how many tokens came of them."""

    def __init__(self) -> None:
        self.step, self.row = _Slope(), _Slope()
        self.tokens = self.seconds = 0.0

    def observe(self, stats: RoundStats, steps: int) -> None:
        """steps: of the drafter, in this round."""
        self.step.observe(steps, stats.draft_s)
        self.row.observe(stats.num_rows, stats.undrafted_s)
        self.tokens = _KEEP_TIMES * self.tokens + len(stats.requests) + sum(stats.accepted)
        self.seconds = _KEEP_TIMES * self.seconds + stats.seconds


@dataclass(frozen=True, slots=True)
class _Price:
    """Expected tokens that one more draft step of all requests, and one more row, have to bring in to be worth their time."""

    step: float
    row: float


class _StopRule:
    """`Budget.stop` of one round: each request goes on while its next token is expected to be worth its row, and all of them
    while what they gain above that is worth the draft step behind it. The step that was run already costs nothing more.
    """

    def __init__(self, calibrator: Calibrator, budget: Budget, price: _Price, *, first_free: bool) -> None:
        """first_free: the first place is drafted whatever is expected of it."""
        self._calibrator, self._price, self._first_free = calibrator, price, first_free
        self._requests, self._counts = budget.requests, list(map(min, budget.nodes, budget.depth))
        self._reached = [1.0] * len(budget.requests)

    def __call__(self, depth: int, confidence: Sequence[float], entropy: Sequence[float]) -> list[bool]:
        """Whether each request stops before its draw at this depth; see `specdec.types.Stop`."""
        known = zip(self._requests, confidence, entropy, strict=True)
        rates = [self._calibrator.probability(request, depth, sure, spread) for request, sure, spread in known]
        self._reached = [reached * rate for reached, rate in zip(self._reached, rates, strict=True)]
        if depth == 0 and self._first_free:
            return [False] * len(rates)
        going = [gain >= self._price.row and depth < count for gain, count in zip(self._reached, self._counts, strict=True)]
        self._counts = [count if goes else 0 for count, goes in zip(self._counts, going, strict=True)]
        if self._worth(depth) < 0:
            self._counts = [0] * len(going)
        return [count == 0 for count in self._counts]

    def _worth(self, depth: int) -> float:
        """Expected tokens above their price, of this place and of those likely to follow; behind the last one no step is run."""
        rates = [self._calibrator.average(request) for request in self._requests]
        worth = 0.0
        for place in range(max(self._counts) - 1, depth - 1, -1):
            gains = [reached * rate ** (place - depth) for reached, rate in zip(self._reached, rates, strict=True)]
            here = sum([max(gain - self._price.row, 0.0) for gain, n in zip(gains, self._counts, strict=True) if place < n])
            step = self._price.step if place + 1 < max(self._counts) else 0.0
            worth = here - step + max(worth, 0.0)
        return worth


class ConfidencePlanner:
    """Another planner's budget, ended early where the next token is not expected to pay for its time.

    A chain goes on while the probability of reaching the next place times that of its acceptance is at least (seconds of one
    more draft step and row) times goodput: Dinkelbach's rule for the largest tokens over seconds. The rule sees the law of a draw
    and never the drawn token, so every lossless rule stays lossless. Asking costs a read per draft step. Trees are not ended.
    It is no guard: a round that drafts nothing has still run the drafter once; wrap a `GoodputPlanner` for that.
    What it has learned stays with the instance from call to call; times are kept by batch size.
    """

    def __init__(
        self, inner: Planner | None = None, *, step_s: float | None = None, row_s: float | None = None, goodput: float | None = None
    ) -> None:
        """inner: whose budget is the most, eight tokens by default.  step_s, row_s: seconds.  goodput: tokens a second, of all
        requests. What is not given is measured.
        """
        inner = FixedPlanner(nodes=8, depth=8) if inner is None else inner
        if inner.post_draw:
            raise SpecDecError(
                f"ConfidencePlanner cannot wrap {type(inner).__name__}, which drops drawn tokens; give one with post_draw=False"
            )
        for name, value in (("step_s", step_s), ("row_s", row_s), ("goodput", goodput)):
            if value is not None and not 0 <= value < math.inf:
                raise SpecDecError(f"ConfidencePlanner {name}={value!r}: give a number, at least 0, or None to measure it")
        self.post_draw = False
        self.calibrator = Calibrator()
        self._inner, self._given = inner, (step_s, row_s, goodput)
        self._times: dict[int, _Times] = {}
        self._lengths: dict[int, int] = {}
        self._most = self._idle = 0

    def plan(self, load: Load) -> Budget:
        """The inner planner's budget with a rule that ends it."""
        for request, length in zip(load.requests, load.lengths, strict=True):
            if length < self._lengths.get(request, 0):
                self.calibrator.forget(request)
            self._lengths[request] = length
        budget = self._inner.plan(load)
        self._most = max(map(min, budget.nodes, budget.depth))
        rule = _StopRule(self.calibrator, budget, self._price(len(load.requests)), first_free=self._idle >= _TRY_AGAIN)
        return replace(budget, stop=rule, slots=True)

    def select(self, draft: Draft) -> Draft:
        """The draft as it came."""
        return self._inner.select(draft)

    def observe(self, stats: RoundStats) -> None:
        """Learn from a finished round; so does the inner planner."""
        self._inner.observe(stats)
        longest = max(stats.drafted)
        self._idle = 0 if longest or not self._most else self._idle + 1
        if not self._most:
            return
        # The step that showed the place at which all stopped was run too.
        self._times.setdefault(len(stats.requests), _Times()).observe(stats, min(longest + 1, self._most))
        if stats.slots is not None and stats.parents is None:
            for request, slots, accepted in zip(stats.requests, stats.slots, stats.accepted, strict=True):
                self.calibrator.observe(request, slots, accepted)

    def _price(self, batch: int) -> _Price:
        """Nothing costs anything until a round of this batch size was seen."""
        step_s, row_s, goodput = self._given
        times = self._times.get(batch)
        if times is not None:
            step_s = times.step.each(share=1.0) if step_s is None else step_s
            # A row is often free: without a difference to see it in, it is taken so.
            row_s = times.row.each(share=0.0) if row_s is None else row_s
            goodput = times.tokens / times.seconds if goodput is None else goodput
        return _Price((step_s or 0.0) * (goodput or 0.0), (row_s or 0.0) * (goodput or 0.0))
