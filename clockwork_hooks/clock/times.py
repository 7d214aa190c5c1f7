"""Reads the time input as a number, with as few waits for the device as can be."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch

from clockwork_hooks._tree import address, held, version
from clockwork_hooks.graph.arguments import is_number

__all__ = ["Clock", "Place"]

_LARGEST_LIST = 1 << 16
_LARGEST_READ = 1 << 12


@dataclass(frozen=True, slots=True)
class Place:
    """Where a time stands in a list of times.

    Attributes:
        times: the list; the weak reference keeps its address from being used for another one.
        index: which entry.
    """

    times: Any
    index: int


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


@dataclass(frozen=True, slots=True)
class _List:
    """The list that the last time was an entry of: later entries are looked up by where they stand in it.

    Attributes:
        base: the tensor that times are views of.
        version: its counter of in-place writes.
        dtype: of the views.
        times: all entries of its storage.
        places: where each of them stands.
    """

    base: weakref.ref[torch.Tensor]
    version: int
    dtype: torch.dtype
    times: list[float]
    places: list[Place]


class Clock:
    """Reads the time input as a number, with as few waits for the device as can be.

    Most loops hand over views of one list of times, so one copy of that list serves the whole trajectory.
    """

    def __init__(self) -> None:
        self._copies: dict[int, _Copy] = {}
        self._list: _List | None = None

    def read(self, value: Any) -> tuple[float | None, Place | None]:
        """The time, None if it cannot be told or differs between rows; and its place, if it comes from a list.

        Args:
            value: a number, or a tensor with one element or one per row.
        """
        if not isinstance(value, torch.Tensor):
            return (float(value) if is_number(value) else None), None
        known = self._list
        base = None if known is None else value._base
        if known is None or base is None or known.base() is not base:
            return self._look(value)
        if value.is_cpu and not value.ndim and value.dtype is known.dtype:  # sees what was written past the counter
            return float(value.tolist()), known.places[value.storage_offset()]  # type: ignore[arg-type]
        if base._version != known.version or value.dtype != known.dtype or (value.numel() != 1 and any(value.stride())):
            return self._look(value)
        index = value.storage_offset()
        return (_number(value) if value.is_cpu else known.times[index]), known.places[index]

    def _look(self, value: torch.Tensor) -> tuple[float | None, Place | None]:
        """Read a time that is no entry of the list that the last one was in."""
        if value.is_meta or value.numel() == 0:
            return None, None
        storage, place = value.untyped_storage(), None
        size = storage.nbytes() // value.element_size()
        one = value.numel() == 1 or not any(value.stride())  # one entry, or one that is expanded to all rows
        listed = one and size > 1
        if size <= _LARGEST_LIST and (listed or not value.is_cpu):
            copy = self._copy(value, storage, trusted=listed)
            if listed and copy.varied:
                place = Place(copy.storage, int(value.storage_offset()))
                self._remember(value, copy)
            if not value.is_cpu:
                value = copy.values.as_strided(value.shape, value.stride(), value.storage_offset())
        if not one and not bool((value == value.flatten()[0]).all()):
            return None, None
        return _number(value), place

    def _remember(self, value: torch.Tensor, copy: _Copy) -> None:
        base = value._base
        if base is None or copy.version < 0 or base.is_inference() or copy.values.numel() > _LARGEST_READ:
            return  # each time is looked up in the copy
        times = copy.values.tolist()
        places = [Place(copy.storage, k) for k in range(len(times))]
        self._list = _List(weakref.ref(base), copy.version, value.dtype, list(map(float, times)), places)

    def _copy(self, value: torch.Tensor, storage: torch.UntypedStorage, *, trusted: bool) -> _Copy:
        """The storage's copy, made again when it was written to; where no counter tells, only a list is trusted."""
        key, written = address(storage), version(value)
        known = self._copies.get(key)
        same = known is not None and known.version == written and known.values.dtype == value.dtype
        if known is None or not same or (written < 0 and not trusted):
            values = torch.empty(0, dtype=value.dtype, device=value.device).set_(storage).to("cpu", copy=True)
            if len(self._copies) > 8:
                self._copies.clear()
            varied = bool((values != values[0]).any())
            known = self._copies[key] = _Copy(held(storage), written, values, varied)
        return known


def _number(value: torch.Tensor) -> float | None:
    """The first element of a tensor in main memory; `tolist` asks no dispatcher, so it takes a third of the time."""
    found: Any = value.tolist()
    while isinstance(found, list):
        if not found:
            return None
        found = found[0]
    return float(found)
