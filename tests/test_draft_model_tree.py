"""A draft model's tree: each request's own width holds, wherever the other requests' are wider, and whatever the draft gives."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.drafters.best_first import BestFirstDrafter
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.expansion import Expansion
from specdec.runner import RunnerOptions
from specdec.trees.layout import ancestors
from specdec.types import Budget, TokenTree
from tests.support_drafters import setup_of
from tests.support_models import VOCABULARY, prompts, tiny_model

MODEL: Any = tiny_model()
PLAINLY = RunnerOptions(capture="off")
MAKERS = {
    "by levels": lambda: DraftModelDrafter(MODEL, shape="tree", options=PLAINLY),
    "best first": lambda: BestFirstDrafter(MODEL, options=PLAINLY),
}
NAN = float("nan")


def _paths(tree: TokenTree, b: int) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for n in range(1, tree.num_nodes[b]):
        found.append((*found[int(tree.parents[b, n])], int(tree.tokens[b, n])))
    return found[1:]


@pytest.mark.parametrize("nodes", [7, 40])
@pytest.mark.parametrize("maker", MAKERS)
def test_a_request_beside_wider_ones_has_the_tree_that_it_has_alone(maker: str, nodes: int) -> None:
    texts, widths = prompts((5, 4, 6), seed=2), (1, 3, 2)
    drafter = MAKERS[maker]()
    drafter.begin(tuple(map(tuple, texts)), setup_of())
    tree = drafter.propose(Budget((0, 1, 2), (nodes,) * 3, (3, 2, 3), widths)).tree
    for b, (text, width, depth) in enumerate(zip(texts, widths, (3, 2, 3), strict=True)):
        alone = MAKERS[maker]()
        alone.begin((tuple(text),), setup_of())
        wanted = alone.propose(Budget((0,), (nodes,), (depth,), (width,))).tree
        assert _paths(tree, b) == _paths(wanted, 0)
        assert max(Counter(tree.parents[b, 1 : tree.num_nodes[b]].tolist()).values()) == width


@pytest.mark.parametrize("maker", MAKERS)
def test_a_width_beyond_the_vocabulary_is_the_whole_of_it(maker: str) -> None:
    drafter = MAKERS[maker]()
    drafter.begin((tuple(prompts((5,))[0]),), setup_of())
    tree = drafter.propose(Budget((0,), (VOCABULARY + 9,), (1,), (VOCABULARY + 9,))).tree
    assert sorted(tree.tokens[0, 1:].tolist()) == list(range(VOCABULARY))


def test_behind_nan_nodes_stay_below_their_own_parents() -> None:
    logits: Tensor = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    growth = Expansion(logits, width=(2,), lengths=(5,))
    growth.expand(torch.tensor([[NAN] * 4, [0.0, 1.0, 2.0, 3.0]]))
    tree = growth.tree(torch.tensor([9]), Budget((0,), (4,), (2,), (2,)))
    assert set(_paths(tree, 0)) == {(0,), (1,), (1, 3), (1, 2)}
    whole = growth.tree(torch.tensor([9]), Budget((0,), (9,), (2,), (2,)))
    assert whole.num_nodes == (7,)
    assert ancestors(whole.parents)[:, :, 0].all()
    assert [len(path) for path in _paths(whole, 0)] == [1, 1, 2, 2, 2, 2]
