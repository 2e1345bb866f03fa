"""The ways to decode that the suite times, behind one interface: transformers' own as baselines, and ours."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import nn

from specdec import SpeculativeGenerator
from specdec.bench.records import HF, PLAIN, MethodInfo
from specdec.drafters.base import Drafter

ASSISTED, LOOKUP = "HF assisted", "HF prompt lookup"
# What transformers' own documentation uses with prompt lookup.
_LOOKUP_TOKENS = 10
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

    forwards: of the target after the prompt.  stats: what speculation did, where the method tells.  peak_mib: see `Trial`.
    """

    tokens: tuple[tuple[int, ...], ...]
    seconds: float
    prefill_s: float
    decode_tokens: int
    forwards: int
    stats: Any = None
    peak_mib: float | None = None


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
    """`model.generate`, alone or with an assistant. more: further arguments of it."""

    target: Any
    info: MethodInfo
    more: dict[str, Any] = field(default_factory=dict)

    def why_not(self, batch: int, temperature: float) -> str:
        """Transformers assists one request at a time."""
        return "transformers assists one request at a time" if self.more and batch > 1 else ""

    def run(self, ask: Ask) -> Answer:
        """See `Method.run`. The prompt's part ends with the target's first forward."""
        inputs = _padded(ask.prompts, self.target.device)
        torch.manual_seed(ask.seed)
        with _watched(self.target) as marks:
            out, seconds, peak = measured(
                lambda: self.target.generate(**inputs, max_new_tokens=ask.new, **_sampling(ask.temperature), **self.more),
                self.target.device,
            )
        width = inputs["input_ids"].shape[1]
        tokens = tuple(map(tuple, out[:, width:].tolist()))
        prefill_s = seconds - (marks.ended - marks.first)
        return Answer(tokens, seconds, prefill_s, sum(map(len, tokens)) - len(tokens), max(marks.forwards - 1, 1), None, peak)


@dataclass
class Ours:
    """A `SpeculativeGenerator`; without a drafter it is plain decoding."""

    generator: SpeculativeGenerator
    info: MethodInfo

    def why_not(self, batch: int, temperature: float) -> str:
        """It runs at every batch size and temperature."""
        return ""

    def run(self, ask: Ask) -> Answer:
        """See `Method.run`."""
        device = self.generator.target.device
        inputs: dict[str, Any] = dict(_padded(ask.prompts, device))
        seed = ask.seed if ask.temperature else None
        out, seconds, peak = measured(
            lambda: self.generator.generate(**inputs, max_new_tokens=ask.new, seed=seed, **_sampling(ask.temperature)), device
        )
        stats = self.generator.stats
        assert stats is not None
        tokens = tuple(map(tuple, out[:, inputs["input_ids"].shape[1] :].tolist()))
        return Answer(tokens, seconds, stats.prefill_s, sum(map(len, tokens)), max(stats.rounds, 1), stats, peak)


def make_methods(target: Any, drafters: Sequence[NamedDrafter], *, planner: str | None, verifier: str) -> tuple[Method, ...]:
    """The baselines, plain decoding, and every drafter. planner: a name, None is the default one.  verifier: a rule's name.

    The target's and the assistants' generation settings are changed: no end-of-sequence token. Raises SpecDecError for drafters
    that do not fit the target.
    """
    for model in (target, *(own.assistant for own in drafters if own.assistant is not None)):
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    found: list[Method] = [Transformers(target, MethodInfo(HF, "transformers", "model.generate"))]
    for own in drafters:
        if own.assistant is not None:
            several = sum(other.assistant is not None for other in drafters) > 1
            name = f"{ASSISTED}, {own.name}" if several else ASSISTED
            about = "model.generate with assistant_model, transformers' own settings"
            info = MethodInfo(name, "transformers", about, own.source, None, _weights_mib(own.assistant, target))
            found.append(Transformers(target, info, {"assistant_model": own.assistant}))
    about = f"model.generate with prompt_lookup_num_tokens={_LOOKUP_TOKENS}"
    found.append(Transformers(target, MethodInfo(LOOKUP, "transformers", about), {"prompt_lookup_num_tokens": _LOOKUP_TOKENS}))
    found.append(Ours(SpeculativeGenerator(target), MethodInfo(PLAIN, "plain", "specdec's runtime without a drafter")))
    for own in drafters:
        generator = SpeculativeGenerator(target, own.drafter, planner=planner, verifier=verifier)
        about = "speculative decoding" + ("" if verifier == "auto" else f", verified by {verifier!r}")
        weights = _weights_mib(generator.engine.drafter, target)
        found.append(Ours(generator, MethodInfo(own.name, "drafter", about, own.source, planner or "default", weights)))
    return tuple(found)


def measured(run: Callable[[], Any], device: torch.device) -> tuple[Any, float, float | None]:
    """What a call gave, its seconds, and the most memory while it ran, in MiB: of the device, else of this process."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    else:
        _reset_peak()
    began = perf_counter()
    out = run()
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = perf_counter() - began
    return out, seconds, torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else _peak_mib()


def _reset_peak() -> None:
    """Linux forgets a process's peak when told so; elsewhere the peak is that of the whole run."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_mib() -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    found = next((line.split() for line in lines if line.startswith("VmHWM:")), None)
    if found is not None:
        return int(found[1]) / 1024
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return whole / 2**20 if sys.platform == "darwin" else whole / 1024


@dataclass
class _Marks:
    """Of the target during a call: when its first forward ended, when it was last watched, and how many there were."""

    first: float = 0.0
    ended: float = 0.0
    forwards: int = 0


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Marks]:
    """Counts a model's forwards; the model is left as it was found."""
    marks = _Marks()

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        marks.forwards += 1
        if marks.forwards == 1:
            parameter = next(module.parameters())
            if parameter.is_cuda:
                torch.cuda.synchronize(parameter.device)
            marks.first = perf_counter()

    handle = model.register_forward_hook(after)
    try:
        yield marks
    finally:
        marks.ended = perf_counter()
        handle.remove()


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
