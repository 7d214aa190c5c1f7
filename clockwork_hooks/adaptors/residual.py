"""`ResidualAdaptor`: a calibrated adaptor, and a network that learns what it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clockwork_hooks.adaptors.calibrated import CalibratedAdaptor
from clockwork_hooks.adaptors.learned import LearnedAdaptor
from clockwork_hooks.adaptors.networks import ScaledResNetAdaptor
from clockwork_hooks.errors import AdaptorError
from clockwork_hooks.regions.region import Layout, Region

__all__ = ["ResidualAdaptor"]


class ResidualAdaptor(LearnedAdaptor):
    """What a calibrated adaptor predicts, and a learned difference, which starts at zero.

    So training starts where the closed form ends: a fresh one returns what the calibrated adaptor does, bit for bit.
    The network is that of `ScaledResNetAdaptor`; it also sees the entry that came with the cached exit. The calibrated
    part is not trained. Train it with `distill(unet, ResidualAdaptor.of(adaptor, region), generate, schedule=...)`.

    Args:
        start: the arguments of the calibrated adaptor.
        width: channels inside of the network.
        **inputs: those of `LearnedAdaptor`.

    Attributes:
        needs: names of what it is called with beside the entry, the cached exit, time and text.

    Example:
        >>> start = CalibratedAdaptor(form="affine", knots=2, points=8, exit=Layout(4, (8, 8)))
        >>> adaptor = ResidualAdaptor(start=start.arguments, width=8, exit=Layout(4, (8, 8)))
        >>> cached = torch.randn(1, 4, 8, 8)
        >>> torch.equal(adaptor(None, cached), start(None, cached))
        True

    Source: arXiv 2312.08128, Sec. 4.2, for the network; that it starts at a calibrated adaptor is our own addition.
    """

    def __init__(self, *, start: Mapping[str, Any], width: int, **inputs: Any) -> None:
        super().__init__(own={"start": dict(start), "width": width}, **inputs)
        own = {name: value for name, value in start.items() if name in ("form", "knots", "points", "rank")}
        own |= {name: start[name] for name in ("exit", "entry", "reads_before", "reads_trend") if name in start}
        self.start = CalibratedAdaptor(**own)
        both = None if self.entry is None else Layout(2 * self.entry.channels, self.entry.space, self.entry.order)
        widths: dict[str, Any] = {"time": self.time_width, "text": self.text_width}
        self.network = ScaledResNetAdaptor(width=width, exit=self.exit, entry=both, **widths)
        self.needs = self.start.needs | (set() if self.entry is None else {"entry_cached"})

    @classmethod
    def of(cls, start: CalibratedAdaptor, region: Region, *, width: int | None = None) -> ResidualAdaptor:
        """One that starts as this calibrated adaptor.

        Args:
            start: of this region.
            region: what it stands in for.
            width: channels inside of the network; None for those of the entry.

        Raises:
            AdaptorError: the adaptor was calibrated for another region.
        """
        start.check_region(region)
        channels = Layout.of_boundary(region.entry).channels if "entry" in region.inputs else start.exit.channels
        adaptor = cls.for_region(region, start=start.arguments, width=width or channels)
        adaptor.start.load_state_dict(start.state_dict())
        adaptor.facts = dict(start.facts)
        return adaptor

    @classmethod
    def sized(cls, channels: int, *, start: Mapping[str, Any], width: int) -> dict[str, Any]:  # type: ignore[override]
        """The options as they are."""
        return {"start": start, "width": width}

    def forward(
        self,
        entry: Tensor | None,
        exit_cached: Tensor,
        *,
        time: Tensor | None = None,
        text: Tensor | None = None,
        entry_cached: Tensor | None = None,
        position: Tensor | None = None,
        position_cached: Tensor | None = None,
        trend: Tensor | None = None,
        trend_positions: Tensor | None = None,
    ) -> Tensor:
        """Return the exit; see `CalibratedAdaptor.forward`."""
        values = {"entry_cached": entry_cached, "position": position, "position_cached": position_cached}
        values |= {"trend": trend, "trend_positions": trend_positions}
        start = self.start(entry, exit_cached, **{name: values[name] for name in self.start.needs})
        both = None
        if self.entry is not None:
            if entry is None or entry_cached is None:
                raise AdaptorError(
                    "this adaptor reads the region's entry, now and when the cached exit was made",
                    seen={"entry": entry is not None, "entry_cached": entry_cached is not None},
                    do="make one for a region whose entry can be picked up",
                )
            axis = 1 if self.entry.order in ("channels first", "tokens last") else -1
            both = torch.cat([entry, entry_cached], axis)
        difference = self.network(both, exit_cached, time=time, text=text) - exit_cached
        exit: Tensor = start + difference
        return exit
