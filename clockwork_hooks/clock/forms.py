"""Inputs that are the time in another form: sigma, step index, percentage, next time. They tell no branch.

Such an input has the same value in all calls at one time, and another one as soon as the time has another one. So it
says nothing that the time does not say, and the time is no condition either: what it steers within the region, the time
steers. Whatever departs from this once is a condition for the rest of the trajectory.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from clockwork_hooks._tree import version
from clockwork_hooks.clock import reasons
from clockwork_hooks.clock.evidence import Strides
from clockwork_hooks.graph.arguments import is_number

__all__ = ["TimeForms", "may_be_form"]

_LARGEST = 1024  # elements


@dataclass(slots=True)
class _Input:
    """What was seen of one input in this trajectory.

    Attributes:
        time: of the last call.
        value: in the last call.
        original: the tensor that it was read from, and how often that was written to.
        believed: is it the time in another form, as far as was seen?
        direction: does it rise or fall where the time rises?
        strides: of a number.
        tells: it does not go with the time, so it is a condition.
    """

    time: float | None
    value: Any
    original: tuple[weakref.ref[torch.Tensor] | None, int]
    believed: bool = False
    direction: int = 0
    strides: Strides = field(default_factory=Strides)
    tells: bool = False


class TimeForms:
    """Finds the inputs that go with the time, in one trajectory.

    A number (or a floating tensor of one value) has to rise or to fall with the time, and is believed as plain times
    are: after three equal strides, or five that follow a trend. One that no operator of the recorded call has read is
    believed at once, and may take any strides: no feature was computed from it.

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
        now = before.value if _untouched(value, *before.original) else _read(value)
        before.tells = not _follows(before, time, now, unread)
        before.time, before.value, before.original = time, now, _original(value)
        return before.believed and not before.tells


def may_be_form(value: Any, *, unread: bool) -> bool:
    """Is it a number, or a small tensor that may hold one, perhaps once for each row?"""
    if not isinstance(value, torch.Tensor):
        return is_number(value) and getattr(getattr(value, "dtype", None), "kind", "f") in "iuf"  # numpy has others
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
    if now == before.value or not isinstance(now, float) or not isinstance(before.value, float):
        return False
    direction = 1 if (now > before.value) == (time > before.time) else -1
    steady, before.direction = before.direction in (0, direction), direction
    doubt = before.strides.doubt(abs(now - before.value))
    before.believed = unread or doubt is None
    return steady and (unread or doubt != reasons.STRIDE)


def _read(value: Any) -> Any:
    """A number where it is one number, else all of its elements."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    elements = tuple(value.detach().flatten().tolist())
    return float(elements[0]) if len(set(elements)) == 1 and not isinstance(elements[0], complex) else elements


def _original(value: Any) -> tuple[weakref.ref[torch.Tensor] | None, int]:
    return (weakref.ref(value), version(value)) if isinstance(value, torch.Tensor) else (None, 0)


def _untouched(value: Any, original: weakref.ref[torch.Tensor] | None, written: int) -> bool:
    """Is it the same tensor on a device, which was not written to? One in main memory is read again: that is free."""
    if original is None or not isinstance(value, torch.Tensor) or value.is_cpu or original() is not value:
        return False
    return written == version(value) >= 0
