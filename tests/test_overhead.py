"""What our bookkeeping does per call, counted: a busy machine changes times, not how many functions are called."""

import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clockwork_hooks as ch
from benchmarks.guided import GuidedUNet

PACKAGE = str(Path(ch.__file__).parent)
STEPS = 8


def called(run: Callable[[], Any]) -> tuple[Counter[str], Counter[str]]:
    """(the package's own functions, what they call that is not Python), each with how often."""
    own: Counter[str] = Counter()
    other: Counter[str] = Counter()

    def look(frame: FrameType, event: str, arg: Any) -> None:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return
        if event == "call":
            own[f"{Path(frame.f_code.co_filename).stem}:{frame.f_code.co_name}"] += 1
        elif event == "c_call":
            other[getattr(arg, "__qualname__", str(arg))] += 1

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
    return own, other


class Loop:
    """Calls a wrapped UNet at the steps of a trajectory, whose times are views of one list."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet, self.x = unet, torch.randn(2, 3, 16, 16)
        self.times = list(torch.linspace(999, 0, STEPS))

    @torch.no_grad()
    def step(self, k: int) -> Tensor:
        made: Tensor = self.unet(self.x, self.times[k].expand(2))
        return made

    def until(self, k: int) -> None:
        for step in range(k):
            self.step(step)


def guided(blocks: int = 1) -> GuidedUNet:
    torch.manual_seed(0)
    return GuidedUNet(8, (1, 2), blocks=blocks)


@pytest.mark.parametrize(
    ("schedule", "kind", "most", "most_other"),
    [
        ({2, 4, 6, 8}, "full", 49, 66),  # step 5: its exit is kept, step 6 uses it
        ({2, 4, 6, 7, 8}, "adaptor", 63, 85),  # step 7
        ((), "nothing is patched into", 30, 48),  # step 5: nothing is kept, as step 6 is full too
    ],
)
@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
def test_functions_called_in_a_pass(schedule: Any, kind: str, most: int, most_other: int) -> None:
    unet = guided()
    with ch.wrap(unet, schedule=schedule) as cw:
        loop = Loop(unet)
        loop.until(STEPS)
        k = 6 if kind == "adaptor" else 4
        loop.until(k)
        before = cw.stats.adaptor_passes
        own, other = called(lambda: loop.step(k))
        assert cw.stats.adaptor_passes - before == (kind == "adaptor")
        assert sum(own.values()) <= most, own
        assert sum(other.values()) <= most_other, other
        assert not set(own) & {"passes:call", "weights:state"} or kind != "nothing is patched into"


def test_a_full_pass_asks_once_and_not_where_others_run() -> None:
    """Only the module of the exit asks what to do, until there is a second loop."""

    def asked() -> int:
        loop.until(2)
        return called(lambda: loop.step(2))[0]["passes:call"]

    unet = guided()
    with ch.wrap(unet, clock=2) as cw:
        loop = Loop(unet)
        loop.until(STEPS)
        assert cw.region is not None
        assert asked() == 1 < len(cw.region.cut_plan.counts)
        thread = threading.Thread(target=loop.step, args=(0,))
        thread.start()
        thread.join()
        assert asked() == len(cw.region.cut_plan.counts)


@pytest.mark.parametrize(
    ("schedule", "patched"), [((), False), (ch.Schedule.every(1), False), (lambda step: False, True)]
)
@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
def test_nothing_is_patched_where_no_step_can_skip(schedule: Any, patched: bool) -> None:
    """A function may change its mind: the modules are ready for it."""
    unet, twin = guided(), guided()
    with ch.wrap(unet, schedule=schedule) as cw:
        loop, plain = Loop(unet), Loop(twin)
        plain.x = loop.x
        for k in range(STEPS):
            assert torch.equal(loop.step(k), plain.step(k))
        assert any("forward" in vars(module) for module in unet.modules()) == patched
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


def test_a_skipped_call_costs_two_functions_and_makes_nothing() -> None:
    counts = []
    for blocks in (1, 3):
        unet = guided(blocks)
        with ch.wrap(unet) as cw:
            loop = Loop(unet)
            loop.until(STEPS)
            loop.until(3)
            own, other = called(lambda loop=loop: loop.step(3))
            assert cw.region is not None
            counts.append((len(cw.region.skipped), sum(own.values()), own["hooks:__call__"], other["Tensor.expand"]))
    (few, one, patched, made), (many, two, more, made_too) = counts
    assert many >= few + 4
    assert more - patched == many - few
    assert two - one == 2 * (many - few)
    assert made == made_too == 0
