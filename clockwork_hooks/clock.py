"""Reads the time input as a number, with as few waits for the device as can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from clockwork_hooks.inputs import is_number
from clockwork_hooks.passes import version

__all__ = ["Clock", "Place"]

_LARGEST_LIST = 1 << 16


@dataclass(frozen=True, slots=True)
class Place:
    """Where a time stands in a list of times.

    Attributes:
        times: the list; the weak reference keeps its address from being used for another one.
        index: which entry.
    """

    times: StorageWeakRef
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

    storage: StorageWeakRef
    version: int
    values: torch.Tensor
    varied: bool


class Clock:
    """Reads the time input as a number, with as few waits for the device as can be.

    Most loops hand over views of one list of times, so one copy of that list serves the whole trajectory.
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
        if value.device.type == "meta" or value.numel() == 0:
            return None, None
        storage, place = value.untyped_storage(), None
        size = storage.nbytes() // value.element_size()
        one = value.numel() == 1 or not any(value.stride())  # one entry, or one that is expanded to all rows
        listed = one and size > 1
        if size <= _LARGEST_LIST and (listed or value.device.type != "cpu"):
            copy = self._copy(value, storage, trusted=listed)
            if listed and copy.varied:
                place = Place(copy.storage, int(value.storage_offset()))
            if value.device.type != "cpu":
                value = copy.values.as_strided(value.shape, value.stride(), value.storage_offset())
        first = value if value.ndim == 0 else value.flatten()[0]
        if not one and not bool((value == first).all()):
            return None, None
        return float(first), place

    def _copy(self, value: torch.Tensor, storage: torch.UntypedStorage, *, trusted: bool) -> _Copy:
        """The storage's copy, made again when it was written to; where no counter tells, only a list is trusted."""
        key, written = storage._cdata, version(value)
        known = self._copies.get(key)
        same = known is not None and known.version == written and known.values.dtype == value.dtype
        if known is None or not same or (written < 0 and not trusted):
            values = torch.empty(0, dtype=value.dtype, device=value.device).set_(storage).to("cpu", copy=True)
            if len(self._copies) > 8:
                self._copies.clear()
            varied = bool((values != values[0]).any())
            known = self._copies[key] = _Copy(StorageWeakRef(storage), written, values, varied)
        return known
