"""What is recorded of a sampler: calls of the UNet, grouped into steps, steps into a trajectory.

Trajectories wait in a `Buffer` until they are trained on: bounded, on the UNet's device, in memory or on disk.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from clockwork_hooks._tree import Leaf, map_leaves, tensors
from clockwork_hooks.errors import ArgumentError, DistillError, is_number
from clockwork_hooks.regions.region import Region
from clockwork_hooks.schedule import Schedule

__all__ = ["TENSORS", "Buffer", "Needs", "RecordedCall", "StepCalls", "Trajectory", "steps_of"]


@dataclass(frozen=True, slots=True)
class Needs:
    """What of the calls of one step is kept.

    Attributes:
        exit: what the region emits.
        captured: what flows into it.
        arguments: of the call, to call the UNet again.
        output: what the UNet returns.
    """

    exit: bool = True
    captured: bool = True
    arguments: bool = True
    output: bool = True


@dataclass(slots=True, eq=False)
class RecordedCall:
    """One recorded call of the UNet.

    Attributes:
        trajectory: number of the trajectory that it belongs to.
        step: its denoising step, from 1.
        time: as the UNet was told it; None where it was told none, or another one for each row.
        rows: of the sample.
        branch: number of its branch: equal for calls that share their conditions (all inputs but sample and time).
        args, kwargs: as given; copies.
        reason: why an adaptor pass could not serve it; None where one could.
        autocast: the dtype of automatic casts around it.
        source: the call of the step before whose exit is this call's cached one.
        captured: "entry", "time", "text", where they can be picked up.
        exit: the region's true exit.
        output: the first tensor that the UNet returns in a full pass.
        student_exit: what the student emitted, in a student's trajectory; None in a full pass.
        student_output: what the UNet returned with it.
        cached: what the student was given as the exit of the step before.
    """

    trajectory: int
    step: int
    branch: int
    reason: str | None
    autocast: torch.dtype | None
    time: float | None = None
    rows: int = 0
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    source: RecordedCall | None = None
    captured: dict[str, Tensor] = field(default_factory=dict)
    exit: Tensor | None = None
    output: Tensor | None = None
    student_exit: Tensor | None = None
    student_output: Tensor | None = None
    cached: Tensor | None = None
    region: Region | None = None


TENSORS = ("args", "kwargs", "captured", "exit", "output", "student_exit", "student_output", "cached")
"""Fields of a `RecordedCall` that hold tensors."""


@dataclass(frozen=True, slots=True)
class StepCalls:
    """The calls of one denoising step: one, or one a guidance branch.

    Attributes:
        step: from 1.
        calls: in order.
    """

    step: int
    calls: tuple[RecordedCall, ...]

    @property
    def rows(self) -> int:
        """Rows that the UNet was called with, over all calls."""
        return sum(call.rows for call in self.calls)

    def adapted(self, schedule: Schedule) -> tuple[RecordedCall, ...]:
        """The calls that the adaptor serves on this schedule."""
        if schedule.is_full(self.step):
            return ()
        return tuple(call for call in self.calls if call.reason is None and call.source is not None)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """What one run of `generate` did to the UNet.

    Attributes:
        steps: in order; more than one trajectory, if `generate` samples more than once.
        reasons: why calls could not have been adaptor passes, with counts.
    """

    steps: tuple[StepCalls, ...]
    reasons: Mapping[str, int]

    def chains(self, schedule: Schedule) -> list[tuple[StepCalls, ...]]:
        """Runs of adaptor steps between two full ones: one training signal each step.

        Source: arXiv 2312.08128, Sec. 4.4, Algorithm 1 (the steps with C(t) = 1).
        """
        chains: list[list[StepCalls]] = []
        before: StepCalls | None = None
        for now in self.steps:
            if now.adapted(schedule):
                goes_on = before is not None and now.step == before.step + 1 and before.adapted(schedule)
                chains.append([*chains.pop(), now] if goes_on else [now])
            before = now
        return [tuple(chain) for chain in chains]

    @property
    def rows(self) -> int:
        """Most rows of any step: those of a step with all guidance branches."""
        return max((step.rows for step in self.steps), default=0)

    def tensors(self) -> list[Tensor]:
        """All that it holds, each tensor once."""
        held: dict[int, Tensor] = {}
        for step in self.steps:
            for call in step.calls:
                held |= {id(tensor): tensor for tensor in tensors([getattr(call, name) for name in TENSORS])}
        return list(held.values())

    @property
    def nbytes(self) -> int:
        """Memory that its tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors())


def steps_of(calls: Iterable[RecordedCall]) -> Iterator[StepCalls]:
    """Group calls that follow each other within one step."""
    group: list[RecordedCall] = []
    for call in calls:
        if group and (call.trajectory, call.step) != (group[-1].trajectory, group[-1].step):
            yield StepCalls(group[0].step, tuple(group))
            group = []
        group.append(call)
    if group:
        yield StepCalls(group[0].step, tuple(group))


GB = 1e9


class Buffer:
    """Holds trajectories up to a number of bytes.

    Args:
        where: "device" (of the UNet), "ram", or a folder, in which it makes one of its own, gone when it is cleared.
        gigabytes: bound, in 10⁹ bytes.

    Attributes:
        limit: the bound in bytes.
        used: bytes held now.
        peak: most bytes ever held.
    """

    def __init__(self, where: str | Path, gigabytes: float) -> None:
        if not is_number(gigabytes) or gigabytes <= 0:
            raise ArgumentError(
                "a buffer has room", seen={"buffer_gb": repr(gigabytes)}, do="pass buffer_gb=4, in 10⁹ bytes"
            )
        self.where, self.limit = where, int(gigabytes * GB)
        self.used = self.peak = 0
        self._held: list[Trajectory] = []
        self._home = Path(where) if where not in ("device", "ram") else None
        self._folder: Path | None = None

    @property
    def device(self) -> torch.device | None:
        """Where recorded tensors go first; None: where they are."""
        return None if self.where == "device" else torch.device("cpu")

    def __len__(self) -> int:
        return len(self._held)

    def add(self, trajectory: Trajectory) -> None:
        """Hold a trajectory.

        Raises:
            ArgumentError: not even this one fits.
            DistillError: the disk is full.
        """
        size = trajectory.nbytes
        if size > self.limit:
            raise ArgumentError(
                "the buffer holds one trajectory at least",
                seen={"buffer_gb": self.limit / GB, "one trajectory": f"{size / GB:.3g} GB"},
                do=f"pass buffer_gb={1.1 * size / GB:.2g} or more, a smaller batch=, or fewer steps",
            )
        if self._home is not None:
            trajectory = self._write(trajectory, self._home)
        self._held.append(trajectory)
        self.used += size
        self.peak = max(self.peak, self.used)

    def full(self) -> bool:
        """Would another one as large as the mean so far be too much?"""
        return bool(self._held) and self.used + self.used / len(self._held) > self.limit

    def get(self, index: int, device: torch.device) -> Trajectory:
        """A trajectory, its tensors on the device."""
        if self._folder is None:
            return self._held[index] if self.where == "device" else _mapped(self._held[index], _to(device))
        place = "cpu" if device.type == "cpu" else str(device)  # of several processes on CPU each one's is "cpu:0"
        tensors = safetensors.torch.load_file(self._folder / f"{index}.safetensors", device=place)
        return _mapped(self._held[index], lambda leaf: tensors[leaf.name] if isinstance(leaf, _Stored) else leaf)

    def clear(self) -> None:
        """Forget all; a folder's files go too."""
        self._held, self.used = [], 0
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _write(self, trajectory: Trajectory, home: Path) -> Trajectory:
        names = {id(tensor): str(index) for index, tensor in enumerate(trajectory.tensors())}
        try:
            if self._folder is None:  # of its own: other processes, and what the user has there, are left alone
                home.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix="trajectories-", dir=home))
            path = self._folder / f"{len(self._held)}.safetensors"
            safetensors.torch.save_file(
                {names[id(tensor)]: tensor.contiguous() for tensor in trajectory.tensors()}, path
            )
        except (OSError, SafetensorError) as error:
            raise DistillError(
                "the buffer's folder takes the trajectories",
                seen={"folder": home, "error": error, "held": f"{self.used / GB:.3g} of {self.limit / GB:g} GB"},
                do='free some space, pass a smaller buffer_gb=, or buffer="ram"',
            ) from error
        return _mapped(trajectory, lambda leaf: _Stored(names[id(leaf)]) if isinstance(leaf, Tensor) else leaf)


@dataclass(frozen=True, slots=True)
class _Stored(Leaf):
    """Stands for a tensor that is in the file."""

    name: str


def _to(device: torch.device) -> Callable[[Any], Any]:
    moved: dict[int, Tensor] = {}

    def to(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in moved:
            moved[id(leaf)] = leaf.to(device, non_blocking=True)
        return moved[id(leaf)]

    return to


def _mapped(trajectory: Trajectory, fn: Callable[[Any], Any]) -> Trajectory:
    """A copy of a trajectory with `fn` on every leaf; sources point into the copy."""
    twins: dict[int, RecordedCall] = {}

    def copied(call: RecordedCall) -> RecordedCall:
        twin = copy.copy(call)
        for name in TENSORS:
            setattr(twin, name, map_leaves(fn, getattr(call, name)))
        if call.source is not None:
            twin.source = twins[id(call.source)]
        twins[id(call)] = twin
        return twin

    steps = tuple(StepCalls(step.step, tuple(copied(call) for call in step.calls)) for step in trajectory.steps)
    return replace(trajectory, steps=steps)
