"""Which step and branch a call is, and that nothing stale is ever returned."""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import clockwork_hooks as ch
from clockwork_hooks.clock.times import TimeReader
from tests.small_unet import Tiny, reference


def sample(batch: int = 1, size: int = 8) -> torch.Tensor:
    return torch.randn(batch, 2, size, size)


@torch.no_grad()
def test_a_doubtful_step_is_doubtful_for_every_branch() -> None:
    """One step of guidance in two calls, then a new trajectory above it: its direction is unknown for both calls."""
    unet = Tiny()
    plain = copy.deepcopy(unet)
    conditions = torch.randn(1, 3), torch.randn(1, 3)
    with ch.wrap(unet):
        for c in conditions:
            unet(sample(), 100, c)
        x = sample()
        for c in conditions:
            assert torch.equal(unet(x, 900, c), plain(x, 900, c))


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", ["array", "changed array", "new equal array", "objects whose == is no bool", "objects that hold another"]
)
def test_conditions_that_are_no_tensors(kind: str) -> None:
    """Arrays are compared by value, objects by what they hold, never by a `==` of their own."""

    class Odd:
        held = 0

        def __eq__(self, other: object) -> bool:
            raise ValueError("ambiguous")

        __hash__ = object.__hash__

    unet, condition = Tiny(), np.ones(3)
    with ch.wrap(unet, schedule=lambda step: True) as cw:
        for t in torch.tensor((900, 800, 700)):
            if kind == "changed array":
                condition += 1
            elif kind == "new equal array":
                condition = np.ones(3)
            elif kind.startswith("objects"):
                condition = Odd()
                condition.held = int(t) if kind == "objects that hold another" else 0
            unet(sample(), t, None, mask=condition)
    same = kind in ("array", "new equal array", "objects whose == is no bool")
    assert cw.stats.adaptor_passes == (2 if same else 0)
    assert cw.stats.reasons["conditions are new in this step"] == (0 if same else 2)


def letters(unet: Tiny, cw: ch.ClockworkWrapper, times: Iterable[Any]) -> str:
    """One letter a call: F for a full pass, A for an adaptor pass."""
    kinds = ""
    for t in times:
        before = cw.stats.adaptor_passes
        unet(sample(), t)
        kinds += "A" if cw.stats.adaptor_passes > before else "F"
    return kinds


@torch.no_grad()
@pytest.mark.parametrize(
    ("loops", "expected"),
    [
        (lambda ts: [ts[:3], ts[5:]], ["FAF", "FAFA"]),  # aborted, then restarted lower in the same list
        (lambda ts: [ts[:1], ts[3:7]], ["F", "FFFA"]),  # a single call, then lower: entries drawn at random?
        (lambda ts: [ts[:3], ts[2:6]], ["FAF", "FFFA"]),  # at the same time: doubt, until the old clock goes on
        (lambda ts: [ts, ts], ["FAFAFAFAF"] * 2),
        (lambda ts: [ts[:4], ts.clone()[4:]], ["FAFA", "FFFAF"]),  # where it stopped, in a new list
        (lambda ts: [ts[::2]], ["FFFFA"]),  # its entries are two apart: known after three of them
        (lambda ts: [reversed(list(ts))], ["FAFAFAFAF"]),
        (lambda ts: [ts.repeat_interleave(2)[1:]], ["FFFFFAAFFAAFFAAFF"]),  # Heun: two calls a step after the first
    ],
)
def test_times_from_a_list(loops: Callable[[torch.Tensor], list[Any]], expected: list[str]) -> None:
    """A trajectory takes its list's entries in turn, so one that jumps in it, or uses another list, is a new one."""
    unet = Tiny()
    with ch.wrap(unet) as cw:
        assert [letters(unet, cw, times) for times in loops(torch.arange(900, 0, -100))] == expected


@torch.no_grad()
@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.randint(1000, (80,)),
        lambda: 900 * torch.rand(80),
        lambda: torch.randperm(80).half(),
        lambda: torch.tensor([900.0, 300.0]).repeat(40),
    ],
    ids=["integers", "floats", "shuffled", "two levels in turn"],
)
def test_times_that_were_drawn_ahead_are_no_trajectory(draw: Callable[[], torch.Tensor]) -> None:
    """As for a loss, or score distillation: `for t in times` takes the entries in turn, and nothing else of a run."""
    torch.manual_seed(0)
    unet, times = Tiny(), draw()
    with ch.wrap(unet) as cw, pytest.warns(ch.NoEffectWarning, match="nothing is saved"):
        assert [letters(unet, cw, times) for _ in range(2)] == ["F" * 80] * 2


@torch.no_grad()
def test_a_list_of_rounded_and_unrounded_times_is_walked_along() -> None:
    """As diffusers' `KDPM2AncestralDiscreteScheduler` has it on Karras' grid: rounding takes single entries upwards."""
    times = [999, 886.0163, 886, 745.0095, 745, 561.1492, 561, 326.0966, 326, 110.5515, 111, 15.7647, 16, 0.0]
    unet = Tiny()
    with ch.wrap(unet) as cw:
        assert [letters(unet, cw, torch.tensor(times)) for _ in range(2)] == ["FAFAFAFAFAFAFA"] * 2


def test_a_list_is_not_mistaken_for_one_at_its_old_address() -> None:
    clock, places = TimeReader(), []
    for _ in range(20):
        times = torch.linspace(900, 100, 9)
        places.append(clock.read(times[0])[1])
        del times  # its memory is free for the next one; its identity must not be
    assert len({place.times for place in places if place is not None}) == 20


# -- what only the user can tell ----------------------------------------------------------------------------------

UNTOLD = {  # (time, trajectory) of each call; conditions are the same objects throughout
    "aborted, then restarted a stride lower": [(900, 0), (800, 0), (700, 0), (600, 1)],
    "single calls at even strides": [(900, 0), (800, 1), (700, 2), (600, 3)],
}


def stale_calls(calls: list[tuple[int, int]], reset: bool) -> list[int]:
    """Which calls return neither the plain output nor one with the exit of their own trajectory's last call."""
    unet = Tiny()
    plain, exits, stale, last = copy.deepcopy(unet), {}, [], None
    with torch.no_grad(), ch.wrap(unet, schedule=lambda step: True) as cw:
        for k, (t, trajectory) in enumerate(calls):
            if reset and trajectory != last:
                cw.reset()
                exits.clear()
            last, x = trajectory, sample()
            got, (full, exit) = unet(x, t), reference(plain, x, t)
            if not torch.equal(got, full):
                cached = exits.get(trajectory)
                clocked, exit = reference(plain, x, t, exit=cached) if cached is not None else (None, exit)
                if clocked is None or not torch.equal(got, clocked):
                    stale.append(k)
            exits[trajectory] = exit
    return stale


@pytest.mark.parametrize("name", UNTOLD)
def test_reset_tells(name: str) -> None:
    assert stale_calls(UNTOLD[name], reset=True) == []


@pytest.mark.xfail(reason="plain numbers do not tell a restart from the next step: call reset()", strict=True)
@pytest.mark.parametrize("name", UNTOLD)
def test_a_restart_that_only_reset_can_tell(name: str) -> None:
    assert stale_calls(UNTOLD[name], reset=False) == []


TOLD_BY_TIME = {
    "a single call, then lower": [(900, 0), (500, 1)],
    "two loops taking turns at different times": [(900, 0), (500, 1), (800, 0), (400, 1)],
    "aborted twice, which looks like two tiles": [(900, 0), (900, 1), (800, 1), (800, 2), (700, 2)],
    "single calls upwards": [(100, 0), (500, 1), (900, 2)],
    "single calls at times drawn at random": [(t, k) for k, t in enumerate((631, 322, 27, 641, 890, 12, 500, 479))],
    "aborted, then restarted two strides lower": [(t, t < 600) for t in (900, 800, 700, 600, 400, 300)],
    "aborted on Karras' grid": [(t, t < 4) for t in (14.6, 11.7, 9.3, 7.3, 5.7, 4.4, 2.5, 1.8)],
    "again from the start": [(900, 0), (800, 0), (900, 1), (800, 1)],
    "again at the same time": [(900, 0), (800, 0), (800, 1), (700, 1)],
    "lower, but far away": [(900, 0), (890, 0), (880, 0), (400, 1), (390, 1)],
    "sampling, then inversion from where it ended": [(200, 0), (100, 0), (100, 1), (200, 1), (300, 1)],
    "inversion, then sampling from where it ended": [(800, 0), (900, 0), (900, 1), (800, 1), (700, 1)],
    "sampling, then inversion from a little lower": [(300, 0), (200, 0), (100, 0), (50, 1), (150, 1)],
    "inversion, then sampling from a little higher": [(700, 0), (800, 0), (900, 0), (950, 1), (850, 1)],
    "aborted, then restarted lower at another stride": [(900, 0), (800, 0), (700, 0), (560, 1), (460, 1)],
    "aborted once at the start": [(900, 0), (900, 1), (800, 1), (700, 1)],
    "one step repeated": [(900, k) for k in range(4)],
    "one step, then higher, then down": [(100, 0), (900, 1), (800, 1)],
    "two loops at the same times": [(t, k) for t in (900, 800, 700) for k in (0, 1)],
}


@pytest.mark.parametrize("name", TOLD_BY_TIME)
def test_a_restart_that_time_tells(name: str) -> None:
    assert stale_calls(TOLD_BY_TIME[name], reset=False) == []


@torch.no_grad()
@pytest.mark.parametrize(
    "how",
    [
        "add_",
        "data",
        "inference",
    ],
)
def test_conditions_modified_in_place(how: str) -> None:
    """In main memory their values are compared, so that writes that leave no mark on the tensor are noticed, too."""
    unet = Tiny()
    plain = copy.deepcopy(unet)
    with torch.inference_mode(how == "inference"), ch.wrap(unet):
        c = torch.randn(1, 3)
        for t in (900, 800, 700):
            unet(sample(), t, c)
        if how == "data":
            c.data.add_(1)
        else:
            c.add_(1)
        x = sample()
        assert torch.equal(unet(x, 600, c), plain(x, 600, c))


@torch.no_grad()
def test_a_loop_whose_calls_hop_between_threads() -> None:
    """`await asyncio.to_thread(unet, x, t)`: whatever worker is free takes the call, which ends with its job."""
    unet = Tiny()
    plain = copy.deepcopy(unet)
    pools = [ThreadPoolExecutor(1) for _ in range(2)]
    cached: torch.Tensor | None = None
    with ch.wrap(unet):
        for k, t in enumerate((900, 800, 700, 600)):
            x = sample()
            got = pools[k % 2].submit(torch.no_grad()(unet), x, t).result()
            full, exit = reference(plain, x, t)
            if not torch.equal(got, full):
                assert cached is not None
                clocked, exit = reference(plain, x, t, exit=cached)
                assert torch.equal(got, clocked)
            cached = exit
    for pool in pools:
        pool.shutdown()


# -- the rules one by one -----------------------------------------------------------------------------------------


def passes(cw: ch.ClockworkWrapper) -> tuple[int, int]:
    return cw.stats.full_passes, cw.stats.adaptor_passes


@torch.no_grad()
def test_guidance_in_two_calls_keeps_two_features() -> None:
    unet = Tiny()
    pair = torch.randn(1, 3), torch.randn(1, 3)
    with ch.wrap(unet) as cw:
        for t in torch.tensor((900, 800, 700, 600)):
            for c in pair:
                unet(sample(), t, c)
    assert passes(cw) == (4, 4)


@torch.no_grad()
def test_a_scheduled_step_is_no_doubt() -> None:
    """Two calls a step with the same conditions: only what the adaptor would have run is counted as a doubt."""
    unet = Tiny()
    with ch.wrap(unet) as cw:
        for t in torch.tensor((900, 800, 700, 600)):
            for _ in range(2):
                unet(sample(), t)
    assert cw.stats.reasons == {
        "first step": 2,
        "several calls with these conditions in the step before": 2,
        "scheduled": 2,
    }
    assert cw.stats.adaptor_passes == 2


@torch.no_grad()
def test_a_guidance_interval() -> None:
    """The branch that paused comes back with a full pass."""
    unet = Tiny()
    pair = torch.randn(1, 3), torch.randn(1, 3)
    with ch.wrap(unet, schedule=lambda step: True) as cw:
        for t in torch.tensor((900, 800, 700, 600, 500)):
            unet(sample(), t, pair[0])
            if t not in (700,):
                unet(sample(), t, pair[1])
    assert cw.stats.reasons == {"first step": 2, "conditions are new in this step": 1}
    assert passes(cw) == (3, 6)


@torch.no_grad()
@pytest.mark.parametrize("make", [int, float, torch.tensor, lambda t: torch.tensor([float(t)]), np.float32, np.int64])
def test_kinds_of_times(make: Callable[[int], Any]) -> None:
    unet = Tiny()
    with ch.wrap(unet) as cw:
        assert letters(unet, cw, [make(t) for t in (900, 800, 700, 600)] * 2) == "FFFAFFFA"
        with cw.trajectory():
            assert letters(unet, cw, [make(t) for t in (900, 800, 700, 600)] * 2) == "FAFAFAFA"


@torch.no_grad()
@pytest.mark.parametrize(("trains", "told"), [(False, 1), (True, 0)])
def test_who_has_rows_at_different_times_only_is_told_that_nothing_is_saved(trains: bool, told: int) -> None:
    """ParaDiGMS samples so: all steps at once. Training has such times, too, and nobody expects a saving of it."""
    unet = Tiny().train(trains)
    with ch.wrap(unet), warnings.catch_warnings(record=True) as seen, torch.set_grad_enabled(trains):
        warnings.simplefilter("always")
        for k in range(60):
            unet(sample(2), torch.tensor([900.0 - k, 100.0 + k]))
    assert len(seen) == told
    assert all("time differs between rows" in str(one.message) for one in seen)


@torch.no_grad()
def test_times_that_tell_nothing() -> None:
    """Rows of different times (training), or no time at all: full passes, with the reason."""
    unet = Tiny()
    with ch.wrap(unet) as cw:
        for k in range(3):
            unet(sample(2), torch.tensor([900.0 - k, 100.0]))
        assert cw.stats.reasons == {"time differs between rows or cannot be read": 3}
        assert letters(unet, cw, torch.tensor((900, 800))) == "FA"  # another signature, traced in its first step

    class Timeless(Tiny):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x, 0)

    timeless = Timeless()
    with ch.wrap(timeless) as cw:
        for _ in range(3):
            timeless(sample())
        assert cw.stats.reasons == {"no time input: declare cw.step()": 3}
        for _ in range(4):
            with cw.step():
                timeless(sample())
        assert passes(cw) == (5, 2)


@torch.no_grad()
def test_declared_steps() -> None:
    """Times that jump about say nothing once steps are declared; `reset()` ends a trajectory; an error too."""
    unet = Tiny()
    with ch.wrap(unet) as cw:

        def run(times: Iterable[int]) -> str:
            kinds = ""
            for t in times:
                cw.step()
                kinds += letters(unet, cw, [t])
            return kinds

        assert run((900, 950, 10, 10)) == "FAFA"
        cw.reset()
        assert run((900, 950, 10)) == "FAF"
        assert letters(unet, cw, [10]) == "F"  # a second evaluation within the step, which is a full one
        cw.reset()
        assert letters(unet, cw, (900, 800, 700, 600)) == "FFFA"
        assert run((600, 500)) == "FA"  # the first declaration begins a trajectory


@torch.no_grad()
def test_reset_and_switching_off() -> None:
    unet = Tiny()
    plain = copy.deepcopy(unet)
    with ch.wrap(unet) as cw, cw.trajectory():
        assert letters(unet, cw, [900]) == "F"
        cw.reset()
        assert letters(unet, cw, [800, 700, 650]) == "FAF"
        before = passes(cw)
        cw.enabled = False
        x = sample()
        assert torch.equal(unet(x, 600), plain(x, 600))
        assert not cw.enabled
        assert passes(cw) == before
        cw.enabled = True
        assert letters(unet, cw, [500, 400]) == "FA"
        cw.reset()
        kinds = ""
        for t in (900, 800, 700, 600, 500):  # as `cw.enabled = t > 300` in a loop
            cw.enabled = True
            kinds += letters(unet, cw, [t])
        assert kinds == "FAFAF"


@torch.no_grad()
@pytest.mark.parametrize("what", ["batch", "size", "gradients", "inference", "autocast", "kind of time"])
def test_changed_inputs_and_modes(what: str) -> None:
    """Each signature and mode is traced once; a feature of one never serves the other."""
    unet = Tiny()
    plain = copy.deepcopy(unet)
    modes: dict[str, Callable[[], Any]] = {
        "gradients": torch.enable_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    kinds = ""
    with ch.wrap(unet, schedule=lambda step: True) as cw, cw.trajectory():
        for t, other in zip(range(900, 0, -100), (0, 0, 1, 0, 1, 1, 0, 0, 1), strict=True):
            x = sample(2 if what == "batch" and other else 1, 16 if what == "size" and other else 8)
            time = float(t) if what == "kind of time" and other else t
            before = cw.stats.adaptor_passes
            with modes.get(what, contextlib.nullcontext)() if other else contextlib.nullcontext():
                got, expected = unet(x, time), plain(x, time)
            kinds += "A" if cw.stats.adaptor_passes > before else "F"
            assert torch.equal(got, expected) == (kinds[-1] == "F")
    assert kinds == "FAFFFAFAF"
    assert cw.stats.reasons == {"first step": 1, "traced": 1, "inputs or modes changed since the step before": 4}


def test_training_is_full() -> None:
    unet = Tiny().train()
    with ch.wrap(unet) as cw:
        for t in torch.tensor((900, 800, 700)):
            unet(sample(), t).sum().backward()
        assert cw.stats.reasons == {"first step": 1, "training": 1, "scheduled": 1}
