"""TETRIS: requests share a round's rows, and the drafted tokens most likely to be accepted get them (arXiv 2502.15197)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from specdec.errors import SpecDecError
from specdec.kernels.transfer import on_device
from specdec.types import Budget, Draft, Load, RoundStats, TokenTree
from specdec.verify.null_mass import repaired


def best_nodes(drawn: Sequence[Sequence[float]], parents: Sequence[Sequence[int]], capacity: int) -> tuple[tuple[int, ...], ...]:
    """The `capacity` nodes of all requests with the largest products of probabilities along their paths, in each request's order.

    Closed upwards: a node comes only after its parent. A tie goes to the shallower node, then to the earlier request, then to
    the earlier node. By that closure no other set of so many nodes has a larger sum of products, since products never grow
    from a node to its children. O(C log N) for C nodes of N.

    drawn[b][i]: of node i + 1, in [0, 1]; what is no number counts as 0.  parents[b][i]: of node i + 1, 0 for the root.
    """
    children: dict[tuple[int, int], list[int]] = {}
    for request, row in enumerate(parents):
        for node, parent in enumerate(row, 1):
            children.setdefault((request, parent), []).append(node)
    kept: list[list[int]] = [[] for _ in parents]
    heap: list[tuple[float, int, int, int]] = []

    def offer(score: float, depth: int, request: int, parent: int) -> None:
        for node in children.get((request, parent), ()):
            heapq.heappush(heap, (-score * _share(drawn[request][node - 1]), depth, request, node))

    for request in range(len(parents)):
        offer(1.0, 1, request, 0)
    for _ in range(capacity):
        if not heap:
            break
        score, depth, request, node = heapq.heappop(heap)
        kept[request].append(node)
        offer(-score, depth + 1, request, node)
    return tuple([tuple(sorted(nodes)) for nodes in kept])


class TetrisPlanner:
    """At most `capacity` drafted tokens in a round, of all requests together: each drafts its share and `extra` more, and those
    with the largest products of draft probabilities are scored.

    They are chosen by what was drawn, so the draft is marked post_draw and only rules that ignore q stay lossless on it: greedy,
    sample-and-match, coupled, and any rule on deterministic drafts. With `repair` the draft tells which tokens would have been
    kept, see `RepairedDraft`, and rejection and block verification serve drawn chains too. Each request then has the target's
    law, but the texts of one batch are not independent, since what is kept of one depends on what was drawn for the others.

    Choosing reads the drafted tokens' probabilities back, one synchronisation a round beside the verdict's, and none where all of
    them fit; the rest is a heap on the host. Drafts without probabilities (lookup) share by depth. It keeps nothing from round to
    round.
    """

    def __init__(self, capacity: int, extra: int = 1, *, depth: int | None = None, width: int = 1, repair: bool = False) -> None:
        """depth, width: for trees, see `Budget`; None is as deep as a request has nodes.  repair: for chains."""
        for name, value, least in (("capacity", capacity, 1), ("extra", extra, 0), ("depth", depth, 1), ("width", width, 1)):
            if (value is not None or name != "depth") and (not isinstance(value, int) or value < least):
                raise SpecDecError(f"TetrisPlanner {name}={value!r}: give a whole number, at least {least}")
        self.post_draw = not repair
        self._capacity, self._extra, self._depth, self._width = capacity, extra, depth, width

    def plan(self, load: Load) -> Budget:
        """The share of each request and `extra` more; a request alone gets all. No request drafts past its end."""
        batch = len(load.requests)
        share = min(max(self._capacity // batch + self._extra, 1), self._capacity)
        rooms = [max(0, room - 1) for room in load.room]
        depth = tuple([min(share if self._depth is None else self._depth, room) for room in rooms])
        nodes = tuple([share if d else 0 for d in depth])
        return Budget(load.requests, nodes, depth, (self._width,) * batch, slots=True)

    def select(self, draft: Draft) -> Draft:
        """The best `capacity` nodes, without the values that they were chosen by, marked post_draw also when all are kept.

        With repair instead told with the null mass; IncompatibleRuleError for a drawn tree then.
        """
        tree = draft.tree
        if sum(tree.num_nodes) - len(tree.num_nodes) <= self._capacity:
            return replace(draft, post_draw=self.post_draw, slots=None)
        drawn, parents = _read(draft)
        kept = best_nodes(drawn, parents, self._capacity)
        if self.post_draw or draft.q is None or draft.slots is None:
            # Without a q, or chosen by depth alone, there is nothing to repair.
            return replace(_keep(draft, parents, kept), post_draw=self.post_draw)
        would = kept_tokens(draft.q, drawn, self._capacity)
        return repaired(draft, would, tuple([len(nodes) + 1 for nodes in kept]))

    def observe(self, stats: RoundStats) -> None:
        """Nothing to learn."""


def kept_tokens(q: Tensor, drawn: Sequence[Sequence[float]], capacity: int) -> Tensor:
    """[B, N, V] bool: which tokens `best_nodes` would have kept behind each node of chains, all else being as it was drawn.

    q: [B, N, V].  drawn: as in `best_nodes`. A token behind n kept ones is kept where fewer than capacity - n nodes of the other
    requests come before it; its own descendants never do.
    """
    products = [list(accumulate([_share(own) for own in row], mul, initial=1.0)) for row in drawn]
    keys = [[(-p, depth, b) for depth, p in enumerate(row)][1:] for b, row in enumerate(products)]
    bounds: list[list[tuple[float, float, float]]] = []
    for b, row in enumerate(products):
        others = sorted([key for other, own in enumerate(keys) if other != b for key in own])
        bounds.append([(p, *_least(others, capacity - depth, (depth, b))) for depth, p in enumerate(row[:-1], 1)])
        bounds[-1] += [(0.0, 2.0, 0.0)] * (q.shape[1] - len(bounds[-1]))
    above, least, ties = torch.tensor(bounds, dtype=torch.float64, device=q.device)[..., None].unbind(2)
    scores = above * q.double().nan_to_num(nan=0.0).clamp(0.0, 1.0)
    return (scores > least) | ((scores == least) & (ties > 0))


def _least(others: Sequence[tuple[float, int, int]], before: int, place: tuple[int, int]) -> tuple[float, float]:
    """The product that a node at `place` has to exceed for at most `before` others to come first; and 1 if equal will do."""
    if before < 0:
        return 2.0, 0.0
    if before >= len(others):
        return -1.0, 0.0
    return -others[before][0], float(place < others[before][1:])


def _share(own: float) -> float:
    return min(max(own, 0.0), 1.0) if math.isfinite(own) else 0.0


def _read(draft: Draft) -> tuple[list[list[float]], list[list[int]]]:
    """Each live node's probability and parent on the host, the root left out; the parents of chains are known."""
    tree, sizes = draft.tree, draft.tree.num_nodes
    values = [] if draft.slots is None else [draft.slots.drawn.double()]
    if not tree.is_chain:
        values.append(tree.parents[:, 1:].double())
    rows = torch.stack(values).tolist() if values else []
    drawn = (
        [[1.0] * (n - 1) for n in sizes] if draft.slots is None else [row[: n - 1] for row, n in zip(rows[0], sizes, strict=True)]
    )
    if tree.is_chain:
        return drawn, [list(range(n - 1)) for n in sizes]
    return drawn, [[int(parent) for parent in row[: n - 1]] for row, n in zip(rows[-1], sizes, strict=True)]


def _keep(draft: Draft, parents: Sequence[Sequence[int]], kept: Sequence[Sequence[int]]) -> Draft:
    """The draft of these nodes and the roots."""
    widest = max(map(len, kept)) + 1
    index, lines = [], []
    for row, nodes in zip(parents, kept, strict=True):
        places = {0: 0} | {node: place for place, node in enumerate(nodes, 1)}
        padding = [0] * (widest - 1 - len(nodes))
        index.append([0, *nodes, *padding])
        lines.append([-1, *(places[row[node - 1]] for node in nodes), *padding])
    nodes_of, parents_of = on_device([index, lines], draft.tree.tokens.device)
    padding_at = nodes_of == 0
    padding_at[:, 0] = False
    tokens = draft.tree.tokens.gather(1, nodes_of).masked_fill(padding_at, 0)
    tree = TokenTree(tokens, parents_of, tuple([len(nodes) + 1 for nodes in kept]), draft.tree.is_chain)
    q = None if draft.q is None else draft.q.gather(1, nodes_of[:, :, None].expand(-1, -1, draft.q.shape[2]))
    return replace(draft, tree=tree, q=q, post_draw=True, slots=None)
