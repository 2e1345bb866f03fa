"""Whether speculation pays: judged by finished rounds, off where it does not, tried again at growing distances."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

# Rounds that speculation is judged by; how many there have to be; one among so many judges; deviations that pass for bad luck.
_WINDOW, _ENOUGH, _JUDGED_EVERY, _LUCK = 32, 8, 4, 1.5
# Rounds that a trial lasts for while nothing is accepted, the first rounds of all among them.
TRIAL = 2
# Plain rounds until the next trial: at first, doubled each time; at most; and so many that trials cost this share of the time.
_FIRST_WAIT, _LONGEST_WAIT, _TRIALS_COST = 16, 512, 0.006
# A wait from which on another text is no reason to try sooner.
_HOPELESS = 32
# Plain rounds that a round counts as, at most.
_LONGEST = 3.0
# Rounds that speculation has to be on for before going off counts as new.
_SETTLED = 64


@dataclass(frozen=True, slots=True)
class Judged:
    """A round that drafted. batch: its requests.  drafted, accepted: tokens of all of them.  cold: it also prepared something,
    which is paid once, by every planner, and says nothing of later rounds.  worth: of an accepted token.
    """

    batch: int
    drafted: int
    accepted: int
    seconds: float
    cold: bool = False
    worth: float = 1.0

    @property
    def tokens(self) -> float:
        """That it gave, each for what it is worth."""
        return self.batch + self.worth * self.accepted


@dataclass(slots=True)
class Guard:
    """For one batch size. on: speculation is not known not to pay.  left: plain rounds before the next trial, while off.

    waits: how often it was off, or stayed off after a trial, so far.  _barren: rounds that drafted while nothing was ever accepted;
    None since something was.
    """

    on: bool = True
    left: int = 0
    waits: int = 0
    _wait: int = _FIRST_WAIT // 2
    _rounds: int = 0
    _barren: int | None = 0
    _tried: int = 0
    _lost_s: float = 0.0
    _window: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    @property
    def trying(self) -> bool:
        """Whether the next round is a trial."""
        return not self.on and self.left <= 0

    @property
    def proven(self) -> bool:
        """Whether a draft was ever accepted."""
        return self._barren is None

    def observe_plain(self) -> None:
        """A round without speculation is over."""
        self.left -= not self.on

    def observe(self, round_: Judged, plain_s: float) -> bool:
        """A round that drafted is over. plain_s: of a plain round. Returns whether a trial has just gone well."""
        if self._barren is not None:
            self._barren = None if round_.accepted else self._barren + (round_.drafted > 0)
        if round_.cold and self.on and self.proven:
            return False
        # What else the machine did in a round is not lost to drafting.
        self._lost_s += min(round_.seconds, _LONGEST * plain_s) - plain_s * round_.tokens / round_.batch
        if self.on:
            self._judge(round_, round_.batch / plain_s)
            if not self.on:
                self._wait_for(plain_s)
            return False
        self._tried += 1
        # One in three is about the least that pays anywhere.
        if 0 < round_.drafted <= 3 * round_.accepted:
            self.on, self._rounds = True, 0
            self._window.clear()
            return True
        if self._tried >= TRIAL:
            self._wait_for(plain_s)
        return False

    def new_text(self) -> None:
        """Another text begins, of which the last one says little: the next trial is soon, unless many have failed in a row."""
        if self._wait <= _HOPELESS:
            self.left = min(self.left, 1)

    def pause(self, plain_s: float) -> None:
        """The planner itself found nothing that pays."""
        self.on = False
        self._wait_for(plain_s)

    def _judge(self, round_: Judged, plain: float) -> None:
        """plain: tokens a second without speculation."""
        if self._barren is not None and self._barren >= TRIAL:
            # The first rounds are a trial like any other.
            self.on = False
            return
        if round_.cold:
            return
        self._rounds += 1
        self._window.append((round_.tokens, round_.seconds))
        rounds = len(self._window)
        if rounds < _ENOUGH or self._rounds % _JUDGED_EVERY:
            return
        total = sum([count for count, _ in self._window])
        typical = sorted([own for _, own in self._window])[rounds // 2]
        # What else the machine did in a round says nothing of speculation.
        spent = sum([min(own, 2 * typical) for _, own in self._window])
        # Luck is no reason to stop: what a lucky window of the same rounds could have given has to be too little as well.
        spread = sum([(count - total / rounds) ** 2 for count, _ in self._window])
        self.on = (total + _LUCK * spread**0.5) / spent >= plain

    def _wait_for(self, plain_s: float) -> None:
        """Off for twice as many rounds as last time, and for enough to make up for what trying it cost."""
        if self._rounds >= _SETTLED:
            self._wait = _FIRST_WAIT // 2
        paid_back = max(self._lost_s, 0.0) / (_TRIALS_COST * plain_s)
        self._wait = int(min(max(2 * self._wait, _FIRST_WAIT), max(paid_back, _FIRST_WAIT), _LONGEST_WAIT))
        self.waits += 1
        self.left, self._tried, self._rounds, self._lost_s = self._wait, 0, 0, 0.0
        self._window.clear()
