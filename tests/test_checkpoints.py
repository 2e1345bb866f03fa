"""Published layouts of Medusa and PARD: round trips tensor by tensor, what is refused, and losslessness of what was loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specdec.drafters.checkpoint_layouts import LAYOUTS, Layout
from specdec.drafters.checkpoints import load_medusa, load_pard, save_medusa, save_pard
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.medusa_heads import MedusaHeads
from specdec.drafters.pard import PardDrafter
from specdec.errors import CheckpointError, SpecDecError
from specdec.generator import SpeculativeGenerator
from specdec.planner import FixedPlanner
from tests.support_compare import RecordingPlanner, assert_same_greedy
from tests.support_models import VOCABULARY, left_padded, prompts, tiny_model

pytestmark = pytest.mark.slow

MODEL: Any = tiny_model()
LM_HEAD = MODEL.get_output_embeddings().weight.detach()
ACCURACIES = [[0.7, 0.2], [0.5, 0.25], [0.4, 0.2]]
# layout, shared head, biases
CASES: list[tuple[Layout, bool, bool]] = [
    ("specdec", False, True),
    ("specdec", True, False),
    ("medusa", False, True),
    ("medusa-2", True, True),
    ("vllm", False, True),
    ("vllm", False, False),
    ("vllm", True, True),
]


def _heads(shared: bool = False, bias: bool = True, layers: int = 2, dtype: torch.dtype = torch.float32) -> MedusaHeads:
    heads = MedusaHeads(32, VOCABULARY, 3, layers, shared_head=shared, bias=bias)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for head in heads.heads:
            head.weight.add_(LM_HEAD)
    return heads.to(dtype)


def _save(path: Path, layout: Layout, shared: bool = False, bias: bool = True, **kwargs: Any) -> MedusaHeads:
    heads = _heads(shared, bias, **kwargs)
    save_medusa(path, heads, layout, "a/target", ACCURACIES, head_weight=LM_HEAD if shared and layout == "vllm" else None)
    return heads


def _edit(path: Path, **fields: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({k: v for k, v in {**config, **fields}.items() if v is not None}))


def _edit_tensors(path: Path, drop: str | None = None, **added: torch.Tensor) -> None:
    file = next(path.glob("*.safetensors"))
    tensors = {**load_file(file), **added}
    tensors.pop(drop or "", None)
    save_file(tensors, file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layout", "shared", "bias"), CASES)
def test_round_trip(tmp_path: Path, layout: Layout, shared: bool, bias: bool, dtype: torch.dtype) -> None:
    heads = _save(tmp_path, layout, shared, bias, dtype=dtype)
    loaded, config = load_medusa(tmp_path)
    assert loaded.state_dict().keys() == heads.state_dict().keys()
    for name, value in heads.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], value), name
    assert (config.layout, config.shared_head, config.bias) == (layout, shared, bias)
    assert (config.num_heads, config.num_layers, config.hidden_size, config.vocabulary) == (3, 2, 32, VOCABULARY)
    assert config.base_model == "a/target"
    assert config.accuracies == tuple(map(tuple, ACCURACIES))
    if layout == "vllm" and shared:
        assert config.head_weight is not None
        assert torch.equal(config.head_weight, LM_HEAD.to(dtype))


@pytest.mark.parametrize(
    ("layout", "shared", "names"),
    [
        ("medusa", False, {"0.0.linear.weight", "0.0.linear.bias", "0.1.weight"}),
        ("medusa-2", True, {"0.0.linear.weight", "0.0.linear.bias"}),
        ("vllm", False, {"blocks.0.layers.0.weight", "blocks.0.layers.0.bias", "lm_heads.0.weight"}),
        ("specdec", False, {"blocks.0.0.weight", "blocks.0.0.bias", "heads.0.weight"}),
    ],
)
def test_files_have_the_published_names(tmp_path: Path, layout: Layout, shared: bool, names: set[str]) -> None:
    _save(tmp_path, layout, shared, layers=1)
    file = "medusa_lm_head.safetensors" if layout.startswith("medusa") else "model.safetensors"
    found = {name for name in load_file(tmp_path / file) if not {"1", "2"} & {name.split(".")[0], name.split(".")[1]}}
    found = {name for name in found if name.startswith("0.") or not layout.startswith("medusa")}
    assert found | ({"0.1.weight"} if layout == "medusa" else set()) == names
    assert ("0.1.weight" in load_file(tmp_path / file)) == (layout == "medusa")


def test_a_published_config_without_sizes_is_read_from_the_tensors(tmp_path: Path) -> None:
    heads = _save(tmp_path, "medusa")
    _edit(tmp_path, vocab_size=None, accuracies=None)
    assert sorted(json.loads((tmp_path / "config.json").read_text())) == [
        "base_model_name_or_path",
        "medusa_num_heads",
        "medusa_num_layers",
    ]
    loaded, config = load_medusa(tmp_path)
    assert (config.hidden_size, config.vocabulary, config.accuracies) == (32, VOCABULARY, None)
    assert torch.equal(loaded.heads[2].weight, heads.heads[2].weight)


def test_shared_heads_without_a_vocabulary_take_the_targets(tmp_path: Path) -> None:
    _save(tmp_path, "medusa-2", shared=True)
    _edit(tmp_path, vocab_size=None)
    with pytest.raises(CheckpointError, match="vocabulary="):
        load_medusa(tmp_path)
    assert load_medusa(tmp_path, vocabulary=VOCABULARY)[1].vocabulary == VOCABULARY
    assert MedusaDrafter.from_pretrained(tmp_path, MODEL).vocabulary == VOCABULARY


def test_a_whole_models_prefix_is_dropped(tmp_path: Path) -> None:
    heads = _save(tmp_path, "vllm")
    file = tmp_path / "model.safetensors"
    save_file({f"medusa_heads.{name}": value for name, value in load_file(file).items()}, file)
    assert torch.equal(load_medusa(tmp_path)[0].blocks[1][1].bias, heads.blocks[1][1].bias)  # type: ignore[index]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, layout: Layout) -> None:
    shared = layout == "medusa-2"
    name = {"specdec": "blocks.1.0.weight", "vllm": "blocks.1.layers.0.weight"}.get(layout, "1.0.linear.weight")
    _save(tmp_path, layout, shared)
    _edit_tensors(tmp_path, drop=name)
    with pytest.raises(CheckpointError, match=f"missing: {name}"):
        load_medusa(tmp_path)
    _save(tmp_path, layout, shared)
    _edit_tensors(tmp_path, **{"norm.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"unknown: norm.weight"):
        load_medusa(tmp_path)
    _save(tmp_path, layout, shared)
    _edit_tensors(tmp_path, **{name: torch.zeros(32, 31)})
    with pytest.raises(CheckpointError, match=rf"{name} is \[32, 31\], not \[32, 32\]"):
        load_medusa(tmp_path)
    _save(tmp_path, layout, shared)
    _edit_tensors(tmp_path, **{name: torch.zeros(32, 32, dtype=torch.float16)})
    with pytest.raises(CheckpointError, match="float16"):
        load_medusa(tmp_path)


def test_more_heads_than_the_config_says_are_told_and_can_be_asked_for(tmp_path: Path) -> None:
    _save(tmp_path, "medusa")
    _edit(tmp_path, medusa_num_heads=2)
    with pytest.raises(CheckpointError, match=r"2\.0\.linear\.bias.*num_heads=3"):
        load_medusa(tmp_path)
    assert load_medusa(tmp_path, num_heads=3)[0].num_heads == 3
    fewer, config = load_medusa(tmp_path, num_heads=2)
    assert fewer.num_heads == 2
    assert config.accuracies == ((0.7, 0.2), (0.5, 0.25))
    with pytest.raises(CheckpointError, match=r"missing: 3\.0\.linear\.bias"):
        load_medusa(tmp_path, num_heads=4)


@pytest.mark.parametrize(
    ("layout", "fields", "told"),
    [
        ("vllm", {"truncated_vocab_size": 20}, "20 of 61"),
        ("vllm", {"logit_scale": 0.5}, "logit_scale=0.5"),
        ("vllm", {"medusa_fc_bias": False}, "medusa_fc_bias to true"),
        ("vllm", {"num_heads": 0}, "num_heads=0"),
        ("specdec", {"shared_head": None}, "shared_head=None"),
        ("specdec", {"hidden_size": "32"}, "hidden_size='32'"),
        ("specdec", {"model_type": "llama"}, "'llama'"),
        ("specdec", {"accuracies": [[2.0]]}, "accuracies"),
        ("specdec", {"accuracies": [0.5, "x"]}, "accuracies"),
        ("medusa", {"medusa_num_layers": None}, "medusa_num_layers=None"),
    ],
)
def test_configs_that_cannot_be_served_are_refused(tmp_path: Path, layout: Layout, fields: dict[str, Any], told: str) -> None:
    _save(tmp_path, layout)
    _edit(tmp_path, **fields)
    with pytest.raises(CheckpointError, match=told):
        load_medusa(tmp_path)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no Medusa checkpoint"):
        load_medusa(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"medusa_num_heads": 3, "medusa_num_layers": 1}')
    with pytest.raises(CheckpointError, match="save_medusa"):
        load_medusa(tmp_path)
    (tmp_path / "medusa_lm_head.pt").write_bytes(b"not read")
    with pytest.raises(CheckpointError, match=r"medusa_lm_head\.pt is a pickle.*weights_only=True"):
        load_medusa(tmp_path)
    (tmp_path / "medusa_lm_head.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_medusa(tmp_path)
    _save(tmp_path, "medusa")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        load_medusa(tmp_path)
    _save(tmp_path, "specdec")
    with pytest.raises(CheckpointError, match="several files"):
        load_medusa(tmp_path)


def test_layouts_that_cannot_hold_the_heads_are_refused(tmp_path: Path) -> None:
    for heads, layout, told in (
        (_heads(bias=False), "medusa", "'vllm' or 'specdec'"),
        (_heads(), "medusa-2", "use 'medusa'"),
        (_heads(shared=True), "medusa", "use 'medusa-2'"),
        (_heads(shared=True), "vllm", "head_weight"),
        (_heads(), "onnx", "specdec, medusa"),
    ):
        with pytest.raises(CheckpointError, match=told):
            save_medusa(tmp_path, heads, layout)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="leave it out"):
        save_medusa(tmp_path, _heads(), "specdec", head_weight=LM_HEAD)
    assert not list(tmp_path.iterdir())


def test_heads_of_another_target_are_refused(tmp_path: Path) -> None:
    save_medusa(tmp_path, MedusaHeads(16, VOCABULARY, 2, shared_head=False), "specdec")
    with pytest.raises(CheckpointError, match=r"16 over 61 tokens.*32 and 61"):
        MedusaDrafter.from_pretrained(tmp_path, MODEL)
    save_medusa(tmp_path, MedusaHeads(32, 50, 2, shared_head=False), "specdec")
    with pytest.raises(CheckpointError, match=r"32 over 50 tokens.*32 and 61"):
        MedusaDrafter.from_pretrained(tmp_path, MODEL)


@pytest.mark.parametrize(("layout", "shared", "bias"), CASES)
def test_what_was_loaded_decodes_losslessly(tmp_path: Path, layout: Layout, shared: bool, bias: bool) -> None:
    _save(tmp_path, layout, shared, bias)
    inputs = left_padded(prompts((9, 3)))
    expected = MODEL.generate(**inputs, max_new_tokens=16, do_sample=False)
    drafter = MedusaDrafter.from_pretrained(tmp_path, MODEL, shape="tree")
    planner = RecordingPlanner(FixedPlanner(nodes=5, depth=3, width=2))
    generator = SpeculativeGenerator(MODEL, drafter, planner=planner)
    assert_same_greedy(MODEL, inputs, generator.generate(**inputs, max_new_tokens=16, do_sample=False), expected)
    assert max(n for r in planner.rounds for n in r.drafted) == 5


def test_pard_round_trip_decodes_losslessly_and_leaves_the_model(tmp_path: Path) -> None:
    save_pard(tmp_path, MODEL, 60)
    assert not hasattr(MODEL.config, "pard_token")
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["pard_token"], config["spd_type"]) == (60, "pard")
    model, mask = load_pard(tmp_path)
    assert mask == 60
    for name, value in MODEL.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    inputs = left_padded(prompts((9, 3)))
    expected = MODEL.generate(**inputs, max_new_tokens=16, do_sample=False)
    drafter = PardDrafter.from_pretrained(tmp_path)
    assert drafter.mask_token == 60
    generator = SpeculativeGenerator(MODEL, drafter, planner=3)
    assert_same_greedy(MODEL, inputs, generator.generate(**inputs, max_new_tokens=16, do_sample=False), expected)
    with pytest.raises(SpecDecError, match="61 tokens"):
        save_pard(tmp_path / "other", MODEL, VOCABULARY)
    _edit(tmp_path, pard_token=None)
    with pytest.raises(SpecDecError, match="pard_token"):
        load_pard(tmp_path)
