"""`clockwork-hooks plan`: which region, and which steps may use the adaptor, for a given error or saving."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer

from clockwork_hooks.cli.app import EXIT_CODES, app
from clockwork_hooks.cli.sampling import (
    Adaptors,
    Clocks,
    Out,
    Prompts,
    Sampled,
    Seeds,
    Steps,
    draw,
    load_sampler,
    shared,
    write,
)

__all__ = ["plan"]

EPILOG = f"""Examples:

clockwork-hooks plan --min-saving 0.4         (the demo model; some minutes on a CPU)

clockwork-hooks plan my_package.sampler:build --max-error 0.05 --weigh ms --adaptor identity --adaptor my-adaptor

The plan is used by:  wrap(unet, plan=clockwork_hooks.Plan.from_json(open("my-folder/plan.json").read()))

{EXIT_CODES}
"""


class Unit(str, Enum):
    """What savings are measured in."""

    macs = "MACs"
    ms = "ms"


@app.command(epilog=EPILOG)
def plan(
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
    adaptive: Annotated[bool, typer.Option(help="Measure adaptive schedules too.")] = False,
    probes: Annotated[int, typer.Option(help="Steps at which one adaptor step alone is measured.", min=1)] = 8,
    steps: Steps = 8,
    prompts: Prompts = 2,
    seed: Seeds = None,
    out: Out = "clockwork-plan",
) -> None:
    """Choose region, adaptor and steps from measured error against MACs or ms, and verify the choice on fresh noise."""
    from clockwork_hooks.analysis.planner import plan as make

    loaded = load_sampler(model, steps, prompts)
    options: dict[str, Any] = {"max_error": max_error, "min_saving": min_saving, "weigh": weigh.value}
    options |= {"probes": probes, "adaptive": adaptive} | shared(adaptor, clock, seed)
    result = make(*loaded, **options)
    folder = write(out, "plan", result)
    draw(result.plot, folder / "plan.png")
