"""What a wrapper remembers, kept apart for every thread, asyncio task and job of a thread pool that samples with it."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import sys
import threading
import weakref
from asyncio import _get_running_loop
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

from clockwork_hooks.clock.timeline import Timeline
from clockwork_hooks.clock.times import Clock

__all__ = ["State", "States"]


@dataclass(eq=False)  # slots would keep weak references out
class State:
    """One sampling loop: its steps and features, and the calls of the UNet that are under way in it.

    Attributes:
        timeline: steps, branches and their features.
        clock: reads the time input.
        running: the calls under way, innermost last; None for a call within a call.
        decided: where the schedule decides at run time, ((trajectory, step), why it is full or None) of the last step
            that was decided.
    """

    timeline: Timeline
    clock: Clock = field(default_factory=Clock)
    running: list[Any] = field(default_factory=list)
    decided: tuple[tuple[int, int], str | None] = ((0, 0), None)


class _Local(threading.local):
    """The state of a thread that works on no task or job."""

    state: State | None = None


class States:
    """The state of the current thread, task or job. A ContextVar would not do: tasks share the object it holds.

    A pool gives each job to whatever thread is free, so that one thread may see every other step of a loop whose
    calls are jobs of their own, and the next sampler after the last: what a job began ends with it.
    """

    def __init__(self) -> None:
        self._local = _Local()
        self._owned: weakref.WeakKeyDictionary[Any, State] = weakref.WeakKeyDictionary()
        self._all: weakref.WeakSet[State] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._thread = threading.main_thread().ident
        self._main: State | None = None
        self._lonely = True

    def __iter__(self) -> Iterator[State]:
        with self._lock:
            return iter(list(self._all))

    @property
    def alone(self) -> bool:
        """Has there been no loop but the main thread's?"""
        return self._main is not None and self._lonely

    def current(self) -> State:
        """The state of this thread, task or job, made on first use."""
        if self._main is not None and get_ident() == self._thread and _get_running_loop() is None:
            return self._main  # nearly always: no task, and no pool has the main thread
        local, owner = self._local, _task() or _job()
        state = local.state if owner is None else self._owned.get(owner)
        if state is None:
            state = State(Timeline(self._numbers))
            with self._lock:
                self._lonely = not self._all
                self._all.add(state)
                if owner is None:
                    local.state = state
                    self._main = state if get_ident() == self._thread else self._main
                else:
                    self._owned[owner] = state
        return state

    def cache(self) -> dict[str, int]:
        """Bytes that are kept for each branch, of every loop."""
        found: dict[str, int] = {}
        for state in self:
            for branch in list(state.timeline.branches):
                name = f"trajectory {state.timeline.trajectory}, branch {branch.label}"
                if branch.nbytes:
                    found[name] = found.get(name, 0) + branch.nbytes
        return found

    def forget(self) -> None:
        """Every loop, in whatever thread, begins a new trajectory with its next call; what was kept is let go."""
        for state in self:  # a call under way goes on with the old one: what it keeps is let go with it
            state.timeline = Timeline(self._numbers, names=state.timeline.names)


def _task() -> Any:
    loop = _get_running_loop()  # `current_task` alone raises where there is none, which takes microseconds
    return None if loop is None else asyncio.current_task(loop)


def _job() -> Any:
    """What a thread of a pool is working on; None in other threads."""
    pools = sys.modules.get("concurrent.futures.thread")
    if pools is None or threading.current_thread() is threading.main_thread():
        return None
    run = getattr(getattr(pools, "_WorkItem", None), "run", None)
    code, frame = getattr(run, "__code__", None), inspect.currentframe()
    found = None
    while frame is not None:
        found = frame.f_locals.get("self") if frame.f_code is code else found
        frame = frame.f_back
    return found
