"""The restore law: after `remove()` everything is what it was, and copies of a wrapped UNet are plain UNets."""

import copy
import functools
import inspect
import io
import os
import threading
import time
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import clockwork_hooks as ch
from clockwork_hooks.engine.hooks import Forward, Installed
from clockwork_hooks.regions.find import Choice
from tests.small_unet import SKIPPED, Tiny
from tests.snapshot import snapshot

CONDITION = torch.tensor([[0.5, -1.0, 2.0]])  # its way into the region is watched by a hook of ours


def sample(t: int) -> torch.Tensor:
    return torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(t))


def descend(unet: nn.Module, times: tuple[int, ...] = (900, 800, 700, 600)) -> list[torch.Tensor]:
    with torch.no_grad():
        return [unet(sample(t), t, CONDITION) for t in times]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_hooks_that_come_and_go_do_not_stop_the_clock() -> None:
    """Accelerate's hooks, taken off, take ours along; the next pass puts it back, a full pass too."""
    unet = Tiny()
    for path in ("up", "body"):
        add_hook_to_module(unet.get_submodule(path), ModelHook())
    with ch.wrap(unet) as cw, cw.trajectory():
        descend(unet)
        for change in (remove_hook_from_module, lambda module: add_hook_to_module(module, ModelHook())):
            for path in ("up", "body"):
                change(unet.get_submodule(path))
            cw.stats.clear()
            descend(unet)
            assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (2, 2)


def test_a_forward_that_was_there_before_is_there_again() -> None:
    unet = Tiny()
    for path in SKIPPED:
        add_hook_to_module(unet.get_submodule(path), ModelHook())
    before = snapshot(unet)
    with ch.wrap(unet):
        descend(unet)
        assert snapshot(unet) != before
    assert snapshot(unet) == before


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
    with ch.wrap(twin) as other, other.trajectory():  # it can be wrapped: it is not
        descend(twin)
        assert other.stats.adaptor_passes == 2
    cw.remove()
    assert equal(descend(unet), expected)


def test_two_threads_that_trace_at_once_patch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = Tiny()
    before, patch = snapshot(unet), Installed._patch

    def slowly(self: Installed, path: str, module: nn.Module) -> Forward:
        forward = patch(self, path, module)
        time.sleep(0.01)  # the other thread is here now
        return forward

    monkeypatch.setattr(Installed, "_patch", slowly)
    among, meet = Choice.among, threading.Barrier(2)

    def together(*args: Any, **kwargs: Any) -> Any:
        region = among(*args, **kwargs)
        meet.wait(10)
        return region

    monkeypatch.setattr(Choice, "among", together)
    with ch.wrap(unet):
        threads = [threading.Thread(target=descend, args=(unet,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not isinstance(unet.up.forward.forward, Forward)
    assert snapshot(unet) == before


class Trip(Exception):
    """Raised inside the UNet."""


TRIP: dict[str, type[BaseException]] = {}


def _maybe_raise(path: str, module: nn.Module, args: Any) -> None:
    if path in TRIP:
        raise TRIP[path]


class Pair:
    """A UNet and a twin that gets all that the user does, but never Clockwork."""

    def __init__(self) -> None:
        self.unet, self.twin = Tiny(), Tiny()
        TRIP.clear()
        for model in (self.unet, self.twin):
            for path in ("stem", "body", "head"):
                model.get_submodule(path).register_forward_pre_hook(functools.partial(_maybe_raise, path))
        self.before = snapshot(self.unet)
        self.cw: ch.ClockworkWrapper | None = None
        self.handles: list[tuple[Any, ...]] = []
        self.touched = False
        self.time = 900

    def wrap(self, options: dict[str, Any]) -> None:
        if self.cw is None:
            self.cw = ch.wrap(self.unet, **options)

    def remove(self) -> None:
        if self.cw is not None:
            self.cw.remove()
            self.cw.remove()
            self.cw = None
        self.check()

    def call(self, where: str | None, error: type[BaseException]) -> None:
        self.time -= 10
        if where is None:
            descend(self.unet, (self.time,))
            return
        TRIP[where] = error
        adapted = self.cw.stats.adaptor_passes if self.cw is not None else 0
        try:
            descend(self.unet, (self.time,))
        except error:
            pass
        else:  # of a skipped module no hook is called
            assert where == "body"
            assert self.cw is not None
            assert self.cw.stats.adaptor_passes == adapted + 1
        TRIP.clear()

    def switch(self, on: bool) -> None:
        if self.cw is not None:
            self.cw.enabled = on

    def hook(self, path: str, kind: str) -> None:
        add = f"register_forward_{kind}"
        self.handles.append(tuple(getattr(m.get_submodule(path), add)(_nothing) for m in (self.unet, self.twin)))

    def unhook(self, k: int) -> None:
        if self.handles:
            for handle in self.handles.pop(k % len(self.handles)):
                handle.remove()

    def accelerate(self, path: str, on: bool) -> None:
        self.touched = True
        for model in (self.unet, self.twin):
            module = model.get_submodule(path)
            if on:
                add_hook_to_module(module, ModelHook())
            else:
                remove_hook_from_module(module)

    def copy(self, by_pickle: bool) -> None:
        copied = pickled(self.unet) if by_pickle and not any(map(_accelerated, self.unet.modules())) else None
        copied = copied or copy.deepcopy(self.unet)
        assert equal(descend(copied), descend(self.twin))
        assert all(a is not b for a, b in zip(copied.parameters(), self.unet.parameters(), strict=True))
        ch.wrap(copied).remove()

    def check(self) -> None:
        assert not _get_current_dispatch_mode_stack()
        assert not _global_forward_hooks
        assert not _global_forward_pre_hooks
        assert look(self.unet) == look(self.twin)
        assert equal(descend(self.unet), descend(self.twin))
        if not self.handles and not self.touched:
            assert snapshot(self.unet) == self.before


def _nothing(*_: Any) -> None:
    return None


def _accelerated(module: nn.Module) -> bool:
    return hasattr(module, "_hf_hook")  # accelerate's forward is a local function: no pickle takes it


def pickled(unet: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(unet, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def look(model: nn.Module) -> dict[str, Any]:
    """What can be said of two models alike; a module's own forward may be set on it (accelerate leaves it there)."""
    seen: dict[str, Any] = {"state": list(model.state_dict())}
    for path, module in model.named_modules():
        attributes = dict(vars(module))
        if getattr(attributes.get("forward"), "__func__", None) is type(module).forward:
            del attributes["forward"]
        values = [*attributes.values()]
        values += [item for value in attributes.values() if isinstance(value, dict) for item in value.values()]
        assert not [value for value in values if type(value).__module__.startswith("clockwork_hooks")], path
        sizes = {name: len(value) for name, value in attributes.items() if isinstance(value, dict)}
        seen[path] = (type(module), module.training, sorted(attributes), sizes)
    return seen


PATHS = st.sampled_from(["", "stem", "side", *SKIPPED, "head"])
INNER = st.sampled_from(["side", *SKIPPED])
OPTIONS = st.sampled_from([{}, {"clock": 3}, {"schedule": lambda step: True}])
ERRORS = st.sampled_from([Trip, KeyboardInterrupt])
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("wrap"), OPTIONS),
        st.tuples(st.just("call"), st.none(), ERRORS),
        st.tuples(st.just("call"), st.sampled_from([None, "stem", "body", "head"]), ERRORS),
        st.tuples(st.just("switch"), st.booleans()),
        st.tuples(st.just("remove")),
        st.tuples(st.just("hook"), PATHS, st.sampled_from(["hook", "pre_hook"])),
        st.tuples(st.just("unhook"), st.integers(0, 5)),
        st.tuples(st.just("accelerate"), INNER, st.booleans()),
        st.tuples(st.just("copy"), st.booleans()),
    ),
    min_size=3,
    max_size=16,
)


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
@settings(max_examples=int(os.environ.get("CLOCKWORK_EXAMPLES", 60)))
@given(actions=ACTIONS)
@example(actions=[*[("call", None, Trip)] * 3, ("call", "body", Trip)])  # an adaptor pass, by plain times
def test_the_restore_law(actions: list[tuple[Any, ...]]) -> None:
    pair = Pair()
    try:
        pair.wrap({})
        for name, *args in actions:
            getattr(pair, name)(*args)
    finally:
        pair.remove()


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
@pytest.mark.parametrize("error", [Trip, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_removed_in_the_middle_of_a_call(error: type[BaseException], calls: int) -> None:
    """In the traced call, a full and an adaptor pass: by an error that leaves the `with` block, or by a hook."""
    pair = Pair()

    def interrupted() -> None:
        with ch.wrap(pair.unet, schedule={3, 4}) as cw, cw.trajectory():
            descend(pair.unet, (900, 800, 700)[:calls])
            TRIP["head"] = error
            descend(pair.unet, (600,))

    with pytest.raises(error):
        interrupted()
    TRIP.clear()
    pair.check()
    cw = ch.wrap(pair.unet, schedule={3, 4})
    descend(pair.unet, (900, 800, 700)[:calls])
    handle = pair.unet.stem.register_forward_hook(lambda *_: cw.remove())
    assert equal(descend(pair.unet, (600,)), descend(pair.twin, (600,)))
    handle.remove()
    pair.check()


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
def test_removed_between_the_skipped_calls_of_an_adaptor_pass() -> None:
    pair = Pair()
    cw = ch.wrap(pair.unet, schedule=lambda step: True)
    descend(pair.unet, (900,))
    pair.unet.side.register_forward_hook(lambda *_: cw.remove())
    assert equal(descend(pair.unet, (800,)), descend(pair.twin, (800,)))


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
@pytest.mark.parametrize("path", ["stem", "side", "up", "head"])
@pytest.mark.parametrize("before", [1, 3])
def test_removed_by_a_hook_within_an_adaptor_pass(path: str, before: int) -> None:
    """The pass is run again in full, and what the modules held before it is put back: not what is off by now.

    Args:
        path: of the module whose hook removes the wrapper.
        before: so many calls; after three, the pass is no first adaptor pass.
    """
    pair = Pair()
    cw = ch.wrap(pair.unet, schedule={2, 4})
    with cw.trajectory():
        descend(pair.unet, (900, 800, 700)[:before])
        handle = pair.unet.get_submodule(path).register_forward_hook(lambda *_: cw.remove())
        assert equal(descend(pair.unet, (600,)), descend(pair.twin, (600,)))
        handle.remove()
    pair.check()


@pytest.mark.parametrize("first", [0, 1])
def test_two_wrappers_that_share_modules_come_off_in_any_order(first: int) -> None:
    """The second one is attached to a part of the first one's UNet before that has been called."""
    outer = OneInside()
    before, expected = snapshot(outer), descend(outer)
    wrappers = [ch.wrap(outer), ch.wrap(outer.net)]
    descend(outer)
    assert isinstance(outer.net.up.forward.forward, Forward)
    wrappers[first].remove()
    descend(outer)
    wrappers[1 - first].remove()
    assert snapshot(outer) == before
    assert equal(descend(outer), expected)


class OneInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Tiny()

    def forward(self, x: torch.Tensor, t: Any, c: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.net(x, t, c)
        return output


def test_compiled_in_place_is_compiled_again() -> None:
    unet = Tiny()
    for module in (unet, unet.up):
        module._compiled_call_impl = module._call_impl  # as Module.compile() does, without its imports
    before = snapshot(unet)
    with ch.wrap(unet) as cw, cw.trajectory():
        descend(unet)
        assert cw.stats.adaptor_passes == 2
        assert unet._compiled_call_impl is None
    assert snapshot(unet)[""][2] == before[""][2]


def test_removed_while_another_thread_analyses_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, reached, removed, among = Tiny(), threading.Event(), threading.Event(), Choice.among
    expected, before = descend(unet), snapshot(unet)

    def slow(*args: Any) -> ch.Region:
        reached.set()
        assert removed.wait(10)
        return among(*args)

    monkeypatch.setattr(Choice, "among", slow)
    cw, outputs = ch.wrap(unet), []
    thread = threading.Thread(target=lambda: outputs.extend(descend(unet)))
    thread.start()
    assert reached.wait(10)
    cw.remove()
    removed.set()
    thread.join()
    assert snapshot(unet) == before
    assert equal(outputs, expected)


def test_a_copied_wrapper_is_a_copied_unet() -> None:
    """As `copy.deepcopy(pipe)` does after `pipe.unet = cw`."""
    unet = Tiny()
    expected = descend(unet)
    with ch.wrap(unet) as cw:
        approximate = descend(unet)
        held = {"unet": cw}
        for copied in (copy.deepcopy(held)["unet"], pickled(cw)):  # type: ignore[arg-type]
            assert type(copied) is Tiny
            assert equal(descend(copied), expected)
            copied.head.weight.data.zero_()
        cw.reset()
        assert equal(descend(unet), approximate)
        assert not equal(approximate, expected)


def test_signatures_survive() -> None:
    unet = Tiny()
    before = inspect.signature(unet.up.forward)
    with ch.wrap(unet):
        descend(unet)
        assert inspect.signature(unet.up.forward) == before
