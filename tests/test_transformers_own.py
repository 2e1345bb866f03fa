"""transformers' own tests of `generate`, taken from a checkout of its repository and run through the generator.

The environment variable TRANSFORMERS_CHECKOUT names the checkout; nothing of it is kept here. Its tests call `model.generate` of
tiny models that they build themselves; each such call goes through a SpeculativeGenerator. A case passes, or is listed below with
the reason for which it is refused.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import types
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationMixin, GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM, PreTrainedModel
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

import tests
from specdec.errors import InvalidRequestError
from specdec.generator import SpeculativeGenerator
from tests.support_models import VOCABULARY, family_config, noised

pytestmark = pytest.mark.nightly
CHECKOUT = os.environ.get("TRANSFORMERS_CHECKOUT")
CASES = Path(CHECKOUT or "none") / "tests" / "generation" / "test_utils.py"
MODELS: dict[str, Any] = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel, "mistral": MistralForCausalLM}

_BEAMS = "beam_(search|sample) is not supported"
_EMBEDDINGS = "inputs_embeds is not supported"
_OWN_SPECULATION = "is transformers' own speculation"
# What is refused, and the words of the refusal.
REFUSED: dict[str, str] = {
    "test_beam_search_generate": _BEAMS,
    "test_beam_search_generate_dict_output": _BEAMS,
    "test_beam_search_generate_dict_outputs_use_cache": _BEAMS,
    "test_beam_sample_generate": _BEAMS,
    "test_beam_sample_generate_dict_output": _BEAMS,
    "test_assisted_decoding_matches_greedy_search": _OWN_SPECULATION,
    "test_assisted_decoding_sample": _OWN_SPECULATION,
    "test_prompt_lookup_decoding_matches_greedy_search": _OWN_SPECULATION,
    "test_generate_from_random_inputs_embeds": _EMBEDDINGS,
    "test_generate_from_inputs_embeds": _EMBEDDINGS,
    "test_generate_from_inputs_embeds_with_static_cache": _EMBEDDINGS,
    "test_generate_continue_from_inputs_embeds": _EMBEDDINGS,
}
_COMPILES = "asserts that transformers compiled the model's own forward, which is not what runs"
# What asserts something else than the result, and why that does not hold here.
UNLIKE: dict[str, str] = {
    "test_generate_compile_model_forward_fullgraph": _COMPILES,
    "test_generate_compilation_all_outputs": _COMPILES,
    "test_static_cache_no_recompile_with_smaller_length": _COMPILES,
}


def _expand(cases: Any, **_: Any) -> Callable[[Any], Any]:
    """In place of `parameterized.expand`, which makes methods of other names: every case in one method."""
    listed = [case if isinstance(case, (list, tuple)) else (case,) for case in cases]

    def decorate(method: Any) -> Any:
        def every(self: Any) -> None:
            for case in listed:
                method(self, *case)

        return every

    return decorate


@pytest.fixture(scope="session")
def module(pytestconfig: pytest.Config) -> Any:
    """The checkout's file of tests. What it imports of the package `tests`, as newer ones do, is found in the checkout, too."""
    folder = CASES.parent.parent
    texts = [path.read_text() for path in (CASES, *folder.glob("*.py"), *folder.glob("exporters/*.py"))]
    for mark in sorted(set(re.findall(r"pytest\.mark\.(\w+)", "".join(texts)))):
        pytestconfig.addinivalue_line("markers", f"{mark}: one of transformers' own")
    with pytest.MonkeyPatch.context() as patch:
        stand_in = types.ModuleType("parameterized")
        stand_in.parameterized = types.SimpleNamespace(expand=_expand)  # type: ignore[attr-defined]
        stand_in.parameterized_class = lambda *_, **__: lambda kept: kept  # type: ignore[attr-defined]
        patch.setitem(sys.modules, "parameterized", stand_in)
        patch.setattr(tests, "__path__", [*tests.__path__, str(folder)])
        spec = importlib.util.spec_from_file_location("generation_cases_of_transformers", CASES)
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    return loaded


class _Tester:
    """What the cases ask of a model's tester: a configuration and inputs."""

    seq_length, batch_size = 7, 3

    def __init__(self, family: str) -> None:
        self.family = family

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = torch.randint(3, VOCABULARY, (self.batch_size, self.seq_length))
        # Windows as long as the texts, since the cases compare caches with the whole text's length.
        config = family_config(self.family)
        if getattr(config, "sliding_window", None) is not None:
            config.sliding_window = 64
        return config, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _cases(mixin: Any, family: str) -> Any:
    attributes = {
        "model_tester": _Tester(family),
        "all_generative_model_classes": (MODELS[family],),
        "all_model_classes": (MODELS[family],),
        "has_attentions": True,
        "is_encoder_decoder": False,
        "runTest": lambda self: None,
    }
    return type(f"Own{family}", (mixin, unittest.TestCase), attributes)()


def _names() -> list[str]:
    """The cases of the checkout, read without running it."""
    if not CASES.is_file():
        return ["none"]
    text = CASES.read_text()
    begin = text.index("class GenerationTesterMixin")
    lines = text[begin : text.index("\nclass ", begin)].splitlines()
    return sorted({line.split("(")[0].split()[1] for line in lines if line.startswith("    def test_")})


@pytest.fixture
def routed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every `generate` of a model goes through a generator with a draft of its own; counts the calls and the drafted tokens."""
    plain = GenerationMixin.generate
    calls = [0, 0]

    def generate(self: PreTrainedModel, *args: Any, custom_generate: Any = None, **kwargs: Any) -> Any:
        if custom_generate is not None:
            return plain(self, *args, custom_generate=custom_generate, **kwargs)  # type: ignore[arg-type]
        # A checkout may be older than the installed version, which has dropped the name of a cache.
        if kwargs.get("cache_implementation") not in (None, *ALL_CACHE_IMPLEMENTATIONS):
            del kwargs["cache_implementation"]
        generator = SpeculativeGenerator(self, noised(self, 0.05), planner=2)
        calls[0] += 1
        out = generator.generate(*args, **kwargs)
        calls[1] += generator.stats.drafted if generator.stats is not None else 0
        return out

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    return calls


@pytest.mark.skipif(not CASES.is_file(), reason="TRANSFORMERS_CHECKOUT names no checkout of transformers' repository")
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", _names())
def test_case(name: str, family: str, module: Any, routed: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    cases = _cases(module.GenerationTesterMixin, family)
    refusal: InvalidRequestError | None = None
    try:
        if name in UNLIKE:
            with pytest.raises(AssertionError):
                getattr(cases, name)()
        else:
            getattr(cases, name)()
    except InvalidRequestError as error:
        refusal = error
    except unittest.SkipTest as skipped:
        pytest.skip(f"skipped by transformers: {skipped}")
    # A case that does not come to call `generate` cannot be refused.
    refused = name in REFUSED and routed[0] > 0
    assert (refusal is not None) == refused, refusal
    assert refusal is None or re.search(REFUSED[name], str(refusal))
    with capsys.disabled():
        print(f"{name} [{family}]: {'refused' if refused else 'held'}, {routed[0]} calls, {routed[1]} tokens drafted")
