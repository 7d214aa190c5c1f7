"""The progress bar of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clockwork_hooks.training.trainer import Trainer

__all__ = ["Bar"]


_SHOWN = 4  # steps whose error has room in a line


class Bar:
    """Share of the run, loss, relative error by step, throughput and time left, on standard error.

    Args:
        console: rich's; None for standard error.
        shown: False draws nothing.
    """

    def __init__(self, console: Any = None, *, shown: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.table import Column

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[told]}", table_column=Column(no_wrap=False)),  # goes on below in a narrow terminal
        )
        self._progress = Progress(*columns, console=console or Console(stderr=True), transient=True, disable=not shown)
        self._task = self._progress.add_task("distilling", total=1.0, told="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, trainer: Trainer) -> None:
        """Show where the run is; what it says was read from the device before."""
        learners = trainer.learners
        parts = []
        for learner in learners[:3]:
            recent = learner.losses[-50:]
            if recent and learner.errors:
                name = f"{learner.name} " if len(learners) > 1 else ""
                errors = " ".join(_errors(learner.errors))
                parts.append(f"{name}loss {sum(recent) / len(recent):.3g}, error {errors}")
        updates = sum(learner.updates for learner in learners)
        speed = [f"{updates / trainer.seconds:.1f} steps/s"] if trainer.seconds > 0 else []
        self._progress.update(self._task, completed=trainer.share(), told=" · ".join(speed + parts))


def _errors(errors: Mapping[int, float]) -> list[str]:
    """Step and its relative error; of many steps a few, evenly spread, the first and the last among them."""
    steps = sorted(errors)
    last = len(steps) - 1
    shown = sorted({round(k * last / (_SHOWN - 1)) for k in range(_SHOWN)}) if last >= _SHOWN else range(len(steps))
    return [f"{steps[k]}: {errors[steps[k]]:.0%}" for k in shown]
