"""What a wrapper remembers, kept apart for every thread and every asyncio task that samples with it."""

from __future__ import annotations

import asyncio
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

from clockwork_hooks.clock import Clock
from clockwork_hooks.timeline import Timeline

__all__ = ["State", "States"]


@dataclass(slots=True)
class State:
    """One sampling loop: its steps and features, and the calls of the UNet that are under way in it.

    Attributes:
        timeline: steps, branches and their features.
        clock: reads the time input.
        running: the calls under way, innermost last; None for a call within a call.
        generation: of the wrapper, when this was last in step with it.
    """

    timeline: Timeline = field(default_factory=Timeline)
    clock: Clock = field(default_factory=Clock)
    running: list[Any] = field(default_factory=list)
    generation: int = 0


class States:
    """The state of the current thread or task. A ContextVar would not do: tasks share the object it holds."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._tasks: weakref.WeakKeyDictionary[Any, State] = weakref.WeakKeyDictionary()
        self.generation = 0

    def current(self) -> State:
        """The state of this thread and task, made on first use and after `forget`."""
        task = _task()
        state = getattr(self._local, "state", None) if task is None else self._tasks.get(task)
        if state is None:
            state = State(generation=self.generation)
            if task is None:
                self._local.state = state
            else:
                self._tasks[task] = state
        if state.generation != self.generation:
            state.timeline.reset()
            state.generation = self.generation
        return state

    def forget(self) -> None:
        """Every loop, in whatever thread, begins a new trajectory with its next call."""
        self.generation += 1


def _task() -> Any:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
