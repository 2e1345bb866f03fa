"""Decoder layers under torch.compile: the same text, the user's model as it was."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from specdec.errors import UnsupportedModelError
from specdec.generator import SpeculativeGenerator
from specdec.planner import FixedPlanner
from specdec.runner import ModelRunner, RunnerOptions
from tests.support_models import left_padded, prompts, tiny_model


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_layers_give_the_same_text() -> None:
    model: Any = tiny_model("llama")
    inputs = left_padded(prompts((9, 4)))
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    options = RunnerOptions(compile="layers", pack="off", row_invariant=False)
    generator = SpeculativeGenerator(model, "prompt-lookup", planner=FixedPlanner(nodes=4, depth=4), options=options)
    assert torch.equal(generator.generate(**inputs, max_new_tokens=8, do_sample=False), expected)
    layers = generator.engine.runner.twin.model.model.layers  # type: ignore[union-attr]
    assert all(layer._compiled_call_impl is not None for layer in layers)  # type: ignore[union-attr]
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), expected)


def test_layers_of_a_model_that_cannot_be_copied_are_not_compiled() -> None:
    model: Any = tiny_model("llama")
    model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"cannot be compiled: module .* carries hooks"):
        ModelRunner(model, options=RunnerOptions(compile="layers"))
