"""Taps: hidden states of the target that a drafter asks for by name.

"last_hidden" is the input of the output head (after the final norm); "layer:i" the output of decoder layer i; "top_k:n" the n
likeliest tokens behind each row, best first.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from specdec.errors import UnsupportedModelError
from specdec.twin import decoder_layers

LAST_HIDDEN = "last_hidden"


def _module_of(model: nn.Module, name: str) -> tuple[nn.Module, bool]:
    """The module to watch, and whether its input is meant."""
    if name == LAST_HIDDEN:
        head: Any = model.get_output_embeddings()  # type: ignore[operator]  # transformers' method
        return head, True
    kind, _, index = name.partition(":")
    layers = decoder_layers(model)
    if kind != "layer" or not index.isdigit() or int(index) >= len(layers):
        raise UnsupportedModelError(
            f"tap {name!r} is unknown; allowed: {LAST_HIDDEN!r}, 'top_k:8' and 'layer:0' to 'layer:{len(layers) - 1}'"
        )
    return layers[int(index)], False


def _how_many(name: str) -> int:
    """n of "top_k:n"."""
    count = name.removeprefix("top_k:")
    if not count.isdigit() or int(count) < 1:
        raise UnsupportedModelError(f"tap {name!r} is unknown; give a whole number, as in 'top_k:8'")
    return int(count)


class TapReader:
    """Reads the named hidden states of each forward. Hooks sit on the twin, never on the user's model."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        """model: a twin.  names: the taps, in the order that `read` returns them."""
        self.names = names
        self._values: dict[str, Tensor] = {}
        self._top = {name: _how_many(name) for name in names if name.startswith("top_k:")}
        for name in names:
            if name in self._top:
                continue
            module, is_input = _module_of(model, name)
            if is_input:
                module.register_forward_pre_hook(self._on_input(name))
            else:
                module.register_forward_hook(self._on_output(name))

    def _on_input(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._values[name] = args[0]

        return hook

    def _on_output(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._values[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def read(self, logits: Tensor) -> tuple[Tensor, ...]:
        """The taps of the last forward, [R, H] each, or [R, n] int64. logits: [R, V], what it gave."""
        values, self._values = self._values, {}
        values.update({name: logits.topk(most).indices for name, most in self._top.items()})
        return tuple(values[name].reshape(-1, values[name].shape[-1]) for name in self.names)

    def forget(self) -> None:
        """Drop what a forward left whose taps nobody wants."""
        self._values = {}
