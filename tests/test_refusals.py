"""Refusals tell what stands in the way: dense skips, transformers whose tokens are folded and unfolded."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import clockwork_hooks as ch
from tests.bendable import Tiny, noise


def conv(a: int, b: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, stride, 1)


def why(unet: nn.Module, *args: Tensor) -> str:
    """The line of the refusal that says why."""
    with pytest.raises(ch.RegionNotFoundError) as caught:
        ch.find_regions(unet.eval(), *args)
    return str(caught.value.seen["why"])


class Node(nn.Module):
    """A block of a decoder: it enlarges what comes from below, and joins what comes from the side."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.layer = conv(a, b)

    def forward(self, below: Tensor, *skips: Tensor) -> Tensor:
        return F.relu(self.layer(torch.cat([F.interpolate(below, scale_factor=2.0), *skips], 1)))


class PlusPlus(nn.Module):
    """UNet++ as decoders of segmentation have it: nothing at full size but the last block, dense skips below."""

    def __init__(self) -> None:
        super().__init__()
        self.e1, self.e2, self.e3, self.e4 = conv(3, 8, 2), conv(8, 8, 2), conv(8, 8, 2), conv(8, 8, 2)
        self.d31, self.d21, self.d11 = Node(16, 8), Node(16, 8), Node(16, 8)
        self.d22, self.d12, self.d13 = Node(24, 8), Node(24, 8), Node(32, 8)
        self.last, self.head = Node(8, 8), conv(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.e1(x).relu()
        b = self.e2(a).relu()
        c = self.e3(b).relu()
        d = self.e4(c).relu()
        b1, a1, c1 = self.d21(c, b), self.d11(b, a), self.d31(d, c)
        b2, a2 = self.d22(c1, b, b1), self.d12(b1, a, a1)
        return self.head(self.last(self.d13(b2, a, a1, a2)))


def test_dense_skips_are_several_exits_though_a_small_part_of_them_has_one() -> None:
    says = why(PlusPlus(), torch.randn(1, 3, 64, 64))
    assert says.startswith("no single exit: several exits lead back up to 32×32: ")
    assert [name in says for name in ("in d11", "in d12", "in d13", "in d21", "too small")] == [True] * 3 + [False] * 2


class UViT(nn.Module):
    """U-ViT: long skips between layers of one width; the tokens are unfolded to pixels before the last convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time = nn.Conv2d(3, 32, 4, 4), nn.Linear(1, 32)
        self.inward, self.middle, self.outward = self.layer(), self.layer(), self.layer()
        self.skip, self.decoder, self.last = nn.Linear(64, 32), nn.Linear(32, 48), conv(3, 3)

    @staticmethod
    def layer() -> nn.TransformerEncoderLayer:
        return nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = torch.cat((self.time(t[:, None])[:, None], self.embed(x).flatten(2).transpose(1, 2)), 1)
        first = self.inward(tokens)
        tokens = self.outward(self.skip(torch.cat((self.middle(first), first), -1)))
        patches = self.decoder(tokens)[:, 1:].unflatten(1, (8, 8)).unflatten(3, (4, 4, 3))
        return self.last(patches.permute(0, 5, 1, 3, 2, 4).reshape(x.shape))


def test_the_way_back_up_of_a_transformer_is_named_with_the_layer_that_it_comes_from() -> None:
    says = why(UViT(), torch.randn(1, 3, 32, 32), torch.ones(1))
    assert says.startswith("nothing of 32×32 goes round the low resolutions: all passes ")
    assert " in the root, of decoder, and kept from the step before" in says


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_class_is_no_model() -> None:
    with pytest.raises(ch.WrapError, match=r"the class Linear\nWhat to do: pass an instance: unet = Linear\(\.\.\.\)"):
        ch.wrap(nn.Linear)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_model_of_torch_jit_cannot_be_wrapped() -> None:
    with pytest.raises(ch.WrapError, match=r"(?s)a torch\.jit model is fixed.*made of: Conv2d.*nn\.Module that it was"):
        ch.wrap(torch.jit.trace(conv(3, 3), torch.zeros(1, 3, 8, 8)))


def test_the_report_says_which_operators_no_count_has() -> None:
    class Fourier(Tiny):
        def low(self, h: Tensor, t: Any) -> Tensor:
            return torch.fft.ifft2(torch.fft.fft2(super().low(h, t))).real

    for unet, lines in ((Tiny().eval(), []), (Fourier().eval(), ["  lower bound  not counted: _fft_c2c"])):
        with torch.no_grad(), ch.wrap(unet) as cw:
            unet(noise(), torch.ones(2))
            said = [line for line in str(cw.report()).splitlines() if "lower bound" in line]
            assert [line[: len(lines[0])] if lines else line for line in said] == lines
            assert bool(cw.report().to_dict()["uncounted"]) == bool(lines)


def test_every_printed_form_says_what_no_count_has() -> None:
    """Also where a region that was found before is given, and nothing is recorded."""

    class Fourier(Tiny):
        def low(self, h: Tensor, t: Any) -> Tensor:
            return torch.fft.ifft2(torch.fft.fft2(super().low(h, t))).real

    unet, x, t = Fourier().eval(), noise(), torch.ones(2)
    region = ch.find_region(unet, x, t)
    with torch.no_grad(), ch.wrap(unet, region=region) as cw:
        unet(x, t)
        report = cw.report()
    reports = [report, ch.flops_report(unet, x, t), ch.flops_report(unet, x, t, region=region)]
    for form in [f(one) for one in reports for f in (str, lambda r: r.to_markdown(), lambda r: r.to_html())]:
        assert re.search(r"not counted: _?fft_", form)
        assert "ower bound" in form
    assert all("fft_" in one.to_json() for one in reports)
    assert re.search(r"lower bound +not counted: fft_fft2", str(region))
    timed = ch.bench(unet, x, t, steps=2, rounds=1, clocks=(2,), console=Console(quiet=True))
    assert "MACs are a lower bound; not counted: fft_fft2" in str(timed)


class Guided(nn.Module):
    """Guidance inside `forward`: the same network is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Tiny()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        plain, bent = self.net(x, t), self.net(x.flip(-1), t)
        return plain + 2.0 * (bent.flip(-1) - plain)


def test_of_two_passes_in_one_call_the_one_that_is_not_skipped_is_told() -> None:
    says = "not skipped: 1 of 2 calls of net.up in one forward"
    unet = Guided().eval()
    region = ch.find_region(unet, noise(), torch.ones(2))
    assert [row for row in region.rows() if row[0] == "not skipped"] == [tuple(says.split(": "))]
    assert 2 * region.macs < region.full_macs
    with torch.no_grad(), ch.wrap(unet) as cw:
        unet(noise(), torch.ones(2))
        assert f"({says})" in str(cw.report())
    alone = ch.find_region(unet.net, noise(), torch.ones(2))
    assert alone.not_skipped == ""
    assert "not skipped" not in str(alone)
