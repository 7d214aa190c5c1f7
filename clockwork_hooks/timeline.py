"""Which denoising step is this call, and may the features of the step before serve it?

The UNet's time input tells: a changed value is a new step, a value that runs backwards is a new trajectory. Every
other input tells the branch: two calls belong together if their conditions are the same objects, unchanged. Where
the answer is in doubt the position says why, and the wrapper takes a full pass.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from clockwork_hooks.inputs import is_number
from clockwork_hooks.passes import version

__all__ = ["Branch", "Clock", "Place", "Position", "Timeline"]

NOT_KEPT = "no feature was kept in the step before"
_FAR = 4.0
_LARGEST_LIST = 1 << 16
_VALUES = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


@dataclass(slots=True, eq=False)
class Branch:
    """The calls of one trajectory that share their conditions, and what the region last emitted for them.

    Attributes:
        conditions: every input but sample and time, each with its version.
        step: the last step with a call.
        calls: number of calls in that step.
        exit: (input signature, what the region emitted in that step, its version), for the step after it; None if
            nothing may be used.
        missing: why there is none.
    """

    conditions: tuple[tuple[Any, int], ...]
    step: int = 0
    calls: int = 0
    exit: tuple[Hashable, torch.Tensor, int] | None = None
    missing: str = NOT_KEPT


@dataclass(frozen=True, slots=True)
class Position:
    """Where a call is.

    Attributes:
        step: denoising step of the trajectory, from 1.
        branch: what is remembered for its conditions.
        doubt: why no cached feature may serve it; None where one may.
    """

    step: int
    branch: Branch
    doubt: str | None = None


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


@dataclass(slots=True)
class Timeline:
    """The steps and branches of one thread or task; `at` is called once per call of the UNet."""

    step: int = 0
    declared: bool = False
    _time: float | None = None
    _direction: int = 0
    _stride: float = 0.0
    _place: Place | None = None
    _jump: int | None = None
    _doubt: str | None = None
    _branches: list[Branch] = field(default_factory=list)

    def reset(self) -> None:
        """The next call begins a trajectory."""
        self.step, self.declared = 0, False
        self._time, self._place, self._jump, self._direction, self._stride = None, None, None, 0, 0.0
        self._doubt = None
        self._branches = []

    def declare(self) -> None:
        """A new step begins now, whatever the time input says; from here on the caller declares all steps."""
        if not self.declared and self.step:
            self.reset()
        self.declared = True
        self._advance()

    def at(
        self, time: float | None, place: Place | None, conditions: Iterable[Any], *, has_time: bool = True
    ) -> Position:
        """Place a call.

        Args:
            time: its time; None if that cannot be told.
            place: where it stands in its list, if it comes from one.
            conditions: every input but the sample and the time.
            has_time: does the UNet have a time input at all?
        """
        doubt = None if self.declared else self._tick(time, place, has_time)
        branch = self._branch(tuple((value, _version(value)) for value in conditions))
        if branch.step == self.step:
            doubt = doubt or "same time and conditions again within a step"
            branch.calls += 1
        else:
            if branch.calls > 1:
                doubt = doubt or "several calls with these conditions in the step before"
            elif branch.step == 0 and self.step > 1:
                doubt = doubt or "conditions are new in this step"
            branch.step, branch.calls = self.step, 1
        return Position(self.step, branch, doubt)

    def _tick(self, time: float | None, place: Place | None, has_time: bool) -> str | None:
        if time is None:
            self.reset()
            self.step = 1
            return "time differs between rows or cannot be read" if has_time else "no time input: declare cw.step()"
        if self._time is None:
            self._begin(time, place)
            return None
        change = time - self._time
        jump = self._from(place)
        if change == 0 and jump is not None:
            self._place = place
            return self._doubt
        direction = (change > 0) - (change < 0)
        backwards = self._direction and direction != self._direction
        if backwards or not self._regular(jump) or (self._stride and abs(change) > _FAR * self._stride):
            self._begin(time, place, jump)
            return None
        known = self._direction != 0 or direction < 0 or bool(jump)
        self._time, self._place, self._direction, self._jump = time, place, direction, jump
        self._stride = max(self._stride, abs(change))
        self._advance()
        self._doubt = None if known else "direction of time is not known yet"  # for every branch of the step
        return self._doubt

    def _from(self, place: Place | None) -> int | None:
        """Entries of the list since the time before; 0 where there is no list, None in another list."""
        if place is None or self._place is None:
            return 0
        return place.index - self._place.index if place.times == self._place.times else None

    def _regular(self, jump: int | None) -> bool:
        """Does one trajectory go on? It takes its list's entries in turn; another list is another trajectory's."""
        return jump == 0 or (jump is not None and (jump == self._jump or (self.step == 1 and abs(jump) == 1)))

    def _begin(self, time: float, place: Place | None, jump: int | None = None) -> None:
        self.reset()
        self._time, self._place, self._jump = time, place, jump
        self._advance()

    def _advance(self) -> None:
        """A new step: what was not called in the step before is forgotten."""
        self._branches = [branch for branch in self._branches if branch.step == self.step]
        self.step += 1

    def _branch(self, conditions: tuple[tuple[Any, int], ...]) -> Branch:
        for branch in self._branches:
            if len(branch.conditions) == len(conditions) and all(map(_same, branch.conditions, conditions)):
                return branch
        self._branches.append(Branch(conditions))
        return self._branches[-1]


def _version(value: Any) -> int:
    """What changes with an in-place write: a tensor's counter, an array's contents; -1 where nothing tells.

    Nothing tells for inference tensors, which keep no counter, and for objects of unknown classes.
    """
    if isinstance(value, torch.Tensor):
        return version(value)
    return hash(value.tobytes()) if hasattr(value, "tobytes") else -1


def _same(one: tuple[Any, int], other: tuple[Any, int]) -> bool:
    """The same object, unchanged; plain values may also be equal. What `==` means elsewhere, nobody knows."""
    (a, a_version), (b, b_version) = one, other
    if a is b:
        return a_version == b_version
    return type(a) is type(b) and (isinstance(a, _VALUES) or is_number(a)) and bool(a == b)
