"""`bench`: the time of a step on this machine, plain and at each clock, next to the MACs; and its report."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn

from clockwork_hooks._numbers import count, percent, shape
from clockwork_hooks._tree import tensors
from clockwork_hooks._version import versions
from clockwork_hooks.adaptors.stand_in import AdaptorLike, is_identity, region_options, resolve_adaptor
from clockwork_hooks.analysis.timing import Timing, device_name, in_turns
from clockwork_hooks.engine.attach import wrap
from clockwork_hooks.engine.wrapper import ClockworkWrapper, check_unet
from clockwork_hooks.errors import ArgumentError, CompileError, NoEffectWarning, is_several, named, whole
from clockwork_hooks.graph.tracing import record
from clockwork_hooks.regions.find import Choice, region_or_choice, split_options
from clockwork_hooks.regions.region import Region
from clockwork_hooks.reports.plots import Plot, plots
from clockwork_hooks.reports.progress import ProgressBar
from clockwork_hooks.reports.report import Report
from clockwork_hooks.reports.tables import Table, table
from clockwork_hooks.schedule import check_clock

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One way of running the UNet.

    Attributes:
        mode: "eager", "compile" (torch.compile) or "cudagraphs" (captured).
        clock: 1 for the plain UNet.
        seconds_per_step: of a trajectory, over its steps: the median of the rounds.
        low, high: the quartiles.
        rounds: how many trajectories were timed.
        full_passes, adaptor_passes: in a trajectory.
        macs_ratio: MACs that ran to those of full passes alone; the adaptor's included, attention products counted.
        speed_up: against plain in the same mode.
        speed_up_to_eager: against plain in eager mode; None where that was not measured.
    """

    mode: str
    clock: int
    seconds_per_step: float
    low: float
    high: float
    rounds: int
    full_passes: int
    adaptor_passes: int
    macs_ratio: float
    speed_up: float
    speed_up_to_eager: float | None

    @property
    def promised(self) -> float:
        """The speed-up if time went as MACs."""
        return 1 / self.macs_ratio

    @property
    def time_to_macs(self) -> float:
        """The share of the time over the share of the MACs: 1 where the time fell as they did, more where less."""
        return 1 / (self.speed_up * self.macs_ratio)


@dataclass(frozen=True, slots=True)
class Benchmark(Report):
    """What `bench` measured.

    Attributes:
        model: class name of the UNet.
        sample: shape of the sample.
        region: one line about what adaptor passes skip.
        adaptor: class name, or "identity".
        steps: of a trajectory.
        rows: for each mode plain first, then the clocks.
        failed: mode → why it could not be measured.
        settings: device, dtype, threads, versions, notes.
    """

    SCHEMA = "bench/1"

    model: str
    sample: tuple[int, ...]
    region: str
    adaptor: str
    steps: int
    rows: tuple[BenchRow, ...]
    failed: Mapping[str, str]
    settings: Mapping[str, Any] = field(repr=False)

    def table(self) -> Table:
        """A row for each way of running."""
        more = any(row.mode != "eager" for row in self.rows)
        rows = [
            (
                row.mode,
                "plain" if row.clock == 1 else row.clock,
                _ms(row.seconds_per_step),
                f"{_ms(row.low)}–{_ms(row.high)}",
                None if row.clock == 1 else f"{row.speed_up:.2f}×",
                *([None if row.speed_up_to_eager is None else f"{row.speed_up_to_eager:.2f}×"] if more else []),
                percent(row.macs_ratio),
                None if row.clock == 1 else f"{row.promised:.2f}×",
                None if row.clock == 1 else f"{row.time_to_macs:.2f}",
            )
            for row in self.rows
        ]
        s = self.settings
        notes = (
            f"{count(self.steps, 'step')}, adaptor {self.adaptor}, rounds in turns: {self.rows[0].rounds}. "
            f"{s['device']}, {s['dtype']}, {count(s['threads'], 'thread')}, torch {s['versions']['torch']}.",
            "Promised: the speed-up if time fell as MACs do (attention products counted). To MACs: 1 where it did, 1.2 "
            "where a step takes 20% longer than that. Only the UNet is timed: no sampler, no decoder.",
            f"Skipped on adaptor passes: {self.region}.",
            *(f"{mode} could not be measured: {why}" for mode, why in self.failed.items()),
            *s["notes"],
        )
        heads = ["mode", ">clock", ">ms/step", ">quartiles", ">speed-up", ">MACs", ">promised", ">to MACs"]
        heads[5:5] = [">to eager"] if more else []  # with it, 80 columns are full
        title = f"{self.model}, sample {shape(self.sample)}, on this machine"
        return table(title, heads, rows, notes=notes)

    def data(self) -> dict[str, Any]:
        """All fields; times in seconds."""
        names = [name for name in Benchmark.__slots__ if name != "rows"]
        rows = [
            {name: getattr(row, name) for name in (*BenchRow.__slots__, "promised", "time_to_macs")}
            for row in self.rows
        ]
        return {**{name: getattr(self, name) for name in names}, "rows": rows}

    def figures(self) -> Sequence[Plot]:
        """Time a step, with what the MACs promise."""
        return plots(Plot(self._bars, "Time a step of each way of running, with what its MACs promise"))

    def _bars(self) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 1.1 + 0.34 * len(self.rows)), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        plain = {row.mode: row.seconds_per_step for row in self.rows if row.clock == 1}
        for k, row in enumerate(self.rows):
            spread = [[1e3 * (row.seconds_per_step - row.low)], [1e3 * (row.high - row.seconds_per_step)]]
            colour = "#8a94a3" if row.clock == 1 else "#c77f1f"
            axes.barh(k, 1e3 * row.seconds_per_step, xerr=spread, color=colour, height=0.6, ecolor="#5b7fae")
            if row.clock > 1:
                name = "if time fell as MACs do" if k == 1 else None
                axes.plot(1e3 * plain[row.mode] * row.macs_ratio, k, "|", color="#b3411d", markersize=16, label=name)
        axes.set_yticks(range(len(self.rows)), [f"{row.mode}, {clock_name(row.clock)}" for row in self.rows])
        axes.invert_yaxis()
        axes.set_xlabel("ms a step, with quartiles")
        axes.grid(alpha=0.3, axis="x")
        figure.legend(loc="outside upper right", fontsize=8)  # not upon the quartiles
        return figure


def clock_name(clock: int) -> str:
    """How a way of running is called; clock 1 is the plain UNet."""
    return "plain" if clock == 1 else f"clock {clock}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


MODES = ("eager", "compile", "cudagraphs")


@dataclass(frozen=True, slots=True)
class _Side:
    """A UNet that runs one trajectory when it is called."""

    unet: nn.Module
    cw: ClockworkWrapper | None
    clock: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    steps: int

    @torch.no_grad()
    def __call__(self) -> None:
        if self.cw is None:
            for _ in range(self.steps):
                self.unet(*self.args, **self.kwargs)
            return
        self.cw.reset()
        for _ in range(self.steps):
            with self.cw.step():
                self.unet(*self.args, **self.kwargs)


def bench(
    unet: nn.Module,
    /,
    *args: Any,
    clocks: Iterable[int] = (2, 3, 4),
    adaptor: AdaptorLike = None,
    region: Region | Choice | None = None,
    steps: int = 12,
    rounds: int = 5,
    modes: Iterable[str] = ("eager",),
    notes: Iterable[str] = (),
    console: Console | None = None,
    **kwargs: Any,
) -> Benchmark:
    """Time the UNet on this machine, plain and with Clockwork.

    A trajectory is `steps` calls with these arguments, each declared a step; trajectories of all sides are run in
    turns, after one of each that is not timed. Every side is a copy that shares the weights; `unet` stays as it is.

    Args:
        unet: any UNet, where it is to run, in its dtype.
        *args: the arguments of one call.
        clocks: ints of at least 2.
        adaptor: stands in for the region, as in `wrap`; None for the identity.
        region: a `Region` or a `Choice`; None for the one that the adaptor was made for, or else the default one. The
            options of `Choice` may be passed one by one instead.
        steps: of a trajectory; a multiple of all clocks counts each of them fairly.
        rounds: trajectories of each side.
        modes: "eager"; "compile" runs both passes under torch.compile; "cudagraphs" captures them. Plain is run in
            the same mode.
        notes: sentences for the report.
        console: where the progress bar goes; None for standard error.
        **kwargs: arguments of the call by name.

    Returns:
        The benchmark, a `Report`.

    Raises:
        ArgumentError: an option is outside its rule, or the UNet is on the meta device.
        WrapError: `unet` is no module.
        AdaptorError: the adaptor cannot be called or loaded, or does not fit the region.
        RegionNotFoundError: nothing can be skipped.
        CompileError: no mode could be measured.

    Example:
        >>> from clockwork_hooks.models import load_model
        >>> unet, args, kwargs = load_model("ddpm-cifar10", tiny=True, device="cpu")
        >>> report = bench(unet, *args, clocks=(2,), steps=2, rounds=1, **kwargs)
        >>> [(row.clock, row.full_passes, row.adaptor_passes) for row in report.rows]
        [(1, 2, 0), (2, 1, 1)]

    Source: arXiv 2312.08128, Sec. 5 and Tab. 1 (latencies), Appendix A (FLOPs).
    """
    options, kwargs = split_options(unet, kwargs, named(bench))
    wanted = region_or_choice(region, options)
    tried, chosen = _several("clocks", clocks), _several("modes", modes)
    _check(unet, tried, chosen, steps, rounds)
    said: list[Any] = list(notes) if is_several(notes) else [notes]
    if not all(isinstance(note, str) for note in said):
        raise ArgumentError("notes are sentences", seen={"notes": repr(notes)[:80]}, do='pass notes=["a busy machine"]')
    weight = next((t for t in [*unet.parameters(), *tensors((args, kwargs))]), torch.empty(0))
    device = str(weight.device)
    if device == "meta":
        raise ArgumentError(
            "a time can be measured only on a device that computes",
            seen={"device": device},
            do="move the UNet to a device",
        )
    used = resolve_adaptor(adaptor)
    with torch.no_grad():
        wanted = Choice(**region_options(used)) if wanted == Choice() else wanted
        region = wanted.find(record(unet, args, kwargs), unet) if isinstance(wanted, Choice) else wanted
    if region.uncounted:
        said.append(f"MACs are a lower bound; not counted: {', '.join(region.uncounted)}.")
    ran: dict[tuple[str, int], tuple[Timing, ClockworkWrapper | None]] = {}
    failed: dict[str, str] = {}
    with ProgressBar(console) as bar:
        task = bar.add_task("", total=len(chosen) * (1 + len(tried)) * (1 + rounds))
        for mode in chosen:

            def tell(name: str, mode: str = mode) -> None:
                bar.update(task, advance=1, description=f"{mode}, {name}")

            try:
                sides = [_side(unet, clock, adaptor, region, mode, args, kwargs, steps) for clock in (1, *tried)]
                runs: dict[str, Callable[[], Any]] = {clock_name(side.clock): side for side in sides}
                times = in_turns(runs, device, rounds=rounds, tell=tell)
            except (CompileError, ArgumentError) as error:
                failed[mode] = " ".join(str(error).split())[:300]
                if len(chosen) == 1:
                    raise
                continue
            ran |= {(mode, side.clock): (times[clock_name(side.clock)], side.cw) for side in sides}
    if not ran:
        raise CompileError("at least one mode has to work", seen=failed, do='add "eager" to modes')
    return Benchmark(
        model=type(unet).__name__,
        sample=tuple(tensors((args, kwargs))[0].shape),
        region=region.line,
        adaptor="identity" if is_identity(adaptor) else type(used).__name__,
        steps=steps,
        rows=tuple(_row(mode, clock, ran, steps) for mode, clock in ran),
        failed=failed,
        settings={
            "device": device_name(device),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "notes": said,
        },
    )


def twin(unet: nn.Module) -> Any:
    """Another UNet on the same weights: wrapping one leaves the other alone, and it costs no memory."""
    shared = [*unet.parameters(), *unet.buffers()]
    return copy.deepcopy(unet, {id(tensor): tensor for tensor in shared})


def _side(
    unet: nn.Module,
    clock: int,
    adaptor: Any,
    region: Region,
    mode: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    steps: int,
) -> _Side:
    """Plain eager is the UNet as it is; plain in another mode is the wrapper's own full pass, at every step."""
    own = twin(unet)
    if mode == "eager" and clock == 1:
        return _Side(own, None, clock, args, kwargs, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        cw = wrap(own, adaptor, region=region, clock=clock)
    if mode != "eager":
        cw.compile(None if mode == "compile" else mode)
    return _Side(own, cw, clock, args, kwargs, steps)


def _row(
    mode: str,
    clock: int,
    ran: Mapping[tuple[str, int], tuple[Timing, ClockworkWrapper | None]],
    steps: int,
) -> BenchRow:
    timing, cw = ran[mode, clock]
    last = cw.stats.trajectories[-1] if cw is not None and clock > 1 else None
    eager = ran["eager", 1][0] if ("eager", 1) in ran else None
    return BenchRow(
        mode=mode,
        clock=clock,
        seconds_per_step=timing.median / steps,
        low=timing.low / steps,
        high=timing.high / steps,
        rounds=timing.runs,
        full_passes=last.full_passes if last else steps,
        adaptor_passes=last.adaptor_passes if last else 0,
        macs_ratio=last.macs_run / last.macs_plain if last else 1.0,
        speed_up=ran[mode, 1][0].median / timing.median,
        speed_up_to_eager=eager.median / timing.median if eager else None,
    )


def _several(name: str, values: Any) -> tuple[Any, ...]:
    if not is_several(values):
        raise ArgumentError(
            f"{name} are several, to measure side by side",
            seen={name: repr(values)},
            do='pass clocks=(2, 4), modes=("eager", "compile")',
        )
    return tuple(values)


def _check(unet: Any, clocks: tuple[Any, ...], modes: tuple[str, ...], steps: Any, rounds: Any) -> None:
    if not isinstance(unet, nn.Module):  # one that is wrapped may be measured: its copies are not
        check_unet(unet)
    for clock in clocks:
        check_clock(clock)
    if not clocks or 1 in clocks or len(set(clocks)) < len(clocks):
        raise ArgumentError(
            "clocks to measure are different ints of at least 2",
            seen={"clocks": clocks},
            do="pass {clocks}",
            arguments={"clocks": (2, 4)},
        )
    wrong = [mode for mode in modes if mode not in MODES]
    if wrong or not modes or len(set(modes)) < len(modes):
        raise ArgumentError(
            f"a mode is one of {', '.join(MODES)}, each measured once",
            seen={"modes": modes},
            do='pass modes=("eager",)',
        )
    for name, value, least in (("steps", steps, max(clocks)), ("rounds", rounds, 1)):
        whole(name, value, least=least, example=3 * least)
