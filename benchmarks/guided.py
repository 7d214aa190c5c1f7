"""A UNet as guided-diffusion writes them: levels in one flat list, skips on a stack, sequentials that pass the time on.

Our own code, in the form of Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", arXiv 2105.05233.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimedSequential(nn.Sequential):
    """Passes the time embedding to the children that take it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class ResBlock(nn.Module):
    """Two convolutions, with scale and shift from the time between them."""

    def __init__(self, channels: int, emb: int, out: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out))
        self.norm = nn.GroupNorm(8, out)
        self.outer = nn.Sequential(nn.SiLU(), nn.Conv2d(out, out, 3, padding=1))
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.inner(x)
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        return self.skip(x) + self.outer(self.norm(h) * (1 + scale) + shift)


class Attention(nn.Module):
    """Self-attention over all positions."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, *space = x.shape
        flat = x.reshape(batch, channels, -1)
        q, k, v = self.qkv(self.norm(flat)).reshape(batch, 3, self.heads, channels // self.heads, -1).unbind(1)
        mixed = F.scaled_dot_product_attention(*(part.transpose(-1, -2) for part in (q, k, v)))
        return (flat + self.out(mixed.transpose(-1, -2).reshape(batch, channels, -1))).reshape(batch, channels, *space)


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class GuidedUNet(nn.Module):
    """The UNet.

    Args:
        channels: at the highest resolution.
        multiples: of it, one a level.
        blocks: residual blocks a level.
        attention: levels with attention, from 0.
    """

    def __init__(
        self,
        channels: int = 16,
        multiples: tuple[int, ...] = (1, 2, 4),
        blocks: int = 1,
        attention: tuple[int, ...] = (2,),
    ) -> None:
        super().__init__()
        emb = 4 * channels
        self.channels = channels
        self.time_embed = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.input_blocks = nn.ModuleList([TimedSequential(nn.Conv2d(3, channels, 3, padding=1))])
        widths, width = [channels], channels
        for level, multiple in enumerate(multiples):
            for _ in range(blocks):
                layers: list[nn.Module] = [ResBlock(width, emb, multiple * channels)]
                width = multiple * channels
                if level in attention:
                    layers.append(Attention(width))
                self.input_blocks.append(TimedSequential(*layers))
                widths.append(width)
            if level + 1 < len(multiples):
                self.input_blocks.append(TimedSequential(nn.Conv2d(width, width, 3, 2, 1)))
                widths.append(width)
        self.middle_block = TimedSequential(ResBlock(width, emb, width), Attention(width), ResBlock(width, emb, width))
        self.output_blocks = nn.ModuleList()
        for level, multiple in reversed(list(enumerate(multiples))):
            for block in range(blocks + 1):
                layers = [ResBlock(width + widths.pop(), emb, multiple * channels)]
                width = multiple * channels
                if level in attention:
                    layers.append(Attention(width))
                if level and block == blocks:
                    layers.append(Upsample(width))
                self.output_blocks.append(TimedSequential(*layers))
        self.out = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))
        self.eval()

    def embed(self, t: Tensor) -> Tensor:
        """The time embedding, (B, 4·channels)."""
        half = self.channels // 2
        frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
        angles = t[:, None].float() * frequencies
        embedded: Tensor = self.time_embed(
            torch.cat([angles.cos(), angles.sin()], 1).to(self.time_embed[0].weight.dtype)
        )
        return embedded

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        emb, h, skips = self.embed(timesteps), x, []
        for module in self.input_blocks:
            h = module(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for module in self.output_blocks:
            h = module(torch.cat([h, skips.pop()], 1), emb)
        return self.out(h)
