"""The ways to decode that the suite times, behind one interface: transformers' own as baselines, and ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import nn
from transformers import CompileConfig, StaticCache

from specdec import SpeculativeGenerator
from specdec.bench.energy import Meter, meter_of
from specdec.bench.measuring import measured
from specdec.bench.records import HF, PLAIN, MethodInfo
from specdec.drafters.base import Drafter

ASSISTED, LOOKUP = "HF assisted", "HF prompt lookup"
STATIC, COMPILED = "HF static cache", "HF compiled"
# What transformers' own documentation uses with prompt lookup.
_LOOKUP_TOKENS = 10
# The shortest static cache.
_SHORTEST = 128
# How deep the weights of a drafter are looked for: its runner, the twin in it, the model in that.
_WEIGHTS_DEPTH = 4


@dataclass(frozen=True, slots=True)
class Ask:
    """A call to time. prompts: token ids of each request.  temperature: 0 decodes greedily.  seed: of sampling."""

    prompts: tuple[tuple[int, ...], ...]
    new: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call gave. tokens: new ones of each request.  decode_tokens: those of them made after `prefill_s`.

    forwards: of the target after the prompt.  stats: what speculation did, where the method tells.  The rest: see `Trial`.
    """

    tokens: tuple[tuple[int, ...], ...]
    seconds: float
    prefill_s: float
    decode_tokens: int
    forwards: int
    stats: Any = None
    peak_mib: float | None = None
    energy_j: float | None = None
    stolen: float | None = None


class Method(Protocol):
    """A way to decode."""

    @property
    def info(self) -> MethodInfo:
        """Its name and what it is."""

    def why_not(self, batch: int, temperature: float) -> str:
        """Why it cannot run at this batch size and temperature, in plain words; empty where it can."""

    def run(self, ask: Ask) -> Answer:
        """Decode, timed. No end-of-sequence token stops it, so that every method makes the same number of tokens."""


@dataclass(frozen=True, slots=True)
class NamedDrafter:
    """A drafter to try. source: name or path, for the report.  assistant: its model, where transformers can assist with it."""

    name: str
    source: str
    drafter: Drafter | str
    assistant: Any = None


@dataclass
class Transformers:
    """`model.generate`, alone or with an assistant. more: further arguments of it.  alone: one request at a time."""

    target: Any
    info: MethodInfo
    more: dict[str, Any] = field(default_factory=dict)
    alone: bool = False
    meter: Meter | None = None

    def why_not(self, batch: int, temperature: float) -> str:
        """Transformers assists one request at a time."""
        return "transformers assists one request at a time" if self.alone and batch > 1 else ""

    def arguments(self, ask: Ask) -> dict[str, Any]:
        """Of generate, beside the prompt and the sampling."""
        return self.more

    def run(self, ask: Ask) -> Answer:
        """See `Method.run`. The prompt's part ends with the target's first forward."""
        return self._called(ask, every=True)

    def _called(self, ask: Ask, *, every: bool) -> Answer:
        """every: count all forwards. To the compiler a model that is watched is another one, so compiled ones are not."""
        inputs, more = _padded(ask.prompts, self.target.device), self.arguments(ask)
        torch.manual_seed(ask.seed)
        with _watched(self.target, every=every) as marks:
            found = measured(
                lambda: self.target.generate(**inputs, max_new_tokens=ask.new, **_sampling(ask.temperature), **more),
                self.target.device,
                self.meter,
            )
        width = inputs["input_ids"].shape[1]
        tokens = tuple(map(tuple, found.out[:, width:].tolist()))
        prefill_s = found.seconds - (marks.ended - marks.first)
        decoded, forwards = sum(map(len, tokens)) - len(tokens), max(marks.forwards - 1, 1)
        return Answer(tokens, found.seconds, prefill_s, decoded, forwards, None, found.peak_mib, found.energy_j, found.stolen)


@dataclass
class Static(Transformers):
    """`model.generate` with a static cache, and with its forwards compiled where that works.

    The cache is as long as the next power of two, so that few sizes have to be compiled; the first call of each is not timed.
    """

    compiled: bool = False
    seen: set[tuple[int, int]] = field(default_factory=set)
    _reason: str | None = None

    def why_not(self, batch: int, temperature: float) -> str:
        """What the compiler says to a first try, once; that can take a minute."""
        if self._reason is None:
            self._reason = self._tried() if self.compiled else ""
        return self._reason

    def arguments(self, ask: Ask) -> dict[str, Any]:
        """A new cache each time, as generate itself makes one."""
        cache = StaticCache(config=self.target.config, max_cache_len=_room(ask))
        if not self.compiled:
            return {"past_key_values": cache, "disable_compile": True}
        how = CompileConfig()
        # Transformers compiles on a GPU by itself and elsewhere only when told so.
        how._compile_all_devices = True  # type: ignore[assignment]  # it is None until it is set
        return {"past_key_values": cache, "compile_config": how}

    def run(self, ask: Ask) -> Answer:
        """See `Method.run`. Every forward makes one token of each request."""
        size = (len(ask.prompts), _room(ask))
        if size not in self.seen:
            self.seen.add(size)
            self._called(ask, every=False)
        answer = self._called(ask, every=False)
        return replace(answer, forwards=max(len(answer.tokens[0]) - 1, 1))

    def _tried(self) -> str:
        try:
            self.run(Ask(((1, 2, 3, 4),), 4, 0.0, 0))
        except (RuntimeError, ImportError, OSError) as error:
            # A missing compiler, or a model that it cannot take: nothing of the user's, and no reason to stop the run.
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
            return f"torch.compile does not work here: {type(error).__name__}: {first}"
        return ""


@dataclass
class Ours:
    """A `SpeculativeGenerator`; without a drafter it is plain decoding."""

    generator: SpeculativeGenerator
    info: MethodInfo
    meter: Meter | None = None

    def why_not(self, batch: int, temperature: float) -> str:
        """It runs at every batch size and temperature."""
        return ""

    def run(self, ask: Ask) -> Answer:
        """See `Method.run`."""
        device = self.generator.target.device
        inputs: dict[str, Any] = dict(_padded(ask.prompts, device))
        seed = ask.seed if ask.temperature else None
        found = measured(
            lambda: self.generator.generate(**inputs, max_new_tokens=ask.new, seed=seed, **_sampling(ask.temperature)),
            device,
            self.meter,
        )
        stats = self.generator.stats
        assert stats is not None
        tokens = tuple(map(tuple, found.out[:, inputs["input_ids"].shape[1] :].tolist()))
        made, rounds = sum(map(len, tokens)), max(stats.rounds, 1)
        more = (found.peak_mib, found.energy_j, found.stolen)
        return Answer(tokens, found.seconds, stats.prefill_s, made, rounds, stats, *more)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which methods a run has beside the drafters. planner: a name, None is the default one.  verifier: a rule's name.

    static, compiled: the baselines with a static cache.
    """

    planner: str | None = None
    verifier: str = "auto"
    static: bool = True
    compiled: bool = False


def make_methods(target: Any, drafters: Sequence[NamedDrafter], selection: Selection) -> tuple[Method, ...]:
    """The baselines, plain decoding, and every drafter.

    The target's and the assistants' generation settings are changed: no end-of-sequence token. Raises SpecDecError for drafters
    that do not fit the target.
    """
    for model in (target, *(own.assistant for own in drafters if own.assistant is not None)):
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    meter = meter_of(target.device)
    plain = Ours(SpeculativeGenerator(target), MethodInfo(PLAIN, "plain", "specdec's runtime without a drafter"), meter)
    found: list[Method] = [*_baselines(target, drafters, selection, meter), plain]
    for own in drafters:
        generator = SpeculativeGenerator(target, own.drafter, planner=selection.planner, verifier=selection.verifier)
        about = "speculative decoding" + ("" if selection.verifier == "auto" else f", verified by {selection.verifier!r}")
        weights = _weights_mib(generator.engine.drafter, target)
        info = MethodInfo(own.name, "drafter", about, own.source, selection.planner or "default", weights)
        found.append(Ours(generator, info, meter))
    return tuple(found)


def _baselines(target: Any, drafters: Sequence[NamedDrafter], selection: Selection, meter: Meter | None) -> list[Method]:
    """Transformers' own ways."""
    found: list[Method] = [Transformers(target, MethodInfo(HF, "transformers", "model.generate"), meter=meter)]
    if selection.static:
        info = MethodInfo(STATIC, "transformers", "model.generate with a static cache, not compiled")
        found.append(Static(target, info, meter=meter))
    if selection.compiled:
        about = f"the same with torch.compile, in {CompileConfig().mode!r} mode; compiling is not timed"
        found.append(Static(target, MethodInfo(COMPILED, "transformers", about), meter=meter, compiled=True))
    for own in drafters:
        if own.assistant is not None:
            several = sum(other.assistant is not None for other in drafters) > 1
            name = f"{ASSISTED}, {own.name}" if several else ASSISTED
            about = "model.generate with assistant_model, transformers' own settings"
            info = MethodInfo(name, "transformers", about, own.source, None, _weights_mib(own.assistant, target))
            found.append(Transformers(target, info, {"assistant_model": own.assistant}, alone=True, meter=meter))
    info = MethodInfo(LOOKUP, "transformers", f"model.generate with prompt_lookup_num_tokens={_LOOKUP_TOKENS}")
    return [*found, Transformers(target, info, {"prompt_lookup_num_tokens": _LOOKUP_TOKENS}, alone=True, meter=meter)]


@dataclass
class _Marks:
    """Of the target during a call: when its first forward ended, when it was last watched, and how many there were."""

    first: float = 0.0
    ended: float = 0.0
    forwards: int = 0


@contextmanager
def _watched(model: nn.Module, *, every: bool) -> Iterator[_Marks]:
    """Counts a model's forwards, or sees the first one only; the model is left as it was found."""
    marks = _Marks()

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        marks.forwards += 1
        if marks.forwards == 1:
            parameter = next(module.parameters())
            if parameter.is_cuda:
                torch.cuda.synchronize(parameter.device)
            marks.first = perf_counter()
            if not every:
                handle.remove()

    handle = model.register_forward_hook(after)
    try:
        yield marks
    finally:
        marks.ended = perf_counter()
        handle.remove()


def _room(ask: Ask) -> int:
    """Tokens that a static cache holds for a call."""
    longest = max(map(len, ask.prompts)) + ask.new
    return max(_SHORTEST, 1 << (longest - 1).bit_length())


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """Prompts as a batch, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _sampling(temperature: float) -> dict[str, Any]:
    """Arguments of generate; top-k, which transformers would set by itself, is off."""
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}


def _weights_mib(holder: Any, target: nn.Module) -> float:
    """Memory of the weights that something holds beside the target's."""
    shared = {parameter.data_ptr() for parameter in target.parameters()}
    seen: dict[int, int] = {}
    _find_weights(holder, _WEIGHTS_DEPTH, seen)
    return sum(size for pointer, size in seen.items() if pointer not in shared) / 2**20


def _find_weights(holder: Any, depth: int, seen: dict[int, int]) -> None:
    if isinstance(holder, nn.Module):
        seen.update({p.data_ptr(): p.numel() * p.element_size() for p in holder.parameters()})
    elif depth > 0 and type(holder).__module__.startswith("specdec."):
        for value in getattr(holder, "__dict__", {}).values():
            _find_weights(value, depth - 1, seen)
