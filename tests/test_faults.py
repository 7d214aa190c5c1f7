"""After an error anywhere the next call starts clean, and `remove()` restores everything."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

import clockwork_hooks as ch
from clockwork_hooks.clock import times
from clockwork_hooks.engine import engine, hooks
from clockwork_hooks.graph import recorder
from tests.oracle import Judge
from tests.small_unet import Tiny
from tests.snapshot import snapshot


class Faulty(nn.Module):
    """An identity adaptor that raises, or returns NaN, when it is told to."""

    fault: BaseException | str | None = None

    def forward(self, entry: Any, exit_cached: Tensor, *, time: Any, text: Any) -> Tensor:
        if isinstance(self.fault, BaseException):
            raise self.fault
        return exit_cached * float("nan") if self.fault == "nan" else exit_cached


FAULTS: list[Callable[[], BaseException]] = [
    lambda: RuntimeError("in the model"),
    KeyboardInterrupt,
    lambda: torch.OutOfMemoryError("CUDA out of memory (simulated)"),
    lambda: MemoryError("no memory"),
    SystemExit,
]


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
@torch.no_grad()
@pytest.mark.parametrize("make", FAULTS, ids=["error", "interrupt", "CUDA OOM", "OOM", "exit"])
@pytest.mark.parametrize("where", ["full pass", "adaptor pass", "adaptor", "head", "between calls"])
def test_the_next_call_starts_clean(where: str, make: Callable[[], BaseException]) -> None:
    """At every step of a trajectory in turn; the steps after the fault are a trajectory of their own."""
    unet, adaptor = Tiny(), Faulty()
    faults: dict[str, BaseException | None] = {"body": None, "head": None}
    for name in faults:
        unet.get_submodule(name).register_forward_hook(lambda *_, name=name: _raise(faults[name]))
    before = snapshot(unet)
    module = {"full pass": "body", "adaptor pass": "head", "head": "head"}.get(where)
    step = 2 if "adaptor" in where else 3
    judge = Judge(unet, Tiny())
    cw = ch.wrap(unet, adaptor)
    times = torch.arange(900, 0, -100)
    for k, t in enumerate(times[: step - 1], 1):
        judge.call(torch.randn(1, 2, 8, 8), t, step=k)
    error = make()
    with contextlib.suppress(type(error)):
        if where == "between calls":
            raise error
        if module is not None:
            faults[module] = error
        else:
            adaptor.fault = error
        unet(torch.randn(1, 2, 8, 8), times[step - 1])
    faults.update(body=None, head=None)
    adaptor.fault = None
    if where == "between calls":  # of which we are not told
        cw.reset()
    judge.begin()
    judge.letters = ""
    for k, t in enumerate(times[step:].clone(), 1):  # a list of its own, as every run of a scheduler has
        judge.call(torch.randn(1, 2, 8, 8), t, step=k)
    assert judge.letters == "FAFAFAFAF"[: len(times) - step]
    cw.remove()
    assert snapshot(unet) == before


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise error


@torch.no_grad()
@pytest.mark.parametrize("make", FAULTS[:3], ids=["error", "interrupt", "CUDA OOM"])
def test_removed_right_after_a_fault(make: Callable[[], BaseException]) -> None:
    unet, adaptor = Tiny(), Faulty()
    before, x = snapshot(unet), torch.randn(1, 2, 8, 8)
    error = make()
    with contextlib.suppress(type(error)), ch.wrap(unet, adaptor):
        unet(x, 900)
        adaptor.fault = error
        unet(x, 800)
    assert snapshot(unet) == before
    assert torch.equal(unet(x, 700), Tiny()(x, 700))


@torch.no_grad()
@pytest.mark.parametrize("make", FAULTS[1:], ids=["interrupt", "CUDA OOM", "OOM", "exit"])
@pytest.mark.parametrize("where", ["analysis", "time", "patching"])
def test_in_our_own_code_it_leaves_the_wrapper_on(
    where: str, make: Callable[[], BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call takes seconds to analyse, and reading a time waits for the device: there Ctrl-C will come."""
    judge, error = Judge(Tiny()), make()
    # a private name: no time that a user passes can raise at will
    parts: dict[str, tuple[Any, str]] = {"analysis": (ch.Choice, "among"), "time": (times, "is_number")}
    part, name = parts.get(where, (hooks, "PastHooks"))
    with ch.wrap(judge.unet) as cw, cw.trajectory():
        for step, t in enumerate((900, 800) if where == "time" else (), 1):
            judge.call(torch.randn(1, 2, 8, 8), t, step=step)
        with monkeypatch.context() as patch:
            patch.setattr(part, name, lambda *values: _raise(error))
            with pytest.raises(type(error)):
                judge.unet(torch.randn(1, 2, 8, 8), 700)
        judge.begin()
        judge.letters = ""
        for step, t in enumerate((600, 500, 400, 300), 1):
            judge.call(torch.randn(1, 2, 8, 8), t, step=step)
        assert judge.letters == "FAFA"
        assert cw.stats.reasons["first step"] == (2 if where == "time" else 1)


@torch.no_grad()
@pytest.mark.parametrize("ours", [True, False], ids=["an error of ours", "a fault of ours"])
def test_a_later_signature_that_cannot_be_analysed_is_full_and_the_others_are_served(
    ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, plain = Tiny(), Tiny()
    timeline = torch.linspace(900, 100, 6)

    def loop(size: int) -> str:
        passes = ""
        for t in timeline:
            x = torch.randn(1, 2, size, size)
            more = () if size == 8 else (torch.ones(1, 3),)  # another form: one that differs in sizes is not recorded
            full, output = plain(x, t, *more), unet(x, t, *more)
            passes += "F" if torch.equal(output, full) else "A"
        return passes

    with torch.no_grad(), ch.wrap(unet) as cw:
        assert loop(8) == "FAFAFA"
        finish = engine.finish

        def fails(recorder: Any, model: nn.Module, arguments: Any, **options: Any) -> Any:
            if any(isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[-1] == 16 for leaf in arguments.flat):
                raise ch.TraceError("torn", seen={"x": 16}, do="mend it") if ours else IndexError("torn")
            return finish(recorder, model, arguments, **options)

        monkeypatch.setattr(engine, "finish", fails)
        said = "could not be analysed(.|\n)*torn(.|\n)*What to do: " + ("mend it" if ours else "report it")
        with pytest.warns(ch.NoEffectWarning, match=said):
            assert loop(16) == "FFFFFF"
        assert loop(16) == "FFFFFF"  # told once
        assert loop(8) == "FAFAFA"
        assert cw.stats.reasons["these inputs could not be analysed"] == 12
        assert loop(12) == "FAFAFA"  # and another one still is


def test_what_torch_compile_was_called_on_stays_compiled_after_a_recording_that_could_not_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that is compiled in this process runs in eager while a call is recorded; it did so ever after."""
    runs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        return lambda *args: (runs.append(1), graph(*args))[1]

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    compiled(torch.ones(2))
    with monkeypatch.context() as patch:  # a private name: no argument of a user's raises there
        patch.setattr(recorder, "register_module_forward_hook", lambda *_, **__: _raise(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            ch.trace(Tiny(), torch.randn(1, 2, 8, 8), 900)
    assert not any((_global_forward_hooks, _global_forward_pre_hooks))
    for _ in range(2):
        ch.trace(Tiny(), torch.randn(1, 2, 8, 8), 900)
        compiled(torch.ones(2))
    assert len(runs) == 3


def test_what_an_interrupted_removal_has_left_comes_off_when_asked_again() -> None:
    class Stubborn(nn.Conv2d):
        stops = 2

        def __delattr__(self, name: str) -> None:
            if name == "forward" and self.stops:
                self.stops -= 1
                raise KeyboardInterrupt
            super().__delattr__(name)

    unet = Tiny()
    unet.body = Stubborn(16, 16, 3, padding=1)
    before = snapshot(unet)
    cw = ch.wrap(unet)
    with torch.no_grad():
        for t in torch.arange(900, 500, -100):
            unet(torch.randn(1, 2, 8, 8), t)
    with pytest.raises(KeyboardInterrupt):
        cw.remove()
    with pytest.raises(KeyboardInterrupt):
        cw.remove()
    cw.remove()
    del unet.body.stops
    assert snapshot(unet) == before


def test_a_first_call_that_cannot_be_analysed_says_so_and_leaves_the_unet_unwrapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unet = Tiny()
    monkeypatch.setattr(engine, "finish", lambda *args, **options: {}[0])
    with torch.no_grad(), ch.wrap(unet):
        with pytest.raises(KeyError):
            unet(torch.randn(1, 2, 8, 8), 900.0)
        assert "forward" not in vars(unet)


def test_a_declared_step_that_fails() -> None:
    """The trajectory is over; the next declaration begins another."""
    judge, trip = Judge(Tiny()), True

    def hook(*_: Any) -> None:
        if trip:
            raise RuntimeError

    with ch.wrap(judge.unet) as cw:
        for k, t in enumerate((900, 950, 400), 1):
            with cw.step():
                judge.call(torch.randn(1, 2, 8, 8), t, step=k)
        handle = judge.unet.body.register_forward_hook(hook)
        with pytest.raises(RuntimeError), cw.step(), cw.branch("a"):
            judge.unet(torch.randn(1, 2, 8, 8), 399, torch.zeros(1, 3))
        handle.remove()
        judge.begin()
        for k, t in enumerate((390, 380), 1):
            with cw.step():
                judge.call(torch.randn(1, 2, 8, 8), t, step=k)
    assert judge.letters == "FAFFA"


@torch.no_grad()
def test_nan_is_reported_with_step_and_region() -> None:
    unet, adaptor = Tiny(), Faulty()
    with ch.wrap(unet, adaptor, check_finite=True) as cw:
        x = torch.randn(1, 2, 8, 8)
        for t in (900, 800, 700):
            unet(x, t)
        adaptor.fault = "nan"
        with pytest.raises(ch.AdaptorError, match=r"finite|NaN") as caught:
            unet(x, 600)
    assert caught.value.seen["step"] == 4
    assert cw.region is not None
    assert caught.value.seen["region"] == cw.region.line
