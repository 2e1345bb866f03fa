"""Methods that take turns: segments are those of the text, one method runs at a time, and what is given up leaves no trace."""

from __future__ import annotations

import threading
from collections.abc import Callable
from multiprocessing import Pipe
from time import sleep
from typing import Any

import pytest
from transformers.generation.streamers import BaseStreamer

from specdec.bench.lockstep import TOKENS, Lockstep, Segment, Turns, serve
from specdec.errors import SpecDecError
from specdec.generator import SpeculativeGenerator
from tests.support_models import left_padded, prompts, tiny_model


class _Counts:
    """A job is (tokens, seconds for each); the result is how many jobs there were."""

    def __init__(self) -> None:
        self.jobs = 0

    def __call__(self, job: tuple[int, float], streamer: BaseStreamer) -> int:
        self.jobs += 1
        for _ in range(1 + job[0]):
            sleep(job[1])
            streamer.put(None)
        return self.jobs


def _fails() -> Callable[[Any, BaseStreamer], Any]:
    def work(job: Any, streamer: BaseStreamer) -> None:
        raise SystemExit

    return work


def test_segments_are_of_the_text_and_decoding_in_turns_gives_what_decoding_at_once_gives() -> None:
    target, inputs, new = tiny_model(), left_padded(prompts((5, 9))), 2 * TOKENS + 3
    ours, theirs = Pipe()
    generator = SpeculativeGenerator(target, "prompt-lookup", planner=2)
    whole = generator.generate(**inputs, max_new_tokens=new, do_sample=False).tolist()

    def work(job: int, streamer: BaseStreamer) -> list[list[int]]:
        return generator.generate(**inputs, max_new_tokens=job, do_sample=False, streamer=streamer).tolist()

    thread = threading.Thread(target=_told, args=(ours, found := list[Segment](), new))
    thread.start()
    turns = Turns(theirs)
    result = work(theirs.recv(), turns)
    theirs.send(Segment(turns.seconds, last=True, result=result))
    thread.join()
    assert [segment.last for segment in found] == [False, False, True]
    assert found[-1].result == whole
    assert all(segment.seconds > 0 for segment in found)


def _told(pipe: Any, found: list[Segment], new: int) -> None:
    pipe.send(new)
    while True:
        found.append(pipe.recv())
        if found[-1].last:
            return
        pipe.send("go on")


@pytest.mark.slow
def test_all_methods_have_a_process_and_what_loses_is_given_up() -> None:
    with Lockstep(("fast", "slow"), _Counts) as side_by_side:
        ran = side_by_side.run({"fast": (3 * TOKENS, 0.0), "slow": (3 * TOKENS - 1, 0.001)})
        assert [len(own.seconds) for own in ran.values()] == [4, 3]
        assert [own.result for own in ran.values()] == [1, 1]
        assert sum(ran["slow"].seconds) >= 0.001 * 3 * TOKENS
        lost = side_by_side.run(
            {"fast": (3 * TOKENS, 0.0), "slow": (3 * TOKENS, 0.001)},
            lambda seconds: ["slow"] if len(seconds["slow"]) == 2 else [],
        )
        assert [len(own.seconds) for own in lost.values()] == [4, 2]
        assert [own.result for own in lost.values()] == [2, None]
        again = side_by_side.run({"slow": (1, 0.0)})
        assert again["slow"].result == 3


@pytest.mark.slow
def test_a_process_that_ends_is_told_by_name() -> None:
    with Lockstep(("other",), _fails) as side_by_side, pytest.raises(SpecDecError, match="'other' ended"):
        side_by_side.run({"other": None})


def test_serving_ends_when_the_pipe_is_closed_in_the_middle_of_a_job() -> None:
    ours, theirs = Pipe()
    ours.send((3 * TOKENS, 0.0))
    ours.close()
    work = _Counts()
    serve(theirs, lambda: work)
    assert work.jobs == 1


def test_serving_ends_with_the_pipe() -> None:
    ours, theirs = Pipe()
    ours.close()
    serve(theirs, lambda: lambda job, streamer: None)
