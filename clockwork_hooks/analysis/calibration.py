"""`calibrate`: solve for a linear adaptor from one run of the sampler, without any training.

What the region emits at a step is close to a linear function of what it emitted one step before, and of what flowed in
then and now. The function's weights are a least-squares problem for each step: its sums are collected while the
sampler runs with full passes alone, and no feature is kept longer than to the step after its own. Classifier-free
guidance is a linear combination of two branches, so their guided combination is fitted too: its error is what the
sampler sees.
"""

from __future__ import annotations

import bisect
import itertools
import math
import time as clocks
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from clockwork_hooks._generate import Generate, with_seed
from clockwork_hooks._numbers import count, duration, percent
from clockwork_hooks._tree import version
from clockwork_hooks.adaptors.calibrated import (
    LONGEST,
    CalibratedAdaptor,
    Knot,
    Positions,
    around_of,
    carried,
    like_exit,
    single,
)
from clockwork_hooks.analysis.normal_equations import KINDS, RIDGES, AdaptorKind, NormalEquations, Shape, shared_basis
from clockwork_hooks.analysis.sampling import check_runs, count_steps, first_call
from clockwork_hooks.clock import reasons
from clockwork_hooks.clock.loops import TrajectoryBlock
from clockwork_hooks.clock.timeline import Feature, Position
from clockwork_hooks.clock.times import TimeReader
from clockwork_hooks.engine.chain import ClockedRegion
from clockwork_hooks.engine.engine import Engine, UNetCall
from clockwork_hooks.engine.passes import Outcome
from clockwork_hooks.engine.wrapper import check_unet
from clockwork_hooks.errors import (
    ArgumentError,
    NoEffectWarning,
    OtherStepsWarning,
    first_line,
    is_number,
    named_options,
    warn,
    whole,
)
from clockwork_hooks.regions.find import Choice, Search, match, region_or_choice
from clockwork_hooks.regions.region import Layout, Region
from clockwork_hooks.regions.saved import saved_choice
from clockwork_hooks.reports.progress import ProgressBar
from clockwork_hooks.reports.report import FieldReport
from clockwork_hooks.reports.tables import Table, table
from clockwork_hooks.schedule import Schedule, check_clock

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Calibration", "KindResult", "StepResult", "calibrate", "log_snr_of"]

_MANY = 640  # channels from which on a low rank is tried
_RANK = 8  # its rank: channels of the exit by this
_EXACT = 1e-3  # of the identity's error: no kind need leave less
_HELD_OUT = 4  # one row in so many
_AT_ONCE = 1 << 13  # positions that are float32 at once
_FIRST_SEED = 2_000_003  # so that what is compared later, from seed 0 say, has other noise
_ALL = Schedule.where(lambda step: True)


@dataclass(frozen=True, slots=True)
class KindResult:
    """How well a kind of map does on held-out rows.

    Attributes:
        left: what it leaves of the identity's error ‖r(s-1) - r(s)‖, root of the mean square over the steps.
        macs: its multiply-accumulates at the traced batch.
    """

    left: float
    macs: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """One calibrated position.

    Attributes:
        step: of the sampler, from 1.
        position: the UNet's raw time.
        log_snr: there; None where it was not told.
        identity: ‖r(s-1) - r(s)‖ / ‖r(s)‖ of the exit r.
        error: the same of the adaptor that was chosen, held out.
        ridge: chosen on the held-out rows, relative to the diagonal; None where no weights do better there than the
            identity, which the step then has.
        on_policy: was it fitted again on what the student reaches?
    """

    step: int
    position: float | None
    log_snr: float | None
    identity: float
    error: float
    ridge: float | None
    on_policy: bool = False

    @property
    def how(self) -> str:
        """How it was fitted, where that is not the usual way."""
        where = "on what the student reaches" if self.on_policy else ""
        return where if self.ridge is not None else f"{where}, the identity is best".removeprefix(", ")


@dataclass(frozen=True, slots=True)
class Calibration(FieldReport):
    """What `calibrate` measured, and why it chose what it chose.

    Attributes:
        region: one line about it.
        share: of a full pass's MACs that it holds.
        region_macs: its MACs at the traced batch.
        kind: chosen.
        why: in a sentence.
        kinds: name → how well it does on held-out rows; "identity" among them.
        steps: the calibrated positions, in the order of the sampler.
        schedule: which steps; None for all of them.
        guidance: scale of the guided combination that was fitted too; None where none was.
        samples: rows of the exits that were seen in a step.
        held_out: how they were split: "rows", or "positions" where there were too few rows.
        seconds: what it took.
    """

    SCHEMA = "calibration/1"

    region: str
    share: float
    region_macs: int
    kind: str
    why: str
    kinds: Mapping[str, KindResult]
    steps: tuple[StepResult, ...]
    schedule: str | None
    guidance: float | None
    samples: int
    held_out: str
    seconds: float

    def table(self) -> Table:
        """A row a kind of map."""
        rows = [
            (
                f"{name} (chosen)" if name == self.kind else name,
                percent(one.left),
                percent(one.macs / max(self.region_macs, 1)),
            )
            for name, one in self.kinds.items()
        ]
        guided = "" if self.guidance is None else f", and their combination at guidance {self.guidance:g}"
        notes = (
            "Error left: ‖r̂ - r‖ at the exit r, of the identity's; root mean square over "
            f"{count(len(self.steps), 'step')}, on held-out {self.held_out}, all branches{guided}. "
            f"{count(self.samples, 'row')} a step, {duration(self.seconds)}. MACs: of the region's.",
            f"{self.why} Region: {self.region}.",
        )
        return table("Calibration", ("kind", ">error left", ">MACs"), rows, notes=notes)

    def tables(self) -> tuple[Table, ...]:
        """The kinds, and the steps."""
        levels = [">log-SNR"] if any(one.log_snr is not None for one in self.steps) else []
        rows = [
            (
                str(one.step),
                "" if one.position is None else f"{one.position:g}",
                *("" if one.log_snr is None else f"{one.log_snr:.2f}" for _ in levels),
                percent(one.identity),
                percent(one.error),
                "" if one.ridge is None else f"{one.ridge:g}",
                one.how,
            )
            for one in self.steps
        ]
        heads = (">step", ">time", *levels, ">identity", ">error", ">ridge", "fitted")
        return self.table(), table("Steps", heads, rows)


@named_options
def calibrate(
    unet: nn.Module,
    generate: Generate,
    conditions: Iterable[Any],
    *,
    guidance: float | None = None,
    unconditional: Literal["first", "second"] = "first",
    schedule: Schedule | Iterable[int] | Callable[[int], bool] | None = None,
    clock: int | None = None,
    region: Region | Choice | str | Path | None = None,
    kind: str = "auto",
    ridge: float | None = None,
    log_snr: Any = None,
    refit: bool = True,
    steps: int | None = None,
    time: str | None = None,
    console: Console | None = None,
) -> CalibratedAdaptor:
    """Compute a linear adaptor from one run of your own sampler, without gradients, in seconds on a GPU.

    The sampler runs with full passes. For each adaptor step the exit is predicted from the cached one by least
    squares, over all positions of all samples. A part of the samples is held out, and decides on the ridge and, if
    `kind` is "auto", on the kind of map: the best value for its MACs. If adaptor steps follow each other, a second run
    with the adaptor in place fits the later ones again.

    Args:
        unet: what `generate` calls; not wrapped.
        generate: your own sampling code: `generate(batch, seed)`, with a new seed for each batch; or `generate(batch)`,
            a pipeline for example, which draws its own noise.
        conditions: batches of whatever `generate` takes. A few dozen samples in all are enough.
        guidance: scale of classifier-free guidance, if there is any: u + guidance·(c - u). Both branches may come
            in one call, as halves of the batch with the same latents, or in two calls.
        unconditional: which half, or which of the two calls in a step, is the unconditional one.
        schedule, clock: which steps the adaptor is for, as `wrap` takes them. Neither: all from step 2, which serves
            any schedule.
        region: as `wrap` takes it: from `find_region`, a `Choice`, or the file of an earlier run; None for the one
            below the highest level.
        kind: "auto" tries all of these but "kernel": "gain", "affine" (a gain and a bias for each channel, which cost
            nothing), "exit", "exit+entry", "exit+entry+before" (a matrix; "before": the entry that came with the
            cached exit), "low rank", and "kernel" (also a 3×3 convolution of the cached exit; slow to solve with many
            channels). Each but "gain" and "kernel" also with "+trend": how the exit moved between the last two full
            passes, which costs nothing and helps most with many steps.
        ridge: relative to the diagonal; None chooses it.
        log_snr: raw time → log-SNR, a finite number that rises or falls with the time; or a diffusers scheduler. None
            takes it from `generate.scheduler`, else uses the time itself. Weights between two calibrated positions are
            interpolated in it.
        refit: fit again with the adaptor in place, if adaptor steps follow each other.
        steps: how many the sampler takes. Only schedules that count from the end, as `Schedule.spread`, need it; None:
            the first batch is sampled once more, to count.
        time: name of the argument that holds the time, if several may; pass it to `wrap` too.
        console: where the progress bar goes; None for standard error.

    Returns:
        The adaptor, for `wrap(unet, adaptor, ...)`; its `report` says what was measured, `save_pretrained` saves it.

    Raises:
        ArgumentError: an option is outside its rule, or `generate` never calls the UNet, or no step is calibrated.
        RegionNotFoundError: the UNet has no region.

    Warns:
        NoEffectWarning: at no step do any weights do better than the identity, on what is held out.
        OtherStepsWarning: steps cannot be calibrated, or come in several directions or numbers.

    Example:
        >>> import torch
        >>> from diffusers import UNet2DModel
        >>> from clockwork_hooks import calibrate, wrap
        >>> blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        >>> unet = UNet2DModel(16, block_out_channels=(8, 32), norm_num_groups=8, **blocks).eval()
        >>> def generate(count):
        ...     x = torch.randn(count, 3, 16, 16)
        ...     for t in (900, 600, 300, 0):
        ...         x = x - 0.1 * unet(x, t).sample
        ...     return x
        >>> adaptor = calibrate(unet, generate, [4], clock=2)
        >>> [step.step for step in adaptor.report.steps]
        [2, 4]
        >>> with wrap(unet, adaptor, clock=2) as cw, cw.trajectory():
        ...     images = generate(4)
        >>> cw.stats.adaptor_passes
        2

    Source: arXiv 2312.08128, Sec. 4.2, for what an adaptor predicts; the rest is ordinary least squares.
    """
    begun = clocks.perf_counter()
    batches = check_runs(generate, conditions, (0,))
    sample = with_seed(generate, seeding=False)
    which = _schedule(schedule, clock)
    _check(guidance, unconditional, kind, ridge, steps)
    trace = first_call(unet, sample, batches[0], 0, time=time)
    wanted = region_or_choice(saved_choice(region) if isinstance(region, (str, Path)) else region, {})
    chosen = wanted.find(trace, unet) if isinstance(wanted, Choice) else match(Search(trace, unet), wanted)
    if chosen is None:
        raise ArgumentError(
            "the region must belong to the UNet that generate(batch, seed) calls",
            seen={"region": wanted.line if isinstance(wanted, Region) else wanted, "unet": type(unet).__name__},
            do="pass region=ch.find_region(unet, *args), found for this UNet, or leave it out",
        )
    levels = _log_snr(log_snr, generate)
    seeds = itertools.count(_FIRST_SEED)

    def fresh(batch: Any) -> Any:
        return sample(batch, next(seeds))

    with ProgressBar(console) as bar:
        task = bar.add_task("calibrate", total=len(batches))
        counted = steps
        if which is not None and which.counts_from_end:
            if counted is None:
                bar.update(task, total=1 + len(batches))
                counted = count_steps(unet, lambda: sample(batches[0], 0), region=chosen)
                bar.advance(task)
            which = Schedule.at(which.adaptor_steps(counted))
        options: dict[str, Any] = {"guidance": guidance, "unconditional": unconditional, "kernel": kind == "kernel"}
        collect = partial(Sums, chosen, which or _ALL, several=len(batches) > 1, log_snr=levels, **options)

        def watch(seen: Sums | Refit, adaptor: Any, *, teaches: bool) -> None:
            run_all(unet, fresh, batches, seen, adaptor, lambda: bar.advance(task), teaches=teaches)

        watch(sums := collect(), _Inputs(chosen), teaches=True)
        _check_seen(sums, which, steps)
        if counted is not None and counted != sums.last_step:
            _warn_of_lengths(counted, sums.last_step)
        solver = Solver(chosen, sums, kind, ridge, levels, trends=which is not None)
        if refit and which is not None and any(_chained(which, step) for step in sums.steps):
            bar.update(task, total=(bar.tasks[0].total or 0) + len(batches))
            student = Refit(solver, collect())
            watch(student, student, teaches=False)
    if all(ridge == math.inf for _, (ridge, _) in solver.chosen):
        _warn_of_identity(solver)
    adaptor = solver.adaptor()
    adaptor.report = solver.report(which, clocks.perf_counter() - begun)
    adaptor.facts = {
        "schedule": None if which is None else which.written(sums.last_step),
        "kind": solver.name,
        "steps": sums.last_step,
        "guidance": guidance,
        "rows a step": sums.samples,
    }
    return adaptor


# -- what is asked for ----------------------------------------------------------------------------------------------


def _schedule(schedule: Any, clock: int | None) -> Schedule | None:
    if schedule is not None and clock is not None:
        raise ArgumentError(
            "a schedule and a clock cannot both be given",
            seen={"schedule": schedule, "clock": clock},
            do="pass one of them",
        )
    if clock is not None:
        check_clock(clock)
        return Schedule.every(clock)
    which = None if schedule is None else Schedule.of(schedule)
    if which is not None:
        which.known_beforehand("which steps are calibrated")
    return which


def _check(guidance: float | None, unconditional: str, kind: str, ridge: float | None, steps: int | None) -> None:
    if guidance is not None and not is_number(guidance):
        raise ArgumentError("guidance is a number", seen={"guidance": repr(guidance)}, do="pass guidance=7.5, or None")
    if unconditional not in ("first", "second"):
        raise ArgumentError(
            "the unconditional branch is the first or the second",
            seen={"unconditional": repr(unconditional)},
            do='pass unconditional="first"',
        )
    if not isinstance(kind, str) or (kind != "auto" and kind not in KINDS):
        raise ArgumentError("a kind is auto, " + ", ".join(KINDS), seen={"kind": repr(kind)}, do='pass kind="auto"')
    if ridge is not None and not (is_number(ridge) and ridge >= 0):
        raise ArgumentError(
            "a ridge is a number of at least 0", seen={"ridge": repr(ridge)}, do="pass ridge=1e-4, or None"
        )
    if steps is not None:
        whole("steps", steps, least=1)


def log_snr_of(scheduler: Any) -> Callable[[float], float] | None:
    """Raw time → log-SNR of a diffusers scheduler; None where it does not say.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> level = log_snr_of(DDIMScheduler())
        >>> level(999.0) < level(500.0) < level(0.0)
        True
    """
    config = getattr(scheduler, "config", None)
    config = config if isinstance(config, Mapping) else {}
    flow = "Flow" in type(scheduler).__name__ or bool(config.get("use_flow_sigmas"))
    counts = not flow and config.get("timestep_type") != "continuous"  # else a time is no place among the alphas
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(alphas, Tensor) and counts:
        alphas = alphas.double().clamp(1e-9, 1 - 1e-9).cpu()
        return _interpolated(range(len(alphas)), (alphas / (1 - alphas)).log().tolist())
    sigmas, times = getattr(scheduler, "sigmas", None), getattr(scheduler, "timesteps", None)
    if isinstance(sigmas, Tensor) and isinstance(times, Tensor) and 1 < len(times) <= len(sigmas) <= len(times) + 1:
        sigmas = sigmas[: len(times)].double().clamp(1e-6, 1 - 1e-6 if flow else None).cpu()
        levels = (2 * ((1 - sigmas) / sigmas).log() if flow else -2 * sigmas.log()).tolist()
        pairs = sorted(dict(zip(times.tolist(), levels, strict=True)).items())
        return _interpolated(*zip(*pairs, strict=True))
    return None


def _interpolated(xs: Sequence[float], ys: Sequence[float]) -> Callable[[float], float]:
    def at(x: float) -> float:
        k = min(max(bisect.bisect_right(xs, x), 1), len(xs) - 1)
        return ys[k - 1] + (ys[k] - ys[k - 1]) * (x - xs[k - 1]) / (xs[k] - xs[k - 1])

    return at


def _log_snr(source: Any, generate: Any) -> Callable[[float], float] | None:
    owner = getattr(generate, "__self__", generate)
    scheduler = getattr(owner, "scheduler", None) if source is None else source
    log_snr = log_snr_of(scheduler)
    tells_nothing = hasattr(source, "set_timesteps")  # a scheduler of diffusers, as IPNDM's: the time itself serves
    if log_snr is None and source is not None and not tells_nothing:
        if not callable(source):
            raise ArgumentError(
                "log_snr is a function of the time, or a diffusers scheduler",
                seen={"log_snr": type(source).__name__},
                do="pass log_snr=lambda sigma: -2 * math.log(sigma)",
            )
        return _checked(source)
    return log_snr


def _checked(log_snr: Callable[[float], float]) -> Callable[[float], float]:
    """The user's own function, with an error where it has no number for a time."""

    def at(time: float) -> float:
        level: Any = None
        try:
            level = log_snr(time)
            if math.isfinite(number := float(level)):
                return number
        except (TypeError, ValueError, ArithmeticError) as error:
            level = f"{type(error).__name__}: {first_line(error)}"
        raise ArgumentError(
            "log_snr gives a finite number for every time that the UNet is called with",
            seen={"time": time, "log_snr": level},
            do="keep its argument away from 0: -2 * math.log(max(sigma, 1e-6))",
        )

    return at


def _check_seen(sums: Sums, which: Schedule | None, steps: int | None) -> None:
    """Raise `ArgumentError` where what was seen does not make an adaptor, or is not what the caller has said."""
    if steps is not None and sums.last_step != steps:
        raise ArgumentError(
            "steps= is the number of steps that the sampler takes",
            seen={"steps": steps, "steps seen": sums.last_step},
            do=f"pass steps={sums.last_step}, or leave it out",
        )
    if not sums.places:
        do = "pass the schedule that the sampler is to be run with"
        if sums.refused:
            do = "let each call be like the same call of the step before: docs/timeline.md says what a reason means"
            if sums.refused[reasons.NO_TIME]:
                do = 'pass the UNet its time as an argument, and name it, time="...": each time has weights of its own'
        elif sums.last_step <= 1:
            do = "sample in more steps: a trajectory's first step is always full"
        raise ArgumentError(
            "a step can be calibrated only if the sampler takes it, from the second step on",
            seen={
                "schedule": which or "all steps from the second on",
                "steps seen": sums.last_step,
                **{f"full, {reason}": count(calls, "call") for reason, calls in sums.refused.most_common(3)},
            },
            do=do,
        )
    if sums.guidance is not None and not sums.guided:
        raise ArgumentError(
            "guidance combines two branches: the halves of a batch, or two calls of a step",
            seen={"guidance": sums.guidance, "rows a call": sums.samples, "calls a step": "one"},
            do="leave guidance= out where the sampler has none; halves are branches where both have the same latents",
        )
    wanted = (which or _ALL).adaptor_steps(sums.last_step)
    missing = sorted(set(wanted) - sums.steps)
    if missing and sums.refused:
        _warn_of_missing(missing, sums.refused)
    if sums.backwards:
        warn(
            "an adaptor serves one direction of time\n"
            f"  calls that run the other way than the first ones did: {sums.backwards}\n"
            "What to do: calibrate an adaptor for each direction, with a generate that goes only that way; this one is "
            "the identity in the other one",
            OtherStepsWarning,
        )
    close = next((place for place in sums.places.values() if None is not place.position == place.before), None)
    if close is not None:
        raise ArgumentError(
            "the times of two steps must differ in float32, the precision in which an adaptor gets them",
            seen={f"time at step {close.step}": close.position, f"time at step {close.step - 1}": close.before},
            do="pass the UNet times that are farther apart: a step's number, or sigma's logarithm",
        )
    if sums.log_snr is not None:
        _check_monotonic(sums.log_snr, sorted(sums.times))


def _warn_of_lengths(counted: int, longest: int) -> None:
    warn(
        "a schedule that counts from the end means other steps in runs of other lengths\n"
        f"  steps of the first batch: {counted}\n"
        f"  of the longest: {longest}\n"
        "What to do: calibrate an adaptor for each number of steps; or leave schedule= out, for one that serves any",
        OtherStepsWarning,
    )


def _warn_of_missing(missing: Sequence[int], refused: Counter[str]) -> None:
    why = "".join(f"\n  full, {reason}: {count(calls, 'call')}" for reason, calls in refused.most_common(3))
    warn(
        "steps that cannot use an adaptor are not calibrated\n"
        f"  steps: {', '.join(map(str, missing))}{why}\n"
        "What to do: nothing where they are full in use too; else let each call be like the same call of the step "
        "before, in the thread that calls generate: docs/timeline.md says what a reason means",
        OtherStepsWarning,
    )


def _warn_of_identity(solver: Solver) -> None:
    warn(
        "a calibrated adaptor has to do better than the identity on what is held out: at no step do any weights\n"
        f"  kind: {solver.name}\n  steps: {count(len(solver.places), 'step')}\n"
        f"  rows a step: {solver.sums.samples}\n"
        "What to do: calibrate with more conditions, or another kind; or wrap without an adaptor, which costs no MACs",
        NoEffectWarning,
    )


def _check_monotonic(log_snr: Callable[[float], float], times: Sequence[float]) -> None:
    levels = torch.tensor([log_snr(time) for time in times])  # float32, as the adaptor's table has them
    ways = levels.diff().sign()
    wrong = (ways != (1 if ways.sum() > 0 else -1)).nonzero().flatten().tolist()
    if wrong:
        raise ArgumentError(
            "log_snr rises with the time, or falls with it, and tells any two times of the sampler apart",
            seen={f"at {times[k]:g}": float(levels[k]) for k in (0, wrong[0], wrong[0] + 1, len(times) - 1)},
            do="pass the log-SNR of the model's own noise schedule, or leave log_snr= out",
        )


# -- what is seen ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Pair:
    """A call and the one that its cached exit comes from; rows of samples, channels last: (B, positions, channels).

    `stretch` is how many times longer its step is than the one that weights are for.
    """

    cached: Tensor
    exit: Tensor
    entry: Tensor | None
    before: Tensor | None
    around: Tensor | None = None
    trend: Tensor | None = None
    stretch: float = field(default=1.0, kw_only=True)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of the fields."""
        return self.cached, self.exit, self.entry, self.before, self.around, self.trend

    def combined(self, other: Pair, scale: float) -> Pair:
        """This branch, and `scale` times the other's difference to it."""
        both = zip(self.tensors, other.tensors, strict=True)
        return self._of(a if a is None or b is None else a + scale * (b - a) for a, b in both)

    def rows(self, part: slice) -> Pair:
        """A part of the samples."""
        return self._of(x if x is None else x[part] for x in self.tensors)

    def positions(self, part: slice) -> Pair:
        """A part of the positions."""
        return self._of(x if x is None else x[:, part] for x in self.tensors)

    def _of(self, tensors: Iterable[Tensor | None]) -> Pair:
        return Pair(*tensors, stretch=self.stretch)  # type: ignore[arg-type]


@dataclass(slots=True)
class PositionSums:
    """The sums of one calibrated position: of rows to fit, and of rows held out.

    `step` is its first call's, `steps` those of all: runs of other lengths come to one time at other steps.
    """

    step: int
    position: float | None
    before: float | None
    fit: NormalEquations
    held: NormalEquations
    on_policy: bool = False
    steps: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _FullPass:
    """What the region emitted in a full pass, as the engine keeps it, and how that differs from the one before."""

    exit: Tensor
    written: int
    time: float | None
    trend: Tensor | None = None
    before: float | None = None

    @classmethod
    def after(cls, last: _FullPass | None, kept: Feature | None, exit: Tensor, time: float | None) -> _FullPass:
        """Goes on from the last one; of an exit that was not kept, or whose writes nobody counts, a copy is kept."""
        own = exit.clone() if kept is None or kept.version < 0 else kept.exit
        if last is None or last.exit.shape != own.shape or version(last.exit) != last.written:
            return cls(own, version(own), time)
        return cls(own, version(own), time, own - last.exit, last.time)


@dataclass(slots=True)
class _Run:
    """What is known of the batch that is sampled now. A key is a branch, and which of its calls in a step.

    Attributes:
        befores: key → the time of its last call.
        trails: key → its last full pass.
        first: which call in a step → step, branch and pair of the branch that made it first.
        step: the last one.
        branches: that were called in it.
        apart: has any step had two: does each branch have a call of its own?
    """

    befores: dict[tuple[int, int], float | None] = field(default_factory=dict)
    trails: dict[tuple[int, int], _FullPass] = field(default_factory=dict)
    first: dict[int, tuple[int, int, Pair]] = field(default_factory=dict)
    step: int = 0
    branches: set[int] = field(default_factory=set)
    apart: bool = False


@dataclass
class Sums:
    """Streams what crosses the region's edge into normal equations, one for each calibrated position.

    Attributes:
        region: whose edge.
        schedule: which steps.
        guidance: scale of the guided combination; None to do without.
        unconditional: which branch is the first of the combination.
        kernel: the cached exit around each position is a feature too.
        several: there is more than one batch.
        log_snr: of a time; None takes the time itself.
        places: position → sums.
        times: all times seen.
        samples: rows of a step, at most.
        held_out: "rows" or "positions".
        last_step: seen.
        guided: were there two branches in any step: two calls, or a batch that has halves?
        refused: why calls could not have been adaptor passes, whatever the schedule says; how many.
        backwards: calls that came to their time from the other side than the first call did: an adaptor leaves them.
        strides: position → the time before it that weights are for, where that is known; else its first call's.
    """

    region: Region
    schedule: Schedule
    guidance: float | None
    unconditional: str
    kernel: bool = False
    several: bool = False
    log_snr: Callable[[float], float] | None = None
    places: dict[float | None, PositionSums] = field(default_factory=dict)
    times: set[float] = field(default_factory=set)
    samples: int = 0
    held_out: str = "rows"
    last_step: int = 0
    guided: bool = False
    refused: Counter[str] = field(default_factory=Counter)
    backwards: int = 0
    strides: dict[float | None, float | None] = field(default_factory=dict)
    _reader: TimeReader = field(default_factory=TimeReader)
    _run: _Run = field(default_factory=_Run)
    _batch: int = 0  # how many are over

    def __post_init__(self) -> None:
        self.exit = Layout.of_boundary(self.region.exit)
        self.entry = Layout.of_boundary(self.region.entry) if "entry" in self.region.inputs else None
        around = (3**self.exit.rank - 1) * self.exit.channels if self.kernel else 0
        self.shape = Shape(self.exit.channels, self.entry.channels if self.entry else 0, around)

    @property
    def steps(self) -> set[int]:
        """Those of all calibrated positions."""
        return {step for place in self.places.values() for step in place.steps}

    def forget(self) -> None:
        """A batch is over."""
        self._batch, self._run = self._batch + 1, _Run()

    def before(self, call: UNetCall) -> None:
        """A call is about to run; as an observer of the engine."""

    def after(self, call: UNetCall, outcome: Outcome) -> None:
        """A full pass has run; as an observer of the engine."""
        time, before = self.read(call)
        if call.decision is not None and call.decision.reason is None:
            self.add(call, outcome, time, before)
        elif call.decision is not None and call.decision.reason not in (None, reasons.FIRST, reasons.SCHEDULED):
            self.refused[call.decision.reason] += 1
        self.remember(call, outcome, time)

    @torch.no_grad()  # some samplers switch gradients on: each sum would hold the graph of all that it adds up
    def remember(self, call: UNetCall, outcome: Outcome, time: float | None) -> None:
        """Keep what a pass emitted that the schedule has in full; where it is for any schedule, every pass."""
        emitted = outcome.exits.get(0)
        if emitted is None or call.place is None or call.decision is None:
            return
        if self.guidance is not None and not self.guided:
            self.guided = self._run.apart or self._halves(call)
        if self.schedule is _ALL or call.decision.reason is not None:
            key = call.place.branch.number, call.place.ordinal
            feature = call.place.call.feature
            self._run.trails[key] = _FullPass.after(self._run.trails.get(key), feature, emitted.exit, time)

    def _trail(self, call: UNetCall, time: float | None, before: float | None) -> tuple[Tensor | None, float]:
        """The last two full passes' trend, and how many times a straight line in log-SNR carries it on."""
        assert call.place is not None  # it has run, or is about to
        last = self._run.trails.get((call.place.branch.number, call.place.ordinal))
        if last is None or last.trend is None:
            return None, 0.0
        times = [one for one in (time, before, last.time, last.before) if one is not None]
        if len(times) < 4:
            return last.trend, 1.0
        levels = torch.tensor([one if self.log_snr is None else self.log_snr(one) for one in times])
        return last.trend, float(carried(levels[0] - levels[1], levels[2] - levels[3]))

    def read(self, call: UNetCall) -> tuple[float | None, float | None]:
        """The times of a call, and of the call that served it; each call is read once."""
        assert call.place is not None  # it has run, or is about to
        key, run = (call.place.branch.number, call.place.ordinal), self._run
        if run.step != call.place.step:
            run.step, run.branches = call.place.step, set()
        run.branches.add(call.place.branch.number)
        run.apart |= len(run.branches) > 1
        time = None if call.time is None else self._reader.read(call.time)[0]
        time = None if time is None else single(time)  # as an adaptor is told it
        before, run.befores[key] = run.befores.get(key), time
        self.last_step = max(self.last_step, call.place.step)
        if time is not None:
            self.times.add(time)
        return time, before

    @torch.no_grad()
    def add(self, call: UNetCall, outcome: Outcome, time: float | None, before: float | None) -> PositionSums | None:
        """Add what a full pass emitted, and what an adaptor would have had to predict it from."""
        emitted, feature = outcome.exits.get(0), call.decision.feature if call.decision else None
        if emitted is None or feature is None or call.place is None:
            return None
        place = self.places.get(time)
        if place is None:
            fit, held = (NormalEquations.empty(self.shape, emitted.exit.device) for _ in range(2))
            place = self.places[time] = PositionSums(call.place.step, time, self.strides.get(time, before), fit, held)
        place.steps.add(call.place.step)
        trend, farther = self._trail(call, time, before)
        stretch = self._stretch(place, before)
        if stretch == 0:
            self.backwards += 1
            return None

        def pair(rows: slice) -> Pair:
            exit, cached = emitted.exit[rows], feature.exit[rows]
            entries: tuple[Tensor | None, Tensor | None] = (None, None)
            if self.entry is not None and outcome.entry is not None and feature.entry is not None:
                entries = (self._entry(outcome.entry[rows], exit), self._entry(feature.entry[rows], cached))
            around = around_of(self.exit.to_map(cached).float()).flatten(2).movedim(1, -1) if self.kernel else None
            carried_on = None if trend is None else self._rows(trend[rows]) * farther
            return Pair(self._rows(cached), self._rows(exit), *entries, around, carried_on, stretch=stretch)

        count = len(emitted.exit)
        self.samples = max(self.samples, count)
        if self.guidance is not None and self._run.apart:
            whole = pair(slice(None))
            self._add(place, whole)
            self._guide(place, call.place, whole)
            return place
        halves = self.guidance is not None and self._halves(call)
        half = count // 2 if halves else count
        if outcome.entry is not None and len(outcome.entry) != count:
            pair(slice(None))  # it raises: a part of each would not show that they are of other samples
        for start, stop in self._parts(half, emitted.exit.numel() // max(count * self.shape.exit, 1)):
            first = pair(slice(start, stop))
            self._add(place, first, start, half)
            if halves:
                second = pair(slice(half + start, half + stop))
                self._add(place, second, start, half)
                self._add(place, self._guided(first, second), start, half)
        return place

    def _halves(self, call: UNetCall) -> bool:
        """Are the halves of the batch two branches of the same samples, and no samples of a step without guidance?

        Both go on from the same latents; channels behind the first one may hold conditions, which differ.
        """
        sample = call.arguments.get(self.region.sample)
        if not isinstance(sample, Tensor) or sample.ndim < 2 or len(sample) % 2 or not len(sample):
            return False
        return torch.equal(*sample[:, :1].chunk(2))

    def _stretch(self, place: PositionSums, before: float | None) -> float:
        """How many times longer the step is than the one that the place's weights are for; as an adaptor has it."""
        times = [time for time in (place.position, place.before, before) if time is not None]
        if before == place.before or len(times) < 3:
            return 1.0
        here, first, this = (time if self.log_snr is None else self.log_snr(time) for time in times)
        return min(max((here - this) / (here - first), 0.0), LONGEST) if here != first else 1.0

    @staticmethod
    def _parts(count: int, positions: int) -> list[tuple[int, int]]:
        """Samples that are taken at once, so that no copy of all of them is made; none is both fitted and held out."""
        at_once, held = max(_AT_ONCE // max(positions, 1), 1), count - count // _HELD_OUT
        bounds = sorted({*range(0, held, at_once), *range(held, count, at_once), count})
        return list(itertools.pairwise(bounds))

    def _guide(self, place: PositionSums, at: Position, pair: Pair) -> None:
        """With the step's other branch, once both are there; calls of other sizes are no two branches of one sample."""
        other = self._run.first.pop(at.ordinal, None)
        if other is None or other[0] != at.step or other[1] == at.branch.number:
            self._run.first[at.ordinal] = (at.step, at.branch.number, pair)
        elif other[2].exit.shape == pair.exit.shape:
            self._add(place, self._guided(other[2], pair))

    def _guided(self, first: Pair, second: Pair) -> Pair:
        assert self.guidance is not None  # asked only then
        if self.unconditional == "second":
            first, second = second, first
        return first.combined(second, self.guidance)

    def _add(self, place: PositionSums, pair: Pair, start: int = 0, count: int | None = None) -> None:
        """Add rows of samples, `start` and those after it of `count`: the last ones are held out.

        Of batches too small for that one in so many is held out as a whole, the second one first.
        """
        count = len(pair.exit) if count is None else count
        held = count // _HELD_OUT
        if held:
            first = max(count - held - start, 0)
            parts = [(place.fit, pair.rows(slice(0, first))), (place.held, pair.rows(slice(first, None)))]
        elif self.several:  # other positions of a picture are no other picture: they say too much good
            parts = [(place.held if self._batch % _HELD_OUT == 1 else place.fit, pair)]
        else:
            self.held_out, held = "positions", max(pair.exit.shape[1] // _HELD_OUT, 1)
            parts = [(place.fit, pair.positions(slice(0, -held))), (place.held, pair.positions(slice(-held, None)))]
        for sums, part in parts:
            tensors = (x if x is None else x.flatten(0, 1) for x in part.tensors)
            sums.add(*tensors, stretch=part.stretch)  # type: ignore[arg-type]

    def _rows(self, x: Tensor) -> Tensor:
        """An exit as (B, positions, C), float32."""
        return self.exit.to_map(x).flatten(2).movedim(1, -1).float()

    def _entry(self, entry: Tensor, exit: Tensor) -> Tensor:
        """An entry likewise, as large as the exit."""
        assert self.entry is not None  # asked only then
        like = like_exit(entry, self.entry, exit, self.exit)
        return (
            Layout(self.entry.channels, self.exit.space, self.exit.order).to_map(like).flatten(2).movedim(1, -1).float()
        )


class _Inputs(nn.Module):
    """An adaptor that reads all there is to read: the engine keeps it. Returns the cached exit."""

    def __init__(self, region: Region) -> None:
        super().__init__()
        self.needs = frozenset({"entry_cached"} if "entry" in region.inputs else ())

    def forward(self, entry: Tensor | None, exit_cached: Tensor, **more: Any) -> Tensor:
        """Return `exit_cached`."""
        return exit_cached


def run_all(
    unet: nn.Module,
    generate: Callable[[Any], Any],
    batches: Sequence[Any],
    sums: Sums | Refit,
    adaptor: Any,
    tell: Callable[[], object],
    *,
    teaches: bool,
) -> None:
    """Sample all batches while the sums are collected.

    Args:
        unet: what `generate` calls.
        generate: the sampler.
        batches: of conditions.
        sums: an observer of the calls, with region and schedule.
        adaptor: stands in at the schedule's steps.
        tell: called after each batch.
        teaches: all passes are full.
    """
    check_unet(unet)
    engine = Engine(unet, [ClockedRegion(sums.region, sums.schedule, adaptor)])
    engine.looks, engine.teaches, engine.records_first = True, teaches, True
    engine.observers.append(sums)
    if isinstance(sums, Refit):
        sums.engine = engine
    engine.attach(sums)
    try:
        with torch.no_grad():
            for batch in batches:
                with TrajectoryBlock(engine.states, None, unet):
                    generate(batch)
                sums.forget()
                tell()
    finally:
        engine.installed.close()
        engine.states.forget()


def _chained(schedule: Schedule, step: int) -> bool:
    """Is the step before an adaptor step too?"""
    return not (schedule.is_full(step) or schedule.is_full(step - 1))


# -- what is solved for ---------------------------------------------------------------------------------------------


class Solver:
    """Chooses ridge and kind on what is held out, and solves with all that was seen."""

    def __init__(
        self,
        region: Region,
        sums: Sums,
        kind: str,
        ridge: float | None,
        log_snr: Callable[[float], float] | None,
        *,
        trends: bool = True,
    ) -> None:
        self.region, self.sums, self.log_snr = region, sums, log_snr
        self.trends = trends
        self.ridges = (*RIDGES, math.inf) if ridge is None else (ridge,)
        if None in sums.places:
            self.places = [sums.places[None]]
        else:
            self.places = sorted(sums.places.values(), key=lambda place: place.position or 0.0)
        self.rank = max(sums.shape.exit // _RANK, 1)
        names = self._candidates() if kind == "auto" else [kind]
        for place in sorted(self.places, key=lambda place: place.step):
            _check_finite(place)
        self.identity = [place.held.identity for place in self.places]
        self.errors = {name: [self.best(place, KINDS[name]) for place in self.places] for name in names}
        self.kinds = {
            name: KindResult(self._left(error for _, error in errors), self._macs(KINDS[name]))
            for name, errors in self.errors.items()
        }
        self.name, self.why = self._choose() if kind == "auto" else (kind, f"{kind} was asked for.")

    def _candidates(self) -> list[str]:
        names = ["gain", "affine", "exit"]
        if self.sums.shape.entry:
            names += ["exit+entry", "exit+entry+before"]
        names += ["low rank"] if self.sums.shape.exit >= _MANY else []
        # of steps that are all full the trend is another one than of any schedule that skips some: 17.7 dB, not 40.2
        trends = self.trends and any(bool(place.fit.trend_square.any()) for place in self.places)
        return [*names, *(f"{name}+trend" for name in names if trends and name != "gain")]

    def best(self, place: PositionSums, kind: AdaptorKind) -> tuple[float, float]:
        """(ridge, held-out error²) of one position; an endless ridge is the identity: of few rows it may be best."""
        errors = []
        for ridge in self.ridges:
            weights = place.fit.solve(kind, ridge)
            if kind.form == "low rank":
                basis = shared_basis([place.fit.added(weights, ridge)], self.rank)
                weights = place.fit.cut(weights, ridge, basis)
            errors.append((place.held.error(weights), ridge))
        error, ridge = min(errors)
        return ridge, error

    def _left(self, errors: Iterable[float]) -> float:
        shares = [error / max(whole, 1e-300) for error, whole in zip(errors, self.identity, strict=True)]
        return math.sqrt(sum(shares) / len(shares))

    def _macs(self, kind: AdaptorKind) -> int:
        exit = self.region.exit
        positions = math.prod(exit.shape) // self.sums.shape.exit
        reads = self.sums.shape.exit + self.sums.shape.entry * (len(kind.reads) - 1)
        if kind.form in ("linear", "kernel"):
            return positions * (reads + self.sums.shape.around) * self.sums.shape.exit
        return positions * self.rank * (reads + self.sums.shape.exit) if kind.form == "low rank" else 0

    def _choose(self) -> tuple[str, str]:
        """From the cheapest kind on, the next one that takes away errors cheaper than running the region does."""
        kinds = {name: one for name, one in self.kinds.items() if self._worth(name)}
        whole = self.region.macs
        name = min(kinds, key=lambda one: (kinds[one].macs, kinds[one].left))
        said = f"{name} is free"
        while True:
            here = kinds[name]
            dearer = [one for one in kinds if kinds[one].macs > here.macs and kinds[one].left < here.left]
            best = max(dearer, key=lambda one: _gain(here, kinds[one]), default=None)
            if best is None or _gain(here, kinds[best]) * (whole - here.macs) < here.left**2:
                break
            left, cost = kinds[best].left ** 2 / here.left**2, (kinds[best].macs - here.macs) / max(whole, 1)
            said = f"{best} leaves {percent(left)} of {name}'s squared error for {percent(cost)} of the region's MACs"
            name = best
        beyond = ", and dearer ones take away less for their MACs than running the region does" if dearer else ""
        return name, f"{said}{beyond}."

    def _worth(self, name: str) -> bool:
        """Is a kind worth what it holds? A trend takes the memory of two exits, and carries noise on too.

        So it has to take away a quarter of the error that the same kind leaves without it. Of a matrix it does so where
        steps are many; at 8 steps of the demo model it takes away 4%, and the pictures' distance grows
        (docs/calibration.md).
        """
        without = self.kinds.get(name.removesuffix("+trend"))
        if not KINDS[name].trend or without is None:
            return True
        return self.kinds[name].left <= 0.75 * without.left and without.left > _EXACT

    def adaptor(self) -> CalibratedAdaptor:
        """The adaptor of the kind that was chosen."""
        kind, basis = KINDS[self.name], None
        if kind.form == "low rank":
            wholes = [(place.fit + place.held, ridge) for place, (ridge, _) in self.chosen]
            basis = shared_basis([whole.added(whole.solve(kind, ridge), ridge) for whole, ridge in wholes], self.rank)
        knots = [self.knot(place, ridge, basis) for place, (ridge, _) in self.chosen]
        positions = None
        if None not in self.sums.places:
            at = [place.position or 0.0 for place in self.places]
            strides = [abs((place.before or 0.0) - (place.position or 0.0)) for place in self.places]
            positions = Positions(at, strides, sorted(self.sums.times), self.log_snr)
        reads = (*(kind.reads if self.sums.shape.entry else ("exit",)), *(("trend",) if kind.trend else ()))
        adaptor = CalibratedAdaptor.of(self.region, knots, positions, form=kind.form, basis=basis, reads=reads)
        return adaptor.to(self.places[0].held.cross.device)  # where the UNet runs

    @property
    def chosen(self) -> list[tuple[PositionSums, tuple[float, float]]]:
        """Each position, with (ridge, held-out error²) of the kind that was chosen."""
        return list(zip(self.places, self.errors[self.name], strict=True))

    def knot(self, place: PositionSums, ridge: float, basis: Tensor | None) -> Knot:
        """Solve with all that was seen at a position."""
        kind, whole = KINDS[self.name], place.fit + place.held
        own, weights = torch.arange(whole.shape.exit, device=whole.cross.device), whole.solve(kind, ridge)
        gain, inner = None, None
        if kind.form in ("linear", "kernel"):
            inner = self._as_read(weights[1:-1], kind)
        elif basis is None:
            gain = weights[1:-1][own, own]
        else:
            gain = whole.affine(weights, ridge)[1:][own, own]
            weights = whole.cut(weights, ridge, basis)
            rest = weights[1:-1].clone()
            rest[own, own] -= gain
            inner = rest @ basis.T
        margin = (whole.high - whole.low) / 2
        trend = weights[-1] if kind.trend else None
        bounds = whole.low - margin, whole.high + margin
        return Knot(place.position, place.before, *bounds, weights[0], gain, inner, trend)

    def again(self, position: float | None, place: PositionSums) -> int:
        """Take other sums for a position, and choose the ridge anew; returns which position it is."""
        _check_finite(place)
        k = next(k for k, one in enumerate(self.places) if one.position == position)
        place.fit.widen(self.places[k].fit, self.places[k].held)  # what was emitted there before is in bounds, too
        self.places[k], self.identity[k] = place, place.held.identity
        self.sums.places[position] = place  # those of the first run take memory, and nobody reads them any more
        self.errors[self.name][k] = self.best(place, KINDS[self.name])
        return k

    def _as_read(self, inner: Tensor, kind: AdaptorKind) -> Tensor:
        """Rows of what the matrix reads: the rows of the entry before are those of the entry, where it is not read."""
        exit, entry = self.sums.shape.exit, self.sums.shape.entry
        if "entry_cached" in kind.reads:
            return inner
        return inner[: exit + entry] if "entry" in kind.reads else inner[:exit]

    def report(self, schedule: Schedule | None, seconds: float) -> Calibration:
        """What was measured."""
        sums, order = self.sums, sorted(range(len(self.places)), key=lambda k: self.places[k].step)
        steps = []
        for k in order:
            place, (ridge, error) = self.places[k], self.errors[self.name][k]
            share = None if ridge == math.inf else ridge
            level = None if self.log_snr is None or place.position is None else self.log_snr(place.position)
            steps.append(
                StepResult(
                    place.step, place.position, level, math.sqrt(self.identity[k]), math.sqrt(error), share,
                    place.on_policy,
                )
            )  # fmt: skip
        return Calibration(
            region=self.region.line,
            share=self.region.macs_share,
            region_macs=self.region.macs,
            kind=self.name,
            why=self.why,
            kinds={"identity": KindResult(1.0, 0), **self.kinds},
            steps=tuple(steps),
            schedule=None if schedule is None else str(schedule),
            guidance=sums.guidance,
            samples=sums.samples,
            held_out=sums.held_out,
            seconds=seconds,
        )


def _check_finite(place: PositionSums) -> None:
    """Raise `ArgumentError` where NaN or infinity came into the sums: no weights follow from them."""
    if not (place.fit.finite and place.held.finite):
        raise ArgumentError(
            "the region's tensors must be finite",
            seen={"not finite": f"in step {place.step}", "time": place.position},
            do="correct the sampler or its dtype first: bfloat16 holds larger numbers than float16",
        )


class Refit:
    """Runs the adaptor on its schedule, and fits it again at steps whose cached exit it has made itself.

    As an observer it sees an adaptor pass before it runs: the full pass in its place says what the exit would be; with
    that the position is solved anew, and the pass runs with the new weights. So each step is fitted on what the steps
    before it, fitted already, lead to.
    """

    def __init__(self, solver: Solver, sums: Sums) -> None:
        self.solver, self.sums = solver, sums
        sums.strides = {place.position: place.before for place in solver.places}  # those in the adaptor's table
        self.adaptor = solver.adaptor()
        self.needs = self.adaptor.needs | ({"entry_cached"} if sums.entry is not None else set())
        self.region, self.schedule = sums.region, sums.schedule
        self.engine: Engine | None = None
        self._both = {  # times that come after a full step in some runs, and after an adaptor step in others
            place.position
            for place in solver.places
            if len({_chained(sums.schedule, step) for step in place.steps}) > 1
        }
        self._adapted: set[tuple[int, int]] = set()  # branches, and which of their calls, whose last pass was its own
        self._time: float | None = None

    def __call__(self, entry: Tensor | None, exit_cached: Tensor, **inputs: Any) -> Tensor:
        """Let the adaptor stand in."""
        own = {name: inputs[name] for name in ("time", "text", *self.adaptor.needs)}
        output: Tensor = self.adaptor.to(exit_cached.device)(entry, exit_cached, **own)
        return output

    def forget(self) -> None:
        """A trajectory is over."""
        self.sums.forget()
        self._adapted.clear()

    def before(self, call: UNetCall) -> None:
        """An adaptor pass that follows another one, or does so in some runs: fit it to what a full pass would emit."""
        if call.place is None or call.decision is None:
            return
        time, before = self.sums.read(call)
        self._time = time
        own = (call.place.branch.number, call.place.ordinal) in self._adapted
        if call.decision.reason is not None or not (own or time in self._both) or self.engine is None:
            return
        place = self.sums.add(call, self.engine.full_pass(call), time, before)
        if place is not None and time in self.solver.sums.places:
            place.on_policy = True
            k = self.solver.again(time, place)
            basis = None if self.adaptor.basis is None else self.adaptor.basis.to(place.fit.cross)
            knot = self.solver.knot(place, self.solver.errors[self.solver.name][k][0], basis)
            self.adaptor.put(k, knot)

    def after(self, call: UNetCall, outcome: Outcome) -> None:
        """A pass has run; was it the adaptor's?"""
        self.sums.remember(call, outcome, self._time)
        if call.place is not None:
            change = self._adapted.add if outcome.kind == "adaptor" else self._adapted.discard
            change((call.place.branch.number, call.place.ordinal))


def _gain(here: KindResult, there: KindResult) -> float:
    """Squared error that is taken away for a MAC more."""
    return (here.left**2 - there.left**2) / max(there.macs - here.macs, 1)
