"""All that a calibrated adaptor does to each element of the exit, as one kernel.

    clamp(bias + gain · cached + total + trend gain · trend, low, high)

torch runs a kernel for each operation, and one with values for each channel reads element by element. Triton, which
comes with torch's CUDA builds, reads and writes the exit once.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor

__all__ = ["finished", "serves"]

log = logging.getLogger("clockwork_hooks")
_BLOCK = 1024  # elements of a program: 16 bytes of float16 for each of 128 threads
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def serves(cached: Tensor, rows: Tensor, trend: Tensor | None) -> bool:
    """Can the kernel run? Not on a CPU, nor where somebody sees operators, differentiates them or compiles them."""
    if not cached.is_cuda or torch.compiler.is_compiling() or _kernel() is None:
        return False
    given = [cached, rows] if trend is None else [cached, rows, trend]
    return (
        all(type(one) is Tensor and one.dtype is cached.dtype for one in given)
        and cached.dtype in _FLOATS
        and rows.is_contiguous()
        and _dense(cached)
        and (trend is None or trend.stride() == cached.stride())
        and not (torch.is_grad_enabled() and any(one.requires_grad for one in given))
        and not torch._C._len_torch_dispatch_stack()
    )


def finished(
    cached: Tensor, rows: Tensor, total: Tensor | None, trend: Tensor | None, *, gain: bool, axis: int
) -> Tensor | None:
    """The exit; None where there is no compiler for the kernel.

    Args:
        cached: the cached exit.
        rows: low, high, bias, and then gain and the trend's gain, as far as there are such; (n, C, …).
        total: what else is added, of the cached exit's shape; of another layout, it is copied.
        trend: how the exit moved.
        gain: is there one? Else it is 1.
        axis: of the channels.
    """
    out = torch.empty_like(cached)
    if total is not None and total.stride() != cached.stride():
        total = out.copy_(total)
    channels = cached.shape[axis]
    apart = cached[0].numel() // channels if axis == 1 and cached.is_contiguous() else 1  # elements of a channel
    by_row = apart > 1 or channels == 1
    columns = apart if by_row else channels
    block = min(_BLOCK, max(16, 1 << (columns - 1).bit_length()))
    grid = (cached.numel() // columns, -(-columns // block))
    try:
        with torch.cuda.device_of(cached):
            _kernel()[grid](
                *(out, cached, cached if total is None else total, cached if trend is None else trend, rows),
                *(columns, channels),
                GAIN=3 if gain else 0,
                TREND=0 if trend is None else 3 + gain,
                TOTAL=total is not None,
                BY_ROW=by_row,
                BLOCK=block,
            )
    except Exception as error:
        log.info("Triton's kernel cannot run (%s): torch's are run, which take a little longer", error)
        _kernel.cache_clear()
        _MISSING.append(error)
        return None
    return out


_MISSING: list[Exception] = []


@functools.cache
def _kernel() -> Any:
    """The kernel; None where there is no Triton."""
    if _MISSING or importlib.util.find_spec("triton") is None:
        return None
    from clockwork_hooks.adaptors import _triton

    return _triton.kernel


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.ndim > 3 and x.movedim(1, -1).is_contiguous())
