"""Rows of a batch that come, go and change places: named, each is served by its own, or the pass is full."""

import contextlib
import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import clockwork_hooks as ch
from clockwork_hooks.clock import reasons
from tests.own_memory import Home
from tests.small_unet import Tiny, reference

TIMES = torch.linspace(900, 100, 9)
NAMES = ("cond", "uncond", "third")


class Loop:
    """Calls a wrapped UNet with rows that have names, and judges each by its plain twin.

    A call may return the plain output; or that with the exit of which each row is what the row of its name emitted in
    the step before, where that had the same conditions.
    """

    def __init__(self, unet: nn.Module | None = None, **options: Any) -> None:
        self.unet = unet or Tiny()
        self.plain = copy.deepcopy(self.unet)
        self.cw = ch.wrap(self.unet, **(options or {"clock": 2}))
        self.times = TIMES.clone()
        self.letters, self.rows, self.random = "", {}, torch.Generator().manual_seed(0)  # type: ignore[var-annotated]

    def begin(self) -> None:
        self.rows = {}

    def __call__(self, step: int, names: Sequence[str], texts: Tensor, *, named: bool = True, **more: Any) -> None:
        x, t = torch.randn(len(names), 2, 8, 8, generator=self.random), self.times[step]
        with self.cw.rows(names) if named else torch.no_grad():
            got = self.unet(x, t, texts, **more)
        full, emitted = reference(self.plain, x, t, texts, **more)
        if torch.equal(got, full):
            self.letters += "F"
        else:
            before = [
                self.rows.get((step - 1, name, text_of(text)), None) for name, text in zip(names, texts, strict=True)
            ]
            assert all(row is not None for row in before), "a row that the step before does not have"
            exit = torch.stack([row for row in before if row is not None])
            clocked, emitted = reference(self.plain, x, t, texts, exit=exit, **more)
            torch.testing.assert_close(got, clocked, atol=0, rtol=0)
            self.letters += "A"
        for name, text, row in zip(names, texts, emitted, strict=False):
            self.rows[step, name, text_of(text)] = row


def text_of(text: Tensor) -> tuple[float, ...]:
    return tuple(text.tolist())


TEXTS = dict(zip(NAMES, torch.randn(3, 3, generator=torch.Generator().manual_seed(3)), strict=True))


def texts(names: Sequence[str]) -> Tensor:
    return torch.stack([TEXTS[name] for name in names])


@torch.no_grad()
@pytest.mark.parametrize(
    ("batches", "clock", "passes"),
    [
        ("cu c cu c cu c", 2, "FFFAFA"),  # the first step that skips the negative prompt is recorded
        ("cu cu c c c cu", 3, "FAFFAF"),
        ("cu uc cu uc", 2, "FAFA"),
        ("c cu c cu", 2, "FFFF"),  # a row that comes is not there in the step before
        ("cut tu cut tc", 2, "FFFA"),
        ("cu cu cu cu", 2, "FAFA"),
    ],
)
def test_rows_that_stay_are_served(batches: str, clock: int, passes: str) -> None:
    loop = Loop(clock=clock)
    short = {"c": "cond", "u": "uncond", "t": "third"}
    for step, batch in enumerate(batches.split()):
        loop(step, names := [short[one] for one in batch], texts(names))
    assert loop.letters == passes


@torch.no_grad()
@pytest.mark.parametrize(
    ("batches", "passes"),
    [("ab ba ab ba", "FAFA"), ("ab cb ab cb", "FFFF"), ("ab ab ab ab", "FAFA"), ("ab a ab b", "FFFA")],
)
def test_names_tell_rows_that_no_condition_tells(batches: str, passes: str) -> None:
    loop = Loop()
    for step, names in enumerate(batches.split()):
        loop(step, list(names), torch.zeros(len(names), 3))
    assert loop.letters == passes


@torch.no_grad()
def test_unnamed_the_pass_is_full() -> None:
    loop = Loop()
    for step, names in enumerate([NAMES[:2], NAMES[:1]] * 2):
        loop(step, names, texts(names), named=False)
    assert loop.letters == "F" * 4


@torch.no_grad()
@pytest.mark.parametrize(("last", "passes"), [(7.0, "FFFAFAFA"), (3.0, "FFFAFAFF")])
def test_a_number_that_went_with_the_time_until_now_is_a_condition(last: float, passes: str) -> None:
    loop = Loop()
    for step, names in enumerate([NAMES[:2], NAMES[:1]] * 4):
        loop(step, names, texts(names), number=float(step) if step < 7 else last)
    assert loop.letters == passes


@torch.no_grad()
@pytest.mark.parametrize("what", ["text", "label", "shared", "weights", "two calls", "a step missed", "more"])
def test_any_doubt_is_a_full_pass(what: str) -> None:
    """Four steps make the batches known; then the row that stays is not what it was."""
    loop = Loop()
    cond, both = ("cond",), ("cond", "uncond")
    more: dict[str, Any] = {"label": torch.tensor([1, 2]), "shared": torch.ones(1, 3)}
    alone: dict[str, Any] = {"label": torch.tensor([1]), "shared": more["shared"]}
    for step in range(4):
        loop(step, (both, cond)[step % 2], texts((both, cond)[step % 2]), **(more, alone)[step % 2])
    assert loop.letters == "FFFA"
    text = texts(cond)
    loop(4, both, texts(both), **more)
    if what == "text":
        text = text + 1
    elif what == "label":
        alone["label"] = torch.tensor([2])
    elif what == "shared":
        alone["shared"] = torch.zeros(1, 3)
    elif what == "more":
        alone["number"] = 1.0
    elif what == "weights":
        loop.unet.head.weight.mul_(1.5)
        loop.plain.head.weight.mul_(1.5)
    if what == "a step missed":
        loop.cw.step()
    loop(5, cond, text, **alone)
    if what == "two calls":
        assert loop.letters[-1] == "A"
        loop(5, cond, text, **alone)
    assert loop.letters[-1] == "F"


@torch.no_grad()
def test_rows_of_another_batch_and_a_wrong_number() -> None:
    loop = Loop()
    for names in ([], ["a", "a"], [1]):
        with pytest.raises(ch.ArgumentError, match="texts"):
            loop.cw.rows(names)  # type: ignore[arg-type]
    loop(0, NAMES[:2], texts(NAMES[:2]))
    with pytest.raises(ch.ArgumentError, match="rows of the sample: 1"), loop.cw.rows(NAMES[:2]):
        loop.unet(torch.zeros(1, 2, 8, 8), loop.times[1], texts(NAMES[:1]))


@torch.no_grad()
def test_a_call_of_another_number_of_rows_may_have_no_names() -> None:
    """Somebody splits the batch before it comes to the UNet: those calls are told by their order."""
    loop = Loop(schedule=lambda step: True)
    for step in range(3):
        for half in ("cond", "uncond"):
            with loop.cw.rows(NAMES[:2], exact=False):
                loop(step, [half], texts([half]), named=False)
    assert loop.letters == "FFAAAA"


@torch.no_grad()
@pytest.mark.parametrize(("ordered", "passes"), [(True, "FAFAF"), (False, "FAAAA")])
def test_evaluations_that_are_declared_may_go_back(ordered: bool, passes: str) -> None:
    loop = Loop(schedule=lambda step: True)
    loop.times = torch.tensor([900.0, 700, 750, 500, 550])
    for step in range(5):
        loop.cw.step(ordered=ordered)
        loop(step, ["cond"], texts(["cond"]), named=False)
    assert loop.letters == passes


class Folded(Tiny):
    """Its exit has no rows of the batch: each is two."""

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        h = self.stem(x)
        z = self.up(self.body(self.act(self.down(torch.cat([h, h])))))
        return self.head(torch.cat([h, z[: len(x)] + z[len(x) :]], 1)) + (0 if c is None else c.mean())


@torch.no_grad()
def test_an_exit_with_other_rows_than_the_batch() -> None:
    loop = Loop(Folded())
    for step, names in enumerate([NAMES[:2], NAMES[:1]] * 2):
        loop(step, names, texts(names))
    assert loop.letters == "F" * 4


BATCHES = [list(order) for count in (1, 2, 3) for order in itertools.permutations(NAMES, count)]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=40)
@given(
    steps=st.lists(st.lists(st.sampled_from(BATCHES), min_size=1, max_size=2), min_size=8, max_size=8),
    changed=st.sets(st.integers(0, 7), max_size=2),
    mode=st.sampled_from([torch.no_grad, torch.inference_mode]),
)
def test_nothing_stale_whatever_comes(steps: list[list[list[str]]], changed: set[int], mode: Any) -> None:
    """Rows come, go, change places, come in two calls of a step; and texts change for good in some steps."""
    loop, shift = Loop(schedule=lambda step: True), 0.0
    with mode(), loop.cw.trajectory():
        for step, batches in enumerate(steps):
            shift += step in changed
            seen: set[str] = set()
            for names in batches:
                if not seen & set(names):  # a row has one call in a step
                    loop(step, names, texts(names) + shift)
                    seen |= set(names)
    event(f"adaptor passes: {loop.letters.count('A')}")


@torch.no_grad()
def test_rows_whose_memory_another_call_takes_are_kept() -> None:
    """The second row's call fills the memory that the first row's exit was made in."""
    unet, plain = Tiny(), Tiny()
    unet.up = home = Home(unet.up, "itself")  # type: ignore[assignment]
    cw, x, c = ch.wrap(unet), torch.randn(2, 2, 8, 8), torch.randn(2, 3)
    for rows, steps in ((2, 2), (1, 1)):  # such calls are known, each with memory of its own
        for t in TIMES[:steps]:
            unet(x[:rows], t, c[:rows])
        home.places.clear()
    with cw.trajectory():
        for k in range(2):
            with cw.rows([NAMES[k]]):
                unet(x[k : k + 1], TIMES[0], c[k : k + 1])
        before = cw.stats.adaptor_passes
        with cw.rows(NAMES[:2]):
            output = unet(x, TIMES[1], c)
    exits = [reference(plain, x[k : k + 1], TIMES[0], c[k : k + 1])[1] for k in range(2)]
    torch.testing.assert_close(output, reference(plain, x, TIMES[1], c, exit=torch.cat(exits))[0])
    assert cw.stats.adaptor_passes == before + 1


class Told(nn.Module):
    """Returns the cached exit, and notes the times that it is told."""

    needs = frozenset({"position", "position_cached"})

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, float]] = []

    def forward(
        self, entry: Any, exit_cached: Tensor, *, time: Any, text: Any, position: Tensor, position_cached: Tensor
    ) -> Tensor:
        self.seen.append((position.item(), position_cached.item()))
        return exit_cached


@torch.no_grad()
@pytest.mark.parametrize("named", [False, True])
def test_an_adaptor_is_told_one_time_which_is_that_of_all_rows(named: bool) -> None:
    """All rows got the weights of the first row's time; declared steps may have rows at different times."""
    unet, told = Tiny(), Told()
    x, c = torch.randn(2, 2, 8, 8), torch.randn(2, 3)
    steps = [(9.0, 9.0), (8.0, 8.0), (7.0, 6.0), (6.0, 5.0), (5.0, 4.0), (4.0, 4.0), (3.0, 3.0)]
    with ch.wrap(unet, told, schedule=lambda step: step != 6) as cw:
        for rows in steps:
            with cw.step(), cw.rows(["a", "b"]) if named else contextlib.nullcontext():
                unet(x, torch.tensor(rows), c)
        assert told.seen == [(8.0, 9.0), (3.0, 4.0)]
        assert cw.stats.reasons[reasons.TIMES] == 3
    with ch.wrap(unet, clock=2) as cw:  # who reads no time is served
        for rows in steps:
            with cw.step():
                unet(x, torch.tensor(rows), c)
        assert cw.stats.adaptor_passes == 3


@torch.no_grad()
def test_rows_that_come_of_calls_at_several_times() -> None:
    """They have no one time that their exits come from."""
    unet, told = Tiny(), Told()
    x, c = torch.randn(2, 2, 8, 8), torch.randn(2, 3)
    for first, second, seen in ((9.0, 8.5, []), (9.0, 9.0, [(8.0, 9.0)])):
        told.seen.clear()
        with ch.wrap(unet, told, schedule=lambda step: True) as cw:
            unet(x, torch.tensor(9.0), c)  # the first call of a signature is recorded
            unet(x[:1], torch.tensor(9.0), c[:1])
            cw.reset()
            with cw.step():
                for row, time in enumerate((first, second)):
                    with cw.rows(["ab"[row]]):
                        unet(x[row : row + 1], torch.tensor(time), c[row : row + 1])
            with cw.step(), cw.rows(["a", "b"]):
                unet(x, torch.tensor(8.0), c)
        assert told.seen == seen
