"""What the tests of drafters share: budgets, rounds by hand, and the law of what was drawn."""

from __future__ import annotations

from typing import Any

import torch
from scipy import stats
from torch import Tensor

from specdec.drafters.base import DraftSampling, DraftSetup, Paths
from specdec.types import Budget, Committed, Draft, Law
from tests.support_models import VOCABULARY


def setup_of(law: Law = Law.DETERMINISTIC, sampling: DraftSampling | None = None) -> DraftSetup:
    """A call on the CPU with the tiny models' vocabulary."""
    return DraftSetup(torch.device("cpu"), VOCABULARY, 256, law, sampling)


def budget_of(requests: tuple[int, ...], nodes: int = 6, depth: int = 3) -> Budget:
    """The same budget for every request, two wide."""
    return Budget(requests, (nodes,) * len(requests), (depth,) * len(requests), (2,) * len(requests))


def chain_budget(requests: tuple[int, ...], nodes: int) -> Budget:
    """Chains of so many tokens for every request."""
    return Budget(requests, (nodes,) * len(requests), (nodes,) * len(requests), (1,) * len(requests))


def commit(drafter: Any, texts: list[list[int]], requests: tuple[int, ...], tokens: list[list[int]]) -> None:
    """Add tokens to the texts, and tell the drafter."""
    for request, new in zip(requests, tokens, strict=True):
        texts[request].extend(new)
    drafter.commit(Committed(requests, tuple(map(tuple, tokens)), tuple(len(t) - 1 for t in tokens)))


def assert_same_draft(a: Draft, b: Draft) -> None:
    """Both drafts are the same tree."""
    assert a.tree.num_nodes == b.tree.num_nodes
    assert torch.equal(a.tree.tokens, b.tree.tokens)
    assert torch.equal(a.tree.parents, b.tree.parents)


def flattened(logits: Tensor, paths: Paths) -> Tensor:
    """A processor: temperature 3."""
    return logits.float() / 3.0


def chi_square(drawn: Tensor, wanted: Tensor) -> float:
    """The p-value of counts [V], rare tokens taken together."""
    order = wanted.argsort()
    rare = order[wanted[order].cumsum(0) < 10]
    rest = order[len(rare) :]
    seen, law = (torch.cat((x[rest], x[rare].sum()[None])) if len(rare) else x for x in (drawn, wanted))
    return float(stats.chisquare(seen.numpy(), law.numpy()).pvalue)
