"""What a pass does to the arguments of its call, so that it can be run again as if it had not run.

A UNet may write to its sample, pop from a list, fill in a dict. An adaptor pass that has to be run again in full must
not see that: containers get their contents back, and tensors that were written to their values, where we have a copy.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn

from clockwork_hooks._tree import version

__all__ = ["Before"]

_PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.Generator)
_OPAQUE = (nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_DEEPEST = 6


class Before:
    """The arguments of one call, before it runs.

    Args:
        args, kwargs: of the call.
        written: places of tensors, in the order of `tensors`, that calls of this kind write to: copies are made.
        size: number of elements up to which tensors are copied that keep no count of writes; and all others, if
            `unsure`.
        always: a tensor that is copied whatever is known: the sample, which is what is written to most.

    Attributes:
        tensors: those among the arguments, in a fixed order.
    """

    def __init__(
        self,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] = types.MappingProxyType({}),
        *,
        written: Collection[int] = (),
        size: int = 0,
        unsure: bool = False,
        always: Any = None,
    ) -> None:
        self.tensors: list[torch.Tensor] = []
        self._contents: list[Callable[[], None]] = []
        for value in (*args, *kwargs.values()):
            self._look(value, 0)
        self._versions = [version(tensor) for tensor in self.tensors]
        self._copies: dict[int, torch.Tensor] = {}
        for k, tensor in enumerate(self.tensors):
            small = tensor.numel() <= size and (unsure or self._versions[k] < 0)
            if tensor is always or small or k in written:
                self._copies[k] = tensor.detach().clone()

    @property
    def written(self) -> set[int]:
        """Places of tensors that were written to since; of those that keep no count, none."""
        pairs = zip(self.tensors, self._versions, strict=True)
        return {k for k, (tensor, then) in enumerate(pairs) if version(tensor) != then}

    def restore(self) -> bool:
        """Make the arguments what they were; False if a tensor was written to of which there is no copy."""
        written = self.written
        if not written <= self._copies.keys():
            return False
        with torch.no_grad():
            for k, copy in self._copies.items():
                if k in written or self._versions[k] < 0:
                    self.tensors[k].copy_(copy)
        for restore in self._contents:
            restore()
        return True

    def _look(self, value: Any, depth: int) -> None:
        if isinstance(value, torch.Tensor):
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
            self._contents.append(lambda: _refill_set(value, members))
            return
        elif isinstance(value, Mapping):
            inner = list(value.values())
        elif hasattr(value, "__dict__"):
            attributes = dict(vars(value))
            self._contents.append(lambda: _reset(vars(value), attributes))
            inner = attributes.values()
        else:
            return
        for item in inner:
            self._look(item, depth + 1)


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
