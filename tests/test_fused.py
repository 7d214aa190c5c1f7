"""Where a calibrated adaptor runs its kernel, and where torch's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import clockwork_hooks as ch
from clockwork_hooks import adaptors as package
from clockwork_hooks.adaptors import fused
from tests.test_fused_formula import kernel  # noqa: F401
from tests.test_prepared import KINDS, STEPS, adaptors, sample, unet  # noqa: F401
from tests.triton_stand_in import Kernel


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
    kernel: Kernel,  # noqa: F811
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
    kernel: Kernel,  # noqa: F811
) -> None:
    adaptor, cached, entry = adaptors["exit+entry"], torch.randn(2, 8, 8, 8), torch.randn(2, 8, 8, 8)
    prepared = adaptor.prepare((800.0, 900.0), cached)
    assert prepared is not None
    plain = adaptor(entry, cached, prepared=prepared)
    assert len(kernel.launches) == 1
    with Seeing() as seeing:
        counted = adaptor(entry, cached, prepared=prepared)
    assert seeing.names.count("aten::baddbmm_") == 2
    for name in ("entry", "cached"):
        given = {"entry": entry.clone(), "cached": cached.clone()}
        given[name].requires_grad_()
        adaptor(given["entry"], given["cached"], prepared=prepared).sum().backward()
        assert given[name].grad is not None
    assert len(kernel.launches) == 1
    torch.testing.assert_close(counted, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["exit+entry", "exit+entry+before+trend", "kernel"])
def test_products_of_autocast_are_added_up_as_the_exit_is(
    kind: str,
    unet: Any,  # noqa: F811
    adaptors: dict[str, Any],  # noqa: F811
    kernel: Kernel,  # noqa: F811
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        adaptor, given = adaptors[kind], {"entry_cached": torch.randn(2, 8, 8, 8), "trend": torch.randn(2, 8, 8, 8)}
        cached, entry = torch.randn(2, 8, 8, 8), torch.randn(2, 8, 8, 8)
        needed = {name: given[name] for name in given if name in adaptor.needs}
        times = (800.0, 900.0, 900.0, 950.0) if "trend" in kind else (800.0, 900.0)
        prepared = adaptor.prepare(times, cached)
        fast = adaptor(entry, cached, prepared=prepared, **needed)
        assert len(kernel.launches) == 1
        with Seeing():
            torch.testing.assert_close(fast, adaptor(entry, cached, prepared=prepared, **needed), rtol=0.05, atol=0.05)


def test_channels_that_come_last_and_lie_first_are_torchs(kernel: Kernel) -> None:  # noqa: F811
    """The kernel goes by memory: a row of it is a channel's, or a position's."""
    cached, rows = torch.randn(2, 8, 4, 4), torch.randn(4, 8, 1, 1)
    assert fused.serves(cached, rows, None, (), 1)
    assert fused.serves(cached.contiguous(memory_format=torch.channels_last), rows, None, (), 1)
    assert fused.serves(torch.randn(2, 4, 4, 8), rows.view(4, 8), None, (), -1)
    assert not fused.serves(torch.randn(2, 4, 8, 4).movedim(-1, 1), rows.view(4, 8), None, (), -1)


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
