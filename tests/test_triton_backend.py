"""The runner on the tree attention kernel, and captured forwards on buffers of fixed size: the same text as ever."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from specdec.cache import KVCache, LayerSpec, check_memory
from specdec.controller import committed_of
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.errors import OutOfCacheError
from specdec.generator import SpeculativeGenerator
from specdec.graphs import bucket_of, run_again
from specdec.kernels.dispatch import choose_backend
from specdec.kernels.rows import Shared, ancestor_words
from specdec.noise import Noise, Stream
from specdec.planner import FixedPlanner
from specdec.runner import ModelRunner, RunnerOptions
from specdec.types import Draft, Law, TokenTree
from specdec.verify.chooser import NoiseChooser
from specdec.verify.greedy import Greedy
from specdec.verify.walk import verdict_rows
from tests.support_models import left_padded, noised, prompts, tiny_model

pytestmark = pytest.mark.slow

KERNEL = RunnerOptions(attention="triton", capture="off", pack="off", row_invariant=False, capture_after=1)
NEW = 6
END = 17
_NO_CHOICE = NoiseChooser(Noise(0), *torch.zeros(2, 0, dtype=torch.long), Stream.ACCEPT)


def _tree(runner: ModelRunner, sizes: tuple[int, ...], generator: torch.Generator) -> TokenTree:
    """Random trees in which every other node holds what the target chooses at its parent."""
    tokens, parents = torch.zeros(2, len(sizes), max(sizes), dtype=torch.long)
    for b, size in enumerate(sizes):
        tokens[b, :size] = torch.randint(3, 61, (size,), generator=generator)
        parents[b, :size] = torch.tensor([-1, *(int(torch.randint(n, (1,), generator=generator)) for n in range(1, size))])
    tree = TokenTree(tokens, parents, sizes)
    for _ in range(3):
        chosen = runner.score(tree).logits.argmax(-1)
        for b, size in enumerate(sizes):
            for n in range(1, size, 2):
                tokens[b, n] = chosen[b, parents[b, n]]
    return tree


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
    target, draft = generator.engine.runner, generator.engine.drafter.runner  # type: ignore[union-attr]
    for runner in (target, draft):
        runner.use_graphs(run_again)
    for lengths in ((9,), (9, 3), (9,)):
        inputs = left_padded(prompts(lengths))
        expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(generator.generate(**inputs, max_new_tokens=NEW, do_sample=False), expected)
    assert target._rounds is not None
    assert draft._graphs is not None
    assert draft._chains is not None
    drafted = draft._chains if shape == "chain" else draft._graphs
    for captures in (target._rounds.captures, drafted.captures):
        assert captures.refused is None
        assert len(captures)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_whole_rounds_leave_the_cache_as_single_steps_do(family: str) -> None:
    """Trees of unequal sizes, windows and soft-caps: verdicts, lengths and all committed keys and values."""
    model: Any = tiny_model(family)
    steps, replays = ModelRunner(model, options=KERNEL), ModelRunner(model, options=KERNEL)
    replays.use_graphs(run_again)
    texts = prompts((11, 4))
    for runner in (steps, replays):
        runner.begin(2, 96)
        runner.prefill(texts)
    generator, moved = torch.Generator().manual_seed(3), False
    for sizes in ((9, 3), (1, 5), (9, 3), (1, 1)):
        tree = _tree(steps, sizes, generator)
        verdict = Greedy().verify(Draft(tree, Law.DETERMINISTIC), steps.score(tree), _NO_CHOICE)
        rows = verdict_rows(verdict, tree.tokens, tree.parents).tolist()
        whole = replays.whole_round(tree)
        assert whole is not None
        ours, theirs = committed_of(whole.verdict, (0, 1), {}), committed_of(rows, (0, 1), {}, is_chain=verdict.path is None)
        assert ours == theirs
        steps.commit(theirs.paths)
        replays.advance(ours.num_accepted)
        moved = moved or any(path != tuple(range(1, len(path) + 1)) for path in ours.paths)
        assert steps.cache.lengths == replays.cache.lengths
        for b, length in enumerate(steps.cache.lengths):
            for one, other in zip(steps.cache.groups, replays.cache.groups, strict=True):
                torch.testing.assert_close(one[:, :, b, :, :length], other[:, :, b, :, :length])
    assert moved


@pytest.mark.parametrize("graphs", [False, True])
def test_samples_of_one_prompt_share_it(graphs: bool) -> None:
    """Read once or copied, the same text: three samples, one of which ends early."""
    model: Any = tiny_model("llama")
    ids = torch.tensor(prompts((9,)))
    said = {}
    for share_from in (1, 1 << 20):
        options, planner = replace(KERNEL, share_from=share_from), FixedPlanner(nodes=2, depth=2)
        generator = SpeculativeGenerator(model, "prompt-lookup", planner=planner, options=options, verifier="coupled")
        if graphs:
            generator.engine.runner.use_graphs(run_again)
        whole = generator.generate(ids, max_new_tokens=5, do_sample=True, seed=5, num_return_sequences=3, eos_token_id=END)
        said[share_from] = whole.tolist()
    assert said[1] == said[1 << 20]
    assert 1 <= sum(END in row[9:13] for row in said[1]) < 3


@pytest.mark.parametrize("graphs", [False, True])
def test_equal_prompts_decode_greedily_on_a_shared_prefix(graphs: bool) -> None:
    """Two of three prompts are equal, and longer than the window."""
    model: Any = tiny_model("mistral")
    options = replace(KERNEL, share_from=1)
    generator = SpeculativeGenerator(model, "prompt-lookup", planner=FixedPlanner(nodes=4, depth=4), options=options)
    if graphs:
        generator.engine.runner.use_graphs(run_again)
    long, short = prompts((11, 3))
    inputs = left_padded([short, long, long])
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(generator.generate(**inputs, max_new_tokens=NEW, do_sample=False), expected)
    assert generator.engine.runner.cache.groups


def test_a_cache_keeps_track_of_what_is_shared() -> None:
    cache = KVCache([LayerSpec(1, 4, 4, torch.float32, torch.device("cpu"))], 5, 32)
    cache.lengths = [3, 8, 0, 0, 2]
    cache.groups[0].copy_(torch.randn(cache.groups[0].shape))
    kept = cache.groups[0].clone()
    cache.repeat([0, 1, 1, 1, 4], shared_from=3)
    assert cache.lengths == [3, 8, 8, 8, 2]
    assert cache.shared == (Shared(1, 4, 8),)
    for row in (2, 3):
        assert torch.equal(cache.groups[0][:, :, row, :, :8], kept[:, :, 1, :, :8])
    cache.arrange([0, 1, 3, 4])
    assert cache.shared == (Shared(1, 3, 8),)
    cache.arrange([1, 0, 2, 3])
    assert cache.shared == ()


def test_what_cannot_be_captured_runs_eagerly_and_says_why() -> None:
    def refuse(run: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model: Any = tiny_model("llama")
    generator = _generator(model, None)
    runner = generator.engine.runner
    runner.use_graphs(refuse)
    inputs = left_padded(prompts((9,)))
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(generator.generate(**inputs, max_new_tokens=NEW, do_sample=False), expected)
    assert runner._rounds is not None
    assert runner._rounds.captures.refused == "operation not permitted when stream is capturing"


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
