"""Stage `step` of `specdec.bench.gpu`: what a forward over M rows costs against one over a single row.

Random weights in the shapes of known models, behind a prefix of 2,048 tokens, through the runner that decoding uses. `ms` is by
the clock from an idle device to an idle device, as a round pays it, launches and tables included; `device_ms` is between
events with the host ahead, which means something for captured forwards only.
"""

from __future__ import annotations

import gc
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch

from specdec import RunnerOptions, SpeculativeGenerator
from specdec.bench.enlarge import LLAMA_1B, LLAMA_8B, QWEN_4B, Shape, random_of_shape
from specdec.bench.gpu_store import DeviceTimer, Point, Setup, Store, Value, copy_point, nominal_bandwidth, specdec_warnings
from specdec.types import TokenTree

COPY = "copy"
EAGER, CAPTURED, COMPILED = "eager", "captured", "captured, layers compiled"
MODES = (EAGER, CAPTURED, COMPILED)
_MODELS: dict[str, Shape] = {"Llama-3.2-1B": LLAMA_1B, "Qwen3-4B": QWEN_4B, "Llama-3.1-8B": LLAMA_8B}
_TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 300,
}


def run(setup: Setup) -> Store:
    """Measure every shape eager, captured and compiled; a shape whose points are all there is not built."""
    store, timer = Store("step", setup), DeviceTimer(setup.device, setup.small)
    store.measure({"model": COPY}, lambda: copy_point(setup, timer))
    nodes, prefix = ((1, 5), 40) if setup.small else ((1, 4, 16, 32, 64), 2048)
    for known, shape in _MODELS.items():
        name = f"{known} made tiny" if setup.small else known
        modes = MODES[:2] if setup.small else MODES
        keys: list[dict[str, Value]] = [
            {"model": name, "prefix": prefix, "nodes": m, "forward": mode} for mode in modes for m in nodes
        ]
        missing = [key for key in keys if store.find(key) is None]
        if missing:
            _measure(store, timer, setup, {**shape, **(_TINY if setup.small else {})}, missing)
            gc.collect()
            torch.cuda.empty_cache()
    return store


def _measure(store: Store, timer: DeviceTimer, setup: Setup, shape: Shape, missing: list[dict[str, Value]]) -> None:
    bench = _Bench(shape, setup, timer)
    for settings in missing:
        store.measure(settings, partial(bench.point, settings))


class _Bench:
    """One model, built when its first point is measured, and the runner of the mode that was asked for last."""

    def __init__(self, shape: Shape, setup: Setup, timer: DeviceTimer) -> None:
        self._shape, self._setup, self._timer = shape, setup, timer
        self._model: Any = None
        self._runner: Any = None
        self._mode: str | None = None
        self._said: list[str] = []

    def point(self, settings: dict[str, Value]) -> Point:
        """Time scoring a tree; the options capture a bucket at its second forward."""
        nodes, prefix = settings["nodes"], settings["prefix"]
        assert isinstance(nodes, int)
        assert isinstance(prefix, int)
        tree = _binary_tree(nodes, self._setup.device)
        with specdec_warnings(self._said):
            runner = self._prepared(str(settings["forward"]), prefix)
            for _ in range(3):
                runner.score(tree)
        ms = self._clock(lambda: runner.score(tree))
        device_ms = self._timer(lambda: runner.score(tree))
        results: Point = {"ms": ms, "device_ms": device_ms, "attention": runner.backend}
        results["warned"] = "; ".join(dict.fromkeys(self._said))
        if nodes > 1:
            return results
        read = self._weight_bytes() + prefix * runner.cache.num_bytes // runner.cache.capacity
        nominal = nominal_bandwidth(torch.cuda.get_device_name(self._setup.device)) if self._setup.device.type == "cuda" else None
        rate = read / ms * 1e3
        return {**results, "bytes": read, "bytes_per_s": rate, "share_of_nominal": rate / nominal if nominal else None}

    def _prepared(self, mode: str, prefix: int) -> Any:
        if self._model is None:
            dtype = torch.float32 if self._setup.small else torch.bfloat16
            self._model = random_of_shape(self._shape, dtype=dtype, device=self._setup.device)
        if self._mode != mode:
            self._said.clear()
            compiled = "layers" if mode == COMPILED else "off"
            options = RunnerOptions(capture="off" if mode == EAGER else "auto", capture_after=2, compile=compiled)  # type: ignore[arg-type]
            self._runner = SpeculativeGenerator(self._model, options=options).engine.runner
            self._runner.begin(1, prefix + 256)
            generator = torch.Generator().manual_seed(0)
            self._runner.prefill([torch.randint(self._model.config.vocab_size, (prefix,), generator=generator).tolist()])
            self._mode = mode
        return self._runner

    def _clock(self, step: Any) -> float:
        """Median milliseconds from an idle device to an idle device."""
        cuda, taken = self._setup.device.type == "cuda", []
        for _ in range(2 if self._setup.small else 25):
            if cuda:
                torch.cuda.synchronize()
            began = perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
            taken.append((perf_counter() - began) * 1e3)
        return median(taken)

    def _weight_bytes(self) -> int:
        """Weights that a forward of one row reads: all but an embedding that is not lm_head too."""
        embedding, head = self._model.get_input_embeddings().weight, self._model.get_output_embeddings().weight
        total: int = sum(p.numel() * p.element_size() for p in self._model.parameters())
        return total - (0 if embedding is head else embedding.numel() * embedding.element_size())


def _binary_tree(nodes: int, device: torch.device) -> TokenTree:
    """Node n below node (n - 1) // 2; one node alone is plain decoding."""
    tokens = torch.arange(nodes, device=device)[None]
    parents = torch.tensor([[(n - 1) // 2 if n else -1 for n in range(nodes)]], device=device)
    return TokenTree(tokens, parents, (nodes,), is_chain=nodes == 1)
