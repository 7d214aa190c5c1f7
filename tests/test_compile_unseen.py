"""`cw.compile()` on UNets that nobody named: other ways to write one, each two graphs and the same numbers."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import clockwork_hooks as ch
from tests.snapshot import snapshot
from tests.tape import FakeCuda
from tests.test_compile import _fresh, cuda  # noqa: F401  (fixtures)

TIMES = (900, 700, 500, 300, 200, 100)


def embedded(t: Tensor, width: int) -> Tensor:
    frequencies = torch.exp(-math.log(1e4) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t.reshape(-1, 1).float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Resampled(nn.Module):
    """A residual block with scale-shift norm that also resamples, as ADM's do; checkpointed where asked."""

    def __init__(self, come: int, go: int, emb: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale, self.norm, self.conv = scale, nn.GroupNorm(2, come), nn.Conv2d(come, go, 3, 1, 1)
        self.emb, self.out_norm = nn.Linear(emb, 2 * go), nn.GroupNorm(2, go)
        self.out_conv = nn.Conv2d(go, go, 3, 1, 1)
        self.skip = nn.Identity() if come == go else nn.Conv2d(come, go, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return checkpoint(self._forward, x, emb, use_reentrant=False) if self.training else self._forward(x, emb)

    def _resample(self, x: Tensor) -> Tensor:
        return x if self.scale == 1 else nn.functional.interpolate(x, scale_factor=self.scale, mode="nearest")

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv(self._resample(nn.functional.silu(self.norm(x))))
        scale, shift = self.emb(nn.functional.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.out_conv(nn.functional.silu(self.out_norm(h) * (1 + scale) + shift))
        return self.skip(self._resample(x)) + h


class ScaleShift(nn.Module):
    """Resampling residual blocks, learned variance, classes by an optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.label = nn.Embedding(4, 16)
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.down = nn.ModuleList([Resampled(8, 8, 16), Resampled(8, 8, 16, 0.5), Resampled(8, 16, 16)])
        self.middle = Resampled(16, 16, 16)
        self.up = nn.ModuleList([Resampled(32, 8, 16), Resampled(16, 8, 16, 2.0), Resampled(16, 8, 16)])
        self.head = nn.Conv2d(16, 6, 3, 1, 1)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.time(embedded(timesteps, 8))
        if y is not None:
            emb = emb + self.label(y)
        hs = [self.stem(x)]
        for block in self.down:
            hs.append(block(hs[-1], emb))
        h = self.middle(hs[-1], emb)
        for block in self.up:
            h = block(torch.cat([h, hs.pop()], dim=1), emb)
        return self.head(torch.cat([h, hs.pop()], dim=1))


class Residuals(nn.Module):
    """Two skips a level from one list, a clone of the stem's output at the end, attention through a functional."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(8, 16)
        self.stem = nn.Conv2d(3, 8, 7, padding=3)
        blocks = [(8, 8, 1.0), (8, 8, 1.0)], [(16, 16, 1.0), (16, 16, 1.0)]
        self.downs = nn.ModuleList(
            nn.ModuleList([*(Resampled(*b[:2], 16, b[2]) for b in level), nn.Conv2d(level[0][0], 16, 4, 2, 1)])
            for level in blocks
        )
        self.qkv, self.mid = nn.Conv2d(16, 48, 1), Resampled(16, 16, 16)
        self.ups = nn.ModuleList(
            nn.ModuleList([nn.Upsample(scale_factor=2), Resampled(16 + w, 16, 16), Resampled(16 + w, 16, 16)])
            for w in (16, 8)
        )
        self.final, self.head = Resampled(24, 8, 16), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor, time: Tensor, **unused: Any) -> dict[str, Tensor]:
        emb, h = self.time(embedded(time, 8)), self.stem(x)
        first, residuals = h.clone(), []
        for one, two, down in self.downs:
            h = one(h, emb)
            residuals.append(h)
            h = two(h, emb)
            residuals.append(h)
            h = down(h)
        q, k, v = (part.flatten(2).transpose(1, 2) for part in self.qkv(h).chunk(3, dim=1))
        h = h + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)
        h = self.mid(h, emb)
        for up, one, two in self.ups:
            h = up(h)
            h = one(torch.cat((h, residuals.pop()), dim=1), emb)
            h = two(torch.cat((h, residuals.pop()), dim=1), emb)
        return {"out": self.head(self.final(torch.cat((h, first), dim=1), emb))}


class Pair(NamedTuple):
    sample: Tensor
    variance: Tensor


class OneDimensional(nn.Module):
    """For sequences: strided and transposed convolutions, features rescaled by the time, a tuple comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 16), nn.Mish(), nn.Linear(16, 16))
        self.stem = nn.Conv1d(2, 16, 5, padding=2)
        self.downs = nn.ModuleDict({f"d{k}": nn.Conv1d(16, 16, 3, 2, 1) for k in range(2)})
        self.body = nn.ModuleList(nn.Conv1d(16, 16, 3, 1, 1) for _ in range(5))
        self.ups = nn.ModuleList(nn.ConvTranspose1d(16, 16, 4, 2, 1) for _ in range(2))
        self.norm, self.head = nn.GroupNorm(4, 16), nn.Conv1d(16, 4, 1)

    def forward(self, *, sample: Tensor, t: Tensor, mask: Tensor | None = None) -> Pair:
        film = self.time(embedded(t, 8)).unsqueeze(-1)
        h, skips = self.stem(sample), {}
        for name, down in self.downs.items():
            skips[name] = h
            h = down(nn.functional.mish(h * (1 + film)))
        for conv in self.body:
            h = h + conv(nn.functional.mish(self.norm(h)))
        for up, name in zip(self.ups, reversed(list(skips)), strict=True):
            h = up(h) + skips[name]
        out = self.head(h)
        if mask is not None:
            out = out * mask
        return Pair(*out.chunk(2, dim=1))


class InPlace(nn.Module):
    """Writes to what its modules return: inside of the region, and to the exit."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.stem, self.down = nn.Linear(8, 16), nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 16, 2, 2)
        self.body, self.up, self.head = nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 8, 3, 1, 1), nn.Conv2d(8, 3, 3, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.stem(x)
        low = self.down(h)
        low += self.time(embedded(t, 8))[:, :, None, None]
        low = self.body(low.relu_())
        back = self.up(nn.functional.interpolate(low.mul_(0.5), scale_factor=2.0))
        back += h
        return self.head(back)


def images(k: int) -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(k))


LABELS, MASK = torch.tensor([1, 3]), torch.ones(2, 1, 32)
CALLS: dict[str, tuple[type[nn.Module], Callable[[Any, int], Tensor]]] = {
    "scale-shift": (ScaleShift, lambda unet, k: unet(images(k), torch.tensor([TIMES[k]] * 2))),
    "scale-shift, classes": (ScaleShift, lambda unet, k: unet(images(k), torch.tensor([TIMES[k]] * 2), y=LABELS)),
    "residual list": (Residuals, lambda unet, k: unet(images(k), torch.tensor([TIMES[k]] * 2), guidance=2.5)["out"]),
    "in place": (InPlace, lambda unet, k: unet(images(k), torch.tensor([TIMES[k]] * 2))),
    "one-dimensional": (
        OneDimensional,
        lambda unet, k: torch.cat(
            unet(sample=images(k)[:, :2, :2].flatten(2), t=torch.tensor([TIMES[k]] * 2), mask=MASK)
        ),
    ),
}


def build(name: str) -> tuple[nn.Module, Callable[[Any, int], Tensor]]:
    torch.manual_seed(0)
    make, call = CALLS[name]
    return make().eval(), call


def trajectory(unet: nn.Module, call: Callable[[Any, int], Tensor]) -> list[Tensor]:
    return [call(unet, k) for k in range(len(TIMES))]


LONG = {"scale-shift", "residual list"}  # seconds of dynamo each


@pytest.mark.parametrize("name", [pytest.param(one, marks=[pytest.mark.slow] if one in LONG else []) for one in CALLS])
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_two_graphs_and_the_same_numbers(name: str, backend: str) -> None:
    unet, call = build(name)
    before, plain = snapshot(unet), trajectory(unet, call)
    with ch.wrap(unet, clock=2) as cw, cw.trajectory():
        expected = trajectory(unet, call)
    assert not torch.equal(expected[1], plain[1])
    counters.clear()
    with ch.wrap(unet, clock=2) as cw, cw.trajectory():
        cw.compile(backend=backend)
        first = trajectory(unet, call)
        with torch._dynamo.config.patch(error_on_recompile=True):
            second = trajectory(unet, call)
        assert dict(cw.stats.reasons) == {"first step": 2, "scheduled": 4}
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (6, 6)
    assert (counters["stats"]["unique_graphs"], counters["graph_break"]) == (2, {})
    assert snapshot(unet) == before
    for eager, one, two in zip(expected, first, second, strict=True):
        torch.testing.assert_close(one, eager, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(two, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_captures(name: str, cuda: FakeCuda) -> None:  # noqa: F811
    unet, call = build(name)
    with ch.wrap(unet, clock=2):
        expected = trajectory(unet, call)
    with ch.wrap(unet, clock=2) as cw:
        cw.compile(mode="cudagraphs")
        for _ in range(2):
            torch.testing.assert_close(trajectory(unet, call), expected)
    assert cuda.captures == 2


@pytest.mark.slow
def test_with_classes_and_without_are_two_signatures() -> None:
    unet, call = build("scale-shift")
    _, with_classes = CALLS["scale-shift, classes"]
    counters.clear()
    with ch.wrap(unet, clock=2) as cw:
        cw.compile(backend="eager")
        for one in (call, with_classes):
            trajectory(unet, one)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for one in (call, with_classes):
                trajectory(unet, one)
    assert counters["stats"]["unique_graphs"] == 4
