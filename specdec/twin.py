"""A model that shares the user's weights and runs our attention, while the user's model stays as it was."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from specdec.errors import UnsupportedModelError

ROWS = "specdec_rows"
OPAQUE = "specdec_opaque"
SHARED = "specdec_shared"
EAGER = "eager"

_HANDED = "specdec_handed"
_RECURRENT_LAYERS = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "hybrid")


class _Handed:
    """The context of the forward under way, for layers of a twin to which their model hands no keywords on."""

    def __init__(self) -> None:
        self.context: Any = None


def context_of(module: nn.Module, kwargs: Mapping[str, Any]) -> Any:
    """The attention context of this call, or None outside a forward of ours."""
    context = kwargs.get("tree_ctx")
    return getattr(getattr(module, _HANDED, None), "context", None) if context is None else context


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; everything it needs travels as `tree_ctx`.

    query: [1, H, R, D], key, value: [1, Hkv, R, D]. Returns [1, R, H, D].
    """
    context = context_of(module, kwargs)
    if context is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out, None
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    window, softcap = kwargs.get("sliding_window"), kwargs.get("softcap")
    sinks = kwargs.get("s_aux")
    return context.attend(query, key, value, module.layer_idx, float(scale), window, softcap, sinks), None


def register_attention() -> None:
    """Make our attention known to transformers under its three names; harmless when done again."""
    AttentionInterface.register(ROWS, packed_attention)
    AttentionInterface.register(OPAQUE, torch.compiler.disable(packed_attention))
    AttentionInterface.register(SHARED, packed_attention)
    AttentionMaskInterface.register(SHARED, sdpa_mask)


def refuse_unsupported(model: nn.Module) -> None:
    """Raise for a model whose state cannot be rolled back or which is not a decoder."""
    config = getattr(model, "config", None)
    name = type(model).__name__
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise UnsupportedModelError(f"{name} is not a transformers causal LM; load it with AutoModelForCausalLM")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; only decoder-only causal LMs are supported")
    text = config.get_text_config()
    kinds = {kind for kind in getattr(text, "layer_types", None) or () if any(r in kind for r in _RECURRENT_LAYERS)}
    if kinds or getattr(model, "_is_stateful", False):
        what = ", ".join(sorted(kinds)) or "recurrent layers"
        raise UnsupportedModelError(
            f"{name} ({config.model_type}) has {what}: their state cannot be rolled back when a draft is rejected; "
            "use a target whose layers are all attention, or plain model.generate"
        )
    if getattr(text, "reorder_and_upcast_attn", False):
        raise UnsupportedModelError(f"{name} sets reorder_and_upcast_attn, which bypasses the attention interface; unset it")


class Twin:
    """Runs the model with our attention. copied: weights shared, modules and config our own; otherwise the user's
    model itself, switched to our attention under a lock for the time of each forward."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        """model: a transformers causal LM; left as it was found.  dtype: copy the weights too, converted to it."""
        refuse_unsupported(model)
        register_attention()
        self.reason = _why_not_copied(model)
        self.model = _copy(model, dtype) if self.reason is None else model
        self._lock = threading.Lock()
        self._handed = _Handed()
        if self.copied:
            for module in self.model.modules():
                if hasattr(module, "layer_idx"):
                    setattr(module, _HANDED, self._handed)

    @property
    def copied(self) -> bool:
        """Whether the modules are ours to change."""
        return self.reason is None

    def __call__(self, **kwargs: Any) -> Any:
        """One forward of the causal LM."""
        with nullcontext(self._forward) if self.copied else self.under(SHARED) as forward:
            return forward(**kwargs)

    def _forward(self, **kwargs: Any) -> Any:
        self._handed.context = kwargs.get("tree_ctx")
        try:
            return self.model(**kwargs)
        finally:
            self._handed.context = None

    def compile_layers(self) -> None:
        """Compile each decoder layer for any number of rows, our attention left out of it. Raises where modules are the user's."""
        if self.reason is not None:
            raise UnsupportedModelError(f"the layers of {type(self.model).__name__} cannot be compiled: {self.reason}")
        config: Any = self.model.config
        config._attn_implementation = OPAQUE
        for layer in decoder_layers(self.model):
            layer.compile(dynamic=True)

    @contextmanager
    def under(self, attention: str) -> Iterator[Callable[..., Any]]:
        """The model's forward with an attention of transformers' registry, for as long as the context lasts."""
        config: Any = self.model.config
        with self._lock:
            before = config._attn_implementation
            config._attn_implementation = attention
            try:
                yield self._forward
            finally:
                config._attn_implementation = before


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's list of decoder layers."""
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UnsupportedModelError(f"{type(model).__name__} has no list of {count} decoder layers")


def _why_not_copied(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook") or module._forward_hooks or module._forward_pre_hooks:
            return f"module {name or 'itself'!r} carries hooks"
    if getattr(model, "hf_quantizer", None) is not None:
        return "its weights are quantised"
    return None


def _copy(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A deep copy whose memo holds every parameter and buffer, so that none is copied; with a dtype, all are."""
    memo: dict[int, Any] = {} if dtype else {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo)
    config: Any = twin.config
    config._attn_implementation = ROWS
    return (twin.to(dtype) if dtype else twin).eval()
