"""What lookup drafters share: texts on the host, one finder per request, trees built from lists."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Literal, Protocol, TypeVar

from specdec.drafters.base import DraftSetup
from specdec.trees.host import tree_from_lists
from specdec.types import Budget, Committed, Draft, Law

Tree = tuple[list[int], list[int]]
State = TypeVar("State")
# A path less likely than this by the counts is not worth a row.
_LEAST_PROBABILITY = 0.1


class Finder(Protocol):
    """Finds continuations of one request's text. Its state is a function of the tokens added."""

    def add(self, token: int) -> None:
        """Append a committed token."""

    def find(self, nodes: int, depth: int, width: int) -> Tree:
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
            found: Tree = ([], [])
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


def likeliest_tree(
    start: State, children: Callable[[State], list[tuple[float, int, State]]], nodes: int, depth: int, width: int
) -> Tree:
    """Tokens and parents of the most likely nodes below `start`, see `Finder.find`; an earlier child wins a tie.

    children: (share of the parent's probability, token, state behind it), most likely first, for a state.
    """
    tokens: list[int] = []
    parents: list[int] = []
    order = count()
    expanded = [0] * depth
    # Entries: minus the path's probability, order of coming, depth, parent's number, token, state behind it.
    heap: list[tuple[float, int, int, int, int, State]] = []

    def push(probability: float, level: int, number: int, state: State) -> None:
        if level == depth or expanded[level] == width:
            return
        expanded[level] += 1
        for share, token, behind in children(state)[:width]:
            if probability * share >= _LEAST_PROBABILITY:
                heapq.heappush(heap, (-probability * share, next(order), level + 1, number, token, behind))

    push(1.0, 0, 0, start)
    while heap and len(tokens) < nodes:
        minus, _, level, parent, token, behind = heapq.heappop(heap)
        tokens.append(token)
        parents.append(parent)
        push(-minus, level, len(tokens), behind)
    return tokens, parents
