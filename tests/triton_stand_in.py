"""A stand-in for Triton on the CPU: a kernel's Python runs for one program after the other, on tensors as memory."""

import itertools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

LANGUAGE = ModuleType("triton.language")
TRITON = ModuleType("triton")


class Pointer:
    """Where some elements of a tensor's memory lie, of which autograd knows nothing."""

    def __init__(self, tensor: Tensor, at: Any = 0) -> None:
        tensor = tensor.detach()
        self.tensor, self.at = tensor, at
        self.memory = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
        self.dtype = type("dtype", (), {"element_ty": tensor.dtype})

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.tensor, self.at + other)

    def places(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Indices, and which of them are meant: only those need to be within the memory."""
        at = torch.as_tensor(self.at) + self.tensor.storage_offset()
        inside = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.expand_as(at)
        assert not at[inside].numel() or 0 <= int(at[inside].min()) <= int(at[inside].max()) < len(self.memory)
        return at, inside


def load(pointer: Pointer, mask: Tensor | None = None) -> Tensor:
    at, inside = pointer.places(mask)
    return torch.where(inside, pointer.memory[at.where(inside, 0)], torch.tensor(1e9).to(pointer.memory.dtype))


def store(pointer: Pointer, value: Tensor, mask: Tensor | None = None) -> None:
    at, inside = pointer.places(mask)
    pointer.memory[at[inside]] = value[inside]


class Kernel:
    """What `triton.jit` makes of a function.

    Attributes:
        launches: programs of each launch.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function, self.launches = function, list[Sequence[int]]()

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            self.launches.append(grid)
            given = [Pointer(arg) if isinstance(arg, Tensor) else arg for arg in args]
            for program in itertools.product(*map(range, grid)):
                LANGUAGE.program_id = lambda axis, program=program: torch.tensor(program[axis])
                self.function(*given, **constants)

        return launch


for name in ("int64", "float32", "where", "arange"):
    setattr(LANGUAGE, name, getattr(torch, name))
for function in (load, store):
    setattr(LANGUAGE, function.__name__, function)
LANGUAGE.constexpr = object
TRITON.jit, TRITON.language = Kernel, LANGUAGE
