"""`specdec train` and `specdec export`: drafters are made here, and written in the layouts that others read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from specdec.errors import SpecDecError
from specdec.training.config import DraftTraining, MedusaTraining, PardTraining, RegenerateConfig
from specdec.training.settings import list_flags, load_config

_KINDS: dict[str, Any] = {
    "medusa": MedusaTraining,
    "pard": PardTraining,
    "draft-model": DraftTraining,
    "regenerate": RegenerateConfig,
}


def show_flags(method: str, console: Console) -> None:
    """Every setting of a method, its default and what is allowed."""
    table = Table("flag", "default", "what", "allowed", title=f"specdec train {method}", title_justify="left")
    for flag in list_flags(_KINDS[method]):
        default = " ".join(map(str, flag.default)) if isinstance(flag.default, tuple) else str(flag.default)
        table.add_row(f"--{flag.name}", default, flag.opt.about, flag.allowed)
    console.print(table)


def run_train(method: str, recipe: str | None, file: str | None, flags: Sequence[str], console: Console) -> None:
    """Train by a recipe, the user's file and flags. Raises SpecDecError."""
    config = load_config(_KINDS[method], recipe=recipe or _recipe_of(method), file=file, flags=flags)
    if isinstance(config, RegenerateConfig):
        _regenerate(config, console)
        return
    from specdec.training.loop import train

    train(config, _objective(method), sys.argv, console)


def _recipe_of(method: str) -> str | None:
    return None if method == "regenerate" else method.replace("-", "_")


def _objective(method: str) -> Any:
    if method == "medusa":
        from specdec.training.objective_medusa import MedusaObjective

        return MedusaObjective
    if method == "pard":
        from specdec.training.objective_pard import PardObjective

        return PardObjective
    from specdec.training.objective_draft import DraftObjective

    return DraftObjective


def _regenerate(config: RegenerateConfig, console: Console) -> None:
    from specdec.training.regenerate import regenerate

    report = regenerate(config, console=console)
    console.print(f"{report.rows:,} rows in {config.out}: {report.written:,} written now, {report.tokens:,} tokens generated")
    if report.too_long or report.unfinished:
        console.print(f"{report.too_long} left out for length, {report.unfinished} cut at {config.max_new_tokens} tokens")


def run_export(source: str, to: str, out: str, target: str | None, repository: str | None, console: Console) -> None:
    """Write a drafter in another layout, read it back before saying so, and upload it where asked. Raises SpecDecError."""
    from specdec.training.export import EXPORTS, export

    if to not in EXPORTS:
        raise SpecDecError(f"--to {to!r} is unknown; allowed: {', '.join(EXPORTS)}")
    console.print(export(source, to, out, target), highlight=False)
    if repository is not None:
        from specdec.training.hub import push

        console.print(f"uploaded: {push(Path(out), repository)}", highlight=False)
