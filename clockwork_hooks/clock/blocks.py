"""Which `with` blocks is a call inside of? Those of the functions on its stack, in whatever thread or task it runs.

A ContextVar would not do: a generator that is stepped by several threads runs in the context of whoever steps it.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from threading import get_ident
from types import FrameType
from typing import Any

__all__ = ["Block", "Blocks", "current_task"]

_OPENERS = ("__enter__", "__aenter__", "enter_context", "enter_async_context")


class Block:
    """A `with` block that is open, or was.

    Args:
        state: of the trajectory that it declares; None for a branch.
        name: of the branch; None for a trajectory.

    Attributes:
        frame: the function that it is part of; None while it is closed.
        context: thread and task that opened it.
    """

    def __init__(self, state: Any = None, name: str | None = None) -> None:
        self.state, self.name = state, name
        self.frame: FrameType | None = None
        self.context: tuple[int, Any] = (0, None)


class Blocks:
    """The blocks that are open."""

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
        others = [block for blocks in list(self._by_frame.values()) for block in list(blocks) if block not in inside]
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
