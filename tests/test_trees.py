"""Trees: layout against a walk over parents, rerank against brute force, kernels' twins against plain loops."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from specdec.kernels.reference import kv_compact, tree_attention
from specdec.trees.chain import chain_tree
from specdec.trees.host import tree_from_lists
from specdec.trees.layout import ancestors, chain_parents, depths
from specdec.trees.rerank import rerank


def _random_parents(nodes: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [-1] + [int(torch.randint(n, (1,), generator=generator)) for n in range(1, nodes)]


@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 8, 17, 33, 64])
def test_layout_follows_the_parents(nodes: int) -> None:
    rows = [_random_parents(nodes, seed) for seed in range(6)] + [list(range(-1, nodes - 1)), [-1] + [0] * (nodes - 1)]
    seen, depth = ancestors(torch.tensor(rows)), depths(torch.tensor(rows))
    for b, parents in enumerate(rows):
        for n in range(nodes):
            chain, at = set(), n
            while at != -1:
                chain.add(at)
                at = parents[at]
            assert set(seen[b, n].nonzero()[:, 0].tolist()) == chain
            assert depth[b, n] == len(chain) - 1


def _candidates(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parents = [-1] + [int(torch.randint(-1, n, (1,), generator=generator)) for n in range(1, 7)]
    scores: list[float] = []
    for p in parents:
        step = -float(torch.randint(0, 4, (1,), generator=generator))
        scores.append(step + (scores[p] if p >= 0 else 0.0))
    tokens = torch.randperm(50, generator=generator)[:7]
    return tokens[None], torch.tensor([parents]), torch.tensor([scores])


@pytest.mark.parametrize("seed", range(40))
def test_rerank_keeps_the_best_closed_set(seed: int) -> None:
    tokens, parents, scores = _candidates(seed)
    count = seed % 8
    tree = rerank(torch.tensor([99]), tokens, parents, scores, (count,))
    assert tree.num_nodes == (min(count, 7) + 1,)
    closed = [
        chosen
        for chosen in combinations(range(7), min(count, 7))
        if all(int(parents[0, m]) == -1 or int(parents[0, m]) in chosen for m in chosen)
    ]
    best = max(sum(float(scores[0, m].exp()) for m in chosen) for chosen in closed)
    # Identify the kept candidates by walking the new tree back to the old numbers.
    old = [-1]
    total = 0.0
    for n in range(1, tree.num_nodes[0]):
        parent = old[int(tree.parents[0, n])]
        options = [m for m in range(7) if int(parents[0, m]) == parent and m not in old and tokens[0, m] == tree.tokens[0, n]]
        assert options, "a node whose parent is not its parent"
        old.append(options[0])
        total += float(scores[0, options[0]].exp())
    assert total == pytest.approx(best)


def test_rerank_with_different_counts() -> None:
    tokens, parents, scores = (torch.cat(x) for x in zip(_candidates(3), _candidates(4), strict=True))
    tree = rerank(torch.tensor([9, 8]), tokens, parents, scores, (5, 2))
    alone = rerank(torch.tensor([8]), tokens[1:], parents[1:], scores[1:], (2,))
    assert tree.num_nodes == (6, 3)
    assert torch.equal(tree.tokens[1:, :3], alone.tokens)
    assert torch.equal(tree.parents[1:, :3], alone.parents)
    assert tree.tokens[1, 3:].eq(0).all()


def test_chains_of_different_lengths_are_padded() -> None:
    drafted = torch.tensor([[1, 2, 3], [4, 7, 8]]).split(1, 1)
    tree = chain_tree(torch.tensor([[5], [6]]), drafted, (2, 1), chain_parents(3, 9, torch.device("cpu")))
    assert tree.tokens.tolist() == [[5, 1, 2], [6, 4, 0]]
    assert tree.parents.tolist() == [[-1, 0, 1], [-1, 0, 0]]
    assert tree.num_nodes == (3, 2)


def test_trees_from_lists_know_whether_they_are_chains() -> None:
    chain = tree_from_lists([[1, 2], [3]], [[-1, 0], [-1]], torch.device("cpu"))
    branching = tree_from_lists([[1, 2, 3]], [[-1, 0, 0]], torch.device("cpu"))
    assert chain.is_chain
    assert not branching.is_chain
    assert chain.tokens.tolist() == [[1, 2], [3, 0]]


def test_compaction_may_overlap() -> None:
    cache = torch.arange(2 * 2 * 1 * 1 * 6 * 1, dtype=torch.float32).view(2, 2, 1, 1, 6, 1)
    before = cache.clone()
    kv_compact(cache, torch.tensor([0, 0, 0]), torch.tensor([2, 3, 5]), torch.tensor([1, 2, 3]))
    for slot, source in enumerate([0, 2, 3, 5, 4, 5]):
        assert torch.equal(cache[..., slot, :], before[..., source, :])


def test_reference_attention_is_the_textbook_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 7, 5, generator=generator, dtype=torch.float64)
    seen = torch.rand(2, 3, 7, generator=generator) > 0.4
    seen[..., 0] = True
    out = tree_attention(query, key, value, seen, scale=0.3, softcap=2.0)
    for b in range(2):
        for h in range(4):
            for n in range(3):
                logits = 2.0 * torch.tanh(0.3 * key[b, h // 2] @ query[b, h, n] / 2.0)
                weights = torch.where(seen[b, n], logits.exp(), 0.0)
                torch.testing.assert_close(out[b, h, n], weights @ value[b, h // 2] / weights.sum())
