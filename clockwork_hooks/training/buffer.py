"""Trajectories that wait to be trained on: a bounded store, on the UNet's device, in memory or on disk."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from clockwork_hooks._tree import Leaf, map_leaves
from clockwork_hooks.errors import ArgumentError, DistillError, is_number
from clockwork_hooks.training.trajectory import TENSORS, RecordedCall, StepCalls, Trajectory

__all__ = ["Buffer"]

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
