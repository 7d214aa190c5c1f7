"""Diffusers' pipelines: wrap the UNets of one, and read off its scheduler where a denoising step begins.

Nothing of a scheduler is changed. A pipeline hands its UNet views of its scheduler's list of times, so an entry of the
list names the evaluation: no value is read, and no device is waited for. Solvers with several evaluations a step
remember which one comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from clockwork_hooks._tree import address, held
from clockwork_hooks.adaptors import Adaptor
from clockwork_hooks.adaptors.stand_in import resolve_adaptor, schedules_of
from clockwork_hooks.clock.timeline import Timeline
from clockwork_hooks.clock.times import Place
from clockwork_hooks.engine.attach import check_names, wrap
from clockwork_hooks.engine.stats import RunReport
from clockwork_hooks.engine.wrapper import ClockworkWrapper, compiled_from
from clockwork_hooks.errors import ArgumentError, is_several
from clockwork_hooks.reports.report import Report
from clockwork_hooks.reports.tables import Table, table
from clockwork_hooks.schedule import Schedule

__all__ = ["PipelineReport", "SchedulerSteps", "WrappedPipeline", "begins_step", "steps_from", "wrap_pipeline"]


def wrap_pipeline(
    pipe: Any,
    adaptor: Adaptor | str | Mapping[str, Any] | None = None,
    *,
    clock: int | None = None,
    unets: Iterable[str] | None = None,
    ignore: Iterable[str] | str | Mapping[str, Any] = (),
    branch: Callable[[Mapping[str, Any]], Hashable] | Mapping[str, Any] | None = None,
    reuse: str | Mapping[str, str] = "step before",
    **options: Any,
) -> WrappedPipeline:
    """Wrap every UNet of a pipeline; a step of the schedule is a step of the pipeline's own solver.

    Like `wrap(pipe.unet)`. For solvers that evaluate the UNet several times a step (Heun, DPM2, single-step
    DPM-Solver, PNDM's warm-up), all evaluations of a step are full or all use the adaptor, each with its own feature.
    The scheduler is only read, at each call, so it may be replaced at any time.

    Args:
        pipe: a diffusers pipeline, or any object whose attributes are UNets, schedulers or pipelines (a base model
            and its refiner).
        adaptor: as for `wrap`; a mapping gives each UNet its own, by name.
        clock: one full step every `clock` steps: `Schedule.spread(clock)`, which runs as many full steps as
            `Schedule.every(clock)` and places them where they matter, as the scheduler tells how many steps there are.
            Neither this nor schedule=: what a saved adaptor was made for, else 2.
        unets: names of the UNets to wrap, None for all: "unet", "decoder", "refiner.unet"; also of models that are
            not recognised as UNets.
        ignore: as for `wrap`: dotted paths of arguments that nothing in the region depends on, such as
            ("cross_attention_kwargs.scale",); a mapping gives each UNet its own, by name.
        branch: as for `wrap`: names each call's branch from its arguments; or a mapping.
        reuse: as for `wrap`: "same condition" for prompts that take turns; or a mapping. A clock is then
            `Schedule.every(clock)`, as how many of the steps are a prompt's own is not known.
        options: the others of `wrap`: schedule, region, check_finite, ...; a mapping gives each UNet its own.

    Returns:
        A handle: a context manager with `report()`, `remove()` and `wrappers`.

    Raises:
        ArgumentError: the pipeline has no UNet, or none of such a name.
        WrapError: one of them cannot be wrapped; then none is.

    Example:
        >>> import torch
        >>> from diffusers import PNDMScheduler, UNet2DModel
        >>> blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        >>> unet = UNet2DModel(16, block_out_channels=(8, 32), norm_num_groups=8, **blocks).eval()
        >>> class Pipeline:
        ...     def __init__(self):
        ...         self.unet, self.scheduler = unet, PNDMScheduler(skip_prk_steps=True)
        ...
        ...     @torch.no_grad()
        ...     def __call__(self, steps):
        ...         sample = torch.randn(1, 3, 16, 16)
        ...         self.scheduler.set_timesteps(steps)
        ...         for t in self.scheduler.timesteps:
        ...             noise = self.unet(sample, t).sample
        ...             sample = self.scheduler.step(noise, t, sample).prev_sample
        >>> pipe = Pipeline()
        >>> with wrap_pipeline(pipe, clock=2) as cw:
        ...     pipe(steps=6)  # the first step is two evaluations: FF A F A F A
        >>> stats = cw.wrappers["unet"].stats
        >>> stats.full_passes, stats.adaptor_passes
        (4, 3)

    Source: arXiv 2312.08128, Sec. 4.3.
    """
    check_names(options, wrap_pipeline)
    wanted = _names(unets)
    models = _unets(pipe, wanted or ())
    chosen = _chosen(pipe, models, wanted)
    shared = {"adaptor": adaptor, "ignore": ignore, "branch": branch, "reuse": reuse, **options}
    for option, value in shared.items():
        _check_own(option, value, models)
    handle = WrappedPipeline(pipe, {})
    wrappers: dict[str, ClockworkWrapper] = {}
    try:
        for name in chosen:
            own = {key: _own(value, name) for key, value in shared.items()}
            own = {key: value for key, value in own.items() if value is not None}  # what a mapping leaves out
            wrappers[name] = wrap(models[name], **_when(clock, own))
            wrappers[name].read_steps(SchedulerSteps(handle.schedulers))
    except BaseException:
        for wrapper in wrappers.values():
            wrapper.remove()
        raise
    handle.wrappers.update(wrappers)
    return handle


class WrappedPipeline:
    """What `wrap_pipeline` returns.

    Attributes:
        pipe: the pipeline, unchanged but for its UNets' hooks.
        wrappers: name of the UNet → its wrapper.
    """

    def __init__(self, pipe: Any, wrappers: Mapping[str, ClockworkWrapper]) -> None:
        self.pipe = pipe
        self.wrappers = dict(wrappers)
        self._others: list[Any] = []

    @property
    def enabled(self) -> bool:
        """Off: every UNet runs as if it were not wrapped, and what was cached is forgotten. May be set at any step."""
        return any(wrapper.enabled for wrapper in self.wrappers.values())

    @enabled.setter
    def enabled(self, on: bool) -> None:
        for wrapper in self.wrappers.values():
            wrapper.enabled = on

    def schedulers(self) -> Iterator[Any]:
        """Those whose times the UNets may be called with, as they are now."""
        for pipe in (self.pipe, *self._others):
            yield from _schedulers(pipe)

    def follow(self, *pipes: Any) -> WrappedPipeline:
        """Read the schedulers of other pipelines too that call the same UNets: image to image, inpainting, `from_pipe`.

        Such pipelines run wrapped UNets as soon as those are wrapped; where they have schedulers of their own, this
        tells their steps.

        Args:
            pipes: pipelines that share a wrapped UNet with this one.

        Returns:
            The handle itself.

        Raises:
            ArgumentError: one shares none.

        Example:
            >>> cw = wrap_pipeline(pipe, clock=2).follow(
            ...     StableDiffusionImg2ImgPipeline.from_pipe(pipe)
            ... )  # doctest: +SKIP
        """
        wrapped = {id(wrapper.unet) for wrapper in self.wrappers.values()}
        for pipe in pipes:
            own = _unets(pipe, self.wrappers)
            if not wrapped & {id(compiled_from(unet)) for unet in own.values()}:
                raise ArgumentError(
                    "only a pipeline that shares a wrapped UNet can be followed",
                    seen={
                        "pipeline": type(pipe).__name__,
                        "its UNets": ", ".join(own) or "none",
                        "wrapped": repr(self),
                    },
                    do="wrap it by itself: wrap_pipeline(other)",
                )
        self._others += [pipe for pipe in pipes if not any(pipe is one for one in (self.pipe, *self._others))]
        return self

    def compile(
        self, mode: str | None = None, *, backend: Any = "inductor", options: dict[str, Any] | None = None
    ) -> WrappedPipeline:
        """Run every UNet as two static graphs from now on; see `ClockworkWrapper.compile`.

        Args:
            mode, backend, options: as there.

        Returns:
            The handle itself.

        Raises:
            ArgumentError: what `ClockworkWrapper.compile` says.
        """
        for wrapper in self.wrappers.values():
            wrapper.compile(mode, backend=backend, options=options)
        return self

    def report(self) -> PipelineReport:
        """What ran in each UNet, what was saved, why each full pass was full."""
        return PipelineReport({name: wrapper.report() for name, wrapper in self.wrappers.items()})

    def reset(self) -> None:
        """The next call of each UNet begins a trajectory; for loops of your own."""
        for wrapper in self.wrappers.values():
            wrapper.reset()

    def remove(self) -> None:
        """Take Clockwork off every UNet. Idempotent."""
        for wrapper in self.wrappers.values():
            wrapper.remove()

    def __enter__(self) -> WrappedPipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(ClockworkWrapper, name) and (own := next(iter(self.wrappers), None)):
            raise AttributeError(f'each UNet of a pipeline has its own {name}; write: cw.wrappers["{own}"].{name}')
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"WrappedPipeline({type(self.pipe).__name__}: {', '.join(self.wrappers)})"


class PipelineReport(Report):
    """The reports of a pipeline's UNets; prints as one text.

    Attributes:
        unets: name → its `RunReport`.
    """

    SCHEMA = "pipeline/1"

    def __init__(self, unets: Mapping[str, RunReport]) -> None:
        self.unets = dict(unets)

    def __str__(self) -> str:
        return "\n".join(f"{name}: {report}" for name, report in self.unets.items())

    def table(self) -> Table:
        """The same as one table: rich prints it."""
        rows = [(name, *row) for name, report in self.unets.items() for row in report.rows()]
        return table("Clockwork on a pipeline", ("UNet", "", "what ran"), rows)

    def data(self) -> dict[str, Any]:
        """Name → all fields of the UNet's report."""
        return {"unets": {name: report.data() for name, report in self.unets.items()}}


def _when(clock: int | None, options: dict[str, Any]) -> dict[str, Any]:
    """The options of `wrap`, with what a clock means where the number of steps is known."""
    decided = any(options.get(name) is not None for name in ("schedule", "clocks", "plan"))
    decided = decided or options.get("reuse", "step before") != "step before"
    if decided or clock == 1:
        return {**options, "clock": clock}
    own, _ = schedules_of(resolve_adaptor(options.get("adaptor")))
    if (clock is None and len(own) == 1) or (clock is not None and Schedule.every(clock) in own):
        return {**options, "clock": clock}
    return {**options, "schedule": Schedule.spread(2 if clock is None else clock)}


def _check_own(option: str, value: Any, unets: Iterable[str]) -> None:
    """A mapping names UNets that are wrapped: one that is misspelt would be left out without a word."""
    unknown = [name for name in value if name not in unets] if isinstance(value, Mapping) else []
    if unknown:
        raise ArgumentError(
            f"{option}= must have names of the pipeline's UNets as keys",
            seen={"no such UNet": ", ".join(map(str, unknown)), "UNets": ", ".join(unets)},
            do=f'pass {option}={{"{next(iter(unets))}": ...}}',
        )


def _own(value: Any, name: str) -> Any:
    """An option of one UNet: a mapping names the UNets that have it."""
    return value.get(name) if isinstance(value, Mapping) else value


def _parts(pipe: Any, within: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, part) of a pipeline, and of the pipelines that it holds."""
    for name, part in list(getattr(pipe, "__dict__", {}).items()):
        if isinstance(part, ClockworkWrapper):  # `pipe.unet = cw`
            part = part.unet
        if not isinstance(part, nn.Module) and _is_pipeline(part) and part is not pipe:
            yield from _parts(part, f"{within}{name}.")
        else:
            yield f"{within}{name}", part


def _is_pipeline(part: Any) -> bool:
    return isinstance(getattr(type(part), "components", None), property) and callable(part)


def _unets(pipe: Any, named: Iterable[str] = ()) -> dict[str, nn.Module]:
    """Each UNet once, under its first name; a combined pipeline holds each of its parts twice.

    A UNet is called so by its class, by one that this is made from, or by the pipeline's name for it; or it is one of
    those that the caller has named.
    """
    unets: dict[int, tuple[str, nn.Module]] = {}
    for name, part in _parts(pipe):
        if isinstance(part, nn.Module):
            unet = compiled_from(part)
            kinds = (kind.__name__ for kind in type(unet).__mro__ if issubclass(kind, nn.Module))
            if name in named or any("unet" in title.lower() for title in (name.rpartition(".")[2], *kinds)):
                unets.setdefault(id(unet), (name, part))
    return dict(unets.values())


def _schedulers(pipe: Any) -> Iterator[Any]:
    for _, part in _parts(pipe):
        if not isinstance(part, nn.Module) and hasattr(part, "set_timesteps"):
            yield part


def _names(unets: Iterable[str] | None) -> list[str] | None:
    """The names that `unets=` gives; None where it gives none."""
    if unets is None:
        return None
    if isinstance(unets, str):
        return [unets]
    if not is_several(unets):
        raise ArgumentError(
            "unets= names UNets of the pipeline", seen={"unets": repr(unets)}, do='pass names, as in unets=["unet"]'
        )
    return list(unets)


def _chosen(pipe: Any, present: Mapping[str, nn.Module], unets: list[str] | None) -> list[str]:
    """The names of the UNets to wrap, of those that are present."""
    wanted = list(present) if unets is None else unets
    unknown = [name for name in wanted if name not in present]
    if unknown or not wanted:
        if isinstance(pipe, str):
            raise ArgumentError(
                "wrap_pipeline takes a loaded pipeline, not its name",
                seen={"got": repr(pipe)},
                do="load it first: DiffusionPipeline.from_pretrained(name)",
            )
        if not present and isinstance(pipe, nn.Module):
            raise ArgumentError(
                "wrap_pipeline takes a pipeline, not a model",
                seen={"got": type(pipe).__name__},
                do="pass the pipeline, or wrap the model alone: ch.wrap(unet)",
            )
        raise ArgumentError(
            "unets= must name models of the pipeline",
            seen={
                "pipeline": type(pipe).__name__,
                "its UNets": ", ".join(present) or "none",
                "unets": ", ".join(map(str, wanted)) or "none",
            },
            do="pass names from the list, or of another model that the pipeline holds; other models go to wrap(model)",
        )
    return wanted


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
        place = Place(held(time.untyped_storage()), int(time.storage_offset()))
        jump = place.index - mark.index if mark is not None and mark.times == place.times else None
        back = mark is not None and jump == -1 and not timeline.way and not _is_last(scheduler, mark)
        # at the same entry, or at the one next to it on the way that it goes, as far as that is known
        along = jump is not None and abs(jump) <= 1 and jump in (0, timeline.way or jump) and not back
        if not along:
            timeline.reset()  # perhaps within a step, of which earlier evaluations were interrupted
            timeline.declare(place, start=None if begins_step(scheduler) else Place(place.times, place.index - 1))
            timeline.steps = timeline.declared_steps or steps_from(scheduler, place.index)
            if back:  # perhaps another loop, one entry behind; if it goes on this way, an inversion
                timeline.way, timeline.steps = -1, timeline.declared_steps
        elif jump:
            timeline.way, timeline.mark = jump, place
            if jump < 0:  # inversion: the list's end is not its own
                timeline.steps = timeline.declared_steps
            if begins_step(scheduler):
                timeline.declare(place)

    def _scheduler(self, time: torch.Tensor) -> Any:
        """The scheduler in whose list of times this one stands; the last one is looked at first."""
        last, schedulers = self._last, list(self._schedulers())  # another thread may exchange `_last`
        if _listed(last, time) and any(last is scheduler for scheduler in schedulers):
            return last
        scheduler = next((scheduler for scheduler in schedulers if _listed(scheduler, time)), None)
        if scheduler is None and _listed(last, time) and _one_evaluation(last):
            return last  # exchanged in the middle of a run, whose loop goes on with the old one's times
        self._last = scheduler
        return scheduler


def _is_last(scheduler: Any, mark: Place) -> bool:
    """Is it the last entry of this scheduler's list, from which inversions begin?"""
    return bool(mark.index - scheduler.timesteps.storage_offset() == len(scheduler.timesteps) - 1)


def _one_evaluation(scheduler: Any) -> bool:
    """Does it evaluate the UNet once a step, so that its state need not be asked?"""
    several = hasattr(scheduler, "state_in_first_order") or hasattr(scheduler, "prk_timesteps")
    return not (several or getattr(scheduler, "order_list", None))


def begins_step(scheduler: Any) -> bool:
    """Is the evaluation that comes next the first one of a denoising step?

    Args:
        scheduler: a diffusers scheduler whose `step` has run for every evaluation before this one.

    Returns:
        True for a scheduler that has one evaluation a step, and for one that is not known.

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


def steps_from(scheduler: Any, index: int = 0) -> int:
    """How many denoising steps there are from this entry of a diffusers scheduler's list of times to its end.

    Args:
        scheduler: a diffusers scheduler whose times are set.
        index: of the entry, from 0.

    Returns:
        Steps of the solver; some have several entries.

    Example:
        >>> from diffusers import PNDMScheduler
        >>> scheduler = PNDMScheduler(skip_prk_steps=True)
        >>> scheduler.set_timesteps(8)
        >>> len(scheduler.timesteps), steps_from(scheduler)
        (9, 8)
    """
    count: int = len(scheduler.timesteps) - index
    if getattr(scheduler, "state_in_first_order", None) is not None:  # two evaluations a step, but one in the last
        return -(-count // 2)
    orders: list[int] | None = getattr(scheduler, "order_list", None)
    if orders:
        return sum(order == 1 for order in orders[index:]) + int(orders[index] != 1)  # it may be entered within a step
    warm_up = getattr(scheduler, "prk_timesteps", None)
    if warm_up is None:
        return count
    if len(warm_up):  # Runge-Kutta steps of four, wherever in the list the solver has begun
        left: int = min(count, max(len(warm_up) - scheduler.counter, 0))
        return -(-left // 4) + count - left
    return max(count - int(scheduler.counter == 0), 1)  # the first step is two


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
        and address(times.untyped_storage()) == address(time.untyped_storage())
    )
