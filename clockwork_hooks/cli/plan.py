"""`clockwork-hooks plan`: which region, and which steps may use the adaptor, for a given error or saving."""

from __future__ import annotations

from typing import Annotated

import typer

from clockwork_hooks.cli.app import EXIT_CODES, app
from clockwork_hooks.cli.sampling import Out, Prompts, Sampled, Seeds, Steps, draw, load_sampler, write

__all__ = ["plan"]

EPILOG = f"""Examples:

clockwork-hooks plan --min-saving 0.4         (the demo model; some minutes on a CPU)

clockwork-hooks plan my_package.sampler:build --max-error 0.05 --out my-folder

The plan is used by:  wrap(unet, plan=clockwork_hooks.Plan.from_json(open("my-folder/plan.json").read()))

{EXIT_CODES}
"""


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
    clock: Annotated[
        list[int] | None, typer.Option(help="A clock to compare with; repeatable.", min=2, show_default="2, 3 and 4")
    ] = None,
    probes: Annotated[int, typer.Option(help="Steps at which one adaptor step alone is measured.", min=1)] = 8,
    steps: Steps = 8,
    prompts: Prompts = 2,
    seed: Seeds = None,
    out: Out = "clockwork-plan",
) -> None:
    """Choose region and adaptor steps from measured error against MACs, and verify the choice on fresh noise."""
    from clockwork_hooks.analysis.plan import plan as make

    loaded = load_sampler(model, steps, prompts)
    options = {"max_error": max_error, "min_saving": min_saving, "probes": probes}
    clocks, seeds = tuple(clock or (2, 3, 4)), tuple(seed or (0,))
    result = make(*loaded, clocks=clocks, seeds=seeds, **options)  # type: ignore[arg-type]
    folder = write(out, "plan", result)
    draw(result.plot, folder / "plan.png")
