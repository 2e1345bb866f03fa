"""Is the working tree faster than another checkout? Two processes decode in turns, and paired times are compared.

One process works at a time, in pieces of a fraction of a second, in an order that turns round: what the machine does meanwhile
falls on both alike. Processes are started anew several times, for a start has luck of its own.
"""

from __future__ import annotations

import io
import json
import math
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, TemporaryFile
from time import monotonic
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

import specdec
from specdec.bench.compare import MARGIN, Verdict, verdict_of
from specdec.bench.margin import explain, first_difference
from specdec.bench.measuring import disturbed_by, stolen_between, ticks
from specdec.bench.records import Interval
from specdec.bench.statistics import FEWEST_ITEMS, paired
from specdec.errors import SpecDecError

# What one start of the program gains or loses on another, as a deviation of the log of their ratio.
_STARTS = 0.008
# Pairs that others of the host did not disturb are judged alone where they are at least such a part of all.
_CALM = 0.9
# A comparison that others disturb goes on until it had the processor for its seconds, but no longer than so many times these.
_LONGEST = 5.0
# A part of the pairs that is left out at each end.
TRIM = 0.2
# Of the intervals: a comparison may go on until it can tell, so a difference that is none need not be found once in twenty times.
_LEVEL = 0.99
_WORKER = Path(__file__).with_name("against_worker.py")

Clock = Literal["wall", "processor"]


@dataclass(frozen=True, slots=True)
class Side:
    """A checkout. name: for people.  slow: a planted slowdown, as a part of the time; only to try the comparison itself."""

    name: str
    root: Path
    slow: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What both sides do. methods: name to a drafter's name or path, "bundled:ROLE", or None for plain decoding.

    prompts: token ids.  new: tokens of a piece.  seconds: of measuring, starts apart, without what the host gave to
    others.  starts: how often both are started.
    """

    target: str
    methods: dict[str, str | None]
    prompts: tuple[tuple[int, ...], ...]
    new: int = 24
    seconds: float = 60.0
    starts: int = 2
    dtype: str | None = None
    planner: str | None = None
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Piece:
    """What a side said, and in how many seconds. busy: those in which its thread had a processor.  stolen: see `Trial`."""

    tokens: tuple[int, ...]
    seconds: float
    busy: float
    stolen: float = 0.0


@dataclass(frozen=True, slots=True)
class Pair:
    """One piece on both sides. start: which start of the processes it is of."""

    method: str
    start: int
    before: Piece
    after: Piece

    @property
    def disturbed(self) -> bool:
        """Whether others took much of either."""
        return disturbed_by(max(self.before.stolen, self.after.stolen))


@dataclass(frozen=True, slots=True)
class Judged:
    """A method's verdict. before, after: tokens a second, medians.  ratio: after over before, None with too few pairs.

    pairs: those that were judged; disturbed ones are not, unless nearly all are.  clock: what the times are of; on a host that
    gives much to others only "processor" says something, which does not see where a program waits.
    reason: of a refusal, where outputs differ; there is no ratio then.
    """

    method: str
    pairs: int
    verdict: Verdict
    before: float
    after: float
    ratio: Interval | None = None
    resolution: float | None = None
    clock: Clock = "wall"
    reason: str = ""


class Worker:
    """A process that decodes for a checkout, one call at a time."""

    def __init__(self, side: Side, plan: Plan) -> None:
        """Starts it; `ready` waits until it has loaded."""
        self.side = side
        self._errors = TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # `close` closes it
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        chosen = {"target": plan.target, "dtype": plan.dtype, "methods": plan.methods, "planner": plan.planner}
        self._say({"root": str(side.root), "slow": side.slow, "threads": plan.threads, **chosen})

    def ready(self) -> None:
        """Raises SpecDecError when the checkout cannot do it."""
        self._hear()

    def decode(self, method: str, prompt: Sequence[int], new: int) -> Piece:
        """The new tokens, and how long they took."""
        wanted = ticks()
        self._say({"method": method, "prompt": list(prompt), "new": new})
        answer = self._hear()
        stolen = stolen_between(wanted, ticks()) or 0.0
        return Piece(tuple(answer["tokens"]), float(answer["seconds"]), float(answer["busy"]), stolen)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _say(self, line: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = "\n".join(self._errors.read().strip().splitlines()[-3:])
            raise SpecDecError(f"{self.side.name} stopped while it was measured; it said: {last or 'nothing'}")
        found: dict[str, Any] = json.loads(line)
        return found


def working_tree() -> Path:
    """The checkout that this package is of. Raises SpecDecError for an installed one."""
    folder = Path(specdec.__file__).parent.parent
    if not (folder / ".git").exists():
        raise SpecDecError(
            f"--against needs specdec in a git checkout, and it is installed in {folder}; use `pip install -e` there"
        )
    return folder


def run_against(
    before: Side, after: Side, plan: Plan, *, margin: float = MARGIN, advance: Callable[[float], None] = lambda part: None
) -> tuple[Judged, ...]:
    """A verdict for each method. margin: smaller changes than this part are no difference.  advance: told how much is done, 0 to 1.

    Outputs are compared piece by piece; a method whose outputs differ has no ratio, and its verdict is "outputs differ". Raises
    SpecDecError when a checkout cannot run the methods.
    """
    pairs: list[Pair] = []
    gate = _Gate(plan)
    for start in range(plan.starts):
        with _workers(before, after, plan) as workers:
            for method in plan.methods:
                for number, prompt in enumerate(plan.prompts):
                    # Twice: the first call of all loads code, and a planner learns what the rest of them cost.
                    for _ in range(2):
                        said = [worker.decode(method, prompt, plan.new).tokens for worker in workers]
                        gate.check(method, number, *said)
            pairs += _measured(workers, plan, start, gate, advance)
    return tuple(_judged(method, pairs, plan, gate, margin) for method in plan.methods)


@contextmanager
def _workers(before: Side, after: Side, plan: Plan) -> Iterator[tuple[Worker, Worker]]:
    with ExitStack() as stack:
        workers = Worker(before, plan), Worker(after, plan)
        for worker in workers:
            stack.callback(worker.close)
        for worker in workers:
            worker.ready()
        yield workers


def _measured(workers: tuple[Worker, Worker], plan: Plan, start: int, gate: _Gate, advance: Callable[[float], None]) -> list[Pair]:
    """Pairs until this start's share of the time is over: each piece both ways round, in an order that no pause can follow.

    Of a disturbed pair only the time counts in which it had a processor.
    """
    order = random.Random(start)
    pieces = [(method, number) for method in plan.methods for number in range(len(plan.prompts))]
    found: list[Pair] = []
    worked, began, share = 0.0, monotonic(), plan.seconds / plan.starts
    while True:
        order.shuffle(pieces)
        for method, number in pieces:
            for turn in ((0, 1), (1, 0)):
                answers = {side: workers[side].decode(method, plan.prompts[number], plan.new) for side in turn}
                pair = Pair(method, start, answers[0], answers[1])
                gate.check(method, number, pair.before.tokens, pair.after.tokens)
                found.append(pair)
                worked += sum(p.busy if pair.disturbed else p.seconds for p in (pair.before, pair.after))
            passed = min(1.0, max(worked, (monotonic() - began) / _LONGEST) / share)
            advance((start + passed) / plan.starts)
            if passed == 1 and len(found) >= 2 * len(pieces):
                return found


class _Gate:
    """Compares what both sides said; half precision may differ where rounding explains it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._known: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
        self._target: Any = None
        self.reasons: dict[str, str] = {}

    def check(self, method: str, number: int, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        """Keep the reason when they differ."""
        if before == after:
            return
        key = (number, before, after)
        if key not in self._known:
            self._known[key] = self._why(*key)
        if self._known[key]:
            self.reasons.setdefault(method, self._known[key])

    def _why(self, number: int, before: tuple[int, ...], after: tuple[int, ...]) -> str:
        if self._target is None:
            chosen = self._plan.dtype or "auto"
            self._target = AutoModelForCausalLM.from_pretrained(self._plan.target, dtype=chosen).eval()
        if self._target.dtype in (torch.bfloat16, torch.float16):
            found = explain(self._target, self._plan.prompts[number], after, before)
            if found is not None and found.within:
                return ""
        place = first_difference(before, after)
        return f"prompt {number + 1}: " + ("another length" if place is None else f"another token at place {place + 1}")


def _judged(method: str, pairs: Sequence[Pair], plan: Plan, gate: _Gate, margin: float) -> Judged:
    own, clock = _counted([pair for pair in pairs if pair.method == method], plan.threads)
    times = [tuple(p.seconds if clock == "wall" else p.busy for p in (pair.before, pair.after)) for pair in own]
    before, after = (plan.new / median(side) for side in zip(*times, strict=True))
    if method in gate.reasons:
        return Judged(method, len(own), "outputs differ", before, after, reason=gate.reasons[method])
    if len(own) < FEWEST_ITEMS:
        return Judged(method, len(own), "too few prompts", before, after, clock=clock)
    logs = [math.log(before_s / after_s) for before_s, after_s in times]
    found = paired(logs, len(plan.methods), _STARTS / math.sqrt(plan.starts), TRIM, _LEVEL)
    return Judged(method, len(own), verdict_of(found.ratio, margin), before, after, found.ratio, found.resolution, clock)


def _counted(pairs: list[Pair], threads: int) -> tuple[list[Pair], Clock]:
    """The pairs that others of the host did not disturb; where these are too few, all, by the time of the one thread that works."""
    calm = [pair for pair in pairs if not pair.disturbed]
    if len(calm) >= max(FEWEST_ITEMS, _CALM * len(pairs)):
        return calm, "wall"
    return pairs, "processor" if threads == 1 else "wall"


@contextmanager
def checkout(repository: Path, reference: str) -> Iterator[Path]:
    """The files of a commit in a temporary folder; the repository and its index stay as they are. Raises SpecDecError."""
    called = subprocess.run(["git", "-C", str(repository), "archive", "--format=tar", reference], capture_output=True, check=False)
    if called.returncode:
        said = called.stderr.decode(errors="replace").strip().splitlines()
        why = said[-1] if said else "no message"
        raise SpecDecError(f"--against {reference}: git does not give it ({why}); name a commit, tag or branch of {repository}")
    with TemporaryDirectory(prefix="specdec-against-") as folder:
        with tarfile.open(fileobj=io.BytesIO(called.stdout)) as archive:
            archive.extractall(folder, filter="data")
        if not (Path(folder) / "specdec" / "__init__.py").is_file():
            raise SpecDecError(f"--against {reference}: there is no specdec package at that commit; name a later one")
        yield Path(folder)
