"""Which region is found in UNets of every build; each one proven by execution, each refusal with its reason."""

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

import clockwork_hooks as ch
from benchmarks.guided import GuidedUNet
from clockwork_hooks.models import load_model
from clockwork_hooks.regions.find import regions_of
from tests.bendable import Tiny, noise, proven

T = torch.tensor([3.0, 3.0])


def conv(a: int, b: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, stride, 1)


class Deep(Tiny):
    """Three levels: 16, 8, 4; `levels[k]` runs below level k."""

    def __init__(self) -> None:
        super().__init__()
        self.down2, self.deep, self.up2 = conv(32, 64, 2), conv(64, 64), nn.ConvTranspose2d(64, 32, 4, 2, 1)
        self.merge = conv(64, 32)

    def lower(self, h: Tensor) -> Tensor:
        return self.up2(self.deep(self.down2(h)))

    def low(self, h: Tensor, t: Any) -> Tensor:
        h = self.body(self.down(h) + self.time(t, h))
        return self.up(self.merge(torch.cat((h, self.lower(h)), 1)))


# -- where it is --------------------------------------------------------------------------------------------------


class AddSkips(Tiny):
    def join(self, h: Tensor, low: Tensor) -> Tensor:
        return self.head(torch.cat((h + low, h + low), 1))


class Unshuffled(Tiny):
    """The stem folds 2×2 pixels into channels: the highest level is half the sample's size."""

    def __init__(self) -> None:
        super().__init__(12)

    def forward(self, x: Tensor, t: Any) -> Tensor:
        return F.pixel_shuffle(super().forward(F.pixel_unshuffle(x, 2), t), 2)


class InPlaceEntry(Tiny):
    """The entry is rectified in place on its way into the region, which the skip sees too."""

    def low(self, h: Tensor, t: Any) -> Tensor:
        return super().low(F.relu_(h), t)


class PaddedAfter(Tiny):
    """The parent pads what comes up; the adaptor predicts it before."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(32, 8, 3, 2, 1)

    def low(self, h: Tensor, t: Any) -> Tensor:
        return F.pad(super().low(h, t), (0, 1, 0, 1))


class InterpolatedAfter(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.up = conv(32, 8)

    def low(self, h: Tensor, t: Any) -> Tensor:
        return F.interpolate(super().low(h, t), scale_factor=2.0)


class UnusedSkip(Deep):
    """Nobody reads the highest skip: the region is one level lower."""

    def join(self, h: Tensor, low: Tensor) -> Tensor:
        return self.head(torch.cat((low, low), 1))


class ScaledEntries(Tiny):
    """The image pyramid enters at every level."""

    def __init__(self) -> None:
        super().__init__()
        self.side = conv(3, 32)

    def forward(self, x: Tensor, t: Any) -> Tensor:
        h = self.stem(x)
        low = self.body(self.down(h) + self.side(F.avg_pool2d(x, 2)) + self.time(t, h))
        return self.join(h, self.up(low))


class TwoFullEntries(Tiny):
    """Two tensors of full size enter; the adaptor reads the later one."""

    def __init__(self) -> None:
        super().__init__()
        self.second = conv(8, 8)

    def forward(self, x: Tensor, t: Any) -> Tensor:
        one = self.stem(x)
        two = self.second(one)
        return self.join(one + two, self.up(self.body(self.down(one) + self.down(two))))


class Gated(Tiny):
    """Squeeze-excite gates at full size around a region that is one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())

    def low(self, h: Tensor, t: Any) -> Tensor:
        return super().low(h * self.gate(h), t)


class Tokens(Tiny):
    """The low-resolution part works on tokens, (B, H·W, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)

    def low(self, h: Tensor, t: Any) -> Tensor:
        h = self.down(h)
        tokens = self.mix(h.flatten(2).transpose(1, 2))
        return self.up(self.body(tokens.transpose(1, 2).reshape(h.shape)))


class ChannelsLast(Tiny):
    """Entry and exit are (B, H, W, C), and so is what joins them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: Tensor, t: Any) -> Tensor:
        h = self.first(self.stem(x).permute(0, 2, 3, 1).contiguous())
        low = self.last(self.low(h.permute(0, 3, 1, 2), t).permute(0, 2, 3, 1).contiguous())
        return self.head(torch.cat((h, low), 3).permute(0, 3, 1, 2))


class SharedUpsample(Deep):
    """One nn.Upsample serves all levels: its second call is the exit."""

    def __init__(self) -> None:
        super().__init__()
        self.grow = nn.Upsample(scale_factor=2.0)
        self.deep, self.merge = conv(64, 32), conv(64, 8)

    def low(self, h: Tensor, t: Any) -> Tensor:
        h = self.body(self.down(h) + self.time(t, h))
        return self.grow(self.merge(torch.cat((h, self.grow(self.deep(self.down2(h)))), 1)))


class WithAux(Tiny):
    """The exit is the first of a tuple."""

    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(32, 8, 4, 2, 1)

        def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
            return self.up(h) * 2, h.mean()

    def __init__(self) -> None:
        super().__init__()
        self.up = self.Up()

    def low(self, h: Tensor, t: Any) -> Tensor:
        return self.up(self.body(self.down(h)))[0]


class OddSizes(Tiny):
    """Sizes that two does not divide: padded on the way down, cut on the way up."""

    def low(self, h: Tensor, t: Any) -> Tensor:
        padded = F.pad(h, (0, h.shape[3] % 2, 0, h.shape[2] % 2))
        return super().low(padded, t)[..., : h.shape[2], : h.shape[3]]


class Straddled(Tiny):
    """One module holds the region's last layer and the head above it: only the first may be skipped."""

    class Decoder(nn.Module):
        def __init__(self, up: nn.Module, head: nn.Module) -> None:
            super().__init__()
            self.up, self.head = up, head

        def forward(self, h: Tensor, low: Tensor) -> Tensor:
            return self.head(torch.cat((h, self.up(low)), 1))

    def __init__(self) -> None:
        super().__init__()
        self.decoder = self.Decoder(self.up, self.head)
        del self.up, self.head

    def forward(self, x: Tensor, t: Any) -> Tensor:
        h = self.stem(x)
        return self.decoder(h, self.body(self.down(h) + self.time(t, h)))


class Previewed(Tiny):
    """A part as large as the region sees the pooled sample itself: there are no features to read before it."""

    def __init__(self) -> None:
        super().__init__()
        layers = (conv(3, 48), *(nn.SiLU() for _ in range(30)), conv(48, 48), conv(48, 3))
        self.preview = nn.Sequential(nn.AvgPool2d(2), *layers, nn.Upsample(scale_factor=2.0))

    def forward(self, x: Tensor, t: Any) -> Tensor:
        return super().forward(x + self.preview(x), t)


# kind, sample, entry, exit, exit's call, resolution
PLACES: list[tuple[type[Tiny], tuple[int, ...], str, str, int, tuple[int, ...]]] = [
    (AddSkips, (2, 3, 16, 16), "stem", "up", 0, (16, 16)),
    (Unshuffled, (2, 3, 32, 32), "stem", "up", 0, (16, 16)),
    (InPlaceEntry, (2, 3, 16, 16), "relu in the root", "up", 0, (16, 16)),
    (PaddedAfter, (2, 3, 16, 16), "stem", "up", 0, (16, 16)),
    (InterpolatedAfter, (2, 3, 16, 16), "stem", "up", 0, (16, 16)),
    (UnusedSkip, (2, 3, 16, 16), "body", "up2", 0, (8, 8)),
    (ScaledEntries, (2, 3, 16, 16), "stem", "up", 0, (16, 16)),
    (TwoFullEntries, (2, 3, 16, 16), "second", "up", 0, (16, 16)),
    (Gated, (2, 3, 16, 16), "stem", "up", 0, (16, 16)),
    (Tokens, (2, 3, 16, 16), "stem", "up", 0, (16, 16)),
    (ChannelsLast, (2, 3, 32, 32), "first", "last", 0, (32, 32)),
    (SharedUpsample, (2, 3, 16, 16), "stem", "grow", 1, (16, 16)),
    (WithAux, (2, 3, 16, 16), "stem", "up", 0, (16, 16)),
    (OddSizes, (2, 3, 17, 13), "stem", "up", 0, (17, 13)),
    (Deep, (2, 3, 16, 16), "stem", "up", 0, (16, 16)),
    (Straddled, (2, 3, 16, 16), "stem", "decoder.up", 0, (16, 16)),
    (Previewed, (2, 3, 16, 16), "stem", "up", 0, (16, 16)),
]


@pytest.mark.parametrize(("kind", "shape", "entry", "exit", "call", "resolution"), PLACES)
def test_the_region_is_found_and_proven(
    kind: type[Tiny], shape: tuple[int, ...], entry: str, exit: str, call: int, resolution: tuple[int, ...]
) -> None:
    region = proven(kind(), noise(*shape), T)
    assert (region.entry.path, region.exit.path, region.exit.call) == (entry, exit, call)
    assert region.resolution == resolution
    assert region.level == 1


def test_the_adaptor_s_tensor_comes_before_what_the_parent_does_to_it() -> None:
    assert ch.find_region(PaddedAfter(), noise(), T).exit.shape == (2, 8, 15, 15)
    assert ch.find_region(InterpolatedAfter(), noise(), T).exit.shape == (2, 8, 8, 8)


def test_several_entries_are_listed_and_the_latest_of_full_size_is_read() -> None:
    region = ch.find_region(ScaledEntries(), noise(), T)
    assert [entry.shape for entry in region.entries] == [(2, 3, 16, 16), (2, 8, 16, 16)]
    assert region.entry.path == "stem"
    assert "other entries      x 2×3×16×16" in str(region)
    both = ch.find_region(TwoFullEntries(), noise(), T)
    assert [entry.path for entry in both.entries] == ["stem", "second"]


def test_each_region_contains_the_next() -> None:
    """Of two UNets in a row one is taken, whole; nothing of the other."""

    class Row(Deep):
        def __init__(self) -> None:
            super().__init__()
            self.first = Deep()

        def forward(self, x: Tensor, t: Any) -> Tensor:
            return super().forward(self.first(x, t), t)

    skipped = [call.path for region in ch.find_regions(Row(), noise(), T) for call in region.skipped]
    assert len({path.startswith("first.") for path in skipped}) == 1
    assert len(skipped) == len(set(skipped))


def test_regions_nest() -> None:
    model, x = Deep(), noise()
    outer, inner = ch.find_regions(model, x, T)
    assert (outer.level, outer.resolution, inner.level, inner.resolution) == (1, (16, 16), 2, (8, 8))
    assert (inner.entry.path, inner.exit.path) == ("body", "up2")
    assert ch.find_region(model, x, T, level=2) == inner
    assert outer.bottleneck == inner.bottleneck == (4, 4)
    for region in (inner, outer.inner, inner.inner):
        assert region is not None
        proven(model, x, T, region=region)


# -- video --------------------------------------------------------------------------------------------------------


class Video(Tiny):
    """Frames folded into the batch for 2-D convolutions, pixels folded into it for 1-D ones along the frames."""

    def __init__(self) -> None:
        super().__init__()
        self.along, self.below = nn.Conv1d(8, 8, 3, 1, 1), nn.Conv1d(32, 32, 3, 1, 1)

    @staticmethod
    def frames(layer: nn.Module, h: Tensor, batch: int) -> Tensor:
        count, channels, *space = h.shape
        h = h.reshape(batch, -1, channels, *space).permute(0, 3, 4, 2, 1)
        out = layer(h.reshape(-1, channels, count // batch)).reshape(h.shape)
        return out.permute(0, 4, 3, 1, 2).reshape(count, channels, *space)

    def forward(self, x: Tensor, t: Any) -> Tensor:
        flat = x.transpose(1, 2).flatten(0, 1)
        h = self.frames(self.along, self.stem(flat), len(x))
        low = self.up(self.frames(self.below, self.body(self.down(h)), len(x)))
        return self.join(h, low).reshape(len(x), -1, *flat.shape[1:]).transpose(1, 2)


class Volumes(nn.Module):
    """3-D convolutions that halve space and keep the frames."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body = nn.Conv3d(3, 8, 3, 1, 1), nn.Conv3d(32, 32, 3, 1, 1)
        self.down = nn.Conv3d(8, 32, (1, 4, 4), (1, 2, 2), (0, 1, 1))
        self.up = nn.ConvTranspose3d(32, 8, (1, 4, 4), (1, 2, 2), (0, 1, 1))
        self.head = nn.Conv3d(16, 3, 3, 1, 1)

    def forward(self, x: Tensor, t: Any) -> Tensor:
        h = self.stem(x)
        return self.head(torch.cat((h, self.up(self.body(self.down(h)))), 1))


class FramesOnly(nn.Module):
    """Convolutions along the frames at one resolution: no region at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv3d(3, 3, (3, 1, 1), 1, (1, 0, 0)) for _ in range(3)))

    def forward(self, x: Tensor, t: Any) -> Tensor:
        return self.layers(x) + x


def test_frames_are_no_resolution() -> None:
    resolutions = set()
    for batch, frames, height in ((1, 6, 16), (2, 4, 24)):
        region = proven(Video(), noise(batch, 3, frames, height, 16), T[:batch])
        assert (region.resolution, region.bottleneck) == ((height, 16), (height // 2, 8))
        resolutions.add(region.fingerprint)
    assert len(resolutions) == 1
    region = proven(Volumes(), noise(1, 3, 4, 16, 16), T[:1])
    assert region.resolution[-2:] == (16, 16)
    with pytest.raises(ch.RegionNotFoundError):
        ch.find_region(FramesOnly(), noise(1, 3, 4, 16, 16), T[:1])


# -- none ---------------------------------------------------------------------------------------------------------


class Pyramid(Tiny):
    """Every level emits an image of its own; they are summed at full size, and a tiny branch too."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb = nn.ModuleList([conv(8, 3), conv(32, 3)])
        self.tiny_down, self.tiny_up = nn.Conv2d(8, 1, 4, 4), nn.ConvTranspose2d(1, 8, 4, 4)

    def forward(self, x: Tensor, t: Any) -> Tensor:
        h = self.stem(x)
        low = self.body(self.down(h))
        image = F.interpolate(self.rgb[1](low), scale_factor=2.0) + self.rgb[0](h + self.up(low))
        return image + self.head(torch.cat((h, self.tiny_up(self.tiny_down(h))), 1))


class SqueezeOnly(Tiny):
    """The only thing below full size is a squeeze-excite gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.same = nn.Conv2d(8, 8, 3, 1, 1)

    def low(self, h: Tensor, t: Any) -> Tensor:
        h = self.same(h)
        return h * self.gate(h)


class Flat(nn.Module):
    """A vision transformer: one resolution after the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.out = nn.Conv2d(3, 32, 4, 4), nn.ConvTranspose2d(32, 3, 4, 4)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True) for _ in range(4))

    def forward(self, x: Tensor, t: Any) -> Tensor:
        h = self.patch(x)
        tokens = h.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return self.out(tokens.transpose(1, 2).reshape(h.shape))


def test_several_exits_are_named_and_the_tiny_branch_is_not_taken() -> None:
    with pytest.raises(ch.RegionNotFoundError) as caught:
        ch.find_region(Pyramid(), noise(), T)
    assert "several exits lead back up: upsample_nearest2d in the root, up, tiny_up" in str(caught.value)
    assert "stem → tiny_up" in str(caught.value)


@pytest.mark.parametrize("kind", [SqueezeOnly, Flat])
def test_without_a_lower_resolution_there_is_no_region(kind: type[nn.Module]) -> None:
    with pytest.raises(ch.RegionNotFoundError) as caught:
        ch.find_region(kind(), noise(), T)
    text = str(caught.value)
    assert "works below the resolution of its entry" in text
    assert "resolutions: " in text
    assert "find_region(..., entry='blocks.4', exit='blocks.20')" in text
    assert caught.value.seen["model"] == kind.__name__


def test_a_level_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(ch.RegionNotFoundError, match="levels with a region") as caught:
        ch.find_region(Deep(), noise(), T, level=3)
    assert caught.value.seen["levels with a region"] == [1, 2]
    assert "region 1: body → up2" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"cut": "inner"}, {"level": 0}, {"level": True}, {"level": 1.0}, {"entry": "stem"}, {"exit": "up"}],
)
def test_options_have_rules(options: dict[str, Any]) -> None:
    with pytest.raises(ch.ArgumentError):
        ch.find_region(Tiny(), noise(), T, **options)


# -- by hand ------------------------------------------------------------------------------------------------------


def dit() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(2, 8, 4, num_layers=4, sample_size=8, patch_size=2, num_embeds_ada_norm=10)
    for parameter in model.parameters():  # the gates start at zero, which hides every block
        nn.init.normal_(parameter, std=0.1)
    return model.eval(), (noise(2, 4, 8, 8),), {"timestep": torch.tensor([5, 5]), "class_labels": torch.tensor([1, 2])}


def test_blocks_of_a_transformer_by_hand() -> None:
    model, args, kwargs = dit()
    with pytest.raises(ch.RegionNotFoundError, match="by hand"):
        ch.find_region(model, *args, **kwargs)
    region = ch.find_region(model, *args, **kwargs, entry="transformer_blocks.0", exit="transformer_blocks.2")
    proven(model, *args, **kwargs, region=region)
    assert [call.path for call in region.skipped] == ["transformer_blocks.1", "transformer_blocks.2"]
    assert (region.entry.shape, region.exit.shape, region.cut) == ((2, 16, 16), (2, 16, 16), "hand")
    assert 0.4 < region.macs_share < 0.6
    assert "time" in {side.kind for side in region.sides}


def test_by_hand_in_a_unet_is_the_found_region() -> None:
    region = ch.find_region(Deep(), noise(), T)
    by_hand = ch.find_region(Deep(), noise(), T, entry="stem", exit="up")
    assert by_hand.fingerprint == region.fingerprint
    assert by_hand.skipped == region.skipped


def test_by_hand_names_what_else_enters_or_can_be_named() -> None:
    with pytest.raises(ch.RegionNotFoundError, match="also enters: body"):
        ch.find_region(Deep(), noise(), T, entry="deep", exit="up")
    with pytest.raises(ch.RegionNotFoundError, match="goes round the exit: add in the root, body"):
        ch.find_region(Deep(), noise(), T, entry="down", exit="up2")
    with pytest.raises(ch.RegionNotFoundError):
        ch.find_region(Deep(), noise(), T, entry="up", exit="stem")
    with pytest.raises(ch.ArgumentError, match="such modules: stem, down"):
        ch.find_region(Deep(), noise(), T, entry="nowhere", exit="up")
    with pytest.raises(ch.ArgumentError):
        ch.find_region(Deep(), noise(), T, entry="embed", exit="up")  # does not depend on the sample


# -- the paper's cut ----------------------------------------------------------------------------------------------


def test_the_paper_s_cut_of_sd15() -> None:
    """Fig. 8: r_in after the first downsampler, r_out before UP-2's upsampler, 32×32 at the edge."""
    unet, args, kwargs = load_model("sd15")
    traced = ch.trace(unet, *args, **kwargs)
    outer = next(region for region in reversed(regions_of(traced, unet)) if region.level == 1)
    paper = ch.find_region(unet, *args, **kwargs, cut="paper")
    assert paper == outer.inner
    assert (outer.entry.path, outer.exit.path) == ("down_blocks.0.attentions.1", "up_blocks.2.upsamplers.0.conv")
    assert "down_blocks.0.downsamplers.0" in paper.entry.paths
    assert paper.exit.path == "up_blocks.2.attentions.2"
    assert (paper.entry.shape, paper.exit.shape) == ((1, 320, 32, 32), (1, 640, 32, 32))
    assert (outer.resolution, paper.resolution, paper.bottleneck) == ((64, 64), (32, 32), (8, 8))
    skipped = {call.path for call in paper.skipped}
    assert skipped >= {"down_blocks.1", "mid_block", "up_blocks.1", "up_blocks.2.attentions.2"}
    assert not skipped & {"down_blocks.0.downsamplers.0", "up_blocks.2", "up_blocks.2.upsamplers.0"}
    assert round(outer.macs / 1e9, 2) == 248.93
    assert outer.full_macs == paper.full_macs
    assert round(outer.full_macs / 1e9, 2) == 401.64
    assert {(side.kind, side.shape) for side in paper.sides} == {("context", (1, 77, 768)), ("time", (1, 1280))}


def test_the_paper_s_cut_can_be_run() -> None:
    model, x = Deep(), noise()
    region = proven(model, x, T, region=ch.find_region(model, x, T, cut="paper"))
    assert (region.entry.shape[2:], region.exit.shape[2:]) == ((8, 8), (8, 8))
    assert region.cut == "paper"
    assert "up" not in {call.path for call in region.skipped}


def test_a_region_that_has_no_inner_cut_says_so() -> None:
    class AllInOne(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(conv(8, 32, 2), conv(32, 32), nn.ConvTranspose2d(32, 8, 4, 2, 1))

        def forward(self, h: Tensor) -> Tensor:
            for layer in self:
                h = layer.forward(h)
            return h

    model = Tiny()
    model.all = AllInOne()
    model.low = lambda h, t: model.all(h)  # type: ignore[method-assign]
    with pytest.raises(ch.RegionNotFoundError, match="between the region's downsampler"):
        ch.find_region(model, noise(), T, cut="paper")


# -- what a region says -------------------------------------------------------------------------------------------


def test_what_a_region_knows() -> None:
    model = Deep()
    region = ch.find_region(model, noise(), T)
    convs = {"down": 8 * 32 * 16, "body": 32 * 32 * 9, "merge": 64 * 32 * 9, "up": 32 * 8 * 16}
    deep = {"down2": 32 * 64 * 9, "deep": 64 * 64 * 9, "up2": 64 * 32 * 16}
    macs = 2 * (sum(convs.values()) * 64 + sum(deep.values()) * 16)
    assert region.macs == macs
    assert region.macs_share == macs / region.full_macs
    inside = [getattr(model, name) for name in (*convs, *deep)]
    assert region.parameters == sum(p.numel() for module in inside for p in module.parameters())
    assert region.parameter_share == region.parameters / sum(p.numel() for p in model.parameters())
    assert region.leftover == (("add", 1), ("cat", 1))
    assert [(side.kind, side.path, side.inputs, side.shape) for side in region.sides] == [("time", "", ("t",), (2,))]
    assert (region.entry.call, region.entry.dtype, region.entry.resolution) == (0, torch.float32, (16, 16))
    assert sum(down + up for _, down, up in region.by_level) == macs
    assert [space for space, _, _ in region.by_level] == [(16, 16), (8, 8), (4, 4)]


def test_it_prints_as_a_table_and_draws_as_a_u() -> None:
    region = ch.find_region(Deep(), noise(), T)
    table, drawing = str(region).splitlines(), region.draw().splitlines()
    assert len(table) == 12
    assert [line.split()[0] for line in table[1:4]] == ["entry", "exit", "other"]
    assert "16×16 at the edge, 4×4 at the bottleneck" in str(region)
    assert drawing[0].split()[0] == "16×16"
    assert [line.split()[0] for line in drawing[1:]] == ["16×16", "8×8", "4×4"]
    assert all("▇" in line and "│" in line for line in drawing[1:])
    assert max(map(len, drawing)) < 120


def test_a_frozen_region_is_equal_to_itself_in_another_process_or_trace() -> None:
    region = ch.find_region(Tiny(), noise(), T)
    assert region == ch.find_region(Tiny(), noise(), T)
    assert replace(region, level=2) != region
    other = ch.find_region(Tiny(), noise(5, 3, 32, 24), torch.ones(5))
    assert other.fingerprint == region.fingerprint
    assert other != region


def test_fingerprints_at_odd_sizes() -> None:
    class Halves(Tiny):
        def low(self, h: Tensor, t: Any) -> Tensor:
            return F.interpolate(super().low(h, t), size=h.shape[2:])

    model = Halves()
    fingerprints = {
        ch.find_region(model, noise(1, 3, *size), T[:1]).fingerprint for size in ((16, 16), (17, 15), (31, 31))
    }
    assert len(fingerprints) == 1
    deep = {
        tuple(r.fingerprint for r in ch.find_regions(Rounded(), noise(1, 3, *size), T[:1]))
        for size in ((32, 32), (33, 31), (48, 40))
    }
    assert len(deep) == 1


class Rounded(Deep):
    """Sizes are rounded up on the way down, and cut on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = conv(8, 32, 2)

    def lower(self, h: Tensor) -> Tensor:
        return super().lower(h)[..., : h.shape[2], : h.shape[3]]

    def join(self, h: Tensor, low: Tensor) -> Tensor:
        return super().join(h, low[..., : h.shape[2], : h.shape[3]])


def test_many_regions_cost_no_more_than_n_log_n() -> None:
    """Python calls, which are what it takes: a machine's load does not count."""
    costs = []
    for blocks in (4, 16):
        with torch.device("meta"):
            unet = GuidedUNet(8, (1, 2), blocks=blocks, attention=())
            trace = ch.trace(unet, torch.empty(1, 3, 16, 16), torch.empty(1))
        calls = []
        sys.setprofile(lambda frame, event, argument, calls=calls: calls.append(1) if event == "call" else None)
        try:
            regions = regions_of(trace, unet)
        finally:
            sys.setprofile(None)
        assert len(regions) >= blocks  # as many more as there are nodes
        costs.append(len(calls) / (len(trace.nodes) * math.log2(len(trace.nodes))))
    assert costs[1] <= costs[0]
