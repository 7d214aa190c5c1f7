"""Placeholders that pass themselves on: what of a skipped module's output comes into what an adaptor pass returns?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from clockwork_hooks._tree import map_leaves, tensors
from clockwork_hooks.graph.recorder import eager, written_by
from clockwork_hooks.graph.tracing import FIRST_ONLY, SHAPE_ONLY

__all__ = ["Taint", "Tainted"]


class Taint:
    """Follows the placeholders of one pass.

    Attributes:
        spread: has something of them come where nothing of them may be?
    """

    def __init__(self) -> None:
        self.spread = False

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Compiled code runs in eager within the block: it knows no such tensors."""
        eager.enter()
        try:
            yield
        finally:
            eager.leave()

    def on(self, placeholder: torch.Tensor) -> torch.Tensor:
        """The placeholder, as one that passes itself on."""
        return Tainted(placeholder, self)

    def reaches(self, values: Any) -> bool:
        """Is any of these values made of a placeholder, or has one come where none may be?"""
        return self.spread or any(isinstance(tensor, Tainted) for tensor in tensors(values))


class Tainted(torch.Tensor):
    """A placeholder, or what was made of one: operators that take it return such tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, plain: torch.Tensor, taint: Taint) -> Tainted:
        """Args: the tensor itself, and who follows it."""
        tainted: Tainted = torch.Tensor._make_subclass(cls, plain)
        tainted.plain, tainted.taint = plain, taint
        return tainted

    plain: torch.Tensor
    taint: Taint

    def data_ptr(self) -> int:
        """Kernels that torch does not see would read it, and pass nothing on."""
        raise RuntimeError("a kernel that torch does not see asks for the values of a skipped module's output")

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        """The same."""
        self.data_ptr()

    def untyped_storage(self) -> Any:
        """The same: what reads the memory itself passes nothing on."""
        self.data_ptr()

    def storage(self) -> Any:
        """The same."""
        self.data_ptr()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        own = [leaf for leaf in tensors((args, kwargs)) if isinstance(leaf, Tainted)]
        taint = own[0].taint
        out = func(*map_leaves(_plain, args), **map_leaves(_plain, kwargs))
        name = getattr(getattr(func, "_schema", None), "name", "")
        first = next(iter(tensors(args)), None)
        if name in SHAPE_ONLY or (name in FIRST_ONLY and not isinstance(first, Tainted)):
            return out
        real = [tensor for tensor in written_by(func, args, kwargs) if not isinstance(tensor, Tainted)]
        taint.spread |= bool(real) or _decides(func, out)
        before = {id(leaf.plain): leaf for leaf in own}  # operators may return what they were given

        def tainted(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return before[id(leaf)] if id(leaf) in before else Tainted(leaf, taint)

        return map_leaves(tainted, out)


def _plain(leaf: Any) -> Any:
    return leaf.plain if isinstance(leaf, Tainted) else leaf


def _decides(func: Any, out: Any) -> bool:
    """Could Python decide by what the operator returns: by a number, or by a shape that depends on values?"""
    tags = getattr(func, "tags", ())
    if torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags:
        return True
    return out is not None and not tensors(out)
