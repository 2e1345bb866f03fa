"""Stage `kernels` of `specdec.bench.gpu`: tree attention of one layer against what a user would run without it.

Llama-3.1-8B's head layout in bf16. Every method gets the same keys, values and tree; masks and tables are made beforehand, as a
model makes them once for all its layers. Time is of the device alone, caches flushed. The error is the largest difference
from the float64 twin, over every row of every request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from specdec.bench.gpu_store import DeviceTimer, Point, Setup, Store, Value, copy_point
from specdec.kernels import reference
from specdec.kernels.rows import Rows, items_of, visible
from specdec.kernels.tiles import Items, KeyValues, Logits, choose_tiles, processors
from specdec.kernels.tree_attention import tree_attention

OURS, HF, PLAIN, COPY = "specdec", "masked sdpa of transformers", "plain decode sdpa", "copy"
# Three stages, since its own default for Hopper is overwritten with one; the default counts where three do not fit.
FLEX, FLEX_DEFAULT = "flex decoding", "flex decoding, default stages"


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What is measured: every batch with every prefix and number of nodes."""

    batches: tuple[int, ...]
    prefixes: tuple[int, ...]
    nodes: tuple[int, ...]
    heads: int
    kv_heads: int
    width: int
    dtype: torch.dtype


_FULL = _Sizes((1, 16), (1 << 10, 1 << 13, 1 << 15, 1 << 17), (1, 4, 16, 32, 64), 32, 8, 128, torch.bfloat16)
_SMALL = _Sizes((1, 2), (48,), (1, 5), 4, 2, 32, torch.float32)


@dataclass(frozen=True, slots=True)
class _Case:
    """One batch, the same binary tree behind every request's prefix. query: [B, H, M, D].  key, value: [B, Hkv, S, D].

    rows, items: as the runner makes them.  seen: [1, M, S] bool, the same for every request.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rows: Rows
    items: Items
    seen: Tensor

    @property
    def scale(self) -> float:
        """Of the logits."""
        return float(self.query.shape[3] ** -0.5)

    @property
    def num_bytes(self) -> int:
        """What any method has to move: keys and values read once, queries read, outputs written."""
        return (self.key.numel() + self.value.numel() + 2 * self.query.numel()) * self.key.element_size()


def run(setup: Setup) -> Store:
    """Measure all sizes; FlexAttention last, since it compiles anew for every size; its default only where it failed."""
    store, sizes = Store("kernels", setup), _SMALL if setup.small else _FULL
    timer = DeviceTimer(setup.device, setup.small)
    store.measure({"method": COPY}, lambda: copy_point(setup, timer))
    for names in ((OURS, HF, PLAIN), (FLEX,), (FLEX_DEFAULT,)):
        for batch, prefix, nodes in _configurations(sizes):
            wanted = [name for name in names if _is_wanted(store, name, batch, prefix, nodes)]
            if store.late:
                store.left += len(wanted)
            elif wanted:
                _measure(store, timer, _case(sizes, batch, prefix, nodes, setup.device), wanted)
    return store


def _is_wanted(store: Store, name: str, batch: int, prefix: int, nodes: int) -> bool:
    """Not measured yet, and to be measured at all for this size."""
    if store.find(_settings(name, batch, prefix, nodes)) is not None:
        return False
    if name == FLEX_DEFAULT:
        return "failed" in (store.find(_settings(FLEX, batch, prefix, nodes)) or {})
    return name != PLAIN or nodes == 1


def _configurations(sizes: _Sizes) -> Iterator[tuple[int, int, int]]:
    for batch in sizes.batches:
        for prefix in sizes.prefixes:
            for nodes in sizes.nodes:
                yield batch, prefix, nodes


def _settings(method: str, batch: int, prefix: int, nodes: int) -> dict[str, Value]:
    return {"method": method, "batch": batch, "prefix": prefix, "nodes": nodes}


def _measure(store: Store, timer: DeviceTimer, case: _Case, names: list[str]) -> None:
    batch, _, nodes, _ = case.query.shape
    exact = _Exact(case)
    for name in names:
        settings = _settings(name, batch, case.rows.lengths[0], nodes)
        store.measure(settings, partial(_point, name, case, timer, exact, store.find({"method": COPY})))


def _point(name: str, case: _Case, timer: DeviceTimer, exact: _Exact, copy: Point | None) -> Point:
    method = _METHODS[name](case)
    error = exact.largest_error(method())
    ms = timer(method)
    rate = case.num_bytes / ms * 1e3
    best = copy.get("bytes_per_s") if copy is not None else None
    share = rate / best if isinstance(best, float) else None
    return {
        "ms": ms,
        "bytes_per_s": rate,
        "share_of_copy": share,
        "largest_error": error,
        **(_launch(case) if name == OURS else {}),
    }


def _launch(case: _Case) -> Point:
    """The tiles that our kernel chooses, to tune by."""
    _, heads, _, width = case.query.shape
    kv_heads = case.key.shape[1]
    shape = (case.items.table.shape[0], case.items.most_rows, case.items.most_slots, kv_heads, heads // kv_heads, width)
    tiles = choose_tiles(*shape, case.query.element_size(), processors(case.query.device))
    return {"tile": f"{tiles.rows}x{tiles.keys}", "splits": tiles.splits, "warps": tiles.warps, "stages": tiles.stages}


class _Exact:
    """The float64 output of a case, made when it is first needed."""

    def __init__(self, case: _Case) -> None:
        self._case = case
        self._out: Tensor | None = None

    def largest_error(self, out: Tensor) -> float:
        """out: [B, H, M, D]."""
        if self._out is None:
            self._out = torch.cat([self._request(b) for b in range(self._case.query.shape[0])])
        return float((out.double() - self._out).abs().max())

    def _request(self, b: int) -> Tensor:
        case = self._case
        query, key, value = (x[b : b + 1].double() for x in (case.query, case.key, case.value))
        return reference.tree_attention(query, key, value, case.seen, scale=case.scale)


def _case(sizes: _Sizes, batch: int, prefix: int, nodes: int, device: torch.device) -> _Case:
    generator = torch.Generator(device).manual_seed(batch * prefix + nodes)
    options: dict[str, Any] = {"generator": generator, "dtype": sizes.dtype, "device": device}
    query = torch.randn(batch, nodes, sizes.heads, sizes.width, **options).transpose(1, 2)
    pair = torch.randn(2, batch, sizes.kv_heads, prefix + nodes, sizes.width, **options)
    rows = _rows(batch, prefix, nodes, device)
    one = _rows(1, prefix, nodes, device)
    return _Case(query, pair[0], pair[1], rows, items_of(rows)[0], visible(one, prefix + nodes))


def _rows(batch: int, prefix: int, nodes: int, device: torch.device) -> Rows:
    """Rows of a binary tree, node n below node (n - 1) // 2; one node alone goes as the runner's plain decoding does."""
    seen = torch.eye(nodes, dtype=torch.bool)
    for n in range(1, nodes):
        seen[n] |= seen[(n - 1) // 2]
    depth = seen.sum(1).to(device) - 1
    slots = torch.arange(prefix, prefix + nodes, device=device).repeat(batch)
    tree = seen.to(device).expand(batch, nodes, nodes) if nodes > 1 else None
    positions = (depth + prefix).repeat(batch)[None]
    lengths, sizes = (prefix,) * batch, (nodes,) * batch
    offsets = depth.expand(batch, nodes) if nodes > 1 else None
    return Rows(lengths, sizes, torch.zeros_like(positions), positions, slots, lengths, tree, offsets)


Method = Callable[[], Tensor]


def _ours(case: _Case) -> Method:
    batch, heads, nodes, width = case.query.shape
    packed = case.query.transpose(1, 2).reshape(batch * nodes, heads, width)
    cache, how = KeyValues(case.key, case.value), Logits(case.scale)
    return lambda: tree_attention(packed, cache, [case.items], how).view(batch, nodes, heads, width).transpose(1, 2)


def _masked_sdpa(case: _Case) -> Method:
    """transformers' own function with a boolean mask, which repeats K and V for each query head of a group."""
    batch, heads, _, _ = case.query.shape
    module: Any = SimpleNamespace(num_key_value_groups=heads // case.key.shape[1], is_causal=False)
    mask = case.seen[:, None].expand(batch, -1, -1, -1)

    def attend() -> Tensor:
        out: Tensor = sdpa_attention_forward(module, case.query, case.key, case.value, mask, scaling=case.scale)[0]
        return out.transpose(1, 2)

    return attend


def _plain_sdpa(case: _Case) -> Method:
    """One row that sees everything: no mask, no copies."""
    attention = torch.nn.functional.scaled_dot_product_attention
    return lambda: attention(case.query, case.key, case.value, scale=case.scale, enable_gqa=True)


def _flex(case: _Case, stages: int | None) -> Method:
    """Compiled on a GPU; on a CPU it runs uncompiled."""
    attend: Any = flex_attention
    options: Any = {"num_stages": stages} if stages and case.query.is_cuda else None
    if case.query.is_cuda:
        # Forget the sizes before, or dynamo would count them as recompilations and give up.
        torch.compiler.reset()
        attend = torch.compile(flex_attention, dynamic=False)
    mask = _block_mask(case)

    def attention() -> Tensor:
        out: Tensor = attend(
            case.query, case.key, case.value, block_mask=mask, scale=case.scale, enable_gqa=True, kernel_options=options
        )
        return out

    return attention


def _block_mask(case: _Case) -> BlockMask:
    prefix, nodes = case.rows.lengths[0], case.query.shape[2]
    tree = case.seen[0, :, prefix:].contiguous()

    def sees(b: Tensor, h: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        # Both branches are evaluated, so the index has to stay in bounds.
        return (slot < prefix) | tree[row.clamp(max=nodes - 1), (slot - prefix).clamp(0, nodes - 1)]

    return create_block_mask(sees, None, None, nodes, prefix + nodes, device=case.query.device.type)


_METHODS: dict[str, Callable[[_Case], Method]] = {
    OURS: _ours,
    HF: _masked_sdpa,
    PLAIN: _plain_sdpa,
    FLEX: partial(_flex, stages=3),
    FLEX_DEFAULT: partial(_flex, stages=None),
}
