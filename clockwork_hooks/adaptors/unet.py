"""The paper's larger adaptor and its light form: a small UNet, all of it below the size of the region's edge."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn

from clockwork_hooks.adaptors.layers import ResBlock, cropped, down, padded, spread, up, zero
from clockwork_hooks.adaptors.learned import LearnedAdaptor
from clockwork_hooks.errors import ArgumentError

__all__ = ["UNetAdaptor"]

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
