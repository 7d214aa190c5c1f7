"""What a trace must not miss, found by the zoo: kernels that no dispatcher sees, gates, small UNets within blocks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clockwork_hooks as ch
from tests.bendable import Tiny, noise, proven

T = torch.tensor([3.0, 3.0])


def by_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.detach().numpy() * 2)


def into_blank_memory(x: Tensor) -> Tensor:
    """As Triton and CUDA kernels do: the dispatcher sees the allocation, not the writing."""
    out = torch.empty_like(x)
    out.numpy()[:] = x.detach().numpy() * 2
    return out


class Kernel(nn.Module):
    def __init__(self, run: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run, self.after = run, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.run(x))


class Unseen(Tiny):
    """The kernel makes the entry, works within the region, and once more above it."""

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.kernel = kernel

    def low(self, h: Tensor, t: Any) -> Tensor:
        return super().low(self.kernel(h), t)

    def join(self, h: Tensor, low: Tensor) -> Tensor:
        return self.kernel(super().join(h, low))


@pytest.mark.parametrize("run", [by_numpy, into_blank_memory])
def test_what_an_unseen_kernel_returns_depends_on_what_it_was_given(run: Callable[[Tensor], Tensor]) -> None:
    region = proven(Unseen(Kernel(run, lambda x: x)), noise(), T)
    assert (region.entry.path, region.exit.path) == ("stem", "up")
    assert [call.path for call in region.skipped] == ["kernel", "down", "body", "up"]


def test_memory_read_before_anybody_was_seen_writing_it() -> None:
    """The kernel's output goes on within the same module: through an operator, no module returns it itself."""
    region = proven(Unseen(Kernel(into_blank_memory, torch.sigmoid)), noise(), T)
    assert (region.entry.path, region.exit.path) == ("stem", "up")


def test_memory_that_operators_fill_is_no_secret() -> None:
    def fill(x: Tensor) -> Tensor:
        return torch.empty_like(x).copy_(x)

    trace = ch.trace(Kernel(fill, torch.relu), noise())
    assert not any("alias" in str(node.target) for node in trace.nodes)


class Gated(Tiny):
    """A gate of one pixel in the low-resolution part."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 32, 1), nn.Sigmoid())

    def low(self, h: Tensor, t: Any) -> Tensor:
        h = self.body(self.down(h) + self.time(t, h))
        return self.up(h * self.gate(h))


def test_a_gate_is_no_bottleneck() -> None:
    assert proven(Gated(), noise(), T).bottleneck == (8, 8)


class SmallInside(Tiny):
    """Blocks at full size hold a "U" of their own, small beside the region around them."""

    def __init__(self) -> None:
        super().__init__()
        self.own_down, self.own_up = nn.Conv2d(8, 4, 4, 4), nn.ConvTranspose2d(4, 8, 4, 4)
        self.wide = nn.Conv2d(8, 8, 3, 1, 1)

    def low(self, h: Tensor, t: Any) -> Tensor:
        h = self.wide(h)
        h = h + self.own_up(self.own_down(h))
        return super().low(h, t)


def test_a_small_u_within_a_block_does_not_hide_the_region_around_it() -> None:
    region = proven(SmallInside(), noise(), T)
    assert (region.entry.path, region.exit.path) == ("stem", "up")
    assert region.macs_share > 0.2
