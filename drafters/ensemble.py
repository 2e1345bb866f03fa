"""Several drafters at once: what they propose becomes one tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil, isfinite
from typing import Literal

import torch
from torch import Tensor

from specdec.drafters.base import Drafter, DraftSetup
from specdec.drafters.several import Runners, common_vocabulary, named
from specdec.errors import IncompatibleRuleError, SpecDecError
from specdec.kernels.transfer import on_device
from specdec.trees.host import tree_from_lists
from specdec.types import Budget, Committed, Draft, Law, TokenTree

# Keeps rounding from giving a share a node more than is its due.
_SMALL = 1e-9


@dataclass(frozen=True, slots=True)
class _Merged:
    """What was proposed last. numbers[i][b][n]: the node of the merged tree that node n of drafter i is.  width: of that tree."""

    requests: tuple[int, ...]
    numbers: tuple[tuple[tuple[int, ...], ...], ...]
    width: int


class Ensemble:
    """All drafters propose, and their trees are merged by shared prefixes (SpecInfer, arXiv 2305.09781).

    Every token is deterministic, siblings differ, and every node of every drafter is in the tree: so it keeps, in each round, at
    least the path that any of these trees alone would have kept. It serves every rule but rejection. All drafters commit, each
    with taps and paths by the numbers of its own nodes.

    The budget's nodes are shared out, in order; what a drafter leaves goes to those behind it. Depth and width hold for each
    drafter's own tree. On a GPU merging costs one more synchronisation a round.
    """

    name = "ensemble"
    laws = frozenset({Law.DETERMINISTIC})
    shape: Literal["chain", "tree"] = "tree"
    vocabulary: int
    runner: Runners

    def __init__(self, drafters: Mapping[str, Drafter] | Sequence[Drafter], shares: Sequence[float] | None = None) -> None:
        """drafters: in the order in which they are asked, those that often leave nodes first.

        shares: of the budget's nodes, in any unit; equal by default.

        Raises SpecDecError for shares that do not fit, and what `SeveralDrafters` raises; IncompatibleRuleError for a drafter
        that cannot be deterministic.
        """
        members = named(drafters)
        self.names, self._members = tuple(members), tuple(members.values())
        for name, drafter in members.items():
            if Law.DETERMINISTIC not in drafter.laws:
                raise IncompatibleRuleError(
                    f"an ensemble merges deterministic trees, and drafter {name!r} draws by {', '.join(sorted(drafter.laws))}"
                )
        self._parts = _parts(shares, self.names)
        self.taps: tuple[str, ...] = tuple(dict.fromkeys([tap for drafter in self._members for tap in drafter.taps]))
        found = common_vocabulary(members)
        if found is not None:
            self.vocabulary = found
        runners = {name: drafter.runner for name, drafter in members.items() if hasattr(drafter, "runner")}
        if runners:
            self.runner = Runners(runners)
        self._merged: _Merged | None = None

    def begin(self, prompts: tuple[tuple[int, ...], ...], setup: DraftSetup) -> None:
        """Start a batch; see `Drafter.begin`."""
        # Nothing is drawn, so nobody needs to know how the target samples.
        own = replace(setup, law=Law.DETERMINISTIC, sampling=None)
        for drafter in self._members:
            drafter.begin(prompts, own)
        self._device, self._merged = setup.device, None

    def propose(self, budget: Budget) -> Draft:
        """The merged tree for budget.requests; see `Drafter.propose`."""
        trees: list[TokenTree] = []
        spent = [0] * len(budget.requests)
        for drafter, part in zip(self._members, self._parts, strict=True):
            due = [ceil(nodes * part - _SMALL) - used for nodes, used in zip(budget.nodes, spent, strict=True)]
            # Nobody would read the values of one drafter's own tree.
            trees.append(drafter.propose(replace(budget, nodes=tuple(due), drafter=None, slots=False)).tree)
            spent = [used + size - 1 for used, size in zip(spent, trees[-1].num_nodes, strict=True)]
        tokens, parents, numbers = _merge(trees)
        tree = tree_from_lists(tokens, parents, self._device)
        self._merged = _Merged(budget.requests, numbers, tree.tokens.shape[1])
        return Draft(tree, Law.DETERMINISTIC)

    def commit(self, committed: Committed) -> None:
        """Tell all of them what the round added to the text."""
        merged, self._merged = self._merged, None
        for i, drafter in enumerate(self._members):
            fits = merged is not None and merged.requests == committed.requests
            if merged is not None and fits and drafter.taps:
                drafter.commit(_renumbered(committed, drafter.taps, merged.numbers[i], merged.width))
            else:
                drafter.commit(committed)


def _parts(shares: Sequence[float] | None, names: tuple[str, ...]) -> tuple[float, ...]:
    """The part of the nodes that each drafter and those before it may use; 1 for the last."""
    given = [1.0] * len(names) if shares is None else list(shares)
    if len(given) != len(names) or any(not isfinite(share) or share <= 0 for share in given):
        raise SpecDecError(f"shares={shares!r}: give a positive number for each of {', '.join(names)}")
    return (*[part / sum(given) for part in accumulate(given[:-1])], 1.0)


def _merge(
    trees: Sequence[TokenTree],
) -> tuple[list[list[int]], list[list[int]], tuple[tuple[tuple[int, ...], ...], ...]]:
    """Tokens and parents of each request's merged tree, root included, and the numbers of `_Merged`."""
    # One read for all drafters.
    read = torch.cat([part for tree in trees for part in (tree.tokens, tree.parents)], 1).tolist()
    tokens: list[list[int]] = []
    parents: list[list[int]] = []
    numbers: list[list[tuple[int, ...]]] = [[] for _ in trees]
    for b, row in enumerate(read):
        known: dict[tuple[int, int], int] = {}
        tokens.append(row[:1])
        parents.append([-1])
        start = 0
        for tree, own in zip(trees, numbers, strict=True):
            width = tree.tokens.shape[1]
            number = [0]
            for n in range(1, tree.num_nodes[b]):
                place = number[row[start + width + n]], row[start + n]
                if place not in known:
                    known[place] = len(tokens[b])
                    tokens[b].append(place[1])
                    parents[b].append(place[0])
                number.append(known[place])
            own.append(tuple(number))
            start += 2 * width
    return tokens, parents, tuple(map(tuple, numbers))


def _renumbered(committed: Committed, taps: Sequence[str], numbers: Sequence[Sequence[int]], width: int) -> Committed:
    """The round as a drafter sees it whose nodes come first, in its own order, and the whole merged tree behind them.

    numbers[b][n]: the merged tree's node that is node n of the drafter.  width: of the merged tree, which taps may exceed. A
    round whose tree was cut to less stays as it is.
    """
    own_taps = {name: committed.taps[name] for name in taps if name in committed.taps}
    if any(tap.shape[1] < width for tap in own_taps.values()):
        return committed
    own = max(map(len, numbers))
    order = [[*row, *[0] * (own - len(row)), *range(width)] for row in numbers]
    paths = []
    for row, path in zip(numbers, committed.paths, strict=True):
        places = {node: n for n, node in enumerate(row)}
        paths.append(tuple([places.get(node, own + node) for node in path]))
    views = {name: _gathered(tap, order) for name, tap in own_taps.items()}
    return replace(committed, paths=tuple(paths), taps=views)


def _gathered(tap: Tensor, order: list[list[int]]) -> Tensor:
    """Rows of a tap [B, N, H] by these nodes of each request."""
    index = on_device(order, tap.device)
    return tap.gather(1, index[..., None].expand(-1, -1, tap.shape[-1]))
