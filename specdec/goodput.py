"""The goodput planner: as much speculation as pays, measured on the machine that runs it, and none where it does not pay."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import ge
from statistics import median
from typing import Literal

from torch import nn

from specdec.acceptance import AcceptanceModel
from specdec.arms import Arm, Limits, Look, Plan
from specdec.costs import CostModel, Drift, bucket
from specdec.drafters.base import Drafter
from specdec.errors import SpecDecError
from specdec.guard import Guard, Judged
from specdec.hopes import Hopes
from specdec.profile import Profile, check_fits, default_path, read_profile
from specdec.stragglers import Stragglers
from specdec.types import Budget, Draft, DrafterTraits, Forecast, Load, RoundStats

logger = logging.getLogger(__name__)
# One round among so many is plain: what speculation is compared with has to be measured.
_PLAIN_EVERY = 96
# Rounds from which on plain ones have to be measured; and one among so many of a new batch size is plain until they are, while it
# goes by what others took.
_FIRST, _BORROWS = 8, 4
# Rounds that a plan stays once so many times as many went by since something changed, in batches fewer times, of whose rounds each
# says more; how many of those a new text leaves.
_PLAN_STAYS, _SETTLES, _NEW_TEXT = 16, 4, 32
# Rounds that are learned from together, at most; and those that are learned from at once.
_TOGETHER, _TRIES = 8, frozenset({"first", "hope", "trial"})
# Observations of its deepest level without which a plan stays for one round only, in so many first rounds.
_SEEN, _EARLY = 3.0, 32
# A plan replaces another when it is better by this share.
_HYSTERESIS = 0.02
# Drafting stops when it is expected to be slower than plain decoding by as much, for one request: a rate that has just fallen is
# luck as often as not, of a single request most of all, and to stop costs what drafting gains until the next trial.
_BAD_LUCK = 0.05
# What an unmeasured plan has to promise over the best that is known.
_PROMISING = 1.1
# Rounds that a drafter is tried for.
_TRIED = 2
# In a trial one request of so many drafts, in batches of that many or more.
_TRIAL_SHARE = 4
# Rounds without a draft after which the next draft has to catch up, and says only what drafts take at most.
_CATCHES_UP = 4
_ONLY = (DrafterTraits("", "chain"),)


@dataclass(slots=True)
class _Asked:
    """What was asked for in a round."""

    why: str
    plan: Plan
    nodes: tuple[int, ...]
    context: int


@dataclass(frozen=True, slots=True)
class _Said:
    """The budget last given, which serves again while the plan stays and all requests have room for more than its `deepest`."""

    plan: Plan
    why: str
    budget: Budget
    deepest: int


class GoodputPlanner:
    """Chooses, each few rounds, the drafter, shape and nodes of every request that maximise expected tokens over expected seconds
    (SmartSpec, arXiv 2406.14066), from rates by depth, rank and request and from times by size, both measured as it goes.

    It looks at finished rounds and lengths and never at a drawn token, so every lossless rule stays lossless. Text does not
    depend on it. One instance keeps what it has learned from call to call.
    """

    def __init__(
        self,
        most: int = 8,
        *,
        most_nodes: int = 32,
        width: int = 4,
        per: Literal["request", "batch"] = "request",
        profile: Profile | None = None,
    ) -> None:
        """most: depth of a draft, at most.  most_nodes: of a request's tree.  width: of drafters that draw trees.

        per: "batch" gives every request the same number of nodes.  profile: what `specdec tune` measured, to begin with.
        """
        for name, value in (("most", most), ("most_nodes", most_nodes), ("width", width)):
            if not isinstance(value, int) or value < 1:
                raise SpecDecError(f"GoodputPlanner {name}={value!r}: give a whole number, at least 1")
        if per not in ("request", "batch"):
            raise SpecDecError(f"GoodputPlanner per={per!r}: give 'request' or 'batch'")
        self.post_draw = False
        self._limits, self._width, self._profile = Limits(most, most_nodes, evenly=per == "batch"), width, profile
        self._costs, self._drift, self._stragglers = CostModel(), Drift(), Stragglers()
        self._arms: list[Arm] = []
        self._traits: tuple[DrafterTraits, ...] = ()
        self._guards: dict[int, Guard] = {}
        self._rounds: dict[int, int] = {}
        self._lengths: dict[int, int] = {}
        self._plan: Plan | None = None
        self._rest: Plan | None = None
        self._said: _Said | None = None
        self._finished: list[tuple[_Asked, RoundStats]] = []
        self._asked: _Asked | None = None
        self._stays, self._steady, self._undrafted = 0, 0, 0
        self._begun: Plan | None = None
        self._seen: Load | None = None
        self._hopes, self._is_hope = Hopes(), False

    def bind(self, target: nn.Module, drafter: Drafter) -> None:
        """Make sure that the profile is of this pair; without one, read what `specdec tune` wrote for it here, if anything.

        Of a profile from another machine only the acceptance is used, and a warning says so. Raises SpecDecError for one of
        other models, and for a file that cannot be read.
        """
        if self._traits or hasattr(drafter, "traits"):
            return
        if self._profile is None:
            path = default_path(target, drafter)
            self._profile = read_profile(path) if path.is_file() else None
            return
        other = check_fits(self._profile, target, drafter)
        if other:
            logger.warning("%s", other)
            self._profile = replace(self._profile, target_s={}, target_rounds={}, draft_s={}, draft_rounds={})

    def plan(self, load: Load) -> Budget:
        """The budget of the next round, from what is known before it."""
        self._notice(load)
        why, plan = self._next(load)
        said = self._said
        if said is None or said.plan is not plan or said.why != why or min(load.room) <= said.deepest:
            said = self._said = _Said(plan, why, self._budget(load, why, plan), max(plan.depth) + 1)
        self._asked = _Asked(why, plan, said.budget.nodes, sum(load.lengths))
        return said.budget

    def _budget(self, load: Load, why: str, plan: Plan) -> Budget:
        """What the plan asks for, where there is room for it."""
        nodes = tuple([max(0, min(count, room - 1)) for count, room in zip(plan.nodes, load.room, strict=True)])
        depth = tuple([max(min(own, room - 1), 1) for own, room in zip(plan.depth, load.room, strict=True)])
        return Budget(
            load.requests,
            nodes,
            depth,
            (plan.width,) * len(nodes),
            drafter=self._arms[plan.arm].name or None,
            forecast=Forecast(why, plan.tokens, plan.seconds * self._drift.factor),
        )

    def select(self, draft: Draft) -> Draft:
        """The draft as it came."""
        return draft

    def observe(self, stats: RoundStats) -> None:
        """Note a finished round. Several are learned from together, which takes less time, unless one is a try."""
        asked = self._asked
        assert asked is not None
        where = bucket(len(stats.requests))
        self._rounds[where] = self._rounds.get(where, 0) + 1
        if not any(asked.nodes):
            self._guard(len(stats.requests)).observe_plain()
        self._finished.append((asked, stats))
        if asked.why in _TRIES or len(self._finished) >= _TOGETHER:
            self._learn()

    def _learn(self) -> None:
        """Take in the finished rounds, in order."""
        finished, self._finished, self._rest = self._finished, [], None
        for asked, stats in finished:
            self._hopes.total_s += stats.seconds
            if asked.plan.seconds < float("inf"):
                self._drift.observe(asked.plan.seconds, stats.seconds)
        for _, alike in groupby(finished, self._says):
            rounds = list(alike)
            self._learn_times([stats for _, stats in rounds], *rounds[len(rounds) // 2])
            for asked, stats in rounds if any(rounds[0][0].nodes) else rounds[-1:]:
                self._stragglers.observe(bucket(len(stats.requests)), stats.requests, stats.accepted)
                if any(asked.nodes):
                    self._learn_draft(asked, stats)

    def _says(self, finished: tuple[_Asked, RoundStats]) -> tuple[int, bool, int, int]:
        """Rounds in a row with this equal say the same: of one plan, as much drafted, of a well-known size, not cold."""
        asked, stats = finished
        drafted = sum(stats.drafted)
        alone = stats.cold_draft or stats.cold_target or not self._costs.settled(len(stats.requests), drafted)
        return id(asked.plan), any(asked.nodes), drafted, id(stats) if alone else 0

    def _learn_times(self, rounds: Sequence[RoundStats], asked: _Asked, stats: RoundStats) -> None:
        """What rounds that say the same took, by their medians; of a size that was cold that is no more than a bound.

        asked, stats: of the one in the middle.
        """
        batch, drafted, count = len(stats.requests), sum(stats.drafted), len(rounds)
        target_s = median([own.undrafted_s for own in rounds])
        if stats.cold_target:
            self._costs.observe_cold(batch, drafted, asked.context, target_s)
        else:
            self._costs.observe(batch, drafted, asked.context, target_s, rounds=count)
        if drafted and not stats.cold_draft:
            arm, depth = self._arms[asked.plan.arm], max(map(min, asked.nodes, asked.plan.depth))
            draft_s = median([own.draft_s for own in rounds])
            late = self._undrafted >= _CATCHES_UP
            self._costs.observe_draft(arm.name, arm.width, batch, depth, draft_s, at_most=late, rounds=count)
        self._undrafted = 0 if any(asked.nodes) else self._undrafted + count

    def _learn_draft(self, asked: _Asked, stats: RoundStats) -> None:
        """What was accepted in a round that drafted, and what it gained."""
        arm = self._arms[asked.plan.arm]
        arm.observe(stats, tuple(map(min, asked.nodes, asked.plan.depth)))
        for other in self._arms:
            other.idle = 0 if other is arm else other.idle + 1
        self._learn_gain(asked, stats)

    def _learn_gain(self, asked: _Asked, stats: RoundStats) -> None:
        """What a round that drafted gained over plain decoding."""
        batch = len(stats.requests)
        cold = stats.cold_target or stats.cold_draft
        round_ = Judged(batch, sum(stats.drafted), sum(stats.accepted), stats.seconds, cold, asked.plan.worth)
        plain_s, guard = self._costs.plain(batch, asked.context), self._guard(batch)
        worth_s = round_.tokens * plain_s / batch
        self._hopes.observe(worth_s, round_.seconds, plain_s, hoped=asked.why == "hope", cold=cold)
        if guard.observe(round_, plain_s):
            self._arms[asked.plan.arm].rates.doubt()
            self._stays = self._steady = 0

    def _notice(self, load: Load) -> None:
        """Take in which drafters there are, and forget what was known of texts that have ended."""
        traits = load.drafters or _ONLY
        if traits != self._traits:
            self._begin(traits)
        seen, self._seen = self._seen, load
        if seen is not None:
            if load.requests == seen.requests and all(map(ge, load.lengths, seen.lengths)):
                return
            self._lengths.update(zip(seen.requests, seen.lengths, strict=True))
        lengths = dict(zip(load.requests, load.lengths, strict=True))
        ended = [request for request, length in lengths.items() if length < self._lengths.get(request, length + 1)]
        if ended:
            self._learn()
            self._stragglers.end()
            for arm in self._arms:
                for request in ended:
                    arm.rates.forget(request)
            for guard in self._guards.values():
                guard.new_text()
            self._stays, self._steady = 0, min(self._steady, _NEW_TEXT)

    def _begin(self, traits: tuple[DrafterTraits, ...]) -> None:
        """Know these drafters, and no plan of others."""
        self._learn()
        self._traits, self._plan, self._said, self._stays, self._steady = traits, None, None, 0, 0
        profile = self._profile
        only = profile if len(traits) == 1 else None
        self._arms = []
        for drafter in traits:
            rates = AcceptanceModel(only.expected if only else ())
            for width in (1,) if drafter.shape == "chain" else sorted({1, min(2, self._width), self._width}):
                self._arms.append(Arm(len(self._arms), drafter.name, width, rates))
                if only is not None:
                    self._costs.begin_draft_with(drafter.name, width, only.draft_s)
        if profile is not None:
            self._costs.begin_with(profile.target_s, profile.context)
            self._profile = None

    def _guard(self, batch: int) -> Guard:
        where = bucket(batch)
        found = self._guards.get(where)
        if found is None:
            found = self._guards[where] = Guard()
        return found

    def _next(self, load: Load) -> tuple[str, Plan]:
        """Why, and what."""
        batch = len(load.requests)
        rounds, guard = self._rounds.get(bucket(batch), 0), self._guard(batch)
        if not self._costs.knows_plain(batch) and self._has_to_know(batch, rounds):
            return "first", self._plain(load)
        if guard.trying:
            # The same requests throughout a trial: those that did not draft lately have to be read first.
            share = _TRIAL_SHARE if batch >= _TRIAL_SHARE else 1
            return "trial", self._arms[self._liveliest()].least(load, self._costs, share, guard.waits)
        if not guard.on or rounds % _PLAIN_EVERY == 0:
            return "plain", self._plain(load)
        return self._settled(load)

    def _has_to_know(self, batch: int, rounds: int) -> bool:
        """Whether a batch size whose plain rounds are not measured has one now, or goes by what others took."""
        if self._costs.lends(batch):
            return rounds % _BORROWS == _BORROWS - 1
        return rounds >= _FIRST or not self._costs.any_known

    def _plain(self, load: Load) -> Plan:
        """Plain decoding; the same plan until something is learned."""
        if self._rest is None or self._rest.requests != load.requests:
            nothing, batch, context = (0,) * len(load.requests), len(load.requests), sum(load.lengths)
            seconds = self._costs.plain(batch, context) if self._costs.any_known else float("inf")
            self._rest = Plan(0, load.requests, nothing, nothing, 1, 0, batch, seconds)
        return self._rest

    def _settled(self, load: Load) -> tuple[str, Plan]:
        """The plan that stays for some rounds; a new one when its time is over or the requests are others."""
        self._steady += 1
        if self._plan is None or self._plan.requests != load.requests or self._stays <= 0:
            self._learn()
            self._begun = self._plan if self._is_hope else None
            self._stays, self._is_hope = min(1 + int(self._steady * len(load.requests) ** 0.25 / _SETTLES), _PLAN_STAYS), False
            self._plan = self._choose(load)
            if self._steady < _EARLY and self._arms[self._plan.arm].rates.reached(max(self._plan.depth)) < _SEEN:
                self._stays = 1
        self._stays -= 1
        if any(self._plan.nodes):
            return "hope" if self._is_hope else "plan", self._plan
        # What other batch sizes took is no reason to stop.
        if self._costs.knows_plain(len(load.requests)):
            self._guard(len(load.requests)).pause(self._costs.plain(len(load.requests), sum(load.lengths)))
        return "plain", self._plan

    def _choose(self, load: Load) -> Plan:
        """The best plan, or an unmeasured one that could be better yet; the old one where it is nearly as good."""
        worth = self._worth(load)
        looks = [(arm, arm.look(load, self._costs, self._limits, worth)) for arm in self._arms]
        enough = 1.0 if self._plan is None else 1.0 - _BAD_LUCK / len(load.requests) ** 0.5
        plans = self._plans(looks, hoped=False, enough=enough)
        best = max(plans, key=lambda plan: plan.goodput)
        plain = self._plain(load)
        if best.goodput < plain.goodput * enough:
            best = plain
        hope = self._hope(looks, plain.seconds)
        if hope is not None and hope.goodput > max(best.goodput, plain.goodput) * _PROMISING:
            self._stays, self._is_hope = 1, True
            return hope
        tried = self._tried_again(load, best, worth)
        if tried is not None:
            return tried
        old = self._plan
        if old is not None and any(old.nodes) and old.requests == load.requests:
            again = next((plan for plan in plans if plan.nodes == old.nodes and plan.arm == old.arm), None)
            if again is not None and again.goodput * (1 + _HYSTERESIS) > best.goodput:
                return again
        return best

    def _worth(self, load: Load) -> float:
        """Of an accepted token: what requests take for themselves is saved whoever ends sooner, the rest if the last one does."""
        batch = len(load.requests)
        alone = self._costs.alone(batch, sum(load.lengths))
        return alone + (1 - alone) * self._stragglers.share(bucket(batch))

    def _hope(self, looks: Sequence[tuple[Arm, Look]], plain_s: float) -> Plan | None:
        """The unmeasured plan that could be the best of them, or that was tried in the last round: cold rounds measure nothing."""
        due, begun = self._hopes.due(plain_s), self._begun
        if not due and begun is None:
            return None
        plans = [plan for plan in self._plans(looks, hoped=True) if not self._is_measured(plan)]
        if begun is not None:
            again = [plan for plan in plans if plan.arm == begun.arm and sum(plan.nodes) == sum(begun.nodes)]
            if again or not due:
                return again[0] if again else None
        return max(plans, key=lambda plan: plan.goodput, default=None)

    def _tried_again(self, load: Load, best: Plan, worth: float) -> Plan | None:
        """A plan of a drafter that was not used for long."""
        known = self._arms[best.arm].rates
        stale = [arm for arm in self._arms if arm.stale and arm.rates is not known]
        if not stale:
            return None
        arm = max(stale, key=lambda each: each.idle)
        arm.lost()
        arm.rates.doubt()
        self._stays = _TRIED
        plans = self._plans([(arm, arm.look(load, self._costs, self._limits, worth))], hoped=False)
        found = max(plans, key=lambda plan: plan.goodput)
        return found if any(found.nodes) else arm.least(load, self._costs, 1, 0)

    def _plans(self, looks: Sequence[tuple[Arm, Look]], *, hoped: bool, enough: float = 1.0) -> list[Plan]:
        return [plan for arm, look in looks for plan in arm.plans(look, self._costs, hoped=hoped, enough=enough)]

    def _is_measured(self, plan: Plan) -> bool:
        arm, batch = self._arms[plan.arm], len(plan.requests)
        deep = self._costs.deepest(arm.name, arm.width, batch) >= max(plan.depth)
        return deep and self._costs.measured(batch, plan.rows)

    def _liveliest(self) -> int:
        """The arm whose first guess is accepted most often; of equal ones the first."""
        rates = [arm.offered * arm.rates.rates(-1, 1)[0][0] for arm in self._arms]
        return rates.index(max(rates))
