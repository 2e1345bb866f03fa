"""The values that cross a folder: frozen dataclasses, nothing else.

Letters: B requests in the round, N tree nodes (root included), V vocabulary, D depth, K drafted tokens
on a chain, R packed rows, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor


class Law(StrEnum):
    """How the tokens of a draft were drawn, which decides the rules that may verify it."""

    DETERMINISTIC = "deterministic"  # top-k, n-gram: there is no q
    INDEPENDENT = "independent"  # one draw per node from q
    WITHOUT_REPLACEMENT = "without_replacement"  # siblings drawn from q without replacement
    COUPLED = "coupled"  # argmax(log q + G) with the target's own noise G


@dataclass(frozen=True, slots=True)
class TokenTree:
    """A draft tree for each request of the round, in topological order: parents[b, n] < n.

    Node 0 is the last committed token, whose KV is not in the cache yet, so a tree of one node is plain
    decoding. tokens: [B, N] int64.  parents: [B, N] int64, parents[:, 0] == -1.  num_nodes: B host
    integers, root included; nodes at or beyond num_nodes[b] are padding (token 0, parent 0) and are never
    run. is_chain: every node's parent is the node before it (a promise of the builder, used as a fast path).
    """

    tokens: Tensor
    parents: Tensor
    num_nodes: tuple[int, ...]
    is_chain: bool = False


@dataclass(frozen=True, slots=True)
class SlotStats:
    """What a drafter knew of each drafted token. All [B, K] fp32 on the device; K drafted nodes in order, root excluded.

    largest: largest probability of q, the law that the token was drawn from.  entropy: of q, in nats. Both were known before the
    draw.  drawn: the drawn token's own probability under q. That is post-draw: who drops tokens for it marks the draft so.
    Behind a request's own nodes the values mean nothing.
    """

    largest: Tensor
    entropy: Tensor
    drawn: Tensor


# On the host, of one drafted token: largest, entropy, drawn.
Slot = tuple[float, float, float]
# (depth, from 0; largest probability and entropy of each request's q) to whether each request stops before that draw.
Stop = Callable[[int, Sequence[float], Sequence[float]], Sequence[bool]]


@dataclass(frozen=True, slots=True)
class Draft:
    """A tree and the law of the draw.

    q: [B, N, V] or None; row n is the law that the children of node n were drawn from, after the same
    logits processing as the target and in the dtype that was drawn from. None for DETERMINISTIC and COUPLED.
    post_draw: tokens were dropped on account of what was drawn; only rules that ignore q accept that.
    slots: where the budget asked for them and the drafter has them.
    """

    tree: TokenTree
    law: Law
    q: Tensor | None = None
    post_draw: bool = False
    slots: SlotStats | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """Target logits at every node. logits: [B, N, V], padding nodes hold the root's row.

    taps: name -> [B, N, H] hidden states, or [B, N, n] token ids, for the names that the drafter asked for.
    """

    logits: Tensor
    taps: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a rule decided, on the device.

    num_accepted: [B] int64.  path: [B, D] int64, the accepted nodes in order of depth, root excluded, then padding; None
    for chains, where it is 1, 2, ... num_accepted.
    next_token: [B] int64, the recovered or bonus token; -1 where the row that it would come from holds NaN.
    """

    num_accepted: Tensor
    next_token: Tensor
    path: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Committed:
    """What a round added to the text, on the host, after the round's one synchronisation.

    requests: B slots.  tokens[i]: the accepted tokens and then the next token of requests[i].
    num_accepted: B host integers.  paths[i]: the accepted nodes in order of depth, root excluded.
    taps: name -> [B, N, H] or [B, N, n], of the scored nodes.
    """

    requests: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    num_accepted: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...] = ()
    taps: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DrafterTraits:
    """What a planner knows of a drafter. name: what `Budget.drafter` calls it.  shape: "chain" or "tree"."""

    name: str
    shape: str


@dataclass(frozen=True, slots=True)
class Load:
    """What a planner may look at before a round. requests: active slots.  lengths: committed tokens of each.

    room: how many tokens each request may still emit, so that a draft never runs past the end.
    drafters: those that can be chosen, the only one among them.
    """

    requests: tuple[int, ...]
    lengths: tuple[int, ...]
    room: tuple[int, ...]
    drafters: tuple[DrafterTraits, ...] = ()


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a planner expected of a round, before it. why: plain, first, trial, plan, hope.  tokens: of all requests."""

    why: str
    tokens: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Budget:
    """How much to speculate in a round. One entry per request of the round.

    nodes: most drafted nodes (root excluded).  depth: longest path.  width: most children of a node and
    most nodes a level expands.  drafter: which drafter, None for the only one.  stop: asked before a draw
    with what is known by then, never after it; None never stops. A request that stopped drafts no further in this round; the
    chain ends when all have. Trees do not ask.  slots: whether the draft is to carry its `SlotStats`.  forecast: for the stats.
    """

    requests: tuple[int, ...]
    nodes: tuple[int, ...]
    depth: tuple[int, ...]
    width: tuple[int, ...]
    drafter: str | None = None
    stop: Stop | None = None
    forecast: Forecast | None = None
    slots: bool = False


@dataclass(frozen=True, slots=True)
class RoundStats:
    """What a round did. drafted and accepted: tokens per request.  depth: levels that each request's draft had room for.

    drafter: the one that drafted, None where there is only one.  forecast: what the planner expected.  paths: accepted nodes.
    parents: of each request's nodes, the root left out; None for chains.
    slots: of each request's drafted tokens, where the budget asked for them.

    Times in seconds. draft_s: proposing, the draft model's forwards included.  forward_s: inside the models' forwards, target and
    draft.  cold_draft, cold_target: a prompt was taken in, or a size ran for the first time or was not captured yet but will be,
    so the time says nothing of later rounds.
    """

    requests: tuple[int, ...]
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    depth: tuple[int, ...]
    num_rows: int
    draft_s: float
    target_s: float
    verify_s: float
    other_s: float
    forward_s: float = 0.0
    drafter: str | None = None
    forecast: Forecast | None = None
    paths: tuple[tuple[int, ...], ...] = ()
    parents: tuple[tuple[int, ...], ...] | None = None
    slots: tuple[tuple[Slot, ...], ...] | None = None
    cold_draft: bool = False
    cold_target: bool = False

    @property
    def seconds(self) -> float:
        """Of the whole round."""
        return self.draft_s + self.undrafted_s

    @property
    def undrafted_s(self) -> float:
        """Seconds of the round without its drafting."""
        return self.target_s + self.verify_s + self.other_s

    @property
    def levels(self) -> tuple[tuple[tuple[int, int], ...], ...] | None:
        """Of each request's tree, (children, rank of the accepted one or -1) at each node of its path that has children.

        None for chains, where `drafted` and `accepted` say as much.
        """
        if self.parents is None:
            return None
        return tuple(map(_levels, self.parents, self.paths))


def _levels(parents: tuple[int, ...], path: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    found = []
    for node, kept in zip((0, *path), (*path, -1), strict=True):
        children = [child for child, parent in enumerate(parents, 1) if parent == node]
        if children:
            found.append((len(children), children.index(kept) if kept >= 0 else -1))
    return tuple(found)
