"""How published Medusa checkpoints name their tensors and what their config.json says, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from specdec.errors import CheckpointError
from specdec.trees.static import check_accuracies

# "specdec" is our own.  "medusa" and "medusa-2" are FasterDecoding's, with and without an output matrix for each head.
Layout = Literal["specdec", "medusa", "medusa-2", "vllm"]
LAYOUTS: tuple[Layout, ...] = ("specdec", "medusa", "medusa-2", "vllm")
OWN_TYPE = "specdec-medusa"


@dataclass(frozen=True, slots=True)
class MedusaConfig:
    """What a checkpoint says of its heads. Sizes: as in `MedusaHeads`.

    base_model: the target's name as it was given, None where it is not told.  accuracies: see
    `trees.static.tree_from_accuracies`.  head_weight: [V, H], the target's output matrix, where a file of shared heads holds it.
    """

    layout: Layout
    hidden_size: int
    vocabulary: int
    num_heads: int
    num_layers: int
    shared_head: bool
    bias: bool
    base_model: str | None = None
    accuracies: tuple[tuple[float, ...], ...] | None = None
    head_weight: Tensor | None = None


def weights_file(layout: Layout) -> str:
    """What the layout calls its file of tensors."""
    return "medusa_lm_head.safetensors" if layout.startswith("medusa") else "model.safetensors"


def layout_of(config: Mapping[str, Any]) -> Layout:
    """The layout of a config.json; raises CheckpointError for one that is none of these."""
    if config.get("model_type") == OWN_TYPE:
        return "specdec"
    if config.get("model_type") == "medusa":
        return "vllm"
    if "medusa_num_heads" in config:
        return "medusa-2" if str(config.get("version")) == "2" else "medusa"
    raise CheckpointError(
        f"config.json is of no Medusa layout: model_type={config.get('model_type')!r} and no medusa_num_heads; "
        f"known are model_type {OWN_TYPE!r} (ours), 'medusa' (vLLM), and medusa_num_heads (FasterDecoding)"
    )


def file_name(layout: Layout, name: str, num_layers: int) -> str:
    """What the layout calls our parameter `name`, as blocks.0.1.weight or heads.0.weight."""
    kind, head, *rest = name.split(".")
    if layout == "specdec":
        return name
    if layout == "vllm":
        return f"lm_heads.{head}.weight" if kind == "heads" else f"blocks.{head}.layers.{'.'.join(rest)}"
    return f"{head}.{num_layers}.weight" if kind == "heads" else f"{head}.{rest[0]}.linear.{rest[1]}"


def head_of(layout: Layout, name: str) -> int | None:
    """Which head a tensor of a file belongs to; None where its name does not tell."""
    parts = name.split(".")
    place = 0 if layout.startswith("medusa") else 1
    return int(parts[place]) if len(parts) > place and parts[place].isdigit() else None


def shared_name(tensors: Mapping[str, Tensor]) -> str:
    """Where a vLLM file keeps the one output matrix of all heads."""
    return "lm_head.weight" if "lm_head.weight" in tensors else "lm_heads.0.weight"


def read_config(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], num_heads: int | None, vocabulary: int | None
) -> MedusaConfig:
    """What config.json says, and what is left to the tensors' shapes. num_heads: instead of what it says.

    vocabulary: the target's, for shared heads whose checkpoint does not tell. Raises CheckpointError for what is missing, no
    number, or not supported.
    """
    layout = layout_of(config)
    prefix = "medusa_" if layout.startswith("medusa") else ""
    layers = _number(config, "num_hidden_layers" if layout == "vllm" else f"{prefix}num_layers")
    heads = _number(config, f"{prefix}num_heads") if num_heads is None else num_heads
    shared = _shared(layout, config)
    hidden = _size(config, "hidden_size", tensors, file_name(layout, "blocks.0.0.weight", layers), None)
    output = shared_name(tensors) if shared else file_name(layout, "heads.0.weight", layers)
    size = _size(config, "vocab_size", tensors, output, vocabulary)
    if layout == "vllm":
        _refuse_vllm(config, tensors, size)
    return MedusaConfig(
        layout=layout,
        hidden_size=hidden,
        vocabulary=size,
        num_heads=heads,
        num_layers=layers,
        shared_head=shared,
        bias=_bias(layout, config),
        base_model=config.get("base_model_name_or_path"),
        accuracies=_accuracies(config, heads),
        head_weight=tensors.get(output) if shared and layout == "vllm" else None,
    )


def write_config(config: MedusaConfig) -> dict[str, Any]:
    """What config.json says of these heads in their layout."""
    out: dict[str, Any]
    if config.layout == "vllm":
        out = {
            "model_type": "medusa",
            "architectures": ["MedusaModel"],
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocabulary,
            "truncated_vocab_size": config.vocabulary,
            "num_heads": config.num_heads,
            "num_hidden_layers": config.num_layers,
            "medusa_fc_bias": config.bias,
            "original_lm_head": config.shared_head,
            "logit_scale": 1.0,
        }
    elif config.layout == "specdec":
        out = {
            "model_type": OWN_TYPE,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocabulary,
            "num_heads": config.num_heads,
            "num_layers": config.num_layers,
            "shared_head": config.shared_head,
            "bias": config.bias,
        }
    else:
        out = {"medusa_num_heads": config.num_heads, "medusa_num_layers": config.num_layers}
        # Not of the layout, and ignored by its readers: without it nothing tells the vocabulary of shared heads.
        out["vocab_size"] = config.vocabulary
        if config.layout == "medusa-2":
            out["version"] = "2"
    if config.base_model is not None:
        out["base_model_name_or_path"] = config.base_model
    if config.accuracies is not None:
        out["accuracies"] = [list(row) for row in config.accuracies]
    return out


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json says {name}={value!r}; a whole number of 1 or more is needed")
    return value


def _flag(config: Mapping[str, Any], name: str, default: bool | None) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json says {name}={value!r}; true or false is needed")
    return value


def _accuracies(config: Mapping[str, Any], num_heads: int) -> tuple[tuple[float, ...], ...] | None:
    rows = config.get("accuracies")
    if rows is None:
        return None
    try:
        found = tuple(tuple(float(value) for value in row) for row in rows)
        check_accuracies(found)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json says accuracies={rows!r}; a list of probabilities for each head is needed") from error
    return found[:num_heads]


def _shared(layout: Layout, config: Mapping[str, Any]) -> bool:
    if layout.startswith("medusa"):
        return layout == "medusa-2"
    return _flag(config, "original_lm_head", False) if layout == "vllm" else _flag(config, "shared_head", None)


def _bias(layout: Layout, config: Mapping[str, Any]) -> bool:
    if layout.startswith("medusa"):
        return True
    return _flag(config, "medusa_fc_bias", False) if layout == "vllm" else _flag(config, "bias", None)


def _size(config: Mapping[str, Any], field: str, tensors: Mapping[str, Tensor], name: str, given: int | None) -> int:
    """From config.json, or the rows of a tensor, or what the caller gives."""
    if config.get(field) is not None:
        return _number(config, field)
    if name in tensors and tensors[name].dim() == 2:
        return int(tensors[name].shape[0])
    if given is not None:
        return given
    what = "; pass the target's as vocabulary=" if field == "vocab_size" else ""
    raise CheckpointError(f"config.json says no {field}, and the file has no matrix {name!r} that would tell{what}")


def _refuse_vllm(config: Mapping[str, Any], tensors: Mapping[str, Tensor], vocabulary: int) -> None:
    """What changes the heads' output and is not supported."""
    if config.get("truncated_vocab_size", vocabulary) != vocabulary or "token_map" in tensors:
        raise CheckpointError(
            f"these heads know {config.get('truncated_vocab_size')} of {vocabulary} tokens (token_map); only heads over the whole "
            "vocabulary are supported: export them without truncated_vocab_size"
        )
    if config.get("logit_scale", 1.0) != 1.0:
        raise CheckpointError(
            f"config.json says logit_scale={config['logit_scale']!r}; only 1.0 is supported: scale the lm_heads by it instead"
        )
