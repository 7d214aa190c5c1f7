"""The commands that look at a model: `flops`, what passes cost, and `regions`, what of them can be skipped."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clockwork_hooks._numbers import macs, percent, shape
from clockwork_hooks.cli import options
from clockwork_hooks.cli.app import LOOK, app, epilog
from clockwork_hooks.cli.options import deliver
from clockwork_hooks.errors import RegionNotFoundError
from clockwork_hooks.reports.report import Report
from clockwork_hooks.reports.tables import Table, table

if TYPE_CHECKING:
    from clockwork_hooks.regions.region import Region
    from clockwork_hooks.reports.u_drawing import Diagram

FLOPS_EXAMPLES = (
    "flops sd15 --guidance",
    "flops sd15 --cut paper --no-attention --guidance   (the paper's own numbers)",
    "flops path/to/unet --size 96 --steps 20 --clock 4 --format md",
    "flops sdxl --out sdxl.html   (a page with the picture of the UNet)",
    "flops my_package.unet:build --check budget.json   (in CI: exit code 1 over budget)",
)


@app.command(epilog=epilog(*FLOPS_EXAMPLES), rich_help_panel=LOOK)
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
    depth: Annotated[int, typer.Option(help="Length of module paths in the table by module, in names.", min=1)] = 2,
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


REGIONS_EXAMPLES = (
    "regions sdxl",
    "regions sd15 --resolution 32 --cut paper --out region.html",
    "regions my_package.unet:build --level 2 --format json",
)


@dataclass(frozen=True, slots=True)
class RegionList(Report):
    """All regions of a UNet, widest first, and the chosen one, drawn in the UNet."""

    SCHEMA = "regions/1"

    regions: tuple[Region, ...]
    chosen: Region
    diagram: Diagram

    def table(self) -> Table:
        """A row a region."""
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
            for k, region in enumerate(self.regions)
        ]
        columns = (">region", ">level", ">edge", ">bottleneck", ">skipped", ">of MACs", ">of parameters")
        notes = (
            "Widest first, each contains the next; the last of a level is the region below it. "
            "MACs of convolutions and matrix products, attention products counted, at the traced batch.",
            *(f"{k}: {region.entry.path} → {region.exit.path}" for k, region in enumerate(self.regions)),
        )
        return table("Regions that adaptor passes can skip", columns, rows, notes=notes)

    def tables(self) -> tuple[Table, ...]:
        """All, and what there is to know of the chosen one."""
        return self.table(), *self.chosen.tables()

    @property
    def heading(self) -> str:
        """Title of the page."""
        return f"{self.chosen.model}: what adaptor passes can skip"

    def figures(self) -> tuple[Diagram, ...]:
        """The UNet with the chosen region."""
        return (self.diagram,)

    def data(self) -> dict[str, Any]:
        """Each as `Region` gives it."""
        return {"regions": [region.data() for region in self.regions], "chosen": self.chosen.data()}


@app.command(epilog=epilog(*REGIONS_EXAMPLES), rich_help_panel=LOOK)
def regions(
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
) -> None:
    """List every region that adaptor passes can skip, widest first, and draw the chosen one."""
    from clockwork_hooks.graph.tracing import record
    from clockwork_hooks.models import load_model
    from clockwork_hooks.regions.blocks import diagram_of
    from clockwork_hooks.regions.find import choose, regions_of

    shape = options.spatial(size)
    choice = options.region_choice(
        level=level, resolution=resolution, share=share, modules=module, entry=entry, exit=exit, cut=cut
    )

    def find(place: str) -> RegionList:
        loaded = load_model(model, size=shape, batch=batch, frames=frames, device=place)
        trace = record(loaded.unet, loaded.args, loaded.kwargs)
        chosen = choose(trace, loaded.unet, **choice)
        regions: tuple[Region, ...] = ()
        with contextlib.suppress(RegionNotFoundError):  # one named by hand may be the only one
            regions = regions_of(trace, loaded.unet)
        return RegionList(regions, chosen, diagram_of(trace, chosen))

    report = options.on_device(device, model, find)
    deliver(report, format, "regions", out or (), report.chosen.draw())
