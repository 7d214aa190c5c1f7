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


class Clock:
    """Reads the time input as a number, with as few waits for the device as can be.

    Most loops hand over views of one list of times, so one copy of that list serves the whole trajectory.
    """

    def __init__(self) -> None:
        self._lists: dict[int, tuple[StorageWeakRef, int, torch.Tensor]] = {}

    def read(self, value: Any) -> tuple[float | None, Place | None]:
        """The time, None if it cannot be told or differs between rows; and its place, if it comes from a list.

        Args:
            value: a number, or a tensor with one element or one per row.
        """
        if not isinstance(value, torch.Tensor):
            return (float(value) if is_number(value) else None), None
        if value.device.type == "meta" or value.numel() == 0:
            return None, None
        storage = value.untyped_storage()
        size = storage.nbytes() // value.element_size()
        listed = value.ndim == 0 and 1 < size <= _LARGEST_LIST
        place = Place(StorageWeakRef(storage), int(value.storage_offset())) if listed else None
        if value.device.type != "cpu" and size <= _LARGEST_LIST:
            value = self._on_cpu(value, storage)
        first = value if value.ndim == 0 else value.flatten()[0]
        if value.ndim and not bool((value == first).all()):
            return None, None
        return float(first), place

    def _on_cpu(self, value: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
        key, written = storage._cdata, version(value)
        known = self._lists.get(key)
        if known is None or known[1] != written or written < 0:
            whole = torch.empty(0, dtype=value.dtype, device=value.device).set_(storage)
            if len(self._lists) > 8:
                self._lists.clear()
            known = self._lists[key] = (StorageWeakRef(storage), written, whole.cpu())
        return known[2].as_strided(value.shape, value.stride(), value.storage_offset())
