"""Memory that an adaptor pass makes between modules: real, until a placeholder is written to it.

Some UNets put tensors together piece by piece: `y = x.new_zeros(...)`, `y[:, :8] = skipped`. A placeholder in real
memory would be lost from sight, so such a write is refused (taint.py). But what a pass has made itself nobody else
knows. In passes that follow it, operators that make memory return a tensor without any: it holds the real one, and
gives operators that. Once a placeholder is written to it, it is a placeholder, and so are all views of that memory.

Every operator of such a pass is looked at, which takes 7 µs each on a CPU: an adaptor pass of a small SD-1.5-like UNet
(564 operators) took 18 ms in the place of 14, a full one 30 (`python -m benchmarks.followed`). So it is done where a
pass has failed for such a write, and where the full pass in its place (`Watching`) has shown that nobody keeps what it
makes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator
from typing import Any

import torch

from clockwork_hooks._tree import address, map_leaves, tensors
from clockwork_hooks.engine.taint import Taint, Tainted, here, is_dense, refuse
from clockwork_hooks.graph.recorder import OperatorMode
from clockwork_hooks.graph.tracing import SHAPE_ONLY

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_MAKES = SHAPE_ONLY | {
    f"aten::{name}"
    for name in (
        *("zeros", "ones", "empty", "full", "empty_strided", "empty_permuted"),
        *("clone", "repeat", "pad", "constant_pad_nd"),
    )
}


class _Looking(Taint):
    """Sees the operators of one pass, and the memory that they make.

    Args:
        scratch: storages that may be written to, as each call overwrites them before it reads them.
    """

    def __init__(self, scratch: Collection[int] = ()) -> None:
        super().__init__(scratch)
        self._mode = _Mode(self)

    def __enter__(self) -> Taint:
        super().__enter__()
        self._mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(*error)
        super().__exit__(*error)

    def made(self, out: torch.Tensor) -> torch.Tensor:
        """An operator has made new memory: what it returns in the place of this tensor."""
        raise NotImplementedError


class Watching(_Looking):
    """Sees which memory a pass makes, and changes nothing: of a full pass, before others are followed."""

    def made(self, out: torch.Tensor) -> torch.Tensor:
        """This is it."""
        self.add(out)
        return out


class Following(_Looking):
    """Follows the placeholders of one pass, also into memory that was made in it."""

    follows = True

    def made(self, out: torch.Tensor) -> torch.Tensor:
        """A tensor that is real until a placeholder is written to it."""
        fresh = Fresh(out, _Memory(out))
        self.add(fresh)
        return fresh

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What runs within makes memory of its own, and keeps it as it likes."""
        self._mode.on = False
        try:
            yield
        finally:
            self._mode.on = True

    def real(self, values: Any) -> Any:
        """With real memory in the place of what is followed, as far as that holds no placeholder."""
        fresh = [one for one in tensors(values) if isinstance(one, Fresh)]
        if any(one.exchanged for one in fresh):
            self.used = True
            refuse()
        return map_leaves(_out, values) if fresh else values


class _Mode(OperatorMode):
    """Sees every operator."""

    def __init__(self, looking: _Looking) -> None:
        super().__init__()
        self._looking, self.on = looking, True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.on:
            return func(*args, **kwargs)
        for arg in (*args, *kwargs.values()):
            self._look(arg)
        out = func(*args, **kwargs)
        if _makes(func) and type(out) is torch.Tensor and is_dense(out):
            return self._looking.made(out)
        return out

    def _look(self, arg: Any) -> None:
        """A tensor whose `.data` was exchanged for one without memory crashes the process where it is read."""
        if type(arg) in _PLAIN:
            try:
                arg.data_ptr()
            except RuntimeError:  # of these, or of another kind that has no such memory
                if self._looking.is_one(arg):
                    refuse()
        elif type(arg) in (list, tuple):
            for one in arg:
                self._look(one)


class _Memory:
    """What all views of one piece of memory know of it.

    Attributes:
        whole: the tensor that it was made as.
        taints: was a placeholder written to it?
        elsewhere: may anybody know of it who is no operator?
    """

    __slots__ = ("elsewhere", "taints", "whole")

    def __init__(self, whole: torch.Tensor) -> None:
        self.whole, self.taints, self.elsewhere = whole, False, False


class Fresh(Tainted):
    """A tensor over memory that a pass has made."""

    memory: _Memory

    @staticmethod
    def __new__(cls, plain: torch.Tensor, memory: _Memory) -> Fresh:
        """Args: the real tensor, and what is known of its memory."""
        fresh: Fresh = Tainted.__new__(cls, plain)  # type: ignore[assignment]
        fresh.memory = memory
        return fresh

    @property
    def taints(self) -> bool:  # type: ignore[override]
        """Was a placeholder written to this memory?"""
        return self.memory.taints

    def takes_placeholder(self) -> bool:
        """Not memory that others know: they would read it as if it were real."""
        if not (self.memory.taints or self.memory.elsewhere):
            self.memory.taints = True
            self.memory.whole.zero_()  # what was never written to might be used as an index
        return self.memory.taints

    def lies_under(self, out: torch.Tensor) -> bool:
        """Is its memory real, and what an operator has returned a view of that?"""
        if self.memory.taints:
            return False
        if not is_dense(out):  # it may hold some of it
            self.is_known_elsewhere()
            return False
        return address(out.untyped_storage()) == address(self.plain.untyped_storage())

    def over(self, out: torch.Tensor) -> Fresh:
        """Such a view, followed as this one is."""
        fresh, taint = Fresh(out, self.memory), here()
        if taint is not None:
            taint.add(fresh)
        return fresh

    def is_known_elsewhere(self) -> None:
        """No placeholder may be written to it from now on."""
        self.memory.elsewhere = True


def _of_the_plain(name: str) -> Any:
    """A method that is no operator, of the real tensor; a placeholder refuses."""

    def method(self: Fresh, *args: Any, **kwargs: Any) -> Any:
        if self.taints:
            refuse()
        self.is_known_elsewhere()
        return getattr(self.plain, name)(*args, **kwargs)

    return method


for _name in (
    *("data_ptr", "untyped_storage", "storage", "share_memory_", "numpy", "tolist"),
    *("__array__", "__dlpack__", "__deepcopy__", "__reduce_ex__", "__repr__", "__format__"),
):
    setattr(Fresh, _name, _of_the_plain(_name))


@functools.cache
def _makes(func: Any) -> bool:
    return getattr(getattr(func, "_schema", None), "name", "") in _MAKES


def _out(leaf: Any) -> Any:
    """A leaf that leaves the pass."""
    if not isinstance(leaf, Fresh) or leaf.taints:
        return leaf
    leaf.is_known_elsewhere()
    return leaf.clone() if leaf.requires_grad else leaf.plain  # a copy takes the gradient's way with it
