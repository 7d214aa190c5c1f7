"""What a kept feature depends on beside sample and time: the inputs that tell its branch, and the UNet's weights.

Both are remembered by what they hold, so that a later call can be told to have the same. In main memory a copy of every
tensor is compared, so nothing that happens to the original goes unnoticed. On a device comparing means waiting, so
there the object and its version counter tell. Containers, objects and functions are taken apart and compared part by
part, also where they are new ones; what cannot be taken apart is never the same. Of weights, which are many, a few are
looked at (`Weights`).
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import enum
import fractions
import functools
import itertools
import logging
import pathlib
import re
import types
import uuid
import weakref
from array import array
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clockwork_hooks._tree import EMPTY, attribute, copied, version
from clockwork_hooks.graph.arguments import is_number

_LARGEST_COPY = 1 << 22  # elements
_LARGEST_TIME = 1 << 10
_MOST_PARTS = 4096
_DEEPEST = 64


class Conditions:
    """What one call was conditioned on.

    Args:
        values: every input but the sample and the time, in order.

    Example:
        >>> conditions = Conditions([torch.ones(3), {"words": frozenset({"a"})}])
        >>> conditions.same([torch.ones(3), {"words": frozenset({"a"})}])
        True
        >>> conditions.same([torch.ones(3), {"words": frozenset({"b"})}])
        False
    """

    __slots__ = ("_values",)

    def __init__(self, values: Sequence[Any]) -> None:
        self._values = [[_remember(part) for part in parts] for parts in _parts(values)]

    @property
    def nbytes(self) -> int:
        """Memory that the copies take."""
        return sum(part.bits.nbytes for parts in self._values for part in parts if isinstance(part, _Copy))

    def same(self, values: Sequence[Any]) -> bool:
        """Are these the same conditions? Never waits for a device: there, new objects are other conditions."""
        now = _parts(values)
        return len(now) == len(self._values) and all(map(_all_same, self._values, now))

    def equal(self, values: Sequence[Any]) -> bool:
        """Like `same`, but new objects on a device are compared by value, which waits for it."""
        now = _parts(values)
        if len(now) != len(self._values) or any(len(a) != len(b) for a, b in zip(self._values, now, strict=True)):
            return False
        pairs = (pair for both in zip(self._values, now, strict=True) for pair in zip(*both, strict=True))
        differ = [pair for pair in pairs if not _same(*pair)]
        return all(_comparable(*pair) for pair in differ) and all(
            _equal(_bits(before.tensor), _bits(now)) for before, now in differ
        )

    def same_rows(self, values: Sequence[Any], pairs: Sequence[tuple[int, int]], before: int, now: int) -> bool:
        """Are these the conditions of some of the same rows? Waits for a device, where tensors lie on one.

        Tensors whose first axis is the batch's are compared row by row; all else has to be the same.

        Args:
            values: of a call with another batch.
            pairs: (row of this batch, row of that one).
            before, now: rows of the two batches.
        """
        parts = _parts(values)
        if len(parts) != len(self._values):
            return False
        return all(
            len(own) == len(other) and all(_same_rows(*two, pairs, before, now) for two in zip(own, other, strict=True))
            for own, other in zip(self._values, parts, strict=True)
        )

    def differing(self, values: Sequence[Any]) -> list[int]:
        """Which of these values are not the same ones; all of them where their number is another one."""
        now = _parts(values)
        if len(now) != len(self._values):
            return list(range(len(now)))
        return [k for k, both in enumerate(zip(self._values, now, strict=True)) if not _all_same(*both)]

    def with_forms(self, values: Sequence[Any]) -> list[Any]:
        """The values of a call that these are the conditions of, with `FORM` where these have it."""
        return [FORM if own == [FORM] else value for own, value in zip(self._values, values, strict=False)]

    def forget(self, places: Iterable[int]) -> None:
        """The values at these places turned out to be the time in another form: only `FORM` is the same from now on."""
        for k in places:
            if k < len(self._values):
                self._values[k] = [FORM]


class Seen:
    """The very objects that a branch was called with. Where its first two steps shared them, new ones are a new run's.

    Their values would not tell: a prompt that is sampled twice has equal embeddings. Embeddings made anew in every step
    tell nothing, and neither do numbers and text.

    Attributes:
        steps: how many of the branch have begun.
    """

    __slots__ = ("_objects", "steps")

    def __init__(self) -> None:
        self._objects: list[list[weakref.ref[Any]] | None] = []
        self.steps = 0

    def broken(self, values: Sequence[Any]) -> bool:
        """Is one of these another object, in a place where the first two steps shared theirs?"""
        places = zip(map(_object, values), self._objects, strict=False)
        return self.steps > 2 and any(objects and all(one() is not v for one in objects) for v, objects in places)

    def renewed(self, values: Sequence[Any]) -> bool:
        """Is one of these a new object, in a place where there were none in the second step?"""
        if len(self._objects) < len(values):
            self._objects += [[] for _ in values[len(self._objects) :]]
        renewed = False
        for k, (value, objects) in enumerate(zip(map(_object, values), self._objects, strict=False)):
            if objects is None or (objects and objects[-1]() is value) or any(one() is value for one in objects):
                continue
            if self.steps == 2 or not _referable(value):
                self._objects[k] = None
                continue
            renewed = renewed or self.steps > 2
            self._objects[k] = [*(one for one in objects if one() is not None), weakref.ref(value)]
        return renewed


def _referable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (type(value) not in _VALUES and type(value).__weakrefoffset__ > 0)


# -- a value, taken apart -------------------------------------------------------------------------------------------

# equal ones are the same
_VALUES = frozenset(
    {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
    | {torch.Size}
    | {range, re.Pattern, types.CodeType, uuid.UUID, decimal.Decimal, fractions.Fraction}
    | {pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, pathlib.PureWindowsPath}
    | {datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone}
)
# there is one of each, and nobody changes it
_SINGLE = (enum.Enum, types.ModuleType, type(...), type(NotImplemented), logging.Logger)


@dataclass(frozen=True, slots=True)
class _Value:
    """A part that is the same where type and value are equal."""

    type: type
    value: Any


class _Object:
    """A part that is the same where it is the very object, which is kept: no other one gets its address."""

    __slots__ = ("object",)

    def __init__(self, value: Any) -> None:
        self.object = value


class _Shared(_Object):
    """A tensor of a module, which is not copied: a whole network may be a condition."""


class _Unknown:
    """A part that cannot be compared, and is never the same."""


# stands for an input that is the time in another form
FORM = _Value(type(None), "the time in another form")


class Snapshot:
    """An object as it was given to a call, though the call may have written to it since.

    Attributes:
        value: the object.
        parts: what it held.
        time: a copy of a tensor that may be the call's time.
    """

    __slots__ = ("_version", "parts", "time", "value")

    def __init__(self, value: Any) -> None:
        self.value, self.parts = value, [_remember(part) for part in _parts_of(value)]
        small = type(value) is torch.Tensor and _plain(value) and not value.is_meta and value.numel() <= _LARGEST_TIME
        self.time = copied(value) if small else None
        self._version = version(value) if isinstance(value, torch.Tensor) else -1

    @classmethod
    def of(cls, value: Any) -> Any:
        """The value itself, where nobody can write to it."""
        return value if type(value) in _VALUES or is_number(value) else cls(value)

    @property
    def now(self) -> Any:
        """After the call: the tensor itself, if the call has not written to it; else what it was."""
        unwritten = isinstance(self.value, torch.Tensor) and version(self.value) == self._version
        same = unwritten and (self._version >= 0 or _all_same(self.parts, _parts_of(self.value)))
        return self.value if same else self


def _object(value: Any) -> Any:
    return value.value if type(value) is Snapshot else value


class _NoOrderError(Exception):
    """The members of a set are told apart by their addresses only."""


class _TooManyPartsError(Exception):
    """To compare them in every call would take longer than what it saves."""


def _parts(values: Sequence[Any]) -> list[list[Any]]:
    """Of each value: tensors, and what tells everything else, in a fixed order."""
    parts: list[list[Any]] = []
    for value in values:
        if type(value) is torch.Tensor and not value.__dict__:
            parts.append([value])  # nearly always; to take it apart takes 157 µs
        elif type(value) is Snapshot:
            parts.append(value.parts)
        else:
            parts.append(_parts_of(value))
    return parts if sum(map(len, parts)) <= _MOST_PARTS else [[_Unknown()]]


def _parts_of(value: Any) -> list[Any]:
    parts: list[Any] = []
    try:
        _take_apart(value, parts, ())
    except _TooManyPartsError:
        return [_Unknown()]
    return parts


def _take_apart(value: Any, parts: list[Any], within: tuple[Any, ...]) -> None:
    """Append the parts of a value; `within`: the objects that it is a part of, outermost first."""
    if len(parts) > _MOST_PARTS or len(within) > _DEEPEST:
        raise _TooManyPartsError
    kind = type(value)
    if kind in _VALUES:
        parts.append(_value(value))
    elif isinstance(value, (_Value, _Object)):
        parts.append(value)
    elif isinstance(value, _SINGLE):
        parts.append(_Object(value))
    elif hasattr(kind, "tobytes") and getattr(attribute(value, "dtype"), "hasobject", True) is False:
        parts.append(_Value(kind, (str(value.dtype), tuple(value.shape), value.tobytes())))
    elif any(value is one for one in within):  # a circle
        parts.append(_Value(kind, next(k for k, one in enumerate(within) if one is value)))
    else:
        held = _held(value)
        if isinstance(value, torch.Tensor):
            parts.append(_Shared(value) if any(isinstance(one, nn.Module) for one in within) else value)
        parts.append(_Unknown() if held is None else _Value(kind, len(held)))
        for one in held or ():
            _take_apart(one, parts, (*within, value))


def _value(value: Any) -> _Value:
    """0.0 and -0.0 are equal but not the same; NaN is the same but not equal."""
    if type(value) is float:
        return _Value(float, value.hex())
    if type(value) is complex:
        return _Value(complex, (value.real.hex(), value.imag.hex()))
    return _Value(type(value), value)


def _held(value: Any) -> Sequence[Any] | None:
    """What a container, a function, a class or an object holds; None where that cannot be told."""
    for kinds, parts, closed in _KINDS:
        if isinstance(value, kinds):
            held = parts(value)
            if closed or held is None:
                return held
            break
    else:
        held = ()
    cls: Any = type(value)
    if not isinstance(value, torch.Tensor) and _hides(cls):
        return None
    slots = {name: one for name in _slots(cls) if (one := attribute(value, name, EMPTY)) is not EMPTY}
    return (*held, *_items(slots), *_items(attribute(value, "__dict__", {})), *_items(_shared_data(cls)))


@functools.lru_cache(maxsize=1024)
def _slots(cls: Any) -> tuple[str, ...]:
    """Names of the attributes that instances hold outside of their `__dict__`, as `getattr` takes them."""
    slots: list[str] = []
    for base in cls.__mro__:
        names = vars(base).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                slots.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return tuple(slots)


@functools.lru_cache(maxsize=1024)
def _hides(cls: Any) -> bool:
    """Do instances hold more than attributes and items? Then they are larger than those of a class that does not."""
    base = next((base for base in cls.__mro__ if base in _OPEN), object)
    slots = [f"slot{k}" for k in range(len(_slots(cls)))]
    slots += ["__dict__"] if cls.__dictoffset__ and not base.__dictoffset__ else []
    slots += ["__weakref__"] if cls.__weakrefoffset__ and not base.__weakrefoffset__ else []
    try:
        return bool(cls.__basicsize__ != type("Open", (base,), {"__slots__": slots}).__basicsize__)
    except TypeError:  # such a class cannot be made
        return True


_OPEN = (list, tuple, OrderedDict, dict, set, frozenset, deque, types.SimpleNamespace, str, int, float, complex, bytes)


def _shared_data(cls: type) -> dict[str, Any]:
    """Data that the instances of a class share: plain values and tensors."""
    data = (item for base in cls.__mro__[:-1] for item in vars(base).items() if not item[0].startswith("__"))
    return {name: one for name, one in data if isinstance(one, (torch.Tensor, list, dict)) or type(one) in _VALUES}


def _items(held: Any) -> tuple[Any, ...]:
    """Names and values in turn."""
    return tuple(part for item in list(held.items()) for part in item)


def _set(value: Any) -> Sequence[Any] | None:
    """In an order that does not depend on addresses; plain values have one, and tuples and sets of those."""
    try:
        return sorted(value, key=_rank)
    except _NoOrderError:
        return None


def _rank(value: Any) -> tuple[str, str]:
    """By which the members of a set are sorted."""
    kind = type(value)
    if kind in _VALUES:
        return kind.__name__, repr(value)
    if kind is tuple:
        return kind.__name__, repr(list(map(_rank, value)))
    if kind is frozenset:
        return kind.__name__, repr(sorted(map(_rank, value)))
    raise _NoOrderError


def _function(value: types.FunctionType) -> Sequence[Any]:
    """What it and the functions of its module that it calls do, hold and read from there: data, classes, modules."""
    there, functions = value.__globals__, _callees(value)
    names = sorted({name for one in functions for name in _names(one.__code__)})
    seen = {name: there[name] for name in names if name in there}
    data = {name: one for name, one in seen.items() if not isinstance(one, (types.FunctionType, type, *_SINGLE))}
    classes = {name: one for name, one in seen.items() if isinstance(one, type) and one.__module__ == value.__module__}
    modules = [vars(one) for one in seen.values() if isinstance(one, types.ModuleType)]
    settings = [{name: one[name] for name in names if name in one and _is_plain(one[name])} for one in modules]
    return (*(part for one in functions for part in _does(one)), data, classes, settings)


def _callees(function: types.FunctionType) -> list[types.FunctionType]:
    """It, and the functions of its module that it names, that those name, and so on."""
    functions, there = [function], function.__globals__
    for one in functions:  # grows as it is read
        named = (there.get(name) for name in _names(one.__code__))
        own = (each for each in named if isinstance(each, types.FunctionType) and each.__globals__ is there)
        functions += [each for each in dict.fromkeys(own) if each not in functions]
    return functions


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Of the globals and attributes that it names, also within a comprehension or a function of its own."""
    inner = (name for one in code.co_consts if isinstance(one, types.CodeType) for name in _names(one))
    return tuple(dict.fromkeys((*code.co_names, *inner)))


def _does(function: types.FunctionType) -> Sequence[Any]:
    cells = [_Object(cell) if _empty(cell) else cell.cell_contents for cell in function.__closure__ or ()]
    defaults = (function.__defaults__, function.__kwdefaults__)
    return (function.__code__, function.__qualname__, cells, *defaults, vars(function))


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or type(value) in _VALUES


def _empty(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is cell
    except ValueError:
        return True


def _tensor(value: torch.Tensor) -> Sequence[Any]:
    """Of a subclass: the tensors that it is made of."""
    flatten = getattr(value, "__tensor_flatten__", None)
    return [getattr(value, name) for name in flatten()[0]] if flatten is not None else ()


# (kinds, what one of them holds, and is that all that it holds?)
_KINDS: tuple[tuple[Any, Callable[[Any], Sequence[Any] | None], bool], ...] = (
    (torch.Tensor, _tensor, False),
    ((list, tuple, deque), list, False),
    (defaultdict, lambda value: (value.default_factory, dict(value), attribute(value, "__dict__")), True),
    (dict, _items, False),
    ((set, frozenset), _set, False),
    (str, lambda value: (str(value[:]),), False),
    (int, lambda value: (int(value),), False),
    (float, lambda value: (float(value),), False),
    (complex, lambda value: (complex(value),), False),
    ((bytes, bytearray, memoryview), lambda value: (bytes(value),), True),
    (array, lambda value: (value.typecode, value.tobytes()), True),
    (slice, lambda value: (value.start, value.stop, value.step), True),
    (types.MappingProxyType, _items, True),
    (types.FunctionType, _function, True),
    (functools._lru_cache_wrapper, lambda value: (value.__wrapped__,), True),
    (types.MethodType, lambda value: (value.__func__, value.__self__), True),
    (types.BuiltinFunctionType, lambda value: (value.__qualname__, value.__self__), True),
    (functools.partial, lambda value: (value.func, value.args, value.keywords, vars(value)), True),
    (type, lambda value: (_Object(value), _shared_data(value)), True),
    (weakref.ref, lambda value: (value(),), True),
    (torch.Generator, lambda value: (str(value.device), value.get_state()), True),
)


# -- what is remembered of a part, and what it is compared with -------------------------------------------------------


class _Copy:
    """A private copy of a tensor in main memory; equal bit for bit or not at all."""

    __slots__ = ("bits", "dtype", "shape", "type")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.type, self.shape, self.dtype, self.bits = type(tensor), tensor.shape, tensor.dtype, _bits(tensor).clone()


class _Original:
    """A tensor that is not copied, and how often it was written to: -1 where nothing tells."""

    __slots__ = ("address", "tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.version, self.address = tensor, version(tensor), _address(tensor)


def _remember(part: Any) -> Any:
    if isinstance(part, _Shared):
        return _Original(part.object)
    if isinstance(part, torch.Tensor):
        return _Copy(part) if _copied(part) else _Original(part)
    return part


def _all_same(before: Sequence[Any], now: Sequence[Any]) -> bool:
    return len(before) == len(now) and all(map(_same, before, now))


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, _Copy):
        if type(now) is not before.type or now.shape != before.shape or now.dtype != before.dtype:
            return False
        return now.is_cpu and _plain(now) and _equal(before.bits, _bits(now))
    if isinstance(before, _Original):
        now = now.object if isinstance(now, _Shared) else now
        return now is before.tensor and version(now) == before.version and _address(now) == before.address
    if isinstance(before, _Object):
        return isinstance(now, _Object) and now.object is before.object
    return isinstance(before, _Value) and isinstance(now, _Value) and before == now


def _same_rows(part: Any, other: Any, pairs: Sequence[tuple[int, int]], before: int, now: int) -> bool:
    """Are the parts the same, or tensors that hold the same in these rows?"""
    if not isinstance(part, (_Copy, _Original)):
        return _same(part, other)
    if not isinstance(other, torch.Tensor) or not _plain(other) or other.device.type == "meta":
        return False
    if isinstance(part, _Original):
        tensor = part.tensor
        if part.version < 0 or part.version != version(tensor) or not _plain(tensor) or tensor.device != other.device:
            return False
        shape, dtype, bits = tensor.shape, tensor.dtype, _bits(tensor)
    else:
        shape, dtype, bits = part.shape, part.dtype, part.bits
        if not other.is_cpu:
            return False
    if dtype != other.dtype or len(shape) != other.ndim or shape[1:] != other.shape[1:]:
        return False
    others = _bits(other)
    if shape and (shape[0], other.shape[0]) == (before, now):
        rows, other_rows = bits.view(torch.uint8).view(before, -1), others.view(torch.uint8).view(now, -1)
        return all(torch.equal(rows[i], other_rows[j]) for i, j in pairs)
    return shape == other.shape and _equal(bits, others)


def _comparable(before: Any, now: Any) -> bool:
    """Do both still have the values that the calls had?"""
    if not isinstance(before, _Original) or not isinstance(now, torch.Tensor) or now is before.tensor:
        return False
    tensor = before.tensor
    if not (_plain(tensor) and _plain(now)) or before.version < 0 or before.address != _address(tensor):
        return False
    alike = tensor.shape == now.shape and tensor.dtype == now.dtype and tensor.device == now.device
    return alike and tensor.device.type != "meta" and version(tensor) == before.version


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its memory as integers, wide ones where they fit: byte by byte, 32 KiB are compared in 34 µs and not in 5."""
    size = tensor.dtype.itemsize
    if tensor.shape and not tensor.shape[-1] * size % 8 and not tensor.storage_offset() * size % 8:
        with contextlib.suppress(RuntimeError):  # torch refuses strides that do not fit, also of axes of length 1
            if tensor.is_contiguous():
                return tensor.view(torch.int64)  # nearly always; without it, 7 µs more where caches are cold
    dense = tensor.detach().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))  # one expanded element may have a stride of 0
    wide = not (flat.shape[0] * size % 8 or flat.storage_offset() * size % 8)
    return flat.view(torch.int64 if wide else torch.uint8)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Are these bits, of tensors of one shape, the same ones?"""
    if one.dtype != other.dtype or one.shape != other.shape:  # they lie in memory in two ways
        one, other = one.view(torch.uint8).view(-1), other.view(torch.uint8).view(-1)
    return torch.equal(one, other)


def _copied(tensor: torch.Tensor) -> bool:
    return tensor.is_cpu and tensor.numel() <= _LARGEST_COPY and _plain(tensor)


def _plain(tensor: torch.Tensor) -> bool:
    """Is its memory all there is to it?"""
    ordinary = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    return ordinary and not (tensor.is_nested or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())


def _address(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided else 0


_PARAMETERS, _LAYERS = 16, 8
_MOVES = itertools.count(1)  # of all UNets: those of modules that were exchanged are no others' moves
_FREE_U = ("s1", "s2", "b1", "b2")
_VALUES_READ = 3  # read of each parameter


class Weights:
    """Watches what a UNet computes with beside its arguments; some of each kind, as what changes it changes many.

    Of a parameter: the counter of in-place writes, and in main memory some of its values, as fused optimizers and
    writes through `.data` leave no other mark. On a device they are not read, which would wait for it: there it is
    where its memory is, and `cw.reset()` has to tell of such writes. Where the UNet's own hooks put weights elsewhere
    in every call, as layerwise casting does, that tells nothing (`leave`). Adapters of PEFT that are loaded, switched,
    scaled, fused or taken off. Attention processors that are exchanged, and the scales of all those that have some, as
    IP-Adapter's do. And the four numbers of diffusers' FreeU.

    Args:
        unet: the UNet.

    Example:
        >>> unet = nn.Conv2d(1, 1, 1)
        >>> weights = Weights(unet)
        >>> before = weights.state()
        >>> _ = unet.weight.data.mul_(2)
        >>> weights.state() == before
        False
    """

    def __init__(self, unet: nn.Module) -> None:
        self._unet = unet
        self._adapters: tuple[str, ...] | None = None
        self._parameters: Sequence[tuple[dict[str, Any], str]] = ()  # looked up in each call: offloading exchanges them
        self._layers: Sequence[Any] = ()
        self._attentions: Sequence[Any] = ()
        self._processors: tuple[_Very, ...] = ()
        self._scaled: Sequence[Any] = ()
        self._free_u: dict[str, Any] = {}  # what its first block on the way up has
        self._places: list[int] = []  # where on a device parameters are
        self._move = 0  # the last time that they were somewhere else than they had been left
        self._looks = self._moved = False

    def state(self) -> tuple[Hashable, ...]:
        """Equal for two calls between which no weight has changed."""
        adapters = tuple(vars(self._unet).get("peft_config") or ())
        if adapters != self._adapters or any(
            _held_by(layer, "processor") is not one.object
            for layer, one in zip(self._attentions, self._processors, strict=True)
        ):
            self._adapters = adapters
            self._look()
        values, places = array("d"), list[int]()  # one array, as the state of the step before is cold
        marks = self._marks(values, places)
        if places != self._places:
            self._places, self._move, self._looks = places, next(_MOVES), True
        scales = [_numbers(_held_by(one, "scale")) for one in self._scaled]
        free_u = map(self._free_u.get, _FREE_U)
        switches = map(_switches, self._layers)
        return (adapters, self._move, values.tobytes(), *marks, *switches, *self._processors, *scales, *free_u)

    def leave(self) -> None:
        """A call has ended: if weights have moved within it, and within the one before, the UNet itself moves them.

        Example:
            >>> from clockwork_hooks.clock.conditions import Weights
            >>> Weights(nn.Conv2d(1, 1, 1)).leave()
        """
        if not self._looks:  # they have not moved of late
            return
        places = list[int]()
        self._marks(array("d"), places)
        moved = places != self._places
        if moved and self._moved:
            self._places = places
        self._looks = self._moved = moved

    def _marks(self, values: array[float], places: list[int]) -> list[Hashable]:
        """Of each parameter that is watched; values and places are added to those."""
        tables = self._parameters  # those of TorchScript's modules have no `get`
        return [_mark(owner[name] if name in owner else None, values, places) for owner, name in tables]  # noqa: SIM401

    def _look(self) -> None:
        modules = list(self._unet.modules())
        present = [(m._parameters, name) for m in modules for name, one in m._parameters.items() if one is not None]
        self._parameters = _spread(present, _PARAMETERS)
        self._layers = _spread([one for one in modules if hasattr(one, "merged_adapters")], _LAYERS)
        able = (one for one in modules if hasattr(one, "set_processor"))
        attentions = [one for one in able if _held_by(one, "processor") is not None]
        self._attentions = _spread(attentions, _LAYERS)
        self._processors = tuple(_Very(_held_by(one, "processor")) for one in self._attentions)
        held = (_held_by(one, "processor") for one in attentions)
        self._scaled = [one for one in held if _held_by(one, "scale") is not None]
        blocks = _held_by(self._unet, "up_blocks")
        self._free_u = vars(blocks[0]) if isinstance(blocks, nn.ModuleList) and len(blocks) else {}


@dataclass(frozen=True, slots=True)
class _Very:
    """Equal to another one of the very same object."""

    object: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Very) and self.object is other.object

    def __hash__(self) -> int:
        return id(self.object)


def _held_by(owner: Any, name: str) -> Any:
    """What it, a slot of it or its class holds; a property's value may fail to be made, or be another one each time."""
    attributes = attribute(owner, "__dict__", {})
    for table in (attributes, attributes.get("_modules", {})):
        if name in table:
            return table[name]
    shared = getattr(type(owner), name, None)
    if isinstance(shared, types.MemberDescriptorType):
        return getattr(owner, name, None)
    return None if hasattr(type(shared), "__get__") else shared


def _mark(parameter: Any, values: array[float], places: list[int]) -> Hashable:
    """Its counter of writes; in main memory a few of its values are added to those, on a device where its memory is.

    Neither which object it is nor, in main memory, where: offloading makes a new one for each call. Nothing of it is
    held, so that memory that is let go is free. It is not read through NumPy, which takes 16 µs less a call: torch lets
    nobody resize memory that NumPy has seen, and FSDP resizes that of parameters. Nor as integers: 16 more operators.
    """
    if type(parameter) not in (nn.Parameter, torch.Tensor) or parameter.layout is not torch.strided:
        return parameter._version if _counts(parameter) else -1
    written = version(parameter)
    if not _readable(parameter):
        places.append(parameter.data_ptr())
        return written
    if parameter.is_contiguous():
        elements = parameter.numel()
        count, step = min(elements, _VALUES_READ), max(elements // _VALUES_READ, 1)
    else:  # along its diagonal
        count = _VALUES_READ
        axes = zip(parameter.shape, parameter.stride(), strict=True)
        step = sum((size - 1) // (count - 1) * stride for size, stride in axes)
    try:
        picked = parameter.data.as_strided((count,), (step,)).tolist()
    except RuntimeError:
        if not parameter.is_quantized:  # there is no such memory
            return written, object()
        picked = parameter.as_strided((count,), (step,)).dequantize().tolist()
    if not picked or type(picked[0]) is not float:
        return written, repr(picked)
    values.extend(picked)  # bit by bit: NaN is equal to itself
    return written


def _readable(parameter: torch.Tensor) -> bool:
    return parameter.is_cpu


def _counts(parameter: Any) -> bool:
    """Does a subclass keep a count of writes? Not where it is not made yet, or in inference mode."""
    try:
        return isinstance(parameter._version, int)
    except (AttributeError, RuntimeError):
        return False


def _spread(values: list[Any], count: int) -> list[Any]:
    """So many of them, evenly, the last one among them."""
    return values if len(values) <= count else [values[(k + 1) * len(values) // count - 1] for k in range(count)]


def _numbers(value: Any) -> Hashable:
    """What of it is plain numbers; of a tensor its counter of writes, as its values would wait for the device."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_numbers, value))
    return version(value) if isinstance(value, torch.Tensor) else value if isinstance(value, (int, float)) else None


def _switches(layer: Any) -> tuple[Hashable, ...]:
    """Of a layer that PEFT has put around one of the UNet's: which adapters are on, how strong, fused or not."""
    active = layer._active_adapter
    return (
        layer._disable_adapters,
        active if isinstance(active, str) else tuple(active),
        tuple(layer.merged_adapters),
        tuple(getattr(layer, "scaling", {}).values()),
    )
