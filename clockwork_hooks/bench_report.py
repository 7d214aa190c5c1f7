"""What `bench` measured, and how it prints, draws and is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clockwork_hooks.plots import Plot, plots
from clockwork_hooks.rendering import Report
from clockwork_hooks.report import Table, percent, shape, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BenchRow", "Benchmark", "clock_name"]


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
            f"{self.steps} steps, adaptor {self.adaptor}, rounds in turns: {self.rows[0].rounds}. "
            f"{s['device']}, {s['dtype']}, {s['threads']} threads, torch {s['versions']['torch']}.",
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
                name = "if time went as MACs" if k == 1 else None
                axes.plot(1e3 * plain[row.mode] * row.macs_ratio, k, "|", color="#b3411d", markersize=16, label=name)
        axes.set_yticks(range(len(self.rows)), [f"{row.mode}, {clock_name(row.clock)}" for row in self.rows])
        axes.invert_yaxis()
        axes.set_xlabel("ms a step, with quartiles")
        axes.grid(alpha=0.3, axis="x")
        axes.legend(fontsize=8)
        return figure


def clock_name(clock: int) -> str:
    """How a way of running is called; clock 1 is the plain UNet."""
    return "plain" if clock == 1 else f"clock {clock}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"
