"""The networks that are trained to stand in: the paper's two, and our own for exits that shrink along a trajectory."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from clockwork_hooks.adaptors.layers import ResBlock, conv, cropped, down, padded, spread, up, zero
from clockwork_hooks.adaptors.learned import LearnedAdaptor
from clockwork_hooks.errors import ArgumentError

__all__ = ["ResNetAdaptor", "ScaledResNetAdaptor", "UNetAdaptor"]


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
