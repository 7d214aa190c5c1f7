"""A wrapper that is taken off and put on again, and one that serves only some of a UNet's calls."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import clockwork_hooks as ch
from tests.oracle import Judge
from tests.small_unet import Tiny
from tests.snapshot import snapshot


def sample(unet: Tiny, steps: int = 6) -> Tensor:
    x = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in torch.linspace(900, 0, steps):
            x = x - 0.1 * unet(x, t)
    return x


def test_on_and_off_and_on_again() -> None:
    unet = Tiny().eval()
    before, plain = snapshot(unet), sample(unet)
    cw = ch.wrap(unet, clock=2)
    expected = sample(unet)
    assert not torch.equal(expected, plain)
    for _ in range(2):
        assert cw.attached
        cw.remove()
        assert not cw.attached
        assert snapshot(unet) == before
        assert torch.equal(sample(unet), plain)
        assert cw.attach() is cw.attach() is cw
        cw.stats.clear()
        assert torch.equal(sample(unet), expected)
        assert dict(cw.stats.reasons) == {"first step": 1, "scheduled": 2}  # nothing is recorded again
    cw.remove()
    assert snapshot(unet) == before


def test_modules_exchanged_while_it_was_off_are_noticed() -> None:
    unet = Tiny().eval()
    cw = ch.wrap(unet, clock=2)
    sample(unet)
    cw.remove()
    name, old = next((n, m) for n, m in unet.named_modules() if isinstance(m, torch.nn.Conv2d))
    torch.manual_seed(1)
    unet.set_submodule(name, torch.nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size, padding=old.padding))
    with ch.wrap(unet, clock=2):
        expected = sample(unet)
    with cw.attach():
        assert torch.equal(sample(unet), expected)


def test_a_wrapper_inside_that_came_meanwhile_stays() -> None:
    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Tiny()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = self.inner(x, t)
            return out

    unet = Outer().eval()
    cw = ch.wrap(unet)
    cw.remove()
    with ch.wrap(unet.inner), pytest.raises(ch.WrapError, match="nothing inside a UNet may be wrapped already"):
        cw.attach()


def test_another_wrapper_that_came_meanwhile_stays() -> None:
    unet = Tiny().eval()
    cw = ch.wrap(unet, clock=2)
    cw.remove()
    with (
        ch.wrap(unet, clock=3) as other,
        pytest.raises(ch.WrapError, match="wrapped only once, and this one has a wrapper") as raised,
    ):
        cw.attach()
    assert raised.value.wrapper is other
    cw.attach().remove()


def test_only_some_calls_are_served() -> None:
    """Another loop calls the same UNet in between: it gets plain passes, and ours go on as if it were not there."""
    unet = Tiny().eval()
    plain = sample(unet)
    with ch.wrap(unet, clock=2) as cw:
        expected = sample(unet)
        cw.stats.clear()
        x = y = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), cw.serving(False):
            for t in torch.linspace(900, 0, 6):
                with cw.serving():
                    x = x - 0.1 * unet(x, t)
                y = y - 0.1 * unet(y, t)
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (3, 3)
    assert torch.equal(x, expected)
    assert torch.equal(y, plain)


@torch.no_grad()
def test_a_step_that_a_forward_in_front_answers_is_no_step_before() -> None:
    """A step cache that somebody puts on after `wrap`, as TeaCache does: after a step of its own the next is full."""
    judge, times, last = Judge(Tiny()), torch.arange(900, 0, -90).tolist(), list[Any]()
    with ch.wrap(judge.unet, schedule=lambda step: True) as cw, cw.trajectory():
        below = judge.unet.forward

        def cache(*args: Any, **kwargs: Any) -> Any:
            if step % 3 < 2:
                last[:] = [below(*args, **kwargs)]
            return last[0]

        judge.unet.forward = cache
        for step, t in enumerate(times):
            x = torch.randn(1, 2, 8, 8)
            if step % 3 < 2:
                judge.call(x, t, step=step)
            else:
                judge.unet(x, t)
        assert judge.letters == "FAFAFAF"
        assert cw.stats.reasons == {"first step": 4, "another forward in front of the UNet's answered by itself": 3}


@torch.no_grad()
def test_a_forward_that_takes_itself_off_at_the_end_of_its_first_call() -> None:
    """And puts back what it found, which is older than the wrapper's: diffusers' group offloading with streams does."""
    judge, times = Judge(Tiny()), torch.arange(900, 0, -90).tolist()
    found = judge.unet.forward

    def once(*args: Any, **kwargs: Any) -> Any:
        output = found(*args, **kwargs)
        judge.unet.forward = functools.partial(Tiny.forward, judge.unet)
        return output

    judge.unet.forward = once
    with ch.wrap(judge.unet, schedule=lambda step: True) as cw, cw.trajectory():
        for step, t in enumerate(times):
            x = torch.randn(1, 2, 8, 8)
            if step in (1, 2):  # by the older forward: the call had looked it up before any hook ran
                judge.unet(x, t)
            else:
                judge.call(x, t, step=step)
        assert judge.letters == "FFAAAAAA"
        assert cw.stats.reasons == {"first step": 2, "something put an older forward of the UNet back": 2}
        assert cw.stats.full_passes + cw.stats.adaptor_passes == len(times)


@torch.no_grad()
def test_who_puts_a_forward_past_the_wrapper_around_each_call_is_told() -> None:
    """As nodes of ComfyUI do by `unittest.mock`: the class's forward runs, and ours comes back after the call."""
    unet = Tiny()

    def run() -> None:
        for t in torch.arange(900, 0, -90):
            with mock.patch.object(unet, "forward", functools.partial(Tiny.forward, unet)):
                unet(torch.randn(1, 2, 8, 8), t)

    with ch.wrap(unet), pytest.warns(ch.NoEffectWarning, match="answered by itself"):
        run()
