"""What a UNet is made of, as one digest: equal in two processes, equal calls run the same code on the same modules.

It covers the tree of modules and the shapes of their weights; their classes: the code of every method, the file that it
stands in, the version of the library; what modules hold besides, as numbers, texts, processors and functions; hooks of
other code; torch and Python. Values of weights and tensors are not in it, nor is the device.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["digest", "structure"]

_OURS = "clockwork_hooks.engine.hooks"
_DEEPEST = 6  # objects within objects
# of a module: its parts, which are described on their own, and what says how it is called
_PARTS = frozenset({"_parameters", "_buffers", "_modules", "_compiled_call_impl", "forward"})
# of a configuration of diffusers: a set written as a list, in another order in each process; where it came from
_SAYS_NOTHING = frozenset({"_use_default_values", "_name_or_path"})
# what JSON tells apart by itself, and what its text tells
_OF_JSON = frozenset({bool, int, float, str, type(None)})
_SHOWN = (bool, int, float, str, complex, bytes, torch.dtype, torch.device, torch.Size, range, slice)
_HOOKS = sorted(name for name in vars(nn.Module()) if "_hooks" in name)
_APART = _PARTS.union(_HOOKS)


def structure(unet: nn.Module) -> str:
    """The digest of a UNet as it is now.

    Args:
        unet: the UNet; what Clockwork has put on it does not count.

    Example:
        >>> one, same, other = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3, stride=2)
        >>> structure(one) == structure(same), structure(one) == structure(other)
        (True, False)
    """
    return _Description(unet).digest


def digest(*values: object) -> str:
    """A short text that is equal for equal values; of what JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


class _Description:
    """The description of one UNet.

    Attributes:
        digest: of all of it.
    """

    def __init__(self, unet: nn.Module) -> None:
        self._classes: dict[type, str] = {}
        self._objects: dict[int, Any] = {}  # held, so that their numbers stay theirs
        numbers = {id(module): k for k, module in enumerate(unet.modules())}
        lines: list[Any] = [f"torch {torch.__version__} python {sys.version_info[:2]}"]
        lines += [self._module(module, numbers) for module in unet.modules()]
        described = 0
        while described < len(self._classes):  # a class may hold others
            lines.append(self._class(list(self._classes)[described]))
            described += 1
        self.digest = digest(*lines)

    def _module(self, module: nn.Module, numbers: Mapping[int, int]) -> list[Any]:
        own, weights = vars(module), {**module._parameters, **module._buffers}
        hooks = ((name, self._hooks(own[name])) for name in _HOOKS if own[name])
        return [
            self._name(type(module)),
            [(name, numbers[id(child)]) for name, child in module._modules.items() if child is not None],
            [(name, None if one is None else self._tensor(one)) for name, one in weights.items()],
            self._mapping({name: value for name, value in own.items() if name not in _APART}, 0),
            self._forward(module),
            [(name, held) for name, held in hooks if held],
        ]

    def _forward(self, module: nn.Module) -> Any:
        """What stands in the place of its class's own forward; None where nothing does."""
        forward = inspect.unwrap(module.forward)
        plain = isinstance(forward, types.MethodType) and forward.__self__ is module
        return None if plain and forward.__func__ is type(module).forward else self._value(forward, 0)

    def _hooks(self, hooks: Any) -> list[Any]:
        """Those of other code; beside them torch keeps tables of flags."""
        if not hooks:
            return []
        values = list(hooks.values()) if isinstance(hooks, Mapping) else []
        return [self._value(one, 0) for one in values if type(one).__module__ != _OURS and type(one) is not bool]

    # -- values --------------------------------------------------------------------------------------------------

    def _value(self, value: Any, depth: int) -> Any:
        """What tells a value; of objects that nothing is known of, their class and what they hold."""
        kind = type(value)
        if kind in _OF_JSON:
            return value
        if isinstance(value, _SHOWN):
            return [kind.__name__, repr(value)]
        if depth > _DEEPEST:
            return [self._name(kind)]
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, Mapping):
            return [self._name(kind), self._mapping(value, depth)]
        if isinstance(value, (list, tuple)):
            return [self._name(kind), [self._value(one, depth + 1) for one in value]]
        if isinstance(value, (set, frozenset)):
            return ["set", sorted(json.dumps(self._value(one, depth + 1)) for one in value)]
        if isinstance(value, type):
            return ["type", self._name(value)]
        return self._function(value, depth) or self._object(value, depth)

    def _object(self, value: Any, depth: int) -> Any:
        own = {} if isinstance(value, nn.Module) else getattr(value, "__dict__", {})
        if own:  # each is described once: FSDP's hold each other, and hundreds of paths lead from one to the next
            if id(value) in self._objects:
                return [self._name(type(value)), list(self._objects).index(id(value))]
            self._objects[id(value)] = value
        return [self._name(type(value)), self._mapping(own, depth)]

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> list[Any]:
        held = [(name, one) for name, one in list(value.items()) if name not in _SAYS_NOTHING]
        return [[str(name), self._value(one, depth + 1)] for name, one in held]

    def _tensor(self, value: torch.Tensor) -> list[Any]:
        shape = [] if is_lazy(value) else list(value.shape)
        return [self._name(type(value)), shape, str(value.dtype)]

    def _function(self, value: Any, depth: int) -> Any:
        """What a function does and what it holds; None where it is none."""
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return ["partial", *(self._value(one, depth + 1) for one in parts)]
        if isinstance(value, (staticmethod, classmethod, types.MethodType)):
            return [type(value).__name__, self._value(value.__func__, depth + 1)]
        if isinstance(value, property):
            return ["property", *(self._value(one, depth + 1) for one in (value.fget, value.fset))]
        if not isinstance(value, types.FunctionType):
            return None
        cells = [_content(cell) for cell in value.__closure__ or ()]
        held = (*cells, value.__defaults__, value.__kwdefaults__)
        return [value.__module__, value.__qualname__, _code(value.__code__), *(self._value(v, depth + 1) for v in held)]

    # -- classes -------------------------------------------------------------------------------------------------

    def _name(self, cls: type) -> str:
        """The name of a class, which is described once."""
        name = self._classes.get(cls)
        if name is None:
            name = self._classes[cls] = f"{cls.__module__}.{cls.__qualname__}"
        return name

    def _class(self, cls: type) -> list[Any]:
        """Its methods and data, its file and the version of its library."""
        library = sys.modules.get(cls.__module__.partition(".")[0])
        bases = [self._name(base) for base in cls.__mro__[1:-1]]
        # torch.compile patches nn.Module itself, whenever it is used first: its file and torch's version tell it
        closed = cls is nn.Module or cls.__module__ == "builtins"
        held: Iterable[tuple[str, Any]] = () if closed else vars(cls).items()
        data = [[name, self._value(one, _DEEPEST - 3)] for name, one in sorted(held) if name not in _OF_CLASSES]
        return [self._name(cls), bases, str(getattr(library, "__version__", "")), _file(cls.__module__), data]


_OF_CLASSES = frozenset({"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "_abc_impl"})


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return None


@functools.lru_cache(maxsize=4096)
def _code(code: types.CodeType) -> str:
    """The digest of what the code does, of the functions within it too."""
    constants = [_code(one) if isinstance(one, types.CodeType) else _constant(one) for one in code.co_consts]
    return digest(code.co_code.hex(), constants, code.co_names, code.co_varnames, code.co_freevars)


def _constant(value: Any) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _file(module: str) -> str:
    """The digest of the file that a module was loaded from; "" of one that has none."""
    path = getattr(sys.modules.get(module), "__file__", None)
    if not isinstance(path, str):
        return ""
    try:
        seen = os.stat(path)
    except OSError:
        return ""
    return _read(path, seen.st_mtime_ns, seen.st_size)


@functools.lru_cache(maxsize=1024)
def _read(path: str, time: int, size: int) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError:
        return ""
