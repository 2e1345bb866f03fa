"""What rounds of a replay take on a busy host: more than was recorded, and by the clock more than that.

A host that others use changes its pace for hundreds of rounds, stands still for a moment, and runs a size slowly for the first
times; a drafter that did not draft for long has to read what came since. A planner sees all that. It is judged by what its rounds
are worth without the others' doings, so that luck with the machine decides nothing.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

from specdec.bench.replay import Recording, Took

# A busy machine's other pace, and how often it changes; deviation of a round's logarithm; how long and how often it stands still.
# As seen on two hyperthreads of a shared host: phases of 7 and 10 ms a round.
_OTHER_PACE, _CHANGES, _SPREAD, _STILL, _STANDS = 1.35, 1 / 200, 0.08, 3.0, 0.01
# Runs of a size until it is captured, what each of them takes more for running eagerly, as a share, and what the last one takes to
# capture it, in plain rounds of one request; of a draft model's, whose sizes are the requests, likewise.
_EAGER, _SLOWER, _CAPTURES, _CAPTURES_DRAFT = 4, 0.35, 3.0, 1.0
# Tokens of a request that a drafter reads beside drafting, and what each further one takes, in plain rounds of one request.
_BESIDE, _READS = 8, 0.02


class Busy:
    """A host that others use. The same seed gives the same machine; what its rounds take depends on all that came before."""

    def __init__(self, recording: Recording, seed: int) -> None:
        """recording: of a quiet machine."""
        self._recording, self._plain_s = recording, recording.target_s(1, 0)
        self._random, self._pace = random.Random(seed), 1.0
        self._ran: Counter[int] = Counter()
        self._drew: Counter[int] = Counter()

    def took(self, drafted: Sequence[int], behind: int) -> Took:
        """The next round."""
        rows = len(drafted) + sum(drafted)
        self._ran[rows] += 1
        cold_target = self._ran[rows] <= _EAGER
        target_s = self._recording.target_s(len(drafted), sum(drafted))
        # Plain decoding, which all is compared with, gets its one size ready as well.
        if cold_target and any(drafted):
            target_s += _SLOWER * target_s + _CAPTURES * self._plain_s * (self._ran[rows] == _EAGER)
        draft_s, cold_draft = self._draft(len(drafted), max(drafted), behind) if any(drafted) else (0.0, False)
        if self._random.random() < _CHANGES:
            self._pace = _OTHER_PACE if self._pace == 1.0 else 1.0
        return Took(self._shown(target_s), self._shown(draft_s), target_s + draft_s, cold_target, cold_draft)

    def _draft(self, batch: int, depth: int, behind: int) -> tuple[float, bool]:
        """Seconds, and whether that is cold."""
        self._drew[batch] += 1
        cold, reads = self._drew[batch] <= _EAGER, max(behind - _BESIDE * batch, 0)
        slower = 1 + _SLOWER * cold
        gets_ready = _CAPTURES_DRAFT * (self._drew[batch] == _EAGER)
        seconds = slower * self._recording.draft_s(batch, depth) + self._plain_s * (gets_ready + _READS * reads)
        return seconds, cold or reads > 0

    def _shown(self, seconds: float) -> float:
        """By the clock."""
        still = _STILL if self._random.random() < _STANDS else 1.0
        return seconds * self._pace * still * math.exp(self._random.gauss(0.0, _SPREAD))
