"""`wrap`: attach Clockwork to a UNet in place, and take it off again.

The UNet object, its class and its `state_dict` stay what they are: two native hooks on the root open and close every
call, and only modules with skipped calls are patched (hooks.py). The first real call is traced while it runs.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal

from torch import nn

from clockwork_hooks import emit
from clockwork_hooks.adaptive import AdaptiveEngine
from clockwork_hooks.adaptors import Adaptor, IdentityAdaptor
from clockwork_hooks.boundary import Region
from clockwork_hooks.capture import Captured
from clockwork_hooks.choice import Choice
from clockwork_hooks.compiled import Compiled
from clockwork_hooks.engine import Engine
from clockwork_hooks.errors import AdaptorError, ArgumentError, NoEffectWarning, WrapError
from clockwork_hooks.graph import module_paths
from clockwork_hooks.hooks import RootHook
from clockwork_hooks.layers import Clocked
from clockwork_hooks.nested import NestedEngine
from clockwork_hooks.report import shape
from clockwork_hooks.schedule import Schedule, check_clock
from clockwork_hooks.stats import RunReport, Stats
from clockwork_hooks.timeline import Position

__all__ = ["ClockworkWrapper", "check_unet", "wrap"]

MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "cudagraphs")


def wrap(
    unet: nn.Module,
    adaptor: Adaptor | str | os.PathLike[str] | Mapping[Any, Any] | None = None,
    *,
    clock: int = 2,
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
        clock: one full pass every `clock` steps; 1 switches Clockwork off.
        clocks: in place of `clock` and one region, several, one inside the other, each with a clock: {1: 2, 2: 4} runs
            the region below level 1 every 2 steps and the one below level 2 every 4. Keys are levels, resolutions of
            the edge as in (32, 32), or regions; each clock is a multiple of the one around it. `adaptor` may then be
            a mapping with these keys; `cut` goes for all.
        region: from `find_region`, found for this UNet at any batch, size and device; None to have it chosen at the
            first call, by the options that follow, or else the one that the adaptor was made for, or else the one
            below the highest level.
        level, resolution, share, modules, entry, exit, cut: which region, as in `find_region`.
        schedule: replaces `clock`: a `Schedule`, one that decides at run time too; the set of adaptor steps (numbered
            from 1), or step -> bool.
        plan: from `plan`, or any object with `region`, `schedule` and `adaptor`, which replaces all three.
        time: name of the argument that holds the time, where it cannot be told.
        check_finite: raise `AdaptorError` when the adaptor returns NaN or infinity; waits for the device.
        keep_graph: under autograd, let gradients flow through a cached feature into the step that made it, for those
            who train through the sampler; the memory of both steps is held. Otherwise it is detached.

    Returns:
        The wrapper: call it like the UNet, read its attributes like the UNet's, use it as a context manager.

    Raises:
        WrapError: `unet` is no module, is wrapped already, by DeepCache too, or is the output of `torch.compile`.
        ArgumentError: an option is outside its rule.
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
    chosen: Choice | None = None
    if plan is not None:
        region, schedule, adaptor = _parts(plan)
        chosen = plan.region if isinstance(plan.region, Choice) else None
    check_clock(clock)
    if clocks is not None:
        one_way: dict[str, object] = {
            "region": region,
            "schedule": schedule,
            "level": level,
            "resolution": resolution,
            "share": share,
        }
        one_way |= {"modules": modules, "entry": entry, "exit": exit}
        nested = _nested(unet, clocks, adaptor, one_way, cut, time, check_finite)
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
        _check_region(region, unet)
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


class ClockworkWrapper:
    """A wrapped UNet: made by `wrap`.

    Calls and unknown attributes go to the UNet, so `pipe.unet = cw` works as well as leaving the pipeline alone.

    Attributes:
        unet: the UNet itself.
    """

    def __init__(self, unet: nn.Module, engine: Engine) -> None:
        self.unet = unet
        self._engine = engine
        self._handles = [
            unet.register_forward_pre_hook(RootHook(self, self._begin), with_kwargs=True),
            # first of all hooks: the output of a pass that is run again is what the user's own hooks get to see
            unet.register_forward_hook(RootHook(self, self._end), prepend=True, with_kwargs=True, always_call=True),
        ]
        engine.installed.run_eagerly(unet)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the UNet."""
        return self.unet(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("unet", "_engine"):  # not set yet: copying and unpickling look for them
            raise AttributeError(name)
        return getattr(self.unet, name)

    @property
    def adaptor(self) -> Adaptor:
        """What stands in for the region."""
        return self._engine.adaptor

    @property
    def region(self) -> Region | None:
        """The region that adaptor passes skip; None before the first call, unless one was passed to `wrap`.

        Of several the widest.
        """
        return self._engine.region

    @property
    def regions(self) -> tuple[Region, ...]:
        """All regions that have clocks, widest first; none before the first call, unless one was passed to `wrap`."""
        return self._engine.regions

    @property
    def schedule(self) -> Schedule:
        """Which steps are full."""
        return self._engine.schedule

    @property
    def stats(self) -> Stats:
        """What ran so far, and why each full pass was full."""
        return self._engine.stats

    @property
    def enabled(self) -> bool:
        """Off: the UNet runs as if it were not wrapped, and what was cached is forgotten."""
        return self._engine.enabled

    @enabled.setter
    def enabled(self, on: bool) -> None:
        self._engine.enabled = bool(on)
        self._engine.states.forget()

    @property
    def position(self) -> Position | None:
        """Step and branch of the call that is under way in this thread or task; None between calls.

        None also during a call that is being traced: its place is known when it is over.
        """
        running = self._engine.states.current().running
        return next((call.position for call in reversed(running) if call is not None), None)

    def reset(self) -> None:
        """The next call in this thread begins a new trajectory; what was cached is let go."""
        self._engine.states.current().timeline.reset()

    @contextlib.contextmanager
    def trajectory(self) -> Iterator[None]:
        """One sampling run: nothing from before is used in it, and nothing of it is kept in memory after it.

        Never needed where a sampler runs from start to end. It tells what times cannot: that a run was given up
        half-way, that the next begins just below, that single evaluations are no run at all.

        Example:
            >>> def images(pipe, cw, prompts):
            ...     for prompt in prompts:
            ...         with cw.trajectory():
            ...             yield pipe(prompt)
        """
        self.reset()
        try:
            yield
        finally:
            self.reset()

    def step(self) -> _Step:
        """Declare that a denoising step begins; for samplers whose times do not tell.

        Call it before the step's evaluations, or write `with cw.step(): ...`, where an error ends the trajectory. From
        the first declaration until `reset()`, steps are counted by declarations alone. The evaluations of a step are
        numbered, and the k-th uses the feature of the k-th of the step before.

        Example:
            >>> def heun(unet, cw, x, sigmas):
            ...     for now, then in zip(sigmas[:-1], sigmas[1:]):
            ...         with cw.step():
            ...             slope = (x - unet(x, now)) / now
            ...             other = x + (then - now) * slope
            ...             x = x + (then - now) * (slope + (other - unet(other, then)) / then) / 2
            ...     return x
        """
        self._engine.states.current().timeline.declare()
        return _Step(self.reset)

    @contextlib.contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """Calls inside belong to the guidance branch of this name, whatever their conditions are.

        For conditions that are other tensors in each step, as embeddings made anew or a ControlNet's residuals.

        Args:
            name: any text; another name is another branch.

        Raises:
            ArgumentError: the name is no text.

        Example:
            >>> def guided(unet, cw, x, t, embed):
            ...     with cw.branch("uncond"):
            ...         plain = unet(x, t, embed(""))
            ...     with cw.branch("cond"):
            ...         return plain + 7.5 * (unet(x, t, embed("a red square")) - plain)
        """
        if not isinstance(name, str):
            raise ArgumentError("a branch is named by text", seen={"name": repr(name)}, do='pass branch("uncond")')
        names = self._engine.states.current().timeline.names
        names.append(name)
        try:
            yield
        except BaseException:
            self.reset()
            raise
        finally:
            names.pop()

    def compile(
        self, mode: str | None = None, *, backend: Any = "inductor", options: dict[str, Any] | None = None
    ) -> ClockworkWrapper:
        """Run the UNet as two static graphs from now on: one for full passes, one for adaptor passes.

        Each is compiled once per input signature, when its first pass comes; switching between them compiles nothing.
        The first call of a signature is still recorded as it runs, and its first adaptor pass counted. Called again,
        it begins anew; `remove()` undoes it.

        Args:
            mode: of `torch.compile` (None, "reduce-overhead", "max-autotune"), or "cudagraphs": both passes are
                captured as plain CUDA graphs. That takes a second in place of minutes and saves the launches, which
                is most of what small batches wait for; but what a replay runs is kernels, not the UNet's Python.
            backend: of `torch.compile`.
            options: of `torch.compile`.

        Returns:
            The wrapper itself.

        Raises:
            ArgumentError: the mode is none of these, or "cudagraphs" for a UNet that is not on a CUDA device; or
                several regions have clocks; or the schedule decides at run time.
            CompileError: (at a call) the UNet cannot be compiled into one graph, or captured.

        Example:
            >>> cw = wrap(unet, clock=2).compile(mode="cudagraphs")  # doctest: +SKIP

        Source: arXiv 2312.08128, Sec. 4.1: the full and the approximated network.
        """
        if isinstance(self._engine, NestedEngine):
            raise ArgumentError(
                "a compiled UNet has one region",
                seen={"regions": len(self._engine.clocks)},
                do="wrap it with one clock",
            )
        self.schedule.known_beforehand("the pass that a static graph stands for")
        if mode not in MODES:
            raise ArgumentError(
                "a mode is one of " + ", ".join(map(repr, MODES)), seen={"mode": repr(mode)}, do="pass one of these"
            )
        if mode == "cudagraphs":
            compiled: Compiled = Captured(self._engine)
        else:
            chosen = {"mode": mode, "backend": backend, "options": options}
            pooled = mode in ("reduce-overhead", "max-autotune") or bool((options or {}).get("triton.cudagraphs"))
            compiled = Compiled(self._engine, chosen, pooled=pooled)
        self._engine.installed.front(self.unet, compiled)
        return self

    def report(self) -> RunReport:
        """What ran, what was saved, why each full pass was full; `print` it, or `.to_markdown()`, `.to_json()`."""
        stats = self.stats
        return RunReport(
            type(self.unet).__name__,
            "; ".join(region.line for region in self.regions) or "not known before the first call",
            str(self.schedule),
            ", ".join(dict.fromkeys(type(adaptor).__name__ for adaptor in self._engine.adaptors)),
            stats.full_passes,
            stats.adaptor_passes,
            dict(stats.reasons),
            stats.macs_run,
            stats.macs_plain,
            self._engine.states.cache(),
            dict(stats.regions),
        )

    def remove(self) -> None:
        """Take Clockwork off: every module is what it was before `wrap`. Idempotent; works in the middle of a call."""
        for handle in self._handles:
            handle.remove()
        self._engine.clean(self._engine.states.current())
        self._engine.installed.remove()
        self._engine.states.forget()

    def __enter__(self) -> ClockworkWrapper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"ClockworkWrapper({type(self.unet).__name__}, {self.schedule}, {type(self.adaptor).__name__})"

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self._engine.begin(module, args, kwargs)
        except BaseException:
            self.remove()
            raise

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        try:
            return self._engine.end(module, args, kwargs, output)
        except BaseException:
            self.remove()
            raise


class _Step:
    """What `cw.step()` returns: a context for those who like to see where a step ends; an error there ends the run."""

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._reset()


def check_unet(unet: Any) -> None:
    """Raise `WrapError` if the UNet cannot be wrapped, or is wrapped."""
    if isinstance(unet, ClockworkWrapper) or (isinstance(unet, nn.Module) and _wrapped(unet)):
        raise WrapError(
            "a UNet is wrapped once", seen={"unet": repr(unet)[:80]}, do="call remove() on its wrapper first"
        )
    if not isinstance(unet, nn.Module):
        raise WrapError(
            "only an nn.Module can be wrapped",
            seen={"got": type(unet).__name__},
            do="pass the UNet itself, for a pipeline wrap(pipe.unet)",
        )
    inner = [path for path, module in unet.named_modules() if path and _wrapped(module)]
    if inner:
        raise WrapError(
            "a UNet is wrapped once: nothing inside of it may be wrapped already",
            seen={"unet": type(unet).__name__, "wrapped inside": ", ".join(inner)},
            do="wrap the outer module alone, or leave it at the inner one",
        )
    cached = [path for path, module in unet.named_modules() if _cached(module)]
    if cached:
        raise WrapError(
            "one cache at a time: DeepCache skips modules of this UNet already, and would keep what stands in for ours",
            seen={
                "unet": type(unet).__name__,
                "modules": f"{cached[0] or 'the UNet itself'} and {len(cached) - 1} more",
            },
            do="call disable() on its DeepCacheSDHelper first",
        )
    if "_orig_mod" in unet._modules:
        raise WrapError(
            "the output of torch.compile has its calls fixed: no module call can be skipped in it",
            seen={"got": type(unet).__name__},
            do="wrap the UNet itself: wrap(compiled._orig_mod), and call that",
        )


def _parts(plan: Any) -> tuple[Any, Any, Any]:
    names = ("region", "schedule", "adaptor")
    missing = [name for name in names if not hasattr(plan, name)]
    if missing:
        raise ArgumentError(
            "a plan has a region, a schedule and an adaptor",
            seen={"plan": type(plan).__name__, "it lacks": ", ".join(missing)},
            do="pass region=, schedule= and the adaptor themselves",
        )
    return plan.region, plan.schedule, plan.adaptor


def _check_region(region: Any, unet: nn.Module) -> None:
    if not isinstance(region, Region):
        raise ArgumentError(
            "a region comes from find_region or find_regions",
            seen={"region": type(region).__name__},
            do="pass region=ch.find_region(unet, *args, level=1)",
        )
    known = set(module_paths(unet).values())
    needed = (*region.plan.counts, *(port.path for port in region.plan.ports.values()))
    missing = [path for path in dict.fromkeys(needed) if path not in known]
    if missing:
        raise ArgumentError(
            "a region fits the UNet that it was found for",
            seen={
                "region found for": region.model,
                "unet": type(unet).__name__,
                "modules it lacks": ", ".join(missing[:5]),
            },
            do="pass region=ch.find_region(unet, *args), found for this UNet",
        )


def _wrapped(unet: nn.Module) -> bool:
    return any(isinstance(hook, RootHook) for hook in unet._forward_pre_hooks.values())


def _cached(module: nn.Module) -> bool:
    return str(getattr(vars(module).get("forward"), "__module__", "")).startswith("DeepCache.")


def _nested(
    unet: nn.Module,
    clocks: Mapping[Any, int],
    adaptor: Any,
    one_way: Mapping[str, object],
    cut: str,
    time: str | None,
    check_finite: bool,
) -> NestedEngine:
    """What runs several clocks; the rules that can be checked before the first call are."""
    if given := {name: value for name, value in one_way.items() if value is not None}:
        raise ArgumentError("clocks= says which regions, and when", seen=given, do="pass clocks= alone")
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
            _check_region(key, unet)
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
