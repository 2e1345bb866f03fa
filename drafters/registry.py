"""Drafters that can be asked for by name."""

from __future__ import annotations

from collections.abc import Callable

from specdec.drafters.base import Drafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import SpecDecError

FACTORIES: dict[str, Callable[[], Drafter]] = {"prompt-lookup": PromptLookupDrafter, "suffix": SuffixDrafter}


def make_drafter(name: str) -> Drafter:
    """A new drafter of that name; unknown names are an error that lists the known ones."""
    if name not in FACTORIES:
        raise SpecDecError(f"drafter {name!r} is unknown; by name there are: {', '.join(sorted(FACTORIES))}")
    return FACTORIES[name]()
