"""What an adaptor computes without this call's entry: in a captured pass it runs beside the UNet's first layers.

Where times are not known as numbers, a pass makes the weights of its step itself: they are small, but some twenty
kernels make them, one after the other. A CUDA graph keeps the order that the capture saw; on a stream that leaves it
where the pass begins, all that is done before the adaptor is called. An adaptor pass of SD v1.5 then takes 1.016 times
the identity's with `affine` and 1.022 times with `exit+entry`, on a single stream 1.025 and 1.035 times (H200, two runs
of benchmarks/gpu_latency.py on two machines, before weights were prepared).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_BESIDE: ContextVar[tuple[torch.cuda.Stream, list[object]] | None] = ContextVar("beside", default=None)


@contextlib.contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """While a pass is captured: what `ahead` runs in it waits for what was launched before this, and nothing else."""
    stream, results = torch.cuda.Stream(device), list[object]()
    stream.wait_stream(torch.cuda.current_stream(device))
    token = _BESIDE.set((stream, results))
    try:
        yield
    finally:
        _BESIDE.reset(token)
        torch.cuda.current_stream(device).wait_stream(stream)  # a capture ends on the stream that it began on


def ahead(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function of tensors that are there when the pass begins; in a capture, beside what runs until then."""
    if torch.compiler.is_compiling() or (branch := _BESIDE.get()) is None:
        return function(*args, **kwargs)
    stream, results = branch
    with torch.cuda.stream(stream):
        result = function(*args, **kwargs)
    torch.cuda.current_stream(stream.device).wait_stream(stream)
    results.append(result)  # its memory is that stream's: as long as the capture lasts, nothing else is put there
    return result
