"""The goodput planner: as much speculation as pays, measured on the machine that runs it, and none where it does not pay."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from specdec.acceptance import AcceptanceModel
from specdec.allocation import allocate, chain_scores
from specdec.costs import CostModel
from specdec.errors import SpecDecError
from specdec.types import Budget, Draft, Load, RoundStats

# Plain rounds at the start of a batch size, and one among so many later: what speculation is compared with has to be measured.
_FIRST_PLAIN, _PLAIN_EVERY = 3, 64
# Rounds that a plan stays once so many times as many have been seen, unless the requests change.
_PLAN_STAYS, _SETTLES = 8, 8
# A plan replaces another when it is better by this share.
_HYSTERESIS = 0.02
# Rounds that speculation is judged by, and that it is tried for when it was off; deviations that pass for bad luck.
_WINDOW, _TRIED, _LUCK = 32, 4, 1.5
# Rounds until it is tried again: at first; doubled each time up to where trials cost this share of the time.
_FIRST_WAIT, _LONGEST_WAIT, _TRIALS_COST = 8, 512, 0.02


@dataclass(slots=True)
class Guard:
    """Whether speculation has been paying, for one batch size; what it knows are finished rounds."""

    on: bool = True
    wait: int = _FIRST_WAIT
    left: int = 0
    longest: int = _LONGEST_WAIT // 8
    window: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    def speculates(self) -> bool:
        """Whether the next round may speculate."""
        return self.on or self.left <= 0

    def observe(self, speculated: bool, tokens: int, seconds: float, plain_s: float, batch: int) -> None:
        """A round is over. plain_s: what a plain round of this batch takes."""
        if not speculated:
            self.left -= not self.on
            return
        self.window.append((tokens, seconds))
        if len(self.window) < (_WINDOW // 4 if self.on else _TRIED):
            return
        rounds, total = len(self.window), sum([count for count, _ in self.window])
        typical = sorted([own for _, own in self.window])[rounds // 2]
        # What else the machine did in a round says nothing of speculation.
        spent = sum([min(own, 2 * typical) for _, own in self.window])
        # Luck is no reason to stop: what a lucky window of the same rounds could have given has to be too little as well.
        spread = sum([(count - total / rounds) ** 2 for count, _ in self.window])
        luck = _LUCK * spread**0.5 if self.on else 0.0
        if (total + luck) / spent >= batch / plain_s:
            self.on, self.wait = True, _FIRST_WAIT
            return
        self.longest = _longest_wait(typical, plain_s)
        self.pause()

    def pause(self) -> None:
        """No speculation for some rounds, twice as many as last time if it has not paid since."""
        self.wait = _FIRST_WAIT if self.on else min(2 * self.wait, self.longest)
        self.on, self.left = False, self.wait
        self.window.clear()


def _longest_wait(tried_s: float, plain_s: float) -> int:
    """Plain rounds between trials, so that what trials cost stays a small share."""
    extra = max(tried_s / plain_s - 1, 0.0) * _TRIED
    return int(min(max(extra / _TRIALS_COST, _FIRST_WAIT), _LONGEST_WAIT))


@dataclass(frozen=True, slots=True)
class _Plan:
    """nodes: by request, in order.  depth: of the deepest.  goodput: expected."""

    requests: tuple[int, ...]
    nodes: tuple[int, ...]
    depth: int
    goodput: float


class GoodputPlanner:
    """Chooses, each few rounds, the nodes of every request that maximise expected tokens over expected seconds (SmartSpec, arXiv
    2406.14066), from rates by depth and request and from times by size, both measured as it goes. Chains only.

    It looks at finished rounds and lengths and never at a drawn token, so every lossless rule stays lossless. Text does not
    depend on it. One instance keeps what it has learned from call to call.
    """

    def __init__(self, most: int = 8) -> None:
        """most: drafted tokens of a request, at most."""
        if not isinstance(most, int) or most < 1:
            raise SpecDecError(f"GoodputPlanner most={most!r}: give a whole number, at least 1")
        self.post_draw = False
        self._most = most
        self._rates, self._costs = AcceptanceModel(), CostModel()
        self._guards: dict[int, Guard] = {}
        self._lengths: dict[int, int] = {}
        self._plan: _Plan | None = None
        self._rounds: dict[int, int] = {}
        self._planned, self._stays = 0, 0

    def plan(self, load: Load) -> Budget:
        """The budget of the next round, from what is known before it."""
        batch = len(load.requests)
        self._notice_new_texts(load)
        if self._is_plain(batch):
            self._planned = 0
            return self._budget(load, (0,) * batch)
        if self._plan is None or self._plan.requests != load.requests or self._stays <= 0:
            self._stays = min(1 + self._rounds[batch] // _SETTLES, _PLAN_STAYS)
            self._plan = self._choose(load)
        self._stays -= 1
        self._planned = sum(self._plan.nodes)
        if not self._planned:
            self._guard(batch).pause()
        return self._budget(load, self._plan.nodes)

    def select(self, draft: Draft) -> Draft:
        """The draft as it came."""
        return draft

    def observe(self, stats: RoundStats) -> None:
        """Learn rates and times from a finished round, and whether speculation paid."""
        batch, nodes = len(stats.requests), sum(stats.drafted)
        target_s = stats.target_s + stats.verify_s + stats.other_s
        self._rates.observe(stats.requests, stats.drafted, stats.accepted)
        self._costs.observe(batch, nodes, max(stats.depth), stats.draft_s, target_s)
        self._rounds[batch] = self._rounds.get(batch, 0) + 1
        if self._costs.knows(batch):
            plain_s = self._costs.plain(batch)
            tokens = batch + sum(stats.accepted)
            self._guard(batch).observe(self._planned > 0, tokens, stats.draft_s + target_s, plain_s, batch)

    def _notice_new_texts(self, load: Load) -> None:
        for request, length in zip(load.requests, load.lengths, strict=True):
            if length < self._lengths.get(request, 0):
                self._rates.forget(request)
            self._lengths[request] = length

    def _guard(self, batch: int) -> Guard:
        return self._guards.setdefault(batch, Guard())

    def _is_plain(self, batch: int) -> bool:
        rounds = self._rounds.get(batch, 0)
        return rounds < _FIRST_PLAIN or rounds % _PLAIN_EVERY == 0 or not self._guard(batch).speculates()

    def _choose(self, load: Load) -> _Plan:
        """The best plan, or an unmeasured one that could be better yet; the old one where it is nearly as good."""
        batch, old = len(load.requests), self._plan
        # At most twice as deep as what is measured: a guess is not trusted further.
        deepest = min(2 * self._costs.deepest(batch) + 1, self._most)
        rates = [
            self._rates.rates(request, max(0, min(deepest, own - 1))) for request, own in zip(load.requests, load.room, strict=True)
        ]
        scores = [chain_scores(own) for own in rates]
        plans = self._by_depth(load, scores, deepest, hoped=False)
        best = max(plans, key=lambda plan: plan.goodput)
        hope = max(self._by_depth(load, scores, deepest, hoped=True), key=lambda plan: plan.goodput)
        if hope.goodput > best.goodput * (1 + _HYSTERESIS) and not self._costs.measured(batch, sum(hope.nodes)):
            self._stays = 1
            return hope
        if old is not None and old.requests == load.requests:
            again = next((plan for plan in plans if plan.nodes == old.nodes), None)
            if again is not None and again.goodput * (1 + _HYSTERESIS) > best.goodput:
                return again
        return best

    def _by_depth(self, load: Load, scores: list[list[float]], deepest: int, *, hoped: bool) -> list[_Plan]:
        """The best plan for every limit of depth. hoped: an unmeasured size takes no longer than the largest measured below it."""
        depths = range(1, deepest + 1)
        seconds = self._costs.seconds(len(scores), sum(map(len, scores)), depths, hoped=hoped)
        found = [allocate([row[:depth] for row in scores], own) for depth, own in zip(depths, seconds, strict=True)]
        return [_Plan(load.requests, each.nodes, max(each.nodes), each.goodput) for each in found]

    def _budget(self, load: Load, nodes: tuple[int, ...]) -> Budget:
        fitting = tuple([max(0, min(count, room - 1)) for count, room in zip(nodes, load.room, strict=True)])
        return Budget(load.requests, fitting, tuple([max(count, 1) for count in fitting]), (1,) * len(fitting))
