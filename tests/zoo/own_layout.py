"""UNets of our own, for what features and modules can look like."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.case import ZooCase, case
from tests.zoo.own_base import ABOVE, BELOW, Layer, Small, Time, conv, small


class Tokens(Small):
    """The lowest level is a transformer layer on (B, H·W, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = Layer(32)

    def deeper(self, x: Tensor, emb: Tensor) -> Tensor:
        low = self.sink(x)
        tokens = self.deep(low.flatten(2).transpose(1, 2))
        return self.rise(tokens.transpose(1, 2).reshape(low.shape))


@case
def tokens() -> ZooCase:
    return small(Tokens(), "tokens", "Tokens.deeper: pixels become tokens and pixels again, inside the region.")


class TokenUNet(nn.Module):
    """Tokens at every level, merged four to one on the way down and split on the way up, as in Swin-UNets."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.embed = Time(16), nn.Conv2d(3, 16, 2, 2)
        self.high, self.join = Layer(16), nn.Linear(32, 16)
        self.down, self.low, self.up = nn.Conv2d(16, 64, 2, 2), Layer(64), nn.ConvTranspose2d(64, 16, 2, 2)
        self.out = nn.ConvTranspose2d(16, 3, 2, 2)
        self.last = nn.LayerNorm(16)

    @staticmethod
    def _apply(layer: Callable[[Tensor], Tensor], tokens: Tensor, side: int) -> Tensor:
        image = layer(tokens.transpose(1, 2).unflatten(2, (side, side)))
        return image.flatten(2).transpose(1, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.time(t)[:, None]
        high = self.high(tokens)
        low = self.last(self._apply(self.up, self.low(self._apply(self.down, high, 8)), 4))
        return self.out(self.join(torch.cat((high, low), dim=2)).transpose(1, 2).unflatten(2, (8, 8)))


@case
def token_unet() -> ZooCase:
    return small(
        TokenUNet(),
        "token_unet",
        "TokenUNet.forward: a patch stem, so the highest level is 8x8 of 16x16; entry and exit are tokens, (B, 64, C), "
        "and between them tokens become pixels for the resamplings alone. `last` is the last before the cat.",
        entry=("high",),
        consumer=None,
        exit=("last",),
        resolution=(8, 8),
        axes=(1,),
        skipped=frozenset({"down", "low", "up"}),
        outside=frozenset({"time", "embed", "high", "join", "out"}),
    )


class ChannelsLast(Small):
    """Entry, exit and the cat between them are (B, H, W, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time(t)
        high = self.first(self.high(self.stem(x), emb).permute(0, 2, 3, 1).contiguous())
        low = self.last(self.below(high.permute(0, 3, 1, 2), emb).permute(0, 2, 3, 1).contiguous())
        return self.head(self.join(torch.cat((high, low), dim=3).permute(0, 3, 1, 2), emb))


@case
def channels_last() -> ZooCase:
    return small(
        ChannelsLast(),
        "channels_last",
        "ChannelsLast.forward: layer norms over the last axis return entry and exit; the convolutions between them work"
        " on permuted views.",
        entry=("first",),
        consumer=None,
        exit=("last",),
        axes=(1, 2),
        skipped=BELOW | {"up"},
        outside=ABOVE | {"first"},
    )


class Volumes(nn.Module):
    """3D convolutions on (B, C, frames, H, W) that halve the image and keep the frames."""

    def __init__(self) -> None:
        super().__init__()
        kernel: Any = {"kernel_size": (1, 4, 4), "stride": (1, 2, 2), "padding": (0, 1, 1)}
        self.time = Time(16)
        self.stem, self.along = nn.Conv3d(3, 8, 3, 1, 1), nn.Conv3d(8, 8, (3, 1, 1), 1, (1, 0, 0))
        self.down, self.up = nn.Conv3d(8, 16, **kernel), nn.ConvTranspose3d(16, 8, **kernel)
        self.body, self.head = nn.Conv3d(16, 16, 3, 1, 1), nn.Conv3d(16, 3, 3, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        high = self.along(self.stem(x))
        low = self.body(self.down(high) + self.time(t)[:, :, None, None, None])
        return self.head(torch.cat((high, self.up(low)), dim=1))


@case
def volumes() -> ZooCase:
    return small(
        Volumes(),
        "volumes",
        "Volumes.forward: the frames are an axis of the convolutions, and stay as many.",
        args=(torch.randn(1, 3, 4, 16, 16), torch.tensor([0.3])),
        entry=("along",),
        resolution=(4, 16, 16),
        skipped=frozenset({"down", "body"}),
        outside=frozenset({"stem", "along", "head"}),
    )


class Preconditioned(nn.Module):
    """Karras' preconditioning: the network is a child, sample and time are scaled for it, and its output after it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Small()

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.reshape(-1, 1, 1, 1)
        scale = (sigma**2 + 1) ** -0.5
        return x * scale**2 + self.net(x * scale, sigma.flatten().log() / 4) * sigma * scale


@case
def preconditioned() -> ZooCase:
    return small(
        Preconditioned(),
        "preconditioned",
        "Preconditioned.forward: the sample goes round the whole network in the sum with its output, at full size: no "
        "feature, so it is no entry; the region is the network's own.",
        entry=("net.high",),
        consumer="net.down",
        exit=("net.up",),
        skipped=frozenset(f"net.{path}" for path in BELOW),
        outside=frozenset(f"net.{path}" for path in ABOVE),
    )


class PatchStem(Small):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 4, 4), nn.ConvTranspose2d(8, 3, 4, 4)


@case
def patch_stem() -> ZooCase:
    return small(
        PatchStem(),
        "patch_stem",
        "PatchStem: the stem makes patches of 4x4 pixels and the head pixels of them again: the highest level with a "
        "skip is a quarter of the sample's size.",
        args=(torch.randn(2, 3, 64, 64), torch.tensor([0.3, 0.8])),
    )


class OddSizes(Small):
    """Padded to even sizes on the way down, cut on the way up."""

    def below(self, x: Tensor, emb: Tensor) -> Tensor:
        return super().below(F.pad(x, (0, x.shape[3] % 4 and 4 - x.shape[3] % 4, 0, -x.shape[2] % 4)), emb)[
            ..., : x.shape[2], : x.shape[3]
        ]


@case
def odd_sizes() -> ZooCase:
    return small(
        OddSizes(),
        "odd_sizes",
        "OddSizes.below: the root pads 17x13 to 20x16 and cuts `up`'s output: the entry is the tensor before the "
        "padding, the exit larger than it.",
        args=(torch.randn(2, 3, 17, 13), torch.tensor([0.3, 0.8])),
        consumer=None,
        resolution=(17, 13),
        exit_resolution=(20, 16),
    )


class Slices(nn.Module):
    """All layers in one nn.Sequential, of which the forward runs slices."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.SiLU()
        ups = (nn.ConvTranspose2d(32, 16, 4, 2, 1), act, nn.ConvTranspose2d(16, 8, 4, 2, 1), act)
        self.layers = nn.Sequential(
            *(conv(3, 8), act), *(conv(8, 16, 2), act, conv(16, 32, 2), act), *ups, *(conv(16, 8), act, conv(8, 3))
        )

    def forward(self, x: Tensor) -> Tensor:
        high = self.layers[:2](x)
        return self.layers[10:](torch.cat((self.layers[6:10](self.layers[2:6](high)), high), dim=1))


@case
def sequential_slices() -> ZooCase:
    act = tuple(f"layers.{k}" for k in (1, 3, 5, 7, 9, 11))
    return small(
        Slices(),
        "sequential_slices",
        "Slices.forward: a slice of an nn.Sequential is a new module in every call, so only the layers themselves are "
        "registered. One activation serves all: `layers.1` is its first path, its calls 1 to 4 lie inside, and the "
        "fifth of all (call 4) returns the exit.",
        args=(torch.randn(2, 3, 16, 16),),
        entry=act,
        consumer="layers.2",
        exit=act,
        exit_call=4,
        skipped=frozenset({"layers.2", "layers.4", "layers.6", "layers.8"}),
        outside=frozenset({"layers.0", "layers.10", "layers.12"}),
    )


class Checkpointed(Small):
    """Every step through torch.utils.checkpoint, as guided-diffusion does; with gradients each runs twice."""

    def below(self, x: Tensor, emb: Tensor) -> Tensor:
        low = checkpoint(self.low, checkpoint(self.down, x, use_reentrant=False), emb, use_reentrant=False)
        deep = checkpoint(self.deeper, low, emb, use_reentrant=False)
        return self.up(checkpoint(self.merge, self.cat(deep, low), emb, use_reentrant=False))


@case
def checkpointed() -> ZooCase:
    return small(
        Checkpointed(), "checkpointed", "Checkpointed.below: the region of Small, its modules called from torch."
    )


class _Swish(torch.autograd.Function):
    """A kernel that torch cannot look into: NumPy here, CUDA elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        if x.device.type == "meta":
            return torch.empty_like(x)
        values = x.detach().numpy()
        return torch.from_numpy(values / (1 + 2.718281828459045 ** -values.clip(-80, 80)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        sigmoid = x.sigmoid()
        return grad * sigmoid * (1 + x * (1 - sigmoid))


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Swish.apply(x)


class Opaque(Small):
    def __init__(self) -> None:
        super().__init__()
        self.act = Swish()

    def deeper(self, x: Tensor, emb: Tensor) -> Tensor:
        return super().deeper(self.act(x), emb)

    def cat(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.act(super().cat(x, skip))


@case
def opaque_kernel() -> ZooCase:
    return small(
        Opaque(),
        "opaque_kernel",
        "Opaque.deeper and .cat: `act` is an autograd function whose work no dispatcher sees; it runs twice inside the "
        "region and once above it. What it returns still depends on what it was given.",
    )
