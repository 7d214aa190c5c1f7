"""What an adaptor makes of times that the host knows: made once, outside of the pass, and the same bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import clockwork_hooks as ch
from clockwork_hooks.adaptors import calibrated
from clockwork_hooks.clock.times import Told, is_read_at_once
from clockwork_hooks.engine import engine
from tests.small_unet import Tiny
from tests.tape import FakeCuda
from tests.test_compile import AS_COMPILED, AS_IT_IS, cuda  # noqa: F401

TIMES = (900.0, 800.0, 650.0, 500.0, 350.0, 250.0, 100.0, 50.0)
STEPS = {2, 4, 5, 7}
KINDS = ("affine", "exit+entry", "exit+entry+before+trend", "low rank", "kernel")
WAYS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "compiled": {"backend": "eager"},
    "captured": AS_IT_IS,
    "captured as compiled": AS_COMPILED,
}


@torch.no_grad()
def sample(unet: nn.Module, form: str = "list", seed: int = 1) -> list[Tensor]:
    x, times, outputs = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(seed)), TIMES, []
    entries, one = torch.tensor(times), torch.tensor(times[0])
    for k, number in enumerate(times):
        time = {"list": entries[k], "number": number, "tensor": torch.tensor(number)}.get(form, one.fill_(number))
        e = unet(x, time)
        x = x - 0.1 * e
        outputs.append(e)
    return outputs


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture(scope="module")
def adaptors(unet: nn.Module) -> dict[str, Any]:
    def generate(seeds: list[int]) -> Tensor:
        return sample(unet, seed=seeds[0])[-1]

    options: dict[str, Any] = {"schedule": STEPS, "refit": False}
    return {kind: ch.calibrate(unet, generate, [[1], [2], [3]], kind=kind, **options) for kind in KINDS}


def run(unet: nn.Module, adaptor: Any, how: dict[str, Any] | None, form: str = "list") -> list[Tensor]:
    seen = []
    with ch.wrap(unet, adaptor) as cw:
        if how is not None:
            cw.compile(**how)
        for _ in range(3):
            with cw.trajectory():
                seen += sample(unet, form)
        assert cw.stats.adaptor_passes >= 3 * len(STEPS) - 2  # the first run has calls that are recorded
    return seen


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_by_times_on_the_device(
    kind: str,
    how: str,
    unet: nn.Module,
    adaptors: dict[str, Any],
    cuda: FakeCuda,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adaptor, made = adaptors[kind], list[Any]()
    weights = calibrated.CalibratedAdaptor._weights
    calibrated._KEPT.clear()
    with monkeypatch.context() as patched:
        patched.setattr(calibrated.CalibratedAdaptor, "_weights", lambda *a: made.append(0) or weights(*a))
        prepared = run(unet, adaptor, WAYS[how])
    # of the first run, whose first call is recorded, other passes may be full ones: a trend of other times
    assert len(STEPS) <= len(made) <= len(STEPS) + 2 * ("trend" in kind)
    monkeypatch.setattr(engine, "is_read_at_once", lambda time: False)
    torch.testing.assert_close(prepared, run(unet, adaptor, None), rtol=0, atol=0)


@pytest.mark.parametrize("form", ["list", "number", "tensor", "overwritten"])
def test_each_form_of_time(
    form: str, unet: nn.Module, adaptors: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is prepared for are the times that the adaptor would have been told."""
    adaptor, told = adaptors["exit+entry+before+trend"], list[Any]()

    class Told(nn.Module):
        needs = adaptor.needs

        def forward(self, entry: Tensor, exit_cached: Tensor, **more: Any) -> Tensor:
            if more["prepared"] is None:
                one, full = [more["position"], more["position_cached"]], more["trend_positions"]
                told.append(tuple(float(at) for at in (*one, *(one[1:] * 2 if full is None else full))))
            else:
                assert more["position"] is more["position_cached"] is more["trend_positions"] is None
            exit: Tensor = adaptor(entry, exit_cached, **more)
            return exit

        def prepare(self, times: tuple[float, ...], exit_cached: Tensor) -> Any:
            told.append(times)
            return adaptor.prepare(times, exit_cached)

    runs = []
    for ahead in (True, False):
        if not ahead:
            monkeypatch.setattr(engine, "is_read_at_once", lambda time: False)
        with ch.wrap(unet, Told(), schedule=STEPS) as cw:
            for _ in range(2):  # in the first run the first call is recorded
                told.clear()
                with cw.trajectory():
                    sample(unet, form)
            assert len(told) == cw.stats.trajectories[-1].adaptor_passes >= len(STEPS) - 1
        runs.append(list(told))
    assert runs[0] == runs[1]
    assert runs[0][0] == (800.0, 900.0, 900.0, 900.0)


def test_what_is_written_to_the_table_counts(unet: nn.Module, adaptors: dict[str, Any]) -> None:
    adaptor = adaptors["affine"]
    before = run(unet, adaptor, None)
    table = adaptor.table.detach().clone()
    with torch.no_grad():
        adaptor.table[:, 2 * adaptor.exit.channels + 1 :] *= 3.0
    changed = run(unet, adaptor, None)
    with torch.no_grad():
        adaptor.table.copy_(table)
    assert not torch.equal(before[1], changed[1])
    torch.testing.assert_close(before, run(unet, adaptor, None), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_dtype_has_its_own(dtype: torch.dtype, adaptors: dict[str, Any]) -> None:
    adaptor, cached = adaptors["affine"], torch.randn(1, adaptors["affine"].exit.channels, 4, 4, dtype=dtype)
    prepared = adaptor.prepare((800.0, 900.0), cached)
    assert prepared.rows.dtype == dtype
    now, before = torch.tensor(800.0), torch.tensor(900.0)
    expected = adaptor(None, cached, position=now, position_cached=before)
    assert torch.equal(adaptor(None, cached, prepared=prepared), expected)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("affine", ["addcmul", "clamp"]), ("exit+entry", ["add", "baddbmm_", "baddbmm_", "clamp"])],
)
def test_the_operators_of_a_prepared_pass(kind: str, expected: list[str], adaptors: dict[str, Any]) -> None:
    """Views but for: in float16, whose weights have to be cast somewhere."""
    adaptor, seen = adaptors[kind], list[str]()
    cached = torch.randn(1, adaptor.exit.channels, 4, 4, dtype=torch.float16)
    entry = torch.randn(1, adaptor.entry.channels, 4, 4, dtype=torch.float16) if adaptor.entry is not None else None
    prepared = adaptor.prepare((800.0, 900.0), cached)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not (func.is_view or func is torch.ops.aten._unsafe_view.default):
                seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Seen(), torch.no_grad():
        adaptor(entry, cached, prepared=prepared)
    assert seen == expected


def test_few_steps_are_kept(adaptors: dict[str, Any]) -> None:
    adaptor, cached = adaptors["affine"], torch.randn(1, adaptors["affine"].exit.channels, 4, 4)
    for step in range(200):
        adaptor.prepare((800.0 - step, 801.0 - step), cached)
    assert len(calibrated._KEPT[adaptor].prepared) <= calibrated._STEPS


def test_outside_of_the_calibrated_times_it_is_the_identity_and_says_so(adaptors: dict[str, Any]) -> None:
    adaptor = adaptors["affine"]
    adaptor._lookout.said = False
    cached = torch.randn(1, adaptor.exit.channels, 4, 4)
    with pytest.warns(ch.OtherStepsWarning, match="outside them it is the identity"):
        prepared = adaptor.prepare((5000.0, 5100.0), cached)
    assert torch.equal(adaptor(None, cached, prepared=prepared), cached)


def test_weights_of_which_nobody_counts_writes_are_not_kept(adaptors: dict[str, Any]) -> None:
    with torch.inference_mode():
        adaptor = calibrated.CalibratedAdaptor(**adaptors["affine"].arguments)
    assert adaptor.prepare((800.0, 900.0), torch.randn(1, adaptor.exit.channels, 4, 4)) is None


def test_who_needs_it_can_prepare() -> None:
    def adaptor(entry: Any, exit_cached: Tensor, **more: Any) -> Tensor:
        return exit_cached

    adaptor.needs = {"prepared"}  # type: ignore[attr-defined]
    with pytest.raises(ch.AdaptorError, match=r"(?s)has a method prepare.*prepare: None"):
        ch.wrap(Tiny(), adaptor)


def test_which_times_are_read_at_once() -> None:
    assert is_read_at_once(5)
    assert is_read_at_once(torch.tensor([900.0, 800.0])[1])
    assert not is_read_at_once(None)
    assert not is_read_at_once(torch.empty(2, device="meta")[1])


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("how", WAYS)
def test_no_tensor_is_made_of_a_known_time(
    how: str, unet: nn.Module, adaptors: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the time, and its float32, were two kernels a pass."""

    def refused(self: Told, device: torch.device) -> Tensor:
        raise AssertionError("a tensor")

    with monkeypatch.context() as patched:
        patched.setattr(Told, "tensor", refused)
        run(unet, adaptors["exit+entry+before+trend"], WAYS[how])
        patched.setattr(engine, "is_read_at_once", lambda time: False)
        with pytest.raises(AssertionError, match="a tensor"):
            run(unet, adaptors["affine"], WAYS[how])


def test_a_time_is_told_in_float32_and_made_once() -> None:
    cpu = torch.device("cpu")
    for time in (951, 951.0, torch.tensor(951), torch.tensor([951.0, 951.0], dtype=torch.float64)):
        told, default = Told(time), torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float64)
            made = told.tensor(cpu)
        finally:
            torch.set_default_dtype(default)
        assert made.dtype == torch.float32
        assert made.shape == ()
        assert made == 951.0
        assert told.tensor(cpu) is made


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (Told(3.0, 3.0), Told(torch.tensor(3), 3.0), True),
        (Told(3.0, 3.0), Told(4.0, 4.0), False),
        (Told(3.0, 3.0), Told(torch.tensor(3)), True),
        (Told(torch.tensor(3)), Told(4.0, 4.0), False),
        (Told(torch.tensor([3, 3])), Told(torch.tensor(3.0)), True),
        (Told(3), Told(4), False),
    ],
)
def test_two_times_are_the_same(one: Told, other: Told, same: bool) -> None:
    assert one.same(other) is other.same(one) is same
    assert one.same(one)
