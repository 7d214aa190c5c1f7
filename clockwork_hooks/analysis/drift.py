"""`measure_drift`: how much does what a region emits change from step to step, and what would keeping it cost?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import nn

from clockwork_hooks._generate import Generate, with_seed
from clockwork_hooks._numbers import count, percent
from clockwork_hooks.analysis.sampling import (
    Adaptors,
    Ages,
    Runs,
    candidates,
    check_clocks,
    check_runs,
    first_call,
    follow,
)
from clockwork_hooks.errors import ArgumentError, named_options
from clockwork_hooks.regions.region import Region
from clockwork_hooks.reports.plots import Plot, plots
from clockwork_hooks.reports.progress import ProgressBar
from clockwork_hooks.reports.report import FieldReport
from clockwork_hooks.reports.tables import Table, table
from clockwork_hooks.schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Drift(FieldReport):
    """How regions' exits change over a trajectory. A step is None where there is nothing to compare it with.

    A candidate is a region with its adaptor; the name says which adaptor, unless it is the identity.

    Attributes:
        regions: name of the candidate → one line about the region, widest first.
        shares: name → share of a full pass's MACs that the region holds.
        adaptors: name → "identity", or the class of the adaptor.
        steps: denoising steps of the sampler.
        changes: name → ‖r(s) - r(s-1)‖ / ‖r(s)‖ of the exit r for each step s from 1.
        cosines: name → cosine of r(s) and r(s-1), for each step.
        errors: name → for each age from 1: ‖r̂(s) - r(s)‖ / ‖r(s)‖ for each step s from 1, where r̂(s) is what the
            adaptor makes if s - age was the last full step; on undisturbed trajectories. None too where a call is full
            whatever the schedule says, as a sampler's first steps may be (docs/timeline.md).
        entries: name → for each age: how far the region's entry is from what it was so many steps before, relative to
            that: what `Schedule.adaptive` compares.
        effects: name → clock → what that clock does to the final result: ‖x̂ - x‖ / ‖x‖, a mean over samples.
        samples: how many results each effect is a mean of.
        seeds: of the noise that sampling starts from.
    """

    SCHEMA = "drift/1"

    regions: Mapping[str, str]
    shares: Mapping[str, float]
    adaptors: Mapping[str, str]
    steps: int
    changes: Mapping[str, tuple[float | None, ...]]
    cosines: Mapping[str, tuple[float | None, ...]]
    errors: Mapping[str, Ages]
    entries: Mapping[str, Ages]
    effects: Mapping[str, Mapping[int, float]]
    samples: int
    seeds: tuple[int, ...]

    def error(self, name: str, clock: int) -> tuple[float | None, ...]:
        """What the adaptor is off by at each adaptor step of a clock, None at full steps.

        Raises:
            ArgumentError: no such candidate, or the clock is above the largest that was measured.
        """
        if name not in self.errors:
            raise ArgumentError(
                "errors are known for the candidates that were measured",
                seen={"name": name, "candidates": "; ".join(self.regions)},
                do="pass one of these",
            )
        if not 2 <= clock <= len(self.errors[name]) + 1:
            raise ArgumentError(
                "errors are known for the clocks that were measured",
                seen={"clock": clock, "measured": f"2 to {len(self.errors[name]) + 1}"},
                do="measure with clocks=(...) up to this one",
            )
        ages = ((s - 1) % clock for s in range(1, self.steps + 1))
        return tuple(self.errors[name][age - 1][s] if age else None for s, age in enumerate(ages))

    def table(self) -> Table:
        """A row a candidate: typical change and cosine, and for each clock the error at the exit and in the result."""
        clocks = sorted({clock for effects in self.effects.values() for clock in effects})
        rows = [
            (
                name,
                percent(_typical(self.changes[name])),
                f"{_typical(self.cosines[name]):.3f}",
                *(percent(_typical(self.error(name, clock))) for clock in clocks),
                *(percent(self.effects[name].get(clock)) for clock in clocks),
            )
            for name in self.regions
        ]
        heads = (
            *("candidate", ">change a step", ">cosine"),
            *(f">exit, clock {clock}" for clock in clocks),
            *(f">result, clock {clock}" for clock in clocks),
        )
        notes = (
            f"Change: median over {count(self.steps, 'step')} of ‖r(s) - r(s-1)‖/‖r(s)‖ at the region's exit r. Exit: "
            "median over a clock's adaptor steps of ‖r̂(s) - r(s)‖/‖r(s)‖, on undisturbed trajectories. Result: "
            f"relative L2 error of the final result, mean of {count(self.samples, 'sample')}.",
            "A larger error at the exit can be a smaller one of the result: the exit's is relative to the exit alone, "
            "the result mixes in skips that are fresh, later full steps correct what is left, and an adaptor that was "
            "trained on the output has made the output's error small.",
            *(f"{name}: {line}; {self.adaptors[name]}." for name, line in self.regions.items()),
        )
        return table("Drift", heads, rows, notes=notes)

    def plot(self, path: str | Path) -> None:
        """Heat maps, candidates by steps (PNG, SVG or PDF; needs matplotlib)."""
        self._heat_map().save(path)

    def figures(self) -> Sequence[Plot]:
        """The heat maps."""
        return plots(self._heat_map())

    def _heat_map(self) -> Plot:
        return Plot(lambda: heat_map(self), "Relative change of each region's exit at each step, and errors by clock")


@named_options
def measure_drift(
    unet: nn.Module,
    generate: Generate,
    conditions: Iterable[Any],
    *,
    regions: Iterable[Region] | None = None,
    adaptor: Adaptors = None,
    clocks: Sequence[int] = (2, 3, 4),
    seeds: Sequence[int] = (0,),
    console: Console | None = None,
) -> Drift:
    """Measure how regions' exits change along real trajectories, and what keeping them does there and to the result.

    One run of the sampler serves all candidates; each clock's effect on the result is one more run.

    Args:
        unet: what `generate` calls; not wrapped.
        generate: your own sampling code: `generate(batch, seed)` draws its noise from the seed and returns one tensor,
            samples first. `generate(batch)` serves too: the random numbers that it draws are seeded around each call.
        conditions: batches of whatever `generate` takes.
        regions: candidates, from `find_regions`; None for all nested ones, or the one that an adaptor was made for.
        adaptor: what stands in for a region, or a list of several to compare; as `wrap` takes
            them: None for the identity, or the folder of a saved one.
        clocks: whose errors and effects are measured.
        seeds: of the noise that sampling starts from.
        console: where the progress bar goes; None for standard error.

    Returns:
        The drift; `.plot(...)` draws heat maps.

    Raises:
        ArgumentError: an option is outside its rule, or `generate` never calls the UNet.
        AdaptorError: an adaptor fits none of the regions.
        RegionNotFoundError: the UNet has no region.

    Example:
        >>> import torch
        >>> from diffusers import UNet2DModel
        >>> from clockwork_hooks import measure_drift
        >>> blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        >>> unet = UNet2DModel(16, block_out_channels=(8, 32), norm_num_groups=8, **blocks).eval()
        >>> def generate(count, seed):
        ...     x = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        ...     for t in (900, 600, 300, 0):
        ...         x = x - 0.1 * unet(x, t).sample
        ...     return x
        >>> drift = measure_drift(unet, generate, [2], clocks=(2,))
        >>> name = next(iter(drift.regions))
        >>> [step is None for step in drift.changes[name]]
        [True, False, False, False]
        >>> [step is None for step in drift.error(name, clock=2)]
        [True, False, True, False]

    Source: arXiv 2312.08128, Sec. 3 and 4.1 (low-resolution features change slowly).
    """
    batches = check_runs(generate, conditions, seeds)
    generate = with_seed(generate)
    check_clocks(clocks)
    pairs = candidates(first_call(unet, generate, batches[0], seeds[0]), unet, regions, adaptor)
    runs = Runs(unet, generate, [(batch, seed) for seed in seeds for batch in batches])
    effects: dict[str, dict[int, float]] = {}
    with ProgressBar(console) as bar:
        task = bar.add_task("drift", total=len(runs.runs) + len(pairs) * len(clocks))
        steps, series = follow(runs, pairs, max(clocks) - 1, lambda: bar.advance(task))
        for one in pairs:
            for clock in clocks:
                bar.update(task, description=f"{one.name}, clock {clock}")
                effects.setdefault(one.name, {})[clock] = runs.outcome(one, Schedule.every(clock)).error
                bar.advance(task)
    return Drift(
        regions={one.name: one.region.line for one in pairs},
        shares={one.name: one.region.macs_share for one in pairs},
        adaptors={one.name: one.adaptor_name for one in pairs},
        steps=steps,
        changes={name: one.changes for name, one in series.items()},
        cosines={name: one.cosines for name, one in series.items()},
        errors={name: one.errors for name, one in series.items()},
        entries={name: one.entries for name, one in series.items()},
        effects=effects,
        samples=sum(len(reference) for reference in runs.plain),
        seeds=tuple(seeds),
    )


def _typical(values: Iterable[float | None]) -> float:
    """The median: the first steps may be off by many times what later ones are."""
    numbers = [value for value in values if value is not None]
    return median(numbers) if numbers else 0.0


def heat_map(drift: Drift) -> Figure:
    """Candidates by steps: how every region's exit changes, and below it what each clock's adaptor steps are off by.

    On a logarithmic scale: in the first steps some exits change by many times what they do later on.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    names = list(drift.regions)
    clocks = sorted({clock for effects in drift.effects.values() for clock in effects})
    panels = [("‖r(s) - r(s-1)‖ / ‖r(s)‖ at the exit", [drift.changes[name] for name in names])]
    panels += [(f"error at the exit, clock {n}", [drift.error(name, n) for name in names]) for n in clocks]
    size = (min(14, 4.2 + 0.3 * drift.steps), 0.4 + len(panels) * (0.5 + 0.3 * len(names)))
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    cells = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    numbers = [value for _, rows in panels for row in rows for value in row if value] or [1.0]
    scale = LogNorm(max(min(numbers), 1e-3 * max(numbers)), max(numbers), clip=True)
    extent = (0.5, drift.steps + 0.5, len(names), 0)
    for axes, (title, rows) in zip(cells, panels, strict=True):
        values = [[float("nan") if value is None else value for value in row] for row in rows]
        image = axes.imshow(values, aspect="auto", cmap="magma", norm=scale, extent=extent, interpolation="none")
        axes.set_facecolor("0.85")
        axes.set_yticks([k + 0.5 for k in range(len(names))], names, fontsize=8)
        axes.set_title(title, fontsize=9, loc="left")
    cells[-1].set_xlabel("denoising step s")
    cells[-1].xaxis.get_major_locator().set_params(integer=True)
    ticks = LogLocator(subs=(1.0, 2.0, 5.0))
    percents = FuncFormatter(lambda share, _: f"{100 * share:g}%")
    bar = figure.colorbar(image, ax=list(cells), ticks=ticks, format=percents)
    bar.minorticks_off()  # theirs would be written as powers of ten
    return figure
