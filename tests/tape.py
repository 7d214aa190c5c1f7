"""A CUDA graph's stand-in for the CPU: it replays the recorded operators at fixed addresses, and runs no Python.

What a capture must get right is the same: inputs are read from buffers, results land where they landed before.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Tape(TorchDispatchMode):
    """Records operators; `replay` runs them again on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What torch.compile has made runs in it, as in a capture; else it would run uncompiled."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tree_flatten(output)[0]))
        return output

    def replay(self) -> None:
        for func, args, kwargs, before in self.calls:
            for old, new in zip(before, tree_flatten(func(*args, **kwargs))[0], strict=True):
                if type(old) is torch.Tensor and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Stream:
    device = torch.device("cpu")

    def __init__(self, *_: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...


class FakeCuda:
    """What capture.py uses of `torch.cuda`."""

    CUDAGraph = Tape
    Stream = _Stream

    def __init__(self) -> None:
        self.captures = 0
        self._current = _Stream()

    def current_stream(self, device: Any = None) -> _Stream:
        return self._current

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, 1)

    @contextlib.contextmanager
    def graph(self, tape: Tape, **_: Any) -> Iterator[None]:
        with tape:
            yield
        self.captures += 1
