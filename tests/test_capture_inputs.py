"""Captured passes: what they read and write beside weights (inputs, constants, buffers), on the stand-in for graphs."""

import collections
import contextlib
import functools
import re
import threading
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, ParamSpec, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import clockwork_hooks as ch
from clockwork_hooks.engine import cuda_graphs
from tests.small_unet import Tiny
from tests.tape import FakeCuda
from tests.test_compile import captured_as, cuda  # noqa: F401  (a fixture)

STEPS = range(900, 300, -100)


def both(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module, ch.ClockworkWrapper]:
    """Two equal UNets, wrapped; the second one and its wrapper are captured."""
    eager, ours = make(), make()
    ch.wrap(eager, clock=2)
    return eager, ours, ch.wrap(ours, clock=2).compile(mode="cudagraphs")


def noise(k: int) -> Tensor:
    return torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(k))


@torch.no_grad()
def test_what_a_pass_writes_to_buffers_it_writes_once_a_call(cuda: FakeCuda) -> None:  # noqa: F811
    """Capturing runs the pass more than once."""

    class Averages(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
            self.calls += 1
            self.mean.lerp_(self.stem(x).mean((0, 2, 3)), 0.1)
            return super().forward(x, t, c, **more) + self.mean.sum()

    eager, ours, _ = both(Averages)
    for k, t in [*enumerate(STEPS)] * 2:
        torch.testing.assert_close(ours(noise(k), t), eager(noise(k), t))
        torch.testing.assert_close(dict(ours.named_buffers()), dict(eager.named_buffers()))
    assert ours.calls == 12
    assert cuda.captures == 2


@torch.no_grad()
@captured_as
def test_a_launch_that_does_not_count_writes_nothing(how: dict[str, Any], cuda: FakeCuda) -> None:  # noqa: F811
    """Whether a graph still stands for the modules is known after most launches; not after those that write."""

    class Counts(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
            self.calls.add_(1)
            return super().forward(x, t, c, **more)

    unet = Counts()
    with ch.wrap(unet, clock=2) as cw:
        cw.compile(**how)
        for run in range(1, 6):
            if run == 4:
                unet.head = nn.Sequential(unet.head, nn.Tanh())
            with cw.trajectory():
                for k, t in enumerate(STEPS):
                    unet(noise(k), t)
            assert unet.calls == run * len(STEPS)
    assert cuda.captures > 2


@torch.no_grad()
def test_writes_that_leave_no_mark(cuda: FakeCuda) -> None:  # noqa: F811
    """A sampler's CUDA graph writes to the sample in every step, another graph to the conditions for every prompt."""
    eager, ours, _ = both(Tiny)
    x, c = torch.zeros(2, 2, 16, 16), torch.zeros(2, 3)
    for run in range(3):
        c.data.fill_(run)
        for k, t in enumerate(STEPS):
            x.data.copy_(noise(k))
            torch.testing.assert_close(ours(x, t, c), eager(x, t, c))
    assert cuda.captures == 2


class WithOptions(Tiny):
    """Takes an object that holds a number and a tensor."""

    def forward(self, x: Tensor, t: Any, c: Any = None, **more: Any) -> Tensor:
        return super().forward(x, t) * c.scale + c.bias


@torch.no_grad()
def test_objects_are_constants_with_what_they_hold(cuda: FakeCuda) -> None:  # noqa: F811
    eager, ours, _ = both(WithOptions)
    options, bias = SimpleNamespace(scale=1.0, bias=torch.zeros(1)), torch.ones(1)
    for scale, other in ((1.0, bias), (0.5, bias), (0.5, torch.full((1,), 3.0)), (1.0, bias), (True, bias)):
        options.scale, options.bias = scale, other
        for k, t in enumerate(STEPS):
            torch.testing.assert_close(ours(noise(k), t, options), eager(noise(k), t, options))
    assert cuda.captures == 6  # a tensor that it holds is an input; the fourth is as the first; True is not 1.0


@torch.no_grad()
def test_modules_may_hold_anything(cuda: FakeCuda, tmp_path: Path) -> None:  # noqa: F811
    """Of what modules hold everything is looked into, whatever Python it is made of."""
    T = TypeVar("T")
    holds = [T, Generic[T], ParamSpec("P"), list[int], re.compile("a"), threading.Lock(), weakref.ref(cuda), iter([1])]
    holds += [functools.partial(print, 1), np.zeros(2), memoryview(b"a"), contextlib.nullcontext(), SimpleNamespace]
    holds += [tmp_path, (k for k in range(3)), collections.Counter("ab"), types.MappingProxyType({}), torch.float16]
    holds += [torch.device("cpu"), torch.Generator(), torch.Size([1]), ValueError("a"), object(), slice(1), ...]
    eager, ours, cw = both(Tiny)
    ours.body.held = {"all": holds}
    for _ in range(3):
        for k, t in enumerate(STEPS):
            torch.testing.assert_close(ours(noise(k), t), eager(noise(k), t))
    assert cuda.captures == 2
    assert cw.stats.adaptor_passes == 6


@torch.no_grad()
def test_constants_that_change_in_every_call_are_not_captured_for_ever(
    cuda: FakeCuda,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Scaled(Tiny):
        def forward(self, x: Tensor, t: Any, c: Any = None, **more: Any) -> Tensor:
            return super().forward(x, t) * (c or 1.0)

    monkeypatch.setattr(cuda_graphs, "_GRAPHS", 3)
    eager, ours, cw = both(Scaled)

    def run() -> None:
        for k, t in enumerate(STEPS):
            torch.testing.assert_close(ours(noise(k), t, k / 10), eager(noise(k), t, k / 10))

    with pytest.warns(ch.NoEffectWarning, match="more than 3 constants"), cw.trajectory():
        run()
    assert cuda.captures == 3


@torch.no_grad()
def test_adapters_switched_in_the_middle_of_a_trajectory(cuda: FakeCuda) -> None:  # noqa: F811
    class Adapted(nn.Conv2d):
        """What PEFT puts around a layer, as far as `Weights` knows it."""

        merged_adapters: tuple[str, ...] = ()
        _disable_adapters, _active_adapter = False, "style"

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 if self._disable_adapters else 3)

    def make() -> nn.Module:
        unet = Tiny()
        torch.manual_seed(0)
        unet.head, unet.peft_config = Adapted(16, 2, 3, padding=1), {"style": None}
        return unet

    eager, ours, cw = both(make)
    for run in range(3):
        for k, t in enumerate(STEPS):
            if run and k in (2, 4):
                for unet in (eager, ours):
                    unet.head._disable_adapters = not unet.head._disable_adapters
            torch.testing.assert_close(ours(noise(k), t), eager(noise(k), t))
    assert cw.stats.adaptor_passes > 0


@torch.no_grad()
def test_attributes_of_an_adaptor_that_is_no_module(cuda: FakeCuda) -> None:  # noqa: F811
    class Scales:
        by = 1.0

        def __call__(self, entry: Any, exit_cached: Tensor, **inputs: Any) -> Tensor:
            return exit_cached * self.by

    adaptor, eager, ours = Scales(), Tiny(), Tiny()
    ch.wrap(eager, adaptor, clock=2), ch.wrap(ours, adaptor, clock=2).compile(mode="cudagraphs")
    for by in (1.0, 2.0):
        adaptor.by = by
        for k, t in enumerate(STEPS):
            torch.testing.assert_close(ours(noise(k), t), eager(noise(k), t))
