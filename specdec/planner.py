"""How much to speculate, per request and round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from specdec.errors import SpecDecError
from specdec.types import Budget, Draft, Load, RoundStats


@runtime_checkable
class Planner(Protocol):
    """Chooses a budget before each round and learns from each round after it.

    post_draw: True when `select` drops nodes on account of what was drawn; only rules that ignore q accept that.
    """

    @property
    def post_draw(self) -> bool:
        """Whether `select` looks at the drawn tokens."""

    def plan(self, load: Load) -> Budget:
        """The budget of the next round, from what is known before it."""

    def select(self, draft: Draft) -> Draft:
        """The part of the draft to score; the identity unless requests share a budget."""

    def observe(self, stats: RoundStats) -> None:
        """Learn from a finished round."""


@dataclass(frozen=True, slots=True)
class FixedPlanner:
    """The same budget every round, cut where a request is about to end.

    nodes: drafted nodes a request (root excluded).  depth: longest path.  width: most children of a node.
    """

    nodes: int = 2
    depth: int = 2
    width: int = 1
    post_draw: bool = False

    def __post_init__(self) -> None:
        for name in ("nodes", "depth", "width"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < (0 if name == "nodes" else 1):
                raise SpecDecError(f"FixedPlanner {name}={value!r}: give a whole number, at least {int(name != 'nodes')}")

    def plan(self, load: Load) -> Budget:
        """The fixed budget; a request with room for r more tokens drafts at most r - 1 deep."""
        depth = tuple([max(0, min(self.depth, room - 1)) for room in load.room])
        nodes = tuple([self.nodes if d else 0 for d in depth])
        return Budget(load.requests, nodes, depth, (self.width,) * len(depth))

    def select(self, draft: Draft) -> Draft:
        """The draft as it came."""
        return draft

    def observe(self, stats: RoundStats) -> None:
        """Nothing to learn."""


def planner_of(nodes: int | None) -> FixedPlanner | None:
    """What a command's --nodes asks for: so many drafted nodes each round, on one path or on several; None for no number."""
    return None if nodes is None else FixedPlanner(nodes=nodes, depth=max(1, nodes), width=2)
