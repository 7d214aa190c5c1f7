"""Reads the time input as a number, with as few waits for the device as can be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from clockwork_hooks._tree import address, held, version
from clockwork_hooks.graph.arguments import is_number

__all__ = ["Place", "TimeReader"]

_LARGEST_LIST = 1 << 16  # elements


@dataclass(frozen=True, slots=True)
class Place:
    """Where a time stands in a list of times.

    Attributes:
        times: the list; the weak reference keeps its address from being used for another one.
        index: which entry.
        outermost: is it the first or the last one?
        values: what is in the list.
    """

    times: Any
    index: int
    outermost: bool = field(default=False, compare=False)
    values: torch.Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy of a storage in main memory.

    Attributes:
        storage: of what; the weak reference keeps its address from being used for another one.
        version: its counter of in-place writes then.
        values: what was in it.
        varied: does it hold different values? A list of times does, one time for each row does not.
    """

    storage: Any
    version: int
    values: torch.Tensor
    varied: bool


class TimeReader:
    """Reads the time input as a number.

    Most loops hand over views of one list of times, so one copy of that list serves the whole trajectory.

    Example:
        >>> times, reader = torch.tensor([900.0, 800.0]), TimeReader()
        >>> time, place = reader.read(times[1])
        >>> time, place.index, reader.read(700)
        (800.0, 1, (700.0, None))
    """

    def __init__(self) -> None:
        self._copies: dict[int, _Copy] = {}

    def read(self, value: Any) -> tuple[float | None, Place | None]:
        """The time, None if it cannot be told or differs between rows; and its place, if it comes from a list.

        Args:
            value: a number, or a tensor with one element or one per row.
        """
        if not isinstance(value, torch.Tensor):
            return (float(value) if is_number(value) else None), None
        if value.is_meta or value.numel() == 0 or isinstance(value, FakeTensor):
            return None, None
        storage, place = value.untyped_storage(), None
        size = storage.nbytes() // value.element_size()
        one = value.numel() == 1 or not any(value.stride())  # one entry, or one that is expanded to all rows
        listed = one and size > 1
        if size <= _LARGEST_LIST and (listed or not value.is_cpu):
            copy = self._copy(value, storage, trusted=listed)
            if listed and copy.varied:
                index = int(value.storage_offset())
                place = Place(copy.storage, index, index in (0, size - 1), copy.values)
            if not value.is_cpu:
                value = copy.values.as_strided(value.shape, value.stride(), value.storage_offset())
        if value.numel() == 1:
            return float(value.reshape(()).tolist()), place
        first = value.flatten()[0]
        if not one and not bool((value == first).all()):
            return None, None
        return float(first.tolist()), place

    def _copy(self, value: torch.Tensor, storage: torch.UntypedStorage, *, trusted: bool) -> _Copy:
        """The storage's copy, made again when it was written to; where no counter tells, only a list is trusted."""
        key, written = address(storage), version(value)
        copy = self._copies.get(key)
        same = copy is not None and copy.version == written and copy.values.dtype == value.dtype
        if copy is None or not same or (written < 0 and not trusted):
            values = torch.empty(0, dtype=value.dtype, device=value.device).set_(storage).to("cpu", copy=True)
            if len(self._copies) > 8:
                self._copies.clear()
            varied = bool((values != values[0]).any())
            copy = self._copies[key] = _Copy(held(storage), written, values, varied)
        return copy
