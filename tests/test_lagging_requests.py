"""Requests that draft nothing for a while: a drafter's model reads what they say only when they draft again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from specdec.drafters.base import Drafter, DraftSampling
from specdec.drafters.cached import CachedTexts
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.pard import PardDrafter
from specdec.drafters.sampled_tree import SampledTreeDrafter
from specdec.drafters.staged import Staged
from specdec.noise import Noise
from specdec.runner import ModelRunner
from specdec.types import Budget, Draft, Law
from tests.support_drafters import budget_of, commit, flattened, setup_of
from tests.support_models import prompts, tiny_model

MODEL, OTHER = tiny_model(), tiny_model(seed=1)
K, REQUESTS = 3, (0, 1, 2, 3)
MAKERS: dict[str, Callable[[], Drafter]] = {
    "chain": lambda: DraftModelDrafter(MODEL),
    "tree": lambda: DraftModelDrafter(MODEL, shape="tree"),
    "sampled tree": lambda: SampledTreeDrafter(MODEL),
    "pard": lambda: PardDrafter(MODEL, 2),
    "pard tree": lambda: PardDrafter(MODEL, 2, shape="tree"),
    "staged": lambda: Staged(MODEL, DraftModelDrafter(OTHER)),
}
CASES = [
    *[(name, Law.DETERMINISTIC) for name in MAKERS],
    *[(name, Law.INDEPENDENT) for name in MAKERS if name not in ("tree", "pard tree")],
]


def _live(draft: Draft) -> list[tuple[list[int], list[int]]]:
    """Tokens and parents of each request's nodes."""
    tree = draft.tree
    return [(tree.tokens[b, :n].tolist(), tree.parents[b, :n].tolist()) for b, n in enumerate(tree.num_nodes)]


@pytest.mark.parametrize(("name", "law"), CASES)
def test_drafts_equal_those_of_a_drafter_that_reads_the_texts_anew(name: str, law: Law) -> None:
    """One request in four drafts in each round, then all; texts grow by up to 25 tokens a round."""
    sampling = DraftSampling(flattened, Noise(7)) if law is not Law.DETERMINISTIC else None
    drafter, texts = MAKERS[name](), prompts((9, 4, 30, 6), seed=2)
    drafter.begin(tuple(map(tuple, texts)), setup_of(law, sampling))
    for round_ in range(10):
        counts = tuple([6 * (round_ >= 8 or request == round_ * 3 % 4) for request in REQUESTS])
        budget = Budget(REQUESTS, counts, (K,) * 4, (2,) * 4)
        fresh = MAKERS[name]()
        fresh.begin(tuple(map(tuple, texts)), setup_of(law, sampling))
        draft, again = drafter.propose(budget), fresh.propose(budget)
        assert _live(draft) == _live(again)
        assert [tokens[0] for tokens, _ in _live(draft)] == [text[-1] for text in texts]
        drafted = [size - 1 for size in draft.tree.num_nodes]
        assert [bool(own) for own in drafted] == [bool(count) for count in counts]
        if draft.q is not None and again.q is not None:
            for b, own in enumerate(drafted):
                torch.testing.assert_close(draft.q[b, :own], again.q[b, :own], atol=1e-5, rtol=1e-4)
        grown = [[*_live(draft)[b][0][1 : 1 + round_ % 3], *range(3, 4 + 6 * (b + round_) % 25)] for b in REQUESTS]
        commit(drafter, texts, REQUESTS, grown)


def test_a_request_that_drafts_nothing_costs_one_row() -> None:
    runner, texts = ModelRunner(MODEL), prompts((9, 40, 30, 6), seed=2)
    held = CachedTexts(runner, "draft")
    held.begin(tuple(map(tuple, texts)), setup_of())
    assert held.pending(REQUESTS, (0, 2, 0, 0)) == [texts[0][:1], texts[1][-1:], texts[2][:1], texts[3][:1]]
    assert runner.cache.lengths == [0, 39, 0, 0]
    assert held.pending(REQUESTS, (1, 1, 1, 1)) == [text[-1:] for text in texts]
    assert runner.cache.lengths == [8, 39, 29, 5]


def test_a_budget_of_nothing_reads_nothing() -> None:
    drafter, texts = DraftModelDrafter(MODEL), prompts((9, 4), seed=2)
    drafter.begin(tuple(map(tuple, texts)), setup_of())
    drafter.propose(budget_of((0, 1), nodes=0))
    assert drafter.runner.cache.lengths == [0, 0]
