"""Every error of `wrap` and its passes: a rule, what was seen, what to do; and the UNet as it was."""

import copy
import math
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clockwork_hooks as ch
from clockwork_hooks.errors import ArgumentError, share, whole
from tests.small_unet import Tiny
from tests.snapshot import snapshot


class Elsewhere(Tiny):
    """As Tiny, with the upsampler under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.rise = self.up
        del self.up

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        h = self.stem(x)
        return self.head(torch.cat([h, self.rise(self.body(self.down(h)))], 1))


class NoRegion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Any) -> Tensor:
        return self.two(self.one(x)) + t


class TwoTimes(Tiny):
    """Two inputs with one number a row; both feed a sine."""

    def forward(self, x: Tensor, fps: Any, pace: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x, fps) + torch.sin(pace.reshape(-1, 1, 1, 1))


def sample() -> Tensor:
    return torch.randn(1, 2, 8, 8)


def check(error: ch.ClockworkError, *words: str) -> None:
    """Three parts, and these words among them."""
    assert isinstance(error, ch.ClockworkError)
    text = str(error)
    assert error.rule
    assert text.startswith(error.rule)
    assert error.seen
    assert all(f"\n  {name}: " in text for name in error.seen)
    assert error.do
    assert text.endswith(f"What to do: {error.do}")
    for word in words:
        assert word in text


def foreign_region() -> ch.Region:
    return ch.find_region(Elsewhere(), sample(), 5)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (ch.ArgumentError, lambda: {"clock": 0}, ["clock: 0", "int of at least 1"]),
        (ch.ArgumentError, lambda: {"clock": -3}, ["clock: -3"]),
        (ch.ArgumentError, lambda: {"clock": 2.0}, ["clock: 2.0"]),
        (ch.ArgumentError, lambda: {"clock": True}, ["clock: True"]),
        (ch.ArgumentError, lambda: {"clock": "2"}, ["clock: '2'"]),
        (ch.ArgumentError, lambda: {"clock": 4, "schedule": {3, 5}}, ["schedule: {3, 5}", "clock: 4", "without clock"]),
        (ch.ArgumentError, lambda: {"clock": 2, "plan": SimpleNamespace()}, ["clock: 2", "pass plan= without clock"]),
        (ch.ArgumentError, lambda: {"level": 1, "plan": 1, "adaptor": "a"}, ["pass plan= without adaptor, level"]),
        (ch.ArgumentError, lambda: {"schedule": {0, 2}}, ["outside the rule: [0]"]),
        (ch.ArgumentError, lambda: {"schedule": {1}}, ["first step"]),
        (ch.ArgumentError, lambda: {"schedule": [[2]]}, ["outside the rule: [[2]]"]),
        (ch.ArgumentError, lambda: {"schedule": 5}, ["schedule: 5"]),
        (ch.ArgumentError, lambda: {"schedule": "F A F A"}, ["F A F A"]),
        (ch.ArgumentError, lambda: {"region": "up"}, ["region: up", "find_region", "region.save"]),
        (ch.ArgumentError, lambda: {"region": foreign_region()}, ["region found for: Elsewhere", "rise"]),
        (ch.ArgumentError, lambda: {"plan": object()}, ["plan: object", "schedule"]),
        (ch.ArgumentError, lambda: {"plan": SimpleNamespace(region=0, schedule=None, adaptor=None)}, ["region: int"]),
        (ch.AdaptorError, lambda: {"adaptor": 3}, ["adaptor: 3"]),
        (
            ch.AdaptorError,
            lambda: {"adaptor": "resnet"},
            ["no folder", "/resnet", "user/name", "distill(unet, 'resnet'"],
        ),
        (ch.AdaptorError, lambda: {"adaptor": ch.IdentityAdaptor}, ["IdentityAdaptor"]),
    ],
)
def test_a_wrong_option(kind: type[ch.ClockworkError], options: Callable[[], Any], words: list[str]) -> None:
    unet, arguments = Tiny(), options()
    before = snapshot(unet)
    with pytest.raises(kind) as caught:
        ch.wrap(unet, **arguments)
    check(caught.value, *words)
    assert snapshot(unet) == before


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ch.Schedule.every(0), ["clock: 0"]),
        (lambda: ch.Schedule.every(2, start=0), ["start: 0"]),
        (lambda: ch.Schedule.every(2, start=5, stop=3), ["stop: 3"]),
        (lambda: ch.Schedule.every(2, warmup=-1), ["warmup: -1"]),
        (lambda: ch.Schedule.every(2, final=1), ["steps: None"]),
        (lambda: ch.Schedule.every(2, final=1, steps=0), ["steps: 0"]),
        (lambda: ch.Schedule.at(5), ["steps: 5"]),
        (lambda: ch.Schedule.at([2.0]), ["[2.0]"]),
        (lambda: ch.Schedule.where(3), ["got: 3"]),
    ],
)
def test_a_wrong_schedule(make: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ch.ArgumentError) as caught:
        make()
    check(caught.value, *words)


def test_what_cannot_be_wrapped() -> None:
    unet = Tiny()
    for thing in (None, torch.zeros(1), Tiny, SimpleNamespace(unet=unet)):
        with pytest.raises(ch.WrapError) as caught:
            ch.wrap(thing)  # type: ignore[arg-type]
        check(caught.value, thing.__name__ if isinstance(thing, type) else type(thing).__name__)
    cw = ch.wrap(unet)
    before = snapshot(unet)
    for thing in (unet, cw):
        with pytest.raises(ch.WrapError) as caught:
            ch.wrap(thing)  # type: ignore[arg-type]
        check(caught.value, "once", "remove()")
    assert snapshot(unet) == before
    cw.remove()
    ch.wrap(unet).remove()
    outer = nn.Sequential(unet)
    with ch.wrap(unet), pytest.raises(ch.WrapError) as caught:
        ch.wrap(outer)
    check(caught.value, "wrapped inside: 0")
    compiled = torch.compile(unet, backend="eager")
    before = snapshot(compiled), snapshot(unet)
    ch.wrap(compiled).remove()  # type: ignore[arg-type]
    assert (snapshot(compiled), snapshot(unet)) == before


def test_a_module_that_refuses_to_be_patched() -> None:
    """All or nothing: the first modules are patched already when one refuses."""

    class Frozen(nn.ConvTranspose2d):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "forward":
                raise RuntimeError("frozen")
            super().__setattr__(name, value)

    unet = Tiny()
    unet.up = Frozen(16, 8, 4, 2, 1)
    for region in (None, ch.find_region(unet, sample(), 900)):
        before = snapshot(unet)
        cw = ch.wrap(unet, region=region)
        with pytest.raises(ch.WrapError) as caught:
            unet(sample(), 900)
        check(caught.value, "module: up", "frozen")
        assert snapshot(unet) == before
        unet(sample(), 900)
        cw.remove()


def test_a_unet_that_refuses_to_be_patched() -> None:
    class Frozen(Tiny):
        frozen = False

        def __setattr__(self, name: str, value: Any) -> None:
            if self.frozen:
                raise RuntimeError("frozen")
            super().__setattr__(name, value)

    unet = Frozen()
    vars(unet)["frozen"] = True
    before = snapshot(unet)
    with pytest.raises(ch.WrapError) as caught:
        ch.wrap(unet)
    check(caught.value, "module: the UNet itself", "frozen")
    assert snapshot(unet) == before


@pytest.mark.parametrize(
    ("unet", "args", "options", "kind", "words"),
    [
        (NoRegion, (torch.tensor(5),), {}, ch.RegionNotFoundError, ["model: NoRegion", "find_region"]),
        (TwoTimes, (torch.ones(1), torch.ones(1)), {}, ch.AmbiguousInputError, ["fps, pace", 'time="fps"']),
        (Tiny, (900,), {"time": "sigma"}, ch.ArgumentError, ["time: sigma", "t"]),
        (Tiny, (900,), {"time": 3}, ch.ArgumentError, ["time: 3"]),
        (Tiny, (900,), {"time": "x"}, ch.ArgumentError, ["time: x"]),
    ],
)
def test_an_error_at_the_first_call_leaves_the_unet_unwrapped(
    unet: type[nn.Module], args: tuple[Any, ...], options: Any, kind: type[ch.ClockworkError], words: list[str]
) -> None:
    model, x = unet(), sample()
    before, expected = snapshot(model), model(x, *args)
    cw = ch.wrap(model, **options)
    with pytest.raises(kind) as caught:
        model(x, *args)
    check(caught.value, *words)
    assert snapshot(model) == before
    assert torch.equal(model(x, *args), expected)
    cw.remove()
    assert snapshot(model) == before


def test_the_time_can_be_named() -> None:
    unet, fps = TwoTimes(), torch.ones(1)
    with torch.no_grad(), ch.wrap(unet, time="pace") as cw, cw.trajectory():
        for k in range(4):
            unet(sample(), fps, torch.full((1,), 9.0 - k))
    assert cw.stats.adaptor_passes == 2


def test_a_region_found_for_other_inputs_is_found_again() -> None:
    unet = Tiny()
    with (
        torch.no_grad(),
        ch.wrap(unet, region=ch.find_region(unet, torch.randn(3, 2, 16, 16), 5)) as cw,
        cw.trajectory(),
    ):
        for t in (900, 800, 700, 600):
            unet(sample(), t)
    assert cw.stats.adaptor_passes == 2


def test_clock_one_warns() -> None:
    with pytest.warns(ch.NoEffectWarning, match="clock 1"):
        ch.wrap(Tiny(), clock=1).remove()


def every_error() -> list[type[ch.ClockworkError]]:
    kinds, todo = [], [ch.ClockworkError]
    while todo:
        kinds.append(todo.pop())
        todo += kinds[-1].__subclasses__()
    return [kind for kind in kinds if kind.__module__ == "clockwork_hooks.errors"]  # the demo has a few of its own


@pytest.mark.parametrize("kind", every_error())
def test_the_error_tree(kind: type[ch.ClockworkError]) -> None:
    """Exported, documented in the tree, and the same after a pickle or a copy (process pools send errors so)."""
    from clockwork_hooks import errors

    assert getattr(ch, kind.__name__) is kind
    assert kind.__name__ in errors.__all__
    assert kind.__name__ in str(errors.__doc__)
    error = kind("a rule", seen={"a": 1, "b": "x"}, do="this")
    assert str(error) == "a rule\n  a: 1\n  b: x\nWhat to do: this"
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind
        assert str(again) == str(error)
        assert (again.rule, again.seen, again.do) == ("a rule", {"a": 1, "b": "x"}, "this")


def test_a_wrapper_that_nobody_kept_comes_with_the_error() -> None:
    unet = Tiny()
    ch.wrap(unet)
    with pytest.raises(ch.WrapError) as caught:
        ch.wrap(unet)
    check(caught.value, "unet: Tiny\n", "wrapper: ClockworkWrapper(Tiny, every(2), IdentityAdaptor)")
    assert pickle.loads(pickle.dumps(caught.value)).wrapper is None
    caught.value.wrapper.remove()
    ch.wrap(unet).remove()


@pytest.mark.parametrize("kind", ["resnet", "scaled-resnet", "unet"])
def test_a_kind_of_adaptor_that_was_not_trained(kind: str) -> None:
    with pytest.raises(ch.AdaptorError) as caught:
        ch.wrap(Tiny(), kind)
    check(caught.value, f"train one: distill(unet, '{kind}'", "wrap(unet, 'mine')")


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 0, torch.tensor(1)])
def test_a_whole_number_is_an_int_of_at_least_so_much(value: object) -> None:
    with pytest.raises(ArgumentError, match=r"steps is an int of at least 1(?s:.)*pass steps=8"):
        whole("steps", value, least=1, example=8)
    whole("steps", 1, least=1)


@pytest.mark.parametrize("value", [True, "0.5", None, -0.1, 1.1, math.nan, math.inf])
def test_a_share_is_a_number_from_0_to_1(value: object) -> None:
    for ends in (True, False):
        with pytest.raises(ArgumentError, match="alpha is a share"):
            share("alpha", value, ends=ends)
    for end in (0, 1):
        share("alpha", end)
        with pytest.raises(ArgumentError, match="between 0 and 1"):
            share("alpha", end, ends=False)
