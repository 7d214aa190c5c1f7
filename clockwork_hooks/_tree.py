"""Walk and rebuild the nested arguments and outputs of a model: tuples, lists, mappings, dataclasses, plain objects.

`torch.utils._pytree` is close, but an object of a class that nobody registered is one leaf to it, and UNets return
dataclasses and objects of classes of their own.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.multiprocessing import reductions


class Leaf:
    """Base of dataclasses that stand for a tensor: a leaf, not a container."""

    __slots__ = ()


def leaves(value: Any, path: str = "", whole: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Any]]:
    """(dotted path, leaf) in a fixed order; everything that is no container is a leaf, None too.

    Args:
        value: to walk.
        path: of the value itself.
        whole: says of a path that what is there is one leaf, whatever it holds.

    Example:
        >>> list(leaves({"a": (1, None), "b": "x"}))
        [('a.0', 1), ('a.1', None), ('b', 'x')]
    """
    pairs: list[tuple[str, Any]] = []
    _collect(value, path, pairs, whole)
    return iter(pairs)


def _collect(value: Any, path: str, pairs: list[tuple[str, Any]], whole: Callable[[str], bool] | None) -> None:
    if isinstance(value, torch.Tensor) or not _is_container(value) or (whole is not None and whole(path)):
        pairs.append((path, value))
        return
    for key, item in _items(value):
        _collect(item, f"{path}.{key}" if path else str(key), pairs, whole)


def flat(value: Any) -> list[Any]:
    """The leaves in order, without their paths, which take longer to write than to find."""
    parts: list[Any] = []
    _add_leaves(value, parts)
    return parts


def leaf_at(value: Any, index: int) -> Any:
    """The leaf of that index; None where there are fewer."""
    parts = flat(value)
    return parts[index] if index < len(parts) else None


def _add_leaves(value: Any, parts: list[Any]) -> None:
    if isinstance(value, torch.Tensor) or not _is_container(value):
        parts.append(value)
    else:
        for _, item in _items(value):
            _add_leaves(item, parts)


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors among the leaves, in order."""
    return [leaf for leaf in flat(value) if isinstance(leaf, torch.Tensor)]


def map_leaves(fn: Callable[[Any], Any], value: Any) -> Any:
    """A copy of `value` with `fn` applied to every leaf; containers keep their types, read-only mappings become dicts.

    Example:
        >>> map_leaves(lambda leaf: leaf * 2, [1, (2, {"a": 3})])
        [2, (4, {'a': 6})]
    """
    if not _is_container(value):
        return fn(value)
    if isinstance(value, tuple) and hasattr(type(value), "_fields"):
        return type(value)(*(map_leaves(fn, item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_leaves(fn, item) for item in value)
    mapped = {key: map_leaves(fn, item) for key, item in _items(value)}
    if type(value) is dict or (isinstance(value, Mapping) and not isinstance(value, MutableMapping)):
        return mapped
    copied = copy.copy(value)
    for key, item in mapped.items():
        if isinstance(value, Mapping):
            copied[key] = item
        else:
            object.__setattr__(copied, key, item)
    return copied


def is_changeable(value: Any) -> bool:
    """Is it a container whose contents can be others? A tuple's, and a read-only mapping's, cannot."""
    closed = isinstance(value, tuple) or (isinstance(value, Mapping) and not isinstance(value, MutableMapping))
    return _is_container(value) and not closed


def refill(value: Any, contents: Any) -> None:
    """Give a changeable container, or a set, the contents of another one of its kind."""
    if isinstance(value, (list, deque)):
        value.clear()
        value.extend(contents)
    elif isinstance(value, (MutableMapping, set)):
        value.clear()
        value.update(contents)
    else:
        for name, item in _items(contents):
            object.__setattr__(value, name, item)


def _is_container(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return True
    if isinstance(value, (torch.Tensor, str, bytes, int, float, type(None), type, Leaf)):
        return False
    return isinstance(value, Mapping) or dataclasses.is_dataclass(value) or _is_record(value)


def _is_record(value: Any) -> bool:
    """Is it an object of some class that holds tensors as attributes, and is neither a module nor a function?"""
    if isinstance(value, nn.Module) or callable(value):
        return False
    return any(isinstance(item, (torch.Tensor, Leaf)) for _, item in _attributes(value))


EMPTY = object()  # is in a slot that nothing was put into


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """Name and value of what the object holds itself, its slots among them."""
    held = list(attribute(value, "__dict__", {}).items())
    for kind in type(value).__mro__[:-1]:
        slots = vars(kind).get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else slots
        slotted = ((name, attribute(value, name, EMPTY)) for name in names if name[:2] != "__")
        held += [(name, item) for name, item in slotted if item is not EMPTY]
    return held


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, (list, tuple)):
        return enumerate(value)
    if isinstance(value, (dict, Mapping)):
        return list(value.items())
    if not dataclasses.is_dataclass(value):
        return _attributes(value)
    items = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    items |= attribute(value, "__dict__", {})  # an attribute may be no field
    return items.items()


def attribute(value: Any, name: str, default: Any = None) -> Any:
    """What an object or its class has under this name, or the default.

    A `__getattr__` of its own is not asked: it raises what it likes, or has an answer to every name.

    Example:
        >>> class Options(dict):
        ...     __getattr__ = dict.__getitem__
        >>> attribute(Options(dtype="no dtype"), "dtype") is None
        True
    """
    if type(value) is types.MethodType:  # has what its function has
        return getattr(value, name, default)
    try:
        return object.__getattribute__(value, name)
    except AttributeError:
        return default


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy without the graph that it comes from; most have none, and `detach` takes 8 µs where caches are cold."""
    return (tensor.detach() if tensor.requires_grad else tensor).clone()


def version(tensor: torch.Tensor) -> int:
    """A counter of in-place writes to the tensor and its views; -1 for inference tensors, which keep none."""
    return -1 if tensor.is_inference() else tensor._version


def address(storage: torch.UntypedStorage) -> int:
    """A number that names the storage among those that live, or are held by `held`."""
    return getattr(storage, "_cdata", id(storage))


def is_sole(tensor: torch.Tensor) -> bool:
    """Is its memory torch's, and known to nobody else? Else others may write to it, which need not leave a mark.

    A module that writes all its outputs to one place, as a CUDA graph does, holds that place, as a tensor or as a
    storage; or it is memory that torch has not allocated, whose storage cannot be resized, or of several processes.
    """
    counted = type(tensor) is torch.Tensor and hasattr(torch._C, "_storage_Use_Count")
    if not counted or _holders(tensor) != _own_holders():
        return False
    storage = tensor.untyped_storage()
    return storage.resizable() and not (storage.device.type == "cpu" and storage.is_shared())


def _holders(tensor: torch.Tensor) -> tuple[int, int]:
    """How many hold its storage, and how many of them in Python hold the one object that stands for it there."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)


@functools.cache
def _own_holders() -> tuple[int, int]:
    """The same of a tensor that nobody else holds."""
    return _holders(torch.empty(1))


def held(storage: torch.UntypedStorage) -> Any:
    """A weak reference that keeps the storage's address from being used for another one; equal for equal storages.

    Where torch has none, the storage itself: its memory is then kept as long as the reference.
    """
    make = getattr(reductions, "StorageWeakRef", None)
    return storage if make is None else make(storage)
