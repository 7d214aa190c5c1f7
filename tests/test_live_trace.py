"""The first real call of a wrapped UNet is recorded while it runs: on any UNet, in any mode, and leaves no trace."""

import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    is_in_torch_dispatch_mode,
)
from torch.utils.checkpoint import checkpoint

import clockwork_hooks as ch
from clockwork_hooks.engine.hooks import Forward
from clockwork_hooks.graph.tracing import recording
from tests.bendable import Tiny, noise, outputs
from tests.snapshot import snapshot
from tests.test_trace import CALLERS, WRITERS, Custom, assert_clean
from tests.zoo import ZOO, ZooCase, random_unet
from tests.zoo.proof import same

NUMBERS = (9.0, 8.0, 7.0, 6.0)
TIMES = torch.tensor(NUMBERS)  # as a scheduler has them
# a rule that kept the first outputs of each size lost these UNets' exits
LATE = ("kandinsky22", "cascade_b", "monai2d", "monai_unet", "x_unet", "x_unet_plain", "squeeze_excite", "token_unet")
BUILDS = [*(ZOO[name] for name in LATE), *(partial(random_unet, seed) for seed in (17, 40, 43))]
FULL = (0, 2)


def rollout(model: nn.Module, times: Any = TIMES, **kwargs: Any) -> list[Any]:
    """Four steps on moving samples, the first of them recorded when the model is wrapped."""
    return outputs(lambda t: model(noise() + 0.1 * t, t, **kwargs), times)


def ticked(model: nn.Module, expected: list[Any], **kwargs: Any) -> list[Any]:
    """A rollout at clock 2: full steps equal the plain ones to the bit, adaptor steps do not; the model is restored."""
    before, state = snapshot(model), torch.get_rng_state()
    with ch.wrap(model, clock=2) as cw, cw.trajectory():
        output = rollout(model, **kwargs)
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (2, 2), cw.report()
    assert [same(a, b) for a, b in zip(output, expected, strict=True)] == [True, False, True, False]
    assert torch.equal(torch.get_rng_state(), state)
    assert snapshot(model) == before
    assert_clean()
    assert same(rollout(model), expected)
    return output


@pytest.fixture
def reference() -> list[Any]:
    """What a plain wrapped UNet makes: full and adaptor steps."""
    model = Tiny()
    return ticked(model, rollout(model))


# -- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Tiny, Custom, *WRITERS, *CALLERS])
def test_every_bend_in_a_real_loop(kind: type[Tiny]) -> None:
    model = kind()
    before, expected = snapshot(model), rollout(model)
    with ch.wrap(model) as cw, cw.trajectory():
        output = rollout(model)
        region = ch.find_region(kind(), noise(), 9.0)
        assert cw.region is not None
        assert (cw.region.fingerprint, cw.region.macs) == (region.fingerprint, region.macs)
        assert cw.stats.reasons == {"first step": 1, "scheduled": 1}  # the exit was kept: no pass is "traced"
    assert [same(output[k], expected[k]) for k in FULL] == [True, True]
    assert snapshot(model) == before
    assert same(rollout(model), expected)


class UpBlock(nn.Module):
    """An up-sampling residual block, as in ADM and DeepFloyd IF: it returns the last of many tensors of its size."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.SiLU(), nn.Upsample(scale_factor=2.0), nn.Conv2d(32, 8, 3, 1, 1), nn.SiLU())
        self.body.extend([nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, 1, 1)])
        self.skip = nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(32, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.body(x)


class Raises(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.up = UpBlock()


class GatedAfter(Tiny):
    """Squeeze-and-excitation after the exit: its maps are of one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())

    def join(self, h: Tensor, low: Tensor) -> Tensor:
        joined = torch.cat((h, low), 1)
        return self.head(joined * self.gate(joined))


class Interpolated(Tiny):
    """The exit is of the low resolution; what a function makes of it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv2d(32, 8, 3, 1, 1)

    def join(self, h: Tensor, low: Tensor) -> Tensor:
        return super().join(h, nn.functional.interpolate(low, scale_factor=2.0))


class MergedWithin(Tiny):
    """The skip comes in the middle of a residual block, whose input is the exit, not what its first layers return."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.GroupNorm(2, 8)), nn.Conv2d(16, 8, 1)
        self.head = nn.Conv2d(8, 3, 3, 1, 1)

    def join(self, h: Tensor, low: Tensor) -> Tensor:
        return self.head(low + self.mix(torch.cat((self.first(low), h), 1)))


class TokensAfter(Tiny):
    """What the region returns are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(8, 8)

    def low(self, h: Tensor, t: Any) -> Tensor:
        return self.tokens(super().low(h, t).flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, h.shape[2:])


@pytest.mark.parametrize("kind", [Raises, GatedAfter, Interpolated, MergedWithin, TokensAfter])
def test_the_first_call_keeps_the_exit(kind: type[Tiny]) -> None:
    with torch.no_grad(), ch.wrap(kind()) as cw, cw.trajectory():
        for t in (9.0, 8.0, 7.0, 6.0):
            cw(noise(), t)
        assert (cw.stats.reasons, cw.stats.adaptor_passes) == ({"first step": 1, "scheduled": 1}, 2)


@pytest.mark.parametrize("build", BUILDS)
def test_the_first_call_of_other_peoples_unets_keeps_the_exit(build: Callable[[], ZooCase]) -> None:
    case = build()
    with torch.no_grad(), ch.wrap(case.model) as cw:
        for _ in range(2):
            args, kwargs = case.inputs()
            with cw.step():
                case.model(*args, **kwargs)
        assert (cw.stats.reasons, cw.stats.adaptor_passes) == ({"first step": 1}, 1)


def test_a_lazy_model_and_one_that_grows_are_recorded_in_their_first_call() -> None:
    class Grows(Tiny):
        outputs: nn.Module

        def low(self, h: Tensor, t: Any) -> Tensor:
            if "grown" not in self._modules:
                self.grown = nn.Conv2d(8, 8, 1)
            return super().low(self.grown(h), t)

    lazy = Tiny()
    lazy.body = nn.LazyConv2d(32, 3, 1, 1)
    for model in (Grows(), lazy):
        with ch.wrap(model) as cw, cw.trajectory():
            outputs = rollout(model)
            assert cw.stats.adaptor_passes == 2, cw.report()
        expected = rollout(model)
        assert [same(outputs[k], expected[k]) for k in FULL] == [True, True]
        model(noise(), 3.0).sum().backward()


class Outer(Tiny):
    """Another UNet works within the region."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tiny(32)

    def low(self, h: Tensor, t: Any) -> Tensor:
        return self.up(self.inner(self.down(h), t))


class Refiner(Tiny):
    """One UNet after the other: the outer wrapper's region is the first one's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Tiny()

    def forward(self, x: Tensor, t: Any) -> Tensor:
        return super().forward(self.first(x, t), t)


def test_a_unet_within_a_wrapped_unet_is_recorded_twice_at_once() -> None:
    model = Outer()
    before, expected = snapshot(model), rollout(model)
    with ch.wrap(model) as outer, ch.wrap(model.inner) as inner:
        output = rollout(model)
        assert inner.region is not None
        assert outer.region is not None
        assert inner.region.fingerprint == ch.find_region(Tiny(32), noise(2, 32, 8, 8), 9.0).fingerprint
        assert outer.region.fingerprint == ch.find_region(Outer(), noise(), 9.0).fingerprint
        assert same(output[0], expected[0])
    assert snapshot(model) == before
    assert same(rollout(model), expected)
    assert_clean()


def test_a_unet_within_a_wrapped_unet_is_skipped() -> None:
    model = Outer()
    with ch.wrap(model) as outer, outer.trajectory(), ch.wrap(model.inner) as inner, inner.trajectory():
        rollout(model, NUMBERS)  # of which the inner one is given every other
        assert (outer.stats.full_passes, outer.stats.adaptor_passes) == (2, 2)
        assert (inner.stats.full_passes, inner.stats.adaptor_passes) == (1, 1)


def test_two_wrappers_that_share_modules_never_give_a_wrong_full_step() -> None:
    model = Refiner()
    expected = rollout(model)
    with ch.wrap(model), ch.wrap(model.first):
        output = rollout(model)
    assert [same(output[k], expected[k]) for k in FULL] == [True, True]
    assert same(rollout(model), expected)
    assert_clean()


@pytest.mark.parametrize("first", ["outer", "inner"])
def test_two_wrappers_that_share_modules_restore_them(first: str) -> None:
    model = Refiner()
    before = snapshot(model)
    pair = [ch.wrap(model), ch.wrap(model.first)]
    rollout(model)
    for cw in pair if first == "outer" else reversed(pair):
        cw.remove()
    assert snapshot(model) == before


# -- modes --------------------------------------------------------------------------------------------------------


def test_modes_of_the_caller() -> None:
    for mode in (
        lambda: torch.inference_mode(),
        lambda: torch.enable_grad(),
        lambda: torch.autocast("cpu", torch.bfloat16),
    ):
        model = Tiny().eval()
        with mode():
            expected = [model(noise() + 0.1 * t, t) for t in TIMES]
            with ch.wrap(model) as cw, cw.trajectory():
                outputs = [model(noise() + 0.1 * t, t) for t in TIMES]
                assert cw.stats.adaptor_passes == 2, cw.report()
            assert [torch.equal(outputs[k], expected[k]) for k in FULL] == [True, True]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_flow_through_a_recorded_call_with_checkpoints(reentrant: bool) -> None:
    class Checkpointed(Tiny):
        def low(self, h: Tensor, t: Any) -> Tensor:
            return checkpoint(super().low, h, t, use_reentrant=reentrant)

    model = Checkpointed().train()
    model(noise(), 3.0).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with ch.wrap(model):
        model(noise(), 3.0).sum().backward()  # recorded, then a second call with the plan in place
        grads = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        model(noise(), 2.0).sum().backward()
    assert same(grads, expected)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("which", ["root", "body", "optimized"])
def test_compiled_in_place(which: str, reference: list[Any]) -> None:
    torch._dynamo.reset()
    model = Tiny()
    expected = rollout(model)
    if which == "optimized":
        model.body = torch.compile(model.body, backend="eager")
    else:
        (model if which == "root" else model.body).compile(backend="eager")
    rollout(model)  # compiled code is in the cache
    with warnings.catch_warnings():  # torch tells everybody with global hooks about OptimizedModule
        warnings.filterwarnings("ignore", message="Using `torch.compile")
        assert same(ticked(model, expected), reference)
    if which != "optimized":
        assert vars(model if which == "root" else model.body)["_compiled_call_impl"] is not None


# -- others' hooks ------------------------------------------------------------------------------------------------


def offloaded(model: nn.Module) -> Callable[[], None]:
    accelerate.cpu_offload(model, execution_device="cpu")
    return lambda: remove_hook_from_module(model, recurse=True)


def moved(model: nn.Module) -> Callable[[], None]:
    _, hook = accelerate.cpu_offload_with_hook(model, execution_device="cpu")
    return lambda: (hook.offload(), remove_hook_from_module(model))[0]


def dispatched(model: nn.Module) -> Callable[[], None]:
    for module in model.children():
        add_hook_to_module(module, CpuOffload("cpu"))
    return lambda: remove_hook_from_module(model, recurse=True)


@pytest.mark.parametrize("offload", [offloaded, moved, dispatched])
def test_offload_hooks_before_wrap(offload: Callable[[nn.Module], Callable[[], None]], reference: list[Any]) -> None:
    model = Tiny()
    expected = rollout(model)
    undo = offload(model)
    hooks = [(type(module._hf_hook), id(module._hf_hook)) for module in model.modules() if hasattr(module, "_hf_hook")]
    kinds = {name: (type(p), p.device.type) for name, p in model.named_parameters()}
    with ch.wrap(model) as cw, cw.trajectory():
        assert same(rollout(model), reference), cw.report()
    assert {name: (type(p), p.device.type) for name, p in model.named_parameters()} == kinds
    assert [(type(m._hf_hook), id(m._hf_hook)) for m in model.modules() if hasattr(m, "_hf_hook")] == hooks
    assert same(rollout(model), expected)
    ch.trace(model, noise(), 3.0)
    assert {name: (type(p), p.device.type) for name, p in model.named_parameters()} == kinds
    assert same(rollout(model), expected)
    undo()
    assert same(rollout(model), expected)
    assert same(ticked(model, expected), reference)


@pytest.mark.parametrize("offload", [offloaded, moved, dispatched])
@pytest.mark.parametrize("order", ["undo first", "remove first", "mid-way"])
def test_offload_hooks_after_wrap(
    offload: Callable[[nn.Module], Callable[[], None]], order: str, reference: list[Any]
) -> None:
    """Hooks come before the first call or in the middle of a trajectory, and go before or after ours."""
    model = Tiny()
    expected = rollout(model)
    cw = ch.wrap(model)
    if order == "mid-way":
        assert same(rollout(model), reference)
        cw.reset()
    undo = offload(model)
    output = rollout(model)
    assert [same(output[k], expected[k]) for k in FULL] == [True, True]
    assert same(output, reference), cw.report()
    for end in (undo, cw.remove) if order == "undo first" else (cw.remove, undo):
        end()
        output = rollout(model)
        assert [same(output[k], expected[k]) for k in FULL] == [True, True]
    assert same(rollout(model), expected)
    assert not [v for module in model.modules() for v in vars(module).values() if isinstance(v, Forward)]


def test_a_lora_unet() -> None:
    case = ZOO["sd15"]()
    model = case.model
    plain = ch.find_region(model, *case.args, **case.kwargs)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    model.eval()
    before = snapshot(model)
    with torch.no_grad():
        expected = model(*case.args, **case.kwargs)
        with ch.wrap(model) as cw:
            assert same(model(*case.args, **case.kwargs), expected)
            assert cw.region is not None
            assert cw.region.fingerprint == plain.fingerprint
            assert cw.region.macs > plain.macs
        assert snapshot(model) == before
        model.disable_adapters()
        assert not same(model(*case.args, **case.kwargs), expected)
        model.enable_adapters()
        assert same(model(*case.args, **case.kwargs), expected)


# -- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
def test_a_recorded_call_holds_no_activations() -> None:
    """During the call only a few likely exits live longer; after it one exit; after remove() none."""

    class Watched(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.chain = nn.Sequential(*(nn.Conv2d(32, 32, 1) for _ in range(30)))
            self.seen: list[weakref.ref[Tensor]] = []
            self.alive = 0
            for layer in self.chain:
                layer.register_forward_hook(lambda module, args, output: self.seen.append(weakref.ref(output)))

        def low(self, h: Tensor, t: Any) -> Tensor:
            out = self.up(self.chain(self.down(h)))
            self.alive = sum(ref() is not None for ref in self.seen)
            return out

    model = Watched()
    x = noise()
    with torch.no_grad():
        model(x, 9.0)
    model.seen.clear()
    gc.collect()
    gc.disable()  # nothing may wait for the collector
    try:
        count = live_tensors()
        cw = ch.wrap(model)
        with torch.no_grad():
            model(x, 9.0)
        assert model.alive <= 3
        assert sum(ref() is not None for ref in model.seen) == 0
        gc.collect()
        assert live_tensors() - count <= 2  # the exit, and the shared placeholder zero
        cw.remove()
        del cw
        gc.collect()
        assert live_tensors() - count <= 1
    finally:
        gc.enable()


def live_tensors() -> int:
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


# -- errors and interrupts ----------------------------------------------------------------------------------------


class Breaks(Tiny):
    """Raises once, in the middle of the region."""

    def __init__(self) -> None:
        super().__init__()
        self.box: list[BaseException] = []
        self.inner = nn.Sequential(self.body)
        self.body.register_forward_pre_hook(lambda module, args: self.fail())

    def fail(self) -> None:
        if self.box:
            raise self.box.pop()


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
def test_an_error_in_a_recorded_call_leaves_nothing() -> None:
    model = Breaks()
    expected = rollout(model)
    before = snapshot(model)
    with ch.wrap(model) as cw, cw.trajectory():
        model.box.append(ValueError("inside"))
        with pytest.raises(ValueError, match="inside"):
            model(noise(), 9.0)
        assert_clean()
        output = rollout(model)
        assert cw.stats.adaptor_passes == 2
    assert [same(output[k], expected[k]) for k in FULL] == [True, True]
    assert snapshot(model) == before


def interrupted(model: Breaks) -> None:
    model.box.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(noise(), 9.0)


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
def test_after_an_interrupt_the_next_call_works() -> None:
    model = Breaks()
    expected = rollout(model)
    before = snapshot(model)
    with ch.wrap(model) as cw, cw.trajectory():
        interrupted(model)
        output = rollout(model)
        assert cw.stats.adaptor_passes == 2, cw.report()
        assert_clean()
        interrupted(model)  # in a call that is not recorded
        assert_clean()
    assert [same(output[k], expected[k]) for k in FULL] == [True, True]
    assert snapshot(model) == before
    assert same(rollout(model), expected)


def test_after_an_interrupt_any_module_s_call_or_remove_cleans_up() -> None:
    for clean in (lambda cw: nn.Linear(2, 2)(torch.ones(1, 2)), lambda cw: cw.remove()):
        model = Breaks()
        cw = ch.wrap(model)
        interrupted(model)
        clean(cw)
        assert_clean()
        cw.remove()


def test_an_interrupt_leaves_nothing_at_once() -> None:
    model = Breaks()
    with ch.wrap(model):
        interrupted(model)
        assert_clean()


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
def test_an_interrupted_recorder_leaves_other_modes_on() -> None:
    class Counts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    model = Breaks()
    with Counts() as plain, torch.no_grad():
        model(noise(), 9.0)
    with ch.wrap(model) as cw, cw.trajectory():
        interrupted(model)
        with Counts() as below, Counts() as mode, torch.no_grad():
            model(noise(), 9.0)
            assert _get_current_dispatch_mode_stack() == [below, mode]
        assert mode.count == below.count >= plain.count > 10
    assert_clean()


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
def test_nested_recordings_that_were_interrupted() -> None:
    model = Refiner()
    model.first = Breaks()
    expected = rollout(model)
    with ch.wrap(model), ch.wrap(model.first):
        model.first.box.append(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            model(noise(), 9.0)
        assert_clean()
        output = rollout(model)
        assert_clean()
    assert [same(output[k], expected[k]) for k in FULL] == [True, True]


# -- threads ------------------------------------------------------------------------------------------------------


class Meets(Tiny):
    """Waits in the middle of its call for another thread to be there too."""

    barrier: threading.Barrier | None = None

    def low(self, h: Tensor, t: Any) -> Tensor:
        if self.barrier is not None and not self.barrier.broken:
            self.barrier.wait(timeout=20)
        return super().low(h, t)


@pytest.mark.parametrize("shared", [False, True])
def test_two_threads_record_at_once(shared: bool, reference: list[Any]) -> None:
    """Both are in the middle of a recorded call at the same time: of two UNets, or of the same one."""
    models = [Meets()] * 2 if shared else [Meets(), Meets()]
    for model in models:
        model.barrier = None
    wrappers = [ch.wrap(model) for model in dict.fromkeys(models)]
    declared = [wrappers[0 if shared else k] for k in range(2)]  # at the same times: nothing else tells the loops apart
    barrier = threading.Barrier(2)
    for model in models:
        model.barrier = barrier
    outputs: dict[int, Any] = {}

    def run(k: int) -> None:
        with declared[k].trajectory():
            outputs[k] = rollout(models[k])

    threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert same(outputs[0], reference)
    assert same(outputs[1], reference)
    assert_clean()
    assert not is_in_torch_dispatch_mode(), "torch's note for the whole process"
    for cw in wrappers:
        cw.remove()
    assert all("forward" not in vars(module) for model in models for module in model.modules())


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
def test_a_thread_that_dies_in_a_recorded_call_blocks_nobody(reference: list[Any]) -> None:
    model = Breaks()
    cw = ch.wrap(model)

    def die() -> None:
        with pytest.raises(KeyboardInterrupt):
            model(noise(), 9.0)

    model.box.append(KeyboardInterrupt())
    thread = threading.Thread(target=die)
    thread.start()
    thread.join(60)
    done: list[Any] = []
    other = threading.Thread(target=lambda: done.append(rollout(model)), daemon=True)
    other.start()
    other.join(60)
    assert same(done[0], reference)
    cw.remove()
    assert_clean()


def test_other_threads_may_call_modules_while_one_records() -> None:
    """The hooks are global: they ignore whoever else runs, also when torch has registered them by half."""
    root, other = Tiny(), Tiny()
    with recording(root, (noise(), 3.0), {}) as recorder:
        thread = threading.Thread(target=lambda: other(noise(), 3.0))
        thread.start()
        thread.join(60)
        done: list[Any] = []
        thread = threading.Thread(target=lambda: done.append(recorder._after(other, (), "output")))
        thread.start()
        thread.join(60)
        assert done == [None]
        root(noise(), 3.0)
    assert len(recorder.calls) == 7
    assert not _has_any_global_hook()


def test_tokens_are_not_taken_for_the_bottleneck() -> None:
    """Attention tokens (1, 256, 16), as many channels as the bottleneck has pixels, must not cost the kept exit."""
    from diffusers import UNet2DConditionModel

    blocks = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    ups = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    widths = {"block_out_channels": (16, 32, 32), "norm_num_groups": 8, "attention_head_dim": 4}
    unet = UNet2DConditionModel(
        16, down_block_types=blocks, up_block_types=ups, layers_per_block=1, cross_attention_dim=16, **widths
    ).eval()
    text = torch.randn(1, 7, 16)
    with torch.no_grad(), ch.wrap(unet) as cw, cw.trajectory():
        for t in (900, 600, 300, 0):
            unet(torch.randn(1, 4, 16, 16), t, encoder_hidden_states=text)
    assert dict(cw.stats.reasons) == {"first step": 1, "scheduled": 1}
    assert cw.stats.adaptor_passes == 2


def test_garbage_is_collected_as_before_the_first_call() -> None:
    """While the call is recorded nothing is collected; after it, and after an error in it, the user's setting holds."""
    seen: list[bool] = []

    class Watched(Tiny):
        fails = False

        def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
            seen.append(gc.isenabled())
            if self.fails:
                raise RuntimeError("of the UNet itself")
            return super().forward(x, t, **kwargs)

    model = Watched().eval()
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            for model.fails in (False, True):
                with ch.wrap(model), torch.no_grad():
                    for time in TIMES[:3]:
                        if model.fails:
                            with pytest.raises(RuntimeError, match="of the UNet itself"):
                                model(noise(), time)
                        else:
                            model(noise(), time)
                        assert gc.isenabled() is enabled
        finally:
            gc.enable()
    assert seen[:3] == [False, True, True]  # recorded; the passes after it are as ever
