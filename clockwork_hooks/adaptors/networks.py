"""The networks that are trained to stand in: the paper's two, ours for exits that shrink, one that starts solved."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clockwork_hooks.adaptors.calibrated import CalibratedAdaptor
from clockwork_hooks.adaptors.learned import LearnedAdaptor, ResBlock, conv, cropped, down, padded, spread, up, zero
from clockwork_hooks.errors import AdaptorError, ArgumentError
from clockwork_hooks.regions.region import Layout, Region

__all__ = ["ResNetAdaptor", "ResidualAdaptor", "ScaledResNetAdaptor", "UNetAdaptor"]


class ResNetAdaptor(LearnedAdaptor):
    """A strided convolution, the text, two residual blocks with the time, a transposed convolution, and a residual.

    No attention; on SD v1.5 with the paper's cut 13.6M parameters and 7.3 GFLOPs a sample. The residual from input to
    output is the identity on the exit of the step before plus a 1×1 convolution; that and the transposed convolution
    start at zero, so a fresh adaptor returns the exit of the step before, bit for bit.

    Args:
        width: channels inside; `for_region` takes the entry's.
        **inputs: those of `LearnedAdaptor`; `for_region` finds them.

    Example:
        >>> from clockwork_hooks.models import load_model
        >>> import clockwork_hooks as ch
        >>> unet, args, kwargs = load_model("sd15")
        >>> region = ch.find_region(unet, *args, cut="paper", **kwargs)
        >>> with torch.device("meta"):
        ...     adaptor = ResNetAdaptor.for_region(region)
        >>> adaptor.width, sum(parameter.numel() for parameter in adaptor.parameters())
        (320, 13564160)

    Source: arXiv 2312.08128, Sec. 4.2 and Fig. 3.
    """

    def __init__(self, *, width: int, **inputs: Any) -> None:
        super().__init__(own={"width": width}, **inputs)
        rank, outer = self.exit.rank, self.exit.channels
        self.width = width
        self.down = down(rank, self.channels, width)
        self.text = None if self.text_width is None else nn.Linear(self.text_width, width)
        self.block1 = ResBlock(rank, width, width, self.time_width)
        self.block2 = ResBlock(rank, width, width, self.time_width)
        self.up = zero(up(rank, width, outer))
        self.residual = conv(rank, self.channels, outer, 1)
        if self.sees_exit:
            zero(self.residual)

    @classmethod
    def sized(cls, channels: int, *, width: int | None = None) -> dict[str, Any]:  # type: ignore[override]
        """As wide as the entry."""
        return {"width": width or channels}

    def difference(self, x: torch.Tensor, time: torch.Tensor | None, text: torch.Tensor | None) -> torch.Tensor:
        """(B, channels, *space) → (B, channels of the exit, *space)."""
        h = self.down(padded(x, 2))
        if self.text is not None and text is not None:
            h = h + spread(self.text(text), h)
        h = self.up(self.block2(self.block1(h, time), time))
        return cropped(h, x) + self.residual(x)  # type: ignore[no-any-return]


class ScaledResNetAdaptor(ResNetAdaptor):
    """`ResNetAdaptor` on the cached exit divided by its own size, with a gain for each channel that the time sets.

    What a region emits can shrink a hundredfold along a trajectory: in the demo model from a standard deviation of 156
    at the first of eight steps to 1.8 at the last. So the exit of the step before is not only old but also too large,
    and by a factor that depends on the step. The paper's residual, a 1×1 convolution, is the same at every step; here
    the time embedding sets a gain for each channel of the cached exit and for each channel of what is added, and the
    convolutions see numbers of order one. Our own addition; the MACs are those of `ResNetAdaptor`. A fresh adaptor
    returns the exit of the step before, bit for bit.

    Args:
        width: channels inside; `for_region` takes the entry's.
        **inputs: those of `LearnedAdaptor`; `for_region` finds them.

    Example:
        >>> adaptor = ScaledResNetAdaptor(width=8, exit={"channels": 4, "space": (8, 8)}, time=6)
        >>> cached = 1000 * torch.randn(2, 4, 8, 8)
        >>> torch.equal(adaptor(None, cached, time=torch.randn(2, 6)), cached)
        True

    Source: after arXiv 2312.08128, Sec. 4.2; the scaling is not in the paper.
    """

    def __init__(self, *, width: int, **inputs: Any) -> None:
        super().__init__(width=width, **inputs)
        self.gain = None if self.time_width is None else zero(nn.Linear(self.time_width, 2 * self.exit.channels))

    def difference(self, x: torch.Tensor, time: torch.Tensor | None, text: torch.Tensor | None) -> torch.Tensor:
        """(B, channels, *space) → (B, channels of the exit, *space)."""
        before, size = None, None
        if self.sees_exit:
            before = x[:, -self.exit.channels :]
            axes = tuple(range(1, x.ndim))
            size = before.float().square().mean(axes, keepdim=True).sqrt().clamp_min(1e-6).to(x.dtype)
            x = torch.cat([x[:, : -self.exit.channels], before / size], 1)
        difference = super().difference(x, time, text)
        if size is not None:
            difference = difference * size
        if self.gain is None or time is None:
            return difference
        gain, scale = (spread(part, x) for part in self.gain(functional.silu(time)).chunk(2, 1))
        difference = difference * (1 + scale)
        return difference if before is None else difference + gain * before


LEVELS = 2


class UNetAdaptor(LearnedAdaptor):
    """A strided convolution, the text, two down modules, a middle, two up modules, a transposed convolution.

    No attention. The paper gives the width, the blocks in the middle and the totals, 152M parameters and 18.5 GFLOPs a
    sample (light: 3M, 1); our reading of the rest comes to 155M and 17.6 GFLOPs (light: 4.5M, 1.4) on SD v1.5 with
    the paper's cut. The last layer starts at zero, so a fresh adaptor returns the exit of the step before.

    Args:
        width: channels; `for_region` takes twice the entry's (640 on SD v1.5), light 0.3 of them (96).
        middle: residual blocks in the middle.
        blocks: residual blocks of each down and each up module.
        **inputs: those of `LearnedAdaptor`; `for_region` finds them.

    Example:
        >>> from clockwork_hooks.models import load_model
        >>> import clockwork_hooks as ch
        >>> unet, args, kwargs = load_model("sd15")
        >>> region = ch.find_region(unet, *args, cut="paper", **kwargs)
        >>> with torch.device("meta"):
        ...     adaptor, light = UNetAdaptor.for_region(region), UNetAdaptor.for_region(region, light=True)
        >>> (adaptor.width, adaptor.middle), (light.width, light.middle)
        ((640, 4), (96, 2))

    Source: arXiv 2312.08128, Tab. 3 and App. B.
    """

    def __init__(self, *, width: int, middle: int = 4, blocks: int = 2, **inputs: Any) -> None:
        if not all(type(count) is int and 1 <= count <= 64 for count in (middle, blocks)):
            raise ArgumentError(
                "an adaptor has 1 to 64 blocks in the middle and in each module",
                seen={"middle": middle, "blocks": blocks},
                do="pass middle=4, blocks=2",
            )
        super().__init__(own={"width": width, "middle": middle, "blocks": blocks}, **inputs)
        self.width, self.middle, self.blocks = width, middle, blocks
        rank = self.exit.rank
        timed = None if self.time_width is None else width

        def several(count: int, inner: int) -> list[nn.Module]:
            return [ResBlock(rank, inner, width, timed) for _ in range(count)]

        self.stem = down(rank, self.channels, width)
        self.text = None if self.text_width is None else nn.Linear(self.text_width, width)
        self.time = None if self.time_width is None else nn.Linear(self.time_width, width)
        descent = ([down(rank, width, width), *several(blocks, width)] for _ in range(LEVELS))
        ascent = ([*several(blocks, 2 * width), up(rank, width, width)] for _ in range(LEVELS))
        self.downs = nn.ModuleList(chain.from_iterable(descent))
        self.body = nn.ModuleList(several(middle, width))
        self.ups = nn.ModuleList(chain.from_iterable(ascent))
        self.last = zero(up(rank, width, self.exit.channels))

    @classmethod
    def sized(  # type: ignore[override]
        cls,
        channels: int,
        *,
        width: int | None = None,
        middle: int | None = None,
        blocks: int | None = None,
        light: bool = False,
    ) -> dict[str, Any]:
        """The paper's sizes, in proportion to the entry's channels."""
        usual = (max(8, round(0.3 * channels / 8) * 8), 2, 1) if light else (2 * channels, 4, 2)
        return {"width": width or usual[0], "middle": middle or usual[1], "blocks": blocks or usual[2]}

    def difference(self, x: torch.Tensor, time: torch.Tensor | None, text: torch.Tensor | None) -> torch.Tensor:
        """(B, channels, *space) → (B, channels of the exit, *space)."""
        h = self.stem(padded(x, 2 ** (LEVELS + 1)))
        if self.text is not None and text is not None:
            h = h + spread(self.text(text), h)
        if self.time is not None and time is not None:
            time = self.time(time)
        skips: list[torch.Tensor] = []
        for layer in self.downs:
            if isinstance(layer, ResBlock):
                h = layer(h, time)
                skips.append(h)
            else:
                h = layer(h)
        for block in self.body:
            h = block(h, time)
        for layer in self.ups:
            h = layer(torch.cat([h, skips.pop()], 1), time) if isinstance(layer, ResBlock) else layer(h)
        return cropped(self.last(h), x)


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
