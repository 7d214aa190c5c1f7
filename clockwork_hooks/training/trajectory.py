"""What is recorded of a sampler: calls of the UNet, grouped into steps, steps into a trajectory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clockwork_hooks._tree import tensors
from clockwork_hooks.regions.region import Region
from clockwork_hooks.schedule import Schedule

__all__ = ["TENSORS", "Needs", "RecordedCall", "StepCalls", "Trajectory", "steps_of"]


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
