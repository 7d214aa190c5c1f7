"""`ClockworkWrapper`: what the user holds while a UNet is wrapped: it steers the engine, and takes all off again.

The UNet object, its class and its `state_dict` stay what they are: only the `forward` of the UNet and of modules with
skipped calls is replaced, on the instance (hooks.py). The first real call is traced while it runs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from types import TracebackType
from typing import Any

import torch
from torch import nn

from clockwork_hooks.adaptors import Adaptor
from clockwork_hooks.clock.loops import BranchBlock, TrajectoryBlock
from clockwork_hooks.clock.samplers import SAMPLERS, SamplerSteps, find_sampler, steps_as_it_runs
from clockwork_hooks.clock.timeline import Position, Timeline
from clockwork_hooks.engine.compiled import Compiled
from clockwork_hooks.engine.cuda_graphs import Captured
from clockwork_hooks.engine.engine import Engine, Observer
from clockwork_hooks.engine.hooks import RootHook
from clockwork_hooks.engine.stats import RunReport, Stats
from clockwork_hooks.errors import ArgumentError, WrapError, whole
from clockwork_hooks.regions.region import Region
from clockwork_hooks.schedule import Schedule

POOLED = ("reduce-overhead", "max-autotune")
CAPTURED = ("cudagraphs", "compiled-cudagraphs")
MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", *CAPTURED)


def check_unet(unet: Any) -> None:
    """Raise `WrapError` if the UNet cannot be wrapped, or is wrapped."""
    wrapper = unet if isinstance(unet, ClockworkWrapper) else _wrapper(unet) if isinstance(unet, nn.Module) else None
    if wrapper is not None:
        wrapped = wrapper.unet if isinstance(wrapper, ClockworkWrapper) else unet
        error = WrapError(
            "a UNet can be wrapped only once, and this one has a wrapper",
            seen={"unet": type(wrapped).__name__, "wrapper": repr(wrapper)},
            do="call remove() on its wrapper first; if you did not keep it, it is this error's .wrapper",
        )
        error.wrapper = wrapper
        raise error
    if not isinstance(unet, nn.Module):
        is_class = isinstance(unet, type)
        raise WrapError(
            "only an nn.Module can be wrapped",
            seen={"got": f"the class {unet.__name__}" if is_class else type(unet).__name__},
            do=f"pass an instance: unet = {unet.__name__}(...)"
            if is_class
            else "pass the UNet itself, for a pipeline wrap(pipe.unet)",
        )
    if isinstance(unet, torch.jit.ScriptModule):
        raise WrapError(
            "a torch.jit model is fixed: no module call in it can be skipped",
            seen={"got": type(unet).__name__, "made of": unet.original_name},
            do="wrap the nn.Module that it was scripted or traced from, and call that",
        )
    inner = [path for path, module in unet.named_modules() if path and _wrapper(module) is not None]
    if inner:
        raise WrapError(
            "nothing inside a UNet may be wrapped already",
            seen={"unet": type(unet).__name__, "wrapped inside": ", ".join(inner)},
            do="wrap either the outer or the inner module",
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
    if compiled_from(unet) is not unet:
        raise WrapError(
            "the output of torch.compile is fixed: no module call in it can be skipped",
            seen={"got": type(unet).__name__},
            do="wrap the UNet itself: wrap(compiled._orig_mod), and call that",
        )


def compiled_from(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` was called on, where this is its output; else the module itself."""
    return dict(module.named_children()).get("_orig_mod", module)


def _wrapper(unet: nn.Module) -> object | None:
    """What is attached to the UNet: a wrapper, or `distill` while it records."""
    return next((hook.owner for hook in unet._forward_pre_hooks.values() if isinstance(hook, RootHook)), None)


def _cached(module: nn.Module) -> bool:
    return str(getattr(vars(module).get("forward"), "__module__", "")).startswith("DeepCache.")


def static_calls(engine: Engine, mode: str | None, backend: Any, options: dict[str, Any] | None) -> Compiled:
    """What runs the passes of this engine as static callables.

    Args:
        engine: decides what runs.
        mode: one of `MODES`.
        backend, options: of `torch.compile`.

    Raises:
        ArgumentError: what `ClockworkWrapper.compile` says.
    """
    if mode not in MODES:
        raise ArgumentError(
            "a mode is one of " + ", ".join(map(repr, MODES)), seen={"mode": repr(mode)}, do="pass one of these"
        )
    if mode == "cudagraphs" and (backend != "inductor" or options is not None):
        raise ArgumentError(
            'mode="cudagraphs" compiles nothing: backend and options belong to the other modes',
            seen={"backend": repr(backend), "options": repr(options)},
            do='pass mode="cudagraphs" without them, or mode="compiled-cudagraphs" with them',
        )
    if mode == "cudagraphs":
        return Captured(engine)
    graphs_of_torch = bool((options or {}).get("triton.cudagraphs"))
    if mode in CAPTURED and graphs_of_torch:
        raise ArgumentError(
            f'mode="{mode}" captures what is compiled: torch.compile does not capture it, too',
            seen={"options": options},
            do='leave "triton.cudagraphs" out of the options',
        )
    chosen = {"mode": None if mode in CAPTURED else mode, "backend": backend, "options": options}
    _try(chosen)
    compiled = Compiled(engine, chosen, pooled=mode in POOLED or graphs_of_torch)
    return Captured(engine, compiled) if mode in CAPTURED else compiled


def _try(chosen: dict[str, Any]) -> None:
    """Let `torch.compile` look at its options now: at a call it would end a trajectory."""
    try:
        options = chosen["options"] and dict(chosen["options"])  # torch takes its own out of it
        torch.compile(lambda: None, fullgraph=True, **{**chosen, "options": options})
    except Exception as error:
        raise ArgumentError(
            "mode, backend and options are those of torch.compile",
            seen={**{name: repr(value) for name, value in chosen.items()}, "error": str(error)[:200]},
            do="pass what torch.compile(model, ...) takes: a mode or options, and a backend that it lists",
        ) from error


_OWN = ("unet", "_engine")  # what a wrapper holds itself


class ClockworkWrapper:
    """A wrapped UNet: made by `wrap`.

    Calls go to the UNet, and so do attributes that are the UNet's, read or set: `pipe.unet = cw` works as well as
    leaving the pipeline alone.

    Attributes:
        unet: the UNet itself.
    """

    def __init__(self, unet: nn.Module, engine: Engine) -> None:
        self.unet = unet
        self._engine = engine
        engine.attach(self, self._give_up)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the UNet."""
        return self.unet(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """The wrapper's own, or the UNet's; another name would be set and read by nobody, as in `cw.clock = 3`."""
        own = getattr(type(self), name, None)
        told = own.fset is None if isinstance(own, property) else name in vars(self)  # once, by `wrap`
        if not told and (own is not None or name in _OWN):
            object.__setattr__(self, name, value)
        elif not told and hasattr(self.unet, name):
            setattr(self.unet, name, value)
        else:
            raise AttributeError(
                f"{name!r} cannot be set on a {type(self).__name__} of {type(self.unet).__name__}: what can be set is "
                "cw.enabled, and what the UNet has; for another clock, schedule, adaptor or UNet, cw.remove() and wrap "
                "again"
            )

    def __getattr__(self, name: str) -> Any:
        if name in _OWN:  # not set yet: copying and unpickling look for them
            raise AttributeError(name)
        return getattr(self.unet, name)

    @property
    def adaptor(self) -> Adaptor:
        """What stands in for the region."""
        return self._engine.chain[0].adaptor

    @property
    def region(self) -> Region | None:
        """The region that adaptor passes skip; None before the first call, unless one was passed to `wrap`.

        Of several the widest.
        """
        return next(iter(self._engine.regions), None)

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
        """Off: the UNet runs as if it were not wrapped, and what was cached is forgotten. May be set in every step."""
        return self._engine.enabled

    @enabled.setter
    def enabled(self, on: bool) -> None:
        if bool(on) is not self._engine.enabled:
            self._engine.enabled = bool(on)
            self._engine.states.forget()

    @contextlib.contextmanager
    def serving(self, on: bool = True) -> Iterator[None]:
        """Within it, calls are served, or not; unlike with `enabled`, nothing is forgotten.

        For a UNet that others call too, in the middle of a run: `with cw.serving(False):` around the run, and
        `with cw.serving():` around the calls that are Clockwork's.
        """
        before, self._engine.enabled = self._engine.enabled, on
        try:
            yield
        finally:
            self._engine.enabled = before

    @property
    def attached(self) -> bool:
        """Is Clockwork on the UNet: from `wrap` or `attach()` until `remove()`, or an error of its own?"""
        return not self._engine.installed.closed

    @property
    def compiled(self) -> bool:
        """Do passes run as static callables: compiled, or captured as CUDA graphs?"""
        return self._engine.static is not None

    @property
    def position(self) -> Position | None:
        """Step and branch of the call that is under way in this thread or task; None between calls.

        None also during a call that is being traced: its place is known when it is over.
        """
        calls = self._engine.states.current().calls
        return calls[-1].place if calls else None

    @property
    def pass_kind(self) -> str | None:
        """The pass that is running in this thread, "full" or "adaptor"; None outside of one."""
        pass_ = self._engine.active.pass_
        return None if pass_ is None else pass_.kind

    def answer_for(self, optimized: nn.Module) -> None:
        """While attached, the output of `torch.compile` for this UNet calls it as it is."""
        self._engine.installed.answer_for(optimized, self.unet)

    def read_steps(self, reader: Callable[[Timeline, Any], None] | None) -> None:
        """Let a reader declare the steps that a scheduler tells; before each call it gets the timeline and the time."""
        self._engine.step_reader = reader

    @contextlib.contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Within it, the observer sees every call: before it runs, and what it has led to."""
        self._engine.observers.append(observer)
        try:
            yield
        finally:
            self._engine.observers.remove(observer)

    def reset(self) -> None:
        """The next call in this thread begins a new trajectory; what was cached is let go."""
        self._engine.states.current().timeline.reset()

    def trajectory(self, name: str | None = None, *, steps: int | None = None) -> TrajectoryBlock:
        """One sampling run: nothing from before is used in it, and its memory is released after it.

        Not needed for a sampler that runs from start to end over a list of times. It is for what times do not show:
        times that are plain numbers, a run that was stopped half-way, single evaluations that are no run, loops that
        take turns.

        A call belongs to the run if it is made inside the block: by the function that opened it, or by what that
        function calls, also in a generator that other threads step. Elsewhere, as in `asyncio.to_thread`, call the
        block's value instead of the UNet: `with cw.trajectory() as run: ... run(x, t)`.

        Args:
            name: open blocks of one name belong to the same run.
            steps: denoising steps of the run, for schedules that count from its end: `Schedule.spread(2)`,
                `Schedule.every(2, last_full=1)`.

        Returns:
            The block, which calls the UNet; without `with`, `close()` ends it.

        Raises:
            ArgumentError: the name is no text, or the number of steps is below 1.

        Example:
            >>> def images(pipe, cw, prompts):
            ...     for prompt in prompts:
            ...         with cw.trajectory():
            ...             yield pipe(prompt)
        """
        if name is not None and not isinstance(name, str):
            raise ArgumentError("a trajectory is named by text", seen={"name": repr(name)}, do='pass "client 7"')
        if steps is not None:
            whole("steps", steps, least=1, example=20)
        return TrajectoryBlock(self._engine.states, name, self, steps)

    def sampler(self, name: str, sigmas: Iterable[Any]) -> TrajectoryBlock:
        """One run of a sampler whose number of evaluations a step is known by its name.

        For solvers that evaluate between the times of their steps, or raise the noise before each. All evaluations of
        a step are full, or all use the adaptor, and the k-th uses the feature of the k-th of the step before.

        With two evaluations a step, a plain clock counts evaluations, and the first two are full: at clock 2 the first
        of every step uses the adaptor, with the feature of the evaluation before, and the second is full. This is two
        to four times more exact (docs/samplers.md). Other schedules, and adaptors that were made for a schedule, go by
        steps. The number of calls of an evaluation (guidance branches, tiles) has to stay the same within the block.

        Args:
            name: as k-diffusion and ComfyUI call it: "heun", "dpm_2_ancestral", "dpmpp_sde", ...; "edm" and "karras_ve"
                for Heun's steps with noise added before each, "midpoint" and "rk4" for torchdiffeq's.
            sigmas: the sampler's own, with the zero at their end if they have one; for torchdiffeq the times.

        Returns:
            The block, as `trajectory` does.

        Raises:
            ArgumentError: the sampler is not known or chooses its steps as it runs ("dpm_adaptive"), or there are fewer
                than two sigmas.

        Example:
            >>> def picture(sampling, cw, denoise, x, sigmas):
            ...     with cw.sampler("dpmpp_sde", sigmas):
            ...         return sampling.sample_dpmpp_sde(denoise, x, sigmas)
        """
        if isinstance(name, str) and steps_as_it_runs(name):
            raise ArgumentError(
                "cw.sampler needs a sampler whose steps can be counted ahead",
                seen={
                    "name": repr(name),
                    "its steps": "are chosen as it runs, and tried again where an error is large",
                },
                do="declare each: `with cw.trajectory(): cw.step()`, then pass the sampler callback=lambda info: "
                "cw.step(); undeclared, most of its passes are full",
            )
        evaluations = find_sampler(name) if isinstance(name, str) else None
        if evaluations is None:
            near = get_close_matches(str(name), SAMPLERS, n=3)
            raise ArgumentError(
                "a sampler is named as in k-diffusion or ComfyUI",
                seen={"name": repr(name), "names": ", ".join(SAMPLERS)},
                do=f'pass "{near[0]}"' if near else "write `with cw.step():` around the evaluations of each step",
            )
        numbers = [float(sigma) for sigma in (sigmas.tolist() if isinstance(sigmas, torch.Tensor) else sigmas)]
        if len(numbers) < 2:
            raise ArgumentError(
                "sigmas need at least two entries: a step goes from one to the next",
                seen={"sigmas": numbers},
                do="pass the sampler's whole list",
            )
        counts = evaluations.steps(numbers)
        each = evaluations.each and self._engine.ticks
        steps = SamplerSteps(counts, shares=evaluations.shares, each=each)
        return TrajectoryBlock(self._engine.states, None, self, sum(counts) if each else len(counts), steps)

    def step(self, *, ordered: bool = True) -> _Step:
        """Declare that a denoising step begins; for samplers whose times do not show it.

        Call it before the step's evaluations, or write `with cw.step(): ...`, where an error ends the trajectory. From
        the first declaration until `reset()`, only declared steps count. The k-th evaluation of a step uses the
        feature of the k-th of the step before.

        Args:
            ordered: the time goes one way from step to step; if it goes back, another trajectory begins. Pass False
                if you declare single evaluations of a solver, some of which go back: `reset()` then ends a run.

        Example:
            >>> def heun(unet, cw, x, sigmas):
            ...     for now, then in zip(sigmas[:-1], sigmas[1:]):
            ...         with cw.step():
            ...             slope = (x - unet(x, now)) / now
            ...             other = x + (then - now) * slope
            ...             x = x + (then - now) * (slope + (other - unet(other, then)) / then) / 2
            ...     return x
        """
        timeline = self._engine.states.current().timeline
        timeline.declare()
        timeline.opened = ordered
        return _Step(self.reset)

    def branch(self, name: str) -> BranchBlock:
        """Calls inside belong to the guidance branch of this name, even if their conditions change in each step.

        For embeddings with new values in each step, and for branches that nothing else tells apart. The names of
        nested blocks are combined. Calls of one name with several conditions are still told apart by these.

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
        return BranchBlock(self._engine.states, name)

    def rows(self, names: Iterable[str], *, exact: bool = True) -> BranchBlock:
        """Name the rows of the batch of the calls inside: rows that stay are served when others are left out.

        For loops that leave rows out in some steps, as the unconditional ones ("skip negative guidance"), or change
        their order. A row is served from the row of its name in the step before, if it had the same conditions there,
        and if this holds for all rows of the batch; else the pass is full. Use it only if no row depends on another:
        true for UNets of pictures, not where frames of a video are rows.

        Args:
            names: one for each row, in the batch's order.
            exact: False if other code may split the batch before it reaches the UNet: then a call with another
                number of rows has no names.

        Returns:
            The block.

        Raises:
            ArgumentError: a name is no text, or comes twice; or (at a call) the batch has another number of rows.

        Example:
            >>> def denoise(unet, cw, x, t, cond, uncond, alone):
            ...     if alone:
            ...         with cw.rows(["cond"]):
            ...             return unet(x, t, cond)
            ...     with cw.rows(["cond", "uncond"]):
            ...         return unet(torch.cat([x, x]), t, torch.cat([cond, uncond]))
        """
        rows = (names,) if isinstance(names, str) else tuple(names)
        if not rows or not all(isinstance(name, str) for name in rows) or len(set(rows)) < len(rows):
            raise ArgumentError(
                "rows are named by texts, each by its own",
                seen={"names": repr(rows)[:80]},
                do='pass rows(["cond", "uncond"]); of several pictures, rows(["cond 1", "cond 2", ...])',
            )
        return BranchBlock(self._engine.states, rows=rows, exact=exact)

    def compile(
        self, mode: str | None = None, *, backend: Any = "inductor", options: dict[str, Any] | None = None
    ) -> ClockworkWrapper:
        """Run the UNet as static graphs from now on: one for full passes, and one for each region's adaptor passes.

        Each is compiled once per input signature, at its first pass; switching between them compiles nothing. The first
        call of a signature, and the first adaptor pass, still run without it. Called again, it compiles again;
        `remove()` undoes it. With an adaptive schedule, the passes that it has to decide on are not static.

        Args:
            mode: one of four; docs/performance.md has what SD v1.5 gains.
                None (also "max-autotune-no-cudagraphs"): `torch.compile` fuses kernels, which takes minutes. The only
                one for a CPU.
                "reduce-overhead" (also "max-autotune"): the same, replayed by torch as CUDA graphs. Torch checks before
                each launch if the UNet's Python has changed.
                "cudagraphs": both passes are captured as CUDA graphs, without a compiler. It takes a second, and saves
                the launches that small batches wait for. A replay runs kernels, not the UNet's Python; changes of the
                UNet are looked up once a trajectory.
                "compiled-cudagraphs": passes are compiled, and captured in the same way. The fastest.
            backend: of `torch.compile`.
            options: of `torch.compile`.

        Returns:
            The wrapper itself.

        Raises:
            ArgumentError: the mode is none of these; or captures, and the UNet is not on a CUDA device; or
                `torch.compile` refuses the options.
            CompileError: (at a call) the UNet cannot be compiled into one graph, or captured.

        Example:
            >>> cw = wrap(unet, clock=2).compile(mode="compiled-cudagraphs")  # doctest: +SKIP

        Source: arXiv 2312.08128, Sec. 4.1: the full and the approximated network.
        """
        self._engine.static = static_calls(self._engine, mode, backend, options)
        return self

    def prepare(self, *args: Any, **kwargs: Any) -> ClockworkWrapper:
        """Record a call ahead, so that the first run is like all later ones: no pass is "traced" in it.

        Pass arguments of the same shapes, dtypes and devices as the sampler's; values do not matter. The UNet runs
        once, without changes to random state, parameters and buffers, and the call is no step of any run. Call it for
        each batch size and resolution, with the autocast and training modes of the run.

        Args:
            *args: as the sampler will call the UNet.
            **kwargs: likewise.

        Returns:
            The wrapper itself.

        Raises:
            WrapError: the wrapper is not attached.
            TraceError: the call cannot be recorded.
            RegionNotFoundError: nothing can be skipped.

        Example:
            >>> import torch
            >>> from clockwork_hooks.models import load_model
            >>> unet, args, kwargs = load_model("ddpm-cifar10", device="cpu")  # doctest: +SKIP
            >>> cw = wrap(unet).prepare(*args, **kwargs)  # doctest: +SKIP
        """
        if not self.attached:
            raise WrapError(
                "calls can be recorded only while the wrapper is attached",
                seen={"unet": type(self.unet).__name__},
                do="call attach() first",
            )
        self._engine.prepare(args, kwargs)
        return self

    def report(self) -> RunReport:
        """What ran, what was saved, why each full pass was full; `print` it, or `.to_markdown()`, `.to_json()`."""
        stats, adaptors = self.stats, [clocked.adaptor for clocked in self._engine.chain]
        return RunReport(
            type(self.unet).__name__,
            "; ".join(map(_region_line, self.regions)) or "not known before the first call",
            str(self.schedule),
            ", ".join(dict.fromkeys(type(adaptor).__name__ for adaptor in adaptors)),
            stats.full_passes,
            stats.adaptor_passes,
            dict(stats.reasons),
            stats.macs_run,
            stats.macs_plain,
            self._engine.states.cache(),
            dict(stats.regions),
            self._engine.uncounted,
        )

    def attach(self) -> ClockworkWrapper:
        """Put Clockwork on again after `remove()`: what was recorded of the UNet's calls is still known. Idempotent.

        Returns:
            The wrapper itself.

        Raises:
            WrapError: the UNet, or a module inside of it, has got another wrapper or DeepCache meanwhile.
        """
        if not self.attached:
            check_unet(self.unet)
            self._engine.attach(self, self._give_up)
        return self

    def remove(self) -> None:
        """Take Clockwork off: every module is what it was before `wrap`. Idempotent; works in the middle of a call."""
        self._engine.installed.close()
        self._engine.states.forget()

    def __enter__(self) -> ClockworkWrapper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied or pickled, it is the UNet, as a copy of the UNet is: not wrapped."""
        return _same, (self.unet,)

    def __repr__(self) -> str:
        return f"ClockworkWrapper({type(self.unet).__name__}, {self.schedule}, {type(self.adaptor).__name__})"

    def _give_up(self, error: BaseException) -> None:
        """After an error of our own: off, so that the UNet works; an interrupt, or no memory, may pass."""
        if isinstance(error, Exception) and not isinstance(error, (MemoryError, torch.OutOfMemoryError, Warning)):
            self.remove()
            if sys.version_info >= (3, 11):
                error.add_note("Clockwork was removed from this UNet: wrap it again when the cause is fixed")


def _same(unet: nn.Module) -> nn.Module:
    return unet


class _Step:
    """What `cw.step()` returns: a context for those who like to see where a step ends; an error there ends the run."""

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._reset()


def _region_line(region: Region) -> str:
    return f"{region.line} (not skipped: {region.not_skipped})" if region.not_skipped else region.line
