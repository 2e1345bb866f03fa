"""The line that a run shows: steps, loss, acceptance by slot, tokens a second, time left."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_NO_SLOT = ("loss", "tokens_per_s", "rate")


class ProgressLine:
    """A context in which `update` moves the line; nothing is shown where `shown` is false."""

    def __init__(self, console: Console, steps: int, first: int, *, shown: bool) -> None:
        """first: the step that the run begins with."""
        columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not shown)
        self._task = self._progress.add_task("", total=steps, completed=first)

    def __enter__(self) -> ProgressLine:
        """Show it."""
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Leave it as it stands."""
        self._progress.stop()

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        """figures: of the last steps, as the loop logs them."""
        slots = " ".join(f"{value:.2f}" for name, value in figures.items() if name not in _NO_SLOT)
        text = f"loss {figures['loss']:.3f} · accepted {slots} · {figures['tokens_per_s']:,.0f} tokens/s"
        self._progress.update(self._task, completed=step, description=text)
