"""Drafters that can be asked for by name or by a checkpoint's path."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from specdec.drafters.base import Drafter
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.pard import PardDrafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.drafters.recycling import RecyclingDrafter
from specdec.drafters.retrieval import RetrievalDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import SpecDecError
from specdec.loading import load_model

FACTORIES: dict[str, Callable[[], Drafter]] = {
    "prompt-lookup": PromptLookupDrafter,
    "suffix": SuffixDrafter,
    "retrieval": RetrievalDrafter,
    "recycling": RecyclingDrafter,
}


def make_drafter(name: str) -> Drafter:
    """A new drafter of that name; unknown names are an error that lists the known ones."""
    if name not in FACTORIES:
        raise SpecDecError(f"drafter {name!r} is unknown; by name there are: {', '.join(sorted(FACTORIES))}")
    return FACTORIES[name]()


def load_drafter(path: str | Path, target: nn.Module) -> Drafter:
    """The drafter that a checkpoint is of, on the target's device: Medusa heads or a PARD model as their config.json says, else a
    draft model. Raises CheckpointError, and what the drafters raise."""
    config = _config_of(path)
    device = next(target.parameters()).device
    if "medusa_num_heads" in config or config.get("model_type") in ("medusa", "specdec-medusa"):
        return MedusaDrafter.from_pretrained(path, target)
    if "pard_token" in config or config.get("spd_type") == "pard":
        return PardDrafter.from_pretrained(path, device=device)
    return DraftModelDrafter(load_model(path, device=device))


def _config_of(path: str | Path) -> dict[str, Any]:
    """config.json of a local folder; nothing where there is none, which loading the model then says better."""
    try:
        found = json.loads((Path(path).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
