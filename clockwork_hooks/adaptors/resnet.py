"""The paper's adaptor, two residual blocks at half the size; and our own for exits that shrink along the trajectory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from clockwork_hooks.adaptors.layers import ResBlock, conv, cropped, down, padded, spread, up, zero
from clockwork_hooks.adaptors.learned import LearnedAdaptor

__all__ = ["ResNetAdaptor", "ScaledResNetAdaptor"]


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
