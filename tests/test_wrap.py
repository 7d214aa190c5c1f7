"""`wrap` against rollouts made by hand from plain hooks: bit for bit, and nothing runs that need not."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clockwork_hooks as ch
from tests.small_unet import Tiny, reference


class WritesTheExit(Tiny):
    """The code after the region multiplies its exit in place; `late`, after it has used it once."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late = late

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        h = self.stem(x)
        z = self.up(self.body(self.act(self.down(h))))
        y = torch.cat([h, z], 1) if self.late else None
        z.mul_(0.5)
        return self.head(torch.cat([h, z], 1) if y is None else y) + z.mean()


@torch.no_grad()
@pytest.mark.parametrize("late", [False, True])
def test_an_exit_that_is_written_to_is_kept_as_it_left_the_region(late: bool) -> None:
    unet = WritesTheExit(late)
    plain = copy.deepcopy(unet)
    with ch.wrap(unet, clock=3) as cw:
        for _ in range(3):
            exit, outputs = None, []
            for t, x in zip((900, 800, 700, 600), torch.randn(4, 1, 2, 8, 8), strict=True):
                passes = cw.stats.full_passes
                outputs.append(unet(x, t))
                if cw.stats.full_passes > passes:
                    exit = None
                expected, exit = reference(plain, x, t, exit=exit)
                assert torch.equal(outputs[-1], expected)
    assert cw.stats.adaptor_passes == 5  # of the first trajectory's two, one goes to the trace


@torch.no_grad()
@pytest.mark.parametrize("where", ["in the pass", "after the pass"])
def test_an_exit_that_somebody_else_writes_to_is_not_used(where: str) -> None:
    """A hook that was not there when the UNet was traced writes to the exit in place: full passes from then on."""
    unet = Tiny()
    plain = copy.deepcopy(unet)
    exits: list[Tensor] = []

    def write(module: nn.Module, args: Any, output: Tensor) -> None:
        exits.append(output)
        if where == "in the pass":
            output.mul_(0.5)

    with ch.wrap(unet) as cw:
        for t in (900, 800):
            unet(torch.randn(1, 2, 8, 8), t)
        for model in (unet, plain):
            model.up.register_forward_hook(write)
        for t, x in zip((900, 800), torch.randn(2, 1, 2, 8, 8), strict=True):
            assert torch.equal(unet(x, t), plain(x, t))
            exits[-2].zero_()
    assert cw.stats.adaptor_passes == 1
