"""The kernel for a calibrated adaptor's elements: on a stand-in for Triton here, on a GPU where there is one."""

import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import clockwork_hooks as ch
from clockwork_hooks import adaptors as package
from clockwork_hooks.adaptors import fused
from tests.test_prepared import KINDS, STEPS, adaptors, sample, unet  # noqa: F401
from tests.triton_stand_in import LANGUAGE, TRITON, Kernel

LAYOUTS = {  # shape of an exit, and the axis of its channels
    "image": ((2, 5, 7, 9), 1),
    "channels last": ((2, 40, 4, 4), 1),
    "sequence": ((2, 17, 33), 1),
    "tokens": ((2, 33, 17), -1),
    "volume": ((1, 3, 2, 5, 6), 1),
    "video, channels last": ((2, 6, 2, 3, 4), 1),
    "one channel": ((2, 1, 4, 4), 1),
    "one position": ((2, 33, 1, 1), 1),
    "large": ((1, 2, 33, 40), 1),
}


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    monkeypatch.setitem(sys.modules, "triton", TRITON)
    monkeypatch.setitem(sys.modules, "triton.language", LANGUAGE)
    monkeypatch.delitem(sys.modules, "clockwork_hooks.adaptors._triton", raising=False)
    made = importlib.import_module("clockwork_hooks.adaptors._triton").kernel
    monkeypatch.setattr(fused, "_kernel", lambda: made)
    monkeypatch.setattr(fused, "DEVICES", ("cpu",))
    monkeypatch.setattr(fused, "LEAST", 0)
    yield made
    del sys.modules["clockwork_hooks.adaptors._triton"], package._triton  # type: ignore[attr-defined]


def check(layout: str, parts: str, dtype: torch.dtype, device: str) -> None:
    """The kernel against the formula in float32."""
    shape, axis = LAYOUTS[layout]
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    generator = torch.Generator(device).manual_seed(len(layout))
    sizes = (-1, *(1,) * (len(shape) - 2)) if axis == 1 else (-1,)

    def drawn() -> Tensor:
        x = torch.randn(shape, generator=generator, **like)
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if "channels last" in layout else x

    cached, total, trend = drawn(), drawn() if "total" in parts else None, drawn() if "trend" in parts else None
    cached[(0,) * cached.ndim] = torch.nan
    gain, count = "gain" in parts, 3 + ("gain" in parts) + ("trend" in parts)
    rows = torch.randn(count, shape[axis], generator=generator, **like)
    rows[0], rows[1] = -1.5, 1.5
    low, high, bias, *gains = (row.reshape(sizes).float() for row in rows)
    wanted = bias + cached.float() * (gains[0] if gain else 1)
    wanted = wanted if total is None else wanted + total.float()
    wanted = wanted if trend is None else wanted + gains[-1] * trend.float()
    rows = rows.reshape(count, *torch.empty(shape[axis]).reshape(sizes).shape)
    out = fused.finished(cached, rows, total, trend, gain=gain, axis=axis)
    assert out is not None
    assert out.stride() == cached.stride()
    torch.testing.assert_close(out, wanted.clamp(low, high).to(dtype), equal_nan=True)


PARTS = ["", "gain", "total", "gain, trend", "total, trend", "gain, total, trend"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_formula(layout: str, parts: str, dtype: torch.dtype, kernel: Kernel) -> None:
    check(layout, parts, dtype, "cpu")
    assert len(kernel.launches) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_formula_on_a_gpu(layout: str, dtype: torch.dtype) -> None:
    for parts in PARTS:
        check(layout, parts, dtype, "cuda")


@torch.no_grad()
def rollout(unet: Any, adaptor: Any) -> list[Tensor]:  # noqa: F811
    seen = []
    with ch.wrap(unet, adaptor) as cw:
        for _ in range(3):
            with cw.trajectory():
                seen += sample(unet)
    return seen


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", KINDS)
def test_adaptor_passes_launch_it(
    kind: str,
    memory: torch.memory_format,
    unet: Any,  # noqa: F811
    adaptors: dict[str, Any],  # noqa: F811
    kernel: Kernel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unet = unet.to(memory_format=memory)
    got = rollout(unet, adaptors[kind])
    assert len(kernel.launches) >= 2 * len(STEPS)
    monkeypatch.setattr(fused, "DEVICES", ())
    torch.testing.assert_close(got, rollout(unet, adaptors[kind]), rtol=1e-4, atol=1e-5)


class Seeing(TorchDispatchMode):
    """Sees operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names = list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_who_counts_or_differentiates_gets_torchs_operators(
    unet: Any,  # noqa: F811
    adaptors: dict[str, Any],  # noqa: F811
    kernel: Kernel,
) -> None:
    adaptor, cached, entry = adaptors["exit+entry"], torch.randn(2, 8, 8, 8), torch.randn(2, 8, 8, 8)
    prepared = adaptor.prepare((800.0, 900.0), cached)
    assert prepared is not None
    plain = adaptor(entry, cached, prepared=prepared)
    assert len(kernel.launches) == 1
    with Seeing() as seeing:
        counted = adaptor(entry, cached, prepared=prepared)
    assert seeing.names.count("aten::baddbmm_") == 2
    given = cached.clone().requires_grad_()
    adaptor(entry, given, prepared=prepared).sum().backward()
    assert given.grad is not None
    assert len(kernel.launches) == 1
    torch.testing.assert_close(counted, plain, rtol=1e-4, atol=1e-5)


def test_without_a_compiler_torchs_operators_run(
    adaptors: dict[str, Any],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Fails:
        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    cached = torch.randn(2, 8, 8, 8)
    expected = adaptors["affine"](None, cached, prepared=adaptors["affine"].prepare((800.0, 900.0), cached))
    monkeypatch.setattr(fused, "DEVICES", ("cpu",))
    monkeypatch.setattr(fused, "LEAST", 0)
    monkeypatch.setattr(fused, "_FAILED", [])
    monkeypatch.setattr(package, "_triton", SimpleNamespace(kernel=Fails()), raising=False)
    fused._kernel.cache_clear()
    try:
        for _ in range(2):
            got = adaptors["affine"](None, cached, prepared=adaptors["affine"].prepare((800.0, 900.0), cached))
            torch.testing.assert_close(got, expected)
        assert len(fused._FAILED) == 1
    finally:
        fused._kernel.cache_clear()
