"""The kernel that derives packed rows from trees, against its twin and against the rows that the host makes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec.cache import KVCache, LayerSpec
from specdec.kernels import reference_rules
from specdec.kernels.reference_rules import TreeRows
from specdec.kernels.rows import items_of, padded_index, request_of_row
from specdec.kernels.tree_rows import tree_rows
from specdec.rows import tree_rows as rows_on_host
from specdec.types import TokenTree

pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _trees(sizes: list[int], widest: int, seed: int = 0, *, chain: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens, parents, num_nodes and lengths of random trees; padding is token 0 below node 0."""
    generator = torch.Generator().manual_seed(seed)
    tokens, parents = torch.zeros(2, len(sizes), widest, dtype=torch.long)
    for b, size in enumerate(sizes):
        tokens[b, :size] = torch.randint(1, 99, (size,), generator=generator)
        drawn = [int(torch.randint(n, (1,), generator=generator)) for n in range(1, size)]
        parents[b, :size] = torch.tensor([-1, *(range(size - 1) if chain else drawn)])
    lengths = torch.randint(0, 50, (len(sizes),), generator=generator)
    return tokens.to(DEVICE), parents.to(DEVICE), torch.tensor(sizes, device=DEVICE), lengths.to(DEVICE)


def _assert_equal(ours: TreeRows, theirs: TreeRows) -> None:
    for a, b in zip(ours[:4], theirs[:4], strict=True):
        assert torch.equal(a, b)
    for name in ("table", "positions", "bits", "offsets"):
        assert torch.equal(getattr(ours.items, name), getattr(theirs.items, name)), name
    assert (ours.items.most_rows, ours.items.most_slots) == (theirs.items.most_rows, theirs.items.most_slots)


@pytest.mark.parametrize(
    ("sizes", "widest", "rows"),
    [([1], 1, 1), ([5], 8, 8), ([1, 1, 1], 1, 4), ([4, 1, 7], 7, 16), ([64], 64, 64), ([65, 3], 65, 96), ([130], 130, 192)],
    ids=str,
)
def test_rows_are_the_twins(sizes: list[int], widest: int, rows: int) -> None:
    trees = _trees(sizes, widest, len(sizes) + widest)
    _assert_equal(tree_rows(*trees, rows, 256, 255), reference_rules.tree_rows(*trees, rows, 256, 255))


def test_a_deep_chain_and_views_of_a_wider_tree() -> None:
    tokens, parents, num_nodes, lengths = _trees([70, 70], 80, chain=True)
    trees = tokens[:, :70], parents[:, :70], num_nodes, lengths
    _assert_equal(tree_rows(*trees, 140, 256, 255), reference_rules.tree_rows(*trees, 140, 256, 255))


@pytest.mark.parametrize("sizes", [[6], [3, 9, 1]])
def test_rows_are_those_that_the_host_makes(sizes: list[int]) -> None:
    tokens, parents, num_nodes, lengths = _trees(sizes, max(sizes), 3)
    cache = KVCache([LayerSpec(1, 8, 8, torch.float32, DEVICE)], len(sizes), 128)
    cache.lengths = lengths.tolist()
    host = rows_on_host(cache, TokenTree(tokens, parents, tuple(sizes)))
    (items,) = items_of(host)
    ours = tree_rows(tokens, parents, num_nodes, lengths, sum(sizes), items.most_slots, 127)
    assert torch.equal(ours.tokens, host.tokens[0])
    assert torch.equal(ours.slots, host.slots)
    assert torch.equal(ours.row_of, request_of_row(host))
    assert torch.equal(ours.place, padded_index(host.sizes, DEVICE))
    assert torch.equal(ours.items.positions, host.positions[0])
    assert torch.equal(ours.items.table, items.table)
    assert items.bits is not None
    assert torch.equal(ours.items.bits, items.bits)
