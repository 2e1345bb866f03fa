"""The arguments of `model.generate`, and its results."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    T5Config,
    T5ForConditionalGeneration,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

from specdec.drafters.draft_model import DraftModelDrafter
from specdec.errors import CheckpointError, InvalidRequestError, SpecDecError, UnsupportedModelError
from specdec.generator import SpeculativeGenerator, SpeculativeOutput
from specdec.planner import FixedPlanner
from tests.support_generate import ENDS, INPUTS, Counting, generator_of
from tests.support_models import VOCABULARY, tiny_model

NEW = 24


class _ByRow(LogitsProcessor):
    """Forbids to row b the tokens that are b modulo the batch."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for b in range(len(scores)):
            scores[b, b :: len(scores)] = -torch.inf
        return scores


class _Stateful(Counting):
    """Says so itself."""

    stateful = True


class _LongEnough(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        places = torch.arange(len(input_ids))
        return (input_ids[:, -1] % 5 == places % 5) & (input_ids.shape[1] > 18)


class _Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.puts: list[Tensor] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        self.puts.append(value)

    def end(self) -> None:
        self.ends += 1


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def generator(model: Any) -> SpeculativeGenerator:
    return generator_of(model)


def _both(generator: SpeculativeGenerator, **options: Any) -> tuple[Any, Any]:
    options = {**INPUTS, "max_new_tokens": NEW, "do_sample": False, **options}
    return generator.target.generate(**options), generator.generate(**options)


_FREE = [t for t in range(3, VOCABULARY) if t % 3]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "repetition penalty": {"repetition_penalty": 1.8},
    "no repeated n-grams": {"no_repeat_ngram_size": 2},
    "min new tokens": {"eos_token_id": list(range(3, 40)), "min_new_tokens": 6},
    "bad words": {"bad_words_ids": [[t] for t in range(3, 20)] + [[30, 31]]},
    "sequence bias": {"sequence_bias": [[[t], 3.0] for t in range(40, 50)]},
    "forced end": {"forced_eos_token_id": 2, "eos_token_id": 2},
    "suppressed": {"suppress_tokens": list(range(3, 30)), "begin_suppress_tokens": [40, 41]},
    "end of sequence list": {"eos_token_id": ENDS},
    "prefix": {"prefix_allowed_tokens_fn": lambda b, text: _FREE[b::4]},
    "decay": {"exponential_decay_length_penalty": (4, 1.3), "eos_token_id": [5, 8, 13]},
    "encoder penalty": {"encoder_repetition_penalty": 1.4},
    "one request": {"input_ids": INPUTS["input_ids"][2:3], "attention_mask": None},
    "by row": {"logits_processor": [_ByRow()]},
    "own criterion": {"stopping_criteria": StoppingCriteriaList([_LongEnough()]), "eos_token_id": 2},
    "own criterion, no end": {"stopping_criteria": StoppingCriteriaList([_LongEnough()])},
    "several sequences": {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    "max length": {"max_new_tokens": None, "max_length": 20},
    "time is up": {"max_time": 1e-9},
    "guidance": {"guidance_scale": 1.7},
    "guidance from": {"guidance_scale": 1.7, "negative_prompt_ids": INPUTS["input_ids"][:, -3:]},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=2.5, seeding_scheme="selfhash")},
    "text watermark": {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 5], ngram_len=3), "eos_token_id": [5, 8, 13]},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "prefill in chunks": {"input_ids": INPUTS["input_ids"][2:3], "attention_mask": None, "prefill_chunk_size": 4},
}


# What leaves the text as it is; every other case has to change it, or it would show nothing.
_NEUTRAL = {"plain", "static cache", "no cache"}
# Their processors keep state, so that they are decoded step by step.
_LOCK_STEP = {"guidance", "guidance from", "text watermark"}


@pytest.fixture(scope="module")
def plain(model: Any) -> Tensor:
    text: Tensor = model.generate(**INPUTS, max_new_tokens=NEW, do_sample=False)
    return text


@pytest.mark.parametrize("case", CASES)
def test_sequences_equal_generate(generator: SpeculativeGenerator, plain: Tensor, case: str) -> None:
    theirs, mine = _both(generator, **CASES[case])
    assert torch.equal(theirs, plain) == (case in _NEUTRAL)
    assert generator.stats is not None
    assert (generator.stats.accepted > 0) == (case not in _LOCK_STEP)
    assert torch.equal(mine, theirs)
    assert mine.dtype == theirs.dtype
    assert mine.device == theirs.device


def test_through_custom_generate(model: Any, generator: SpeculativeGenerator) -> None:
    options = {**INPUTS, "max_new_tokens": NEW, "do_sample": False, "eos_token_id": [5, 8, 13]}
    streamer = _Recorder()
    mine = model.generate(**options, custom_generate=generator.decode, spec_streamer=streamer)
    theirs = model.generate(**options)
    assert torch.equal(mine, theirs)
    assert streamer.ends == 1
    with pytest.raises(InvalidRequestError, match="another model"):
        tiny_model(seed=5).generate(**options, custom_generate=generator.decode)  # type: ignore[operator]


@pytest.mark.parametrize("batch", [slice(2, 3), slice(0, 4)])
def test_a_streamer_is_given_what_hf_gives_it(generator: SpeculativeGenerator, batch: slice) -> None:
    inputs = {"input_ids": INPUTS["input_ids"][batch], "attention_mask": INPUTS["attention_mask"][batch]}
    theirs, mine = _Recorder(), _Recorder()
    options = {**inputs, "max_new_tokens": NEW, "do_sample": False, "eos_token_id": [5, 8, 13]}
    generator.target.generate(**options, streamer=theirs)
    generator.generate(**options, streamer=mine)
    assert mine.ends == theirs.ends == 1
    assert len(mine.puts) == len(theirs.puts)
    for one, other in zip(mine.puts, theirs.puts, strict=True):
        assert torch.equal(one, other)


def test_scores_and_logits_equal_generate(generator: SpeculativeGenerator) -> None:
    theirs, mine = _both(generator, return_dict_in_generate=True, output_scores=True, output_logits=True, repetition_penalty=1.5)
    assert isinstance(mine, SpeculativeOutput)
    assert torch.equal(mine.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        ours, hf = torch.stack(getattr(mine, name)), torch.stack(getattr(theirs, name))
        assert ours.dtype == hf.dtype
        assert float((ours - hf).abs().max() / hf.abs().max()) < 1e-5
    assert mine.speculation is generator.stats


def test_scores_of_finished_requests_are_zeros(generator: SpeculativeGenerator) -> None:
    ends: dict[str, Any] = {"eos_token_id": ENDS, "return_dict_in_generate": True, "output_scores": True}
    theirs, mine = _both(generator, **ends)
    new = mine.sequences[:, INPUTS["input_ids"].shape[1] :]
    is_end = torch.isin(new, torch.tensor(ENDS)).long()
    ended = is_end.cumsum(1) - is_end > 0
    assert ended.any()
    assert len(mine.scores) == len(theirs.scores) == new.shape[1]
    for step, (ours, hf) in enumerate(zip(mine.scores, theirs.scores, strict=True)):
        live = ~ended[:, step]
        assert torch.allclose(ours[live], hf[live], atol=1e-4, rtol=1e-5)
        assert not ours[~live].any()


def test_a_stateful_processor_decodes_in_lock_step_with_one_warning(generator: SpeculativeGenerator) -> None:
    options = {**INPUTS, "max_new_tokens": NEW, "do_sample": False, "eos_token_id": [5, 8, 13]}
    theirs = generator.target.generate(**options, logits_processor=[_Stateful()])
    processor = _Stateful()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mine = generator.generate(**options, logits_processor=[processor])
    assert torch.equal(mine, theirs)
    assert processor.calls == mine.shape[1] - INPUTS["input_ids"].shape[1]
    assert sum("keeps state" in str(w.message) for w in caught) == 1
    assert generator.stats is not None
    assert generator.stats.drafted == 0


def test_seeds(model: Any) -> None:
    options = {**INPUTS, "max_new_tokens": NEW, "do_sample": True}
    generator = generator_of(model)
    assert torch.equal(generator.generate(**options, seed=3), generator.generate(**options, seed=3))
    assert not torch.equal(generator.generate(**options, seed=3), generator.generate(**options, seed=4))
    assert torch.equal(
        SpeculativeGenerator(model, seed=3).generate(**options), SpeculativeGenerator(model).generate(**options, seed=3)
    )
    torch.manual_seed(1)
    first, second = generator.generate(**options), generator.generate(**options)
    torch.manual_seed(1)
    assert torch.equal(generator.generate(**options), first)
    assert not torch.equal(first, second)
    with pytest.raises(SpecDecError, match="seed"):
        generator.generate(**options, seed=-1)


def test_greedy_decoding_leaves_the_global_generator(generator: SpeculativeGenerator) -> None:
    before = torch.get_rng_state()
    generator.generate(**INPUTS, max_new_tokens=4, do_sample=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_stats_count_what_was_said(generator: SpeculativeGenerator) -> None:
    generator.generate(**INPUTS, max_new_tokens=NEW, do_sample=False)
    stats = generator.stats
    assert stats is not None
    assert len(stats.requests) == 4
    for request in stats.requests:
        assert request.emitted == NEW
        assert request.accepted == sum(request.accepted_at)
        assert request.mean_acceptance_length == NEW / request.rounds
        assert all(0 <= part <= 1 for part in request.acceptance_per_position)
        assert min(request.draft_s, request.target_s, request.verify_s, request.other_s) >= 0
    assert "rounds" in stats.summary()


_IDS = torch.tensor([[5, 6, 7, 8]])
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "beam"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
    "assistant": ({"assistant_model": nn.Linear(1, 1)}, "assistant_model"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 4, 32)}, "inputs_embeds"),
    "cache": ({"past_key_values": object()}, "past_key_values is a object"),
    "quantised cache": ({"cache_implementation": "quantized"}, "quantized"),
    "paged cache": ({"generation_config": GenerationConfig(cache_implementation="paged")}, "paged"),
    "healing": ({"token_healing": True}, "heal_tokens"),
    "gpus": ({"synced_gpus": True}, "synced_gpus"),
    "empty": ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "empty"),
    "only pads": ({"attention_mask": torch.zeros(1, 4, dtype=torch.long)}, "empty"),
    "long": ({"max_new_tokens": 1000}, "positions"),
    "token": ({"input_ids": torch.tensor([[5, VOCABULARY]])}, "vocabulary"),
    "right pads": ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "left"),
    "hole": ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "left"),
    "positions": ({"position_ids": torch.tensor([[3, 4, 5, 6]])}, "position_ids"),
    "strings": ({"stop_strings": ["a"]}, "tokenizer"),
    "custom": ({"custom_generate": lambda *a, **k: None}, "custom_generate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused(generator: SpeculativeGenerator, case: str) -> None:
    options, names = REFUSED[case]
    with pytest.raises(InvalidRequestError, match=names):
        generator.generate(**{"input_ids": _IDS, "max_new_tokens": 4, "do_sample": False, **options})


def test_input_ids_on_another_device_are_refused(generator: SpeculativeGenerator) -> None:
    config = GenerationConfig(max_length=9)
    with pytest.raises(InvalidRequestError, match="meta"):
        generator.decode(generator.target, _IDS.to("meta"), LogitsProcessorList(), StoppingCriteriaList(), config)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Tokens of one to three letters, so that stop strings begin and end inside tokens."""
    words = {"a" * (t % 3) + chr(97 + t % 7): t for t in range(21)}
    vocabulary = {**{f"<{t}>": t for t in range(VOCABULARY) if t not in words.values()}, **words}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("source", ["argument", "config", "model"])
def test_stop_strings_cut_inside_a_block(model: Any, generator: SpeculativeGenerator, source: str) -> None:
    tokenizer = _tokenizer()
    plain = generator.generate(**INPUTS, max_new_tokens=NEW, do_sample=False)[:, INPUTS["input_ids"].shape[1] :]
    strings = [tokenizer.convert_ids_to_tokens(int(row[7 + i]))[-3:] for i, row in enumerate(plain)]
    options: dict[str, Any] = {**INPUTS, "tokenizer": tokenizer, "pad_token_id": 0, "eos_token_id": 2}
    theirs = model.generate(**options, stop_strings=strings, max_new_tokens=NEW, do_sample=False)
    assert theirs.shape[1] < INPUTS["input_ids"].shape[1] + NEW or (theirs[:, -1] == 0).any()
    if source == "argument":
        mine = generator.generate(**options, stop_strings=strings, max_new_tokens=NEW, do_sample=False)
    elif source == "config":
        config = GenerationConfig(stop_strings=strings, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=2)
        mine = generator.generate(**INPUTS, tokenizer=tokenizer, generation_config=config)
        assert config.stop_strings == strings
    else:
        own = copy.deepcopy(model)
        own.generation_config.stop_strings = strings
        other = SpeculativeGenerator(own, model, tokenizer=tokenizer, planner=2)
        mine = other.generate(**INPUTS, pad_token_id=0, eos_token_id=2, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(mine, theirs)


def test_the_model_is_left_as_it_was(generator: SpeculativeGenerator) -> None:
    model: Any = generator.target
    before = (model.config.to_dict(), model.generation_config.to_dict(), sorted(vars(model)), model.forward)
    generator.generate(**INPUTS, max_new_tokens=4, do_sample=False)
    with pytest.raises(RuntimeError, match="from the user"):
        generator.generate(**INPUTS, max_new_tokens=4, prefix_allowed_tokens_fn=_raise)
    assert (model.config.to_dict(), model.generation_config.to_dict(), sorted(vars(model)), model.forward) == before
    theirs, mine = _both(generator)
    assert torch.equal(mine, theirs)


def _raise(batch: int, text: Tensor) -> list[int]:
    raise RuntimeError("from the user")


def test_construction(model: Any, tmp_path: Path) -> None:
    tiny = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        SpeculativeGenerator(T5ForConditionalGeneration(tiny))
    with pytest.raises(SpecDecError, match="drafter"):
        SpeculativeGenerator(model, 3)  # type: ignore[arg-type]
    with pytest.raises(SpecDecError, match="planner"):
        SpeculativeGenerator(model, planner="some")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="does not exist"):
        SpeculativeGenerator(model, str(tmp_path / "missing"))


def test_checkpoints(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "good")
    generator = SpeculativeGenerator.from_pretrained(tmp_path / "good", tmp_path / "good", planner=2)
    theirs, mine = _both(generator)
    assert torch.equal(mine, theirs)
    assert generator.tokenizer is None
    bad = tmp_path / "pickled"
    bad.mkdir()
    (bad / "config.json").write_text("{}")
    (bad / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickle"):
        SpeculativeGenerator.from_pretrained(bad)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        SpeculativeGenerator.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        SpeculativeGenerator.from_pretrained(tmp_path / "good", trust_remote_code=True)


def test_acceptance_per_position_counts_the_depths_of_a_tree_not_its_nodes() -> None:
    model: Any = tiny_model()
    drafter = DraftModelDrafter(model, shape="tree")
    generator = SpeculativeGenerator(model, drafter, planner=FixedPlanner(nodes=9, depth=2, width=3))
    generator.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=13, do_sample=False)
    (request,) = generator.stats.requests  # type: ignore[union-attr]
    assert request.acceptance_per_position == (1.0, 1.0)
    assert request.reached_at == request.accepted_at == (4, 4)
