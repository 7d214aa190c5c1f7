"""`wrap` against rollouts made by hand from plain hooks: bit for bit, and nothing runs that need not."""

import asyncio
import contextlib
import copy
import json
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet1DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as modes

import clockwork_hooks as ch
from tests.oracle import Judge
from tests.small_unet import SKIPPED, Tiny, reference

# diffusers 0.42.1 hands a tensor to np.array in DPMSolverMultistepScheduler.set_timesteps
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


class WritesTheExit(Tiny):
    """The code after the region multiplies its exit in place; `late`, after it has used it once."""

    def __init__(self, late: bool, on: bool = True) -> None:
        super().__init__()
        self.late, self.on = late, on

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        h = self.stem(x)
        z = self.up(self.body(self.act(self.down(h))))
        y = torch.cat([h, z], 1) if self.late else None
        if self.on:
            z.mul_(0.5)
        return self.head(torch.cat([h, z], 1) if y is None else y) + z.mean()


@torch.no_grad()
@pytest.mark.parametrize("late", [False, True])
def test_an_exit_that_is_written_to_is_kept_as_it_left_the_region(late: bool) -> None:
    unet = WritesTheExit(late)
    plain = copy.deepcopy(unet)
    with ch.wrap(unet, clock=3) as cw, cw.trajectory():
        for _ in range(3):
            exit, outputs = None, []
            for t, x in zip((900, 800, 700, 600), torch.randn(4, 1, 2, 8, 8), strict=True):
                passes = cw.stats.full_passes
                outputs.append(unet(x, t))
                if cw.stats.full_passes > passes:
                    exit = None
                expected, exit = reference(plain, x, t, exit=exit)
                assert torch.equal(outputs[-1], expected)
    assert cw.stats.adaptor_passes == 6  # in the first trajectory too: the trace copies what is about to be written to


@torch.no_grad()
def test_a_pass_that_keeps_no_exit_leaves_none_behind() -> None:
    """The third pass is full and its exit is spoilt: the fourth does not fall back on that of the second."""

    def spoil(module: nn.Module, args: Any, output: Tensor) -> None:
        output.mul_(0.5)

    unet = Tiny()
    plain = copy.deepcopy(unet)
    with ch.wrap(unet, schedule={2, 4}) as cw, cw.trajectory():
        for t in (900, 800, 700, 600):
            x = torch.randn(1, 2, 8, 8)
            handle = unet.up.register_forward_hook(spoil) if t == 700 else None
            output = unet(x, t)
            if handle is not None:
                handle.remove()
        assert torch.equal(output, plain(x, t))
    assert cw.stats.reasons == {"first step": 1, "scheduled": 1, "the kept feature was written to": 1}


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
@torch.no_grad()
@pytest.mark.parametrize("where", ["in the pass", "after the pass"])
def test_an_exit_that_somebody_else_writes_to_is_not_used(where: str) -> None:
    """By a hook that was not there when the UNet was traced; what it does after the pass, it does to its own."""
    unet = Tiny()
    plain = copy.deepcopy(unet)
    exits: list[Tensor] = []

    def write(module: nn.Module, args: Any, output: Tensor) -> None:
        exits.append(output)
        if where == "in the pass":
            output.mul_(0.5)

    with ch.wrap(unet) as cw, cw.trajectory():
        for t in (900, 800):
            unet(torch.randn(1, 2, 8, 8), t)
        for model in (unet, plain):
            model.up.register_forward_hook(write)
        first, second = torch.randn(2, 1, 2, 8, 8)
        assert torch.equal(unet(first, 900), plain(first, 900))
        emitted = exits[-2].clone()
        exits[-2].zero_()
        output = unet(second, 800)
    if where == "in the pass":
        assert torch.equal(output, plain(second, 800))
        assert cw.stats.adaptor_passes == 1
    else:
        assert torch.equal(output, reference(plain, second, 800, exit=emitted)[0])
        assert cw.stats.adaptor_passes == 2


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
@pytest.mark.parametrize("clocks", [None, {1: 2}])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_writes_that_begin_after_the_trace(mode: Any, clocks: dict[int, int] | None) -> None:
    """By the UNet's own code, as FreeU's, and by a hook after the call; inference tensors keep no count of writes."""
    unet, exits = WritesTheExit(late=True, on=False), []
    unet.up.register_forward_hook(lambda module, args, output: exits.append(output))
    judge = Judge(unet)
    with mode(), ch.wrap(unet, clocks=clocks) as cw, cw.trajectory():
        for step, t in enumerate(range(900, 0, -100), 1):
            unet.on = judge.plain.on = step > 4  # type: ignore[assignment]
            judge.call(torch.randn(1, 2, 8, 8), t, step=step)
            if step in (1, 7):
                exits[-2].zero_()
        assert cw.stats.adaptor_passes >= 2


@torch.no_grad()
def test_writes_that_begin_before_a_full_step_are_known_after_it() -> None:
    """The fourth pass keeps nothing, and yet shows that exits are written to from now on: the fifth's is a copy."""
    unet = WritesTheExit(late=True, on=False)
    judge = Judge(unet)
    with ch.wrap(unet, clock=2) as cw, cw.trajectory():
        for step, t in enumerate(range(900, 100, -100), 1):
            unet.on = judge.plain.on = step > 3  # type: ignore[assignment]
            judge.call(torch.randn(1, 2, 8, 8), t, step=step)
    assert judge.letters == "FAFAFAFA"


# -- rollouts ------------------------------------------------------------------------------------------------------


class Double:
    """What is special about a UNet of the rollouts: the paths that its code tells, and how it is called."""

    def __init__(self, unet: nn.Module, entry: str, exit: str, time: str | None, text: Tensor | None) -> None:
        self.unet, self.entry, self.exit, self.time, self.text = unet.eval(), entry, exit, time, text

    def call(self, x: Tensor, t: Tensor) -> Tensor:
        more = {} if self.text is None else {"encoder_hidden_states": self.text}
        return self.unet(x, t, **more).sample


def small_sd15() -> Double:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    downsampler, upsampler = "down_blocks.0.downsamplers.0", "up_blocks.1.upsamplers.0.conv"
    return Double(unet, downsampler, upsampler, "time_embedding", torch.randn(1, 5, 12))


def small_1d() -> Double:
    unet = UNet1DModel(
        sample_size=32,
        extra_in_channels=32,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
        use_timestep_embedding=False,
    )
    return Double(unet, "down_blocks.1.down", "up_blocks.1", None, None)


@pytest.fixture(scope="module", params=[small_sd15, small_1d])
def double(request: pytest.FixtureRequest) -> Double:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Double = request.param()
    return model


SAMPLERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}
STEPS = 8


@torch.no_grad()
def sample_with(double: Double, sampler: str, seed: int = 0) -> list[Tensor]:
    """The UNet's outputs and the sample after each step of an 8-step loop."""
    scheduler = SAMPLERS[sampler]()
    scheduler.set_timesteps(STEPS)
    shape = (1, double.unet.config.in_channels, *((8, 8) if double.text is not None else (32,)))
    x, seen = torch.randn(shape, generator=torch.Generator().manual_seed(seed)), []
    for t in scheduler.timesteps:
        output = double.call(x, t)
        x = scheduler.step(output, t, x).prev_sample
        seen += [output, x]
    return seen


@contextlib.contextmanager
def clocked_by_hand(double: Double, full: Callable[[int], bool], adaptor: Any = None) -> Iterator[None]:
    """The paper's rollout from plain hooks: everything runs, and on adaptor steps the exit is replaced."""
    step, seen, handles = 0, {}, []

    def begin(module: nn.Module, args: Any) -> None:
        nonlocal step
        step += 1

    def take(name: str) -> Callable[..., None]:
        return lambda module, args, *output: seen.update({name: output[0] if output else args[0]})

    def leave(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not full(step):
            cached = seen["exit"]
            exit = adaptor(seen["entry"], cached, time=seen.get("time"), text=double.text) if adaptor else cached
            seen["exit"] = exit
            return exit
        seen["exit"] = output
        return None

    find = double.unet.get_submodule
    handles.append(double.unet.register_forward_pre_hook(begin))
    handles.append(find(double.entry).register_forward_pre_hook(take("entry")))
    handles.append(find(double.exit).register_forward_hook(leave))
    if double.time is not None:
        handles.append(find(double.time).register_forward_hook(take("time")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_hand(double: Double, sampler: str, letters: str, adaptor: Any = None) -> list[Tensor]:
    with clocked_by_hand(double, lambda step: letters[step - 1] == "F", adaptor):
        return sample_with(double, sampler)


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


SCHEDULES: dict[str, tuple[dict[str, Any], str]] = {
    "clock 2": ({"clock": 2}, "FAFAFAFA"),
    "clock 3": ({"clock": 3}, "FAAFAAFA"),
    "clock 4": ({"clock": 4}, "FAAAFAAA"),
    "the paper's steps": ({"schedule": {5, 6, 7, 8}}, "FFFFAAAA"),
    "a window": ({"schedule": ch.Schedule.every(2, start=2, stop=7, final=2, steps=8)}, "FFAFAFFF"),
    "a rule": ({"schedule": lambda step: step in (2, 3, 7)}, "FAAFFFAF"),
}


@pytest.mark.parametrize(
    ("sampler", "name"), [("ddim", name) for name in SCHEDULES] + [("dpm++", f"clock {n}") for n in (2, 3, 4)]
)
def test_identity_rollouts(double: Double, sampler: str, name: str) -> None:
    """From the first trajectory on, its recorded call included, every output and sample is the hand-made one's."""
    options, letters = SCHEDULES[name]
    plain = sample_with(double, sampler)
    expected = by_hand(double, sampler, letters)
    assert not equal(expected, plain)
    with ch.wrap(double.unet, **options) as cw:
        for repeats in (1, 2):
            assert equal(sample_with(double, sampler), expected)
            assert cw.stats.adaptor_passes == repeats * letters.count("A")
            assert set(cw.stats.reasons) <= {"first step", "scheduled"}
        cw.enabled = False
        assert equal(sample_with(double, sampler), plain)
        cw.enabled = True
        assert equal(sample_with(double, sampler), expected)
    assert equal(sample_with(double, sampler), plain)


class Mixes(nn.Module):
    """An adaptor that uses all it is given, and keeps what it was given."""

    def __init__(self, double: Double) -> None:
        super().__init__()
        rank, entry, exit = (4, 8, 16) if double.text is not None else (3, 16, 16)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.mix = (nn.Conv2d if rank == 4 else nn.Conv1d)(entry, exit, 1)
            self.time = nn.Linear(32, exit)
            self.text = nn.Linear(12, exit)
        self.seen: list[Any] = []
        self.rank = rank

    def forward(self, entry: Tensor, exit_cached: Tensor, *, time: Tensor | None, text: Tensor | None) -> Tensor:
        self.seen.append([None if value is None else value.clone() for value in (entry, exit_cached, time, text)])
        output = 0.5 * exit_cached + self.mix(entry)
        if time is not None and text is not None:
            output = output + (self.time(time) + self.text(text).mean(1))[:, :, None, None]
        return output


@pytest.mark.parametrize("clock", [2, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_adaptors_get_what_a_plain_hook_sees(double: Double, sampler: str, clock: int) -> None:
    """Entry, cached exit, time embedding and text, bit for bit; after an adaptor pass the cache holds its output."""
    adaptor = Mixes(double)
    expected = by_hand(double, sampler, ("F" + "A" * (clock - 1)) * STEPS, adaptor)
    by_hook, adaptor.seen = adaptor.seen, []
    with ch.wrap(double.unet, adaptor, clock=clock) as cw:
        sample_with(double, sampler)  # the first trajectory may have a traced pass more
        cw.stats.clear()
        adaptor.seen.clear()
        assert equal(sample_with(double, sampler), expected)
        assert cw.adaptor is adaptor
        assert len(adaptor.seen) == cw.stats.adaptor_passes == len(by_hook)
    for here, there in zip(adaptor.seen, by_hook, strict=True):
        for got, wanted in zip(here, there, strict=True):
            assert (got is None) == (wanted is None)
            assert got is None or torch.equal(got, wanted)


def test_where_the_first_exit_cannot_be_kept_one_pass_more_is_full() -> None:
    """The UNet lets it go long before anything goes with it, and fewer are kept alive. Once: its module is known."""

    class LetsGo(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.SiLU(), nn.Conv2d(8, 8, 1))

        def forward(self, x: Tensor, t: Any) -> Tensor:
            h = self.stem(x) + self.emb(torch.as_tensor(t / 100).reshape(1, 1)).sin()[:, :, None, None]
            z = self.up(self.body(self.act(self.down(h)))) * 2
            return self.head(torch.cat([h, z * self.gate(z)], 1))

    unet = LetsGo()
    with torch.no_grad(), ch.wrap(unet) as cw, cw.trajectory():
        for batch in (1, 1, 2, 2):
            for t in (900, 800, 700, 600):
                unet(torch.randn(batch, 2, 8, 8), t)
    assert cw.stats.reasons["traced"] == 1
    assert cw.stats.adaptor_passes == 4 * 2 - 1
    assert sum(cw.stats.reasons.values()) == cw.stats.full_passes == 9
    assert set(cw.stats.reasons) == {"first step", "scheduled", "traced"}


@torch.no_grad()
@pytest.mark.parametrize("passed", [False, True])
def test_an_adaptor_pass_calls_the_modules_outside_the_region_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, passed: bool
) -> None:
    """Counted: module calls, operators by their profiler names, and nothing is recorded: the call has its place."""
    unet = Tiny()
    with ch.wrap(unet, region=ch.find_region(unet, torch.randn(1, 2, 8, 8), 5) if passed else None) as cw:
        for t in (900, 800, 700, 600, 500):  # the first adaptor pass has shown that nothing is amiss
            unet(torch.randn(1, 2, 8, 8), t)
        calls: list[str] = []
        for path, module in unet.named_modules():
            run = module.forward
            if path and path not in SKIPPED:
                monkeypatch.setattr(module, "forward", lambda *a, run=run, path=path: (calls.append(path), run(*a))[1])
        places: list[Any] = []
        unet.head.register_forward_hook(lambda *_: places.append((cw.position, len(modes()))))
        with Operators() as operators:
            unet(torch.randn(1, 2, 8, 8), 400)
    assert calls == ["stem", "emb", "head"]
    assert [(place is not None, count) for place, count in places] == [(True, 1)]  # no mode but the one that counts
    counted = {name: operators.seen[name] for name in ("convolution", "conv2d", "conv_transpose2d", "linear", "silu")}
    assert sum(counted.values()) <= 2 + 1, counted  # two convolutions, and a linear layer where it is one operator
    monkeypatch.undo()


class Varies(Tiny):
    """Below 750 one module is called twice."""

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        h = self.stem(x)
        z = self.body(self.act(self.down(h)))
        z = self.body(z) if t < 750 else z
        return self.head(torch.cat([h, self.up(z)], 1))


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
def test_calls_that_differ_cost_no_pass() -> None:
    """A full pass tells that there is nothing to try."""
    unet = Varies()
    expected = [unet(torch.full((1, 2, 8, 8), 0.1), t) for t in range(900, 100, -100)]
    with torch.no_grad(), ch.wrap(unet, clock=2) as cw, cw.trajectory():
        outputs = [unet(torch.full((1, 2, 8, 8), 0.1), t) for t in range(900, 100, -100)]
        assert cw.stats.reasons == {"first step": 1, "scheduled": 3, "calls differed from the traced ones": 3}
        full, rest = cw.stats.macs_plain // 8, cw.stats.macs_plain // 8 - cw.region.macs
        assert cw.stats.macs_run == 7 * full + rest
    for k in (0, 2, 3, 4, 5, 6, 7):
        assert torch.equal(outputs[k], expected[k]), k


def test_calls_that_differ_from_the_traced_ones() -> None:
    """The pass is run again in full: the user's own hooks see that output, and both runs are counted."""
    unet = Varies()
    seen: list[Tensor] = []
    unet.register_forward_hook(lambda module, args, output: (seen.append(output), 2 * output)[1])
    expected = steps(unet)
    plain, seen[:] = list(seen), []
    with ch.wrap(unet, schedule=lambda step: True) as cw, cw.trajectory():
        outputs = steps(unet)
        assert cw.stats.reasons["calls differed from the traced ones"] == 2  # and the step after it had nothing to use
        assert torch.equal(outputs[2], expected[2])
        assert torch.equal(seen[2], plain[2])
        full = cw.stats.macs_plain // 4
        assert cw.stats.macs_run == 3 * full + 2 * (full - cw.region.macs)
        assert cw.stats.adaptor_passes == 1


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


# -- adaptors -----------------------------------------------------------------------------------------------------


def steps(unet: nn.Module, times: Iterable[int] = (900, 800, 700, 600)) -> list[Tensor]:
    with torch.no_grad():
        return [unet(torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(t)), t) for t in times]


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        (lambda exit: exit[:, :4], "1×4×8×8"),
        (lambda exit: exit.double(), "torch.float64"),
        (lambda exit: exit.to("meta"), "meta"),
        (lambda exit: None, "NoneType"),
        (lambda exit: (exit,), "tuple"),
        (lambda exit: exit[0], "8×8×8"),
        (lambda exit: exit.to_sparse(), "1×8×8×8 torch.float32 cpu torch.sparse_coo"),
    ],
)
def test_an_output_that_does_not_fit(wrong: Callable[[Tensor], Any], seen: str) -> None:
    """Checked before the UNet sees it; the next call begins anew, and is right."""
    unet = Tiny()
    expected, heads = steps(unet), []
    unet.head.register_forward_hook(lambda module, args, output: heads.append(output))
    with ch.wrap(unet, lambda entry, exit_cached, *, time, text: wrong(exit_cached)) as cw, cw.trajectory():
        steps(unet, [900])
        heads.clear()
        with pytest.raises(ch.AdaptorError) as caught:
            steps(unet, [800])
        assert not heads
        assert {"exit: 1×8×8×8 torch.float32 cpu", "step: 2"} < set(map(str.strip, str(caught.value).splitlines()))
        assert "up, 8×8" in str(caught.value)
        assert f"returned: {seen}" in str(caught.value) or seen in str(caught.value.seen["returned"])
        assert cw.stats.adaptor_passes == 0
        assert torch.equal(steps(unet, [800])[0], expected[1])
        assert cw.stats.reasons["first step"] == 2


@pytest.mark.parametrize("needs", ["trend", 5, {"trend", "exit"}, [["trend"]]])
def test_needs_that_nobody_can_meet(needs: Any) -> None:
    """Said by `wrap`, and not after the first full pass."""

    def adaptor(entry: Any, exit_cached: Tensor, **more: Any) -> Tensor:
        return exit_cached

    adaptor.needs = needs  # type: ignore[attr-defined]
    with pytest.raises(ch.AdaptorError, match="some of entry_cached, position, position_cached, trend"):
        ch.wrap(Tiny(), adaptor)


@pytest.mark.parametrize("what", ["entry", "position"])
def test_an_adaptor_that_writes_to_what_it_was_lent(what: str) -> None:
    """The UNet reads its entry after it, and the next adaptor step the position of this one."""
    unet = Tiny()

    def adaptor(entry: Tensor, exit_cached: Tensor, *, position: Tensor, **_: Any) -> Tensor:
        (entry if what == "entry" else position).mul_(0.5)
        return exit_cached

    adaptor.needs = {"position"}  # type: ignore[attr-defined]
    with ch.wrap(unet, adaptor) as cw, cw.trajectory():
        steps(unet, [900])
        with pytest.raises(ch.AdaptorError, match=rf"(?s)must not write to tensors.*written to: {what}"):
            steps(unet, [800])


def test_an_adaptor_that_raises() -> None:
    unet = Tiny()
    expected = steps(unet)
    error = RuntimeError("mine")

    def adaptor(entry: Any, exit_cached: Tensor, **_: Any) -> Tensor:
        raise error

    with ch.wrap(unet, adaptor):
        for _ in range(2):
            with pytest.raises(RuntimeError) as caught:
                steps(unet)
            assert caught.value is error
        assert torch.equal(steps(unet, [500])[0], steps_plain(unet, 500))
    assert equal(steps(unet), expected)


def steps_plain(unet: Tiny, t: int) -> Tensor:
    twin = copy.deepcopy(unet)
    return steps(twin, [t])[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_finite(value: float) -> None:
    unet = Tiny()
    broken: Any = lambda entry, exit_cached, **_: exit_cached * value  # noqa: E731
    with ch.wrap(unet, broken) as cw, cw.trajectory():
        assert not torch.isfinite(steps(unet)[1]).all()
    with ch.wrap(unet, broken, check_finite=True) as cw, cw.trajectory():
        with pytest.raises(ch.AdaptorError) as caught:
            steps(unet)
        assert caught.value.seen["step"] == 2
        assert caught.value.seen["region"] == cw.region.line
    with ch.wrap(unet, check_finite=True) as cw, cw.trajectory():
        steps(unet)
        assert cw.stats.adaptor_passes == 2


def test_a_conv_adaptor_is_called_once_a_pass_and_its_macs_count() -> None:
    """8·8·3·3·64 a call, module or function; a state that counts its calls sees each adaptor pass once."""
    conv, calls = nn.Conv2d(8, 8, 3, padding=1), []

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, entry: Any, exit_cached: Tensor, *, time: Any, text: Any) -> Tensor:
            calls.append(exit_cached)
            return self.conv(exit_cached)

    module = Counts()
    for adaptor in (module, lambda entry, exit_cached, *, time, text: module(entry, exit_cached, time=time, text=text)):
        unet = Tiny()
        with ch.wrap(unet, adaptor, clock=4) as cw, cw.trajectory():
            steps(unet, [900])
            full = cw.stats.macs_run
            steps(unet, [800])
            first = cw.stats.macs_run - full
            steps(unet, [700, 600, 500, 400, 300, 200])
        assert full == cw.stats.macs_plain / 8
        assert first == full - cw.region.macs + 8 * 8 * 9 * 64
        assert cw.stats.macs_run == 2 * full + 6 * first
        assert cw.stats.macs_saved == cw.stats.macs_plain - cw.stats.macs_run
        assert len(calls) == cw.stats.adaptor_passes == 6
        calls.clear()


# -- what the wrapper shows ---------------------------------------------------------------------------------------


def test_stats_and_report() -> None:
    unet = Tiny()
    with ch.wrap(unet, clock=4) as cw, cw.trajectory():
        assert cw.region is None
        assert "not known before the first call" in str(cw.report())
        steps(unet, [900, 800, 700, 600, 500])
        steps(unet, [900])
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (3, 3)
        assert dict(cw.stats.reasons) == {"first step": 2, "scheduled": 1}
        report = cw.report()
    data = json.loads(report.to_json())
    assert data["reasons"] == {"first step": 2, "scheduled": 1}
    assert (data["full_passes"], data["adaptor_passes"]) == (3, 3)
    assert data["macs_run"] == cw.stats.macs_run < data["macs_plain"] == cw.stats.macs_plain
    assert data["saving"] == cw.stats.saving == 1 - data["macs_run"] / data["macs_plain"]
    title, _, head, rule, *rows = report.to_markdown().splitlines()
    assert title == "**Clockwork on Tiny**"
    assert all(row.count("|") == 3 for row in (head, rule, *rows))
    assert len(rows) == len(str(report).splitlines()) - 1
    for text in ("first step: 2", "scheduled: 1", "every(4)", "IdentityAdaptor", "3 full, 3 with the adaptor"):
        assert text in str(report)
        assert text in report.to_markdown()
    cw.stats.clear()
    assert (cw.stats.full_passes, cw.stats.macs_run, cw.stats.saving, dict(cw.stats.reasons)) == (0, 0, 0, {})
    assert report.full_passes == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda stats: pickle.loads(pickle.dumps(stats))])
def test_counts_can_be_put_aside(copied: Callable[[ch.Stats], ch.Stats]) -> None:
    """To compare them with those of later, or to send them to another process."""
    unet = Tiny()
    with ch.wrap(unet) as cw:
        steps(unet)
        then, passes = copied(cw.stats), cw.stats.full_passes
        assert then == cw.stats
        steps(unet)
        assert (then.full_passes, cw.stats.full_passes) == (passes, 2 * passes)
        then.clear()
        assert then.full_passes == 0 < cw.stats.full_passes


def test_every_pass_has_one_reason_or_none() -> None:
    unet = Tiny()
    with ch.wrap(unet) as cw:
        for times in ((900, 800), (800,), (100, 900), (900, 900)):
            steps(unet, times)
    assert sum(cw.stats.reasons.values()) == cw.stats.full_passes
    assert cw.stats.full_passes + cw.stats.adaptor_passes == 7


def test_attributes_pass_through() -> None:
    unet = Tiny()
    with ch.wrap(unet) as cw:
        assert cw.unet is unet
        assert cw.stem is unet.stem
        assert list(cw.state_dict()) == list(unet.state_dict())
        assert cw.training is False
        x = torch.randn(1, 2, 8, 8)
        with torch.no_grad():
            assert torch.equal(cw(x, 900), copy.deepcopy(unet)(x, 900))
        with pytest.raises(AttributeError, match="nowhere"):
            _ = cw.nowhere
        for name in ("clock", "enable", "schedule", "adaptor", "region", "stats", "unet"):  # they would have no effect
            with pytest.raises(AttributeError, match=r"what can be set is cw\.enabled"):
                setattr(cw, name, 3)
        cw.stem = replaced = copy.deepcopy(unet.stem)
        assert unet.stem is replaced
        assert "Tiny" in repr(cw)
        assert "every(2)" in repr(cw)
        assert cw.schedule.preview(4) == "F A F A"
    assert cw.stem is unet.stem


@pytest.mark.parametrize("replaced", [False, True])
def test_in_a_pipeline(replaced: bool) -> None:
    """The pipeline that holds the UNet is served, with or without `pipe.unet = cw`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        ).eval()
    pipe = DDPMPipeline(unet, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def run() -> Any:
        return pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=8, output_type="np").images

    plain = run()
    hand = Double(unet, "down_blocks.0.downsamplers.0", "up_blocks.0.upsamplers.0.conv", None, None)
    with clocked_by_hand(hand, lambda step: step % 2 == 1):
        expected = run()
    with ch.wrap(unet) as cw:
        if replaced:
            pipe.unet = cw
        assert (run() == expected).all()
        assert (run() == expected).all()
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (8, 8)
        pipe.unet = unet
    assert (run() == plain).all()
    assert (plain != expected).any()


# -- threads and tasks --------------------------------------------------------------------------------------------


def loop(unet: nn.Module, seed: int) -> Iterator[Tensor]:
    """Eight steps of a loop that differs by seed in its samples and length of step, not in its conditions."""
    x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
    for step in range(8):
        with torch.no_grad():
            x = x - 0.1 * unet(x, 900 - (90 + seed) * step)
        yield x


def test_threads_and_tasks_sample_as_if_alone() -> None:
    unet = Tiny()
    with ch.wrap(unet, clock=3) as cw:
        alone = []
        for seed in range(2):
            with cw.trajectory():
                alone.append(list(loop(unet, seed)))
        assert cw.stats.adaptor_passes == 10
        cw.stats.clear()
        meet, sampled = threading.Barrier(2), {}

        def work(seed: int) -> None:
            sampled[seed] = []
            with cw.trajectory():  # with the same conditions nothing else tells whose call it is
                for x in loop(unet, seed):
                    sampled[seed].append(x)
                    meet.wait(10)  # step by step, side by side

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(equal(sampled[seed], alone[seed]) for seed in range(2))
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (6, 10)
        cw.stats.clear()

        async def task(seed: int) -> list[Tensor]:
            outputs = []
            with cw.trajectory():
                for x in loop(unet, seed):
                    outputs.append(x)
                    await asyncio.sleep(0)
            return outputs

        async def both() -> list[list[Tensor]]:
            return await asyncio.gather(*map(task, range(2)))

        for outputs, expected in zip(asyncio.run(both()), alone, strict=True):
            assert equal(outputs, expected)
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (6, 10)


def test_a_unet_on_meta_runs_full() -> None:
    """Its time cannot be read there, and it has no autocast to ask for."""
    unet = Tiny().to("meta")
    with torch.no_grad(), ch.wrap(unet) as cw:
        for t in (3.0, 2.0):
            assert unet(torch.zeros(2, 2, 16, 16, device="meta"), torch.tensor(t, device="meta")).device.type == "meta"
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (2, 0)
