"""`clockwork-hooks flops`: what passes and trajectories cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clockwork_hooks.cli.app import EPILOG, app
from clockwork_hooks.cli.options import (
    Batch,
    Cut,
    CutOption,
    Device,
    Entry,
    Exit,
    Format,
    Frames,
    Html,
    Level,
    Model,
    Modules,
    Output,
    Resolution,
    Share,
    Size,
    choice,
    load,
    show,
)

__all__ = ["flops"]


@app.command(epilog=EPILOG)
def flops(
    model: Model,
    clock: Annotated[int, typer.Option(help="One full pass every so many steps.", min=1)] = 2,
    steps: Annotated[int, typer.Option(help="Denoising steps of a trajectory.", min=1)] = 8,
    guidance: Annotated[bool, typer.Option("--guidance", help="Classifier-free guidance: twice the batch.")] = False,
    attention: Annotated[
        bool, typer.Option("--attention/--no-attention", help="Count attention products; the paper leaves them out.")
    ] = True,
    norms: Annotated[bool, typer.Option("--norms", help="Add fvcore's estimate for normalisations.")] = False,
    level: Level = None,
    resolution: Resolution = None,
    share: Share = None,
    module: Modules = None,
    entry: Entry = None,
    exit: Exit = None,
    cut: CutOption = Cut.outer,
    depth: Annotated[int, typer.Option(help="Names of a module path that the table by module keeps.", min=1)] = 2,
    size: Size = None,
    batch: Batch = 1,
    frames: Frames = 0,
    device: Device = "meta",
    output: Output = Format.table,
    html: Html = None,
    check: Annotated[
        Path | None,
        typer.Option(
            help='A JSON file of limits, e.g. {"trajectory_macs": 2.5e12}: exit with 1 if a count is over its limit.',
            show_default=False,
        ),
    ] = None,
) -> None:
    """Count a full pass, an adaptor pass and a trajectory: by level, operator and module."""
    from clockwork_hooks.budget import check_budget, read_budget
    from clockwork_hooks.flops import flops_report

    budget = None if check is None else read_budget(check)
    loaded = load(model, size, batch, frames, device)
    report = flops_report(
        loaded.unet,
        *loaded.args,
        clock=clock,
        steps=steps,
        guidance=guidance,
        **choice(level, resolution, share, module, entry, exit, cut),
        attention=attention,
        norms="fvcore" if norms else None,
        depth=depth,
        **loaded.kwargs,
    )
    if output is Format.json:
        typer.echo(report.to_json())
    elif output is Format.md:
        typer.echo(report.to_markdown())
    else:
        show(*report.tables())
    if html is not None:
        html.write_text(report.to_html(), encoding="utf-8")
        typer.echo(html, err=True)
    if budget is not None:
        found = check_budget(report, budget)
        typer.echo(found.table().to_markdown(), err=output is not Format.table)
        if found.exceeded:
            raise typer.Exit(1)
