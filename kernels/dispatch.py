"""Chooses the attention that runs, and holds what one forward's layers share.

`AttentionContext` travels through the model's forward as `tree_ctx=`. Each layer appends its K and V rows to the cache
and attends. Backends: "triton" (the tree attention kernel: CUDA, and Triton's interpreter), "sdpa" (CPU and CUDA: the query
group packed into rows, so that K and V are never repeated) and "reference" (the twin of the padded layout, also used where SDPA
cannot: soft-capped logits and sinks).
"""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.rows import Rows, items_of, padded_index, request_of_row, visible
from specdec.kernels.tiles import Items, KeyValues, Logits

logger = logging.getLogger(__name__)

Backend = Literal["auto", "triton", "sdpa", "reference"]

# Longer blocks of one request are prompts: compute-bound, and SDPA's causal kernels are made for them.
_MOST_TREE_ROWS = 1024
_WIDEST_HEAD = 256

# Views of the cache are a whole number of these slots, the rest masked: the order in which a row's scores are summed then
# does not depend on how many rows are scored with it.
SLOT_TILE = 32


class AttentionContext:
    """One forward's rows, the cache they are written to, and the masks its layers share.

    layers: per layer the pair (K, V), each [B, Hkv, S, D]; B rows of it are in use.
    """

    def __init__(self, rows: Rows, layers: list[tuple[Tensor, Tensor]], backend: Backend = "sdpa", tile: int = SLOT_TILE) -> None:
        """backend: as `choose_backend` gives it; prompts longer than a tree run in SDPA.  tile: views are a whole number of
        this many slots."""
        self.rows = rows
        self.layers = layers
        self.backend = "sdpa" if backend == "triton" and max(rows.sizes) > _MOST_TREE_ROWS else backend
        self._items: list[Items] | None = None
        self._masks: dict[tuple[int | None, int, torch.dtype], Tensor | None] = {}
        self._seen: dict[int | None, Tensor] = {}
        self._span = min(-(-rows.span // tile) * tile, layers[0][0].shape[2])
        self._single = len(rows.sizes) == 1
        self._parts = self._apart(tile) if self._wasteful() else []
        self._index = None if rows.uniform or self._parts else padded_index(rows.sizes, rows.slots.device)
        self._row_of = None if self._single else request_of_row(rows)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float, window: int | None,
        softcap: float | None, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Append K and V, then attend. query: [1, H, R, D], key, value: [1, Hkv, R, D]. Returns [1, R, H, D].

        sinks: [H], one more logit of each head that has no value.
        """
        keys, values = self._append(key, value, layer)
        how = Logits(scale, window, softcap, None if sinks is None else sinks.float())
        if self.backend == "triton":
            return self._triton(query, layer, how)
        if self._parts:
            parts = zip(self._parts, query.split([part.rows.sizes[0] for part in self._parts], 2), strict=True)
            return torch.cat([part._padded(own, *part._view(layer), how) for part, own in parts], 1)
        return self._padded(query, keys, values, how)

    def _padded(self, query: Tensor, keys: Tensor, values: Tensor, how: Logits) -> Tensor:
        """Attention over a rectangle of rows. Returns [1, R, H, D]."""
        padded = self._pad(query)
        if how.softcap is not None or how.sinks is not None or self.backend == "reference":
            seen = self.seen(how.window)
            out = reference.tree_attention(padded, keys, values, seen, scale=how.scale, softcap=how.softcap, sinks=how.sinks)
        else:
            out = self._sdpa(padded, keys, values, how.scale, how.window)
        return self._unpad(out)

    def seen(self, window: int | None) -> Tensor:
        """[B, N, S] bool, made once per window."""
        if window not in self._seen:
            self._seen[window] = visible(self.rows, self._span, window)
        return self._seen[window]

    def _append(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Write the rows behind what the cache holds, and view as much of it as this forward can see."""
        keys, values = self.layers[layer]
        rows = self.rows
        if self._single:
            start, stop = rows.base[0], rows.base[0] + rows.sizes[0]
            keys[:1, :, start:stop] = key
            values[:1, :, start:stop] = value
        else:
            keys[self._row_of, :, rows.slots] = key[0].transpose(0, 1)
            values[self._row_of, :, rows.slots] = value[0].transpose(0, 1)
        return self._view(layer)

    def _view(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer, as much of them as this forward can see."""
        keys, values = self.layers[layer]
        batch, span = len(self.rows.sizes), self._span
        return keys[:batch, :, :span], values[:batch, :, :span]

    def _wasteful(self) -> bool:
        """Whether most of the rectangle around these rows would be padding, as where prompts are taken one after the other."""
        rows = self.rows
        return self.backend != "triton" and rows.tree is None and len(rows.sizes) * max(rows.sizes) > 2 * sum(rows.sizes)

    def _apart(self, tile: int) -> list[AttentionContext]:
        """A context for each request that has rows."""
        rows, parts, start = self.rows, [], 0
        for b, size in enumerate(rows.sizes):
            stop = start + size
            if size:
                own = replace(
                    rows, base=rows.base[b : b + 1], sizes=(size,), tokens=rows.tokens[:, start:stop],
                    positions=rows.positions[:, start:stop], slots=rows.slots[start:stop], lengths=rows.lengths[b : b + 1],
                    shared=(),
                )  # fmt: skip
                layers = [(keys[b : b + 1], values[b : b + 1]) for keys, values in self.layers]
                parts.append(AttentionContext(own, layers, self.backend, tile))
            start = stop
        return parts

    def _pad(self, query: Tensor) -> Tensor:
        """[1, H, R, D] to [B, H, N, D]: a rectangle inside the backend only."""
        if self._single:
            return query
        _, heads, _, width = query.shape
        batch = len(self.rows.sizes)
        if self._index is None:
            return query[0].view(heads, batch, -1, width).transpose(0, 1)
        return query[0][:, self._index].transpose(0, 1)

    def _unpad(self, out: Tensor) -> Tensor:
        """[B, H, N, D] to [1, R, H, D]."""
        if self._single:
            # Some families view what they are given.
            return out.transpose(1, 2).contiguous()
        nodes = out.transpose(1, 2)
        if self._index is None:
            return nodes.reshape(1, -1, *nodes.shape[2:])
        kept = [nodes[b, :size] for b, size in enumerate(self.rows.sizes)]
        return torch.cat(kept)[None]

    def _triton(self, query: Tensor, layer: int, how: Logits) -> Tensor:
        from specdec.kernels.tree_attention import tree_attention

        if self._items is None:
            self._items = items_of(self.rows)
        return tree_attention(query[0].transpose(0, 1), KeyValues(*self.layers[layer]), self._items, how)[None]

    def _sdpa(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
        batch, heads, nodes, width = query.shape
        group = heads // keys.shape[1]
        packed = query.reshape(batch, keys.shape[1], group * nodes, width)
        mask = self._mask(window, group, query.dtype)
        out = torch.nn.functional.scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scale)
        return out.reshape(batch, heads, nodes, -1)

    def _mask(self, window: int | None, group: int, dtype: torch.dtype) -> Tensor | None:
        """Additive mask [B, 1, G * N, S], made once a forward; None where one row sees every slot of the view."""
        name = (window, group, dtype)
        if name not in self._masks:
            self._masks[name] = self._make_mask(window, group, dtype)
        return self._masks[name]

    def _make_mask(self, window: int | None, group: int, dtype: torch.dtype) -> Tensor | None:
        rows = self.rows
        plain = rows.tree is not None or rows.base == rows.lengths
        if self._single and plain and (window is None or rows.span <= window):
            alone = rows.sizes[0] == 1 and rows.tree is None and rows.span == self._span
            return None if alone else self._single_mask(group, dtype)
        hidden = ~self.seen(window)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
        return mask.repeat(1, group, 1)[:, None]

    def _single_mask(self, group: int, dtype: torch.dtype) -> Tensor:
        """One request: the prefix is open, only the tree's corner is masked. The plain path in fewer operations."""
        rows, device = self.rows, self.rows.slots.device
        size, length, span = rows.sizes[0], rows.lengths[0], rows.span
        mask = torch.zeros(group, size, self._span, dtype=dtype, device=device)
        if span < self._span:
            mask[:, :, span:] = float("-inf")
        if rows.tree is not None:
            mask[:, :, length:span].masked_fill_(~rows.tree[0, :, : span - length], float("-inf"))
        elif size > 1:
            mask[:, :, length:span] = torch.full((size, size), float("-inf"), dtype=dtype, device=device).triu_(1)
        return mask.view(1, 1, group * size, self._span)


class DeviceContext:
    """The attention context of a captured forward: everything that changes lies in tensors of fixed place and size."""

    def __init__(self, slots: Tensor, row_of: Tensor, groups: list[Items], layers: list[tuple[Tensor, Tensor]]) -> None:
        """slots, row_of: [R] int64, where each row is written and its cache row.  groups: as in `tree_attention`."""
        self.slots, self.row_of, self.groups, self.layers = slots, row_of, groups, layers

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float, window: int | None,
        softcap: float | None, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `AttentionContext.attend`."""
        from specdec.kernels.tree_attention import tree_attention

        keys, values = self.layers[layer]
        keys[self.row_of, :, self.slots] = key[0].transpose(0, 1)
        values[self.row_of, :, self.slots] = value[0].transpose(0, 1)
        how = Logits(scale, window, softcap, None if sinks is None else sinks.float())
        return tree_attention(query[0].transpose(0, 1), KeyValues(keys, values), self.groups, how)[None]


def choose_backend(wanted: Backend, device: torch.device, widths: set[tuple[int, int]]) -> Backend:
    """What runs for "auto": the Triton kernel on a GPU where it can, else SDPA with the reason logged once.

    widths: of keys and values in the model's layers. Any other choice is taken as it is; a kernel that cannot run then raises.
    """
    if wanted != "auto":
        return wanted
    reason = _why_no_triton(device, widths)
    if reason is None:
        return "triton"
    if device.type == "cuda":
        logger.warning("tree attention runs in SDPA: %s", reason)
    return "sdpa"


def _why_no_triton(device: torch.device, widths: set[tuple[int, int]]) -> str | None:
    if device.type != "cuda":
        return f"the kernel is for CUDA, the model is on {device.type}"
    if find_spec("triton") is None:
        return "triton is not installed"
    if any(key != value or key > _WIDEST_HEAD for key, value in widths):
        return f"heads of {sorted(widths)} (keys, values): the kernel needs equal widths up to {_WIDEST_HEAD}"
    return None
