"""`wrap`: attach Clockwork to a UNet in place."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from torch import nn

from clockwork_hooks import emit
from clockwork_hooks.acceptance import check_alone, check_region, check_unet, plan_parts
from clockwork_hooks.adaptive import AdaptiveEngine
from clockwork_hooks.adaptors import Adaptor, IdentityAdaptor
from clockwork_hooks.boundary import Region
from clockwork_hooks.choice import Choice
from clockwork_hooks.engine import Engine
from clockwork_hooks.errors import AdaptorError, ArgumentError, NoEffectWarning
from clockwork_hooks.layers import Clocked
from clockwork_hooks.nested import NestedEngine
from clockwork_hooks.report import shape
from clockwork_hooks.schedule import Schedule, check_clock
from clockwork_hooks.wrapper import ClockworkWrapper

__all__ = ["wrap"]


def wrap(
    unet: nn.Module,
    adaptor: Adaptor | str | os.PathLike[str] | Mapping[Any, Any] | None = None,
    *,
    clock: int | None = None,
    clocks: Mapping[int | tuple[int, ...] | Region, int] | None = None,
    region: Region | None = None,
    level: int | None = None,
    resolution: int | tuple[int, ...] | None = None,
    share: float | None = None,
    modules: Iterable[str] | str | None = None,
    entry: str | None = None,
    exit: str | None = None,
    cut: Literal["outer", "paper"] = "outer",
    schedule: Schedule | Iterable[int] | Callable[[int], bool] | None = None,
    plan: Any = None,
    time: str | None = None,
    check_finite: bool = False,
    keep_graph: bool = False,
) -> ClockworkWrapper:
    """Run the UNet's low-resolution part on a slow clock.

    The UNet is changed in place, so whoever holds it (a pipeline, a sampler) is served; `remove()` on the returned
    wrapper undoes everything. The first real call is traced as it runs and its region found; from then on, one full
    pass every `clock` denoising steps, and the adaptor in between.

    Args:
        unet: any UNet: called once or more per denoising step, with a sample and a time.
        adaptor: None or "identity" for the feature of the step before as it is; or a module that follows `Adaptor`;
            or the folder (or Hugging Face Hub id) of a saved one, which then goes to the exit's device and dtype.
        clock: one full pass every `clock` steps, 2 unless said; 1 switches Clockwork off.
        clocks: in place of `clock` and one region, several, one inside the other, each with a clock: {1: 2, 2: 4} runs
            the region below level 1 every 2 steps and the one below level 2 every 4. Keys are levels, resolutions of
            the edge as in (32, 32), or regions; each clock is a multiple of the one around it. `adaptor` may then be
            a mapping with these keys; `cut` goes for all.
        region: from `find_region`, found for this UNet at any batch, size and device; None to have it chosen at the
            first call, by the options that follow, or else the one that the adaptor was made for, or else the one
            below the highest level.
        level, resolution, share, modules, entry, exit, cut: which region, as in `find_region`.
        schedule: in place of `clock`: a `Schedule`, one that decides at run time too; the set of adaptor steps
            (numbered from 1), or step -> bool.
        plan: from `plan`, or any object with `region`, `schedule` and `adaptor`, in place of all three.
        time: name of the argument that holds the time, where it cannot be told.
        check_finite: raise `AdaptorError` when the adaptor returns NaN or infinity; waits for the device.
        keep_graph: under autograd, let gradients flow through a cached feature into the step that made it, for those
            who train through the sampler; the memory of both steps is held. Otherwise it is detached.

    Returns:
        The wrapper: call it like the UNet, read its attributes like the UNet's, use it as a context manager.

    Raises:
        WrapError: `unet` is no module, is wrapped already, by DeepCache too, or is the output of `torch.compile`.
        ArgumentError: an option is outside its rule, or two options decide the same.
        AdaptorError: the adaptor cannot be called or loaded, or (at the first call, unless `region` is passed) was
            made for another region.
        RegionNotFoundError: (at the first call, which leaves the UNet unwrapped) nothing can be skipped.
        AmbiguousInputError: (likewise) several inputs may be the time; pass `time=`.

    Warns:
        NoEffectWarning: the clock is 1.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler, UNet2DModel
        >>> unet = UNet2DModel(
        ...     16,
        ...     block_out_channels=(8, 32),
        ...     norm_num_groups=8,
        ...     down_block_types=("DownBlock2D",) * 2,
        ...     up_block_types=("UpBlock2D",) * 2,
        ... ).eval()
        >>> scheduler, sample = DDIMScheduler(), torch.randn(1, 3, 16, 16)
        >>> scheduler.set_timesteps(8)
        >>> with torch.no_grad(), wrap(unet, clock=2) as cw:
        ...     for t in scheduler.timesteps:
        ...         sample = scheduler.step(unet(sample, t).sample, t, sample).prev_sample
        >>> cw.stats.full_passes, cw.stats.adaptor_passes
        (4, 4)

    Source: arXiv 2312.08128, Sec. 4.1 and 4.3.
    """
    check_unet(unet)
    when: dict[str, object] = {"clock": clock, "schedule": schedule}
    where: dict[str, object] = {"region": region, "level": level, "resolution": resolution, "share": share}
    where |= {"modules": modules, "entry": entry, "exit": exit}
    own_cut = None if cut == "outer" else cut
    check_alone("plan", plan, {"adaptor": adaptor, "clocks": clocks, **when, **where, "cut": own_cut})
    check_alone("clocks", clocks, {**when, **where, "keep_graph": keep_graph or None})
    check_alone("schedule", schedule, {"clock": clock})
    chosen: Choice | None = None
    if plan is not None:
        region, schedule, adaptor = plan_parts(plan)
        chosen = plan.region if isinstance(plan.region, Choice) else None
    clock = 2 if clock is None else clock
    check_clock(clock)
    if clocks is not None:
        nested = _nested(unet, clocks, adaptor, cut, time, check_finite)
        if all(one.clock == 1 for one in nested.clocks):
            warnings.warn("clock 1 makes every pass full: wrapping changes nothing", NoEffectWarning, stacklevel=2)
        return ClockworkWrapper(unet, nested)
    if isinstance(adaptor, Mapping):
        raise AdaptorError(
            "several adaptors go with several clocks", seen={"clocks": None}, do="pass clocks= with the same keys"
        )
    choice = Choice(level=level, resolution=resolution, share=share, modules=modules, entry=entry, exit=exit, cut=cut)
    if chosen is not None:
        choice, region = chosen, None
    if region is not None:
        check_region(region, unet)
        choice.instead_of(region)
    if schedule is None and clock == 1:
        warnings.warn("clock 1 makes every pass full: wrapping changes nothing", NoEffectWarning, stacklevel=2)
    steps = Schedule.every(clock) if schedule is None else Schedule.of(schedule)
    used = _adaptor(adaptor)
    if region is not None:
        emit.check_region(used, region)
    elif choice == Choice():
        choice = Choice(**emit.region_options(used))
    loaded = used is not adaptor
    checks = {"check_finite": check_finite, "keep_graph": keep_graph}
    kind = Engine if steps.threshold is None else AdaptiveEngine
    engine = kind(unet, used, steps, region=region or choice, time=time, loaded=loaded, **checks)
    return ClockworkWrapper(unet, engine)


def _nested(
    unet: nn.Module,
    clocks: Mapping[Any, int],
    adaptor: Any,
    cut: str,
    time: str | None,
    check_finite: bool,
) -> NestedEngine:
    """What runs several clocks; the rules that can be checked before the first call are."""
    if not isinstance(clocks, Mapping) or not clocks:
        raise ArgumentError(
            "clocks= gives each region a clock", seen={"clocks": repr(clocks)}, do="pass clocks={1: 2, 2: 4}"
        )
    adaptors = adaptor if isinstance(adaptor, Mapping) else dict.fromkeys(clocks, adaptor)
    if unknown := [key for key in adaptors if key not in clocks]:
        raise ArgumentError("adaptors are for the regions of clocks=", seen={"others": unknown}, do="use the same keys")
    made = []
    for key, clock in clocks.items():
        check_clock(clock)
        if isinstance(key, Region):
            check_region(key, unet)
            wanted: Region | Choice = key
            name = f"{key.entry.path} → {key.exit.path}"
        elif isinstance(key, tuple):
            wanted, name = Choice(resolution=key, cut=cut), shape(key)
        else:
            wanted, name = Choice(level=key, cut=cut), f"level {key}"
        used = _adaptor(adaptors.get(key))
        made.append(Clocked(name, wanted, clock, used, loaded=used is not adaptors.get(key)))
    return NestedEngine(unet, made, time=time, check_finite=check_finite)


def _adaptor(adaptor: Adaptor | str | os.PathLike[str] | None) -> Adaptor:
    if adaptor is None or adaptor == "identity":
        return IdentityAdaptor()
    if isinstance(adaptor, (str, os.PathLike)):
        from clockwork_hooks.adaptors import LearnedAdaptor  # huggingface_hub comes with it

        return LearnedAdaptor.from_pretrained(adaptor)
    if isinstance(adaptor, type) or not callable(adaptor):
        raise AdaptorError(
            'an adaptor is None, "identity", the folder of a saved one, or a module called as '
            "adaptor(entry, exit_cached, time=..., text=...)",
            seen={"adaptor": repr(adaptor)[:80]},
            do="pass one of these",
        )
    return adaptor
