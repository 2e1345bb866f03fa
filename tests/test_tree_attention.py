"""The tree attention kernel against its twin: in Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.kernels.reference import packed_attention
from specdec.kernels.tiles import Items, KeyValues, Logits, Tiles, choose_tiles
from specdec.kernels.tree_attention import tree_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = Tiles(rows=16, keys=16, splits=1, warps=4, stages=2)
NEAR = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def _words(parents: list[int]) -> list[int]:
    """Ancestor bits, own one included, of a tree of at most 64 nodes."""
    bits: list[int] = []
    for n, parent in enumerate(parents):
        bits.append((bits[parent] if parent >= 0 else 0) | 1 << n)
    return [b - (1 << 64) if b >> 63 else b for b in bits]


def _random_parents(nodes: int, generator: torch.Generator) -> list[int]:
    return [-1] + [int(torch.randint(0, n, (1,), generator=generator)) for n in range(1, nodes)]


def _depths(parents: list[int]) -> list[int]:
    depths: list[int] = []
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return depths


def _case(
    prefixes: tuple[int, ...], nodes: tuple[int, ...], *, heads: int = 2, group: int = 2, width: int = 32,
    dtype: torch.dtype = torch.float32, chain: bool = False, seed: int = 0,
) -> tuple[Tensor, KeyValues, Items]:  # fmt: skip
    """Random queries, cache and trees: request b has prefixes[b] committed slots and nodes[b] nodes."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(nodes)
    slots = max(p + n for p, n in zip(prefixes, nodes, strict=True)) + 3
    query = torch.randn(total, heads * group, width, generator=generator)
    pair = torch.randn(2, len(nodes), heads, slots, width, generator=generator)
    parents = [_random_parents(n, generator) for n in nodes]
    table, first = [], 0
    for b, (prefix, count) in enumerate(zip(prefixes, nodes, strict=True)):
        table.append([first, count, b, 0, prefix, prefix + count])
        first += count
    depths = [_depths(p) for p in parents]
    positions = [prefix + (n if chain else d) for prefix, own in zip(prefixes, depths, strict=True) for n, d in enumerate(own)]
    widest = max(nodes)
    items = Items(
        torch.tensor(table, device=DEVICE),
        torch.tensor(positions, device=DEVICE),
        widest,
        slots,
        None if chain else torch.tensor([[w] for p in parents for w in _words(p)], device=DEVICE),
        None if chain else torch.tensor([d + [0] * (widest - len(d)) for d in depths], device=DEVICE),
    )
    pair = pair.to(DEVICE, dtype)
    return query.to(DEVICE, dtype), KeyValues(pair[0], pair[1]), items


def _assert_near(query: Tensor, cache: KeyValues, groups: list[Items], how: Logits, **forced: Any) -> None:
    ours = tree_attention(query, cache, groups, how, **forced)
    theirs = packed_attention(query, cache, groups, how)
    assert ours.dtype == query.dtype
    error = float((ours.double() - theirs.double()).abs().max())
    assert error <= NEAR[query.dtype] * max(1.0, float(theirs.abs().max())), error


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize(("prefix", "nodes"), [(0, 1), (0, 5), (16, 1), (37, 7), (64, 16), (5, 40)])
def test_one_request(prefix: int, nodes: int, group: int) -> None:
    query, cache, items = _case((prefix,), (nodes,), group=group, seed=prefix + nodes)
    _assert_near(query, cache, [items], Logits(0.3), tiles=TINY)


@pytest.mark.parametrize("splits", [1, 2, 5, 16])
def test_ragged_requests_and_splits(splits: int) -> None:
    query, cache, items = _case((50, 0, 17, 33), (1, 6, 19, 4), seed=splits)
    _assert_near(query, cache, [items], Logits(0.2), tiles=TINY, splits=splits)


@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", list(NEAR))
def test_widths_and_dtypes(width: int, dtype: torch.dtype) -> None:
    query, cache, items = _case((21,), (6,), width=width, dtype=dtype, seed=width)
    _assert_near(query, cache, [items], Logits(width**-0.5), tiles=TINY, splits=2)


@pytest.mark.parametrize("window", [1, 4, 18, 60])
@pytest.mark.parametrize("chain", [False, True])
def test_windows_go_by_position(window: int, chain: bool) -> None:
    query, cache, items = _case((45, 3), (9, 12), chain=chain, seed=window)
    _assert_near(query, cache, [items], Logits(0.3, window=window), tiles=TINY, splits=2)


@pytest.mark.parametrize("splits", [1, 3])
def test_soft_caps_and_sinks(splits: int) -> None:
    query, cache, items = _case((30, 2), (5, 3), seed=9)
    sinks = torch.randn(query.shape[1], device=DEVICE)
    _assert_near(query, cache, [items], Logits(0.5, softcap=3.0, sinks=sinks), tiles=TINY, splits=splits)


def test_chains() -> None:
    query, cache, items = _case((20, 0), (33, 5), chain=True)
    _assert_near(query, cache, [items], Logits(0.3), tiles=TINY, splits=2)


def test_a_tree_of_more_than_64_nodes_has_several_words() -> None:
    query, cache, items = _case((10,), (150,), chain=True, heads=1)
    seen = torch.rand(150, 150, generator=torch.Generator().manual_seed(1)) < 0.3
    seen |= torch.eye(150, dtype=torch.bool)
    words = torch.zeros(150, 3, dtype=torch.long)
    for column in range(150):
        words[:, column // 64] |= seen[:, column].long() << (column % 64)
    tree = Items(items.table, items.positions, 150, items.most_slots, words.to(DEVICE), torch.arange(150, device=DEVICE)[None])
    _assert_near(query, cache, [tree], Logits(0.3), tiles=TINY, splits=2)


def test_e4m3_with_scales() -> None:
    query, cache, items = _case((40, 9), (5, 7), dtype=torch.bfloat16)
    packed = torch.stack((cache.key, cache.value)).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = torch.tensor([[0.5, 2.0], [1.5, 0.25]], device=DEVICE)
    _assert_near(query, KeyValues(packed[0], packed[1], scales[0], scales[1]), [items], Logits(0.3), tiles=TINY, splits=2)


def test_a_block_table_finds_the_same_slots() -> None:
    query, cache, items = _case((40, 9), (5, 7))
    slots = 8
    width, count = cache.key.shape[3], -(-cache.key.shape[2] // slots)
    order = torch.randperm(2 * count, generator=torch.Generator().manual_seed(2)).view(2, count).to(DEVICE)
    paged = torch.zeros(2, 2 * count, 2, slots, width, device=DEVICE)
    for which, dense in enumerate((cache.key, cache.value)):
        full = torch.nn.functional.pad(dense, (0, 0, 0, count * slots - dense.shape[2]))
        paged[which, order] = full.view(2, 2, count, slots, width).transpose(1, 2)
    tables = KeyValues(paged[0], paged[1], pages=order)
    assert torch.equal(packed_attention(query, tables, [items], Logits(0.3)), packed_attention(query, cache, [items], Logits(0.3)))
    _assert_near(query, tables, [items], Logits(0.3), tiles=TINY, splits=3)


def test_samples_of_one_prompt_share_its_keys() -> None:
    """Three requests whose first 32 slots are request 0's: one item of all rows for these, then each request's own."""
    query, cache, items = _case((40, 36, 50), (4, 6, 2), seed=4)
    cache.key[1:, :, :32], cache.value[1:, :, :32] = cache.key[:1, :, :32], cache.value[:1, :, :32]
    table = items.table.clone()
    table[:, 3] = 32
    own = Items(table, items.positions, items.most_rows, items.most_slots, items.bits, items.offsets)
    rows = query.shape[0]
    shared = Items(torch.tensor([[0, rows, 0, 0, 32, 32]], device=DEVICE), items.positions, rows, 32, items.bits, items.offsets)
    together = tree_attention(query, cache, [shared, own], Logits(0.3), tiles=TINY, splits=2)
    assert torch.allclose(together, packed_attention(query, cache, [items], Logits(0.3)), atol=2e-5)
    _assert_near(query, cache, [shared, own], Logits(0.3), tiles=TINY)


def test_what_no_row_sees_does_not_matter() -> None:
    query, cache, items = _case((20,), (6,))
    before = tree_attention(query, cache, [items], Logits(0.3), tiles=TINY, splits=2)
    cache.key[:, :, 26:], cache.value[:, :, 26:] = float("nan"), float("nan")
    assert torch.equal(tree_attention(query, cache, [items], Logits(0.3), tiles=TINY, splits=2), before)


def test_tiles_depend_on_shapes_alone_and_stay_in_bounds() -> None:
    for items in (1, 16):
        for rows in (1, 4, 16, 64, 256):
            for slots in (64, 2048, 32768, 131072):
                tiles = choose_tiles(items, rows, slots, 8, 4, 128, 2, 132)
                assert tiles.rows in (16, 32, 64, 128)
                assert 1 <= tiles.splits <= max(1, slots // 256)
                partial = 2 * tiles.splits * rows * 4
                assert tiles.splits == 1 or partial <= 0.25 * slots
