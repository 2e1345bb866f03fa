"""Product-of-marginals trees: the likeliest paths when the places ahead were predicted independently of each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.kernels.transfer import on_device
from specdec.trees.host import tree_from_lists
from specdec.trees.rerank import rerank
from specdec.trees.static import Choice, best_first, cut, most_nodes
from specdec.types import TokenTree

# Stands for a log-probability that is not a number, so that scores stay comparable and no path of such tokens is preferred.
_UNLIKELY = -1e4


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Every path that can be among the N likeliest, whatever the marginals, by depth and then by rank; M of them.

    steps: [D, M], where the factors of each path's product stand among K * W log-probabilities, K * W for none.
    own: [M], the last of them.  parents, depths, ranks: [M]; a parent is a candidate or -1.  ranks: the highest on the path.
    starts: [D + 1], the first candidate of each depth, counted from 0.  expandable: most nodes of a level that have children.
    """

    steps: Tensor
    own: Tensor
    parents: Tensor
    depths: Tensor
    ranks: Tensor
    starts: Tensor
    expandable: int


def host_product_tree(
    roots: Tensor, log_probs: Tensor, tokens: Tensor, nodes: tuple[int, ...], depth: tuple[int, ...], width: tuple[int, ...]
) -> TokenTree:
    """What `ProductTrees.build` gives, by a heap on the host: several times faster where tensors are in its memory anyway.

    Nodes are in the order of their probability. Tokens of probability 0 and of laws that are no numbers are left out.
    """
    lists, parents = [], []
    values = zip(roots.tolist(), log_probs.exp().tolist(), tokens.tolist(), nodes, depth, width, strict=True)
    for root, laws, guesses, n, d, w in values:
        d = min(d, len(laws))
        tree = cut(best_first([law[:w] for law in laws[:d]]), n, d, w)
        lists.append([root, *(guesses[level - 1][rank] for level, rank in zip(tree.depths, tree.ranks, strict=True))])
        parents.append([-1, *tree.parents])
    return tree_from_lists(lists, parents, roots.device)


class ProductTrees:
    """Builds the likeliest paths on the device, without a synchronisation and without a loop over levels.

    A path of ranks (r1, ..., rd) is never likelier than the paths of ranks that are nowhere higher, nor than its ancestors.
    So where those are more than N the path is not among the N likeliest: what is left is a fixed list of
    candidates for each N, depth and width, made once, scored by one gather and reranked.
    """

    def __init__(self) -> None:
        """Keeps the candidates of the sizes that it has met."""
        self._made: dict[tuple[object, ...], _Candidates] = {}

    def build(
        self,
        roots: Tensor,
        log_probs: Tensor,
        tokens: Tensor,
        nodes: tuple[int, ...],
        depth: tuple[int, ...],
        width: tuple[int, ...],
    ) -> TokenTree:
        """The nodes[b] paths of the largest product under each request's depth and width, see `Budget`; ancestors among them.

        roots: [B].  log_probs, tokens: [B, K, W], the W likeliest tokens of each of K places, likeliest first. A tie goes to
        the shallower path, then to the lower ranks. A request gets fewer nodes only where its depth and width hold no more.
        """
        places, guesses = log_probs.shape[1:]
        depth = tuple([min(d, places) for d in depth])
        counts = tuple([min(n, most_nodes(d, w, guesses)) for n, d, w in zip(nodes, depth, width, strict=True)])
        if not max(counts):
            return TokenTree(roots[:, None], torch.full_like(roots[:, None], -1), (1,) * len(counts), is_chain=True)
        found = self._candidates(max(counts), max(depth), min(max(width), guesses), (places, guesses), roots.device)
        scores = _path_scores(log_probs, found.steps)
        scores = _within(scores, found, depth, width)
        batch = (len(counts), -1)
        tree = rerank(roots, tokens.flatten(1)[:, found.own], found.parents.expand(batch), scores, counts)
        return replace(tree, is_chain=max(width) == 1)

    def _candidates(self, nodes: int, depth: int, width: int, shape: tuple[int, int], device: torch.device) -> _Candidates:
        """More candidates than needed are right too, so that numbers of nodes are rounded up and few lists are made."""
        nodes = 1 << (nodes - 1).bit_length()
        key = (nodes, depth, width, shape, device)
        if key not in self._made:
            self._made[key] = _enumerate(nodes, depth, width, shape, device)
        return self._made[key]


def _paths(prefix: Choice, nodes: int, depth: int, width: int, better: int, siblings: int) -> Iterator[Choice]:
    """Paths behind `prefix` that at most `nodes` paths, themselves included, equal or precede in every marginal.

    better: how many such paths there are up to the prefix's depth.  siblings: how many at that depth.
    """
    for rank in range(width):
        here = siblings * (rank + 1)
        if better + here > nodes:
            return
        path = (*prefix, rank)
        yield path
        if len(path) < depth:
            yield from _paths(path, nodes, depth, width, better + here, here)


def _enumerate(nodes: int, depth: int, width: int, shape: tuple[int, int], device: torch.device) -> _Candidates:
    places, guesses = shape
    paths = sorted(_paths((), nodes, depth, width, 0, 1), key=lambda path: (len(path), path))
    number = {path: m for m, path in enumerate(paths)}
    nothing = places * guesses
    steps = [[k * guesses + path[k] if k < len(path) else nothing for path in paths] for k in range(len(paths[-1]))]
    starts = [sum(len(path) < d for path in paths) for d in range(1, depth + 2)]
    columns = (
        [(len(path) - 1) * guesses + path[-1] for path in paths],
        [number.get(path[:-1], -1) for path in paths],
        [len(path) for path in paths],
        [max(path) for path in paths],
    )
    own, parents, depths, ranks = on_device(columns, device)
    inner = [len({path[:-1] for path in paths if len(path) == d + 1}) for d in range(1, depth)]
    return _Candidates(on_device(steps, device), own, parents, depths, ranks, on_device(starts, device), max(inner, default=0))


def _path_scores(log_probs: Tensor, steps: Tensor) -> Tensor:
    """[B, M] fp32. Summed in one order for all paths, so that rounding never lifts a child over its parent."""
    flat = log_probs.float().flatten(1).nan_to_num(nan=_UNLIKELY, neginf=_UNLIKELY)
    parts = torch.nn.functional.pad(flat, (0, 1))[:, steps]
    scores = parts[:, 0]
    for k in range(1, steps.shape[0]):
        scores = scores + parts[:, k]
    return scores


def _within(scores: Tensor, found: _Candidates, depth: tuple[int, ...], width: tuple[int, ...]) -> Tensor:
    """Scores, minus infinity for what a request's depth and width leave out."""
    if len(set(depth)) > 1 or len(set(width)) > 1:
        limits = on_device([depth, width], scores.device)[:, :, None]
        scores = scores.masked_fill((found.depths > limits[0]) | (found.ranks >= limits[1]), float("-inf"))
    if found.expandable <= min(width):
        return scores
    # The likeliest `width` nodes of a level are those that it expands. Their own parents are always expanded too: what comes
    # before a parent comes, extended by the same rank, before the child.
    order = scores.sort(dim=1, descending=True, stable=True).indices
    levels = found.depths[order].sort(dim=1, stable=True)
    order = order.gather(1, levels.indices)
    places = torch.arange(order.shape[1], device=order.device) - found.starts[levels.values - 1]
    expanded = torch.zeros_like(order).scatter_(1, order, (places < on_device(width, order.device)[:, None]).long())
    seen = torch.nn.functional.pad(expanded, (1, 0), value=1)[:, found.parents + 1]
    return scores.masked_fill(seen == 0, float("-inf"))
