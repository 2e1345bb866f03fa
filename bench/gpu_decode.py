"""Stage `decode` of `specdec.bench.gpu`: tokens a second at batch 1, greedy, on real prompts.

The bundled pair enlarged to the shapes of Llama-3.1-8B and Llama-3.2-1B in bf16 (`specdec.bench.enlarge`): the cost is that
of the shapes, while the text, and so the acceptance, is that of a trained model of 11 million parameters and its draft.
Every number of this stage is to be read with that sentence. Methods rotate from prompt to prompt; end-of-sequence is ignored.
Outputs are compared first: with plain decoding token for token, and `generate`'s by the margin of `specdec.bench.margin`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec import FixedPlanner, RunnerOptions, SpeculativeGenerator, bundled_path
from specdec.bench.enlarge import LLAMA_1B, LLAMA_8B, Shape, enlarge
from specdec.bench.enlarge_heads import enlarge_heads
from specdec.bench.gpu_profile import per_round
from specdec.bench.gpu_store import Point, Setup, Store, Value, specdec_warnings
from specdec.bench.margin import explain
from specdec.bench.speed import Prompt, load_prompts
from specdec.bench.timing import rotation
from specdec.drafters.checkpoints import load_medusa, load_pard
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.pard import PardDrafter

HF, PLAIN = "transformers generate", "specdec, no drafter"
DRAFT, LOOKUP, SUFFIX = "specdec, draft model, 4 tokens", "specdec, prompt lookup, 8 tokens", "specdec, suffix lookup, 8 tokens"
MEDUSA, PARD = "specdec, Medusa, 4 heads of their own", "specdec, PARD, 6 tokens"
FUSED = ", layers compiled"
UNFUSED = (HF, PLAIN, DRAFT, LOOKUP, SUFFIX, MEDUSA, PARD)
METHODS = (*UNFUSED, *(name + FUSED for name in (PLAIN, DRAFT, LOOKUP, MEDUSA, PARD)))
NOTE = "bundled pair enlarged to Llama-3.1-8B and Llama-3.2-1B shapes: acceptance of an 11M target and its draft, cost of 8B and 1B"
SMALL_NOTE = "a smoke test in tiny shapes, no measurement"

_SMALL: Shape = {
    "hidden_size": 384,
    "intermediate_size": 896,
    "num_hidden_layers": 9,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8256,
}


def run(setup: Setup) -> Store:
    """Measure every method on every prompt; models are built when the first missing point asks for them."""
    store = Store("decode", setup)
    new, limit, repeats = (6, 1, 1) if setup.small else (128, 8, 3)
    tokenizer = AutoTokenizer.from_pretrained(bundled_path("target"))
    prompts, _ = load_prompts(None, tokenizer, limit, 384)
    by_length = sorted(prompts, key=lambda p: len(p.ids))
    bench = _Bench(setup, new, (by_length[-1], by_length[0]))
    methods = UNFUSED if setup.small else METHODS
    for turn in range(repeats * len(prompts)):
        repeat, index = divmod(turn, len(prompts))
        for name in rotation(list(methods), turn):
            settings: dict[str, Value] = {"method": name, "prompt": index, "repeat": repeat, "new_tokens": new}
            store.measure(settings, partial(bench.point, name, prompts[index], repeat == 0))
    for name in methods[1:]:
        store.measure({"method": name, "profiled": True}, partial(bench.waits, name, by_length[0]))
    return store


_LOOKUP_PLANNER = FixedPlanner(nodes=8, depth=8, width=2)
_PLANNERS = {LOOKUP: _LOOKUP_PLANNER, SUFFIX: _LOOKUP_PLANNER, PARD: FixedPlanner(nodes=6, depth=6)}

Method = Callable[[Prompt], tuple[list[int], Any]]


class _Bench:
    """The enlarged pair and every method over it; each is warmed up before its first timed run."""

    def __init__(self, setup: Setup, new: int, warm_up: tuple[Prompt, ...]) -> None:
        """warm_up: the longest prompt, for room enough in the cache, and the shortest: captures go by length."""
        self._setup, self._new, self._warm_up = setup, new, warm_up
        self._target: Any = None
        self._draft: Any = None
        self._known = 0
        self._methods: dict[str, Method] = {}
        self._generators: dict[str, SpeculativeGenerator] = {}
        self._said: dict[str, list[str]] = {}
        self._plain: dict[Prompt, list[int]] = {}

    def point(self, name: str, prompt: Prompt, compare: bool) -> Point:
        """One timed run and what its output is against plain decoding. compare: explain a difference by its margin."""
        method, plain = self._method(name), self._reference(prompt)
        self._wait()
        began = perf_counter()
        tokens, stats = method(prompt)
        self._wait()
        seconds = perf_counter() - began
        results: Point = {"tokens": len(tokens), "seconds": seconds, "prompt_tokens": len(prompt.ids)}
        results |= {"note": SMALL_NOTE if self._setup.small else NOTE}
        results |= {"same_as_plain": tokens == plain, "warned": "; ".join(dict.fromkeys(self._said[name]))}
        if tokens != plain and compare:
            results |= self._difference(prompt, plain, tokens)
        if stats is None:
            return results
        phases = {key: getattr(stats, key) for key in ("prefill_s", "draft_s", "target_s", "verify_s", "other_s")}
        return {**results, "rounds": stats.rounds, "drafted": stats.drafted, "accepted": stats.accepted, **phases}

    def waits(self, name: str, prompt: Prompt) -> Point:
        """What a round of this method waits for."""
        self._method(name)
        generator = self._generators[name]

        def run(tokens: int) -> int:
            ids, arguments = self._arguments(prompt)
            generator.generate(ids, **{**arguments, "max_new_tokens": tokens})
            return generator.stats.rounds if generator.stats is not None else 0

        return per_round(run, self._new // 3, self._new, self._setup.device)

    def _wait(self) -> None:
        if self._setup.device.type == "cuda":
            torch.cuda.synchronize()

    def _reference(self, prompt: Prompt) -> list[int]:
        if prompt not in self._plain:
            self._plain[prompt] = self._method(PLAIN)(prompt)[0]
        return self._plain[prompt]

    def _method(self, name: str) -> Method:
        """The method, built and warmed up when it is first asked for."""
        if self._target is None:
            self._load()
        if name not in self._methods:
            with specdec_warnings(self._said.setdefault(name, [])):
                method = self._make(name)
                for prompt in self._warm_up:
                    method(prompt)
            self._methods[name] = method
        return self._methods[name]

    def _load(self) -> None:
        dtype = torch.float32 if self._setup.small else torch.bfloat16
        self._shapes = (_SMALL, {**_SMALL, "num_hidden_layers": 3}) if self._setup.small else (LLAMA_8B, LLAMA_1B)
        pair = []
        for name, shape in zip(("target", "draft"), self._shapes, strict=True):
            model = AutoModelForCausalLM.from_pretrained(bundled_path(name), dtype=torch.float32)  # type: ignore[arg-type]
            model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
            pair.append(enlarge(model, shape, dtype=dtype, device=self._setup.device))
            self._known = model.config.vocab_size
        self._target, self._draft = pair

    def _make(self, name: str) -> Method:
        if name == HF:
            return self._generate
        options = RunnerOptions(compile="layers" if name.endswith(FUSED) else "off")
        plain = name.removesuffix(FUSED)
        planner = _PLANNERS.get(plain, FixedPlanner(nodes=4, depth=4))
        drafter = self._drafter(plain, options)
        self._generators[name] = SpeculativeGenerator(self._target, drafter, planner=planner, options=options)
        return partial(self._speculate, self._generators[name])

    def _drafter(self, name: str, options: RunnerOptions) -> Any:
        """The drafter of a method, at the size that it would have beside a target of 8B."""
        if name == DRAFT:
            return DraftModelDrafter(self._draft, options=options)
        if name == PARD:
            model, mask = load_pard(bundled_path("pard"), dtype=torch.float32)
            shape, dtype = self._shapes[1], self._target.dtype
            return PardDrafter(enlarge(model, shape, dtype=dtype, device=self._setup.device), mask, options=options)
        if name == MEDUSA:
            heads, _ = load_medusa(bundled_path("medusa"))
            return MedusaDrafter(enlarge_heads(heads, self._target))
        return {LOOKUP: "prompt-lookup", SUFFIX: "suffix"}.get(name)

    def _arguments(self, prompt: Prompt) -> tuple[torch.Tensor, dict[str, Any]]:
        ids = torch.tensor([prompt.ids], device=self._setup.device)
        return ids, {"attention_mask": torch.ones_like(ids), "max_new_tokens": self._new, "do_sample": False}

    def _generate(self, prompt: Prompt) -> tuple[list[int], Any]:
        ids, arguments = self._arguments(prompt)
        return self._target.generate(ids, **arguments)[0, ids.shape[1] :].tolist(), None

    def _speculate(self, generator: SpeculativeGenerator, prompt: Prompt) -> tuple[list[int], Any]:
        ids, arguments = self._arguments(prompt)
        return generator.generate(ids, **arguments)[0, ids.shape[1] :].tolist(), generator.stats

    def _difference(self, prompt: Prompt, plain: list[int], tokens: list[int]) -> Point:
        with known_tokens_only(self._target, self._known):
            found = explain(self._target, prompt.ids, plain, tokens)
        if found is None:
            return {"place": min(len(plain), len(tokens)), "within": False}
        return {"place": found.place, "gap": found.gap, "noise": found.noise, "within": found.within}


@contextmanager
def known_tokens_only(model: Any, known: int) -> Iterator[None]:
    """lm_head cut to the small model's tokens: the logits of new ones are huge, and so is their rounding, which is no noise."""
    whole = model.lm_head
    model.lm_head = nn.Linear(whole.in_features, known, bias=False, device="meta")
    model.lm_head.weight = nn.Parameter(whole.weight[:known], requires_grad=False)
    try:
        yield
    finally:
        model.lm_head = whole
