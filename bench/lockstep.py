"""Methods that decode the same texts side by side, a few tokens each in turn, so that what else the machine does hits them alike.

Each method has a process of its own, and only one of them runs at a time: a method's state stays where it is while others run.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

from transformers.generation.streamers import BaseStreamer

from specdec.errors import SpecDecError

# Tokens of each text in a segment. The whole times of one text in two equal processes differed by 2 to 3 % with segments of 4 and
# of 16 tokens (deviations over 14 to 24 texts; on a busier host by 8 % with 16). After each pause a method finds its weights out of
# the processor's caches, which its user would not see: with 4 tokens in nearly every round of one that accepts as many. A length
# of 6 gained 1.60 and 1.63 times with 4 tokens, 1.72 times with 32.
TOKENS = 16
_ON, _OFF = "go on", "give up"
# (job, the streamer that it has to decode with) to a result.
Work = Callable[[Any, BaseStreamer], Any]
# Seconds of the segments so far, by method, to the methods that need not go on.
Losers = Callable[[Mapping[str, Sequence[float]]], Collection[str]]


class GivenUp(Exception):
    """The rest of a text is not wanted."""


@dataclass(frozen=True, slots=True)
class Segment:
    """What a method ran until the next one's turn. last: the text is done, and the result is there."""

    seconds: float
    last: bool = False
    result: Any = None


@dataclass(frozen=True, slots=True)
class Ran:
    """seconds: of each segment.  result: of the job, None where it was given up."""

    seconds: tuple[float, ...]
    result: Any


class Turns(BaseStreamer):
    """Stops every so many tokens until it is told to go on. Raises GivenUp in the decoding that it streams if told so."""

    def __init__(self, pipe: Connection, tokens: int = TOKENS) -> None:
        """pipe: to whom the segments are told.  tokens: of each text in a segment."""
        self._pipe, self._every, self._given, self._began = pipe, tokens, -1, perf_counter()

    def put(self, value: Any) -> None:
        """The prompt, then each step."""
        self._given += 1
        if self._given and self._given % self._every == 0:
            self._pipe.send(Segment(self.seconds))
            if self._pipe.recv() != _ON:
                raise GivenUp
            self._began = perf_counter()

    def end(self) -> None:
        """Nothing is left to do."""

    @property
    def seconds(self) -> float:
        """Since this turn began."""
        return perf_counter() - self._began


def serve(pipe: Connection, make: Callable[[], Work]) -> None:
    """Run what is asked for until the pipe is closed, which may be in the middle of a job. make: what is loaded once."""
    work = make()
    try:
        while True:
            pipe.send(_done(work, pipe.recv(), pipe))
    except (EOFError, ConnectionError):
        return


def _done(work: Work, job: Any, pipe: Connection) -> Segment:
    """The last segment of a job."""
    turns = Turns(pipe)
    try:
        result = work(job, turns)
    except GivenUp:
        return Segment(0.0, last=True)
    return Segment(turns.seconds, last=True, result=result)


def _process(pipe: Connection, make: Callable[[], Work]) -> None:
    # An interrupt ends who holds the other end, and with it the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(pipe, make)


class Lockstep:
    """A process for each method. Close it when it is not needed any more, or use it in a `with`."""

    def __init__(self, methods: Sequence[str], make: Callable[[], Work]) -> None:
        """make: can be sent to a process, and loads what every job of any method needs."""
        context = multiprocessing.get_context("spawn")
        self._pipes: dict[str, Connection] = {}
        self._processes = []
        for method in methods:
            self._pipes[method], theirs = context.Pipe()
            process = context.Process(target=_process, args=(theirs, make), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes.values():
            pipe.close()
        for process in self._processes:
            process.join()

    def run(self, jobs: Mapping[str, Any], losers: Losers = lambda seconds: ()) -> dict[str, Ran]:
        """Every method's job, a segment each in their order, round and round.

        Not in their order and back: the first and the last would run twice in a row and find their weights in the processor's
        cache, which was worth 8 % with eight methods.

        losers: asked after each segment of all. Raises SpecDecError when a method's process ends before its job.
        """
        seconds: dict[str, list[float]] = {method: [] for method in jobs}
        results: dict[str, Any] = dict.fromkeys(jobs)
        running, saying = list(jobs), dict(jobs)
        while running:
            for method in list(running):
                segment = self._say(method, saying[method])
                saying[method] = _ON
                seconds[method].append(segment.seconds)
                if segment.last:
                    results[method] = segment.result
                    running.remove(method)
            for method in set(losers(seconds)) & set(running):
                self._say(method, _OFF)
                running.remove(method)
        return {method: Ran(tuple(seconds[method]), results[method]) for method in jobs}

    def _say(self, method: str, what: Any) -> Segment:
        try:
            self._pipes[method].send(what)
            segment: Segment = self._pipes[method].recv()
        except (EOFError, ConnectionError) as error:
            raise SpecDecError(f"the process of {method!r} ended before its job; what it said is above") from error
        return segment
