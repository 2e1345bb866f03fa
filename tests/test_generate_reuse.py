"""Caches that come and go, inner values, processors that keep state, and targets that are wrapped or shared."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor, StaticCache

from specdec.errors import InvalidRequestError, UnsupportedModelError
from specdec.generator import SpeculativeGenerator
from tests.support_generate import ENDS, INPUTS, Counting, generator_of
from tests.support_models import VOCABULARY, noised, tiny_model

NEW = 14
ONE = {"input_ids": INPUTS["input_ids"][2:3], "attention_mask": torch.ones(1, 14, dtype=torch.long)}
DICT: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
# Windows, soft caps and learned positions.
FAMILIES = ["llama", pytest.param("mistral", marks=pytest.mark.slow), "gemma2", pytest.param("gpt2", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def generator(model: Any) -> SpeculativeGenerator:
    return generator_of(model)


def _of(family: str) -> tuple[Any, SpeculativeGenerator]:
    model: Any = tiny_model(family)
    return model, generator_of(model)


def _assert_same_cache(mine: Any, theirs: Any, mask: Tensor) -> None:
    """The same keys and values wherever the mask shows them; ours has zeros where it does not."""
    assert type(mine) is type(theirs)
    assert mine.get_seq_length() == theirs.get_seq_length() == mask.shape[1]
    for ours, hf in zip(mine.layers, theirs.layers, strict=True):
        for a, b in ((ours.keys, hf.keys), (ours.values, hf.values)):
            seen = mask[:, mask.shape[1] - b.shape[2] :, None].bool()
            assert a.shape == b.shape
            worst = float(torch.where(seen[:, None], a - b, 0).abs().max() / b.abs().max())
            assert worst < 1e-5


def _grown(mask: Tensor, length: int) -> Tensor:
    return torch.cat((mask, mask.new_ones(len(mask), length - mask.shape[1])), 1)


@pytest.mark.parametrize("ends", [None, ENDS], ids=["full", "ended"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_what_generate_returns(family: str, ends: list[int] | None) -> None:
    model, generator = _of(family)
    theirs, mine = (each.generate(**INPUTS, **DICT, eos_token_id=ends) for each in (model, generator))
    assert torch.equal(mine.sequences, theirs.sequences)
    length = mine.sequences.shape[1] - 1
    _assert_same_cache(mine.past_key_values, theirs.past_key_values, _grown(INPUTS["attention_mask"], length))


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_share_one_cache_between_generate_and_us(family: str) -> None:
    """Four turns, taken in turn by `generate` and by us, on one cache: what `generate` says on a cache of its own."""
    model, generator = _of(family)
    text, mask = INPUTS["input_ids"], INPUTS["attention_mask"]
    shared, own = None, None
    for turn in range(4):
        speaker = generator if turn % 2 == 0 else model
        theirs = model.generate(text, attention_mask=mask, **DICT, eos_token_id=ENDS, past_key_values=own)
        mine = speaker.generate(text, attention_mask=mask, **DICT, eos_token_id=ENDS, past_key_values=shared)
        assert torch.equal(mine.sequences, theirs.sequences)
        if shared is not None:
            assert mine.past_key_values is shared
        own, shared = theirs.past_key_values, mine.past_key_values
        _assert_same_cache(shared, own, _grown(mask, mine.sequences.shape[1] - 1))
        text = torch.cat((mine.sequences, INPUTS["input_ids"][:, -3:]), 1)
        mask = _grown(mask, text.shape[1])


@pytest.mark.parametrize("batch", [slice(2, 3), slice(0, 4)], ids=["one", "padded"])
def test_new_tokens_alone_behind_a_cache(model: Any, generator: SpeculativeGenerator, batch: slice) -> None:
    first = {name: value[batch] for name, value in INPUTS.items()}
    held = model.generate(**first, **DICT).past_key_values
    new = torch.tensor([[7, 20, 9]]).expand(len(first["input_ids"]), 3)
    mask = _grown(first["attention_mask"], held.get_seq_length() + 3)
    options = {**DICT, "attention_mask": mask, "output_scores": True}
    theirs = model.generate(new, **options, past_key_values=copy.deepcopy(held))
    mine = generator.generate(new, **options, past_key_values=held)
    assert torch.equal(mine.sequences, theirs.sequences)
    assert torch.allclose(torch.stack(mine.scores), torch.stack(theirs.scores), rtol=1e-5, atol=1e-4)
    _assert_same_cache(mine.past_key_values, theirs.past_key_values, _grown(mask, theirs.past_key_values.get_seq_length()))
    assert generator.stats is not None
    assert generator.stats.drafted > 0


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_an_empty_cache_is_filled_in_place(model: Any, generator: SpeculativeGenerator, kind: Any) -> None:
    mine, theirs = (DynamicCache() if kind is DynamicCache else StaticCache(model.config, max_cache_len=40) for _ in range(2))
    options: dict[str, Any] = {**ONE, "max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(
        generator.generate(**options, past_key_values=mine), model.generate(**options, past_key_values=theirs, disable_compile=True)
    )
    assert int(mine.get_seq_length()) == int(theirs.get_seq_length()) == 13 + NEW
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        assert a.keys.shape == b.keys.shape
        assert torch.allclose(a.keys, b.keys, rtol=1e-5, atol=1e-5)
        assert torch.allclose(a.values, b.values, rtol=1e-5, atol=1e-5)


def test_caches_that_do_not_fit_are_refused_by_name(model: Any, generator: SpeculativeGenerator) -> None:
    held = model.generate(**ONE, **DICT).past_key_values
    before = held.layers[0].keys.clone()
    static = StaticCache(model.config, max_cache_len=40)
    model.generate(**ONE, max_new_tokens=4, past_key_values=static, disable_compile=True)
    refused = [
        (ONE, held, "one token or more"),
        (ONE, static, "StaticCache that holds"),
        ({"input_ids": torch.ones(2, 40, dtype=torch.long)}, held, "this batch"),
        ({"input_ids": torch.ones(1, 40, dtype=torch.long)}, DynamicCache([(torch.ones(1, 2, 3, 8),) * 2]), "1 layers"),
    ]
    for inputs, cache, names in refused:
        with pytest.raises(InvalidRequestError, match=names):
            generator.generate(**inputs, max_new_tokens=2, do_sample=False, past_key_values=cache)
    assert torch.equal(held.layers[0].keys, before)


@pytest.mark.parametrize("past", [False, True], ids=["fresh", "continued"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_attentions(family: str, past: bool) -> None:
    model: Any = tiny_model(family)
    model.set_attn_implementation("eager")
    generator = generator_of(model)
    text, mask, caches = INPUTS["input_ids"], INPUTS["attention_mask"], [None, None]
    if past:
        begun = model.generate(**INPUTS, **DICT)
        text = torch.cat((begun.sequences, text[:, -3:]), 1)
        mask, caches = _grown(mask, text.shape[1]), [begun.past_key_values, copy.deepcopy(begun.past_key_values)]
    options: dict[str, Any] = {**DICT, "attention_mask": mask, "output_hidden_states": True, "output_attentions": True}
    theirs, mine = (e.generate(text, **options, past_key_values=c) for e, c in zip((model, generator), caches, strict=True))
    assert torch.equal(mine.sequences, theirs.sequences)
    # What a pad sees, and what is seen of it, says nothing.
    shown = mask[:, -theirs.hidden_states[0][0].shape[1] :].bool()
    for name in ("hidden_states", "attentions"):
        ours, hf = getattr(mine, name), getattr(theirs, name)
        assert len(ours) == len(hf) == NEW
        for step, (one, other) in enumerate(zip(ours, hf, strict=True)):
            for a, b in zip(one, other, strict=True):
                assert a.shape == b.shape
                live = shown if step == 0 else torch.ones_like(shown[:, :1])
                rows = live[:, :, None] if name == "hidden_states" else live[:, None, :, None]
                assert float(torch.where(rows, a - b, 0).abs().max() / b.abs().max()) < 1e-4


class _Grammar(LogitsProcessor):
    """Allows words of one to four letters and then a space: a machine per request, moved on by the last token of each call."""

    def __init__(self) -> None:
        self.letters: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        masked = torch.full_like(scores, -torch.inf)
        for request, text in enumerate(input_ids.tolist()):
            so_far = self.letters.get(request, -1)
            self.letters[request] = so_far = 0 if so_far < 0 or text[-1] < 10 else so_far + 1
            begin, end = (10 if so_far == 0 else 3, VOCABULARY if so_far < 4 else 10)
            masked[request, begin:end] = scores[request, begin:end]
        return masked


class _Pure(LogitsProcessor):
    """Depends on its arguments alone."""

    def __init__(self, shift: int = 3, **attributes: Any) -> None:
        self.shift, self.table = shift, torch.arange(VOCABULARY)
        vars(self).update(attributes)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + 3.0 * (self.table == (input_ids[:, -1:] + self.shift) % VOCABULARY)


class _Later(_Pure):
    """Changes itself in a later call, when it is too late to know."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > 17:
            self.shift += 1
        return super().__call__(input_ids, scores)


@pytest.mark.parametrize("inputs", [ONE, INPUTS], ids=["one", "batch"])
@pytest.mark.parametrize("make", [Counting, _Grammar])
def test_a_processor_that_changes_itself_is_called_once_a_step(
    generator: SpeculativeGenerator, make: Callable[[], LogitsProcessor], inputs: dict[str, Tensor]
) -> None:
    options: dict[str, Any] = {**inputs, "max_new_tokens": NEW, "do_sample": False}
    theirs = generator.target.generate(**options, logits_processor=[make()])  # type: ignore[operator]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mine = generator.generate(**options, logits_processor=[make()])
    assert torch.equal(mine, theirs)
    assert sum("keeps state" in str(w.message) for w in caught) == 1
    assert generator.stats is not None
    assert generator.stats.drafted == 0


def test_a_pure_processor_is_speculated_with(generator: SpeculativeGenerator) -> None:
    options: dict[str, Any] = {**INPUTS, "max_new_tokens": NEW, "do_sample": False}
    theirs = generator.target.generate(**options, logits_processor=[_Pure()])  # type: ignore[operator]
    for attributes in ({}, {"stateful": False}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mine = generator.generate(**options, logits_processor=[_Pure(**attributes)])
        assert torch.equal(mine, theirs)
        assert generator.stats is not None
        assert generator.stats.accepted > 0
        assert generator.stats.history[0].drafted == ((0,) * 4 if not attributes else (2,) * 4)


def test_a_processor_that_turns_out_to_keep_state_is_an_error(generator: SpeculativeGenerator) -> None:
    options: dict[str, Any] = {**ONE, "max_new_tokens": NEW, "do_sample": False}
    with pytest.raises(InvalidRequestError, match="_Later changed"):
        generator.generate(**options, logits_processor=[_Later()])
    theirs = generator.target.generate(**options, logits_processor=[_Later()])  # type: ignore[operator]
    with pytest.warns(UserWarning, match="keeps state"):
        assert torch.equal(generator.generate(**options, logits_processor=[_Later(stateful=True)]), theirs)


@pytest.mark.slow
def test_threads_and_generators_share_a_target(model: Any, generator: SpeculativeGenerator) -> None:
    other = SpeculativeGenerator(model, "suffix", planner=2)
    calls = [(each, INPUTS["input_ids"][2:3, start:]) for each in (generator, other) for start in (0, 3, 6)]
    expected = [model.generate(ids, max_new_tokens=NEW, do_sample=False) for _, ids in calls]
    said: dict[int, list[Tensor]] = {i: [] for i in range(len(calls))}

    def speak(i: int) -> None:
        for _ in range(3):
            said[i].append(calls[i][0].generate(calls[i][1], max_new_tokens=NEW, do_sample=False))

    threads = [threading.Thread(target=speak, args=(i,)) for i in said]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(said[i]) == 3 and all(torch.equal(one, expected[i]) for one in said[i]) for i in said)


def test_a_call_within_its_own_call_is_refused(generator: SpeculativeGenerator) -> None:
    def again(batch: int, text: Tensor) -> list[int]:
        generator.generate(ONE["input_ids"], max_new_tokens=1)
        return [3]

    with pytest.raises(InvalidRequestError, match="within its own call"):
        generator.generate(**ONE, max_new_tokens=2, prefix_allowed_tokens_fn=again)
    assert generator.generate(**ONE, max_new_tokens=2, do_sample=False).shape == (1, 16)


@pytest.mark.parametrize("drafter", ["model", "suffix", "recycling", "retrieval"])
def test_inference_mode_comes_and_goes(model: Any, drafter: str) -> None:
    options: dict[str, Any] = {**INPUTS, "max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(**options)
    with torch.inference_mode():
        generator = SpeculativeGenerator(model, noised(model, 0.1) if drafter == "model" else drafter, planner=2)
        assert torch.equal(generator.generate(**options), expected)
    assert torch.equal(generator.generate(**options), expected)
    with torch.inference_mode():
        assert torch.equal(model.generate(**options, custom_generate=generator.decode), expected)


@pytest.mark.slow
def test_a_compiled_target(model: Any) -> None:
    options: dict[str, Any] = {**INPUTS, "max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(**options)
    wrapped: Any = torch.compile(model, backend="eager")
    draft: Any = torch.compile(noised(model, 0.1), backend="eager")
    generator = SpeculativeGenerator(wrapped, draft, planner=2)
    assert generator.target is wrapped
    assert torch.equal(generator.generate(**options), expected)
    assert torch.equal(wrapped.generate(**options, custom_generate=generator.decode), expected)
    inside = copy.deepcopy(model)
    inside.compile(backend="eager")
    assert torch.equal(SpeculativeGenerator(inside, noised(model, 0.1), planner=2).generate(**options), expected)


def _adapted(model: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), config)
    adapted.add_adapter("other", config)
    return adapted.eval()


@pytest.mark.slow
def test_adapters_are_used_as_they_are_when_a_call_begins(model: Any) -> None:
    options: dict[str, Any] = {**INPUTS, "max_new_tokens": NEW, "do_sample": False}
    adapted = _adapted(model)
    generator = SpeculativeGenerator(adapted, noised(model, 0.1), planner=2)
    texts: list[Tensor] = []

    def check() -> None:
        texts.append(adapted.generate(**options))
        assert torch.equal(generator.generate(**options), texts[-1])

    check()
    with adapted.disable_adapter():
        check()
    adapted.set_adapter("other")
    check()
    adapted.add_adapter("third", LoraConfig(r=2, lora_alpha=64, target_modules=["o_proj"], init_lora_weights=False))
    adapted.set_adapter("third")
    check()
    adapted.set_adapter("default")
    adapted.merge_adapter()
    check()
    adapted.unmerge_adapter()
    check()
    assert not any(torch.equal(texts[0], text) for text in texts[1:4])
    assert torch.equal(texts[1], model.generate(**options))


def test_targets_that_cannot_be_served_are_refused(model: Any) -> None:
    learned = get_peft_model(copy.deepcopy(model), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UnsupportedModelError, match="learned vectors"):
        SpeculativeGenerator(learned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised: Any = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedModelError, match="dynamically quantised"):
        SpeculativeGenerator(quantised)
