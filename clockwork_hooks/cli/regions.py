"""`clockwork-hooks regions`: what of a model can be skipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clockwork_hooks._numbers import macs, percent, shape
from clockwork_hooks.cli import options
from clockwork_hooks.cli.app import LOOK, app, epilog
from clockwork_hooks.cli.delivery import deliver
from clockwork_hooks.regions.region import Region
from clockwork_hooks.reports.report import Report
from clockwork_hooks.reports.tables import Table, table
from clockwork_hooks.reports.u_drawing import Diagram

__all__ = ["RegionList", "regions"]

EXAMPLES = (
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


@app.command(epilog=epilog(*EXAMPLES), rich_help_panel=LOOK)
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
    import contextlib

    from clockwork_hooks.errors import RegionNotFoundError
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
