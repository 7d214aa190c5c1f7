"""`tune`: for a saving that is asked for, calibrate, try schedules end to end, and wrap the UNet with the best."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import inspect
import json
import math
import os
import secrets
import shutil
import time as clocks
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import TaskID
from torch import Tensor, nn

from clockwork_hooks._generate import Generate, told_apart, with_seed
from clockwork_hooks._numbers import count, duration, percent
from clockwork_hooks.adaptors import IdentityAdaptor
from clockwork_hooks.adaptors.calibrated import CalibratedAdaptor
from clockwork_hooks.analysis.calibration import calibrate
from clockwork_hooks.analysis.sampling import (
    Candidate,
    Measured,
    Runs,
    Watch,
    check_regions,
    final,
    first_call,
    not_finite,
    region_name,
    relative_error,
)
from clockwork_hooks.clock.times import TimeReader
from clockwork_hooks.engine.attach import wrap
from clockwork_hooks.engine.engine import UNetCall
from clockwork_hooks.engine.passes import Outcome
from clockwork_hooks.engine.wrapper import ClockworkWrapper, check_unet
from clockwork_hooks.errors import (
    AdaptorError,
    ArgumentError,
    NoEffectWarning,
    OtherStepsWarning,
    as_path,
    first_line,
    is_several,
    is_whole,
    named_options,
    share,
    warn,
)
from clockwork_hooks.regions.find import choose, regions_of
from clockwork_hooks.regions.region import Region
from clockwork_hooks.reports.plots import Plot, plots
from clockwork_hooks.reports.progress import ProgressBar
from clockwork_hooks.reports.report import FieldReport
from clockwork_hooks.reports.tables import Table, table
from clockwork_hooks.schedule import Schedule, early_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FILE = "tuning.json"
_FIRST, _LAST = (1, 2, 3), (0, 1)  # so many first and last steps are full
QUIET = Console(quiet=True)  # of what is part of a longer work, which tells how far it is
_SHOWN = 4  # pictures before and after
_EARLY = "early"  # the rule of `Schedule.early`
_FITTED = ", calibrated for it"  # after the rule of an adaptor that serves its steps alone
_FEW = 4  # values of each weight that a folder's name depends on
_OWN_OPTIONS = ("prompt", "generator", "output_type")  # that the pipeline is called with by `tune` itself
_MOST_RULES = len(_FIRST) * len(_LAST) + 1  # that `spaced` returns
_HELD_OUT = 4  # one batch in so many is judged on, at least one


@dataclass(frozen=True, slots=True)
class Trial:
    """One way of running the UNet, end to end.

    Attributes:
        region: name of what is skipped.
        rule: of thumb, that the steps follow.
        steps: that use the adaptor.
        saved: share of a trajectory's MACs, the adaptor's own counted.
        error: relative L2 error of the result, on conditions and seeds that were not calibrated with.
        adaptor: "identity", or the kind of the calibrated one.
    """

    region: str
    rule: str
    steps: tuple[int, ...]
    saved: float
    error: float
    adaptor: str


@dataclass(frozen=True, slots=True)
class Tuning(FieldReport):
    """What `tune` tried, and what it chose.

    Attributes:
        chosen: what the UNet is wrapped with.
        identity: the same steps without the adaptor.
        fewer: the plain sampler with fewer steps: for no more MACs than what was chosen, and for a step's more; empty
            where nobody says how it takes fewer.
        trials: all that was tried.
        steps: of the sampler.
        saving: that was asked for.
        seconds: what it took.
        pictures: (2, n, C, H, W) in [0, 1], plain and chosen, from the same noise; None where results are no pictures.
            Not in the JSON.
    """

    SCHEMA = "tuning/2"

    chosen: Trial
    identity: Trial
    fewer: tuple[Trial, ...]
    trials: tuple[Trial, ...]
    steps: int
    saving: float
    seconds: float
    pictures: Tensor | None = field(default=None, compare=False, repr=False)

    def table(self) -> Table:
        """A row a trial, the best first."""
        rows = [
            (
                f"{one.rule} (chosen)" if one == self.chosen else one.rule,
                " ".join(map(str, one.steps)),
                one.region or None,
                one.adaptor or None,
                percent(one.saved),
                percent(one.error),
            )
            for one in sorted((*self.trials, self.identity, *self.fewer), key=lambda one: one.error)
        ]
        notes = (
            f"Error: relative L2 of the result, on conditions that were not calibrated with. {percent(self.saving)} of "
            f"the MACs were to be saved in {count(self.steps, 'step')}; {duration(self.seconds)}.",
        )
        heads = ("schedule", "adaptor steps", "region", "adaptor", ">MACs saved", ">error")
        return table("Tuning", heads, rows, notes=notes)

    def figures(self) -> Sequence[Plot]:
        """The pictures, before and after, where there are any."""
        shown = self.pictures
        if shown is None:
            return ()
        return plots(Plot(lambda: before_after(shown, self.chosen), "Pictures before and after, from the same noise"))


def before_after(pictures: Tensor, chosen: Trial) -> Figure:
    """Two rows of pictures: plain, and with the adaptor at its steps."""
    from matplotlib.figure import Figure

    columns = pictures.shape[1]
    figure = Figure(figsize=(1.6 * columns + 0.4, 3.6), dpi=160, layout="constrained")
    titles = ("plain", f"{percent(chosen.saved)} fewer MACs")
    for axes, row, title in zip(figure.subplots(2, columns, squeeze=False), pictures, titles, strict=True):
        for cell, picture in zip(axes, row, strict=True):
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_color("0.8")  # a white picture has an edge too
            cell.imshow(picture.movedim(0, -1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        axes[0].set_title(title, fontsize=9, loc="left")
    return figure


@named_options
def tune(
    pipe: Any,
    conditions: Iterable[Any],
    *,
    saving: float = 0.4,
    options: Mapping[str, Any] | None = None,
    generate: Generate | None = None,
    shorter: Callable[[int], Generate] | None = None,
    guidance: float | None = None,
    log_snr: Any = None,
    regions: Sequence[Region] | None = None,
    folder: str | Path | None = None,
    on_trial: Callable[[Trial], object] | None = None,
    time: str | None = None,
    console: Console | None = None,
) -> ClockworkWrapper:
    """Calibrate, choose the steps, and wrap: `cw = ch.tune(pipe, prompts, saving=0.4)`.

    For each region an adaptor is calibrated at all steps. Schedules that save enough (some first and last steps full,
    and a clock between them; or full steps farther and farther apart) are run end to end on conditions that were not
    calibrated with. The one with results nearest to the plain ones is calibrated again for its own steps, and so is
    the one with growing distances; the better one is used. The plain sampler with fewer steps, at no more MACs, is
    judged too: if it is better, a warning says so.

    It takes minutes on a GPU. With `folder=` it is done once, for a model with its weights, sampler, number of steps,
    guidance and saving; whatever the prompts. Your own sampler is known by its code, and by the times that one run
    of it takes.

    Args:
        pipe: a diffusers pipeline with a UNet; or the UNet itself, with `generate`.
        conditions: prompts, a dozen or more; for a UNet, batches of whatever `generate` takes.
        saving: share of the MACs of a whole trajectory to save.
        options: further arguments of the pipeline's call: {"num_inference_steps": 20}.
        generate: for a UNet: its sampler, as in `measure_drift`.
        shorter: for a UNet: a function of the number of steps that returns its sampler; without it fewer plain steps
            are not judged. A pipeline needs none.
        guidance: scale of classifier-free guidance; for a pipeline, None is its own.
        log_snr: as in `calibrate`; for a pipeline, None is its scheduler.
        regions: to try; None for the default one and the widest.
        folder: where the result is saved, and read from the next time.
        on_trial: called with every trial when it ends.
        time: name of the argument that holds the time, if several may.
        console: where the progress bar goes; None for standard error.

    Returns:
        The wrapper. `cw.adaptor.tuning` says what was tried; None if it was read from the folder.

    Raises:
        ArgumentError: an option is outside its rule, or no schedule saves so much.
        RegionNotFoundError: the UNet has no region.

    Warns:
        NoEffectWarning: fewer plain steps are nearer to the plain results, for no more MACs.
        OtherStepsWarning: the sampler does not run with so few steps, so they are not judged.

    Example:
        >>> from diffusers import UNet2DModel
        >>> from clockwork_hooks import tune
        >>> blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        >>> unet = UNet2DModel(16, block_out_channels=(8, 32), norm_num_groups=8, **blocks).eval()
        >>> def generate(count, seed):
        ...     x = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        ...     for t in range(900, 100, -100):
        ...         x = x - 0.1 * unet(x, t).sample
        ...     return x
        >>> cw = tune(unet, [4, 4], generate=generate, saving=0.2)
        >>> cw.adaptor.tuning.chosen.saved >= 0.2
        True
        >>> cw.remove()
    """
    share("saving", saving, rule="a saving is a share of the MACs", example=0.4, ends=False)
    begun, unet, batches = clocks.perf_counter(), _unet(pipe, generate), _batches(conditions)
    check_unet(unet)
    regions = None if regions is None else check_regions(regions)
    _check_options(pipe, options or {})
    if shorter is not None:
        _check_shorter(pipe, unet, shorter, batches[0], time)
    sampler, shown = generate, None if generate is None else with_seed(generate)
    generate = shown
    if generate is None:
        batches = [[prompt] for prompt in batches]
        generate, shown = (with_seed(_pipeline(pipe, options or {}, form)) for form in ("latent", "pt"))
        guidance = _guidance(pipe, options or {}) if guidance is None else guidance
        log_snr = getattr(pipe, "scheduler", None) if log_snr is None else log_snr
    home = None
    if folder is not None:
        folder = as_path("folder", folder)
        _home(folder)  # before the first run
        asked = [options or {}, log_snr, guidance, time, saving]
        if unet is pipe:
            asked += [_times(unet, generate, batches[0], regions, time), sampler, shorter]
        home = folder / _key(pipe, unet, regions, asked)
    if home is not None and (home / _FILE).exists():
        return _wrapped_again(home, unet, generate, batches[0], time)
    solving = {"guidance": guidance, "log_snr": log_snr, "time": time}
    tuner = _Tuner(unet, generate, batches, solving, on_trial or (lambda trial: None))
    adaptor, region, tuning = tuner.run(saving, regions, begun, console)
    steps, take = (tuning.steps, shorter) if pipe is unet else _shorter(pipe, options or {})
    if take is not None:
        tuning = replace(tuning, fewer=tuner.plain_with_fewer(steps, take, tuning.chosen.saved, console))
        _tell_if_nearer(tuning)
    before = tuner.pictures(shown or generate, "plain pictures", console)
    cw = wrap(unet, adaptor, schedule=Schedule.at(tuning.chosen.steps), region=region)
    with contextlib.ExitStack() as unless_done:
        unless_done.callback(cw.remove)
        after = tuner.pictures(shown or generate, "pictures with the adaptor", console)
        if before is not None and after is not None:
            tuning = replace(tuning, pictures=torch.stack((before, after)))
        adaptor.tuning = tuning
        cw.stats.clear()  # of the pictures: the next report is of the caller's own runs
        if home is not None:
            _save(home, adaptor, tuning)
        unless_done.pop_all()
    return cw


class _Tuner:
    """Calibrates on most batches, judges on the others."""

    def __init__(
        self,
        unet: nn.Module,
        generate: Generate,
        batches: list[Any],
        options: Mapping[str, Any],
        on_trial: Callable[[Trial], object],
    ) -> None:
        self.on_trial = on_trial
        held = max(len(batches) // _HELD_OUT, 1)
        self.unet, self.generate, self.fitted = unet, generate, batches[:-held]
        self.options = options
        self.runs = Runs(unet, generate, [(batch, 1) for batch in batches[-held:]])
        self.calls = 0  # of the UNet, in all runs

    def calibrated(
        self, region: Region, steps: Sequence[int] | None, bar: ProgressBar, task: TaskID
    ) -> CalibratedAdaptor:
        """For these steps; None for all."""
        seeds = iter(range(2, 1 << 30))
        schedule = None if steps is None else Schedule.at(steps)

        def generate(batch: Any) -> Tensor:
            output: Tensor = self.generate(batch, next(seeds))
            bar.advance(task)
            return output

        return calibrate(
            self.unet, generate, self.fitted, region=region, schedule=schedule, console=QUIET, **self.options
        )

    def tried(self, region: Region, rule: str, steps: tuple[int, ...], adaptor: CalibratedAdaptor | None) -> Trial:
        """Run it on what is held out."""
        name = region_name(region)
        candidate = Candidate(name, region, adaptor or IdentityAdaptor(), adaptor)
        outcome: Measured = self.runs.outcome(candidate, Schedule.at(steps))
        self.calls = outcome.calls
        kind = "identity" if adaptor is None else str(adaptor.facts["kind"])
        trial = Trial(name, rule, steps, outcome.saved, outcome.error, kind)
        self.on_trial(trial)
        return trial

    def plain_with_fewer(
        self, steps: int, take: Callable[[int], Generate], saved: float, console: Console | None
    ) -> tuple[Trial, ...]:
        """The plain sampler with fewer of its steps, run on what is held out: for no more MACs, and for a step's more.

        Args:
            steps: of the sampler.
            take: gives it with so many.
            saved: share of the MACs.
            console: where the progress bar goes.
        """
        trials, calls = [], 0

        def called(*_: object) -> None:
            nonlocal calls
            calls += 1

        most = math.floor(steps * (1 - saved))
        numbers = [number for number in (most, most + 1) if 1 < number < steps]
        handle = self.unet.register_forward_hook(called)
        try:
            with ProgressBar(console) as bar:
                task = bar.add_task("plain, fewer steps", total=len(numbers) * len(self.runs.runs))
                for number in numbers:
                    errors, calls = [], 0
                    try:
                        generate = with_seed(take(number))
                        for run, plain in zip(self.runs.runs, self.runs.plain, strict=True):
                            errors.append(relative_error(final(generate, *run), plain))
                            bar.advance(task)
                    except Exception as error:  # a scheduler may need more; what was chosen is not lost for that
                        _tell_of_none(number, error)
                        continue
                    mean = float(torch.cat(errors).mean())
                    took = round(steps * calls / self.calls)  # whatever it was asked for
                    trials.append(Trial("", f"plain, {count(took, 'step')}", (), 1 - calls / self.calls, mean, ""))
                    self.on_trial(trials[-1])
        finally:
            handle.remove()
        return tuple(trials)

    @torch.no_grad()
    def pictures(self, generate: Generate, what: str, console: Console | None) -> Tensor | None:
        """The first few of those held out, on the CPU; None where results are none."""
        shown: list[Tensor] = []
        with ProgressBar(console) as bar:
            task = bar.add_task(f"draw {what}", total=_SHOWN)
            for run in self.runs.runs:
                images = generate(*run)
                if not (isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] in (1, 3)):
                    return None
                if shown and images.shape[1:] != shown[0].shape:
                    break
                shown += images.float().clamp(0, 1).cpu()
                bar.update(task, completed=len(shown))
                if len(shown) >= _SHOWN:
                    break
        return torch.stack(shown[:_SHOWN])

    def _total(self, regions: int, rules: int) -> int:
        """Runs of the sampler in all, for so many regions and rules to try."""
        calibrating, trying = regions + 2 * 2, rules + 3  # two finalists, each fitted twice; they and identity
        return calibrating * len(self.fitted) + trying * len(self.runs.runs)

    def run(
        self, saving: float, regions: Sequence[Region] | None, begun: float, console: Any
    ) -> tuple[CalibratedAdaptor, Region, Tuning]:
        """The best adaptor, its region, and all that was tried."""
        first = self.runs.runs[0]  # what is tried then needs no trace
        trace = first_call(self.unet, self.generate, *first, time=self.options["time"])
        wanted = regions or [choose(trace, self.unet), regions_of(trace, self.unet)[0]]
        most = max(region.macs_share for region in wanted)
        if saving >= most:  # said before minutes of calibration: no schedule skips a region in every step
            raise _unreachable(saving, most, do="ask for less than that share")
        trials: list[tuple[Trial, Region]] = []
        adaptors: dict[Region, CalibratedAdaptor] = {}
        reach = 0.0  # the most that one adaptor step after the other saves, what the adaptor takes left out
        with ProgressBar(console) as bar:
            regions = list(dict.fromkeys(wanted))
            most_rules = _MOST_RULES * len(regions)  # how many there are is known once a run has told its steps
            task = bar.add_task("tune", total=self._total(len(regions), most_rules))
            for region in regions:
                bar.update(task, description=f"calibrate {region_name(region)}")
                adaptors[region] = adaptor = self.calibrated(region, None, bar, task)
                count = int(adaptor.facts["steps"])
                report = adaptor.report  # of other batches than `region`: what is comparable are shares
                own = region.macs_share * report.kinds[report.kind].macs / report.region_macs
                reach = max(reach, (region.macs_share - own) * (count - 1) / count)
                rules = spaced(count, saving, region.macs_share - own)
                most_rules += len(rules) - _MOST_RULES
                bar.update(task, total=self._total(len(regions), most_rules))
                for rule, steps in rules:
                    bar.update(task, description=f"try {rule}")
                    trials.append((self.tried(region, rule, steps, adaptor), region))
                    bar.advance(task, len(self.runs.runs))
            trials = [(one, region) for one, region in trials if one.saved >= saving]
            if not trials:
                more = {"most that can be saved, beside the adaptor": percent(reach), "steps": count}
                raise _unreachable(saving, most, more, do="ask for less, or take more steps")
            best, region = min(trials, key=lambda pair: pair[0].error)
            if not math.isfinite(best.error):
                raise not_finite({"saving": percent(saving), "schedules tried": len(trials)}, do="ask for less")
            early = (one for one, where in trials if where is region and one.rule.startswith(_EARLY))
            finalists: list[tuple[Trial, CalibratedAdaptor]] = []
            for one in dict.fromkeys((best, *early)):  # only an adaptor for its own steps follows a trend
                bar.update(task, description=f"calibrate for {one.rule}")
                adaptor = self.calibrated(region, one.steps, bar, task)
                rule = f"{one.rule}{_FITTED}"
                finalists.append((self.tried(region, rule, one.steps, adaptor), adaptor))
            reached = [pair for pair in finalists if pair[0].saved >= saving]
            last, adaptor = min((*reached, (best, adaptors[region])), key=lambda pair: pair[0].error)
            adaptor.facts["schedule"] = str(Schedule.at(last.steps))  # by which wrap(unet, folder) runs it
            identity = self.tried(region, last.rule.removesuffix(_FITTED), last.steps, None)
        everything = (*(one for one, _ in trials), *(one for one, _ in finalists))
        return adaptor, region, Tuning(last, identity, (), everything, count, saving, clocks.perf_counter() - begun)


def _unreachable(saving: float, most: float, more: Mapping[str, Any] | None = None, *, do: str) -> ArgumentError:
    seen = {"saving": percent(saving), "share of the widest region": percent(most), **(more or {})}
    return ArgumentError("the saving must be one that some schedule reaches", seen=seen, do=do)


def spaced(steps: int, saving: float, share: float) -> list[tuple[str, tuple[int, ...]]]:
    """(rule, adaptor steps) of schedules that save so much: clocks, with full first and last steps, and an early one.

    The early one is that of `Schedule.early`, with as few adaptor steps as save so much.

    Args:
        steps: of the sampler.
        saving: share of the MACs, without the adaptor's.
        share: of the MACs of a full pass, that an adaptor pass saves.

    Example:
        >>> for rule, steps in spaced(8, 0.45, 0.93):
        ...     print(rule, steps)
        clock 2 (2, 4, 6, 8)
        clock 3, last 1 full (2, 3, 5, 6)
        clock 3, first 2 full (3, 4, 6, 7)
        clock 3, first 3 full (4, 5, 7, 8)
        clock 5, first 3 and last 1 full (4, 5, 6, 7)
        early, 4 full (3, 5, 6, 7)
    """
    rules: dict[tuple[int, ...], str] = {}
    for first in _FIRST:
        for last in _LAST:
            for clock in range(2, steps + 2):
                at = tuple(s for s in range(first + 1, steps + 1 - last) if (s - first) % clock)
                if share * len(at) / steps > saving:
                    ends = [f"first {first}"] * (first > 1) + [f"last {last}"] * (last > 0)
                    rules.setdefault(at, f"clock {clock}" + (f", {' and '.join(ends)} full" if ends else ""))
                    break
    for full in range(steps - 1, 2, -1):
        at = early_steps(full, steps)
        if share * len(at) / steps > saving:
            rules.setdefault(at, f"{_EARLY}, {full} full")
            break
    return [(rule, at) for at, rule in rules.items()]


# -- pipelines ---------------------------------------------------------------------------------------------------------


def _unet(pipe: Any, generate: Generate | None) -> nn.Module:
    unet = pipe if generate is not None else getattr(pipe, "unet", None)
    if not isinstance(unet, nn.Module):
        raise ArgumentError(
            "what is tuned is a diffusers pipeline with a UNet, or a UNet with generate=",
            seen={"got": type(pipe).__name__, "generate": generate},
            do="pass tune(pipe, prompts), or tune(unet, batches, generate=generate)",
        )
    return unet


def _batches(conditions: Iterable[Any]) -> list[Any]:
    """The conditions as a list of two at least; one prompt is not a list of letters."""
    several = is_several(conditions) and not isinstance(conditions, Tensor)
    batches = list(conditions) if several else []
    if len(batches) < 2:
        raise ArgumentError(
            "tune needs several conditions: some to calibrate with, others to judge on",
            seen={"conditions": len(batches) if several else repr(conditions)[:80]},
            do="pass a list: a dozen prompts, or two batches",
        )
    return batches


def _check_options(pipe: Any, options: Mapping[str, Any]) -> None:
    """What the pipeline is called with beside what `tune` gives it; it takes no notice of names unknown to it."""
    own = [name for name in _OWN_OPTIONS if name in options]
    if own:
        raise ArgumentError(
            f"options= is what the pipeline is called with beside {', '.join(_OWN_OPTIONS)}",
            seen={"options": ", ".join(options)},
            do=f"leave out {', '.join(own)}; prompts are the second argument",
        )
    arguments = {} if isinstance(pipe, nn.Module) else inspect.signature(type(pipe).__call__).parameters
    forwards = any(one.kind is one.VAR_KEYWORD for one in arguments.values())
    drops = type(pipe).__module__.startswith("diffusers.")  # what it does not know
    takes_any = not arguments or (forwards and not drops)
    unknown = [] if takes_any else [name for name in options if name not in arguments]
    if unknown:
        near = difflib.get_close_matches(unknown[0], arguments, n=2, cutoff=0.4)
        raise ArgumentError(
            "options= are arguments of the pipeline's call",
            seen={"pipeline": type(pipe).__name__, "unknown": ", ".join(unknown)},
            do=f"write {' or '.join(near)}" if near else "see the pipeline's documentation for its arguments",
        )


def _shorter(pipe: Any, options: Mapping[str, Any]) -> tuple[int, Callable[[int], Generate] | None]:
    """Steps of a pipeline's call, and what makes it take fewer; None where it is told its times one by one."""
    own = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    steps = options.get("num_inference_steps", None if own is None else own.default)
    if not is_whole(steps, 1) or any(options.get(name) is not None for name in ("timesteps", "sigmas")):
        return 0, None
    return steps, lambda count: _pipeline(pipe, {**options, "num_inference_steps": count}, "latent")


def _tell_of_none(steps: int, error: Exception) -> None:
    """Warn that the plain sampler does not run with so many steps."""
    warn(
        "plain sampling with fewer steps could not be compared: the sampler raised an error\n"
        f"  steps: {steps}\n  error: {type(error).__name__}: {first_line(error)}\n"
        "What to do: nothing; the chosen steps stay",
        OtherStepsWarning,
    )


def _tell_if_nearer(tuning: Tuning) -> None:
    """Warn if the plain sampler needs no adaptor for what was asked for: fewer steps do it."""
    chosen = tuning.chosen
    nearer = [one for one in tuning.fewer if one.saved >= chosen.saved and one.error < chosen.error]
    if nearer:
        best = min(nearer, key=lambda one: one.error)
        warn(
            "fewer plain steps are better here than an adaptor: they are nearer to the plain results\n"
            f"  {best.rule}: {percent(best.saved)} fewer MACs, error {percent(best.error)}\n"
            f"  {chosen.rule}: {percent(chosen.saved)} fewer MACs, error {percent(chosen.error)}\n"
            "What to do: sample with fewer steps, without an adaptor; or ask for another saving",
            NoEffectWarning,
        )


def _check_shorter(pipe: Any, unet: nn.Module, shorter: Any, batch: Any, time: str | None) -> None:
    """Raise `ArgumentError` if it gives no sampler that calls this UNet; before minutes of work."""
    generate = shorter(2) if pipe is unet and callable(shorter) else None
    if not callable(generate):
        raise ArgumentError(
            "shorter= is for a UNet: a function of the number of steps that returns a sampler, as generate is one",
            seen={
                "pipe": type(pipe).__name__,
                "shorter": type(shorter).__name__,
                "shorter(2)": type(generate).__name__,
            },
            do="pass shorter=lambda steps: my_sampler(steps); a pipeline has num_inference_steps, and needs none",
        )
    first_call(unet, with_seed(generate), batch, 0, time=time)


def _wrapped_again(home: Path, unet: nn.Module, generate: Generate, batch: Any, time: str | None) -> ClockworkWrapper:
    """The UNet, wrapped as an earlier call has found it best."""
    tuning, own = _saved(home)
    region = choose(first_call(unet, generate, batch, 0, time=time), unet, **own)
    cw = wrap(unet, home, schedule=Schedule.at(tuning.chosen.steps), region=region)  # moves it to the UNet's device
    read: Any = cw.adaptor
    read.tuning = tuning
    return cw


def _save(home: Path, adaptor: CalibratedAdaptor, tuning: Tuning) -> None:
    """Put the result there as a whole: another process may read it, or have written its own meanwhile, which stays."""
    partial = home.with_name(f".{home.name}-{secrets.token_hex(4)}")
    try:
        partial.mkdir()
        adaptor.save_pretrained(partial)
        tuning.save(partial / _FILE)
        for figure in tuning.figures():
            figure.save(partial / "before-after.png")
        if not (home / _FILE).exists():
            shutil.rmtree(home, ignore_errors=True)  # of a version that wrote one file after the other, or nothing
            os.replace(partial, home)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _saved(home: Path) -> tuple[Tuning, dict[str, Any]]:
    """What an earlier call has saved, and the options of `Choice` that find the adaptor's region."""
    try:
        tuning = Tuning.from_json((home / _FILE).read_text(encoding="utf-8"))
        return tuning, CalibratedAdaptor.from_pretrained(home).region_options
    except (ArgumentError, AdaptorError, OSError, UnicodeDecodeError) as error:
        seen = getattr(error, "seen", None) or {"error": first_line(error)}
        raise ArgumentError(
            "folder= has to hold the complete result of an earlier ch.tune, or nothing",
            seen={"folder": home, **seen},
            do=f"delete {home}: the next call tunes anew",
        ) from error


def _home(folder: Path) -> Path:
    """The folder, made before minutes of work whose result is to lie in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            "folder= is a folder that can be written to",
            seen={"folder": folder, "error": first_line(error)},
            do="name another one",
        ) from error
    return folder


def _pipeline(pipe: Any, options: Mapping[str, Any], form: str) -> Generate:
    def generate(batch: Any, seed: int) -> Tensor:
        noise = torch.Generator("cpu").manual_seed(seed)
        with _without_bars(pipe):
            output = pipe(batch, generator=noise, output_type=form, **options)
        latents: Tensor = output[0] if isinstance(output, tuple) else output.images
        return latents

    return generate


@contextlib.contextmanager
def _without_bars(pipe: Any) -> Iterator[None]:
    """No bar of diffusers' own for every run: there are dozens, and `tune` has one for all of them."""
    if not hasattr(pipe, "set_progress_bar_config"):
        yield
        return
    before = dict(getattr(pipe, "_progress_bar_config", {}))  # diffusers has a setter and no getter
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def _guidance(pipe: Any, options: Mapping[str, Any]) -> float | None:
    own = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    scale = options.get("guidance_scale", None if own is None else own.default)
    return float(scale) if isinstance(scale, (int, float)) and scale > 1 else None


def _key(pipe: Any, unet: nn.Module, regions: Sequence[Region] | None, asked: Sequence[Any]) -> str:
    """A folder's name for this model with its weights, a pipeline's scheduler, the regions, and what else is asked for.

    Of a sampler of one's own that is the times of its calls and its code.
    """
    scheduler = getattr(pipe, "scheduler", None)
    parts = [type(pipe).__name__, type(unet).__name__, scheduler, [one.fingerprint for one in regions or ()], *asked]
    shapes = sorted((name, tuple(weights.shape)) for name, weights in unet.named_parameters())
    texts = [*map(told_apart, [*parts, shapes, [_few(weights) for weights in unet.parameters()]]), Tuning.SCHEMA]
    return f"{type(unet).__name__}-{hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]}"


def _times(
    unet: nn.Module, generate: Generate, batch: Any, regions: Sequence[Region] | None, time: str | None
) -> list[float | None]:
    """The times of one run's calls, rounded: who would say otherwise which sampler it is, and in how many steps?"""
    times: list[float | None] = []
    region = regions[0] if regions else choose(first_call(unet, generate, batch, 0, time=time), unet)
    with Watch(unet, region) as watch, watch.observed(_Times(times)), watch.trajectory():
        final(generate, batch, 0)
    return times


class _Times:
    """Notes the time of each call that it observes."""

    def __init__(self, times: list[float | None]) -> None:
        self._times, self._reader = times, TimeReader()

    def before(self, call: UNetCall) -> None:
        """A call is about to run."""

    def after(self, call: UNetCall, outcome: Outcome) -> None:
        """It has run; the first one's time is known only now."""
        value = None if call.time is None else self._reader.read(call.time)[0]
        self._times.append(None if value is None else float(f"{value:.6g}"))


def _few(weights: Tensor) -> list[Any]:
    """Some values spread over it, to tell a model from another one of its architecture; none of weights on meta."""
    if weights.device.type == "meta":
        return []
    flat = weights.detach().flatten()
    some = flat[:: max(flat.numel() // _FEW, 1)][:_FEW]
    return list((some.float() if some.is_floating_point() else some).tolist())
