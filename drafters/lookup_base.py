"""What lookup drafters share: texts on the host, one finder per request, trees built from lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from specdec.drafters.base import DraftSetup
from specdec.trees.host import tree_from_lists
from specdec.types import Budget, Committed, Draft, Law


class Finder(Protocol):
    """Finds continuations of one request's text. Its state is a function of the tokens added."""

    def add(self, token: int) -> None:
        """Append a committed token."""

    def find(self, nodes: int, depth: int, width: int) -> tuple[list[int], list[int]]:
        """Tokens and parents (0 is the root, drafted nodes count from 1) of the proposed tree, root left out."""


class LookupDrafter:
    """Proposes what followed the same words before. Needs no model; every token is deterministic.

    make_finder: a fresh finder for a request.
    """

    laws = frozenset({Law.DETERMINISTIC})
    taps: tuple[str, ...] = ()

    def __init__(self, name: str, shape: Literal["chain", "tree"], make_finder: Callable[[], Finder]) -> None:
        """shape: "tree" where continuations may differ."""
        self.name = name
        self.shape: Literal["chain", "tree"] = shape
        self._make_finder = make_finder

    def begin(self, prompts: tuple[tuple[int, ...], ...], setup: DraftSetup) -> None:
        """Start a batch; see `Drafter.begin`."""
        self._device = setup.device
        self._last = [prompt[-1] for prompt in prompts]
        self._finders = [self._make_finder() for _ in prompts]
        for finder, prompt in zip(self._finders, prompts, strict=True):
            for token in prompt:
                finder.add(token)

    def propose(self, budget: Budget) -> Draft:
        """A chain or tree for budget.requests; see `Drafter.propose`."""
        tokens, parents = [], []
        for i, request in enumerate(budget.requests):
            found: tuple[list[int], list[int]] = ([], [])
            if budget.nodes[i] and budget.depth[i]:
                found = self._finders[request].find(budget.nodes[i], budget.depth[i], budget.width[i])
            tokens.append([self._last[request], *found[0]])
            parents.append([-1, *found[1]])
        return Draft(tree_from_lists(tokens, parents, self._device), Law.DETERMINISTIC)

    def commit(self, committed: Committed) -> None:
        """Take in what the round added to the text."""
        for request, tokens in zip(committed.requests, committed.tokens, strict=True):
            self._last[request] = tokens[-1]
            for token in tokens:
                self._finders[request].add(token)
