"""The values that cross a folder: frozen dataclasses, nothing else.

Letters: B requests in the round, N tree nodes (root included), V vocabulary, D depth, K drafted tokens
on a chain, R packed rows, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
class Draft:
    """A tree and the law of the draw.

    q: [B, N, V] or None; row n is the law that the children of node n were drawn from, after the same
    logits processing as the target and in the dtype that was drawn from. None for DETERMINISTIC and COUPLED.
    post_draw: tokens were dropped on account of what was drawn; only rules that ignore q accept that.
    """

    tree: TokenTree
    law: Law
    q: Tensor | None = None
    post_draw: bool = False


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
class Load:
    """What a planner may look at before a round. requests: active slots.  lengths: committed tokens of each.

    room: how many tokens each request may still emit, so that a draft never runs past the end.
    """

    requests: tuple[int, ...]
    lengths: tuple[int, ...]
    room: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Budget:
    """How much to speculate in a round. One entry per request of the round.

    nodes: most drafted nodes (root excluded).  depth: longest path.  width: most children of a node and
    most nodes a level expands.  drafter: which drafter, None for the only one.  stop: asked before a draw
    with what is known by then, never after it; None never stops.
    """

    requests: tuple[int, ...]
    nodes: tuple[int, ...]
    depth: tuple[int, ...]
    width: tuple[int, ...]
    drafter: str | None = None
    stop: Callable[[float], bool] | None = None


@dataclass(frozen=True, slots=True)
class RoundStats:
    """What a round did. drafted and accepted: tokens per request.  depth: levels that each request's draft had room for.

    Times in seconds.

    draft_s: proposing, the draft model's forwards included.  forward_s: inside the models' forwards, target and draft.
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
