"""The kernel for a calibrated adaptor's elements: on a stand-in for Triton here, on a GPU where there is one."""

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from clockwork_hooks import adaptors as package
from clockwork_hooks.adaptors import fused
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
