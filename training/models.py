"""What training needs of a causal LM: its weights in fp32, the hidden states behind its final norm, and its output matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from specdec import SpeculativeGenerator
from specdec.bundled import checkpoint
from specdec.errors import SpecDecError, VocabularyMismatchError
from specdec.training.config import DraftConfig, OptimConfig
from specdec.training.packing import PackedRows, additive, document_mask
from specdec.training.settings import ConfigError


def load_lm(path: str, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """A causal LM from safetensors, refused as `SpeculativeGenerator` refuses it."""
    return SpeculativeGenerator.from_pretrained(path, device=device, dtype=dtype).target


@dataclass(frozen=True, slots=True)
class Body:
    """A causal LM cut before its output head, so that logits need not exist whole."""

    model: Any

    def __post_init__(self) -> None:
        """Refuse heads that are more than a matrix: their losses would be silently wrong."""
        config = self.model.config.get_text_config()
        head = self.model.get_output_embeddings()
        odd = [name for name in ("logit_scale", "logits_scaling", "final_logit_softcapping") if getattr(config, name, None)]
        if getattr(head, "bias", None) is not None:
            odd.append("a bias of the output head")
        if odd:
            raise SpecDecError(
                f"{type(self.model).__name__} has {', '.join(odd)}, and training knows output heads that are a plain matrix only; "
                "use another model"
            )

    @property
    def head_weight(self) -> Tensor:
        """[V, H]."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.head_weight.shape[1])

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self.head_weight.shape[0])

    def hidden(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """[M, L, H] behind the final norm. ids, positions: [M, L].  mask: [M, 1, L, L] bool, true where attended."""
        if self.model.config._attn_implementation == "eager":
            mask = additive(mask, self.head_weight.dtype)
        core = self.model.get_decoder() if hasattr(self.model, "get_decoder") else self.model.base_model
        out: Tensor = core(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).last_hidden_state
        return out

    def of_rows(self, rows: PackedRows) -> Tensor:
        """[M, L, H] of packed documents, none of which sees another."""
        window = getattr(self.model.config.get_text_config(), "sliding_window", None)
        return self.hidden(rows.ids, rows.positions, document_mask(rows.documents, rows.positions, window))


def set_training(model: Any, optim: OptimConfig) -> None:
    """Put a model that learns into training mode, with its layers' activations made anew in the backward pass where asked."""
    model.train()
    if optim.checkpoint_activations:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def check_vocabularies(draft: Body, target: Body) -> None:
    """Raises VocabularyMismatchError unless both have the same tokens."""
    ours, theirs = draft.vocabulary, target.vocabulary
    if ours != theirs:
        raise VocabularyMismatchError(f"the draft has {ours} tokens, the target {theirs}; begin with a draft of the same family")


def next_tokens(rows: PackedRows) -> tuple[Tensor, Tensor]:
    """(place, label) of every token that the one before it is trained to predict: [C] indices into the flattened [M * L]."""
    same = (rows.documents[:, 1:] == rows.documents[:, :-1]) & (rows.documents[:, 1:] != 0) & rows.loss_mask[:, 1:]
    row, column = same.nonzero(as_tuple=True)
    return row * rows.ids.shape[1] + column, rows.ids[row, column + 1]


def make_draft(config: DraftConfig, target: Any, device: torch.device) -> Any:
    """The draft model that training begins with, in fp32."""
    if config.init == "cut":
        return _cut(config, target).to(device, torch.float32)
    if config.init == "scratch":
        return _scratch(config, target).to(device, torch.float32)
    return load_lm(checkpoint(config.init, "draft"), device=device)


def _kept_layers(config: DraftConfig, total: int) -> Sequence[int]:
    if config.keep_layers:
        wrong = [i for i in config.keep_layers if i >= total]
        if wrong:
            raise ConfigError(f"draft.keep_layers names layers {wrong}, and the target has {total}, counted from 0")
        return config.keep_layers
    assert config.num_layers is not None
    if config.num_layers > total:
        raise ConfigError(f"draft.num_layers is {config.num_layers}, and the target has {total} layers to cut from")
    steps = max(config.num_layers - 1, 1)
    return [round(i * (total - 1) / steps) for i in range(config.num_layers)]


def _cut(config: DraftConfig, target: Any) -> Any:
    """The target with some of its layers, weights copied."""
    total = target.config.num_hidden_layers
    kept = _kept_layers(config, total)
    smaller = type(target.config).from_dict({**target.config.to_dict(), "num_hidden_layers": len(kept)})
    if getattr(smaller, "layer_types", None):
        smaller.layer_types = [target.config.layer_types[i] for i in kept]
    draft = AutoModelForCausalLM.from_config(smaller)
    place = {f"layers.{old}.": f"layers.{new}." for new, old in enumerate(kept)}
    state: dict[str, Tensor] = {}
    for name, value in target.state_dict().items():
        prefix, found, rest = name.partition("layers.")
        number = f"layers.{rest.partition('.')[0]}." if found else ""
        if not found:
            state[name] = value
        elif number in place:
            state[prefix + name[len(prefix) :].replace(number, place[number], 1)] = value
    draft.load_state_dict(state)
    return draft


def _scratch(config: DraftConfig, target: Any) -> Any:
    """A new model of the target's architecture and vocabulary, in the sizes of the configuration."""
    sizes = {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
    }
    given = {name: value for name, value in sizes.items() if value is not None}
    smaller = AutoConfig.for_model(**{**target.config.to_dict(), **given, "layer_types": None})
    return AutoModelForCausalLM.from_config(smaller)


def vocabulary_ids(model: nn.Module) -> int:
    """Rows of the input embedding."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]  # transformers' method
    return int(embedding.weight.shape[0])
