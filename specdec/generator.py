"""The public entry: `generate` of a transformers model, with speculation."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from specdec.bass import BassPlanner, HeuristicPlanner
from specdec.confidence import ConfidencePlanner
from specdec.drafters.base import Drafter
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.registry import FACTORIES, load_drafter, make_drafter
from specdec.drafters.several import SeveralDrafters
from specdec.engine import Call, Engine, Result
from specdec.errors import InvalidRequestError, SpecDecError
from specdec.goodput import GoodputPlanner
from specdec.loading import load_model, load_tokenizer
from specdec.metrics import SpeculationStats
from specdec.noise import Noise
from specdec.output import SpeculativeOutput as SpeculativeOutput
from specdec.output import asked_of, inner_values, output_of, padded
from specdec.past import Past, complete, fill, length_of, past_of
from specdec.planner import FixedPlanner, Planner
from specdec.processing import Processing
from specdec.request import (
    check_arguments,
    check_config,
    check_defaults,
    check_lengths,
    check_model_kwargs,
    check_prompts,
    mask_of,
    pad_token,
    prompts_of,
)
from specdec.runner import RunnerOptions
from specdec.stopping import Stopping
from specdec.streaming import StepStream
from specdec.targets import adapter_state, causal_lm, unwrapped

_PLANNERS: dict[str, Callable[[], Planner]] = {
    "goodput": GoodputPlanner,
    "confidence": ConfidencePlanner,
    "bass": BassPlanner,
    "heuristic": HeuristicPlanner,
}
# What a drafter may be given as.
OneDrafter = Drafter | nn.Module | str | Path


@dataclass(frozen=True, slots=True)
class _Extras:
    """What transformers does not hand to a callable."""

    streamer: BaseStreamer | None
    seed: int | None


class SpeculativeGenerator:
    """Generates what `target.generate` would, faster. The target is left as it was found.

    Several generators may share a target, and threads a generator: its calls then wait for each other. A target may be compiled by
    `torch.compile` or carry PEFT adapters; these are used in the state that they have when a call begins.
    stats: what speculation did in the last call, None before the first.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: OneDrafter | Sequence[OneDrafter] | Mapping[str, OneDrafter] | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        verifier: str = "auto",
        planner: Planner | int | str | None = None,
        seed: int | None = None,
        options: RunnerOptions | None = None,
    ) -> None:
        """drafter: a model, a checkpoint's path (draft model, Medusa heads, PARD), "prompt-lookup", "suffix", "retrieval",
        "recycling", a Drafter, or None for plain decoding. A list, tuple or dict by name of these: the planner's budget names the
        one that a round uses.

        tokenizer: used for stop strings.  verifier: a rule's name.  planner: how many tokens to draft each round, a Planner, or the
        name of one: "goodput" (the default), "confidence", "bass", "heuristic".  seed: makes sampling repeat; without one torch's
        global generator governs.  options: how the target's forwards are run, each fast way can be forced off there.
        Raises a SpecDecError when target, drafter and rule do not fit together.
        """
        self.target, self.tokenizer, self.seed = target, tokenizer, _checked_seed(seed)
        self._model, self._options = causal_lm(target), options
        # What is made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            drafter = as_drafter(drafter, self._model)
            self.engine = Engine(self._model, drafter, verifier, _as_planner(planner), options)
        self._adapters = adapter_state(self._model)
        self._lock, self._busy = threading.RLock(), False
        self.stats: SpeculationStats | None = None

    @classmethod
    def from_pretrained(
        cls,
        target: str | Path,
        drafter: OneDrafter | Sequence[OneDrafter] | Mapping[str, OneDrafter] | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        verifier: str = "auto",
        planner: Planner | int | str | None = None,
        seed: int | None = None,
        options: RunnerOptions | None = None,
        **kwargs: Any,
    ) -> SpeculativeGenerator:
        """A generator from checkpoints, safetensors only. dtype: None keeps the checkpoint's own.

        kwargs: for transformers' from_pretrained of the target. The network is used only for a hub name ("owner/name"),
        and not with local_files_only=True. Raises CheckpointError.
        """
        model = load_model(target, dtype=dtype, device=device, **kwargs)
        if tokenizer is None:
            where = {k: v for k, v in kwargs.items() if k in ("local_files_only", "revision", "cache_dir", "token")}
            tokenizer = load_tokenizer(target, **where)
        return cls(model, drafter, tokenizer=tokenizer, verifier=verifier, planner=planner, seed=seed, options=options)

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        streamer: BaseStreamer | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """What `target.generate` returns for the same arguments: LongTensor [B, length] or a `SpeculativeOutput`.

        kwargs: every argument of `generate`.  seed: for this call.  tokenizer: for stop strings; by default the
        generator's own.  past_key_values: a DynamicCache to go on from, filled in place as `generate` does it; `input_ids` are the
        whole text, or the new tokens alone where attention_mask covers both (drafters then know only these).
        Raises InvalidRequestError for what is not supported: other ways than greedy and sampling, other caches, embeddings as
        input.
        """
        check_arguments({"inputs": inputs, **kwargs})
        check_defaults(kwargs, generation_config, getattr(self._model, "generation_config", None))
        extras = _Extras(streamer, self.seed if seed is None else _checked_seed(seed))
        kwargs, generation_config = self._take_strings(kwargs, generation_config, tokenizer or self.tokenizer)

        def decode(model: PreTrainedModel, input_ids: Tensor, **prepared: Any) -> Any:
            return self._decode(input_ids, extras, **prepared)

        return self._model.generate(inputs, generation_config, custom_generate=decode, **kwargs)

    def decode(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        spec_streamer: BaseStreamer | None = None,
        seed: int | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """The decoding loop for `target.generate(..., custom_generate=generator.decode)`.

        transformers hands neither `streamer` nor `tokenizer` to a callable: pass `spec_streamer=` (a `streamer=` would
        be given the prompt and then nothing), and stop strings as a StopStringCriteria, or call `generate` here.
        """
        if model is not self._model:
            raise InvalidRequestError(
                f"this generator was built for another model than this {type(model).__name__}; build one for it"
            )
        extras = _Extras(spec_streamer, self.seed if seed is None else _checked_seed(seed))
        return self._decode(
            input_ids,
            extras,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **model_kwargs,
        )

    def _decode(
        self,
        input_ids: Tensor,
        extras: _Extras,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        check_config(generation_config)
        check_model_kwargs(model_kwargs)
        past_length = length_of(model_kwargs.get("past_key_values"))
        mask = mask_of(input_ids, model_kwargs.get("attention_mask"), past_length, getattr(generation_config, "_mask_length", None))
        prompts = self._prompts(input_ids, mask, model_kwargs.get("position_ids"))
        past = past_of(model_kwargs, generation_config, mask.shape[1], prompts, past_length)
        asked = asked_of(generation_config, input_ids, mask, tuple(spec.window for spec in self.engine.runner.specs))
        pad = pad_token(generation_config, stopping_criteria, len(prompts))
        rows = input_ids.tolist()
        stopping = Stopping(stopping_criteria, rows, pad=pad, device=input_ids.device)
        check_lengths(prompts, tuple(map(stopping.room, range(len(rows)))), self.engine.runner.max_positions)
        processing = Processing(logits_processor, rows, pad=pad, device=input_ids.device, watch=True)
        stream = StepStream(extras.streamer, input_ids, stopping, pad) if extras.streamer is not None else None
        emit = stream.emit if stream is not None else None
        call = _call(prompts, processing, stopping, generation_config, extras.seed, emit, past)
        with self._alone():
            result = self.engine.run(call)
            self.stats = result.stats
            sequences = padded(input_ids, result.tokens, pad, stopping.total())
            self._hand_over(past, result, prompts, sequences[:, input_ids.shape[1] :])
        if stream is not None:
            stream.end()
        if not generation_config.return_dict_in_generate:
            return sequences
        inner = inner_values(self._model, sequences, mask, past_length, asked) if asked is not None else {}
        return output_of(sequences, result, sequences.shape[1] - input_ids.shape[1], None if past is None else past.cache, inner)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One call at a time, with the target's adapters as they are now, and outside of inference mode."""
        with self._lock:
            if self._busy:
                raise InvalidRequestError(
                    "this generator was called from within its own call; build a second one on the same target"
                )
            self._busy = True
            try:
                with torch.inference_mode(False):
                    self._follow_adapters()
                    yield
            finally:
                self._busy = False

    def _follow_adapters(self) -> None:
        """Build the engine anew when adapters were set, merged, switched or added since: modules of the twin are copies."""
        state = adapter_state(self._model)
        if state != self._adapters:
            engine = self.engine
            self.engine = Engine(self._model, engine.drafter, engine.verifier, engine.planner, self._options)
            self._adapters = state

    def _hand_over(self, past: Past | None, result: Result, prompts: tuple[tuple[int, ...], ...], new: Tensor) -> None:
        """Fill the cache with the text but its last token, pads behind finished requests included. new: [B, steps]."""
        if past is None:
            return
        texts = [[*prompt, *own][:-1] for prompt, own in zip(prompts, new.tolist(), strict=True)]
        with torch.no_grad():
            fill(past, complete(self.engine.runner, result.past, texts), len(texts[0]) + past.pads[0])

    def _prompts(self, input_ids: Tensor, mask: Tensor, positions: Tensor | None) -> tuple[tuple[int, ...], ...]:
        runner = self.engine.runner
        if input_ids.device != runner.device:
            raise InvalidRequestError(f"input_ids are on {input_ids.device}, the target on {runner.device}; move them")
        prompts = prompts_of(input_ids, mask, positions)
        check_prompts(prompts, runner.vocabulary)
        return prompts

    def _take_strings(
        self, kwargs: dict[str, Any], config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> tuple[dict[str, Any], GenerationConfig | None]:
        """kwargs and config with stop strings made a criterion, as transformers would make it from the tokenizer."""
        defaults = getattr(self._model, "generation_config", None)
        sources = (config, defaults)
        given = [kwargs.get("stop_strings"), *(getattr(source, "stop_strings", None) for source in sources)]
        strings = next(filter(None, given), None)
        if not strings:
            return kwargs, config
        if tokenizer is None:
            raise InvalidRequestError("stop_strings need a tokenizer: give one to generate() or to SpeculativeGenerator")
        criteria = list(kwargs.get("stopping_criteria") or [])
        if not any(type(c) is StopStringCriteria for c in criteria):
            criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=strings))
        config = copy.deepcopy(config)
        if config is not None:
            config.stop_strings = None
        kwargs = {**kwargs, "stopping_criteria": StoppingCriteriaList(criteria)}
        kwargs.pop("stop_strings", None)
        if getattr(defaults, "stop_strings", None):
            kwargs["stop_strings"] = None
        return kwargs, config


def as_drafter(drafter: OneDrafter | Sequence[OneDrafter] | Mapping[str, OneDrafter] | None, target: nn.Module) -> Drafter | None:
    """A Drafter from whatever the user gave; a checkpoint is loaded with the target's device and its own dtype."""
    if drafter is None:
        return None
    if isinstance(drafter, Mapping):
        return SeveralDrafters({name: _as_part(part, target) for name, part in drafter.items()})
    if isinstance(drafter, (list, tuple)):
        return SeveralDrafters([_as_part(part, target) for part in drafter])
    if isinstance(drafter, str) and drafter in FACTORIES:
        return make_drafter(drafter)
    if isinstance(drafter, (str, Path)):
        return load_drafter(drafter, target)
    if isinstance(drafter, nn.Module):
        return DraftModelDrafter(unwrapped(drafter))
    if isinstance(drafter, Drafter):
        return drafter
    raise SpecDecError(
        f"drafter is a {type(drafter).__name__}; give a model, a path, one of {tuple(FACTORIES)}, a Drafter, "
        "a list or dict of these, or None"
    )


def _as_part(drafter: OneDrafter, target: nn.Module) -> Drafter:
    """One of several drafters."""
    part = as_drafter(drafter, target)
    if part is None:
        raise SpecDecError("None is among several drafters; leave it out, a budget of no nodes is plain decoding")
    return part


def _as_planner(planner: Planner | int | str | None) -> Planner:
    if planner is None:
        planner = "goodput"
    if isinstance(planner, str) and planner in _PLANNERS:
        return _PLANNERS[planner]()
    if isinstance(planner, int) and not isinstance(planner, bool):
        return FixedPlanner(nodes=planner, depth=max(planner, 1))
    if isinstance(planner, Planner):
        return planner
    came = repr(planner) if isinstance(planner, str) else f"a {type(planner).__name__}"
    raise SpecDecError(f"planner is {came}; give a Planner, a number of tokens to draft, or one of {tuple(_PLANNERS)}")


def _checked_seed(seed: int | None) -> int | None:
    if seed is None or (isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63):
        return seed
    raise SpecDecError(f"seed={seed!r}: give a whole number from 0 to 2**63 - 1")


def _noise(seed: int | None, sampling: bool) -> Noise:
    """Without a seed, one is drawn from torch's global generator; greedy decoding leaves that untouched."""
    if seed is None and sampling:
        seed = int(torch.randint(2**63 - 1, (1,)).item())
    return Noise(seed or 0)


def _call(
    prompts: tuple[tuple[int, ...], ...],
    processing: Processing,
    stopping: Stopping,
    config: GenerationConfig,
    seed: int | None,
    emit: Callable[[int, tuple[int, ...]], None] | None,
    past: Past | None,
) -> Call:
    sampling, returns_dict = bool(config.do_sample), bool(config.return_dict_in_generate)
    return Call(
        prompts=prompts,
        processing=processing,
        stopping=stopping,
        sampling=sampling,
        noise=_noise(seed, sampling),
        seeded=seed is not None,
        emit=emit,
        keep_scores=returns_dict and bool(config.output_scores),
        keep_logits=returns_dict and bool(config.output_logits),
        prefill_chunk=config.prefill_chunk_size,
        past=past,
        keep_past=past is not None,
    )
