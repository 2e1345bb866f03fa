"""The baselines with a static cache, other engines, imitated acceptance, and energy: right outputs, or left out with the reason."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from specdec.bench import measuring
from specdec.bench.advise import advise
from specdec.bench.energy import meter_of
from specdec.bench.markdown import markdown
from specdec.bench.measuring import measured
from specdec.bench.methods import COMPILED, STATIC, Ask, Method, NamedDrafter, Selection, Static, make_methods
from specdec.bench.page import page
from specdec.bench.peers import peer
from specdec.bench.records import HF, PLAIN, MethodInfo, Results, Settings
from specdec.bench.suite import run_suite, this_machine
from specdec.bench.synthetic import Imitation, synthetic_methods
from specdec.bench.workloads import Prompt, Prompts
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.errors import SpecDecError
from tests.support_models import noised, prompts, tiny_model

NEW = 12
TEXTS = tuple(map(tuple, prompts((5, 9, 7))))
ASK = Ask(TEXTS[:1], NEW, 0.0, 0)


@pytest.fixture(scope="module")
def target() -> Any:
    model = tiny_model()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@pytest.fixture(scope="module")
def draft(target: Any) -> NamedDrafter:
    return NamedDrafter("draft model", "a path", DraftModelDrafter(noised(target, 0.3)))


def _run(target: Any, methods: tuple[Method, ...], store: Path, **changed: Any) -> Results:
    settings = replace(Settings("tiny", "float32", (1,), (0.0,), NEW, 1, 0), **changed)
    asked = Prompts(tuple(Prompt("a", "test", i, ids) for i, ids in enumerate(TEXTS, 1)), (), ())
    return run_suite(
        target, methods, asked, settings, this_machine("x"), store=store / "t.jsonl", resume=False, console=Console(quiet=True)
    )


def _status(results: Results) -> dict[str, str]:
    return {gate.method: gate.status for gate in results.gates}


def test_what_others_took_is_a_part_of_the_time_that_was_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([(100, 5), (200, 25), (200, 25), (200, 25), None, None])
    monkeypatch.setattr(measuring, "ticks", lambda: next(ticks))
    found = [measured(lambda: None, torch.device("cpu")).stolen for _ in range(3)]
    assert found == [0.2, None, None]


def test_a_static_cache_says_what_generate_says_at_every_batch_size(target: Any) -> None:
    hf, static, *_ = make_methods(target, (), Selection())
    assert static.info.name == STATIC
    for ask in (ASK, Ask(TEXTS, NEW, 0.0, 0)):
        own = static.run(ask)
        assert own.tokens == hf.run(ask).tokens
        assert own.forwards == NEW - 1
        assert 0 < own.prefill_s < own.seconds
    assert not target._forward_hooks


def test_a_static_caches_first_call_of_a_size_is_not_the_one_that_is_timed(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    inner = target.generate
    monkeypatch.setattr(target, "generate", lambda *a, **k: calls.append(1) or inner(*a, **k), raising=False)
    static = Static(target, MethodInfo(STATIC, "transformers", ""))
    counts = []
    for ask in (ASK, ASK, Ask(TEXTS[:2], NEW, 0.0, 0), Ask((TEXTS[0] * 30,), NEW, 0.0, 0)):
        static.run(ask)
        counts.append(len(calls))
    assert counts == [2, 3, 5, 7]


def test_where_compiling_fails_the_baseline_is_left_out_with_the_reason(
    target: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inner = target.generate

    def generate(*args: Any, **more: Any) -> Any:
        if "compile_config" in more:
            raise RuntimeError("no C++ compiler was found\nand more of it")
        return inner(*args, **more)

    monkeypatch.setattr(target, "generate", generate, raising=False)
    results = _run(target, make_methods(target, (), Selection(compiled=True)), tmp_path)
    gate = next(gate for gate in results.gates if gate.method == COMPILED)
    assert (gate.status, gate.checked) == ("unavailable", 0)
    assert gate.reason.endswith("RuntimeError: no C++ compiler was found")
    assert _status(results)[STATIC] == _status(results)[PLAIN] == "exact"


@pytest.mark.nightly
def test_a_compiled_model_says_what_generate_says(target: Any) -> None:
    hf, _, compiled, *_ = make_methods(target, (), Selection(compiled=True))
    assert compiled.why_not(1, 0.0) == ""
    assert compiled.run(ASK).tokens == hf.run(ASK).tokens


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
def test_an_imitation_is_right_as_often_as_it_is_told_and_outputs_stay(
    target: Any, draft: NamedDrafter, rate: float, tmp_path: Path
) -> None:
    more = synthetic_methods(target, [draft], (rate,), Selection("heuristic"))
    results = _run(target, (*make_methods(target, (), Selection(static=False)), *more), tmp_path, max_new_tokens=60)
    name = f"synthetic {rate:g}: draft model"
    assert _status(results)[name] == "exact"
    row = results.row(name, 1, 0.0)
    assert row is not None
    assert row.per_position[0] == pytest.approx(rate, abs=0.15)
    if rate in (0.0, 1.0):
        assert row.acceptance_rate == row.per_position[0] == rate


def test_an_imitations_tokens_are_the_same_whatever_the_rounds(target: Any, draft: NamedDrafter) -> None:
    assert not isinstance(draft.drafter, str)
    first, again = (Imitation(draft.drafter, 0.5, seed=1)._spoilt(range(400), 0, 1000) for _ in range(2))
    right = sum(token == i for i, token in enumerate(first))
    assert first == again
    assert 160 < right < 240
    assert Imitation(draft.drafter, 0.5, seed=2)._spoilt(range(400), 0, 1000) != first


def test_imitations_stand_apart_from_real_numbers(target: Any, draft: NamedDrafter, tmp_path: Path) -> None:
    more = synthetic_methods(target, [draft], (1.0,), Selection("heuristic"))
    results = _run(target, (*make_methods(target, [draft], Selection(static=False)), *more), tmp_path, temperatures=(0.0, 1.0))
    name = more[0].info.name
    assert results.is_synthetic(name)
    text, (head, _, tail) = page(results), markdown(results).partition("**Synthetic acceptance**")
    assert name not in head
    assert name in tail.split("## ")[0]
    assert name not in text.partition("<h2>Synthetic")[0]
    assert name in text.partition("<h2>Synthetic")[2]
    assert all(name not in (own.method, *own.why, *own.by_task) for own in advise(results))
    assert "greedily only" in next(g.reason for g in results.gates if (g.method, g.temperature) == (name, 1.0))


def test_a_rate_that_is_none_and_nothing_to_imitate_are_refused(target: Any, draft: NamedDrafter) -> None:
    with pytest.raises(SpecDecError, match="from 0 to 1"):
        synthetic_methods(target, [draft], (1.5,), Selection())
    with pytest.raises(SpecDecError, match="there is none"):
        synthetic_methods(target, [NamedDrafter("suffix", "suffix", "suffix")], (0.5,), Selection())


def _greedy(target: Any, prompt: Any) -> Iterator[int]:
    ids = list(prompt)
    while True:
        ids.append(int(target(torch.tensor([ids])).logits[0, -1].argmax()))
        yield ids[-1]


@pytest.fixture
def engines(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules with the three engines' interfaces, which decode with the target."""

    class Llama:
        def __init__(self, model_path: str, n_ctx: int, verbose: bool) -> None:
            if not Path(model_path).exists():
                raise ValueError(f"Model path does not exist: {model_path}")

        def reset(self) -> None: ...

        def set_seed(self, seed: int) -> None: ...

        def generate(self, tokens: list[int], **how: Any) -> Iterator[tuple[int, Any] | int]:
            return _greedy(target, tokens)

    def vllm_generate(prompts: list[Any], how: Any, use_tqdm: bool) -> list[Any]:
        rows = [[t for t, _ in zip(_greedy(target, p["prompt_token_ids"]), range(how.max_tokens), strict=False)] for p in prompts]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=row)]) for row in rows]

    def sglang_generate(input_ids: list[list[int]], sampling_params: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"output_ids": [0] * sampling_params["max_new_tokens"]} for _ in input_ids]

    vllm = SimpleNamespace(LLM=lambda **how: SimpleNamespace(generate=vllm_generate), SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))  # type: ignore[arg-type]  # stands for a module
    monkeypatch.setitem(sys.modules, "vllm", vllm)  # type: ignore[arg-type]
    sglang = SimpleNamespace(Engine=lambda **how: SimpleNamespace(generate=sglang_generate))
    monkeypatch.setitem(sys.modules, "sglang", sglang)  # type: ignore[arg-type]


@pytest.mark.usefixtures("engines")
def test_other_engines_are_compared_with_generate_before_their_times_count(target: Any, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    peers = [peer(text, target, "a folder") for text in (f"llama.cpp={tmp_path}/model.gguf", "vllm", "sglang")]
    results = _run(target, (*make_methods(target, (), Selection(static=False)), *peers), tmp_path)
    status = _status(results)
    assert status["llama.cpp"] == status["vllm"] == "exact"
    assert status["sglang"] == "refused"
    assert results.row("vllm", 1, 0.0) is not None
    assert results.row("sglang", 1, 0.0) is None
    assert "one request at a time" in peers[0].why_not(2, 0.0)


@pytest.mark.usefixtures("engines")
def test_an_engine_that_cannot_load_the_model_is_left_out_with_the_reason(target: Any) -> None:
    assert "Model path does not exist: gone.gguf" in peer("llama.cpp=gone.gguf", target, "a folder").why_not(1, 0.0)
    assert "--peer llama.cpp=MODEL.gguf" in peer("llama.cpp", target, "a folder").why_not(1, 0.0)


def test_an_engine_that_is_not_installed_is_left_out_with_the_reason(
    target: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # type: ignore[arg-type]  # so that importing it fails
    results = _run(target, (*make_methods(target, (), Selection(static=False)), peer("vllm", target, "a folder")), tmp_path)
    gate = next(gate for gate in results.gates if gate.method == "vllm")
    assert gate.status == "unavailable"
    assert gate.reason.startswith("vllm is not installed here")
    assert not [trial for trial in results.trials if trial.method == "vllm"]
    with pytest.raises(SpecDecError, match=r"there are llama\.cpp, vllm, sglang"):
        peer("other", target, "a folder")


def _package(folder: Path, name: str, used: int, span: int = 1000) -> Path:
    package = folder / name
    package.mkdir()
    (package / "energy_uj").write_text(f"{used}\n")
    (package / "max_energy_range_uj").write_text(f"{span}\n")
    return package


def test_energy_is_the_packages_sum_and_counters_may_begin_again(tmp_path: Path) -> None:
    first, second = (_package(tmp_path, f"intel-rapl:{i}", 900) for i in range(2))
    _package(tmp_path, "intel-rapl:0:0", 5)
    meter = meter_of(torch.device("cpu"), rapl=tmp_path)
    assert meter is not None

    def work() -> None:
        (first / "energy_uj").write_text("950")
        (second / "energy_uj").write_text("20")

    assert measured(work, torch.device("cpu"), meter).energy_j == pytest.approx((50 + 120) / 1e6)
    assert measured(lambda: None, torch.device("cpu"), meter).energy_j == 0


def test_without_a_counter_there_is_no_energy(tmp_path: Path) -> None:
    package = _package(tmp_path, "intel-rapl:0", 1)
    (package / "energy_uj").write_text("not a number")
    assert meter_of(torch.device("cpu"), rapl=tmp_path) is None
    assert measured(lambda: None, torch.device("cpu"), None).energy_j is None


def test_a_gpus_own_counter_is_read_by_its_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([0, 1500, 4000])
    asked = []
    library = SimpleNamespace(
        NVMLError=ValueError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: asked.append(name) or name,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(used),
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"id-{index}"))
    meter = meter_of(torch.device("cuda:1"))
    assert meter is not None
    assert -meter.joules() + meter.joules() == 2.5
    assert asked == ["GPU-id-1"]
    monkeypatch.setitem(sys.modules, "pynvml", None)  # type: ignore[arg-type]
    assert meter_of(torch.device("cuda:0")) is None


def test_energy_reaches_the_rows(target: Any, tmp_path: Path) -> None:
    class Clock:
        total = 0.0

        def joules(self) -> float:
            self.total += 3.0
            return self.total

    methods = make_methods(target, (), Selection(static=False))
    for method in methods:
        method.meter = Clock()  # type: ignore[attr-defined]
    row = _run(target, methods, tmp_path).row(HF, 1, 0.0)
    assert row is not None
    assert row.joules_per_token == 3.0 / NEW
