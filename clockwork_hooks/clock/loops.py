"""Which sampling loop a call belongs to: a wrapper remembers each thread's, task's and declared trajectory's apart.

Calls that are compiled, traced, transformed or run again by a backward pass stand apart from any loop
(`stands_apart`). What a transform computes is of the UNet, not of an approximation that depends on the call before,
and a call that is run again has to do what it did the first time. So both are full passes, and belong to no
trajectory.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import get_ident
from types import FrameType
from typing import Any

from torch import _C, is_inference_mode_enabled

from clockwork_hooks.clock.reasons import COMPILED, REPEATED, TRANSFORMED, UNTOLD
from clockwork_hooks.clock.samplers import SamplerSteps
from clockwork_hooks.clock.timeline import Timeline
from clockwork_hooks.clock.times import TimeReader

_OPENERS = ("__enter__", "__aenter__", "enter_context", "enter_async_context")


@dataclass(eq=False)  # slots would keep weak references out
class State:
    """One sampling loop: its steps and features, and the calls of the UNet that are under way in it.

    Attributes:
        timeline: steps, branches and their features.
        reader: reads the time input.
        calls: the calls under way, innermost last; None for a call within a call.
        decided: where the schedule decides at run time, ((trajectory, step), why it is full or None) of the last step
            that was decided.
        thread: which one used it last.
        sampler: tells which calls begin a step, where the loop's sampler is declared.
    """

    timeline: Timeline
    reader: TimeReader = field(default_factory=TimeReader)
    calls: list[Any] = field(default_factory=list)
    decided: tuple[tuple[int, int], str | None] = ((0, 0), None)
    thread: int = 0
    sampler: SamplerSteps | None = None


class _Local(threading.local):
    """Of a thread: the state of its calls outside of tasks and trajectories, and of one that came at the same time."""

    state: State | None = None
    extra: State | None = None


class States:
    """The state of the current call: of the trajectory that it is declared to be of, else of its task, else its thread.

    A ContextVar would not do: tasks share the object it holds. Threads of a pool go from job to job, so a thread may
    see every other call of a loop: the timelines look at each other for that.
    """

    def __init__(self, oldest: int = 1) -> None:
        self.blocks, self._oldest = Blocks(), oldest
        self._local = _Local()
        self._tasks: weakref.WeakKeyDictionary[Any, State] = weakref.WeakKeyDictionary()
        self._named: weakref.WeakValueDictionary[str, State] = weakref.WeakValueDictionary()
        self._all: weakref.WeakSet[State] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)

    @property
    def alone(self) -> bool:
        """Is there one loop now? Of trajectories that are declared the open ones count, else threads and tasks."""
        declared = {id(block.state) for block in self.blocks.opened() if block.state is not None}
        return len(declared) == 1 if declared else sum(not state.timeline.trusted for state in self) == 1

    def __iter__(self) -> Iterator[State]:
        with self._lock:
            return iter(list(self._all))

    def current(self) -> State:
        """The state of this call, made on first use."""
        extra = self._local.extra
        if extra is not None and extra.calls:
            return extra
        if not self.blocks:
            return self.thread_or_task()
        blocks, unsure = self.blocks.around()
        state = next((block.state for block in reversed(blocks) if block.state is not None), None)
        if state is None:
            state = self.thread_or_task()
            state.timeline.unsure = unsure
        elif state.calls and state.thread != get_ident():
            state.timeline.reset()  # calls of one trajectory at the same time have no order
            state = self._local.extra = self._local.extra or self._make()
            state.timeline.reset()
        if not state.calls:
            state.thread = get_ident()
        state.timeline.names[:] = [block.name for block in blocks if block.name is not None]
        named = next((block for block in reversed(blocks) if block.rows), None)
        state.timeline.row_names, state.timeline.rows_exact = (named.rows, named.exact) if named else ((), True)
        return state

    def thread_or_task(self) -> State:
        """The state of this task, else of this thread, whatever blocks are open."""
        task = current_task()
        state = self._local.state if task is None else self._tasks.get(task)
        if state is None:
            state = self._make()
            if task is None:
                self._local.state = state
            else:
                self._tasks[task] = state
        elif not self.blocks and (state.timeline.unsure or state.timeline.names or state.timeline.row_names):
            state.timeline.unsure, state.timeline.row_names = False, ()
            state.timeline.names.clear()
        return state

    def of_trajectory(self, name: str | None, steps: int | None = None) -> State:
        """The state of the trajectory that is open under this name, else a new one, of so many steps."""
        with self._lock:
            state = None if name is None else self._named.get(name)
            if state is None:
                state = self._make(trusted=True, steps=steps)
                if name is not None:
                    self._named[name] = state
            return state

    def _make(self, *, trusted: bool = False, steps: int | None = None) -> State:
        state = State(self._timeline(trusted=trusted, steps=steps))
        with self._lock:
            self._all.add(state)
        return state

    def _timeline(self, *, trusted: bool, steps: int | None, names: Sequence[str] = ()) -> Timeline:
        others, oldest = self._timelines, self._oldest
        return Timeline(self._numbers, trusted=trusted, others=others, names=names, steps=steps, oldest=oldest)

    def _timelines(self) -> Sequence[Timeline]:
        return () if len(self._all) < 2 else [state.timeline for state in self]

    def cache(self) -> dict[str, int]:
        """Bytes that are kept for each branch, of every loop."""
        sizes: dict[str, int] = {}
        for state in self:
            for branch in list(state.timeline.branches):
                name = f"trajectory {state.timeline.trajectory}, branch {branch.label}"
                if branch.nbytes:
                    sizes[name] = sizes.get(name, 0) + branch.nbytes
        return sizes

    def forget(self) -> None:
        """Every loop, in whatever thread, begins a new trajectory with its next call; what was kept is let go."""
        for state in self:  # a call under way goes on with the old one: what it keeps is let go with it
            old = state.timeline
            state.timeline = self._timeline(trusted=old.trusted, names=old.names, steps=old.declared_steps)


class TrajectoryBlock(contextlib.AbstractContextManager["TrajectoryBlock"]):
    """One sampling run, as `ClockworkWrapper.trajectory` declares it.

    Args:
        states: of the wrapper.
        name: blocks of one name that are open at the same time are of the same run; None for a run of its own.
        unet: what `__call__` calls.
        steps: of the run; None where that is not known.
        sampler: tells which calls begin a step; None where times or declarations do.
    """

    def __init__(
        self,
        states: States,
        name: str | None,
        unet: Callable[..., Any],
        steps: int | None = None,
        sampler: SamplerSteps | None = None,
    ) -> None:
        self.name, self.steps, self._states, self._unet = name, steps, states, unet
        self._sampler = sampler
        self._state: State | None = None
        self._block: Block | None = None

    def __enter__(self) -> TrajectoryBlock:
        self._states.thread_or_task().timeline.reset()
        self._block = Block(self._begun())
        self._states.blocks.open(self._block, sys._getframe(1))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the UNet as a part of this run, from whatever thread or task."""
        block = Block(self._begun())
        self._states.blocks.open(block, sys._getframe())
        try:
            return self._unet(*args, **kwargs)
        finally:
            self._states.blocks.close(block)

    def close(self) -> None:
        """The run is over; what it remembers is let go."""
        if self._block is not None:
            self._states.blocks.close(self._block)
        self._block = self._state = None

    def _begun(self) -> State:
        if self._state is None:
            self._state = self._states.of_trajectory(self.name, self.steps)
            self._state.sampler = self._sampler or self._state.sampler
        return self._state


class BranchBlock(contextlib.AbstractContextManager[None]):
    """Calls of a guidance branch that has a name, or whose batch has rows with names; an error ends the run.

    As `ClockworkWrapper.branch` and `ClockworkWrapper.rows` declare it.

    Args:
        states: of the wrapper.
        name: of the branch.
        rows: names of the rows.
        exact: is a call with another number of rows an error?
    """

    def __init__(
        self, states: States, name: str | None = None, rows: tuple[str, ...] = (), *, exact: bool = True
    ) -> None:
        self._states, self._block = states, Block(name=name, rows=rows, exact=exact)

    def __enter__(self) -> None:
        self._states.blocks.open(self._block, sys._getframe(1))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._states.current().timeline.reset()
        self._states.blocks.close(self._block)


# -- which `with` blocks is a call inside of? -----------------------------------------------------------------------


class Block:
    """A `with` block that is open, or was.

    Args:
        state: of the trajectory that it declares; None for a branch.
        name: of the branch; None for a trajectory.
        rows: names of the rows of each call's batch; none where nobody names them.
        exact: is a call with another number of rows an error? Else it has no names.

    Attributes:
        frame: the function that it is part of; None while it is closed.
        context: thread and task that opened it.
    """

    def __init__(
        self, state: Any = None, name: str | None = None, rows: tuple[str, ...] = (), *, exact: bool = True
    ) -> None:
        self.state, self.name, self.rows, self.exact = state, name, rows, exact
        self.frame: FrameType | None = None
        self.context: tuple[int, Any] = (0, None)


class Blocks:
    """The blocks that are open. A call is inside of those of the functions on its stack, in whatever thread or task.

    A ContextVar would not do: a generator that is stepped by several threads runs in the context of whoever steps it.
    """

    def __init__(self) -> None:
        self._by_frame: dict[int, list[Block]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_frame)

    def open(self, block: Block, frame: FrameType) -> None:
        """From here on, calls on whose stack this function is are inside of the block."""
        block.frame = frame = _function(frame)
        block.context = get_ident(), current_task()
        self._by_frame.setdefault(id(frame), []).append(block)

    def close(self, block: Block) -> None:
        """Undo `open`; idempotent."""
        frame, block.frame = block.frame, None
        blocks = self._by_frame.get(id(frame), [])
        if block in blocks:
            blocks.remove(block)
        if not blocks:
            self._by_frame.pop(id(frame), None)

    def opened(self) -> list[Block]:
        """All of them."""
        return [block for blocks in list(self._by_frame.values()) for block in list(blocks)]

    def around(self) -> tuple[list[Block], bool]:
        """The blocks that the caller is inside of, outermost first; and whether it may be inside of others.

        It may where this thread or task opened one in a function that is not on the stack: a generator that somebody
        else steps now, or a function that opened it for others and is over.
        """
        inside: list[Block] = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            inside += reversed(self._by_frame.get(id(frame), ()))
            frame = frame.f_back
        context = get_ident(), current_task()
        others = [block for block in self.opened() if block not in inside]
        return inside[::-1], any(block.context == context for block in others)


def current_task() -> Any:
    """The asyncio task that runs in this thread."""
    loop = asyncio._get_running_loop()  # `current_task` raises without one: 9 µs between two calls of a UNet
    return None if loop is None else asyncio.current_task(loop)


def _function(frame: FrameType) -> FrameType:
    """The function that the block is part of: not one that opens it for another, as `ExitStack` and helpers do."""
    while (caller := frame.f_back) is not None:
        generator = frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR)
        if not (frame.f_code.co_name in _OPENERS or (generator and caller.f_code.co_name in _OPENERS)):
            break
        frame = caller
    return frame


# -- calls that are of none ------------------------------------------------------------------------------------------


def stands_apart() -> str | None:
    """Why the call that begins now is none of a sampling loop's; None where it is. Reads six flags of torch.

    The flags have no public names. Where torch lacks one of them nobody can tell, so every call is a full pass.

    Example:
        >>> import torch
        >>> seen = []
        >>> def f(x):
        ...     seen.append(stands_apart())
        ...     return x * x
        >>> f(torch.ones(1)), torch.func.vjp(f, torch.ones(1))[0]
        (tensor([1.]), tensor([1.]))
        >>> seen
        [None, 'within a transform of torch.func']
    """
    try:
        if _C._get_tracing_state() is not None:
            return COMPILED
        if _C._len_torch_dispatch_stack() and _C._get_dispatch_mode(_C._TorchDispatchModeKey.PROXY) is not None:
            return COMPILED  # by `make_fx`
        if _C._functorch.peek_interpreter_stack() is not None:
            return TRANSFORMED
        if _C._current_graph_task_id() != -1:  # it is run again
            return REPEATED
        if _checkpoint() is not None or _in_function():  # it will be
            return REPEATED
    except AttributeError:
        return UNTOLD
    return None


def saved_for_again(*, exits: bool) -> Sequence[object]:
    """What a second run of the code that runs now is for: where it is empty at the end, there will be none.

    A backward pass runs code again that stands within `torch.utils.checkpoint`, if anything was saved of what ran there
    beside skipped modules, which grows as it runs; and within an `autograd.Function`, if it computes what is returned.

    Args:
        exits: does the region's exit come of it?
    """
    try:
        if _in_function():
            return (True,) if exits else ()
        pack = _checkpoint()
        if pack is None:
            return ()
        held = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))
        saved: Sequence[object] = held["frame"].cell_contents.weak_holders
    except (AttributeError, KeyError):  # another torch
        return (True,)
    return saved


def _checkpoint() -> Any:
    """The hook by which the innermost `torch.utils.checkpoint` around this code saves tensors; None outside of any."""
    hooks = _C._autograd._top_saved_tensors_default_hooks(False)
    return hooks[0] if hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint" else None


def _in_function() -> bool:
    """Does the forward of an `autograd.Function` run, as in a reentrant checkpoint?"""
    return not _C._is_fwd_grad_enabled() and not is_inference_mode_enabled()
