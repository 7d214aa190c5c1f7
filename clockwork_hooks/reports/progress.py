"""The progress bar of everything that takes long."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["progress"]


def progress(console: Console | None = None) -> Progress:
    """A bar with what is done, how far, and how long it will take; gone when it is over.

    Args:
        console: where it goes; None for standard error.
    """
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console or RichConsole(stderr=True), transient=True)
