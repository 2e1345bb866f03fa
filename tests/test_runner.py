"""The runner against transformers' own forward: prefill, tree scoring, commit, windows, capture, and the user's model."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig

from specdec.errors import UnsupportedModelError
from specdec.runner import ModelRunner, RunnerOptions
from specdec.trees.layout import ancestors
from specdec.types import TokenTree
from tests.support_models import FAMILIES, prompts, tiny_model

# fp32 on CPU: our attention and linear layers sum in another order than transformers' do.
TOLERANCE = 2e-4

PARENTS = [-1, 0, 0, 1, 1, 2, 3, 6]


def _reference(model: nn.Module, text: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([text]), attention_mask=torch.ones(1, len(text), dtype=torch.long)).logits[0, -1]


def _trees(roots: list[int], sizes: tuple[int, ...], seed: int = 0) -> TokenTree:
    generator = torch.Generator().manual_seed(seed)
    width = max(sizes)
    tokens = torch.randint(3, 61, (len(roots), width), generator=generator)
    tokens[:, 0] = torch.tensor(roots)
    parents = torch.tensor([PARENTS[:width]] * len(roots))
    for b, size in enumerate(sizes):
        tokens[b, size:] = 0
        parents[b, size:] = 0
    return TokenTree(tokens, parents, sizes)


def _path(tree: TokenTree, b: int, node: int) -> list[int]:
    seen = ancestors(tree.parents)[b, node]
    return [int(tree.tokens[b, n]) for n in range(tree.num_nodes[b]) if seen[n]]


def _check_scores(model: nn.Module, texts: list[list[int]], tree: TokenTree, logits: torch.Tensor) -> None:
    for b, size in enumerate(tree.num_nodes):
        for node in range(size):
            expected = _reference(model, texts[b] + _path(tree, b, node))
            torch.testing.assert_close(logits[b, node], expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [(8,), (1,), (8, 1, 5)], ids=str)
def test_every_node_scores_as_its_own_path(family: str, sizes: tuple[int, ...]) -> None:
    model = tiny_model(family)
    texts = prompts((11, 4, 9)[: len(sizes)])
    runner = ModelRunner(model)
    runner.begin(len(texts), 64)
    runner.prefill(texts, chunk=5)
    tree = _trees([7, 8, 9][: len(sizes)], sizes)
    _check_scores(model, texts, tree, runner.score(tree).logits)
    # Accept a branch that is not a chain, and score again behind it.
    paths = [[n for n in (2, 5) if n < size] for size in sizes]
    runner.commit(paths)
    texts = [t + [int(tree.tokens[b, n]) for n in (0, *p)] for b, (t, p) in enumerate(zip(texts, paths, strict=True))]
    assert runner.cache.lengths == [len(t) for t in texts]
    again = _trees([5, 6, 7][: len(sizes)], sizes, seed=1)
    _check_scores(model, texts, again, runner.score(again).logits)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_backends_agree(backend: str) -> None:
    model = tiny_model("mistral")
    texts = prompts((12, 3))
    tree = _trees([7, 8], (8, 4))
    runner = ModelRunner(model, options=RunnerOptions(attention=backend, pack="off", capture="off"))  # type: ignore[arg-type]
    runner.begin(2, 64)
    runner.prefill(texts)
    _check_scores(model, texts, tree, runner.score(tree).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_forward_is_bit_identical(family: str) -> None:
    model = tiny_model(family)
    texts = prompts((9,))
    eager = ModelRunner(model, options=RunnerOptions(capture="off"))
    captured = ModelRunner(model, options=RunnerOptions(capture_after=1))
    for runner in (eager, captured):
        runner.begin(1, 64)
        runner.prefill(texts)
    for seed in range(3):
        tree = _trees([7], (6,), seed)
        assert torch.equal(eager.score(tree).logits, captured.score(tree).logits)
        for runner in (eager, captured):
            runner.commit([[1, 3]])
    assert captured.flat.refused is None, captured.flat.refused
    assert 6 in captured.flat


@pytest.mark.parametrize("capture", ["auto", "off"])
def test_a_bf16_row_has_the_same_bits_alone_and_among_others(capture: str) -> None:
    """What makes speculative text equal plain text in half precision, on CPUs whose linear layers are packed."""
    model = tiny_model().to(torch.bfloat16)
    runner = ModelRunner(model, options=RunnerOptions(capture=capture, capture_after=2))  # type: ignore[arg-type]
    if not runner._packed:
        pytest.skip("this CPU multiplies bf16 by itself")
    text = prompts((60,))[0]
    runner.begin(1, 96)
    runner.prefill([text[:27]])
    alone = []
    for token in text[27:35]:
        alone.append(runner.score(TokenTree(torch.tensor([[token]]), torch.tensor([[-1]]), (1,), True)).logits[0, 0])
        runner.commit([[]])
    for rows in range(1, 9):
        runner.cache.lengths = [27]
        chain = TokenTree(torch.tensor([text[27 : 27 + rows]]), torch.arange(-1, rows - 1)[None], (rows,), True)
        for _ in range(3):
            logits = runner.score(chain).logits[0]
        assert all(torch.equal(a, b) for a, b in zip(alone, logits, strict=False))


def test_taps_are_the_hidden_states() -> None:
    model = tiny_model()
    text = prompts((6,))[0]
    runner = ModelRunner(model, taps=("last_hidden", "layer:0"))
    runner.begin(1, 32)
    runner.prefill([text])
    scores = runner.score(_trees([7], (1,)))
    with torch.no_grad():
        out = model(torch.tensor([[*text, 7]]), output_hidden_states=True)
    torch.testing.assert_close(scores.taps["last_hidden"][0, 0], out.hidden_states[-1][0, -1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores.taps["layer:0"][0, 0], out.hidden_states[1][0, -1], atol=1e-4, rtol=1e-4)
    with pytest.raises(UnsupportedModelError, match="layer:0"):
        ModelRunner(model, taps=("middle",))


def test_the_users_model_is_left_as_it_was() -> None:
    model = tiny_model().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {n: dict(m.__dict__) for n, m in model.named_modules()}
    config = copy.deepcopy(model.config.to_dict())
    runner = ModelRunner(model)
    runner.begin(1, 32)
    runner.prefill(prompts((6,)))
    runner.score(_trees([7], (4,)))
    assert model.training
    assert model.config.to_dict() == config
    assert model.config._attn_implementation != "specdec_rows"
    assert {n: list(m.__dict__) for n, m in model.named_modules()} == {n: list(a) for n, a in attributes.items()}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    shared = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in runner.twin.model.parameters()} <= shared


def test_weights_changed_in_place_are_followed() -> None:
    model = tiny_model()
    texts = prompts((6,))
    runner = ModelRunner(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    runner.begin(1, 32)
    runner.prefill(texts)
    tree = _trees([7], (4,))
    _check_scores(model, texts, tree, runner.score(tree).logits)


def test_a_model_with_hooks_is_switched_for_each_forward_only() -> None:
    model = tiny_model()
    calls: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    runner = ModelRunner(model)
    assert not runner.twin.copied
    texts = prompts((6,))
    runner.begin(1, 32)
    runner.prefill(texts)
    tree = _trees([7], (8,))
    logits = runner.score(tree).logits
    assert calls
    assert model.config._attn_implementation == "sdpa"
    _check_scores(model, texts, tree, logits)


def test_two_runners_share_one_model() -> None:
    model = tiny_model()
    texts = prompts((6, 9))
    runners = [ModelRunner(model), ModelRunner(model)]
    for runner, text in zip(runners, texts, strict=True):
        runner.begin(1, 32)
        runner.prefill([text])
    tree = _trees([7], (8,))
    for runner, text in zip(runners, texts, strict=True):
        _check_scores(model, [text], tree, runner.score(tree).logits)


def test_unsupported_targets_are_refused_by_name() -> None:
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4, intermediate_size=32)
    )
    with pytest.raises(UnsupportedModelError, match=r"Mamba.*rolled back"):
        ModelRunner(mamba)
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=61, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedModelError, match=r"Bloom"):
        ModelRunner(bloom)
    with pytest.raises(UnsupportedModelError, match="causal LM"):
        ModelRunner(nn.Linear(2, 2))


def test_gaps_are_closed_from_behind_and_rows_keep_what_they_hold() -> None:
    model = tiny_model()
    texts = prompts((11, 4, 9, 6, 8))
    runner = ModelRunner(model)
    runner.begin(len(texts), 64)
    runner.prefill(texts)
    order = runner.cache.closed_up([1, 3, 4])
    assert order == [4, 1, 3]
    runner.cache.arrange(order)
    tree = _trees([5, 6, 7], (8, 3, 1))
    _check_scores(model, [texts[row] for row in order], tree, runner.score(tree).logits)


def test_rows_that_share_slots_stay_neighbours() -> None:
    runner = ModelRunner(tiny_model(), options=RunnerOptions(share_from=4))
    runner.begin(4, 64)
    runner.prefill([[5, 6, 7, 8, 9]] * 4)
    assert runner.cache.closed_up([1, 3]) == [1, 3]


def test_prompts_of_one_forward_attend_apart_where_a_rectangle_would_be_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    widest: list[int] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        widest.append(query.shape[0])
        return attend(query, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    runner = ModelRunner(tiny_model())
    runner.begin(4, 128)
    runner.prefill(prompts((60, 4, 2, 9)))
    assert set(widest) == {1}


def test_the_forwards_of_a_size_until_it_is_captured_are_cold() -> None:
    model = tiny_model()
    runner = ModelRunner(model, options=RunnerOptions(capture_after=3))
    runner.begin(1, 64)
    runner.prefill(prompts((6,)))
    cold = []
    for size in (4, 4, 4, 4, 4, 5):
        before = runner.cold
        runner.score(_trees([7], (size,)))
        cold.append(runner.cold - before)
    assert runner.flat.refused is None, runner.flat.refused
    assert cold == [1, 1, 1, 0, 0, 1]


def test_a_runner_that_is_dropped_frees_its_weights_at_once() -> None:
    """Without the garbage collector, which may come late while a process builds one generator after the other."""
    runner = ModelRunner(tiny_model(), options=RunnerOptions(capture_after=1))
    runner.begin(1, 64)
    runner.prefill(prompts((6,)))
    for size in (4, 4, 9, 12, 10):
        runner.score(TokenTree(torch.ones(1, size, dtype=torch.long), torch.arange(-1, size - 1)[None], (size,)))
    assert runner.flat.recorded == 3
    held = [weakref.ref(module) for module in runner.twin.model.modules()] + [weakref.ref(layer) for layer in runner._packed]
    gc.collect()
    gc.disable()
    try:
        del runner
        assert not [each() for each in held if each() is not None]
    finally:
        gc.enable()
