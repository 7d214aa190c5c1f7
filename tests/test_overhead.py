"""Laws of what wrapping costs, whatever the machine does; how long it takes is measured in benchmarks/."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import clockwork_hooks as ch
from benchmarks.guided import GuidedUNet

STEPS = 8


class Loop:
    """Calls a wrapped UNet at the steps of a trajectory, whose times are views of one list."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet, self.x = unet, torch.randn(2, 3, 16, 16)
        self.times = list(torch.linspace(999, 0, STEPS))

    @torch.no_grad()
    def step(self, k: int) -> Tensor:
        output: Tensor = self.unet(self.x, self.times[k].expand(2))
        return output

    def until(self, k: int) -> None:
        for step in range(k):
            self.step(step)


def guided(blocks: int = 1) -> GuidedUNet:
    torch.manual_seed(0)
    return GuidedUNet(8, (1, 2), blocks=blocks)


@pytest.mark.parametrize(
    ("schedule", "patched"), [((), False), (ch.Schedule.every(1), False), (lambda step: False, True)]
)
@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
def test_nothing_inside_is_patched_where_no_step_can_skip(schedule: Any, patched: bool) -> None:
    """A function may change its mind: the modules are ready for it."""
    unet, twin = guided(), guided()
    with ch.wrap(unet, schedule=schedule) as cw:
        loop, plain = Loop(unet), Loop(twin)
        plain.x = loop.x
        for k in range(STEPS):
            assert torch.equal(loop.step(k), plain.step(k))
        assert any("forward" in vars(module) for module in unet.modules() if module is not unet) == patched
        assert cw.region is not None
        assert cw.stats.reasons == {"first step": 1, "scheduled": STEPS - 1}


def test_a_rule_that_changes_its_mind_is_followed() -> None:
    """Steps 5 to 8 of two trajectories: in the second the rule says otherwise than before."""
    skip: set[int] = set()
    unet = guided()
    with ch.wrap(unet, schedule=lambda step: step in skip) as cw:
        loop = Loop(unet)
        loop.until(STEPS)
        skip |= {6, 8}
        loop.until(STEPS)
        assert cw.stats.adaptor_passes == 2


class Expands(TorchDispatchMode):
    """Counts what placeholders are made by."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.expand.default
        return func(*args, **(kwargs or {}))


def test_a_skipped_call_makes_nothing() -> None:
    """What stands for a skipped output is made once for all passes: however many calls are skipped, no more is made."""
    counts = []
    for blocks in (1, 3):
        unet = guided(blocks)
        with ch.wrap(unet) as cw:
            loop = Loop(unet)
            loop.until(STEPS)
            loop.until(3)
            before = cw.stats.adaptor_passes
            with Expands() as expands:
                loop.step(3)
            assert cw.stats.adaptor_passes == before + 1
            assert cw.region is not None
            counts.append((len(cw.region.skipped), expands.count))
    (few, objects), (many, objects_of_many) = counts
    assert many >= few + 4
    assert objects == objects_of_many
