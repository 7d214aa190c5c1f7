"""Which evaluation of the UNet begins a denoising step? Read off the state of diffusers' schedulers.

Nothing of a scheduler is changed. A pipeline hands its UNet views of its scheduler's list of times, so an entry of the
list names the evaluation: no value is read, and no device is waited for. Solvers with several evaluations a step
remember which one comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from clockwork_hooks.clock import Place
from clockwork_hooks.timeline import Timeline

__all__ = ["SchedulerSteps", "begins_step"]


class SchedulerSteps:
    """Declares the steps of a timeline from the scheduler whose times the UNet is called with.

    A call with any other time (another loop on the same UNet) is left to the timeline's own inference.

    Args:
        schedulers: gives the schedulers as they are now: one may be exchanged at any time.
    """

    def __init__(self, schedulers: Callable[[], Iterable[Any]]) -> None:
        self._schedulers = schedulers
        self._last: Any = None

    def __call__(self, timeline: Timeline, time: Any) -> None:
        """Before a call with this time is placed: declare a step or a trajectory, if one begins."""
        if timeline.declared and timeline.mark is None:  # the caller declares the steps
            return
        scheduler = self._scheduler(time) if isinstance(time, torch.Tensor) else None
        if scheduler is None:
            if timeline.mark is not None:
                timeline.reset()
            return
        mark: Place | None = timeline.mark
        place = Place(StorageWeakRef(time.untyped_storage()), int(time.storage_offset()))
        jump = place.index - mark.index if mark is not None and mark.times == place.times else None
        if mark is None or jump is None or not (jump == 0 or jump == (timeline.way or jump)) or abs(jump) > 1:
            timeline.reset()  # perhaps within a step, of which earlier evaluations were interrupted
            timeline.declare(place, start=None if begins_step(scheduler) else Place(place.times, place.index - 1))
        elif jump:
            timeline.way, timeline.mark = jump, place
            if begins_step(scheduler):
                timeline.declare(place)

    def _scheduler(self, time: torch.Tensor) -> Any:
        """The scheduler in whose list of times this one stands; the last one is looked at first."""
        known, now = self._last, list(self._schedulers())  # another thread may exchange `_last`
        if not (_listed(known, time) and any(known is scheduler for scheduler in now)):
            known = self._last = next((scheduler for scheduler in now if _listed(scheduler, time)), None)
        return known


def begins_step(scheduler: Any) -> bool:
    """Is the evaluation that comes next the first one of a denoising step?

    Args:
        scheduler: a diffusers scheduler whose `step` has run for every evaluation before this one.

    Example:
        >>> from diffusers import PNDMScheduler
        >>> scheduler, sample = PNDMScheduler(skip_prk_steps=True), torch.zeros(1)
        >>> scheduler.set_timesteps(4)
        >>> begins = []
        >>> for t in scheduler.timesteps:
        ...     begins.append(begins_step(scheduler))
        ...     sample = scheduler.step(torch.ones(1), t, sample).prev_sample
        >>> begins
        [True, False, True, True, True]
    """
    first = getattr(scheduler, "state_in_first_order", None)  # Heun, DPM2, DPM-Solver SDE
    if first is not None:
        return bool(first)
    orders = getattr(scheduler, "order_list", None)  # DPM-Solver single-step: orders 1, 2, 3, 1, 2, 3, ...
    if orders:
        return bool(orders[scheduler.step_index or 0] == 1)
    warm_up = getattr(scheduler, "prk_timesteps", None)  # PNDM: Runge-Kutta steps of four, or a first step of two
    if warm_up is not None:
        return bool(scheduler.counter % 4 == 0 if scheduler.counter < len(warm_up) else scheduler.counter != 1)
    return True


def _listed(scheduler: Any, time: torch.Tensor) -> bool:
    """Is the time one entry of this scheduler's list, as a view?"""
    times = getattr(scheduler, "timesteps", None)
    one = time.ndim == 0 or all(
        size == 1 or stride == 0 for size, stride in zip(time.shape, time.stride(), strict=True)
    )
    return (
        one
        and isinstance(times, torch.Tensor)
        and times.device == time.device
        and times.dtype == time.dtype
        and times.device.type != "meta"
        and times.untyped_storage()._cdata == time.untyped_storage()._cdata
    )
