"""A small UNet of our own to bend: three levels, time, skips by concatenation; every step can be overridden."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.case import ZooCase

BELOW = frozenset({"down", "low", "sink", "deep", "rise", "merge"})
ABOVE = frozenset({"time", "stem", "high", "join", "head"})


def conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1)


class Time(nn.Module):
    """Sine and cosine of the time, and one layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(8, width)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.reshape(-1, 1) * 2.0 ** -torch.arange(4, device=t.device, dtype=self.proj.weight.dtype)
        return self.proj(torch.cat((angles.sin(), angles.cos()), dim=1))


class Block(nn.Module):
    """Convolution, time, activation; only the block itself returns its output."""

    def __init__(self, in_channels: int, out_channels: int, width: int = 16) -> None:
        super().__init__()
        self.conv, self.proj = conv(in_channels, out_channels), nn.Linear(width, out_channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return nn.functional.silu(self.conv(x) + self.proj(emb)[:, :, None, None])


class Layer(nn.Module):
    """A transformer layer on (B, N, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = (part.unflatten(2, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=2))
        x = x + self.proj(nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Small(nn.Module):
    """stem, high → (down, low → (sink, deep, rise) → merge, up) → join, head."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.time = Time(16)
        self.stem, self.high = conv(channels, 8), Block(8, 8)
        self.down, self.low = conv(8, 16, 2), Block(16, 16)
        self.sink, self.deep = conv(16, 32, 2), Block(32, 32)
        self.rise, self.merge = nn.ConvTranspose2d(32, 16, 4, 2, 1), Block(32, 16)
        self.up, self.join = nn.ConvTranspose2d(16, 8, 4, 2, 1), Block(16, 8)
        self.head = conv(8, channels)

    def cat(self, x: Tensor, skip: Tensor) -> Tensor:
        return torch.cat((x, skip), dim=1)

    def deeper(self, x: Tensor, emb: Tensor) -> Tensor:
        """From the middle level to the middle level."""
        return self.rise(self.deep(self.sink(x), emb))

    def below(self, x: Tensor, emb: Tensor) -> Tensor:
        """From the highest level to the highest level."""
        low = self.low(self.down(x), emb)
        return self.up(self.merge(self.cat(self.deeper(low, emb), low), emb))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time(t)
        high = self.high(self.stem(x), emb)
        return self.head(self.join(self.cat(self.below(high, emb), high), emb))


def small(model: nn.Module, name: str, note: str, **changes: Any) -> ZooCase:
    """The case of `Small`, with what is different."""
    return ZooCase(
        **{
            "name": name,
            "model": model,
            "args": (torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.8])),
            "entry": ("high",),
            "consumer": "down",
            "exit": ("up",),
            "resolution": (16, 16),
            "source": f"our own {type(model).__name__}",
            "note": note,
            "skipped": BELOW,
            "outside": ABOVE,
            **changes,
        }
    )
