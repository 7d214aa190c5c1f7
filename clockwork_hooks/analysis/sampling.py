"""Runs of a user's sampler: its first call's arguments, the step of every call, and one noise with other passes.

What is compared are `candidates`: regions, each with something that stands in for it. `follow` watches them along plain
runs: what their exits and entries do, and what an adaptor would be off by. All are followed in the same runs. Of each,
what the last few steps would have left in its cache is held; what is compared is reduced to sums as it passes: memory
does not grow with the trajectory.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from clockwork_hooks._generate import Generate
from clockwork_hooks._tree import map_leaves
from clockwork_hooks.adaptors import Adaptor, stand_in
from clockwork_hooks.adaptors.stand_in import AdaptorLike, is_identity, needs_of, resolve_adaptor
from clockwork_hooks.analysis.timing import now
from clockwork_hooks.clock.timeline import Position, Trail
from clockwork_hooks.clock.times import Told
from clockwork_hooks.engine.attach import wrap
from clockwork_hooks.engine.engine import Observer, UNetCall
from clockwork_hooks.engine.hooks import Installed
from clockwork_hooks.engine.passes import Active, Outcome, Pass
from clockwork_hooks.engine.wrapper import ClockworkWrapper, check_unet
from clockwork_hooks.errors import AdaptorError, ArgumentError, Enough, is_several, is_whole
from clockwork_hooks.graph.tracing import Trace, modules_of, record
from clockwork_hooks.metrics import relative_l2
from clockwork_hooks.regions.find import Search, choose, match, regions_of
from clockwork_hooks.regions.region import Region
from clockwork_hooks.schedule import Schedule

Adaptors = AdaptorLike | list[AdaptorLike] | tuple[AdaptorLike, ...]
_NEVER = Schedule.where(lambda step: False)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A region with its adaptor.

    Attributes:
        name: level, edge and share of the MACs; and the adaptor, unless it is the identity.
        region: the region, of a trace of the UNet.
        adaptor: stands in for it.
        argument: the adaptor as the caller named it; None for the identity.
    """

    name: str
    region: Region
    adaptor: Adaptor
    argument: AdaptorLike

    @property
    def adaptor_name(self) -> str:
        """The adaptor's class, or "identity"."""
        return "identity" if self.argument is None else type(self.adaptor).__name__


def region_name(region: Region) -> str:
    """How the analyses call a region: level, edge, share of the MACs."""
    cut = "" if region.cut == "outer" else f" {region.cut}"
    return f"level {region.level}{cut}, {region.macs_share:.1%} of MACs"


def candidates(
    trace: Trace, unet: nn.Module, regions: Iterable[Region] | None, adaptor: Adaptors
) -> tuple[Candidate, ...]:
    """Every adaptor with every region that it can stand in for.

    Args:
        trace: of the UNet, as it is sampled with.
        unet: the UNet.
        regions: those to look at. None: for the identity all nested ones, for an adaptor the one that it was made for.
        adaptor: one, or a list of several; as `wrap` takes them.

    Raises:
        ArgumentError: what is given is no region of this UNet, or there is no adaptor.
        AdaptorError: what is given is no adaptor, or an adaptor fits none of the regions.
        RegionNotFoundError: the UNet has none.
    """
    several = list(adaptor) if isinstance(adaptor, (list, tuple)) else [adaptor]
    if not several:
        raise ArgumentError("each region needs an adaptor", seen={"adaptor": adaptor}, do="pass adaptor=None")
    matches = None if regions is None else _matches(trace, unet, check_regions(regions))
    by_name: dict[str, Candidate] = {}
    for one in several:
        argument, used = None if is_identity(one) else one, resolve_adaptor(one)
        for region in _regions(trace, unet, matches, used, identity=argument is None):
            name = region_name(region) + ("" if argument is None else f", {type(used).__name__}")
            again = sum(key == name or key.startswith(f"{name} #") for key in by_name)
            name = f"{name} #{again + 1}" if again else name
            by_name[name] = Candidate(name, region, used, argument)
    return tuple(by_name.values())


def check_regions(regions: Iterable[Region]) -> tuple[Region, ...]:
    """The regions of an argument; raises `ArgumentError` where there are none, or it holds something else."""
    chosen: tuple[Any, ...] = tuple(regions) if is_several(regions) else (regions,)
    if not chosen or not all(isinstance(region, Region) for region in chosen):
        raise ArgumentError(
            "candidates are regions of the UNet, in a list",
            seen={"regions": [type(region).__name__ for region in chosen] or "none"},
            do="pass some of ch.find_regions(unet, *args)",
        )
    return chosen


def _matches(trace: Trace, unet: nn.Module, chosen: tuple[Region, ...]) -> tuple[Region, ...]:
    search = Search(trace, unet)
    matches = [match(search, region) for region in chosen]
    if None in matches:
        raise ArgumentError(
            "candidates are regions of this UNet, as generate calls it",
            seen={"not found": [r.line for r, f in zip(chosen, matches, strict=True) if f is None]},
            do="pass some of ch.find_regions(unet, *args), found for this UNet",
        )
    return tuple(region for region in matches if region is not None)


def _regions(
    trace: Trace, unet: nn.Module, matches: tuple[Region, ...] | None, adaptor: Adaptor, *, identity: bool
) -> tuple[Region, ...]:
    if identity:
        return matches or regions_of(trace, unet)
    if matches is None:
        region = choose(trace, unet, **stand_in.region_options(adaptor))
        stand_in.check_region(adaptor, region)
        return (region,)
    fitting, refused = [], None
    for region in matches:
        try:
            stand_in.check_region(adaptor, region)
            fitting.append(region)
        except AdaptorError as error:
            refused = error
    if refused is not None and not fitting:
        raise refused
    return tuple(fitting)


def check_runs(generate: Generate, conditions: Iterable[Any], seeds: Sequence[int]) -> list[Any]:
    """The batches of conditions, as a list.

    Raises:
        ArgumentError: there are none, or no seeds, or one that is no int or there twice; or `generate` is no function.
    """
    if not callable(generate) or not is_several(conditions):  # of a batch alone, letters or keys are no batches
        raise ArgumentError(
            "generate(batch, seed) is a function, and conditions a list of batches for it",
            seen={"generate": type(generate).__name__, "conditions": repr(conditions)[:80]},
            do="pass your sampler, and a list: (unet, generate, [batch])",
        )
    batches = list(conditions)
    if not isinstance(seeds, Sequence) or not is_several(seeds) or not all(map(is_whole, seeds)):
        raise ArgumentError("seeds are a sequence of ints", seen={"seeds": repr(seeds)[:80]}, do="pass seeds=(0, 1)")
    if not batches or not seeds:
        raise ArgumentError(
            "a measurement needs conditions and seeds",
            seen={"batches": len(batches), "seeds": len(seeds)},
            do="pass at least one of each",
        )
    if len(set(seeds)) < len(seeds):
        raise ArgumentError(
            "seeds must differ: the same seed gives the same run",
            seen={"seeds": list(seeds)},
            do="pass each seed once",
        )
    return batches


def check_clocks(clocks: Sequence[int]) -> None:
    """Clocks to compare with are ints of at least 2.

    Raises:
        ArgumentError: one is not, or there is none.
    """
    values = clocks if isinstance(clocks, Sequence) and is_several(clocks) else ()
    if not values or not all(is_whole(clock, 2) for clock in values):
        raise ArgumentError("clocks that skip are ints of at least 2", seen={"clocks": clocks}, do="pass clocks=(2,)")


def first_call(unet: nn.Module, generate: Generate, batch: Any, seed: int, *, time: str | None = None) -> Trace:
    """Trace the first call that `generate(batch, seed)` makes; the loop goes no further. `time` names its time input.

    Raises:
        ArgumentError: it makes none, or `unet` is no module.
        WrapError: the UNet is wrapped, or compiled.
        TraceError: the call could not be recorded.
    """
    if not isinstance(unet, nn.Module):
        raise ArgumentError(
            "what is measured is a UNet, and generate(batch, seed) the sampler that calls it",
            seen={"unet": type(unet).__name__, "generate": type(generate).__name__},
            do="pass (unet, generate, [batch]), in this order; for a pipeline pipe.unet",
        )
    check_unet(unet)
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs)))
        raise Enough

    handle = unet.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        with torch.no_grad():
            generate(batch, seed)
    except Enough:
        pass
    except Exception:  # a sampler that calls the UNet in a thread misses that thread's result
        if not seen:
            raise
    finally:
        handle.remove()
    if not seen:
        raise never_called(unet)
    return record(unet, *seen[0], time=time)


def final(generate: Generate, batch: Any, seed: int) -> Tensor:
    """What `generate(batch, seed)` returns: one tensor, samples first.

    Raises:
        ArgumentError: it returns something else.
    """
    with torch.no_grad():
        result = generate(batch, seed)
    if not isinstance(result, Tensor) or result.ndim < 2 or not result.is_floating_point():
        seen = f"{tuple(result.shape)} {result.dtype}" if isinstance(result, Tensor) else type(result).__name__
        raise ArgumentError(
            "generate(batch, seed) must return one tensor of floats, samples first",
            seen={"returned": seen},
            do="return the pictures, or the last latents",
        )
    return result.detach()


def reference(generate: Generate, batch: Any, seed: int) -> Tensor:
    """What `generate(batch, seed)` returns of the UNet as it is, to compare with.

    Raises:
        ArgumentError: it is not finite: errors could not be told.
    """
    result = final(generate, batch, seed)
    if not bool(result.isfinite().all()):
        raise ArgumentError(
            "the results of plain sampling must be finite",
            seen={"seed": seed, "not finite": f"{int((~result.isfinite()).sum())} of {result.numel()} values"},
            do="correct the sampler or its dtype first",
        )
    return result


class Watch:
    """Tells the step of the call that is under way; a context manager around any number of trajectories.

    The UNet is wrapped with a schedule of full passes alone: nothing changes, and steps are placed as in use.

    Attributes:
        step: denoising step of the call under way, or of the last one; from 1.
        steps: of this run; where it is several trajectories, as one at half the size before another, of the longest.
        calls: how many there were in this run.
        branch: (guidance branch, which of its calls in the step) of the call under way, or of the last one.
        usable: may the call under way use the adaptor, if the schedule says so? Some are in doubt whatever it says.
    """

    def __init__(self, unet: nn.Module, region: Region) -> None:
        self.unet, self.step, self.steps, self.calls = unet, 0, 0, 0
        self.branch, self.usable = (1, 0), False
        self._inside = contextlib.ExitStack()
        self._wrapper = self._inside.enter_context(wrap(unet, schedule=_NEVER, region=region))
        self._inside.enter_context(self.observed(self))

    def observed(self, observer: Observer) -> contextlib.AbstractContextManager[None]:
        """Within it, the observer sees every call too."""
        return self._wrapper.observed(observer)

    def before(self, call: UNetCall) -> None:
        """A call is about to run; of one that is recorded, the place will be known when it is over."""
        self.calls += 1
        if call.place is None:
            self.step, self.branch, self.usable = max(self.step, 1), (0, self.calls), False
            self.steps = max(self.steps, self.step)
        else:
            self._at(call.place)
            self.usable = call.place.doubt is None and call.place.before is not None

    def after(self, call: UNetCall, outcome: object) -> None:
        """It is over."""
        if call.place is not None:
            self._at(call.place)

    def _at(self, place: Position) -> None:
        self.step, self.branch = place.step, (place.branch.number, place.ordinal)
        self.steps = max(self.steps, self.step)

    @contextlib.contextmanager
    def trajectory(self) -> Iterator[Watch]:
        """Watch one run of the sampler.

        Raises:
            ArgumentError: it never called the UNet.
        """
        self.step = self.steps = self.calls = 0
        with self._wrapper.trajectory():
            yield self
        if not self.calls:
            raise never_called(self.unet)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._inside.close()


@torch.no_grad()
def count_steps(unet: nn.Module, sample: Callable[[], object], **options: Any) -> int:
    """How many steps a run of the sampler takes; where it is several trajectories, the longest.

    Args:
        unet: what `sample` calls.
        sample: one run.
        options: of `wrap`; adaptor and schedule do not count.

    Raises:
        ArgumentError: it never called the UNet.
    """
    with wrap(unet, **{**options, "adaptor": None, "schedule": _NEVER}) as cw, cw.trajectory():
        sample()
        if not cw.stats.full_passes:
            raise never_called(unet)
        return max((run.steps for run in cw.stats.trajectories), default=1)  # without a time there are none


def not_finite(seen: Mapping[str, object], *, do: str) -> ArgumentError:
    """The error where no schedule that was tried has results that are numbers: the least bad one is no choice."""
    return ArgumentError(
        "a schedule is chosen by the error of its results, which must be finite",
        seen={**seen, "not finite": "the results of all of them"},
        do=f"{do}; or sample in a dtype that holds larger numbers, as bfloat16 does",
    )


def never_called(unet: nn.Module) -> ArgumentError:
    """The error where a sampler has not called the UNet that it is passed with."""
    return ArgumentError(
        "generate(batch, seed) must call the UNet that was passed",
        seen={"calls of the UNet": 0, "unet": type(unet).__name__},
        do="let it call this very UNet object, not a copy or a compiled one",
    )


@dataclass(frozen=True, slots=True)
class Measured:
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

    def outcome(self, candidate: Candidate, schedule: Schedule) -> Measured:
        """Run all trajectories with this adaptor on this schedule."""
        if not self.plain:
            self.plain = [reference(self.generate, *run) for run in self.runs]
        adaptor = candidate.argument if isinstance(candidate.argument, (str, os.PathLike)) else candidate.adaptor
        errors = []
        with wrap(self.unet, adaptor, region=candidate.region, schedule=schedule) as cw:
            with self._times(cw) as times:
                for run, plain in zip(self.runs, self.plain, strict=True):
                    with cw.trajectory():
                        errors.append(relative_error(final(self.generate, *run), plain))
            stats = cw.stats
        calls = stats.full_passes + stats.adaptor_passes
        ms = (_typical(times[False]), _typical(times[True])) if times[False] and times[True] else None
        return Measured(float(torch.cat(errors).mean()), stats.saving, stats.adaptor_passes, calls, ms)

    @contextlib.contextmanager
    def _times(self, cw: ClockworkWrapper) -> Iterator[dict[bool, list[float]]]:
        """Milliseconds of every call, by whether it used the adaptor; the wrapper's own work is part of them."""
        times: dict[bool, list[float]] = {False: [], True: []}
        begun = (0.0, 0)
        device = next((tensor.device for tensor in self.unet.parameters()), torch.device("cpu"))

        def before(module: nn.Module, args: Any) -> None:
            nonlocal begun
            begun = (now(device), cw.stats.adaptor_passes)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            times[cw.stats.adaptor_passes > begun[1]].append(1000 * (now(device) - begun[0]))

        if not self.timed:
            yield times
            return
        handles = [self.unet.register_forward_pre_hook(before, prepend=True), self.unet.register_forward_hook(after)]
        try:
            yield times
        finally:
            for handle in handles:
                handle.remove()


def relative_error(result: Tensor, reference: Tensor) -> Tensor:
    """‖made - reference‖ / ‖reference‖ of each sample, (B,), on the CPU; infinite where it is no number."""
    return relative_l2(result.float(), reference.float()).nan_to_num(nan=torch.inf, posinf=torch.inf).cpu()


def _typical(times: Sequence[float]) -> float:
    """The median; the first pass of a kind makes plans and workspaces, and does not count."""
    return median(times[1:] or times)


Ages = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, slots=True)
class Series:
    """One candidate along the trajectories; each value is over all samples, None where there is nothing to compare.

    Attributes:
        changes: ‖r(s) - r(s-1)‖ / ‖r(s)‖ of the exit r, for each step s from 1.
        cosines: of r(s) and r(s-1).
        errors: for each age from 1: ‖r̂(s) - r(s)‖ / ‖r(s)‖, where r̂(s) is what the adaptor makes if the last full step
            was s - age. For the identity r̂(s) = r(s - age). None too where a call is full whatever the schedule says.
        entries: for each age from 1: ‖e(s) - e(s-age)‖ / ‖e(s-age)‖ of the entry e.
    """

    changes: tuple[float | None, ...]
    cosines: tuple[float | None, ...]
    errors: Ages
    entries: Ages


def follow(
    runs: Runs, pairs: Sequence[Candidate], longest: int, tell: Callable[[], object]
) -> tuple[int, dict[str, Series]]:
    """Run all trajectories once with full passes; the results stay in `runs.plain`.

    Args:
        runs: the trajectories.
        pairs: the candidates.
        longest: largest age.
        tell: called after each trajectory.

    Returns:
        Number of steps, and name → series.
    """
    followers = [_Follower(runs.unet, one, longest) for one in pairs]
    steps, runs.plain = 0, []
    with Watch(runs.unet, pairs[0].region) as watch, contextlib.ExitStack() as stack:
        for follower in followers:
            stack.enter_context(follower.at(watch))
        for run in runs.runs:
            with watch.trajectory():
                runs.plain.append(reference(runs.generate, *run))
            for follower in followers:
                follower.last.clear()
            steps = max(steps, watch.steps)
            tell()
    return steps, {one.name: follower.series(steps) for one, follower in zip(pairs, followers, strict=True)}


@dataclass(slots=True)
class _Before:
    """What a call leaves behind for the same call of the next steps."""

    step: int
    exit: Tensor
    adapted: list[Tensor]  # after no adaptor step, after one, two, ...
    entries: list[Tensor]  # of this step, of the one before, ...
    told: Told | None  # its time
    trails: list[Trail | None]  # of the full passes that each of `adapted` comes from, where the adaptor looks at them


class _Follower:
    """Picks up one candidate's boundary in every call, and sums up what it finds."""

    def __init__(self, unet: nn.Module, candidate: Candidate, longest: int) -> None:
        self.unet, self.candidate, self.longest = unet, candidate, longest
        self.active = Active()
        self.tracing: Pass | None = None
        self.last: dict[tuple[int, int], _Before] = {}
        self.sums: dict[tuple[str, int, int], list[Tensor]] = {}  # (what, step, age) → two sums, on the device
        self._movable = candidate.adaptor is not candidate.argument  # it was loaded here, on the CPU

    @contextlib.contextmanager
    def at(self, watch: Watch) -> Iterator[None]:
        """Follow the calls of trajectories that are watched."""
        installed, self._watch = Installed(self), watch
        try:
            installed.add(self.candidate.region.cut_plan, modules_of(self.unet))
            with watch.observed(self):
                yield
        finally:
            self.active.pass_ = None
            installed.remove()

    def before(self, call: UNetCall) -> None:
        """Look at the boundary in the call that is about to run."""
        self.active.pass_ = pass_ = Pass(self.candidate.region.cut_plan, "full", copies=(0,), keeps_entry=True)
        pass_.enter(call.args, call.kwargs)

    def after(self, call: UNetCall, outcome: Outcome) -> None:
        """Sum up what was seen."""
        pass_, self.active.pass_ = self.active.pass_, None
        if pass_ is not None and pass_.complete():
            self._add(pass_, None if call.time is None else Told(call.time))

    @torch.no_grad()  # some samplers switch gradients on: each sum would hold the graph of all that it adds up
    def _add(self, pass_: Pass, told: Told | None) -> None:
        """One call, of which the pass has seen the boundary, at this time."""
        assert pass_.exit is not None  # the pass is complete
        exit, entry, step = pass_.exit.detach(), pass_.entry, self._watch.step
        entry = None if entry is None else entry.detach()
        before = self.last.get(self._watch.branch)
        if before is not None and (before.step != step - 1 or before.exit.shape != exit.shape):
            before = None
        adapted, entries = [exit], [] if entry is None else [entry]
        trails: list[Trail | None] = [None]
        if "trend" in needs_of(self.candidate.adaptor):
            trails = [Trail.after(None if before is None else before.trails[0], exit, told)]
        if before is not None:
            self._compare(step, exit, before)
        if before is not None and self._watch.usable:
            captured = pass_.captured if entry is None else {**pass_.captured, "entry": entry}
            for age, (cached, trail) in enumerate(zip(before.adapted, before.trails, strict=False), 1):
                adapted.append(self._adapt(captured, cached, before, trail, told))
                trails.append(trail)
                self._sum("error", step, age, (adapted[-1].float() - exit.float()).square(), exit.float().square())
            for age, past in enumerate(before.entries[: self.longest], 1):
                self._sum("entry", step, age, (entries[0] - past).float().square(), past.float().square())
            entries += before.entries
        last = adapted[: self.longest], entries[: self.longest], told, trails[: self.longest]
        self.last[self._watch.branch] = _Before(step, exit, *last)

    def _adapt(
        self, captured: dict[str, Tensor], cached: Tensor, before: _Before, trail: Trail | None, told: Told | None
    ) -> Tensor:
        """What the adaptor makes of a cached exit; `before` is the step that it comes from, or was adapted in."""
        adaptor = self.candidate.adaptor
        if self._movable:
            stand_in.place(adaptor, cached)
            self._movable = False
        where = {"region": self.candidate.region, "adaptor": adaptor}
        now, then = (None if one is None else one.tensor(cached.device) for one in (told, before.told))
        past = stand_in.Past(next(iter(before.entries), None), then)
        if trail is not None:
            past = past._replace(trend=trail.trend, trend_positions=trail.positions)
        inputs = stand_in.inputs(captured, cached, past, now)
        return stand_in.check(stand_in.call(adaptor, inputs), cached, finite=False, where=where)

    def _compare(self, step: int, exit: Tensor, before: _Before) -> None:
        now, then = exit.float(), before.exit.float()
        self._sum("change", step, 1, (now - then).square(), now.square())
        self._sum("cosine", step, 1, now * then, now.norm() * then.norm())

    def _sum(self, what: str, step: int, age: int, above: Tensor, below: Tensor) -> None:
        sums = self.sums.setdefault((what, step, age), [above.new_zeros(()), above.new_zeros(())])
        sums[0] += above.sum()
        sums[1] += below.sum()

    def series(self, steps: int) -> Series:
        """What the sums say."""

        def value(what: str, step: int, age: int = 1) -> float | None:
            if (what, step, age) not in self.sums:
                return None
            above, below = map(float, self.sums[what, step, age])
            share = above / max(below, 1e-24)
            return share if what == "cosine" else math.sqrt(share)

        def ages(what: str) -> Ages:
            return tuple(tuple(value(what, s, a) for s in range(1, steps + 1)) for a in range(1, self.longest + 1))

        changes = tuple(value("change", s) for s in range(1, steps + 1))
        cosines = tuple(value("cosine", s) for s in range(1, steps + 1))
        return Series(changes, cosines, ages("error"), ages("entry"))
