"""Reads and writes drafters as others publish them: Medusa heads in four layouts, and PARD models. Safetensors only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.drafters.checkpoint_layouts import (
    LAYOUTS,
    Layout,
    MedusaConfig,
    file_name,
    head_of,
    read_config,
    shared_name,
    weights_file,
    write_config,
)
from specdec.drafters.medusa_heads import MedusaHeads
from specdec.drafters.pard import mask_token_of
from specdec.errors import CheckpointError
from specdec.loading import load_model
from specdec.trees.static import check_accuracies

_MOST_NAMED = 6


def load_medusa(
    path: str | Path, *, num_heads: int | None = None, vocabulary: int | None = None
) -> tuple[MedusaHeads, MedusaConfig]:
    """Heads on the CPU in the file's dtype, and what the checkpoint says of them. The layout is told by config.json.

    num_heads: use only the first so many heads, or more than config.json says.  vocabulary: the target's, for shared heads
    whose checkpoint does not tell it.  Raises CheckpointError for a path that is no such folder, pickle weights, and tensors
    that are missing, unknown or of another shape.
    """
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{path} is no Medusa checkpoint: a local folder with config.json and *.safetensors is needed")
    try:
        tensors = _without_prefix(load_file(_weights_path(folder)))
        config = read_config(_read_json(folder / "config.json"), tensors, num_heads, vocabulary)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: the weights cannot be read as safetensors: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    heads = _empty(config)
    names = {file_name(config.layout, name, config.num_layers): name for name in heads.state_dict()}
    shapes = {name: tuple(heads.state_dict()[own].shape) for name, own in names.items()}
    if config.head_weight is not None:
        shapes[shared_name(tensors)] = (config.vocabulary, config.hidden_size)
    if num_heads is not None:
        tensors = {name: value for name, value in tensors.items() if (head_of(config.layout, name) or 0) < num_heads}
    _check_tensors(path, config, tensors, shapes)
    heads.load_state_dict({own: tensors[name] for name, own in names.items()}, assign=True)
    return heads.requires_grad_(False).eval(), config


def save_medusa(
    path: str | Path,
    heads: MedusaHeads,
    layout: Layout,
    base_model: str | None = None,
    accuracies: Sequence[Sequence[float]] | None = None,
    *,
    head_weight: Tensor | None = None,
) -> None:
    """Write a folder that `load_medusa`, and what the layout belongs to, reads; what stands there under the same names is replaced.

    base_model: the target's name.  accuracies: of each head's guesses by rank, kept in config.json.  head_weight: [V, H], the
    target's output matrix, which vLLM wants beside shared heads.  Raises CheckpointError where the layout cannot say what the
    heads are.
    """
    if layout not in LAYOUTS:
        raise CheckpointError(f"layout={layout!r} is unknown; allowed: {', '.join(LAYOUTS)}")
    if accuracies is not None:
        check_accuracies(accuracies)
    _check_layout(heads, layout, head_weight)
    config = MedusaConfig(
        layout=layout,
        hidden_size=heads.hidden_size,
        vocabulary=heads.vocabulary,
        num_heads=heads.num_heads,
        num_layers=heads.num_layers,
        shared_head=heads.shared_head,
        bias=heads.has_bias,
        base_model=base_model,
        accuracies=None if accuracies is None else tuple(tuple(row) for row in accuracies),
    )
    tensors = {file_name(layout, name, heads.num_layers): value for name, value in heads.state_dict().items()}
    if head_weight is not None:
        tensors["lm_heads.0.weight"] = head_weight.to(heads.weight.dtype)
    folder = Path(path).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: _plain(value) for name, value in tensors.items()}, folder / weights_file(layout), {"format": "pt"})
    _write_json(folder / "config.json", write_config(config))


def load_pard(
    path: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, int]:
    """A PARD model and its mask token, which config.json names. Raises as `load_model`, and without such a field."""
    model = load_model(path, device=device, dtype=dtype)
    return model, mask_token_of(model)


def save_pard(path: str | Path, model: PreTrainedModel, mask_token: int) -> None:
    """Write a transformers folder whose config.json names the mask token as PARD's own do; the model's config stays as it is."""
    mask_token_of(model, mask_token)
    folder = Path(path).expanduser()
    model.save_pretrained(folder)
    config = _read_json(folder / "config.json")
    _write_json(folder / "config.json", {**config, "pard_token": mask_token, "spd_type": "pard"})


def check_fits(path: str | Path, heads: MedusaHeads, target: nn.Module) -> None:
    """Raises CheckpointError unless the heads have the hidden width and vocabulary of the target's output matrix."""
    output: Any = target.get_output_embeddings()  # type: ignore[operator]  # transformers' method
    vocabulary, hidden = output.weight.shape
    if (heads.hidden_size, heads.vocabulary) != (hidden, vocabulary):
        raise CheckpointError(
            f"{path} has heads of hidden width {heads.hidden_size} over {heads.vocabulary} tokens, and {type(target).__name__} has "
            f"{hidden} and {vocabulary}; use heads that were trained for this target"
        )


def _empty(config: MedusaConfig) -> MedusaHeads:
    return MedusaHeads(
        config.hidden_size,
        config.vocabulary,
        config.num_heads,
        config.num_layers,
        shared_head=config.shared_head,
        bias=config.bias,
        device="meta",
    )


def _plain(value: Tensor) -> Tensor:
    """Memory of its own: safetensors refuses tensors that share it."""
    return value.detach().cpu().contiguous().clone()


def _weights_path(folder: Path) -> Path:
    """The folder's one file of tensors, under a layout's name or any other."""
    found = sorted(folder.glob("*.safetensors"))
    named = [file for file in found if file.name in {weights_file(layout) for layout in LAYOUTS}]
    if len(named) == 1 or len(found) == 1:
        return (named or found)[0]
    if found:
        raise CheckpointError(
            f"several files of tensors ({_listed(file.name for file in found)}); keep the one that holds the heads"
        )
    pickles = sorted(file.name for pattern in ("*.pt", "*.bin", "*.pth", "*.pkl") for file in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{_listed(pickles)} is a pickle, which can run code when it is loaded; convert it once: "
            "safetensors.torch.save_file(torch.load(file, weights_only=True), 'medusa_lm_head.safetensors')"
        )
    raise CheckpointError("no *.safetensors weights; save the heads there with save_medusa")


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefix under which a whole model's file would have them."""
    return {name.removeprefix("medusa_heads."): value for name, value in tensors.items()}


def _check_tensors(
    path: str | Path, config: MedusaConfig, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    shared = shapes.keys() & tensors.keys()
    wrong = [
        f"{n} is {list(tensors[n].shape)}, not {list(shapes[n])}" for n in sorted(shared) if tuple(tensors[n].shape) != shapes[n]
    ]
    dtypes = {str(value.dtype) for value in tensors.values()}
    problems = [f"missing: {_listed(missing)}"] * bool(missing) + [f"unknown: {_listed(unknown)}"] * bool(unknown)
    problems += [f"of another shape: {_listed(wrong)}"] * bool(wrong)
    if len(dtypes) > 1 or not all(value.is_floating_point() for value in tensors.values()):
        problems.append(f"of dtypes {', '.join(sorted(dtypes))}, where one floating dtype is needed")
    if problems:
        problems.append(_hint(config, unknown))
        raise CheckpointError(
            f"{path}: tensors do not fit config.json ({config.layout} layout, {config.num_heads} heads of {config.num_layers} "
            f"layers, H={config.hidden_size}, V={config.vocabulary}, bias={config.bias}); {'; '.join(filter(None, problems))}"
        )


def _hint(config: MedusaConfig, unknown: Sequence[str]) -> str:
    """What to do about tensors that config.json leaves out."""
    places = [head_of(config.layout, name) for name in unknown]
    beyond = [place for place in places if place is not None and place >= config.num_heads]
    if beyond:
        return f"pass num_heads={max(beyond) + 1} to use all heads of the file, or {config.num_heads} for the first of them"
    if config.layout == "vllm" and not config.bias and any(name.endswith(".bias") for name in unknown):
        return "set medusa_fc_bias to true in config.json if the heads were trained with biases"
    return ""


def _check_layout(heads: MedusaHeads, layout: Layout, head_weight: Tensor | None) -> None:
    """Raises where a layout has no way to say what these heads are."""
    if layout.startswith("medusa") and not heads.has_bias:
        raise CheckpointError(f"layout {layout!r} has biases, and these heads have none; use 'vllm' or 'specdec'")
    if layout in ("medusa", "medusa-2") and heads.shared_head != (layout == "medusa-2"):
        other = "medusa-2" if heads.shared_head else "medusa"
        raise CheckpointError(f"layout {layout!r} does not fit heads with shared_head={heads.shared_head}; use {other!r}")
    wanted = layout == "vllm" and heads.shared_head
    if wanted is (head_weight is None):
        raise CheckpointError(
            "layout 'vllm' keeps the target's output matrix beside shared heads; pass it as head_weight"
            if wanted
            else "head_weight is for shared heads in layout 'vllm' only; leave it out"
        )
    if head_weight is not None:
        heads.check_head_weight(head_weight)


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    rest = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    return ", ".join(found[:_MOST_NAMED]) + rest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
