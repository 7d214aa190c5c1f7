"""The inputs beside sample and time, remembered so that a later call can be told to have the same ones.

Where comparing is free they are compared by value: in main memory a copy is kept, so nothing that happens to the
original goes unnoticed. On a device comparing means waiting, so identity and the version counter come first.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from clockwork_hooks._tree import leaves, version
from clockwork_hooks.graph.arguments import is_number

__all__ = ["Conditions", "Seen"]

_LARGEST_COPY = 1 << 22  # elements
_LARGEST_READ = 1 << 16  # bytes
_DEEPEST = 4  # objects within objects
_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class Conditions:
    """What one call was conditioned on.

    Args:
        values: every input but the sample and the time, in order.
        depth: how many objects these are inside of.
    """

    __slots__ = ("_items", "nbytes")

    def __init__(self, values: Sequence[Any], depth: int = 0) -> None:
        self._items = tuple(_remember(value, depth) for value in values)
        self.nbytes: int = sum(kept.nbytes for kept, _ in self._items if isinstance(kept, (_Copy, _Parts)))

    def same(self, values: Sequence[Any]) -> bool:
        """Are these the same conditions? Never waits for a device: there, new objects are other conditions."""
        if len(values) != len(self._items):
            return False
        for item, value in zip(self._items, values, strict=True):
            if not (item[0].same(value) if type(item[0]) is _Copy else _same(item, value)):
                return False
        return True

    def equal(self, values: Sequence[Any]) -> bool:
        """Like `same`, but new objects on a device are compared by value, which waits for it."""
        if len(values) != len(self._items):
            return False
        differ = [pair for pair in zip(self._items, values, strict=True) if not _same(*pair)]
        return all(_comparable(*pair) for pair in differ) and all(
            torch.equal(_bits(was[0]), _bits(now)) for was, now in differ
        )


class Seen:
    """The very objects that a branch was called with. Where its first two steps shared them, new ones are a new run's.

    Their values would not tell: a prompt that is sampled twice has equal embeddings. Embeddings made anew in every step
    tell nothing, and neither do numbers and text.

    Attributes:
        steps: how many of the branch have begun.
    """

    __slots__ = ("_known", "steps")

    def __init__(self) -> None:
        self._known: list[list[weakref.ref[Any]] | None] = []
        self.steps = 0

    def renewed(self, values: Sequence[Any]) -> bool:
        """Is one of these a new object, in a place where there were none in the second step?"""
        if len(self._known) < len(values):
            self._known += [[] for _ in values[len(self._known) :]]
        found = False
        for k, (value, known) in enumerate(zip(values, self._known, strict=False)):
            if known is None or (known and known[-1]() is value) or any(one() is value for one in known):
                continue
            if self.steps == 2 or not _referable(value):
                self._known[k] = None
                continue
            found = found or self.steps > 2
            self._known[k] = [*(one for one in known if one() is not None), weakref.ref(value)]
        return found


def _referable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (not isinstance(value, _VALUES) and type(value).__weakrefoffset__ > 0)


class _Copy:
    """A private copy of a tensor in main memory, or of an array; equal bit for bit or not at all.

    The tensor that was copied is most often the one to compare, so a small one is read where it lies: what
    operators of torch need for that takes longer. It is alive then, and its memory is the one that was copied.
    """

    __slots__ = ("_address", "_kept", "_now", "_source", "bits", "dtype", "nbytes", "shape")

    def __init__(self, value: Any) -> None:
        self.shape, self.dtype = value.shape, value.dtype
        self.bits = _bits(value).clone() if isinstance(value, torch.Tensor) else value.tobytes()
        self.nbytes = self.bits.nbytes if isinstance(self.bits, torch.Tensor) else len(self.bits)
        self._source: Any = weakref.ref(value) if isinstance(value, torch.Tensor) else _none
        self._address = -1
        if isinstance(value, torch.Tensor) and value.is_contiguous() and 0 < self.nbytes <= _LARGEST_READ:
            memory, self._address = ctypes.c_char * self.nbytes, value.data_ptr()
            self._kept, self._now = memory.from_address(self.bits.data_ptr()), memory.from_address(self._address)

    def same(self, value: Any) -> bool:
        source = self._source()
        if source is not None and source is value and value.is_cpu and value.is_contiguous():
            if value.data_ptr() == self._address and value.nbytes == self.nbytes:
                return bool(self._now.raw == self._kept.raw)
            return torch.equal(self.bits, value.detach().view(-1).view(torch.uint8))  # few questions asked: it is fast
        tensor = isinstance(self.bits, torch.Tensor)
        if not _copied(value) or isinstance(value, torch.Tensor) != tensor:
            return False
        if self.shape != value.shape or self.dtype != value.dtype:
            return False
        return torch.equal(self.bits, _bits(value)) if tensor else bool(self.bits == value.tobytes())


class _Parts:
    """An object of a class that nobody knows: the same one, holding the same."""

    __slots__ = ("_held", "_paths", "_value", "nbytes")

    def __init__(self, value: Any, depth: int) -> None:
        parts = dict(leaves(vars(value)))
        self._value, self._paths, self._held = value, list(parts), Conditions(list(parts.values()), depth + 1)
        self.nbytes = self._held.nbytes

    def same(self, value: Any) -> bool:
        if value is not self._value:
            return False
        parts = dict(leaves(vars(value)))
        return list(parts) == self._paths and self._held.same(list(parts.values()))


def _none() -> None:
    return None


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _remember(value: Any, depth: int) -> tuple[Any, int]:
    """(what is kept of it, its version): -1 where nothing tells of writes."""
    if _copied(value):
        return _Copy(value), -1
    if depth < _DEEPEST and hasattr(value, "__dict__") and not callable(value) and not isinstance(value, torch.Tensor):
        return _Parts(value, depth), -1
    return value, version(value) if isinstance(value, torch.Tensor) else -1


def _copied(value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return hasattr(value, "tobytes") and getattr(getattr(value, "dtype", None), "hasobject", True) is False
    return _plain(value) and value.device.type == "cpu" and value.numel() <= _LARGEST_COPY


def _plain(value: Any) -> bool:
    """Is its memory all there is to it?"""
    ordinary = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
    return ordinary and not (value.is_quantized or value.is_conj() or value.is_neg())


def _same(item: tuple[Any, int], value: Any) -> bool:
    """Plain values may also be equal. What `==` means for other objects, nobody knows."""
    kept, written = item
    if isinstance(kept, (_Copy, _Parts)):
        return kept.same(value)
    if kept is value:
        return not isinstance(value, torch.Tensor) or version(value) == written
    return type(kept) is type(value) and (isinstance(kept, _VALUES) or is_number(kept)) and bool(kept == value)


def _comparable(item: tuple[Any, int], value: Any) -> bool:
    """Do both still have the values that the calls had?"""
    kept, written = item
    if not (_plain(kept) and _plain(value)) or kept is value or written < 0:
        return False
    alike = kept.shape == value.shape and kept.dtype == value.dtype and kept.device == value.device
    return alike and kept.device.type != "meta" and version(kept) == written
