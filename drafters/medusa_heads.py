"""Medusa heads: a few residual layers behind the target's last hidden state, one head for each place ahead."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from specdec.errors import SpecDecError, VocabularyMismatchError


class MedusaHeads(nn.Module):
    """K heads over one hidden state (arXiv 2401.10774, section 2.1).

    Head k, counted from 0, reads the hidden state behind the final norm at position t and predicts the token at t + 2 + k:
    z = h, then z = z + SiLU(W z + b) for each layer, then logits = U z. W and b begin at zero, so that an untrained head says
    what U says of h. Every layer of every head is a module of its own. Parameters: blocks.{head}.{layer}.weight and .bias,
    heads.{head}.weight; with a shared head there is no U here, and callers pass the target's.
    """

    def __init__(
        self,
        hidden_size: int,
        vocabulary: int,
        num_heads: int,
        num_layers: int = 1,
        *,
        shared_head: bool,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """shared_head: all heads end in the target's own output matrix.  bias: of the residual layers."""
        super().__init__()
        sizes = {"hidden_size": hidden_size, "vocabulary": vocabulary, "num_heads": num_heads, "num_layers": num_layers}
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SpecDecError(f"MedusaHeads {name}={value!r}: give a whole number, at least 1")
        self.hidden_size, self.vocabulary, self.num_heads, self.num_layers = hidden_size, vocabulary, num_heads, num_layers
        self.shared_head, self.has_bias = shared_head, bias

        def block() -> nn.Linear:
            return nn.Linear(hidden_size, hidden_size, bias=bias, device=device, dtype=dtype)

        def head() -> nn.Linear:
            return nn.Linear(hidden_size, vocabulary, bias=False, device=device, dtype=dtype)

        self.blocks = nn.ModuleList(nn.ModuleList(block() for _ in range(num_layers)) for _ in range(num_heads))
        self.heads = nn.ModuleList() if shared_head else nn.ModuleList(head() for _ in range(num_heads))
        for layer in self.layers():
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def layers(self) -> Iterator[nn.Linear]:
        """The residual layers, head by head."""
        for block in self.blocks:
            yield from block  # type: ignore[misc]  # a ModuleList

    @property
    def weight(self) -> Tensor:
        """The first residual layer's weight: heads have its dtype and device."""
        return next(self.layers()).weight

    def init_from(self, lm_head_weight: Tensor) -> None:
        """Begin every own U as the target's output matrix [V, H]. Raises where the shape differs, or heads share theirs."""
        if self.shared_head:
            raise SpecDecError("these heads share the target's output matrix and have none of their own to initialise")
        self.check_head_weight(lm_head_weight)
        with torch.no_grad():
            for head in self.heads:
                head.weight.copy_(lm_head_weight)  # type: ignore[operator]  # a Linear's parameter

    def check_head_weight(self, lm_head_weight: Tensor) -> None:
        """Raises unless the target's output matrix has the width and vocabulary of these heads."""
        rows, width = lm_head_weight.shape
        if width != self.hidden_size:
            raise SpecDecError(
                f"the Medusa heads have hidden width {self.hidden_size}, the target's output matrix {width}; "
                "use heads that were trained for this target"
            )
        if rows != self.vocabulary:
            raise VocabularyMismatchError(
                f"the Medusa heads have {self.vocabulary} tokens, the target's output matrix {rows}; "
                "use heads that were trained for this target"
            )

    def hidden(self, h: Tensor, count: int | None = None) -> Tensor:
        """[K, ..., H]: what each head feeds to its U. h: [..., H].  count: only the first so many heads."""
        return torch.stack([self.through(k, h) for k in range(len(self.blocks[:count]))])

    def through(self, k: int, h: Tensor) -> Tensor:
        """[..., H]: what head k feeds to its U. h: [..., H]."""
        for layer in self.blocks[k]:  # type: ignore[attr-defined]  # a ModuleList
            h = h + nn.functional.silu(layer(h))
        return h

    def output_weight(self, k: int, head_weight: Tensor) -> Tensor:
        """[V, H]: U of head k. head_weight: the target's output matrix, which shared heads take."""
        return head_weight if self.shared_head else self.heads[k].weight  # type: ignore[return-value]  # a Linear's parameter

    def logits(self, h: Tensor, head_weight: Tensor | None = None, count: int | None = None) -> Tensor:
        """[K, ..., V] in the dtype of h. h: [..., H].  head_weight: the target's output matrix, for a shared head only."""
        if (head_weight is None) is self.shared_head:
            need = "need the target's output matrix" if self.shared_head else "have output matrices of their own, so pass none"
            raise SpecDecError(f"these Medusa heads {need} (head_weight)")
        z = self.hidden(h, count)
        if head_weight is not None:
            return nn.functional.linear(z, head_weight)
        return torch.stack([head(part) for head, part in zip(self.heads, z, strict=False)])
