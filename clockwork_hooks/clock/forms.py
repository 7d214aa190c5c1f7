"""Inputs that are the time in another form: sigma, step index, percentage, next time. They tell no branch.

Such an input has the same value in all calls at one time, and another one as soon as the time has another one. So it
says nothing that the time does not say, and the time is no condition either: what it steers within the region, the time
steers. Whatever departs from this once is a condition for the rest of the trajectory.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from clockwork_hooks._tree import version
from clockwork_hooks.graph.arguments import is_number

__all__ = ["TimeForms", "may_be_form"]

_LARGEST = 1024  # elements
_UNREAD_MOVES = 1  # nothing that is kept was computed from it
_READ_MOVES = 3  # a number: as many as the strides that plain times are believed after


@dataclass(slots=True)
class _Input:
    """What was seen of one input in this trajectory.

    Attributes:
        time: of the last call.
        value: in the last call.
        original: the tensor that it was read from, and how often that was written to.
        moves: times at which it had another value, as it should.
        direction: does it rise or fall where the time rises?
        tells: it does not go with the time, so it is a condition.
    """

    time: float | None
    value: Any
    original: tuple[Any, int]
    moves: int = 0
    direction: int = 0
    tells: bool = False


class TimeForms:
    """Finds the inputs that go with the time, in one trajectory.

    A number (or a floating tensor of one value) has to rise or to fall in step with the time, three times in a row
    before it is believed. A small tensor that no operator of the recorded call has read has only to change with it,
    once: no feature was computed from it.

    Example:
        >>> forms = TimeForms()
        >>> [sorted(forms.among(900.0 - 100 * k, ["index", "scale"], [k, 7.5])) for k in range(5)]
        [[], [], [], [0], [0]]
    """

    __slots__ = ("_inputs",)

    def __init__(self) -> None:
        self._inputs: dict[str, _Input] = {}

    def begin(self) -> None:
        """A trajectory begins."""
        self._inputs.clear()

    def among(
        self, time: float | None, paths: Sequence[str], values: Sequence[Any], unread: Collection[str] = ()
    ) -> set[int]:
        """Which of these inputs of a call are the time in another form, as far as is known now.

        Args:
            time: of the call; None if it cannot be told.
            paths: of the inputs.
            values: of the inputs.
            unread: paths of those that no operator of the recorded call has read.
        """
        return {
            k
            for k, (path, value) in enumerate(zip(paths, values, strict=False))
            if may_be_form(value, unread=path in unread) and self._is_form(time, path, value, path in unread)
        }

    def _is_form(self, time: float | None, path: str, value: Any, unread: bool) -> bool:
        before = self._inputs.get(path)
        if before is None:
            self._inputs[path] = _Input(time, _read(value), _original(value))
            return False
        if before.tells:
            return False
        same = isinstance(value, torch.Tensor) and before.original == (id(value), version(value)) and version(value) >= 0
        now = before.value if same else _read(value)
        before.tells = not _follows(before, time, now, unread)
        before.time, before.value, before.original = time, now, _original(value)
        return not before.tells and before.moves >= (_UNREAD_MOVES if unread else _READ_MOVES)


def may_be_form(value: Any, *, unread: bool) -> bool:
    """Is it a number, or a small tensor that may hold one?"""
    if not isinstance(value, torch.Tensor):
        return is_number(value)
    plain = type(value) in (torch.Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_meta
    if not plain or isinstance(value, FakeTensor) or value.is_nested or not 0 < value.numel() <= _LARGEST:
        return False
    return unread or (value.is_floating_point() and value.numel() == (value.shape[0] if value.ndim else 1))


def _follows(before: _Input, time: float | None, now: Any, unread: bool) -> bool:
    """Does the input go with the time, from the call before to this one?"""
    if time is None or before.time is None:
        return False
    if time == before.time:
        return bool(now == before.value)
    if now == before.value:
        return False
    before.moves += 1
    if unread:
        return True
    if not isinstance(now, float) or not isinstance(before.value, float):
        return False
    direction = 1 if (now > before.value) == (time > before.time) else -1
    steady = before.direction in (0, direction)
    before.direction = direction
    return steady


def _read(value: Any) -> Any:
    """A number where it is one number, else all of its elements."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    elements = tuple(value.detach().flatten().tolist())
    return float(elements[0]) if len(set(elements)) == 1 and not isinstance(elements[0], complex) else elements


def _original(value: Any) -> tuple[Any, int]:
    return (id(value), version(value)) if isinstance(value, torch.Tensor) else (None, 0)
