"""Static trees: a sparse tree fixed beforehand (Medusa, arXiv 2401.10774, sections 2.1 and 2.3), cut to each request's budget."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import SpecDecError
from specdec.kernels.transfer import on_device
from specdec.types import TokenTree

# The ranks of a node and its ancestors, from depth 1 down: (0, 2) is the third guess behind the first.
Choice = tuple[int, ...]
# Budgets whose indices are kept; more are made anew, so that a planner with many sizes does not fill the memory.
_MOST_KEPT = 256


@dataclass(frozen=True, slots=True)
class StaticTree:
    """A tree of ranks. choices: its nodes, the root left out, parents first and the most useful first.

    parents: for each node 0 for the root or 1 + the parent's place.  ranks: which guess of its depth a node holds.
    depths: 1 and more.
    """

    choices: tuple[Choice, ...]
    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    depths: tuple[int, ...]

    @property
    def depth(self) -> int:
        """Of the deepest node; 0 for a tree without nodes."""
        return max(self.depths, default=0)

    @property
    def width(self) -> int:
        """How many guesses a depth has to offer: the highest rank and 1."""
        return max(self.ranks, default=-1) + 1


def static_tree(choices: Iterable[Sequence[int]]) -> StaticTree:
    """The tree of these choices, in their order, but ancestors before descendants.

    Raises SpecDecError for an empty choice, a negative rank, a choice given twice and one whose parent is missing.
    """
    given = [tuple(choice) for choice in choices]
    known = set(given)
    for choice in given:
        if not choice or any(not isinstance(rank, int) or rank < 0 for rank in choice):
            raise SpecDecError(f"tree choices: {list(choice)} is not one or more ranks, each 0 or more")
        if len(choice) > 1 and choice[:-1] not in known:
            raise SpecDecError(f"tree choices: {list(choice)} has no parent; add {list(choice[:-1])}")
    if len(known) != len(given):
        twice = next(choice for choice in given if given.count(choice) > 1)
        raise SpecDecError(f"tree choices: {list(twice)} is given twice; give it once")
    place: dict[Choice, int] = {}
    for choice in given:
        for size in range(1, len(choice) + 1):
            place.setdefault(choice[:size], len(place))
    nodes = tuple(place)
    parents = tuple(1 + place[choice[:-1]] if len(choice) > 1 else 0 for choice in nodes)
    return StaticTree(nodes, parents, tuple(choice[-1] for choice in nodes), tuple(map(len, nodes)))


def chain_choices(depth: int) -> tuple[Choice, ...]:
    """The choices of a chain: the first guess of every depth."""
    return tuple((0,) * size for size in range(1, depth + 1))


def tree_from_accuracies(accuracies: Sequence[Sequence[float]], nodes: int, most_children: int) -> StaticTree:
    """The tree of at most `nodes` nodes that is expected to have the most accepted, were the depths independent.

    accuracies[k][r]: the measured probability that the rank-r guess for depth k + 1 is right.  The node of the largest product
    along its path is added next, ties to the shallower and then to the lower ranks; only the first most_children ranks are
    used, and a node that is never right is left out.
    """
    check_accuracies(accuracies)
    found: list[Choice] = []
    for choice in best_first([row[:most_children] for row in accuracies]):
        if len(found) >= nodes:
            break
        found.append(choice)
    return static_tree(found)


def check_accuracies(accuracies: Sequence[Sequence[float]]) -> None:
    """Raises SpecDecError unless there is one or more depth, each with one or more probability."""
    if not accuracies:
        raise SpecDecError("accuracies are empty; give a list of probabilities for each head")
    for depth, row in enumerate(accuracies):
        if not row or any(not 0.0 <= value <= 1.0 for value in row):
            raise SpecDecError(f"accuracies[{depth}]={list(row)}: give one or more probabilities from 0 to 1, by rank")


def best_first(accuracies: Sequence[Sequence[float]]) -> Iterator[Choice]:
    """Every choice of positive probability, the likeliest first and parents before children."""
    heap: list[tuple[float, int, Choice]] = [(-1.0, 0, ())]
    while heap:
        negative, depth, choice = heapq.heappop(heap)
        if choice:
            yield choice
        for rank, value in enumerate(accuracies[depth]) if depth < len(accuracies) else ():
            if negative * value < 0:
                heapq.heappush(heap, (negative * value, depth + 1, (*choice, rank)))


def most_nodes(depth: int, width: int, guesses: int) -> int:
    """Nodes of the largest tree of this depth where a node has at most `width` children and a level expands `width` nodes.

    guesses: how many there are at each depth.
    """
    children, level, total = min(width, guesses), 1, 0
    for _ in range(depth):
        level = min(level, width) * children
        total += level
    return total


def cut(choices: Iterable[Choice], nodes: int, depth: int, width: int) -> StaticTree:
    """The first of these choices, parents first, that fit into a budget; see `Budget` for its three numbers."""
    place: dict[Choice, int] = {(): 0}
    parents: list[int] = []
    children, expanded = [0], [0] * (depth + 1)
    limit = min(nodes, most_nodes(depth, width, width))
    for choice in choices if limit > 0 else ():
        parent, level = place.get(choice[:-1], -1), len(choice) - 1
        if parent < 0 or level >= depth or children[parent] >= width:
            continue
        if not children[parent]:
            if expanded[level] >= width:
                continue
            expanded[level] += 1
        children[parent] += 1
        children.append(0)
        parents.append(parent)
        place[choice] = len(parents)
        if len(parents) == limit:
            break
    kept = tuple(place)[1:]
    return StaticTree(kept, tuple(parents), tuple([choice[-1] for choice in kept]), tuple(map(len, kept)))


class StaticTrees:
    """Token trees of a fixed shape: a gather by indices that are made once for each budget."""

    def __init__(self, choices: Iterable[Sequence[int]] | None = None, accuracies: Sequence[Sequence[float]] | None = None) -> None:
        """One of both. choices: as in `static_tree`.  accuracies: as in `tree_from_accuracies`."""
        if (choices is None) is (accuracies is None):
            raise SpecDecError("give tree choices or accuracies, one of both")
        self._accuracies = None if accuracies is None else [list(row) for row in accuracies]
        if self._accuracies is not None:
            check_accuracies(self._accuracies)
        self._tree = None if choices is None else static_tree(choices)
        self._made: dict[tuple[object, ...], _Gather] = {}

    @property
    def depth(self) -> int:
        """Of the deepest node that there can be."""
        return self._tree.depth if self._tree is not None else len(self._accuracies or ())

    @property
    def guesses(self) -> int:
        """How many guesses of each depth are looked at."""
        return self._tree.width if self._tree is not None else max(map(len, self._accuracies or ()))

    def fitted(self, nodes: int, depth: int, width: int) -> StaticTree:
        """The tree of a request with this budget."""
        if self._tree is not None:
            return cut(self._tree.choices, nodes, depth, width)
        rows = self._accuracies or []
        return cut(best_first([row[:width] for row in rows[:depth]]), nodes, depth, width)

    def build(
        self, roots: Tensor, guesses: Tensor, nodes: tuple[int, ...], depth: tuple[int, ...], width: tuple[int, ...]
    ) -> TokenTree:
        """Each request's tree under its budget. roots: [B].  guesses: [B, K, W], the W best tokens for each of K depths."""
        key = (nodes, depth, width, guesses.shape[1:], roots.device)
        if key not in self._made:
            if len(self._made) >= _MOST_KEPT:
                self._made.clear()
            trees = [self.fitted(*budget) for budget in zip(nodes, depth, width, strict=True)]
            self._made[key] = _gather(trees, guesses.shape[2], roots.device)
        gather = self._made[key]
        tokens = torch.cat((roots[:, None], guesses.flatten(1)), 1).gather(1, gather.index)
        return TokenTree(tokens if gather.live is None else tokens * gather.live, gather.parents, gather.num_nodes, gather.is_chain)


@dataclass(frozen=True, slots=True)
class _Gather:
    """Where each node's token stands in [root, guesses]. index, parents, live: [B, N]; live is None without padding."""

    index: Tensor
    parents: Tensor
    live: Tensor | None
    num_nodes: tuple[int, ...]
    is_chain: bool


def _gather(trees: Sequence[StaticTree], guesses: int, device: torch.device) -> _Gather:
    sizes = tuple(1 + len(tree.parents) for tree in trees)
    index, parents, live = [], [], []
    for tree, size in zip(trees, sizes, strict=True):
        padding = [0] * (max(sizes) - size)
        index.append([0, *(1 + (d - 1) * guesses + r for d, r in zip(tree.depths, tree.ranks, strict=True)), *padding])
        parents.append([-1, *tree.parents, *padding])
        live.append([1] * size + padding)
    is_chain = all(tree.parents == tuple(range(len(tree.parents))) for tree in trees)
    values = on_device([index, parents, live], device)
    return _Gather(values[0], values[1], values[2] if min(sizes) < max(sizes) else None, sizes, is_chain)
