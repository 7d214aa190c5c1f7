"""The paper's adaptor: two residual blocks at half the size."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from clockwork_hooks.adaptors.layers import ResBlock, conv, cropped, down, padded, spread, up, zero
from clockwork_hooks.adaptors.learned import LearnedAdaptor

__all__ = ["ResNetAdaptor"]


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
