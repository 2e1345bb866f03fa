"""Medusa heads at a big target's width: what the small heads say of the small model, at the cost of the big ones."""

from __future__ import annotations

from typing import Any

import torch

from specdec.drafters.medusa_heads import MedusaHeads
from specdec.errors import SpecDecError


@torch.no_grad()
def enlarge_heads(heads: MedusaHeads, big: Any) -> MedusaHeads:
    """Heads of their own output matrices for a target that `enlarge` made of the heads' target; they draft the same tokens.

    heads: sharing the small target's output matrix.  big: its last hidden state is the small one's, then zeros, but for the
    constant dimension, which the layers leave alone: their new rows and columns are zero, and are read all the same.
    """
    if not heads.shared_head:
        raise SpecDecError("these Medusa heads have output matrices of their own; enlarge heads that share the target's")
    output = big.get_output_embeddings().weight
    wide = MedusaHeads(
        output.shape[1], output.shape[0], heads.num_heads, heads.num_layers, shared_head=False, bias=heads.has_bias,
        device=output.device, dtype=output.dtype,
    )  # fmt: skip
    width = heads.hidden_size
    for small, layer in zip(heads.layers(), wide.layers(), strict=True):
        layer.weight[:width, :width].copy_(small.weight)
        if small.bias is not None:
            layer.bias[:width].copy_(small.bias)
    wide.init_from(output)
    return wide.eval().requires_grad_(False)
