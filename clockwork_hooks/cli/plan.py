"""`clockwork-hooks plan`: which region, and which steps may use the adaptor, for a given error or saving."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer

from clockwork_hooks.cli.app import MEASURE, app, epilog
from clockwork_hooks.cli.delivery import deliver
from clockwork_hooks.cli.options import Adaptors, Clocks, OutputFolder, spread
from clockwork_hooks.cli.sampling import Sampled, Sampling, load_sampler

__all__ = ["plan"]

EXAMPLES = (
    "plan --min-saving 0.4   (the demo model; some minutes on a CPU)",
    "plan my_package.sampler:build --max-error 0.05 --weigh ms --adaptor identity --adaptor my-adaptor",
)


class Unit(str, Enum):
    """What savings are measured in."""

    macs = "MACs"
    ms = "ms"


@app.command(epilog=epilog(*EXAMPLES), rich_help_panel=MEASURE)
@spread
def plan(
    sampling: Sampling,
    output: OutputFolder,
    model: Sampled = "demo",
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
    from clockwork_hooks.analysis.planner import plan as make

    loaded = load_sampler(model, sampling)
    options: dict[str, Any] = {"max_error": max_error, "min_saving": min_saving, "weigh": weigh.value}
    options |= {"probes": probes, "adaptive": adaptive} | sampling.shared(adaptor, clock)
    result = make(*loaded, **options)
    deliver(result, output, "plan")
