"""Static trees from what was measured: the best shape for a number of nodes, and the size and depth that pay on this machine.

With accuracies a[d][r], the probability that the rank-r child of a node at depth d is the accepted one given that the node was
accepted, a tree's expected tokens are the bonus and the products of the accuracies along the path of every node.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specdec.errors import SpecDecError
from specdec.trees.static import Choice, StaticTree, check_accuracies, static_tree

Values = NDArray[np.float64]
# A node that adds less than this share of a token is left out: sums of the same products in another order differ by as much.
_NOTHING = 1e-12


@dataclass(frozen=True, slots=True)
class Plan:
    """A static tree and what a request's round with it is expected to give.

    nodes, depth, width: of the tree, the root left out.  tokens: expected, the bonus token included.  seconds: of the round.
    goodput: tokens a second.
    """

    tree: StaticTree
    nodes: int
    depth: int
    width: int
    tokens: float
    seconds: float
    goodput: float


def positional(accuracies: Sequence[float], depth: int) -> list[list[float]]:
    """Accuracies by rank alone, the same at every depth: the model of Sequoia's paper."""
    return [list(accuracies) for _ in range(depth)]


def expected_tokens(tree: StaticTree, accuracies: Sequence[Sequence[float]]) -> float:
    """Tokens of a round with this tree, the bonus token included. A child beyond the accuracies is never accepted."""
    reached, total = [1.0], 1.0
    for parent, rank, depth in zip(tree.parents, tree.ranks, tree.depths, strict=True):
        row = accuracies[depth - 1] if depth <= len(accuracies) else ()
        reached.append(reached[parent] * (row[rank] if rank < len(row) else 0.0))
        total += reached[-1]
    return total


def sequoia_tree(accuracies: Sequence[Sequence[float]], nodes: int, depth: int) -> StaticTree:
    """The tree of the most expected tokens among all of at most so many nodes and levels, the smallest where that is equal.

    Sequoia's dynamic programme (arXiv 2402.12374, section 3.1), with accuracies by depth; `positional` gives the paper's own. A
    node's children are its first ranks, as they are where a rank means the order of a draw, also when a later rank is
    more often right. Choices come best first, so that a budget can cut them. Raises SpecDecError for accuracies that are no
    probabilities.
    """
    check_accuracies(accuracies)
    _check_sizes(nodes, depth)
    return _Programme(accuracies, nodes, min(depth, len(accuracies))).tree(nodes)


def best_tree(
    accuracies: Sequence[Sequence[float]], seconds: Callable[[int, int], float], most_nodes: int, most_depth: int
) -> Plan:
    """The plan of the largest goodput over every size and depth, plain decoding included, the smallest of equals.

    seconds: of a round with so many drafted nodes on so many levels, (0, 0) for plain decoding; of any course with the nodes,
    steps and falls included, and not falling with depth. Every size is looked at: times need not have one optimum only
    (Sequoia, arXiv 2402.12374, section 3.3; PPD, arXiv 2405.18628, section 3.3). Raises SpecDecError as `sequoia_tree` does,
    and for times that are not above 0.
    """
    check_accuracies(accuracies)
    _check_sizes(most_nodes, most_depth)
    plain_s = _checked_seconds(seconds, 0, 0)
    best = _Best(0, 0, 1.0, plain_s, None)
    for depth in range(1, min(most_depth, len(accuracies)) + 1):
        programme = _Programme(accuracies, most_nodes, depth)
        # Of equal numbers of tokens the smaller tree is the one that is made, so a size that adds nothing is no size.
        for nodes in range(1, most_nodes + 1):
            tokens = programme.tokens(nodes)
            if tokens <= programme.tokens(nodes - 1) + _NOTHING:
                continue
            own_s = _checked_seconds(seconds, nodes, depth)
            if tokens / own_s > best.tokens / best.seconds * (1 + _NOTHING):
                best = _Best(nodes, depth, tokens, own_s, programme)
    tree = best.programme.tree(best.nodes) if best.programme is not None else static_tree([])
    goodput = best.tokens / best.seconds
    return Plan(tree, len(tree.choices), tree.depth, tree.width, best.tokens, best.seconds, goodput)


def _check_sizes(nodes: int, depth: int) -> None:
    if nodes < 0 or depth < 0:
        raise SpecDecError(f"a tree of {nodes} nodes and {depth} levels: give 0 or more of each")


def _checked_seconds(seconds: Callable[[int, int], float], nodes: int, depth: int) -> float:
    found = seconds(nodes, depth)
    if not found > 0:
        raise SpecDecError(f"a round of {nodes} nodes and {depth} levels takes {found} s: times must be above 0")
    return found


@dataclass(frozen=True, slots=True)
class _Best:
    nodes: int
    depth: int
    tokens: float
    seconds: float
    programme: _Programme | None


class _Programme:
    """The tables for trees of at most `nodes` nodes and `depth` levels.

    For a node at depth l, given that it was accepted: below[m] is what it gives with at most m nodes behind it, itself included;
    forest[m] is what its children from rank r on give with at most m nodes in all, and taken[l][r][m] of these are rank r's
    own subtree, 0 where no further child pays.
    """

    def __init__(self, accuracies: Sequence[Sequence[float]], nodes: int, depth: int) -> None:
        self._accuracies = accuracies
        self._taken: list[list[NDArray[np.int_]]] = []
        below = np.ones(nodes + 1)
        for row in reversed(accuracies[:depth]):
            forest, levels = np.zeros(nodes + 1), []
            for accuracy in reversed(row):
                forest, taken = _with_child(accuracy * below, forest)
                levels.append(taken)
            self._taken.insert(0, levels[::-1])
            below = 1.0 + forest
        self._tokens = below

    def tokens(self, nodes: int) -> float:
        """Of the best tree of at most so many nodes."""
        return float(self._tokens[nodes])

    def tree(self, nodes: int) -> StaticTree:
        """The smallest of the best trees of at most so many nodes."""
        enough = self._tokens >= self._tokens[nodes] - _NOTHING
        scores: dict[Choice, float] = {}
        open_nodes: list[tuple[Choice, int, float]] = [((), int(enough.argmax()), 1.0)]
        for choice, behind, reached in open_nodes:
            if choice:
                scores[choice] = reached
            for rank, taken in enumerate(self._taken[len(choice)] if len(choice) < len(self._taken) else ()):
                own = int(taken[behind])
                if not own:
                    break
                open_nodes.append(((*choice, rank), own - 1, reached * self._accuracies[len(choice)][rank]))
                behind -= own
        return static_tree(_best_first(scores))


def _with_child(subtree: Values, later: Values) -> tuple[Values, NDArray[np.int_]]:
    """A forest that may begin with one more child, and the nodes of that child's subtree, for each number of nodes.

    subtree[k]: what the child adds with k nodes behind it.  later: the forest of the ranks behind it.
    """
    size = len(later)
    nodes, own = np.arange(size)[:, None], np.arange(size)[None]
    # own = 0 ends the forest: a later rank has no place without the ones before it.
    values = np.where((own > 0) & (own <= nodes), subtree[own - 1] + later[nodes - own], -np.inf)
    values[:, 0] = 0.0
    taken = values.argmax(1)
    return values[np.arange(size), taken], taken


def _best_first(scores: dict[Choice, float]) -> list[Choice]:
    """The choices by score, ties to the shallower and then to the lower ranks; parents and earlier ranks come before."""
    heap: list[tuple[float, int, Choice]] = []
    found: list[Choice] = []

    def offer(choice: Choice) -> None:
        if choice in scores:
            heapq.heappush(heap, (-scores[choice], len(choice), choice))

    offer((0,))
    while heap:
        choice = heapq.heappop(heap)[2]
        found.append(choice)
        offer((*choice, 0))
        offer((*choice[:-1], choice[-1] + 1))
    return found
