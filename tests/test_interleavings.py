"""Nothing stale is ever returned: random programs of sampling loops, against a judge that is told the true steps.

The programs keep to what docs/timeline.md asks for: times that are plain numbers do not tell one loop from another,
so `reset()` comes before a plain loop goes on after another one, and declared loops do the same. Loops over a
scheduler's list ask for nothing.
"""

import contextlib
import os
from typing import Any

import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import clockwork_hooks as ch
from tests.oracle import Judge
from tests.small_unet import Tiny

SIZES = ((1, 8), (2, 8), (1, 16))  # batch, resolution
PLAIN = Tiny()
REGION = ch.find_region(PLAIN, torch.zeros(1, 2, 8, 8), 900, torch.zeros(1, 3))


class Trip(Exception):
    """Raised inside the UNet."""


class Loop:
    """One trajectory: its times, its calls in a step, and what was emitted in it."""

    def __init__(self, program: "Program", kind: str, first: int, stride: int, branches: int, tiles: int) -> None:
        self.kind, self.branches, self.tiles, self.step = kind, branches, tiles, 0
        times = [float(first + stride * k) for k in range(9)]
        if kind == "list":
            self.times: Any = torch.tensor(times)
        else:
            make = {"rows": lambda t: torch.full((2,), t), "int": int, "declared": float}[kind]
            self.times = [make(t) for t in times]
        self.judge = Judge(program.unet, PLAIN)


class Program:
    """Up to two loops that take turns on one wrapped UNet."""

    def __init__(self, schedule: Any) -> None:
        self.unet, self.schedule = Tiny(), schedule
        self.unet.body.register_forward_hook(self._trip)
        self.random = torch.Generator().manual_seed(0)
        self.conditions = [torch.randn(1, 3, generator=self.random) for _ in range(3)]  # of all loops: one prompt
        self.loops: dict[int, Loop] = {}
        self.last: Loop | None = None
        self.size, self.error = 0, None
        self.adapted = 0
        self.wrap()

    def wrap(self) -> None:
        self.cw, self.last = ch.wrap(self.unet, schedule=self.schedule, region=REGION), None

    def _trip(self, *_: Any) -> None:
        if self.error is not None:
            raise self.error

    def start(self, which: int, *options: Any) -> None:
        self.loops[which] = Loop(self, *options)

    def advance(self, which: int, count: int, order: str) -> None:
        """So many steps of a loop, its branches in one order or the other, or the first of them alone."""
        for _ in range(count if which in self.loops else 0):
            loop = self.loops[which]
            if loop.step == len(loop.times):
                return
            if self.last is not loop and (loop.kind != "list" or (self.last and self.last.kind == "declared")):
                self.cw.reset()
            self.last = loop
            t, loop.step = loop.times[loop.step], loop.step + 1
            with self.cw.step() if loop.kind == "declared" else contextlib.nullcontext():
                for tile in range(loop.tiles):
                    branches = range(1 if order == "alone" else loop.branches)
                    for branch in branches if tile or order != "reversed" else reversed(branches):
                        self.call(loop, t, branch, (branch, tile))

    def call(self, loop: Loop, t: Any, branch: int, key: Any) -> None:
        batch, size = SIZES[self.size]
        if loop.kind == "rows":
            batch, t = 2, t.clone()
        x = torch.randn(batch, 2, size, size, generator=self.random)
        loop.judge.made = ""
        loop.judge.call(x, t, self.conditions[branch], step=loop.step, branch=key)
        self.adapted += loop.judge.made == "A"

    def change(self, what: str) -> None:
        if what == "size":
            self.size = (self.size + 1) % len(SIZES)
        elif what == "condition":
            self.conditions[0].data.add_(1)
            for loop in self.loops.values():
                for tile in range(loop.tiles):
                    loop.judge.forget((0, tile))
        elif what == "new objects":  # of the same values
            self.conditions = [condition.clone() for condition in self.conditions]
        elif what == "off and on":
            self.cw.enabled = False
            x = torch.randn(1, 2, 8, 8, generator=self.random)
            assert torch.equal(self.unet(x, 5), PLAIN(x, 5))
            self.cw.enabled = True
        elif what == "remove":
            self.cw.remove()
            self.wrap()
        else:
            self.fail({"error": Trip(), "interrupt": KeyboardInterrupt()}[what])

    def fail(self, error: BaseException) -> None:
        self.error = error
        with contextlib.suppress(Trip, KeyboardInterrupt):
            self.unet(torch.zeros(1, 2, 8, 8), 500.0)
        self.error, self.last = None, None


SLOTS = st.sampled_from([0, 0, 0, 1])
STARTS = st.tuples(
    st.just("start"),
    SLOTS,
    st.sampled_from(["list", "list", "int", "rows", "declared"]),
    st.sampled_from([900, 740, 700, 540, 100]),
    st.sampled_from([-50, -50, -20, 50]),
    st.integers(1, 3),
    st.sampled_from([1, 1, 2, 3]),
)
ORDERS = ["in turn", "in turn", "reversed", "alone"]
STEPS = st.tuples(st.just("advance"), SLOTS, st.integers(1, 3), st.sampled_from(ORDERS))
CHANGES = st.tuples(
    st.just("change"),
    st.sampled_from(["size", "condition", "new objects", "off and on", "remove", "error", "interrupt"]),
)
PROGRAMS = st.lists(st.one_of(STARTS, STEPS, STEPS, STEPS, CHANGES), min_size=2, max_size=10)
SCHEDULES = {"clock 2": ch.Schedule.every(2), "clock 4": ch.Schedule.every(4), "always": lambda step: True}


@settings(
    max_examples=int(os.environ.get("CLOCKWORK_EXAMPLES", 500)),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(begin=STARTS, actions=PROGRAMS, schedule=st.sampled_from(sorted(SCHEDULES)))
@torch.no_grad()
def test_nothing_stale_in_any_program(begin: Any, actions: list[Any], schedule: str) -> None:
    program = Program(SCHEDULES[schedule])
    try:
        for name, *arguments in [begin, ("advance", begin[1], 4, "in turn"), *actions]:
            getattr(program, name)(*arguments)
        event(f"adaptor passes: {min(program.adapted, 10)}")
    finally:
        program.cw.remove()
    assert "forward" not in vars(program.unet.up)
    assert "forward" not in vars(program.unet.down)


@torch.no_grad()
def test_programs_use_the_adaptor() -> None:
    """What the property holds for is not only full passes."""
    for kind in ("list", "int", "rows", "declared"):
        program = Program(ch.Schedule.every(2))
        program.start(0, kind, 900, -50, 2, 2)
        program.advance(0, 9, "in turn")
        assert program.adapted >= 12, kind
        program.cw.remove()
