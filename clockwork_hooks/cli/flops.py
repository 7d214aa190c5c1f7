"""`clockwork-hooks flops`: what passes and trajectories cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clockwork_hooks.cli.app import LOOK, app, epilog
from clockwork_hooks.cli.delivery import deliver
from clockwork_hooks.cli.options import Choosing, Guidance, Loading, Model, Output, Steps, spread

__all__ = ["flops"]

EXAMPLES = (
    "flops sd15 --guidance",
    "flops sd15 --cut paper --no-attention --guidance   (the paper's own numbers)",
    "flops path/to/unet --size 96 --steps 20 --clock 4 --format md",
    "flops sdxl --out sdxl.html   (a page with the picture of the UNet)",
    "flops my_package.unet:build --check budget.json   (in CI: exit code 1 over budget)",
)


@app.command(epilog=epilog(*EXAMPLES), rich_help_panel=LOOK)
@spread
def flops(
    model: Model,
    load: Loading,
    region: Choosing,
    output: Output,
    clock: Annotated[int, typer.Option(help="One full pass every so many steps.", min=1)] = 2,
    steps: Steps = 8,
    guidance: Guidance = False,
    attention: Annotated[
        bool, typer.Option("--attention/--no-attention", help="Count attention products; the paper leaves them out.")
    ] = True,
    norms: Annotated[bool, typer.Option("--norms", help="Add fvcore's estimate for normalisations.")] = False,
    depth: Annotated[int, typer.Option(help="Names of a module path that the table by module keeps.", min=1)] = 2,
    check: Annotated[
        Path | None,
        typer.Option(
            help='A JSON file of limits, e.g. {"trajectory_macs": 2.5e12}: exit with 1 if a count is over its limit.',
            show_default=False,
        ),
    ] = None,
) -> None:
    """Count a full pass, an adaptor pass and a trajectory: by level, operator and module."""
    from clockwork_hooks.analysis.flops import flops_report
    from clockwork_hooks.cli.budget import check_budget, read_budget

    budget = None if check is None else read_budget(check)
    loaded = load.model(model)
    report = flops_report(
        loaded.unet,
        *loaded.args,
        clock=clock,
        steps=steps,
        guidance=guidance,
        **region.options(),
        attention=attention,
        norms="fvcore" if norms else None,
        depth=depth,
        **loaded.kwargs,
    )
    deliver(report, output, "flops")
    if budget is not None:
        found = check_budget(report, budget)
        typer.echo(found.table().to_markdown(), err=True)
        if found.exceeded:
            raise typer.Exit(1)
