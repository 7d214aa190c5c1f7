"""`clockwork-hooks flops`: what passes and trajectories cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clockwork_hooks.cli import options
from clockwork_hooks.cli.app import LOOK, app, epilog
from clockwork_hooks.cli.delivery import deliver

__all__ = ["flops"]

EXAMPLES = (
    "flops sd15 --guidance",
    "flops sd15 --cut paper --no-attention --guidance   (the paper's own numbers)",
    "flops path/to/unet --size 96 --steps 20 --clock 4 --format md",
    "flops sdxl --out sdxl.html   (a page with the picture of the UNet)",
    "flops my_package.unet:build --check budget.json   (in CI: exit code 1 over budget)",
)


@app.command(epilog=epilog(*EXAMPLES), rich_help_panel=LOOK)
def flops(
    model: options.Model,
    size: options.Size = None,
    batch: options.Batch = 1,
    frames: options.Frames = 0,
    device: options.Device = None,
    level: options.Level = None,
    resolution: options.Resolution = None,
    share: options.Share = None,
    module: options.Modules = None,
    entry: options.Entry = None,
    exit: options.Exit = None,
    cut: options.CutOption = options.Cut.outer,
    format: options.FormatOption = options.Format.table,
    out: options.Out = None,
    clock: options.Clock = 2,
    steps: options.Steps = 8,
    guidance: options.Guidance = False,
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
    from clockwork_hooks.analysis.flops import FlopsReport, flops_report
    from clockwork_hooks.cli.budget import check_budget, read_budget
    from clockwork_hooks.models import load_model

    budget = None if check is None else read_budget(check)
    shape = options.spatial(size)
    choice = options.region_choice(
        level=level, resolution=resolution, share=share, modules=module, entry=entry, exit=exit, cut=cut
    )

    def count(place: str) -> FlopsReport:
        loaded = load_model(model, size=shape, batch=batch, frames=frames, device=place)
        return flops_report(
            loaded.unet,
            *loaded.args,
            clock=clock,
            steps=steps,
            guidance=guidance,
            **choice,
            attention=attention,
            norms="fvcore" if norms else None,
            depth=depth,
            **loaded.kwargs,
        )

    report = options.on_device(device, model, count)
    deliver(report, format, "flops", out or ())
    if budget is not None:
        held = check_budget(report, budget)
        typer.echo(held.table().to_markdown(), err=True)
        if held.exceeded:
            raise typer.Exit(1)
