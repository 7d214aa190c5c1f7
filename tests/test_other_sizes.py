"""A call that differs from a recorded one in sizes alone is not recorded; its plan is taken over, and proved."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import clockwork_hooks as ch
from clockwork_hooks.engine import engine as engine_module
from clockwork_hooks.engine.derived import Recorded
from clockwork_hooks.engine.taint import Taint
from tests.small_unet import Tiny, reference
from tests.zoo import ZOO
from tests.zoo.proof import map_tensors

STEPS = (900.0, 700.0, 500.0, 300.0, 200.0, 100.0)
LARGE = 16  # a UNet of the hostile kind does something else above this size


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one whenever a call is recorded."""
    seen: list[Any] = []
    before = engine_module.Engine._learn

    def learn(self: Any, call: Any, trace: Any) -> Any:
        seen.append(call.key)
        return before(self, call, trace)

    monkeypatch.setattr(engine_module.Engine, "_learn", learn)
    return seen


def inputs(size: int, rows: int = 2) -> tuple[Tensor, Tensor]:
    """Sample and conditions."""
    generator = torch.Generator().manual_seed(size + rows)
    return torch.randn(rows, 2, size, size, generator=generator), torch.randn(rows, 3, generator=generator)


def sample(cw: Any, plain: nn.Module, size: int, rows: int = 2, mode: Any = torch.no_grad) -> tuple[int, int]:
    """One trajectory; each output is the plain UNet's, or its with the exit of the step before: (full, adaptor)."""
    x, c = inputs(size, rows)
    counts, exit_before = [], None
    with mode(), cw.trajectory(steps=len(STEPS)):
        for t in STEPS:
            before = cw.stats.adaptor_passes
            output = cw(x, t, c)
            whole, exit = reference(plain, x, t, c)
            skipped = cw.stats.adaptor_passes > before
            expected = reference(plain, x, t, c, exit=exit_before)[0] if skipped else whole
            exit_before = exit_before if skipped else exit
            assert torch.equal(output, expected)
            counts.append(skipped)
            x = x - 0.1 * whole[:, :2].detach()
    return len(counts) - sum(counts), sum(counts)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_other_sizes_are_not_recorded(mode: Any, recordings: list[Any]) -> None:
    """Batch and resolution change; each call serves as it would have been served after a recording of its own."""
    cw = ch.wrap(Tiny())
    for size, rows in ((8, 2), (16, 2), (8, 3), (12, 1)):
        assert sample(cw, Tiny(), size, rows, mode) == (3, 3)
    assert len(recordings) == 1
    assert set(cw.stats.reasons) <= {"first step", "scheduled"}


def test_their_macs_are_those_of_a_recording(recordings: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from the formula of the recorded call, and equal to what is counted of their own."""
    derived, recorded = ch.wrap(Tiny()), ch.wrap(Tiny())
    sizes = ((8, 2), (16, 2), (12, 5))
    for size, rows in sizes:
        sample(derived, Tiny(), size, rows)
    monkeypatch.setattr(Recorded, "of", lambda *_: None)
    for size, rows in sizes:
        sample(recorded, Tiny(), size, rows)
    assert len(recordings) == 1 + len(sizes)
    assert derived.stats.macs_run == recorded.stats.macs_run
    assert derived.stats.macs_plain == recorded.stats.macs_plain


# -- UNets that do something else at large sizes ---------------------------------------------------------------------


class Hostile(Tiny):
    """Above `LARGE`, `twist` makes something of what skipped modules return."""

    def __init__(self, twist: Callable[[Hostile, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.twist = twist

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        """As Tiny's."""
        time = torch.as_tensor(t).to(x.dtype).reshape(-1, 1).expand(len(x), 1) / 100
        h = self.stem(x) + self.emb(time).sin()[:, :, None, None]
        z = self.down(h)
        if c is not None:
            z = z + self.side(c)[:, :, None, None]
        z = self.body(self.act(z))
        low, z = z, self.up(z)
        if x.shape[-1] > LARGE:
            return self.twist(self, h, low, z)
        return self.head(torch.cat([h, z], 1))


def bypass(unet: Hostile, h: Tensor, low: Tensor, z: Tensor) -> Tensor:
    """A functional way round the exit."""
    return unet.head(torch.cat([h, z], 1)) + F.interpolate(low, scale_factor=2.0)[:, :2]


def written(unet: Hostile, h: Tensor, low: Tensor, z: Tensor) -> Tensor:
    """The same, by a write to what is kept outside."""
    h[:, :2] += F.interpolate(low, scale_factor=2.0)[:, :2]
    return unet.head(torch.cat([h, z], 1))


def decided(unet: Hostile, h: Tensor, low: Tensor, z: Tensor) -> Tensor:
    """The value decides, and nothing else of it is used."""
    return unet.head(torch.cat([h, z], 1)) * (1 if low.sum() == 0 else 2)


def shaped(unet: Hostile, h: Tensor, low: Tensor, z: Tensor) -> Tensor:
    """How many of the values are positive decides."""
    return unet.head(torch.cat([h, z], 1)) + len(low[low > 0])


def listed(unet: Hostile, h: Tensor, low: Tensor, z: Tensor) -> Tensor:
    """The values are read as Python numbers."""
    return unet.head(torch.cat([h, z], 1)) + low.flatten()[:1].detach().tolist()[0]


def numpy(unet: Hostile, h: Tensor, low: Tensor, z: Tensor) -> Tensor:
    """NumPy reads the memory."""
    return unet.head(torch.cat([h, z], 1)) + float(low.detach().numpy().mean())


def copied(unet: Hostile, h: Tensor, low: Tensor, z: Tensor) -> Tensor:
    """The values are copied to memory that is real."""
    own = torch.empty_like(low)
    own.copy_(low)
    return unet.head(torch.cat([h, z], 1)) + own.mean()


def pointer(unet: Hostile, h: Tensor, low: Tensor, z: Tensor) -> Tensor:
    """Code that torch does not see reads the memory."""
    import ctypes

    first = ctypes.c_float.from_address(low.data_ptr()).value
    return unet.head(torch.cat([h, z], 1)) + first


def more_calls(unet: Hostile, h: Tensor, low: Tensor, z: Tensor) -> Tensor:
    """A module is called once more."""
    return unet.head(torch.cat([h, unet.up(low) + z], 1))


def other_order(unet: Hostile, h: Tensor, low: Tensor, z: Tensor) -> Tensor:
    """Another module is called that was not before."""
    return unet.head(torch.cat([unet.stem(h[:, :2]), z], 1))


def storage(unet: Hostile, h: Tensor, low: Tensor, z: Tensor) -> Tensor:
    """The memory itself is read, past the tensor."""
    return unet.head(torch.cat([h, z], 1)) + low.untyped_storage()[3]


def left(unet: Hostile, h: Tensor, low: Tensor, z: Tensor) -> Tensor:
    """What a skipped module has left behind is read: an adaptor pass would read that of the step before."""
    return unet.head(torch.cat([h, z], 1)) + F.interpolate(unet.body.left, scale_factor=2.0)[:, :2]  # type: ignore[arg-type]


def leaving(unet: Hostile) -> Hostile:
    """The UNet, whose skipped module leaves its output behind."""
    before = unet.body.forward

    def forward(x: Tensor) -> Tensor:
        unet.body.left = output = before(x)
        return output

    unet.body.forward = forward  # type: ignore[method-assign]
    return unet


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_a_skipped_module_leaves_behind_is_seen(mode: Any, recordings: list[Any]) -> None:
    """Such sizes are recorded: the recording sees that the region has a second way out."""
    cw = ch.wrap(leaving(Hostile(left)))
    sample(cw, leaving(Hostile(left)), LARGE, mode=mode)
    sample(cw, leaving(Hostile(left)), 2 * LARGE, mode=mode)
    assert len(recordings) == 2


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")  # of those sizes some have no region
@pytest.mark.parametrize("twist", [bypass, written, copied, more_calls, other_order])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_stale_of_other_code_at_other_sizes(twist: Any, mode: Any, recordings: list[Any]) -> None:
    """Whatever a UNet does with skipped values at large sizes alone: it is seen, and those sizes are recorded."""
    cw = ch.wrap(Hostile(twist))
    assert sample(cw, Hostile(twist), LARGE, mode=mode) == (3, 3)
    sample(cw, Hostile(twist), 2 * LARGE, mode=mode)
    sample(cw, Hostile(twist), 2 * LARGE, mode=mode)
    assert len(recordings) >= 2
    assert sample(cw, Hostile(twist), LARGE)[1] == 3  # those are served as before


@pytest.mark.parametrize("twist", [decided, shaped, listed, numpy, pointer, storage])
def test_values_that_python_reads_are_seen(twist: Any, recordings: list[Any]) -> None:
    """No operator shows what Python makes of a number: the pass is run again in full, and these sizes are recorded."""
    cw, (x, c) = ch.wrap(Hostile(twist)), inputs(2 * LARGE)
    sample(cw, Hostile(twist), LARGE)
    with torch.no_grad(), cw.trajectory(steps=2):
        for t in STEPS[:2]:
            assert torch.equal(cw(x, t, c), Hostile(twist)(x, t, c))
        assert cw.stats.reasons["code outside the skipped modules uses what they compute"] == 1
        assert len(recordings) == 1
        cw(x, STEPS[2], c)
        assert len(recordings) == 2


@pytest.mark.parametrize("twist", [bypass, written])
def test_with_the_proof_off_it_is_seen_here(twist: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test before would notice: without the proof these outputs are others."""
    monkeypatch.setattr(Taint, "reaches", lambda self, values: False)
    monkeypatch.setattr(Taint, "on", lambda self, placeholder: placeholder)
    cw = ch.wrap(Hostile(twist))
    sample(cw, Hostile(twist), LARGE)
    with pytest.raises(AssertionError):
        sample(cw, Hostile(twist), 2 * LARGE)


def zeros_of_its_shape(unet: Hostile, h: Tensor, low: Tensor, z: Tensor) -> Tensor:
    """Only the shape of a skipped output matters: that is known."""
    return unet.head(torch.cat([h, z], 1)) + torch.ones_like(low).mean()


def exit_alone(unet: Hostile, h: Tensor, low: Tensor, z: Tensor) -> Tensor:
    """The exit is scaled: it is the only thing that leaves the region."""
    return unet.head(torch.cat([h, 2 * z], 1))


@pytest.mark.parametrize("twist", [zeros_of_its_shape, exit_alone])
def test_what_needs_no_value_is_no_doubt(twist: Any, recordings: list[Any]) -> None:
    """Large sizes are served by the plan of small ones where nothing but the exit is used."""
    cw = ch.wrap(Hostile(twist))
    for size in (LARGE, 2 * LARGE):
        assert sample(cw, Hostile(twist), size) == (3, 3)
    assert len(recordings) == 1


# -- what is recorded as before --------------------------------------------------------------------------------------


def test_another_dtype_or_argument_is_recorded(recordings: list[Any]) -> None:
    """Sizes alone may differ."""
    cw = ch.wrap(Tiny())
    x, c = inputs(8)
    with torch.no_grad():
        cw(x, 900.0, c)
        cw(x, 900.0)
        cw(x, torch.tensor(900.0), c)
        cw(x, torch.tensor([900.0]), c)
        assert len(recordings) == 4
        cw(x[:1], torch.tensor([900.0]), c[:1])
    assert len(recordings) == 4


class Residual(Tiny):
    """A tensor is added to the features, as a ControlNet's is."""

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        """As Tiny's."""
        time = torch.as_tensor(t).to(x.dtype).reshape(-1, 1).expand(len(x), 1) / 100
        h = self.stem(x) + self.emb(time).sin()[:, :, None, None]
        z = self.down(h) + more["residual"]
        return self.head(torch.cat([h, self.up(self.body(self.act(z)))], 1))


def test_arguments_that_tell_no_branch_are_recorded(recordings: list[Any]) -> None:
    """That one is only added was seen of operators, at those sizes."""
    cw = ch.wrap(Residual())
    with torch.no_grad():
        for k, size in enumerate((8, 16), 1):
            cw(inputs(size)[0], 900.0, residual=torch.randn(2, 16, size // 2, size // 2))
            assert len(recordings) == k


def test_an_error_of_the_unet_is_raised(recordings: list[Any]) -> None:
    """Sizes that the UNet cannot take; the ones after it are served."""
    cw = ch.wrap(Tiny())
    sample(cw, Tiny(), 8)
    with torch.no_grad(), pytest.raises(RuntimeError):
        cw(torch.randn(2, 3, 8, 8), 900.0, torch.randn(2, 3))
    with torch.no_grad(), pytest.raises(RuntimeError):
        cw(torch.randn(2, 2, 9, 9), 900.0, torch.randn(2, 3))
    assert sample(cw, Tiny(), 16) == (3, 3)
    cw.remove()
    assert not nn.modules.module._global_forward_hooks
    assert not getattr(nn.modules.module, "_global_forward_hooks_with_kwargs", {})


def test_modules_that_are_exchanged_are_recorded(recordings: list[Any]) -> None:
    """What was seen of the modules that are gone is no plan for others."""
    unet, plain = Tiny(), Tiny()
    cw = ch.wrap(unet)
    sample(cw, plain, 8)
    unet.body, plain.body = nn.Identity(), nn.Identity()
    unet.requires_grad_(False)
    sample(cw, plain, 16)
    assert len(recordings) >= 2


# -- the rest of the house -------------------------------------------------------------------------------------------


class Reads(nn.Module):
    """An adaptor that looks at everything it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def forward(self, entry: Tensor, exit_cached: Tensor, *, time: Tensor | None, text: Tensor | None) -> Tensor:
        """The exit as it is."""
        self.shapes.add(tuple(entry.shape))
        assert entry.shape[-1] == exit_cached.shape[-1]
        return exit_cached


@pytest.mark.parametrize("backend", [None, "eager"])
def test_an_adaptor_is_given_the_boundary(backend: str | None, recordings: list[Any]) -> None:
    """Of the sizes of the call."""
    adaptor = Reads()
    cw = ch.wrap(Tiny(), adaptor)
    if backend is not None:
        cw.compile(backend=backend)
    for size in (8, 16, 12):
        assert sample(cw, Tiny(), size) == (3, 3)
        assert sample(cw, Tiny(), size) == (3, 3)
    assert len(recordings) == 1
    assert {(2, 8, size, size) for size in (8, 16, 12)} <= adaptor.shapes


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")  # all calls are at one time
def test_many_sizes_are_let_go(recordings: list[Any]) -> None:
    """64 are kept, so memory stays what it is from then on; none of them is recorded again."""
    cw = ch.wrap(Tiny())
    with torch.no_grad():
        for rows in range(1, 101):
            cw(torch.zeros(rows, 2, 8, 8), 900.0, torch.zeros(rows, 3))
            cw(torch.zeros(1, 2, 8, 8), 900.0, torch.zeros(1, 3))

    def objects() -> int:
        with torch.no_grad():
            for rows in range(101, 181):
                cw(torch.zeros(rows, 2, 8, 8), 900.0, torch.zeros(rows, 3))
        gc.collect()
        return len(gc.get_objects())

    first = objects()
    assert objects() - first < 500
    assert len(recordings) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ZOO if name != "motion"])
def test_the_zoo_at_twice_the_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the rows, served by the plan of the first ones or recorded: one result, and one count."""
    case = ZOO[name]()
    rows = next(leaf for leaf in case.inputs()[0] if isinstance(leaf, Tensor)).shape[0]

    def twofold(one: Tensor) -> Tensor:
        return torch.cat([one, one]) if one.ndim and len(one) == rows else one

    def passes() -> Iterator[Any]:
        case = ZOO[name]()
        cw = ch.wrap(case.model)
        with torch.no_grad():
            for twice in (False, True):
                with cw.trajectory(steps=2):
                    for _ in range(2):
                        args, kwargs = case.inputs()
                        if twice:
                            args, kwargs = (map_tensors(twofold, value) for value in (args, kwargs))
                        torch.manual_seed(0)
                        yield cw(*args, **kwargs)
        yield cw.stats.macs_plain

    derived = list(passes())
    monkeypatch.setattr(Recorded, "of", lambda *_: None)
    *outputs, macs = list(passes())
    assert derived.pop() == macs
    torch.testing.assert_close(derived, outputs, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
def test_clock_1_patches_nothing(recordings: list[Any]) -> None:
    """What is never skipped is not touched, at other sizes either; its MACs are counted."""
    unet = Tiny()
    cw = ch.wrap(unet, clock=1)
    assert sample(cw, Tiny(), 8) == sample(cw, Tiny(), 16) == (6, 0)
    assert not any("forward" in vars(module) for module in unet.children())
    assert len(recordings) == 1
    assert cw.stats.macs_run > 4 * cw.stats.trajectories[0].macs_run
