"""What a pass does to the arguments of its call and to the UNet, so that it can be run again as if it had not run.

A UNet may write to its sample, pop from a list, fill in a dict, count its calls. An adaptor pass that has to be run
again in full must not see that: containers get their contents back, and tensors that were written to their values,
where we have a copy.
"""

from __future__ import annotations

import math
import types
from collections import deque
from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn

from clockwork_hooks._tree import address, copied, version

__all__ = ["Before"]

_PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.Generator)
_OPAQUE = (nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_DEEPEST = 6
_MODULE = frozenset(vars(nn.Module())) - {"training"}


class Before:
    """The arguments of one call, before it runs.

    Args:
        args, kwargs: of the call.
        written: places of tensors, in the order of `tensors`, that calls of this kind write to: copies are made.
        size: number of elements up to which tensors are copied that keep no count of writes; and all others, if
            `unsure`.
        always: a tensor that is copied whatever is known: the sample, which is what is written to most.
        objects: look into objects of any class, and at tensors of any kind, too.
        unet: what its modules hold beside their parameters is restored too.

    Attributes:
        tensors: those among the arguments, in a fixed order.
        versions: how often each of these tensors was written to.
        marks: which objects these arguments are and hold.
    """

    def __init__(
        self,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] = types.MappingProxyType({}),
        *,
        written: Collection[int] = (),
        size: float = 0,
        unsure: bool = False,
        always: Any = None,
        objects: bool = True,
        unet: nn.Module | None = None,
    ) -> None:
        self._own = None if unet is None else _Own(unet)
        self._objects = objects
        self.tensors: list[torch.Tensor] = []
        self._contents: list[Callable[[], None]] = []
        self.marks: list[int] = []
        for value in (*args, *kwargs.values()):
            self._look(value, 0)
        self.versions = [version(tensor) for tensor in self.tensors]
        self._copies: dict[int, torch.Tensor] = {}
        for k, tensor in enumerate(self.tensors):
            small = (unsure or self.versions[k] < 0) and tensor.numel() <= size
            if tensor is always or small or k in written:
                self._copies[k] = copied(tensor)

    @property
    def written(self) -> set[int]:
        """Places of tensors that were written to since; of those that keep no count, none."""
        pairs = zip(self.tensors, self.versions, strict=True)
        return {k for k, (tensor, then) in enumerate(pairs) if version(tensor) != then}

    @property
    def changed(self) -> bool:
        """Do the UNet's modules hold anything else than before?"""
        return self._own is not None and self._own.changed

    def restore(self) -> bool:
        """Make all of it what it was; False if a tensor was written to of which there is no copy."""
        written = self.written
        if not written <= self._copies.keys():
            return False
        with torch.no_grad():
            for k, copy in self._copies.items():
                if k in written or self.versions[k] < 0:
                    self.tensors[k].copy_(copy)
        for restore in self._contents:
            restore()
        if self._own is not None:
            self._own.restore()
        return True

    def _look(self, value: Any, depth: int) -> None:
        self.marks.append(id(value))
        if isinstance(value, torch.Tensor):
            if self._objects or (type(value) is torch.Tensor and value.layout == torch.strided):
                self.tensors.append(value)
            return
        if isinstance(value, (*_PLAIN, *_OPAQUE)) or depth > _DEEPEST:
            return
        if isinstance(value, tuple):
            inner: Any = value
        elif isinstance(value, (list, deque)):
            inner = list(value)
            self._contents.append(lambda: _refill(value, inner))
        elif isinstance(value, MutableMapping):
            entries = dict(value)
            self._contents.append(lambda: _reset(value, entries))
            inner = entries.values()
        elif isinstance(value, set):
            members = set(value)
            self.marks += sorted(map(id, members))
            self._contents.append(lambda: _refill_set(value, members))
            return
        elif isinstance(value, Mapping):
            inner = list(value.values())
        elif self._objects and hasattr(value, "__dict__"):
            attributes = dict(vars(value))
            self._contents.append(lambda: _reset(vars(value), attributes))
            inner = attributes.values()
        else:
            return
        for item in inner:
            self._look(item, depth + 1)


class _Own:
    """What a UNet's modules hold beside their parameters, before a pass: attributes, lists and dictionaries, buffers.

    Also the variables of functions among the attributes.

    Args:
        unet: the UNet.
    """

    def __init__(self, unet: nn.Module) -> None:
        self._modules = [
            (vars(module), {name: value for name, value in vars(module).items() if name not in _MODULE})
            for module in unet.modules()
        ]
        values = [value for _, attributes in self._modules for value in attributes.values()]
        cells = [cell for value in values for cell in getattr(value, "__closure__", None) or ()]
        self._cells = [(cell, cell.cell_contents) for cell in cells if cell != types.CellType()]
        values += [module._buffers for module in unet.modules()] + [value for _, value in self._cells]
        self._before = Before(tuple(values), size=math.inf, unsure=True, objects=False)
        self._memory = [(tensor, tensor.data) for tensor in self._before.tensors]
        self._unet = unet
        storages = [address(tensor.untyped_storage()) for tensor in self._before.tensors]
        names = [(id(attributes), *attributes) for attributes, _ in self._modules]
        self._marks = (names, self._before.marks, self._before.versions, storages)

    @property
    def changed(self) -> bool:
        """Is anything of it another one now, or was anything written to?"""
        return _Own(self._unet)._marks != self._marks

    def restore(self) -> None:
        """Make it what it was."""
        for now, before in self._modules:
            for name in [name for name in now if name not in _MODULE and name not in before]:
                del now[name]
            now.update(before)
        for cell, value in self._cells:
            cell.cell_contents = value
        for tensor, memory in self._memory:
            if address(tensor.untyped_storage()) != address(memory.untyped_storage()):
                tensor.data = memory
        self._before.restore()


def _refill(value: Any, contents: list[Any]) -> None:
    if len(value) != len(contents) or any(one is not then for one, then in zip(value, contents, strict=True)):
        value.clear()
        value.extend(contents)


def _refill_set(value: set[Any], members: set[Any]) -> None:
    value.clear()
    value.update(members)


def _reset(value: MutableMapping[Any, Any], entries: Mapping[Any, Any]) -> None:
    if value.keys() != entries.keys() or any(value[key] is not entries[key] for key in entries):
        value.clear()
        value.update(entries)
