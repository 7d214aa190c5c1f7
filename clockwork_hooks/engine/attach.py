"""`wrap`: check what can be wrapped, and with what, and attach Clockwork to a UNet in place."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from clockwork_hooks._numbers import shape
from clockwork_hooks.adaptors import stand_in
from clockwork_hooks.adaptors.stand_in import AdaptorLike, resolve_adaptor
from clockwork_hooks.engine.chain import ClockedRegion
from clockwork_hooks.engine.engine import Engine
from clockwork_hooks.engine.wrapper import ClockworkWrapper, check_unet, compiled_from
from clockwork_hooks.errors import AdaptorError, ArgumentError, NoEffectWarning, is_several, named, no_option, warn
from clockwork_hooks.graph.tracing import module_paths
from clockwork_hooks.regions.find import Choice, ChoiceOptions, check_keep, region_or_choice
from clockwork_hooks.regions.region import Region
from clockwork_hooks.regions.saved import saved_choice, saved_region
from clockwork_hooks.schedule import Schedule, check_clock

if TYPE_CHECKING:
    from typing_extensions import Unpack


def check_region(region: Region, unet: nn.Module) -> None:
    """Raise `ArgumentError` if it is one of another UNet."""
    paths = set(module_paths(unet).values())
    needed = (*region.cut_plan.counts, *(port.path for port in region.cut_plan.ports.values()))
    missing = [path for path in dict.fromkeys(needed) if path not in paths]
    if missing:
        raise ArgumentError(
            "a region can be used only with the UNet that it was found for",
            seen={
                "region found for": region.model,
                "unet": type(unet).__name__,
                "modules it lacks": ", ".join(missing[:5]),
            },
            do="pass region=ch.find_region(unet, *args), found for this UNet",
        )


_DECIDES = {
    "plan": "a plan says which region, when, and what stands in for it",
    "clocks": "clocks= says which regions, and when; each feature is kept without its graph",
    "schedule": "a schedule and a clock cannot both be given",
}


def check_alone(name: str, value: object, others: Mapping[str, object]) -> None:
    """Raise `ArgumentError` if options are given that this one, where it is given, decides; None is not given."""
    seen = {other: repr(one)[:80] for other, one in others.items() if one is not None}
    if value is not None and seen:
        raise ArgumentError(
            _DECIDES[name], seen={name: repr(value)[:80], **seen}, do=f"pass {name}= without {', '.join(seen)}"
        )


def plan_parts(plan: Any) -> tuple[Any, Any, Any]:
    """Region, schedule and adaptor of a plan; raise `ArgumentError` where it lacks one."""
    names = ("region", "schedule", "adaptor")
    missing = [name for name in names if not hasattr(plan, name)]
    if missing:
        raise ArgumentError(
            "a plan has a region, a schedule and an adaptor",
            seen={"plan": type(plan).__name__, "it lacks": ", ".join(missing)},
            do="pass region=, schedule= and the adaptor themselves",
        )
    return plan.region, plan.schedule, plan.adaptor


def check_names(options: Mapping[str, Any], of: Callable[..., object]) -> None:
    """Raise `ArgumentError` for an option that neither this function nor `wrap` has, with one of nearly that name."""
    names = dict.fromkeys((*named(of)[1:], *named(wrap)[1:], *ChoiceOptions.__annotations__))
    for name in options:
        if name not in names:
            raise no_option(name, names, rule=f"{of.__name__} has options of known names")


_OLDEST = {"step before": 1, "same condition": 4}


def _oldest(reuse: str) -> int:
    """How many steps back a branch's own step before may be."""
    if not isinstance(reuse, str) or reuse not in _OLDEST:
        raise ArgumentError(
            "a feature can be reused in the next step, or in the next step with the same condition",
            seen={"reuse": repr(reuse)},
            do='pass reuse="step before" or reuse="same condition"',
        )
    return _OLDEST[reuse]


def _check_branch(branch: Any) -> Any:
    """The function that names branches; raise `ArgumentError` if it is none."""
    if branch is not None and not callable(branch):
        raise ArgumentError(
            "branch= is called with the arguments of each call",
            seen={"branch": repr(branch)[:80]},
            do='pass a function, or write `with cw.branch("uncond"):` around the call',
        )
    return branch


def _check_ignore(ignore: Iterable[str] | str) -> tuple[str, ...]:
    """The paths to ignore; raise `ArgumentError` if there are others than texts."""
    paths: tuple[Any, ...] = tuple(ignore) if is_several(ignore) else (ignore,)
    if not all(isinstance(path, str) and path for path in paths):
        raise ArgumentError(
            "ignore= names arguments by dotted paths",
            seen={"ignore": repr(ignore)[:80]},
            do='pass ignore=("transformer_options.sigmas",)',
        )
    return paths


def wrap(
    unet: nn.Module,
    adaptor: AdaptorLike | Mapping[Any, AdaptorLike] = None,
    *,
    clock: int | None = None,
    schedule: Schedule | Iterable[int] | Callable[[int], bool] | None = None,
    region: Region | Choice | str | Path | None = None,
    clocks: Mapping[int | tuple[int, ...] | Region, int] | None = None,
    plan: Any = None,
    time: str | None = None,
    check_finite: bool = False,
    keep_graph: bool = False,
    keep: Iterable[str] | str = (),
    ignore: Iterable[str] | str = (),
    branch: Callable[[Mapping[str, Any]], Hashable] | None = None,
    reuse: str = "step before",
    **options: Unpack[ChoiceOptions],
) -> ClockworkWrapper:
    """Run the UNet's low-resolution part on a slow clock.

    The UNet is changed in place, so a pipeline or sampler that holds it needs no change; `remove()` on the returned
    wrapper undoes everything. The first call is recorded while it runs, and the region found in it. From then on, one
    pass in `clock` denoising steps is full, and the others use the adaptor.

    Args:
        unet: any UNet: called once or more per denoising step, with a sample and a time. Of the output of
            `torch.compile`, the UNet in it is wrapped and compiled again, as by `cw.compile()`.
        adaptor: None or "identity" reuses the feature of the step before unchanged; or a module that follows
            `Adaptor`; or the folder (or Hugging Face Hub id) of a saved one, which is moved to the exit's device and
            dtype.
        clock: one full pass every `clock` steps; 1 switches Clockwork off. Without this and without a schedule: what a
            saved adaptor was calibrated or trained for, else 2.
        schedule: instead of `clock`: a `Schedule`, the set of adaptor steps (numbered from 1), or step -> bool.
        region: what to skip: a `Region` from `find_region`; a `Choice`, looked for at the first call:
            `ch.Choice(share=0.9)`; or the JSON file that `cw.region.save("region.json")` wrote in an earlier run, which
            needs no analysis where UNet and call are the same. None: the region that the adaptor was made for, else
            the one below the highest level.
        clocks: instead of `clock` and one region: several regions, one inside the other, each with its clock.
            {1: 2, 2: 4} runs the region below level 1 every 2 steps and the one below level 2 every 4. Keys are levels,
            resolutions of the edge as in (32, 32), or regions; each clock is a multiple of the one around it. `adaptor`
            may then be a mapping with these keys.
        plan: from `plan`, or any object with `region`, `schedule` and `adaptor`, instead of these three.
        time: name of the argument that holds the time, if several may.
        check_finite: raise `AdaptorError` when the adaptor returns NaN or infinity; waits for the device.
        keep_graph: under autograd, let gradients flow through a cached feature into the step that made it; the memory
            of both steps is held. Otherwise it is detached.
        keep: dotted paths of modules that run on adaptor passes too, with all that they need: ["mid_block"]. The rest
            of the region is skipped.
        ignore: dotted paths of arguments that nothing in the region depends on: ("transformer_options.sigmas",),
            ("guidance",). They are not compared, and their shapes and types are not part of the input signature.
        branch: a function of the arguments by name that names each call's branch, as `with cw.branch(key):` does:
            lambda args: tuple(args["transformer_options"].get("cond_or_uncond", ())).
        reuse: "step before", or "same condition" for prompts that take turns, as in [cat|dog]: a feature then serves
            the next step of its own conditions, up to four steps later, and the schedule counts the steps of each.
        **options: those of `Choice` instead of `region`, one by one: `share=0.9`, `level=2`, `cut="paper"`, ...

    Returns:
        The wrapper: call it like the UNet, read its attributes like the UNet's, use it as a context manager.

    Raises:
        WrapError: `unet` is no module, or is wrapped already, by DeepCache too.
        ArgumentError: an option is outside its rule, or two options decide the same.
        AdaptorError: the adaptor cannot be called or loaded, or (at the first call, unless `region` is passed) was
            made for another region.
        RegionNotFoundError: (at the first call, which leaves the UNet unwrapped) nothing can be skipped.
        AmbiguousInputError: (at the first call) several inputs may be the time; pass `time=`.

    Warns:
        NoEffectWarning: the clock is 1, or the schedule has no adaptor steps; or (once, at a call) six steps had no
            adaptor pass though the schedule asks for some.
        OtherStepsWarning: a saved adaptor was made for another schedule, or (once, at a call) for another number of
            steps; or (likewise) the schedule names steps that a run does not have.
        SkippedModuleWarning: (once, at a call) a hook of other code is on a module that adaptor passes skip.

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
    passed = unet
    unet = compiled_from(unet) if isinstance(unet, nn.Module) else unet
    optimized = None if unet is passed else passed
    check_unet(unet)
    when: dict[str, object] = {"clock": clock, "schedule": schedule}
    check_names(options, wrap)
    cut = options.get("cut", "outer")
    where: dict[str, object] = {"region": region, **{name: one for name, one in options.items() if name != "cut"}}
    own_cut = None if cut == "outer" else cut
    check_alone("plan", plan, {"adaptor": adaptor, "clocks": clocks, **when, **where, "cut": own_cut})
    check_alone("clocks", clocks, {**when, **where, "keep_graph": keep_graph or None})
    check_alone("schedule", schedule, {"clock": clock})
    if plan is not None:
        region, schedule, adaptor = plan_parts(plan)
    if clock is not None:
        check_clock(clock)
    keep_paths = check_keep(unet, keep)
    shared = {
        "time": time,
        "check_finite": check_finite,
        "keep_graph": keep_graph,
        "oldest": _oldest(reuse),
        "ignore": _check_ignore(ignore),
        "branch": _check_branch(branch),
    }
    if clocks is None:
        chain = [_alone(unet, adaptor, clock, schedule, region, options)]
        stand_in.check_schedule(chain[0].adaptor, chain[0].schedule)
    else:
        chain = _chain(unet, clocks, adaptor, cut)
    for clocked in chain:
        clocked.keep = keep_paths
    if all(clocked.schedule.never_skips for clocked in chain):
        warn(
            "clock 1, or a schedule without adaptor steps, makes every pass full: wrapping changes nothing\n"
            f"  schedule: {', '.join(dict.fromkeys(str(clocked.schedule) for clocked in chain))}\n"
            "What to do: pass clock=2, or steps for the adaptor: schedule={2, 4, 6, 8}",
            NoEffectWarning,
        )
    return _answering(ClockworkWrapper(unet, Engine(unet, chain, **shared)), optimized)


def _answering(cw: ClockworkWrapper, optimized: nn.Module | None) -> ClockworkWrapper:
    """The wrapper of a UNet that `torch.compile` was called on: it compiles by itself, and serves its output too."""
    if optimized is not None:
        try:
            cw.compile()
        except BaseException:
            cw.remove()
            raise
        cw.answer_for(optimized)
    return cw


def _alone(
    unet: nn.Module,
    adaptor: Any,
    clock: int | None,
    schedule: Any,
    region: Any,
    options: Mapping[str, Any],
) -> ClockedRegion:
    """One region with its schedule: what was chosen, or what the adaptor was made for."""
    if isinstance(adaptor, Mapping):
        raise AdaptorError(
            "several adaptors need several clocks", seen={"clocks": None}, do="pass clocks= with the same keys"
        )
    if isinstance(region, (str, Path)):
        region = saved_region(region, unet) or saved_choice(region)
    wanted = region_or_choice(region, options)
    if isinstance(wanted, Region):
        check_region(wanted, unet)
    used = resolve_adaptor(adaptor)
    steps = None if schedule is None else Schedule.of(schedule)
    if steps is None:
        own = stand_in.schedule_of(used)[0] if clock is None else None
        steps = own or Schedule.every(2 if clock is None else clock)
    if isinstance(wanted, Region):
        stand_in.check_region(used, wanted)
    elif wanted == Choice():
        wanted = Choice(**stand_in.region_options(used))
    alone = ClockedRegion(wanted, steps, used, movable=used is not adaptor)
    alone.clock = clock if clock is not None and schedule is None else 0
    alone.region = wanted if isinstance(wanted, Region) else None
    return alone


def _chain(unet: nn.Module, clocks: Mapping[Any, int], adaptor: Any, cut: str) -> list[ClockedRegion]:
    """Regions with their clocks; the rules that can be checked before the first call are."""
    if not isinstance(clocks, Mapping) or not clocks:
        raise ArgumentError(
            "clocks= gives each region a clock", seen={"clocks": repr(clocks)}, do="pass clocks={1: 2, 2: 4}"
        )
    adaptors = adaptor if isinstance(adaptor, Mapping) else dict.fromkeys(clocks, adaptor)
    if unknown := [key for key in adaptors if key not in clocks]:
        raise ArgumentError(
            "the keys of several adaptors are those of clocks=", seen={"others": unknown}, do="use the same keys"
        )
    chain = []
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
        used = resolve_adaptor(adaptors.get(key))
        movable = used is not adaptors.get(key)
        chain.append(ClockedRegion(wanted, Schedule.every(clock), used, movable, name, clock))
    return chain
