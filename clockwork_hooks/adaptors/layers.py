"""What the learned adaptors are built from: convolutions of any rank, residual blocks, pooled conditions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from clockwork_hooks._numbers import shape
from clockwork_hooks.errors import AdaptorError

__all__ = ["ResBlock", "conv", "cropped", "down", "fit", "norm", "padded", "up", "vector", "vector_width", "zero"]

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_UP: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class ResBlock(nn.Module):
    """Two convolutions with normalisation in front, the time added between them, and a skip.

    Args:
        rank: spatial axes.
        inner: channels in.
        outer: channels out.
        time: width of the time embedding; None for none.
    """

    def __init__(self, rank: int, inner: int, outer: int, time: int | None) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(inner), conv(rank, inner, outer, 3)
        self.time = None if time is None else nn.Linear(time, outer)
        self.norm2, self.conv2 = norm(outer), conv(rank, outer, outer, 3)
        self.skip = nn.Identity() if inner == outer else conv(rank, inner, outer, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor | None) -> torch.Tensor:
        """(B, inner, *space), (B, time) → (B, outer, *space)."""
        h = self.conv1(functional.silu(self.norm1(x)))
        if self.time is not None and time is not None:
            h = h + spread(self.time(functional.silu(time)), h)
        return self.skip(x) + self.conv2(functional.silu(self.norm2(h)))  # type: ignore[no-any-return]


def conv(rank: int, inner: int, outer: int, kernel: int) -> nn.Module:
    """A convolution that keeps the size; an odd kernel."""
    layer: nn.Module = _CONV[rank](inner, outer, kernel, padding=kernel // 2)
    return layer


def down(rank: int, inner: int, outer: int) -> nn.Module:
    """Half the size: kernel 4, stride 2."""
    layer: nn.Module = _CONV[rank](inner, outer, 4, 2, 1)
    return layer


def up(rank: int, inner: int, outer: int) -> nn.Module:
    """Twice the size: transposed, kernel 4, stride 2."""
    layer: nn.Module = _UP[rank](inner, outer, 4, 2, 1)
    return layer


def norm(channels: int) -> nn.Module:
    """Group normalisation with the usual 32 groups; fewer where they do not divide, or would hold under 4 channels.

    A group of one channel would normalise the last position of a deep level to nothing.
    """
    groups = math.gcd(32, channels)
    while groups > 1 and channels // groups < 4:
        groups //= 2
    return nn.GroupNorm(groups, channels)


def zero(module: nn.Module) -> nn.Module:
    """The module with all parameters zero: a layer that adds nothing yet."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def padded(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """The map with its last rows repeated until every spatial size is a multiple."""
    missing = [-size % multiple for size in x.shape[2:]]
    if not any(missing):
        return x
    return functional.pad(x, [amount for m in reversed(missing) for amount in (0, m)], mode="replicate")


def cropped(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The map without what `padded` added: as large as `like`."""
    for axis, size in enumerate(like.shape[2:], 2):
        x = x.narrow(axis, 0, size)
    return x


def fit(x: torch.Tensor, space: tuple[int, ...]) -> torch.Tensor:
    """The map at another size: averaged where it shrinks, repeated where it grows."""
    return x if tuple(x.shape[2:]) == space else functional.interpolate(x, size=space, mode="area")


def spread(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B, C) over the positions of a map: (B, C, 1, …)."""
    return x.reshape(*x.shape, *(1,) * (like.ndim - 2))


def vector_width(sizes: tuple[int, ...]) -> int | None:
    """Width of what `vector` makes of a tensor of this shape; None where it makes nothing of it."""
    if len(sizes) > 2 and math.prod(sizes[2:]) == 1:
        sizes = sizes[:2]
    return sizes[-1] if len(sizes) in (2, 3) and sizes[-1] > 1 else None


def vector(x: torch.Tensor | None, width: int | None, rows: int, name: str) -> torch.Tensor | None:
    """One vector a row from an embedding (B, D) or (B, D, 1, …), or from tokens (B, L, D), which are averaged.

    Args:
        x: the embedding.
        width: D; None leaves the embedding out.
        rows: B of the features. A clip's embedding serves all its frames, where these are folded into the batch.
        name: "time" or "text", for the error.

    Raises:
        AdaptorError: it is missing, or of another width, or its rows do not go into those of the features.
    """
    if width is None:
        return None
    if x is None or vector_width(tuple(x.shape)) != width or rows % x.shape[0]:
        raise AdaptorError(
            f"the {name} embedding is as in the region that the adaptor was made for",
            seen={
                "adaptor": f"{name} of width {width}, {rows} rows or a part of them",
                "got": "none" if x is None else shape(x.shape),
            },
            do="call the UNet with the same conditions, or make an adaptor for this call: for_region(region)",
        )
    if x.ndim > 2:
        x = x.flatten(1) if math.prod(x.shape[2:]) == 1 else x.mean(1)
    return x if x.shape[0] in (1, rows) else x.repeat_interleave(rows // x.shape[0], 0)
