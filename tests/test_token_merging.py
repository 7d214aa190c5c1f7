"""UNets whose levels are numbers of tokens: linear layers merge and split these, no convolution gets smaller (HDiT)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clockwork_hooks as ch
from tests.bendable import proven


class Layer(nn.Module):
    """Attention and a gated feed-forward layer on (B, H, W, C), with the time added before the first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.time, self.grow, self.shrink = (
            nn.Linear(8, width),
            nn.Linear(width, 4 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x) + self.time(emb)[:, None, None])
        q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        value, gate = self.grow(self.norm(x)).chunk(2, -1)
        return x + self.shrink(value * F.gelu(gate))


class Merge(nn.Module):
    """p × p tokens, side by side, are one."""

    def __init__(self, a: int, b: int, p: int = 2) -> None:
        super().__init__()
        self.p, self.layer = p, nn.Linear(a * p * p, b, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = x.reshape(b, h // self.p, self.p, w // self.p, self.p, c).transpose(2, 3)
        return self.layer(x.reshape(b, h // self.p, w // self.p, c * self.p**2))


class Split(nn.Module):
    """One token becomes p × p, mixed with those of the skip."""

    def __init__(self, a: int, b: int, p: int = 2) -> None:
        super().__init__()
        self.p, self.layer, self.share = p, nn.Linear(a, b * p * p, bias=False), nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        b, h, w, _ = x.shape
        x = self.layer(x).reshape(b, h, w, self.p, self.p, -1).transpose(2, 3).reshape(b, h * self.p, w * self.p, -1)
        return x if skip is None else torch.lerp(skip, x, self.share)


class HDiT(nn.Module):
    """Three levels of tokens, as in "Scalable High-Resolution Pixel-Space Image Synthesis", arXiv 2401.11605."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time, self.patch, self.unpatch = nn.Linear(2, 8), Merge(3, 16, 4), Split(16, 3, 4)
        self.downs = nn.ModuleList([Layer(16), Layer(32)])
        self.ups = nn.ModuleList([Layer(16), Layer(32)])
        self.merges, self.splits = (
            nn.ModuleList([Merge(16, 32), Merge(32, 64)]),
            nn.ModuleList([Split(32, 16), Split(64, 32)]),
        )
        self.middle = Layer(64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb, h = self.time(torch.stack((t.cos(), t.sin()), -1)), self.patch(x.movedim(1, -1))
        skips = []
        for layer, merge in zip(self.downs, self.merges, strict=True):
            skips.append(layer(h, emb))
            h = merge(skips[-1])
        h = self.middle(h, emb)
        for layer, split, skip in reversed(list(zip(self.ups, self.splits, skips, strict=True))):
            h = layer(split(h, skip), emb)
        return self.unpatch(h).movedim(-1, 1)


def test_the_region_lies_below_the_level_of_most_tokens() -> None:
    for size, batch in ((32, 1), (64, 3)):
        region = ch.find_region(HDiT().eval(), torch.randn(batch, 3, size, size), torch.ones(batch))
        assert (region.entry.path, region.exit.path) == ("downs.0", "splits.0.layer")
        assert (region.resolution, region.bottleneck) == ((size // 4,) * 2, (size // 16,) * 2)
        skipped = {"merges.0", "downs.1", "merges.1", "middle", "splits.1", "ups.1", "splits.0.layer"}
        assert {call.path for call in region.skipped} == skipped


def test_it_is_skipped_and_full_passes_are_exact() -> None:
    unet, times, x = HDiT().eval(), torch.linspace(1, 0.1, 6), torch.randn(2, 3, 32, 32)
    region = proven(unet, x, times[:1].expand(2))
    with torch.no_grad():
        plain = [unet(x, t.expand(2)) for t in times]
        with ch.wrap(unet, region=region) as cw, cw.trajectory():
            served = [unet(x, t.expand(2)) for t in times]
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (3, 3)
    assert [torch.equal(a, b) for a, b in zip(plain, served, strict=True)] == [True, False] * 3


class Plain(nn.Module):
    """A transformer on patches, merged by a layer and never split but for the pixels: no UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.layer, self.unpatch = Merge(3, 16, 4), Layer(16), Split(16, 3, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unpatch(self.layer(self.patch(x.movedim(1, -1)), t[:, None].expand(-1, 8))).movedim(-1, 1)


def test_patches_alone_make_no_level() -> None:
    with pytest.raises(ch.RegionNotFoundError) as caught:
        ch.find_region(Plain().eval(), torch.randn(1, 3, 32, 32), torch.ones(1))
    assert str(caught.value.seen["why"]).startswith("no resolution change")
