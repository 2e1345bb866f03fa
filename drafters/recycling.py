"""Token recycling: the target's own runners-up, kept for every token, are the next draft (arXiv 2408.08696)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Literal

import torch
from torch import Tensor

from specdec.drafters.base import DraftSetup
from specdec.errors import SpecDecError, VocabularyMismatchError
from specdec.kernels.transfer import on_device
from specdec.trees.static import Choice, StaticTree, best_first, cut, static_tree
from specdec.types import Budget, Committed, Draft, Law, TokenTree

# How likely each rank is the next token, about as measured; ranks beyond share what the last one has.
_RANKS = (0.5, 0.11, 0.045, 0.035, 0.03, 0.02, 0.017, 0.015)
_NODES, _DEPTH = 32, 6
# Layouts kept on the device, by the budgets of a round.
_MOST_LAYOUTS = 64


@dataclass(frozen=True, slots=True)
class _Layout:
    """The trees of a round without their tokens. parents, above, ranks, live: [B, N]; above is parents with 0 at the root.

    lists: the parents of each request's nodes on the host.
    """

    lists: tuple[tuple[int, ...], ...]
    parents: Tensor
    above: Tensor
    ranks: Tensor
    live: Tensor
    num_nodes: tuple[int, ...]
    depth: int
    is_chain: bool


@dataclass(frozen=True, slots=True)
class _Proposal:
    """What was proposed last. host: the tree's tokens on their way to the host.  arrived: None when they are there."""

    requests: tuple[int, ...]
    tree: TokenTree
    layout: _Layout
    host: Tensor
    arrived: torch.cuda.Event | None

    def tokens(self) -> list[list[int]] | None:
        """The drafted tree of each request, root included; None when they have not arrived: nothing here waits for them."""
        if self.arrived is not None and not self.arrived.query():
            return None
        return [row[:size] for row, size in zip(self.host.tolist(), self.tree.num_nodes, strict=True)]


def _sent(tokens: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The tokens' copy on the host, and what tells its arrival. The round's own synchronisation comes later on the same stream."""
    if tokens.device.type != "cuda":
        return tokens, None
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived


def _scored(trees: Sequence[Sequence[int]], layout: _Layout, committed: Committed) -> bool:
    """Whether the accepted paths lead through these trees; a round that accepted nothing says no more than that."""
    pairs = zip(trees, layout.lists, committed.paths, committed.tokens, strict=True)
    return all(
        node < len(own) and parents[node] == above and own[node] == token
        for own, parents, path, tokens in pairs
        for (above, node), token in zip(pairwise((0, *path)), tokens, strict=False)
    )


def default_choices(top_k: int) -> tuple[Choice, ...]:
    """The 32 likeliest paths of ranks below top_k, at most 6 deep, most likely first."""
    shares = [_RANKS[min(rank, len(_RANKS) - 1)] for rank in range(top_k)]
    return tuple(islice(best_first([shares] * _DEPTH), _NODES))


def _checked(choices: Sequence[Sequence[int]], top_k: int) -> tuple[Choice, ...]:
    tree = static_tree(choices)
    if tree.width > top_k:
        raise SpecDecError(f"tree choices: rank {tree.width - 1} needs top_k of {tree.width}, and it is {top_k}")
    return tree.choices


def _layout(trees: Sequence[StaticTree], device: torch.device) -> _Layout:
    """The trees side by side, padded to the widest."""
    lists = tuple((-1, *tree.parents) for tree in trees)
    widest = max(map(len, lists))
    rows = [[[*own, *[0] * (widest - len(own))] for own in part] for part in (lists, [(0, *tree.ranks) for tree in trees])]
    parents, ranks = on_device(rows, device)
    sizes = tuple(map(len, lists))
    live = torch.arange(widest, device=device) < on_device(sizes, device)[:, None]
    is_chain = all(parent == n - 1 for own in lists for n, parent in enumerate(own))
    return _Layout(lists, parents, parents.clamp(min=0), ranks, live, sizes, max(tree.depth for tree in trees), is_chain)


def _empty_matrix(vocabulary: int, top_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The matrix [V + 1, k] and the time of each row's last change [V + 1]; the row beyond the vocabulary is for padding.

    A row that has not been learned holds distinct tokens, so that siblings differ.
    """
    rows = torch.arange(vocabulary + 1, dtype=torch.int32, device=device)[:, None]
    ranks = torch.arange(1, top_k + 1, dtype=torch.int32, device=device)
    return (rows + ranks) % vocabulary, torch.zeros(vocabulary + 1, dtype=torch.long, device=device)


class RecyclingDrafter:
    """A static tree over a matrix that holds, for each token, the top-k tokens that the target last gave behind it.

    The matrix [V, k] learns from every node that the target scored, the rejected ones included. It is shared by all requests
    of this instance and persists across calls: the draft depends on it, the text never does. Beside it the state is the last
    token of each request. Every token is deterministic. Nothing waits for the device.
    """

    name = "recycling"
    laws = frozenset({Law.DETERMINISTIC})
    shape: Literal["chain", "tree"] = "tree"

    def __init__(self, vocabulary: int | None = None, top_k: int = 8, choices: Sequence[Sequence[int]] | None = None) -> None:
        """vocabulary: the target's; None takes that of the first call.  top_k: tokens kept behind each.

        choices: the tree, as paths of ranks below top_k, every path behind its beginning; the budget keeps the first of them.
        Raises SpecDecError for options that make no tree.
        """
        if top_k < 1 or (vocabulary is not None and vocabulary <= top_k):
            raise SpecDecError(f"top_k={top_k}, vocabulary={vocabulary}: need 1 <= top_k < vocabulary")
        self._choices = default_choices(top_k) if choices is None else _checked(choices, top_k)
        self._vocabulary, self._top_k = vocabulary, top_k
        self.taps: tuple[str, ...] = (f"top_k:{top_k}",)
        self._matrix = self._stamps = torch.zeros(0, dtype=torch.int32)
        self._clock = 0
        # Tokens whose row has been learned.
        self._learned: set[int] = set()
        self._layouts: dict[tuple[tuple[int, int, int], ...], _Layout] = {}
        self._proposed: _Proposal | None = None

    def begin(self, prompts: tuple[tuple[int, ...], ...], setup: DraftSetup) -> None:
        """Start a batch; see `Drafter.begin`. What the matrix has learned stays.

        Raises VocabularyMismatchError when it has learned from a target with another vocabulary.
        """
        if self._vocabulary not in (None, setup.vocabulary):
            raise VocabularyMismatchError(
                f"this recycling drafter holds a matrix for {self._vocabulary} tokens, the target has {setup.vocabulary}; "
                "make a drafter for each target"
            )
        if setup.vocabulary <= self._top_k:
            raise SpecDecError(f"top_k={self._top_k} needs a larger vocabulary than the target's {setup.vocabulary} tokens")
        if self._vocabulary is None or not self._matrix.numel():
            self._vocabulary = setup.vocabulary
            self._matrix, self._stamps = _empty_matrix(setup.vocabulary, self._top_k, setup.device)
        if self._matrix.device != setup.device:
            self._matrix, self._stamps = self._matrix.to(setup.device), self._stamps.to(setup.device)
            self._layouts.clear()
        self._device = setup.device
        self._last = [prompt[-1] for prompt in prompts]
        self._proposed = None

    def propose(self, budget: Budget) -> Draft:
        """The tree for each of budget.requests, the root alone where its token has not been learned; see `Drafter.propose`."""
        last = [self._last[request] for request in budget.requests]
        sizes = zip(budget.nodes, budget.depth, budget.width, strict=True)
        layout = self._layout(tuple(s if t in self._learned else (0, 0, 0) for s, t in zip(sizes, last, strict=True)))
        roots = on_device(last, self._device)[:, None]
        tokens = roots.expand(layout.above.shape)
        # Each pass is right one level further down.
        for _ in range(layout.depth):
            below = self._matrix[tokens.gather(1, layout.above), layout.ranks].long()
            tokens = torch.cat((roots, below[:, 1:]), 1)
        tree = TokenTree(tokens.masked_fill(~layout.live, 0), layout.parents, layout.num_nodes, layout.is_chain)
        self._proposed = _Proposal(budget.requests, tree, layout, *_sent(tree.tokens))
        return Draft(tree, Law.DETERMINISTIC)

    def commit(self, committed: Committed) -> None:
        """Take in the new last tokens, and what the target gave behind every node.

        A round whose tree was not the one proposed here teaches nothing. It is known by its requests, the tap's width and the
        accepted paths and tokens. Where nothing was proposed and one node was scored, that is the last token.
        """
        proposal, self._proposed = self._proposed, None
        top = committed.taps.get(self.taps[0])
        if top is not None and proposal is None:
            self._learn_last(committed.requests, top)
        elif top is not None and proposal is not None and proposal.requests == committed.requests:
            trees = proposal.tokens()
            if trees and top.shape[1] >= proposal.tree.tokens.shape[1] and _scored(trees, proposal.layout, committed):
                self._learn(proposal.tree.tokens.masked_fill(~proposal.layout.live, self._scratch), top)
                self._learned.update(*trees)
        for request, tokens in zip(committed.requests, committed.tokens, strict=True):
            self._last[request] = tokens[-1]

    @property
    def _scratch(self) -> int:
        """The row for padding."""
        return len(self._matrix) - 1

    def _learn_last(self, requests: tuple[int, ...], top: Tensor) -> None:
        """Rows of the last tokens, where they alone were scored. top: [B, 1, k]; wider ones are of another drafter's trees."""
        if top.shape[1] == 1:
            last = [self._last[request] for request in requests]
            self._learn(on_device(last, self._device)[:, None], top)
            self._learned.update(last)

    def _learn(self, tokens: Tensor, top: Tensor) -> None:
        """Rows of these tokens [B, N]; of nodes with one token the last counts, on every device. top: [B, N or more, k]."""
        top, tokens = top[:, : tokens.shape[1]], tokens.flatten()
        stamps = torch.arange(self._clock + 1, self._clock + 1 + len(tokens), device=tokens.device)
        self._stamps.scatter_reduce_(0, tokens, stamps, "amax")
        rows = torch.where(self._stamps[tokens] == stamps, tokens, self._scratch)
        self._matrix.index_copy_(0, rows, top.reshape(-1, self._top_k).int())
        self._clock += len(tokens)

    def _layout(self, sizes: tuple[tuple[int, int, int], ...]) -> _Layout:
        """The trees of these (nodes, depth, width), from memory where they have been asked for before."""
        if sizes not in self._layouts:
            if len(self._layouts) == _MOST_LAYOUTS:
                self._layouts.clear()
            self._layouts[sizes] = _layout([cut(self._choices, *size) for size in sizes], self._device)
        return self._layouts[sizes]
