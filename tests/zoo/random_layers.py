"""Layers for random UNets, in one, two or three dimensions: nothing in a name says what a module is for."""

import keyword
import random
import string
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
POOLED = {
    "avg": {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d},
    "max": {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d},
}

DOWN = ("strided", "avg", "max", "avg_function", "max_function", "unshuffle")
UP = ("transposed", "interpolate", "upsample", "shuffle", "late")


class Names:
    """Random identifiers, each once."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._taken: set[str] = set()

    def __call__(self) -> str:
        while True:
            name = "".join(self._rng.choices(string.ascii_lowercase, k=self._rng.randint(2, 7)))
            if name not in self._taken and not keyword.iskeyword(name) and not hasattr(nn.Module(), name):
                self._taken.add(name)
                return name


class Anonymous(nn.Module):
    """A module whose children, and class, have random names; the code reaches them by role."""

    def __init__(self, names: Names) -> None:
        super().__init__()
        self._names = names
        self._roles: dict[str, str] = {}
        self.__class__ = type(names().title(), (type(self),), {})

    def add(self, role: str, module: nn.Module) -> str:
        """Register a child under a random name, and return that name."""
        self._roles[role] = name = self._names()
        self.add_module(name, module)
        return name

    def child(self, role: str) -> nn.Module:
        return getattr(self, self._roles[role])

    def name_of(self, role: str) -> str:
        return self._roles[role]


def space_to_depth(image: Tensor) -> Tensor:
    """Halve every spatial axis and move what it held into the channels."""
    batch, channels, *size = image.shape
    image = image.reshape(batch, channels, *(part for n in size for part in (n // 2, 2)))
    dims = len(size)
    order = (0, 1, *(3 + 2 * axis for axis in range(dims)), *(2 + 2 * axis for axis in range(dims)))
    return image.permute(order).reshape(batch, channels * 2**dims, *(n // 2 for n in size))


def depth_to_space(image: Tensor) -> Tensor:
    """The inverse of `space_to_depth`."""
    batch, channels, *size = image.shape
    dims = len(size)
    image = image.reshape(batch, channels // 2**dims, *([2] * dims), *size)
    order = (0, 1, *(axis for n in range(dims) for axis in (2 + dims + n, 2 + n)))
    return image.permute(order).reshape(batch, channels // 2**dims, *(2 * n for n in size))


@dataclass(frozen=True)
class Resampling:
    """How an owner halves or doubles the resolution: what it calls, with modules that are its own children."""

    kind: str
    dims: int
    layer: str | None = None
    upsample: str | None = None

    def __call__(self, owner: nn.Module, image: Tensor) -> Tensor:
        layer = getattr(owner, self.layer) if self.layer else None
        if self.kind in ("avg_function", "max_function"):
            return POOLED[self.kind[:3]][self.dims](image, 2)
        if self.kind == "unshuffle":
            return layer(space_to_depth(image))
        if self.kind == "interpolate":
            return layer(F.interpolate(image, scale_factor=2.0))
        if self.kind == "upsample":
            return layer(getattr(owner, self.upsample)(image))
        if self.kind == "shuffle":
            return depth_to_space(layer(image))
        if self.kind == "late":
            return F.interpolate(layer(image), scale_factor=2.0)
        return layer(image)

    @property
    def ends_in_layer(self) -> bool:
        """Is the layer's output already the result?"""
        return self.kind not in ("shuffle", "late")


def make_down(owner: Anonymous, role: str, kind: str, dims: int, width: int) -> Resampling:
    if kind in ("avg_function", "max_function"):
        return Resampling(kind, dims)
    layers = {
        "strided": lambda: CONV[dims](width, width, 3, stride=2, padding=1),
        "avg": lambda: AVG_POOL[dims](2),
        "max": lambda: MAX_POOL[dims](2),
        "unshuffle": lambda: CONV[dims](width * 2**dims, width, 1),
    }
    return Resampling(kind, dims, owner.add(role, layers[kind]()))


def make_up(
    owner: Anonymous, role: str, kind: str, dims: int, width: int, out: int, shared: nn.Upsample | None
) -> Resampling:
    layers = {
        "transposed": lambda: CONV_TRANSPOSE[dims](width, out, 2, stride=2),
        "interpolate": lambda: CONV[dims](width, out, 3, padding=1),
        "upsample": lambda: CONV[dims](width, out, 3, padding=1),
        "shuffle": lambda: CONV[dims](width, out * 2**dims, 1),
        "late": lambda: CONV[dims](width, out, 3, padding=1),
    }
    layer = owner.add(role, layers[kind]())
    if kind != "upsample":
        return Resampling(kind, dims, layer)
    return Resampling(kind, dims, layer, owner.add(f"{role} upsample", shared or nn.Upsample(scale_factor=2.0)))


class Wrapped(Anonymous):
    """A resampling in a module of its own."""

    def __init__(self, names: Names) -> None:
        super().__init__(names)
        self.step: Resampling | None = None

    def forward(self, image: Tensor) -> Tensor:
        return self.step(self, image)


class Block(Anonymous):
    """Two convolutions with a norm and an activation each, the time added between; residual or not."""

    def __init__(
        self, names: Names, dims: int, width: int, out: int, time: int, *, residual: bool, act: nn.Module
    ) -> None:
        super().__init__(names)
        self.add("norm1", nn.GroupNorm(4, width))
        self.add("conv1", CONV[dims](width, out, 3, padding=1))
        self.add("norm2", nn.GroupNorm(4, out))
        self.add("conv2", CONV[dims](out, out, 3, padding=1))
        self.add("act", act)
        if time:
            self.add("time", nn.Linear(time, out))
        if residual and width != out:
            self.add("shortcut", CONV[dims](width, out, 1))
        self.residual = residual

    def forward(self, image: Tensor, time: Tensor | None) -> Tensor:
        act = self.child("act")
        hidden = self.child("conv1")(act(self.child("norm1")(image)))
        if time is not None:
            projected = self.child("time")(time)
            hidden = hidden + projected[(...,) + (None,) * (image.ndim - 2)]
        hidden = self.child("conv2")(act(self.child("norm2")(hidden)))
        if not self.residual:
            return hidden
        return hidden + (self.child("shortcut")(image) if "shortcut" in self._roles else image)


class TimeEmbedding(Anonymous):
    """Sine and cosine of the time, then two linear layers."""

    def __init__(self, names: Names, width: int) -> None:
        super().__init__(names)
        self.add("first", nn.Linear(8, width))
        self.add("second", nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        angles = time[:, None].float() * torch.logspace(0, -3, 4, device=time.device)
        return self.child("second")(F.silu(self.child("first")(torch.cat((angles.sin(), angles.cos()), dim=1))))
