"""The runner on the tree attention kernel, and captured forwards on buffers of fixed size: the same text as ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specdec.cache import LayerSpec, check_memory
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.errors import OutOfCacheError
from specdec.generator import SpeculativeGenerator
from specdec.graphs import CapturedForwards, bucket_of, run_again
from specdec.kernels.dispatch import choose_backend
from specdec.kernels.rows import ancestor_words
from specdec.planner import FixedPlanner
from specdec.runner import ModelRunner, RunnerOptions
from tests.support_models import left_padded, noised, prompts, tiny_model

pytestmark = pytest.mark.slow

KERNEL = RunnerOptions(attention="triton", capture="off", pack="off", row_invariant=False)
NEW = 6


def _generator(model: Any, shape: str | None) -> SpeculativeGenerator:
    drafter = None
    if shape is not None:
        drafter = DraftModelDrafter(noised(model, 0.1), shape=shape, options=KERNEL)  # type: ignore[arg-type]
    return SpeculativeGenerator(model, drafter, planner=FixedPlanner(nodes=5, depth=3, width=2), options=KERNEL)


@pytest.mark.parametrize(("family", "shape"), [("llama", "chain"), ("mistral", "tree"), ("gemma2", "tree")])
def test_the_kernel_gives_the_text_of_generate(family: str, shape: str) -> None:
    model: Any = tiny_model(family)
    inputs = left_padded(prompts((11, 3)))
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(_generator(model, shape).generate(**inputs, max_new_tokens=NEW, do_sample=False), expected)


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_captured_forwards_give_the_same_text(shape: str) -> None:
    """Replays run again on buffers that the rows were copied into: padding rows, buckets, and a second call on the same cache."""
    model: Any = tiny_model("llama")
    generator = _generator(model, shape)
    runners = [generator.engine.runner, generator.engine.drafter.runner]  # type: ignore[union-attr]
    for runner in runners:
        runner._graphs = CapturedForwards(runner._eager, 1, 64, run_again)
    for lengths in ((9,), (9, 3), (9,)):
        inputs = left_padded(prompts(lengths))
        expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(generator.generate(**inputs, max_new_tokens=NEW, do_sample=False), expected)
    for runner in runners:
        assert runner._graphs is not None
        assert runner._graphs.refused is None
        assert runner._graphs._captured


def test_what_cannot_be_captured_runs_eagerly_and_says_why() -> None:
    def refuse(run: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model: Any = tiny_model("llama")
    generator = _generator(model, None)
    graphs = CapturedForwards(generator.engine.runner._eager, 1, 64, refuse)
    generator.engine.runner._graphs = graphs
    inputs = left_padded(prompts((9,)))
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(generator.generate(**inputs, max_new_tokens=NEW, do_sample=False), expected)
    assert graphs.refused == "operation not permitted when stream is capturing"


def test_buckets_hold_their_rows() -> None:
    for rows in range(1, 257):
        size = bucket_of(rows)
        assert size is not None
        assert rows <= size < 2 * rows + 1
    assert bucket_of(257) is None


def test_ancestor_words_are_the_mask() -> None:
    generator = torch.Generator().manual_seed(1)
    tree = torch.rand(2, 5, 130, generator=generator) < 0.4
    words = ancestor_words(tree, (5, 2))
    assert words.shape == (7, 3)
    for row, (b, n) in enumerate([(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1)]):
        bits = [bool(words[row, t // 64] >> (t % 64) & 1) for t in range(130)]
        assert bits == tree[b, n].tolist()


def test_a_cache_that_does_not_fit_is_refused_before_decoding() -> None:
    spec = LayerSpec(8, 128, 128, torch.bfloat16, torch.device("cpu"))
    with pytest.raises(OutOfCacheError, match=r"2 request.*1\.00 GiB.*0\.50 GiB"):
        check_memory([spec] * 32, 2, 4096, torch.device("cpu"), 1 << 29)
    check_memory([spec] * 32, 2, 4096, torch.device("cpu"), 1 << 30)
    model: Any = tiny_model("llama")
    generator = SpeculativeGenerator(model, options=RunnerOptions(cache_limit_bytes=1000))
    with pytest.raises(OutOfCacheError):
        generator.generate(torch.tensor([[5, 6]]), max_new_tokens=4)


def test_the_backend_of_a_cpu_is_sdpa_and_a_choice_is_taken() -> None:
    assert choose_backend("auto", torch.device("cpu"), {(64, 64)}) == "sdpa"
    assert choose_backend("reference", torch.device("cpu"), {(64, 64)}) == "reference"
    assert choose_backend("auto", torch.device("cuda"), {(64, 32)}) == "sdpa"
    assert choose_backend("auto", torch.device("cuda"), {(64, 64)}) == "triton"
    assert ModelRunner(tiny_model("llama")).backend == "sdpa"
