"""What changes in the middle of a run: each call is full, or what the step before of its branch makes of it.

The adaptor reads all that one can be given (the entries, the times and the trend of both steps), and so does the judge,
who is told the true step of every call.
"""

import contextlib
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import clockwork_hooks as ch
from tests.small_unet import Tiny

NEEDS = ("entry_cached", "position", "position_cached", "trend", "trend_positions")
MODES: dict[str, Any] = {"none": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}


class ReadsAll(nn.Module):
    """Mixes all that it is given; with `trend`, how the exit moved between the last two full passes, too."""

    def __init__(self, *, trend: bool) -> None:
        super().__init__()
        self.needs = frozenset(NEEDS if trend else NEEDS[:3])

    def forward(self, entry: Tensor, exit_cached: Tensor, *, time: Any, text: Any, **more: Any) -> Tensor:
        return mixed(entry, exit_cached, **more)


def mixed(
    entry: Tensor,
    exit: Tensor,
    entry_cached: Tensor,
    position: Tensor,
    position_cached: Tensor,
    trend: Tensor | None = None,
    trend_positions: Tensor | None = None,
) -> Tensor:
    exit = exit + 0.01 * (entry.mean() + 2 * entry_cached.mean()) + 0.001 * (position - 2 * position_cached)
    if trend is not None and trend_positions is not None:
        exit = exit + 0.1 * trend * (1 + 0.001 * (position - trend_positions[0]) + 0.002 * trend_positions[1])
    return exit


@dataclass
class Left:
    """What a call has left: its step and the state of all else, and what flowed into the region and out of it.

    Attributes:
        full: exits and times of the last two full passes up to it.
    """

    step: int
    state: Any
    entry: Tensor
    exit: Tensor
    time: Tensor
    full: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def by_hand(unet: Tiny, *args: Any, exit: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(output, entry, exit) of a plain UNet; `exit` makes another one of the entry."""
    seen: dict[str, Tensor] = {}

    def enter(module: nn.Module, inputs: Any) -> None:
        seen["entry"] = inputs[0].clone()

    def leave(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        seen["exit"] = output.clone() if exit is None else exit(seen["entry"])
        return seen["exit"].clone()

    handles = [unet.down.register_forward_pre_hook(enter), unet.up.register_forward_hook(leave)]
    try:
        return unet(*args), seen["entry"], seen["exit"]
    finally:
        for handle in handles:
            handle.remove()


class Program:
    """One wrapped UNet, its plain twin, and what each branch has left.

    Args:
        choose: at random.
    """

    def __init__(self, choose: random.Random) -> None:
        self.choose, self.unet, self.plain = choose, Tiny(), Tiny()
        self.trend, self.oldest = choose.random() < 0.5, choose.choice([1, 1, 4])
        at_random = random.Random(choose.randrange(99))
        schedule = choose.choice(
            [
                *(ch.Schedule.every(2), ch.Schedule.every(3), ch.Schedule.at({2, 3, 5, 6, 7, 9})),
                *(ch.Schedule.adaptive(0.1, longest=3), lambda step: True, lambda step: at_random.random() < 0.6),
            ]
        )
        self.cw = ch.wrap(
            self.unet,
            ReadsAll(trend=self.trend),
            schedule=schedule,
            keep_graph=choose.random() < 0.3,
            reuse="step before" if self.oldest == 1 else "same condition",
        )
        self.left: dict[int, list[Left]] = {}
        self.conditions: list[Tensor] = []
        self.batch, self.mode, self.epoch, self.letters = 1, "none", 0, ""

    def run(self) -> None:
        """One trajectory, over a list of its own."""
        choose = self.choose
        self.epoch += 1
        self.conditions = [torch.randn(1, 3) for _ in range(choose.choice([1, 1, 2, 3]))]
        self.unet.eval()
        with self.cw.trajectory() if choose.random() < 0.5 else contextlib.nullcontext():
            self.cw.reset()
            for step, t in enumerate(torch.linspace(900, 100, choose.choice([6, 9])), 1):
                if choose.random() < 0.4:
                    getattr(self, choose.choice(CHANGES))(t)
                together = self.oldest == 1 or choose.random() < 0.5
                for branch in range(len(self.conditions)) if together else [step % len(self.conditions)]:
                    self.call(t, branch, step)

    def call(self, t: Tensor, branch: int, step: int) -> None:
        state, time = (self.epoch, self.batch, self.mode, self.unet.training), torch.tensor(float(t))
        args = torch.randn(self.batch, 2, 8, 8), t, self.conditions[branch]
        with MODES[self.mode]():
            got = self.choose.choice([self.unet, self.unet.forward, self.cw])(*args).detach()
        inference = contextlib.nullcontext() if self.mode != "inference" else torch.inference_mode()
        with torch.no_grad(), inference:
            full, entry, exit = by_hand(self.plain, *args)
            before = self.before(branch, step, state)
            left = Left(step, state, entry, exit, time)
            if torch.equal(got, full):
                left.full = [*(before.full if before else ()), (exit, time)][-2:]
                self.letters += "F"
            else:
                assert before is not None, "a cached exit where none may be used"
                more: dict[str, Any] = {}
                if self.trend and len(before.full) == 2:
                    (one, at), (other, there) = before.full
                    more = {"trend": other - one, "trend_positions": torch.stack((there, at))}
                was = before.exit, before.entry, time, before.time
                output, _, left.exit = by_hand(self.plain, *args, exit=lambda entry: mixed(entry, *was, **more))
                assert torch.equal(got, output), "not what the step before of this branch makes of it"
                left.full = before.full
                self.letters += "A"
        self.left[branch] = [left]

    def before(self, branch: int, step: int, state: Any) -> Left | None:
        """What this branch's own step before has left, if nothing has changed since."""
        left = self.left.get(branch, [])
        fitting = (one for one in left if one.step >= step - self.oldest and one.state == state)
        return next(fitting, None)

    # -- what changes -------------------------------------------------------------------------------------------------

    def other_mode(self, t: Tensor) -> None:
        self.mode = self.choose.choice(sorted(MODES))

    def other_batch(self, t: Tensor) -> None:
        self.batch = 3 - self.batch

    def other_condition(self, t: Tensor) -> None:
        branch = self.choose.randrange(len(self.conditions))
        self.conditions[branch] = self.conditions[branch] + 1
        self.left.pop(branch, None)

    def other_weights(self, t: Tensor) -> None:
        self.epoch += 1
        for unet in (self.unet, self.plain):
            for weight in unet.parameters():
                weight.data.mul_(1.01)

    def training(self, t: Tensor) -> None:
        self.unet.train(not self.unet.training)

    def another_caller(self, t: Tensor) -> None:
        with self.cw.serving(False):
            self.alone(t)

    def off_and_on(self, t: Tensor) -> None:
        self.epoch += 1
        self.cw.enabled = False
        self.alone(t)
        self.cw.enabled = True

    def removed(self, t: Tensor) -> None:
        self.epoch += 1
        self.cw.remove()
        self.alone(t)
        self.cw.attach()

    def reset(self, t: Tensor) -> None:
        self.epoch += 1
        self.cw.reset()

    def interrupted(self, t: Tensor) -> None:
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        self.epoch += 1
        path = self.choose.choice(["stem", "head"])  # run in every pass
        handle = self.unet.get_submodule(path).register_forward_pre_hook(interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            self.alone(t)
        handle.remove()

    def counts_anew(self, t: Tensor) -> None:
        self.cw.stats.clear()
        assert str(self.cw.report())

    def alone(self, t: Tensor) -> None:
        with torch.no_grad():
            self.unet(torch.randn(self.batch, 2, 8, 8), t, self.conditions[0])


CHANGES = (
    *("other_mode", "other_batch", "other_condition", "other_weights", "training", "another_caller"),
    *("off_and_on", "removed", "reset", "interrupted", "counts_anew"),
)


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
@settings(max_examples=int(os.environ.get("CLOCKWORK_EXAMPLES", 60)))
@given(seed=st.integers(0, 10**9))
def test_what_changes_midway_costs_full_passes_and_nothing_else(seed: int) -> None:
    torch.manual_seed(seed)
    program = Program(random.Random(seed))
    try:
        for _ in range(2):
            program.run()
        event(f"adaptor passes: {min(program.letters.count('A'), 10)}")
    finally:
        program.cw.remove()
    assert "forward" not in vars(program.unet) | vars(program.unet.up)


def test_the_programs_use_the_adaptor() -> None:
    """Without changes, in step with the clock; and the judge sees where they do not."""
    choose = random.Random(1)
    choose.random = lambda: 0.4  # type: ignore[method-assign]
    program = Program(choose)
    with program.cw:
        program.run()
        assert program.letters.count("A") >= len(program.letters) // 3
        program.plain.head.weight.data.mul_(2)
        with pytest.raises(AssertionError):
            program.run()
