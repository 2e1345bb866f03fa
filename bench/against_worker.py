"""One side of a comparison of two checkouts: a process that loads specdec from a folder and decodes what it is told to.

Run as a file, so that it serves checkouts that do not have it; of specdec it uses what every version has. JSON lines: the first
on standard input says what to load, each further one is a call, and every line is answered by one on standard output.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any


def main() -> None:
    """Serve until standard input ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    setup = json.loads(sys.stdin.readline())
    run = _served(setup)
    say({"ready": setup["root"]})
    for line in sys.stdin:
        say(run(json.loads(line)))


def use_checkout(root: Path) -> None:
    """Make `specdec` the package of this checkout, without its other folders on the path, where they would hide packages."""
    folder = root / "specdec"
    spec = importlib.util.spec_from_file_location("specdec", folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None, "a location was given"
    assert spec.loader is not None, "of a file"
    module = importlib.util.module_from_spec(spec)
    sys.modules["specdec"] = module
    spec.loader.exec_module(module)


def _served(setup: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Calls by method. setup: root, target, dtype, methods (name to source, None without a drafter), planner, threads, slow."""
    use_checkout(Path(setup["root"]))
    import torch

    torch.set_num_threads(setup["threads"])
    from transformers import AutoModelForCausalLM

    target = AutoModelForCausalLM.from_pretrained(setup["target"], dtype=setup["dtype"] or "auto").eval()
    target.generation_config.eos_token_id, target.generation_config.pad_token_id = None, 0
    generators = {name: _generator(target, source, setup["planner"]) for name, source in setup["methods"].items()}
    ballast = _Ballast(setup["slow"])
    if setup["slow"]:
        for generator in generators.values():
            generator.engine.planner = _Slowed(generator.engine.planner, ballast)

    # As `timing.set_loaded_aside`, which an older checkout may lack.
    gc.collect()
    gc.freeze()

    def run(call: dict[str, Any]) -> dict[str, Any]:
        ids = torch.tensor([call["prompt"]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": call["new"]}
        began, busy = perf_counter(), thread_time()
        out = generators[call["method"]].generate(**inputs)
        ballast.rest(thread_time() - busy)
        times = {"seconds": perf_counter() - began, "busy": thread_time() - busy}
        return {"tokens": out[0, ids.shape[1] :].tolist(), **times}

    return run


def _generator(target: Any, source: str | None, planner: str | None) -> Any:
    """A generator of the checkout. source: a drafter's name or path, or "bundled:ROLE", which is the checkout's own."""
    from specdec import SpeculativeGenerator, bundled_path

    if source is not None and source.startswith("bundled:"):
        source = str(bundled_path(source.partition(":")[2]))  # type: ignore[arg-type]  # the checkout knows its roles
    chosen: dict[str, Any] = {} if planner is None else {"planner": planner}
    return SpeculativeGenerator(target, source, **chosen)


class _Ballast:
    """A planted slowdown: keeps the processor busy for a part of the time that the work took of it, and keeps account of it."""

    def __init__(self, part: float) -> None:
        self.part, self.burnt = part, 0.0

    def burn(self, worked: float) -> None:
        """Work for the part of so many seconds."""
        began = thread_time()
        while (passed := thread_time() - began) < self.part * worked:
            pass
        self.burnt += passed

    def rest(self, worked: float) -> None:
        """Burn what is left for a call that took so long, ballast included, and begin the next account."""
        left = self.part * (worked - self.burnt) - self.burnt
        self.burnt = 0.0
        if left > 0:
            self.burn(left / self.part)
            self.burnt = 0.0


class _Slowed:
    """A planner that burns time at the end of each round, where it does not see that itself."""

    def __init__(self, inner: Any, ballast: _Ballast) -> None:
        self.inner, self.ballast, self.post_draw = inner, ballast, inner.post_draw

    def plan(self, load: Any) -> Any:
        self.began = thread_time()
        return self.inner.plan(load)

    def select(self, draft: Any) -> Any:
        return self.inner.select(draft)

    def observe(self, stats: Any) -> None:
        self.inner.observe(stats)
        self.ballast.burn(thread_time() - self.began)


if __name__ == "__main__":
    main()
