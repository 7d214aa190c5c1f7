"""`clockwork-hooks regions`: what of a model can be skipped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from clockwork_hooks.boundary import Region
    from clockwork_hooks.report import Table

__all__ = ["regions"]


@app.command(epilog=EPILOG)
def regions(
    model: Model,
    level: Level = None,
    resolution: Resolution = None,
    share: Share = None,
    module: Modules = None,
    entry: Entry = None,
    exit: Exit = None,
    cut: CutOption = Cut.outer,
    size: Size = None,
    batch: Batch = 1,
    frames: Frames = 0,
    device: Device = "meta",
    output: Output = Format.table,
) -> None:
    """List every region that adaptor passes can skip, widest first, and draw the chosen one."""
    import contextlib
    import json

    from clockwork_hooks.errors import RegionNotFoundError
    from clockwork_hooks.graph import record
    from clockwork_hooks.regions import choose, regions_of

    loaded = load(model, size, batch, frames, device)
    trace = record(loaded.unet, loaded.args, loaded.kwargs)
    chosen = choose(trace, loaded.unet, **choice(level, resolution, share, module, entry, exit, cut))
    found: tuple[Region, ...] = ()
    with contextlib.suppress(RegionNotFoundError):  # one named by hand may be the only one
        found = regions_of(trace, loaded.unet)
    if output is Format.json:
        data = {"regions": [_region_data(region) for region in found], "chosen": _region_data(chosen)}
        typer.echo(json.dumps(data, indent=2, ensure_ascii=False))
    elif output is Format.md:
        typer.echo(f"{_regions_table(found).to_markdown()}\n\n```\n{chosen}\n\n{chosen.draw()}\n```")
    else:
        show(_regions_table(found))
        typer.echo(f"{chosen}\n\n{chosen.draw()}")


def _regions_table(found: Iterable[Region]) -> Table:
    from clockwork_hooks.report import macs, percent, shape, table

    listed = list(found)
    rows = [
        (
            k,
            region.level,
            shape(region.resolution),
            shape(region.bottleneck),
            macs(region.macs),
            percent(region.macs_share),
            percent(region.parameter_share),
        )
        for k, region in enumerate(listed)
    ]
    columns = (">region", ">level", ">edge", ">bottleneck", ">skipped", ">of MACs", ">of parameters")
    notes = (
        "Widest first, each contains the next; the last of a level is the region below it. "
        "MACs of convolutions and matrix products, attention products counted, at the traced batch.",
        *(f"{k}: {region.entry.path} → {region.exit.path}" for k, region in enumerate(listed)),
    )
    return table("Regions that adaptor passes can skip", columns, rows, notes=notes)


def _region_data(region: Region) -> dict[str, Any]:
    def edge(boundary: Any) -> dict[str, Any]:
        return {"path": boundary.path, "call": boundary.call, "shape": list(boundary.shape)}

    names = "model level cut macs macs_share parameters parameter_share fingerprint"
    return {
        **{name: getattr(region, name) for name in names.split()},
        "resolution": list(region.resolution),
        "bottleneck": list(region.bottleneck),
        "entry": edge(region.entry),
        "exit": edge(region.exit),
        "skipped": [{"path": call.path, "ordinal": call.ordinal} for call in region.skipped],
    }
