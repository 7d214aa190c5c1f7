"""`clockwork-hooks regions`: what of a model can be skipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clockwork_hooks.cli.app import LOOK, app, epilog
from clockwork_hooks.cli.delivery import deliver
from clockwork_hooks.cli.options import Choosing, Loading, Model, Output, spread
from clockwork_hooks.regions.region import Region
from clockwork_hooks.reports.report import Report
from clockwork_hooks.reports.tables import Table, macs, percent, shape, table
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
@spread
def regions(model: Model, load: Loading, region: Choosing, output: Output) -> None:
    """List every region that adaptor passes can skip, widest first, and draw the chosen one."""
    import contextlib

    from clockwork_hooks.errors import RegionNotFoundError
    from clockwork_hooks.graph.tracing import record
    from clockwork_hooks.regions.blocks import diagram_of
    from clockwork_hooks.regions.find import choose, regions_of

    loaded = load.model(model)
    trace = record(loaded.unet, loaded.args, loaded.kwargs)
    chosen = choose(trace, loaded.unet, **region.options())
    found: tuple[Region, ...] = ()
    with contextlib.suppress(RegionNotFoundError):  # one named by hand may be the only one
        found = regions_of(trace, loaded.unet)
    deliver(RegionList(found, chosen, diagram_of(trace, chosen)), output, "regions", chosen.draw())
