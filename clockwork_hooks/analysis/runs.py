"""Runs of a sampler from the same noise, with full passes alone and with adaptor passes: error, saving, time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from clockwork_hooks.analysis.candidates import Candidate
from clockwork_hooks.analysis.watch import Generate, final, reference
from clockwork_hooks.attach import wrap
from clockwork_hooks.schedule import Schedule
from clockwork_hooks.wrapper import ClockworkWrapper

__all__ = ["Outcome", "Runs", "relative_error"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a schedule did.

    Attributes:
        error: relative L2 error of the result, ‖made - plain‖ / ‖plain‖, a mean over samples.
        saved: share of the MACs that did not run; attention products and the adaptor counted.
        adaptor_passes: how many calls used the adaptor.
        calls: of how many.
        ms: medians of a full and of an adaptor pass in milliseconds; None where not measured.
    """

    error: float
    saved: float
    adaptor_passes: int
    calls: int
    ms: tuple[float, float] | None = None


@dataclass(slots=True)
class Runs:
    """The trajectories of one set of conditions and seeds.

    Attributes:
        unet: what `generate` calls; not wrapped.
        generate: the sampling code.
        runs: (batch of conditions, seed) of each trajectory.
        timed: also measure what passes take; waits for the device at every call.
        plain: the results without adaptor passes; made when they are first asked for.
    """

    unet: nn.Module
    generate: Generate
    runs: Sequence[tuple[Any, int]]
    timed: bool = False
    plain: list[Tensor] = field(default_factory=list)

    def outcome(self, candidate: Candidate, schedule: Schedule) -> Outcome:
        """Run all trajectories with this adaptor on this schedule."""
        if not self.plain:
            self.plain = [reference(self.unet, self.generate, *run) for run in self.runs]
        adaptor = candidate.given if isinstance(candidate.given, str) else candidate.adaptor
        errors = []
        with wrap(self.unet, adaptor, region=candidate.region, schedule=schedule) as cw:
            with self._times(cw) as times:
                for run, plain in zip(self.runs, self.plain, strict=True):
                    with cw.trajectory():
                        errors.append(relative_error(final(self.unet, self.generate, *run), plain))
            stats = cw.stats
        calls = stats.full_passes + stats.adaptor_passes
        ms = (_typical(times[False]), _typical(times[True])) if times[False] and times[True] else None
        return Outcome(float(torch.cat(errors).mean()), stats.saving, stats.adaptor_passes, calls, ms)

    @contextlib.contextmanager
    def _times(self, cw: ClockworkWrapper) -> Iterator[dict[bool, list[float]]]:
        """Milliseconds of every call, by whether it used the adaptor; the wrapper's own work is part of them."""
        found: dict[bool, list[float]] = {False: [], True: []}
        begun = (0.0, 0)

        def before(module: nn.Module, args: Any) -> None:
            nonlocal begun
            begun = (_now(), cw.stats.adaptor_passes)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            found[cw.stats.adaptor_passes > begun[1]].append(1000 * (_now() - begun[0]))

        if not self.timed:
            yield found
            return
        handles = [self.unet.register_forward_pre_hook(before, prepend=True), self.unet.register_forward_hook(after)]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


def relative_error(made: Tensor, reference: Tensor) -> Tensor:
    """‖made - reference‖ / ‖reference‖ of each sample, (B,), on the CPU; infinite where it is no number."""
    difference = (made.float() - reference.float()).flatten(1).norm(dim=1)
    relative: Tensor = difference / reference.float().flatten(1).norm(dim=1).clamp_min(1e-12)
    return relative.nan_to_num(nan=torch.inf, posinf=torch.inf).cpu()


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _typical(times: Sequence[float]) -> float:
    """The median; the first pass of a kind makes plans and workspaces, and does not count."""
    return median(times[1:] or times)
