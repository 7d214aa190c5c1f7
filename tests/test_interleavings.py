"""Nothing stale is ever returned: random programs of sampling loops, against a judge that is told the true steps.

The programs keep to what docs/timeline.md asks for. Times that are plain numbers, or entries of one list, do not tell
one loop from another, so `reset()` comes before such a loop goes on after another one in the same thread, and declared
loops do the same. Loops over a list of their own ask for nothing, nor do loops within `with cw.trajectory():`, nor
does a loop whose steps hop from thread to thread.
"""

import contextlib
import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

import clockwork_hooks as ch
from tests.oracle import Judge
from tests.own_memory import WAYS, Home
from tests.small_unet import Tiny

SIZES = ((1, 8), (2, 8), (1, 16))  # batch, resolution
PLAIN = Tiny()
REGION = ch.find_region(PLAIN, torch.zeros(1, 2, 8, 8), 900, torch.zeros(1, 3))
POOLS = {thread: ThreadPoolExecutor(1) for thread in (1, 2)}  # one thread each; 0 is the main thread
OWN_LIST = ("list",)  # kinds of loops that need no `reset()` when they take turns
RANDOM = ("drawn", "picked")  # kinds in which each call is a trajectory of its own


class Trip(Exception):
    """Raised inside the UNet."""


class Loop:
    """One trajectory: its times, its calls in a step, and what was emitted in it.

    Args:
        program: whose UNet it calls.
        kind: of its times.
        first, stride: times of an even grid.
        branches, tiles: calls in a step.
        within: is it a generator that holds `with cw.trajectory():` open?
    """

    def __init__(
        self, program: "Program", kind: str, first: int, stride: int, branches: int, tiles: int, within: bool
    ) -> None:
        self.program, self.kind, self.branches, self.tiles, self.step = program, kind, branches, tiles, 0
        self.times = program.times(kind, [float(first + stride * k) for k in range(9)])
        self.judge = Judge(program.unet, PLAIN)
        self.generator = self.run(f"loop {id(self)}") if within and kind not in RANDOM else None
        if self.generator is not None:
            next(self.generator)

    def run(self, name: str) -> Generator[None, Callable[[], None], None]:
        """Runs what it is sent inside of its block, in whatever thread."""
        with self.program.cw.trajectory(name):
            while True:
                act = yield
                act()

    def close(self) -> None:
        if self.generator is not None:
            self.generator.close()

    def advance(self, order: str) -> None:
        """One step: its branches in one order or the other, or the first of them alone."""
        t, self.step = self.times[self.step], self.step + 1
        if self.kind in RANDOM:
            self.judge.begin()
        with self.program.cw.step() if self.kind == "declared" else contextlib.nullcontext():
            for tile in range(self.tiles):
                branches = range(1 if order == "alone" else self.branches)
                for branch in branches if tile or order != "reversed" else reversed(branches):
                    self.program.call(self, t, branch, (branch, tile))


class Program:
    """Up to two loops that take turns on one wrapped UNet, in up to three threads.

    Args:
        schedule: of the wrapper.
        memory: how the module that makes the exit hands out memory of its own; None where it has none.
    """

    def __init__(self, schedule: Any, memory: str | None = None) -> None:
        self.unet, self.schedule = Tiny(), schedule
        self.region = REGION if memory is None else None
        if memory is not None:
            self.unet.up = Home(self.unet.up, memory)  # type: ignore[assignment]
        self.unet.body.register_forward_hook(self._trip)
        self.random = torch.Generator().manual_seed(0)
        self.conditions = [torch.randn(1, 3, generator=self.random) for _ in range(3)]  # of all loops: one prompt
        self.loops: dict[int, Loop] = {}
        self.list: torch.Tensor | None = None
        self.last: dict[int, Loop | None] = {}  # of each thread
        self.size, self.error, self.grad = 0, None, False
        self.adapted = 0
        self.wrap()

    def wrap(self) -> None:
        self.cw, self.last = ch.wrap(self.unet, schedule=self.schedule, region=self.region), {}

    def close(self) -> None:
        for loop in self.loops.values():
            loop.close()
        self.loops.clear()
        self.cw.remove()

    def _trip(self, *_: Any) -> None:
        if self.error is not None:
            raise self.error

    def times(self, kind: str, even: list[float]) -> Any:
        if kind == "same list" and self.list is not None:
            return self.list
        if kind in ("list", "same list"):
            self.list = torch.tensor(even)
            return self.list
        if kind == "drawn":
            return [float(t) for t in torch.rand(9, generator=self.random) * 1000]
        if kind == "picked":
            entries = torch.linspace(999, 0, 5000)
            return [entries[k] for k in torch.randint(5000, (9,), generator=self.random)]
        if kind == "karras":
            return [float(t) for t in torch.linspace(14.6 ** (1 / 7), 0.03 ** (1 / 7), 9) ** 7]
        make = {"rows": lambda t: torch.full((2,), t), "int": int, "declared": float}[kind]
        return [make(t) for t in even]

    def start(self, which: int, *options: Any) -> None:
        if which in self.loops:
            self.loops[which].close()
        self.loops[which] = Loop(self, *options)

    def advance(self, which: int, count: int, order: str, thread: int) -> None:
        """So many steps of a loop, in one of the threads."""
        if thread == 0:
            self._advance(which, count, order, thread)
        else:
            POOLS[thread].submit(self._advance, which, count, order, thread).result()

    def _advance(self, which: int, count: int, order: str, thread: int) -> None:
        for _ in range(count if which in self.loops else 0):
            loop = self.loops[which]
            if loop.step == len(loop.times):
                return
            if loop.generator is not None:
                loop.generator.send(lambda loop=loop: loop.advance(order))
                continue
            last = self.last.get(thread)
            if last is not loop and (loop.kind not in OWN_LIST or (last and last.kind == "declared")):
                self.cw.reset()
            self.last[thread] = loop
            loop.advance(order)

    def call(self, loop: Loop, t: Any, branch: int, key: Any) -> None:
        batch, size = SIZES[self.size]
        if loop.kind == "rows":
            batch, t = 2, t.clone()
        x = torch.randn(batch, 2, size, size, generator=self.random)
        loop.judge.letters = ""
        with torch.set_grad_enabled(self.grad):
            loop.judge.call(x, t, self.conditions[branch], step=loop.step, branch=key)
        self.adapted += loop.judge.letters == "A"

    def change(self, what: str) -> None:
        if what == "size":
            self.size = (self.size + 1) % len(SIZES)
        elif what == "grad":
            self.grad = not self.grad
        elif what == "condition":
            self.conditions[0].data.add_(1)
            for loop in self.loops.values():
                for tile in range(loop.tiles):
                    loop.judge.forget((0, tile))
        elif what == "new objects":  # of the same values
            self.conditions = [condition.clone() for condition in self.conditions]
        elif what == "weights":  # past the counter of writes
            for unet in (self.unet, PLAIN):
                unet.body.weight.data.mul_(1.01)
            for loop in self.loops.values():
                loop.judge.begin()
        elif what == "off and on":
            self.cw.enabled = False
            x = torch.randn(1, 2, 8, 8, generator=self.random)
            with torch.no_grad():
                assert torch.equal(self.unet(x, 5), PLAIN(x, 5))
            self.cw.enabled = True
        elif what == "remove":
            self.close()
            self.wrap()
        else:
            self.fail({"error": Trip(), "interrupt": KeyboardInterrupt()}[what])

    def fail(self, error: BaseException) -> None:
        self.error = error
        with contextlib.suppress(Trip, KeyboardInterrupt):
            self.unet(torch.zeros(1, 2, 8, 8), 500.0)
        self.error, self.last[0] = None, None


SLOTS = st.sampled_from([0, 0, 0, 1])
STARTS = st.tuples(
    st.just("start"),
    SLOTS,
    st.sampled_from(["list", "list", "same list", "int", "karras", "rows", "declared", "drawn", "picked"]),
    st.sampled_from([900, 740, 700, 540, 100]),
    st.sampled_from([-50, -50, -20, 50]),
    st.integers(1, 3),
    st.sampled_from([1, 1, 2, 3]),
    st.booleans(),
)
ORDERS = ["in turn", "in turn", "reversed", "alone"]
THREADS = st.sampled_from([0, 0, 0, 0, 0, 1, 2])
STEPS = st.tuples(st.just("advance"), SLOTS, st.integers(1, 3), st.sampled_from(ORDERS), THREADS)
CHANGES = st.tuples(
    st.just("change"),
    st.sampled_from(
        ["size", "grad", "condition", "new objects", "weights", "off and on", "remove", "error", "interrupt"]
    ),
)
PROGRAMS = st.lists(st.one_of(STARTS, STEPS, STEPS, STEPS, CHANGES), min_size=2, max_size=10)
SCHEDULES = {
    "clock 2": ch.Schedule.every(2),
    "clock 4": ch.Schedule.every(4),
    "always": lambda step: True,
    "full ones in a row": ch.Schedule.at({3, 5, 6, 8}),
}
MEMORY = st.sampled_from([None, None, None, *WAYS])


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
@settings(max_examples=int(os.environ.get("CLOCKWORK_EXAMPLES", 500)))
@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
@given(begin=STARTS, actions=PROGRAMS, schedule=st.sampled_from(sorted(SCHEDULES)), memory=MEMORY)
@torch.no_grad()
def test_nothing_stale_in_any_program(begin: Any, actions: list[Any], schedule: str, memory: str | None) -> None:
    program = Program(SCHEDULES[schedule], memory)
    weights = {name: value.clone() for name, value in PLAIN.state_dict().items()}
    try:
        for name, *arguments in [begin, ("advance", begin[1], 4, "in turn", 0), *actions]:
            getattr(program, name)(*arguments)
        event(f"adaptor passes: {min(program.adapted, 10)}")
    finally:
        program.close()
        PLAIN.load_state_dict(weights)
    assert "forward" not in vars(program.unet.up)
    assert "forward" not in vars(program.unet.down)


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
@torch.no_grad()
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("kind", ["list", "same list", "int", "karras", "rows", "declared"])
def test_programs_use_the_adaptor(kind: str, within: bool) -> None:
    """What the property holds for is not only full passes; within `with cw.trajectory()` also across threads."""
    program = Program(ch.Schedule.every(2))
    program.start(0, kind, 900, -50, 2, 2, within)
    for k in range(9):
        program.advance(0, 1, "in turn", k % 3 if within else 0)
    evidence = {"int": 4, "rows": 4, "karras": 6}.get(kind, 0) if not within else 0
    counted = 4 if kind != "declared" else 0  # four tiles: their number is regular after two steps
    assert program.adapted == 16 - max(evidence, counted) if kind != "karras" or within else program.adapted >= 4
    program.close()


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
@torch.no_grad()
@pytest.mark.parametrize("kind", ["drawn", "picked"])
def test_times_at_random_are_full(kind: str) -> None:
    """As in score distillation: each call at a time of its own, with one condition."""
    program = Program(lambda step: True)
    for _ in range(40):
        program.start(0, kind, 900, -50, 1, 1, False)
        program.advance(0, 9, "in turn", 0)
    assert program.adapted == 0
    program.close()


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
@torch.no_grad()
@pytest.mark.parametrize(("first", "alone"), [(0, 4), (0, 7), (0, 1), (6, 1), (5, 2)])
def test_a_loop_one_entry_behind_another(first: int, alone: int) -> None:
    """One list serves both, to its end; from the one's entry to the other's is a step back.

    Args:
        first: entry of the list that both begin with.
        alone: so many steps the first loop is alone, and then the second one catches up.
    """
    judge, times, sample = Judge(Tiny()), torch.arange(900.0, 0.0, -100.0), torch.zeros(1, 2, 8, 8)
    with ch.wrap(judge.unet, schedule=lambda step: True):
        for k in range(first, first + alone):
            judge.call(sample, times[k], step=k, branch="first")
        for k in range(first, first + alone - 1):
            judge.call(sample, times[k], step=k, branch="second")
        judge.letters = ""
        for k in range(first + alone, 9):
            judge.call(torch.randn(1, 2, 8, 8), times[k], step=k, branch="first")
            judge.call(torch.randn(1, 2, 8, 8), times[k - 1], step=k - 1, branch="second")
        assert "A" not in judge.letters[1:]


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
@torch.no_grad()
def test_the_judge_can_tell() -> None:
    """It sees a stale feature where the wrapper is told that two loops were one."""
    program = Program(lambda step: True)
    for which, first in ((0, 900), (1, 850)):
        program.start(which, "int", first, -50, 1, 1, False)
    program.loops[0].run = None  # type: ignore[assignment, method-assign]
    program.advance(0, 4, "in turn", 0)
    program.loops[1].times = program.loops[1].times[3:]
    program.last[0] = program.loops[1]  # no `reset()`
    with pytest.raises(AssertionError, match="cached exit"):
        program.advance(1, 1, "in turn", 0)
    program.close()
