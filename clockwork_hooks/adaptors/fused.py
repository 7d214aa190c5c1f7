"""All that a calibrated adaptor does to each element of the exit, as one kernel.

    clamp(bias + gain · cached + total + trend gain · trend, low, high)

torch runs a kernel for each operation, and one with values for each channel reads element by element. Triton, which
comes with torch's CUDA builds, reads and writes the exit once. On SDXL's exit of 2×640×128×128, in float16, an H200
takes 23 µs in the place of 128 for `affine`, and 79 in the place of 180 for `exit` (`python -m benchmarks.adaptor_cost
--out DIR`; docs/performance_tables.md has all of its rows).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["finished", "serves"]

log = logging.getLogger("clockwork_hooks")
DEVICES = ("cuda",)
LEAST = 2**20  # elements: of fewer, the device is faster than the host launches it, which torch's own kernels do sooner
_BLOCK = 1024  # elements of a program: 16 bytes of float16 for each of 128 threads
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def serves(cached: Tensor, rows: Tensor, trend: Tensor | None, read: Sequence[Tensor | None], axis: int) -> bool:
    """Is the kernel worth running, and can it? Not where somebody sees operators, differentiates or compiles them.

    Args:
        cached, rows, trend, axis: as in `finished`.
        read: what products are made of.
    """
    if cached.numel() < LEAST or cached.device.type not in DEVICES or torch.compiler.is_compiling():
        return False
    given = [cached, rows] if trend is None else [cached, rows, trend]
    reached = [*given, *(one for one in read if one is not None)]
    return (
        all(type(one) is Tensor and one.dtype is cached.dtype for one in given)
        and cached.dtype in _FLOATS
        and rows.is_contiguous()
        and (cached.is_contiguous() or (axis == 1 and cached.ndim > 3 and cached.movedim(1, -1).is_contiguous()))
        and (trend is None or trend.stride() == cached.stride())
        and not (torch.is_grad_enabled() and any(one.requires_grad for one in reached))
        and not getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)()
        and _kernel() is not None
    )


def finished(
    cached: Tensor, rows: Tensor, total: Tensor | None, trend: Tensor | None, *, gain: bool, axis: int
) -> Tensor | None:
    """The exit; None where the kernel cannot be compiled.

    Args:
        cached: the cached exit.
        rows: low, high, bias, and then gain and the trend's gain, as far as there are such; (n, C, …).
        total: what else is added, of the cached exit's shape.
        trend: how the exit moved.
        gain: is there one? Else it is 1.
        axis: of the channels.
    """
    kernel, out, channels = _kernel(), torch.empty_like(cached), cached.shape[axis]
    if total is not None and total.stride() != cached.stride():
        total = out.copy_(total)
    apart = cached[0].numel() // channels if axis == 1 and cached.is_contiguous() else 1  # elements of a channel
    columns = channels if apart == 1 else apart
    block = min(_BLOCK, max(16, 1 << (columns - 1).bit_length()))
    tensors = (out, cached, cached if total is None else total, cached if trend is None else trend, rows)
    try:
        with torch.cuda.device_of(cached):
            kernel[cached.numel() // columns, -(-columns // block)](
                *tensors,
                columns,
                channels,
                GAIN=3 if gain else 0,
                TREND=0 if trend is None else 3 + gain,
                TOTAL=total is not None,
                BY_ROW=apart > 1,
                BLOCK=block,
            )
    except Exception as error:  # no C compiler, most likely
        log.info("Triton's kernel cannot run, so torch's do, which take longer: %s", error)
        _FAILED.append(error)
        _kernel.cache_clear()
        return None
    return out


_FAILED: list[Exception] = []


@functools.cache
def _kernel() -> Any:
    """The kernel; None where there is no Triton, or it has failed."""
    from clockwork_hooks.adaptors import _triton

    return None if _FAILED else _triton.kernel
