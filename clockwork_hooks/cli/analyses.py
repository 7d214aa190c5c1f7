"""The commands that sample and measure: `drift` of what regions emit, `perturb` feature maps, `plan` the steps."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer

from clockwork_hooks.cli.app import MEASURE, app, epilog
from clockwork_hooks.cli.delivery import deliver
from clockwork_hooks.cli.options import Adaptors, Clocks, Format, FormatOption, OutFolder
from clockwork_hooks.cli.sampling import DemoBatch, DemoSteps, Sampled, Seeds, load_sampler

__all__ = ["drift", "perturb", "plan"]

CLOCKS, SEEDS = (2, 3, 4), (0,)
DRIFT_EXAMPLES = (
    "drift   (the demo model)",
    "drift my_package.sampler:build --clock 2 --clock 4 --out my-folder",
    "drift my_package.sampler:build --adaptor identity --adaptor my-adaptor",
)


@app.command(epilog=epilog(*DRIFT_EXAMPLES), rich_help_panel=MEASURE)
def drift(
    model: Sampled = "demo",
    steps: DemoSteps = 8,
    batch: DemoBatch = 2,
    seed: Seeds = None,
    format: FormatOption = Format.table,
    out: OutFolder = None,
    clock: Clocks = None,
    adaptor: Adaptors = None,
) -> None:
    """Measure how every region's exit changes along the trajectory, and what keeping it does to the result."""
    from clockwork_hooks.analysis.drift import measure_drift

    loaded = load_sampler(model, steps, batch)
    adaptors = tuple(adaptor) if adaptor else None
    result = measure_drift(*loaded, adaptor=adaptors, clocks=tuple(clock or CLOCKS), seeds=tuple(seed or SEEDS))
    deliver(result, format, "drift", out)


PERTURB_EXAMPLES = (
    "perturb   (the demo model; some minutes on a CPU)",
    'perturb --map "up 16×16" --map "up 32×32" --start 1 --start 5 --batch 2',
    "perturb my_package.sampler:build --alpha 0.7 --out my-folder",
)


class Statistics(str, Enum):
    """Whose mean and deviation the noise has."""

    channel = "channel"
    map = "map"


@app.command(epilog=epilog(*PERTURB_EXAMPLES), rich_help_panel=MEASURE)
def perturb(
    model: Sampled = "demo",
    steps: DemoSteps = 8,
    batch: DemoBatch = 2,
    seed: Seeds = None,
    format: FormatOption = Format.table,
    out: OutFolder = None,
    alpha: Annotated[float, typer.Option(help="Share of a map's variance that stays its own, 0 to 1.")] = 0.3,
    statistics: Annotated[
        Statistics, typer.Option(help="The noise has the mean and variance of each channel, or of the whole map.")
    ] = Statistics.channel,
    map: Annotated[
        list[str] | None, typer.Option(help='A map by its name, as "up 16×16"; repeatable.', show_default="all")
    ] = None,
    start: Annotated[
        list[int] | None, typer.Option(help="First disturbed step, from 1; repeatable.", show_default="about ten")
    ] = None,
) -> None:
    """Disturb each feature map from each step on, and measure how far the result moves (the paper's Sec. 3)."""
    from clockwork_hooks.analysis.robustness import measure_robustness

    loaded = load_sampler(model, steps, batch)
    options = {"alpha": alpha, "maps": map or None, "starts": start or None, "seeds": tuple(seed or SEEDS)}
    result = measure_robustness(*loaded, statistics=statistics.value, **options)  # type: ignore[arg-type]
    deliver(result, format, "perturb", out)


PLAN_EXAMPLES = (
    "plan --min-saving 0.4   (the demo model; some minutes on a CPU)",
    "plan my_package.sampler:build --max-error 0.05 --weigh ms --adaptor identity --adaptor my-adaptor",
)


class Unit(str, Enum):
    """What savings are measured in."""

    macs = "MACs"
    ms = "ms"


@app.command(epilog=epilog(*PLAN_EXAMPLES), rich_help_panel=MEASURE)
def plan(
    model: Sampled = "demo",
    steps: DemoSteps = 8,
    batch: DemoBatch = 2,
    seed: Seeds = None,
    format: FormatOption = Format.table,
    out: OutFolder = None,
    max_error: Annotated[
        float | None, typer.Option(help="Relative L2 error of the result that is allowed, 0 to 1.", show_default=False)
    ] = None,
    min_saving: Annotated[
        float | None,
        typer.Option(help="Share of a trajectory's MACs that must be saved. One of the two.", show_default=False),
    ] = None,
    weigh: Annotated[Unit, typer.Option(help="Savings are of MACs, or of the time spent in the UNet.")] = Unit.macs,
    adaptor: Adaptors = None,
    clock: Clocks = None,
    adaptive: Annotated[bool, typer.Option("--adaptive", help="Measure adaptive schedules too.")] = False,
    probes: Annotated[int, typer.Option(help="Steps at which one adaptor step alone is measured.", min=1)] = 8,
) -> None:
    """Choose region, adaptor and steps from measured error against MACs or ms, and verify the choice on fresh noise.

    The plan is used by wrap(unet, plan=clockwork_hooks.Plan.from_json(open("clockwork-plan/plan.json").read())).
    """
    from clockwork_hooks.analysis.planning import plan as make

    loaded = load_sampler(model, steps, batch)
    options: dict[str, Any] = {"max_error": max_error, "min_saving": min_saving, "weigh": weigh.value}
    options |= {"probes": probes, "adaptive": adaptive, "adaptor": adaptor or None}
    options |= {"clocks": tuple(clock or CLOCKS), "seeds": tuple(seed or SEEDS)}
    result = make(*loaded, **options)
    deliver(result, format, "plan", out)
