"""The progress bar of everything that takes long."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

EVERY = 30.0  # seconds between lines where there is no terminal


class ProgressBar(Progress):
    """How far the work is and how long it will take; without a terminal, a line of it every 30 seconds.

    It leaves a terminal as it was. A task may have a `detail`, which stands behind the time: `bar.update(task,
    detail="loss 0.1")`.

    Args:
        console: where it goes; None for standard error.
        shown: False shows nothing.

    Example:
        >>> with ProgressBar(shown=False) as bar:
        ...     task = bar.add_task("sampling", total=8)
        ...     bar.advance(task)
        >>> bar.tasks[0].percentage
        12.5
    """

    def __init__(self, console: Console | None = None, *, shown: bool = True) -> None:
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[detail]}", markup=False, table_column=Column(no_wrap=False)),  # may go on below
            console=console or Console(stderr=True),
            transient=True,
            disable=not shown,
        )
        self._last_line = time.monotonic()

    def add_task(self, description: str, *args: Any, **fields: Any) -> TaskID:
        """A new task, as in rich."""
        return super().add_task(description, *args, **{"detail": "", **fields})

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change a task, as in rich."""
        super().update(task_id, **changes)
        self._line(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """So much more of a task is done."""
        super().advance(task_id, advance)
        self._line(task_id)

    def stop(self) -> None:
        """End the display, without the empty line that rich prints where there is no terminal."""
        self.live.stop()

    def _line(self, task_id: TaskID) -> None:
        silent = self.disable or self.console.is_terminal or self.console.is_jupyter
        if silent or time.monotonic() - self._last_line < EVERY:
            return
        self._last_line = time.monotonic()
        task = next(task for task in self.tasks if task.id == task_id)
        left = "" if task.time_remaining is None else f", {timedelta(seconds=int(task.time_remaining))} left"
        words = [f"{task.description} {task.percentage:.0f}%, {timedelta(seconds=int(task.elapsed or 0))}{left}"]
        self.console.print("  ".join([*words, *filter(None, [task.fields["detail"]])]), markup=False, highlight=False)
