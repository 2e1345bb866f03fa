"""Other engines beside ours: llama.cpp by its Python binding, vLLM and SGLang, each through an adapter and skipped where absent.

They round in their own ways, so their outputs are compared with `model.generate` as other kernels' are: a difference is right only
where rounding explains it. They tell neither of the prompt's part nor of rounds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from specdec.bench.measuring import measured
from specdec.bench.methods import Answer, Ask
from specdec.bench.records import MethodInfo
from specdec.errors import SpecDecError

Texts = list[list[int]]
# What is asked, to the new tokens of each request.
Decode = Callable[[Ask], Texts]


@dataclass(frozen=True, slots=True)
class Engine:
    """How an engine is reached. module: what is imported.  package: what is installed for it.  needs_file: a converted model.

    load: (module, model, dtype) to its decoding.
    """

    module: str
    package: str
    load: Callable[[Any, str, str], Decode]
    one_at_a_time: bool = False
    needs_file: bool = False


@dataclass
class Peer:
    """A `Method` that another engine runs. It loads when it is first asked, so that one that is absent costs nothing."""

    info: MethodInfo
    engine: Engine
    model: str
    dtype: str
    device: torch.device
    _decode: Decode | None = None
    _reason: str | None = None

    def why_not(self, batch: int, temperature: float) -> str:
        """Why it cannot run: absent, unable to load the model, or not made for it."""
        if self.engine.one_at_a_time and batch > 1:
            return f"{self.info.name} is asked for one request at a time"
        if self._reason is None:
            self._reason = self._loaded()
        return self._reason

    def run(self, ask: Ask) -> Answer:
        """See `Method.run`."""
        decode = self._decode
        assert decode is not None, "asked why not first"
        found = measured(lambda: decode(ask), self.device)
        tokens = tuple(map(tuple, found.out))
        made = sum(map(len, tokens))
        return Answer(tokens, found.seconds, 0.0, made, max(len(tokens[0]), 1), None, found.peak_mib, stolen=found.stolen)

    def _loaded(self) -> str:
        if self.engine.needs_file and not self.model:
            return f"it needs a converted model: --peer {self.info.name}=MODEL.gguf"
        try:
            module = importlib.import_module(self.engine.module)
        except ImportError as error:
            return f"{self.engine.package} is not installed here ({error})"
        try:
            self._decode = self.engine.load(module, self.model, self.dtype)
        except (RuntimeError, ValueError, OSError, TypeError, AttributeError) as error:
            # Another version, no device for it, or a model that it does not know: a reason to leave it out, not to stop.
            return f"{self.engine.package} is here and does not load the model: {type(error).__name__}: {error}"
        return ""


def _llama_cpp(module: Any, model: str, dtype: str) -> Decode:
    """By tokens, so that no text is cut and joined in between; the file's own precision holds, whatever dtype says."""
    llama = module.Llama(model_path=model, n_ctx=0, verbose=False)

    def decode(ask: Ask) -> Texts:
        llama.reset()
        llama.set_seed(ask.seed)
        stream = llama.generate(list(ask.prompts[0]), temp=ask.temperature, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0)
        return [[int(token) for token, _ in zip(stream, range(ask.new), strict=False)]]

    return decode


def _vllm(module: Any, model: str, dtype: str) -> Decode:
    llm = module.LLM(model=model, dtype=dtype, enable_prefix_caching=False)

    def decode(ask: Ask) -> Texts:
        how = module.SamplingParams(temperature=ask.temperature, max_tokens=ask.new, ignore_eos=True, seed=ask.seed)
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in ask.prompts]
        return [list(found.outputs[0].token_ids) for found in llm.generate(prompts, how, use_tqdm=False)]

    return decode


def _sglang(module: Any, model: str, dtype: str) -> Decode:
    engine = module.Engine(model_path=model, dtype=dtype, disable_radix_cache=True)

    def decode(ask: Ask) -> Texts:
        how = {"temperature": ask.temperature, "max_new_tokens": ask.new, "ignore_eos": True}
        found = engine.generate(input_ids=[list(prompt) for prompt in ask.prompts], sampling_params=how)
        return [list(own["output_ids"]) for own in found]

    return decode


ENGINES = {
    "llama.cpp": Engine("llama_cpp", "llama-cpp-python", _llama_cpp, one_at_a_time=True, needs_file=True),
    "vllm": Engine("vllm", "vllm", _vllm),
    "sglang": Engine("sglang", "sglang", _sglang),
}


def peer(text: str, target: Any, path: str) -> Peer:
    """The engine of that name, written NAME or NAME=MODEL. path: the target's folder, which it loads by default.

    Raises SpecDecError for another name.
    """
    name, _, model = text.partition("=")
    if name not in ENGINES:
        raise SpecDecError(f"--peer {text}: there are {', '.join(ENGINES)}, each as NAME or NAME=MODEL")
    engine = ENGINES[name]
    source = model or ("" if engine.needs_file else path)
    info = MethodInfo(name, "peer", f"{engine.package}, its own kernels and settings", None)
    return Peer(info, engine, source, str(target.dtype).removeprefix("torch."), target.device)
