"""The restore law: after `remove()` everything is what it was, and copies of a wrapped UNet are plain UNets."""

import copy
import inspect
import threading
import time
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import clockwork_hooks as ch
from clockwork_hooks import engine
from clockwork_hooks.hooks import Forward, Installed
from tests.small_unet import SKIPPED, Tiny
from tests.snapshot import snapshot


def sample(t: int) -> torch.Tensor:
    return torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(t))


def descend(unet: nn.Module, times: tuple[int, ...] = (900, 800, 700, 600)) -> list[torch.Tensor]:
    with torch.no_grad():
        return [unet(sample(t), t) for t in times]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_hooks_that_come_and_go_do_not_stop_the_clock() -> None:
    """Accelerate's hooks, taken off, take ours along; the next pass puts it back, a full pass too."""
    unet = Tiny()
    for path in ("up", "body"):
        add_hook_to_module(unet.get_submodule(path), ModelHook())
    with ch.wrap(unet) as cw:
        descend(unet)
        for change in (remove_hook_from_module, lambda module: add_hook_to_module(module, ModelHook())):
            for path in ("up", "body"):
                change(unet.get_submodule(path))
            cw.stats.clear()
            descend(unet)
            assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (2, 2)


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_copy_of_a_wrapped_unet_is_plain_and_on_its_own(accelerated: bool) -> None:
    unet = Tiny()
    expected = descend(unet)
    cw = ch.wrap(unet)
    descend(unet)
    for path in SKIPPED if accelerated else ():
        add_hook_to_module(unet.get_submodule(path), ModelHook())
    twin = copy.deepcopy(unet)
    assert equal(descend(twin), expected)
    passes = cw.stats.full_passes + cw.stats.adaptor_passes
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not any(output.any() for output in descend(twin))
    assert cw.stats.full_passes + cw.stats.adaptor_passes == passes
    with ch.wrap(twin) as other:  # it can be wrapped: it is not
        descend(twin)
        assert other.stats.adaptor_passes == 2
    cw.remove()
    assert equal(descend(unet), expected)


def test_two_threads_that_trace_at_once_patch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = Tiny()
    before, patch = snapshot(unet), Installed._patch

    def slowly(self: Installed, path: str, module: nn.Module) -> Forward:
        made = patch(self, path, module)
        time.sleep(0.01)  # the other thread is here now
        return made

    monkeypatch.setattr(Installed, "_patch", slowly)
    choose, meet = engine.choose, threading.Barrier(2)

    def together(*args: Any, **kwargs: Any) -> Any:
        region = choose(*args, **kwargs)
        meet.wait(10)
        return region

    monkeypatch.setattr(engine, "choose", together)
    with ch.wrap(unet):
        threads = [threading.Thread(target=descend, args=(unet,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not isinstance(unet.up.forward.forward, Forward)
    assert snapshot(unet) == before


def test_signatures_survive() -> None:
    unet = Tiny()
    before = inspect.signature(unet.up.forward)
    with ch.wrap(unet):
        descend(unet)
        assert inspect.signature(unet.up.forward) == before
