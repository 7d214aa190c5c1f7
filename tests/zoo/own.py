"""UNets of our own, for what the path through one can look like."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import ZooCase, case
from tests.zoo.own_base import ABOVE, BELOW, Block, Small, conv, small


def _double(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class PlainUNet(nn.Module):
    """Ronneberger's UNet, two poolings deep: thirty lines, no time, no library."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = _double(3, 8)
        self.down2 = _double(8, 16)
        self.middle = _double(16, 32)
        self.up2 = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.merge2 = _double(32, 16)
        self.up1 = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.merge1 = _double(16, 8)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        one = self.down1(image)
        two = self.down2(F.max_pool2d(one, 2))
        three = self.middle(F.max_pool2d(two, 2))
        two = self.merge2(torch.cat((self.up2(three), two), dim=1))
        one = self.merge1(torch.cat((self.up1(two), one), dim=1))
        return self.out(one)


@case
def plain() -> ZooCase:
    return small(
        PlainUNet(),
        "plain",
        "PlainUNet.forward: `one` is a skip and goes into a functional max pooling, so no module consumes the "
        "entry; `up1` gives the top resolution again, the cat with `one` comes next. `down1` ends in an in-place ReLU: "
        "`down1.3` returns the same tensor, but before it is written to, so it is not the entry.",
        args=(torch.randn(2, 3, 16, 24),),
        entry=("down1", "down1.4"),
        consumer=None,
        exit=("up1",),
        resolution=(16, 24),
        source="our own, without time",
        skipped=frozenset({"down2", "middle", "up2", "merge2"}),
        outside=frozenset({"down1", "merge1", "out"}),
    )


class AddSkips(Small):
    def __init__(self) -> None:
        super().__init__()
        self.merge, self.join = Block(16, 16), Block(8, 8)

    def cat(self, x: Tensor, skip: Tensor) -> Tensor:
        return x + skip


@case
def add_skips() -> ZooCase:
    return small(AddSkips(), "add_skips", "AddSkips.cat: skips are added, so entry and exit meet in a sum.")


class Nested(nn.Module):
    """One level around the next, which is a child of it."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.before, self.after = Block(width, width), Block(2 * width, width)
        self.down, self.up = conv(width, 2 * width, 2), nn.ConvTranspose2d(2 * width, width, 4, 2, 1)
        self.inner = Nested(2 * width, levels - 1) if levels > 1 else Block(2 * width, 2 * width)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.before(x, emb)
        return self.after(torch.cat((x, self.up(self.inner(self.down(x), emb))), dim=1), emb)


class Recursive(Small):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.time, self.stem, self.body, self.head = Small().time, conv(3, 8), Nested(8, 2), conv(8, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x), self.time(t)))


@case
def nested() -> ZooCase:
    return small(
        Recursive(),
        "nested",
        "Nested.forward: the skip goes round `down`, `inner`, `up`, all children of `body`, which itself straddles "
        "the region's edge; `body.inner` holds all deeper levels.",
        entry=("body.before",),
        consumer="body.down",
        exit=("body.up",),
        skipped=frozenset({"body.down", "body.inner"}),
        outside=frozenset({"time", "stem", "body.before", "body.after", "head"}),
    )


class Shuffled(Small):
    """A stem that folds 2×2 pixels into channels, and downsampling by the same."""

    def __init__(self) -> None:
        super().__init__(12)
        self.fold, self.unfold = nn.PixelUnshuffle(2), nn.PixelShuffle(2)
        self.down = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(32, 16, 1))
        self.up = nn.Sequential(nn.Conv2d(16, 32, 1), nn.PixelShuffle(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unfold(super().forward(self.fold(x), t))


@case
def unshuffled() -> ZooCase:
    return small(
        Shuffled(),
        "unshuffled",
        "Shuffled: the stem's pixel-unshuffle comes before any skip, so the highest level is half the sample's size; "
        "`down` begins and `up` ends with a pixel (un)shuffle, whose module returns the exit too.",
        args=(torch.randn(2, 3, 32, 32), torch.tensor([0.3, 0.8])),
        exit=("up", "up.1"),
        skipped=BELOW | {"up.0"},
        outside=ABOVE,
    )


class SharedUpsampler(Small):
    def __init__(self) -> None:
        super().__init__()
        self.grow = nn.Upsample(scale_factor=2.0)
        self.rise, self.up = conv(32, 16), conv(16, 8)

    def deeper(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.grow(self.rise(self.deep(self.sink(x), emb)))

    def below(self, x: Tensor, emb: Tensor) -> Tensor:
        low = self.low(self.down(x), emb)
        return self.grow(self.up(self.merge(self.cat(self.deeper(low, emb), low), emb)))


@case
def shared_upsampler() -> ZooCase:
    return small(
        SharedUpsampler(),
        "shared_upsampler",
        "SharedUpsampler: one nn.Upsample is called at both levels; its second call is the exit.",
        exit=("grow",),
        exit_call=1,
        skipped=BELOW | {"up"},
    )


class InPlaceEntry(Small):
    def below(self, x: Tensor, emb: Tensor) -> Tensor:
        return super().below(F.silu(x, inplace=True), emb)


@case
def in_place_entry() -> ZooCase:
    return small(
        InPlaceEntry(),
        "in_place_entry",
        "InPlaceEntry.below: the tensor that `high` returned is written to on its way down, and the skip sees that: "
        "the entry is the same tensor after the write, which no module returns.",
        entry=(),
    )


class PaddedAfter(Small):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(16, 8, 3, 2, 1)

    def below(self, x: Tensor, emb: Tensor) -> Tensor:
        return F.pad(super().below(x, emb), (0, 1, 0, 1))


@case
def padded_after() -> ZooCase:
    return small(
        PaddedAfter(),
        "padded_after",
        "PaddedAfter.below: `up` gives 15x15 pixels and the root pads them: the last tensor that a module returns is "
        "one pixel smaller than the entry, and so is what the adaptor predicts.",
        exit_resolution=(15, 15),
    )


class InterpolatedAfter(Small):
    def __init__(self) -> None:
        super().__init__()
        self.up = conv(16, 8)

    def below(self, x: Tensor, emb: Tensor) -> Tensor:
        return F.interpolate(super().below(x, emb), scale_factor=2.0)


@case
def interpolated_after() -> ZooCase:
    return small(
        InterpolatedAfter(),
        "interpolated_after",
        "InterpolatedAfter.below: the root enlarges what `up` gives, at half the entry's size.",
        exit_resolution=(8, 8),
    )


class UnusedSkip(Small):
    """The highest skip is made and thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.join = Block(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time(t)
        high = self.high(self.stem(x), emb)
        self.cat(below := self.below(high, emb), high)
        return self.head(self.join(below, emb))


@case
def unused_skip() -> ZooCase:
    return small(
        UnusedSkip(),
        "unused_skip",
        "UnusedSkip.forward: the cat with the highest skip goes nowhere, so nothing goes round at full size: the "
        "region is one level lower, round `sink`, `deep`, `rise`.",
        entry=("low",),
        consumer="sink",
        exit=("rise",),
        resolution=(8, 8),
        skipped=frozenset({"sink", "deep"}),
        outside=frozenset({"time", "stem", "high", "down", "low", "merge", "up", "join", "head"}),
    )


class Entries(Small):
    """The sample itself, pooled, enters each level; two features of full size enter as well."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.image, self.small_image = Block(8, 8), conv(3, 16), conv(3, 32)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time(t)
        one = self.high(self.stem(x), emb)
        two = self.second(one, emb)
        half = F.avg_pool2d(x, 2)
        low = self.low(self.down(two) + F.avg_pool2d(torch.cat((one, one), dim=1), 2) + self.image(half), emb)
        deep = self.rise(self.deep(self.sink(low) + self.small_image(F.avg_pool2d(half, 2)), emb))
        up = self.up(self.merge(self.cat(deep, low), emb))
        return self.head(self.join(self.cat(up, one + two), emb))


@case
def several_entries() -> ZooCase:
    return small(
        Entries(),
        "several_entries",
        "Entries.forward: the sample, `one` and `two` all flow in at full size, one tensor flows out, `up`. The "
        "adaptor reads the latest, `two`, that `second` returns.",
        entry=("second",),
        skipped=BELOW | {"image", "small_image"},
        outside=ABOVE | {"second"},
    )


class Gate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(self.squeeze(x.mean(dim=(2, 3), keepdim=True)).relu()).sigmoid()


class Gated(Small):
    def __init__(self) -> None:
        super().__init__()
        self.gate_high, self.gate_low, self.gate_join = Gate(8), Gate(16), Gate(8)

    def below(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.up(self.merge(self.cat(self.deeper(x, emb), x), emb))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time(t)
        high = self.gate_high(self.high(self.stem(x), emb))
        low = self.gate_low(self.low(self.down(high), emb))
        return self.head(self.gate_join(self.join(self.cat(self.below(low, emb), high), emb)))


@case
def squeeze_excite() -> ZooCase:
    return small(
        Gated(),
        "squeeze_excite",
        "Gate.forward: convolutions of one pixel, which are no lower resolution, at every level: without them in the "
        "way, `gate_high` returns the entry.",
        entry=("gate_high",),
        skipped=BELOW | {"gate_low"},
        outside=ABOVE | {"gate_high", "gate_join"},
    )
