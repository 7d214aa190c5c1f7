"""What tells a region apart, and the UNet that it lies in, from one process to the next.

`Fingerprints` tell regions: what one is made of and where it lies, whatever its modules are called. Two codes of one
network (diffusers, LDM and ComfyUI, refiners) name and nest their modules in their own ways, and write an attention
or a split in their own words; what they share is the graph of their products. So a fingerprint is made of:

- the skeleton: the convolutions inside, with the shapes of their weights, and which of them read which. Where there
  are none, the linear layers. What is laid beside a weight (LoRA) is left out.
- the ports: where each entry and the exit lie, told by the products that they come from, by how many convolutions
  come before them, and by the operators in between. Of two regions that differ by a scaling, one has one operator
  more.

No shape of an activation counts, as batch and size do not, and no constant, as the time may be one.

`structure` tells UNets: where it is equal in two processes, equal calls run the same code on the same modules. It
covers the tree of modules and the shapes of their weights; their classes: the code of every method, the file that it
stands in, the version of the library; what modules hold besides, as numbers, texts, processors and functions; hooks
of other code; torch and Python. Values of weights and tensors are not in it, nor is the device.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import marshal
import operator
import os
import sys
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn
from torch.nn.parameter import is_lazy

from clockwork_hooks._tree import attribute
from clockwork_hooks.graph.operators import BLOCKS, CONVOLUTIONS, VIEWS, kind, qualified_name, weight_of
from clockwork_hooks.graph.tracing import Trace
from clockwork_hooks.regions.flow import Dominance, Levels, Mask

PREFIX = "graph-"  # those of earlier versions have none: they were made of the modules' names
_SAME = {  # one operator by several names, among them those of whole operators and of what they come down to
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "rsub": "sub",
    "negative": "neg",
    "clip": "clamp",
    "relu6": "hardtanh",
    "selu": "elu",
    "square": "pow",
    "absolute": "abs",
}
_SCALES = frozenset({"aten::mul", "aten::div", "aten::dropout", "aten::native_dropout", *VIEWS})


def is_portable(fingerprint: object) -> bool:
    """Does it tell a region by its graph? Those of earlier versions told it by the names of its modules."""
    return str(fingerprint).startswith(PREFIX)


@dataclass(frozen=True, slots=True)
class _Product:
    """An operator that multiplies by a weight.

    Attributes:
        node: its index.
        label: its kind, its weight's shape, its stride.
        out: its output channels.
    """

    node: int
    label: tuple[Any, ...]
    out: int

    @property
    def is_convolution(self) -> bool:
        return bool(self.label[0] != "linear")


class Fingerprints:
    """Makes the fingerprints of one trace's regions. Sets of products are numbers, a bit for each product.

    Args:
        trace: the trace.
        dominance: which nodes carry the sample.
        levels: channels and positions of the nodes.
    """

    def __init__(self, trace: Trace, dominance: Dominance, levels: Levels) -> None:
        self._nodes, self._levels = trace.nodes, levels
        self._dep, self._live = dominance.dep, dominance.live
        self._sources, self._users = dominance.sources, dominance.users
        self.products: list[_Product] = []
        self._left_out: set[int] = set()
        count = len(trace.nodes)
        self._number = [-1] * count  # of the node's product
        self._near = [0] * count  # products that a node comes from, with none in between
        self._before = [0] * count  # convolutions that come before it
        self._behind = [0] * count  # and behind how many products of these it lies at least
        self._near_convolutions = [0] * count
        for n in range(count):
            if dominance.dep[n]:
                self._visit(n)

    def _visit(self, n: int) -> None:
        carrying = [u for u in self._sources[n] if self._dep[u]]
        for u in carrying:
            self._near[n] |= self._near[u]
            self._before[n] |= self._before[u]
            self._near_convolutions[n] |= self._near_convolutions[u]
        self._behind[n] = min((self._behind[u] for u in carrying), default=0)
        product = self._product(n, carrying)
        if product is None:
            return
        if (second := self._beside(n, product)) is not None:
            self._left_out |= {n, second}
        if n in self._left_out:
            self._near[n] = self._near_convolutions[n] = 0
            return
        bit = 1 << len(self.products)
        self._number[n] = len(self.products)
        self.products.append(product)
        self._near[n], self._behind[n] = bit, self._behind[n] + 1
        if product.is_convolution:
            self._near_convolutions[n], self._behind[n] = bit, 0
            self._before[n] |= bit

    # -- products ------------------------------------------------------------------------------------------------

    def _product(self, n: int, carrying: Sequence[int]) -> _Product | None:
        node = self._nodes[n]
        name, shape = qualified_name(node.target), node.meta.get("shape", ())
        if node.op != "call_function" or not carrying:
            return None
        if name in CONVOLUTIONS:
            operand = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], fx.Node) else None
            weight = _shape_of(operand and weight_of(operand)) or _shape_of(operand)  # or of one that is worked out
            kernel = weight[2:] if weight else ()
            if not weight or len(shape) <= len(kernel):
                return None
            out = int(shape[-len(kernel) - 1])
            if all(size == 1 for size in kernel):
                return _Product(n, ("linear", *sorted(weight[:2])), out)
            return _Product(n, ("up" if _transposes(node, name) else "conv", weight, _stride(node)), out)
        if not shape or not (kind(node) == "linear" or name in _MATRICES or name in BLOCKS or _is_custom(name)):
            return None
        weights = [weight for source in node.all_input_nodes if len(weight := _shape_of(weight_of(source))) > 1]
        sizes = weights[0] if weights else (shape[-1], self._nodes[carrying[0]].meta.get("shape", shape)[-1])
        return _Product(n, ("linear", *sorted(sizes)), int(shape[-1]))

    def _beside(self, n: int, product: _Product) -> int | None:
        """The second of two products that lay a low rank beside a weight, as LoRA does, where this is the first."""
        users = [v for v in self._users[n] if self._live[v]]
        while len(users) == 1 and qualified_name(self._nodes[users[0]].target) in _SCALES:
            users = [v for v in self._users[users[0]] if self._live[v]]
        second = self._product(users[0], [n]) if len(users) == 1 else None
        narrow = second is not None and product.out < min(second.out, max(_shape(product)))
        return second.node if second is not None and narrow and not second.is_convolution else None

    # -- of one region -------------------------------------------------------------------------------------------

    def of(self, entries: Iterable[int], exit: int, inside: Mask) -> str:
        """The fingerprint of the region with these entries and this exit.

        Args:
            entries: nodes that flow in and depend on the sample.
            exit: the node that flows out.
            inside: its nodes.
        """
        within = inside[self._at]
        bones = within & self._convolves
        codes = np.sort(self._convolution_codes[bones] if bones.any() else self._product_codes[within])
        return PREFIX + digest(sorted(self._port(n) for n in entries), self._port(exit), codes.tolist())[:16]

    @functools.cached_property
    def _at(self) -> NDArray[np.int64]:
        return np.array([product.node for product in self.products], dtype=np.int64)

    @functools.cached_property
    def _convolves(self) -> Mask:
        return np.array([product.is_convolution for product in self.products], dtype=np.bool_)

    @functools.cached_property
    def _convolution_codes(self) -> NDArray[np.uint64]:
        """A number for each convolution and the convolutions that it reads."""
        return self._codes(self._near_convolutions, self._convolves)

    @functools.cached_property
    def _product_codes(self) -> NDArray[np.uint64]:
        """A number for each product and the products that it reads."""
        return self._codes(self._near, np.ones_like(self._convolves))

    def _codes(self, near: Sequence[int], counts: Mask) -> NDArray[np.uint64]:
        codes = np.zeros(len(self.products), dtype=np.uint64)
        for k in np.flatnonzero(counts).tolist():
            product = self.products[k]
            read = functools.reduce(operator.or_, (near[u] for u in self._sources[product.node]), 0)
            codes[k] = int(digest(product.label, self._widths(read))[:16], 16)
        return codes

    def _widths(self, products: int) -> list[tuple[str, int]]:
        """Kind and output channels of each; their inputs are not told, so that another stem changes nothing."""
        return sorted((self.products[k].label[0], self.products[k].out) for k in _bits(products))

    def _port(self, n: int) -> tuple[Any, ...]:
        """Where a node lies."""
        start, operators = self._tail(n)
        before, behind = self._before[n].bit_count(), self._behind[n]
        channels = self._levels.channels(self._nodes[n]) or 0
        return channels, self._widths(self._near[n]), before, behind, self._scale(start, n), operators

    def _tail(self, n: int) -> tuple[int, list[str]]:
        """Where the operators begin that lead to this node one after another, and their names."""
        names = []
        while self._number[n] < 0:
            carrying = {u for u in self._sources[n] if self._dep[u]}
            if len(carrying) != 1:
                break
            name = _pointwise(self._nodes[n])
            if name:
                names.append(name)
            n = carrying.pop()
        return n, names

    def _scale(self, start: int, end: int) -> str:
        """Is there another resolution after these operators? One pixel more or less, at an odd size, is none."""
        one, other = (self._levels.positions(self._nodes[n]) or 0 for n in (start, end))
        if not one or not other or 2 * one < 3 * other < 4.5 * one:
            return ""
        return "up" if other > one else "down"


_MATRICES = frozenset({"aten::mm", "aten::addmm", "aten::_addmm_activation"})  # heads make batches of products


def _is_custom(name: str) -> bool:
    """A product that is not torch's own, as of quantised layers, whose weights are no tensors of the graph."""
    space, _, base = name.partition("::")
    return space != "aten" and bool(base) and ("linear" in base or "mm" in base)


def _shape_of(node: fx.Node | None) -> tuple[int, ...]:
    return () if node is None else tuple(node.meta.get("shape", ()))


def _shape(product: _Product) -> tuple[int, ...]:
    return product.label[1][:2] if product.is_convolution else product.label[1:]


def _transposes(node: fx.Node, name: str) -> bool:
    transposes = CONVOLUTIONS[name]
    return bool(node.args[6]) if transposes is None and len(node.args) > 6 else bool(transposes)


def _stride(node: fx.Node) -> tuple[int, ...]:
    """A convolution's stride; one number where it is the same along all axes."""
    stride: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("stride", 1)
    numbers = stride if isinstance(stride, (tuple, list)) else (stride,)
    numbers = tuple(number for number in numbers if isinstance(number, int))
    return numbers[:1] if len(set(numbers)) == 1 else numbers


def _pointwise(node: fx.Node) -> str:
    """The operator's name, where it changes values; "" for views, copies, casts, dropout and what resamples."""
    if kind(node) == "norm":
        return "norm"
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return ""
    name = qualified_name(node.target).rpartition("::")[2]
    if name in ("mul", "div") and any(type(value) in (int, float) and value == 1 for value in node.args[1:]):
        return ""  # diffusers' resnets divide by a factor that nearly always is one
    return "" if name in ("copy", "fill", "clone", "_to_copy", "where") or "dropout" in name else _SAME.get(name, name)


def _bits(number: int) -> Iterable[int]:
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low


_OURS = "clockwork_hooks.engine.hooks"
_DEEPEST = 6  # objects within objects
# of a module: its parts, which are described on their own, what says how it is called, and what only its state
# dictionary and its hooks look at
_PARTS = frozenset({"_parameters", "_buffers", "_modules", "_compiled_call_impl", "forward"})
_OF_STATE = frozenset({"_non_persistent_buffers_set", "_is_full_backward_hook"})
# of a configuration of diffusers: a set written as a list, in another order in each process; where it came from
_SAYS_NOTHING = frozenset({"_use_default_values", "_name_or_path"})
# what JSON tells apart by itself, and what its text tells
_OF_JSON = frozenset({bool, int, float, str, type(None)})
_SHOWN = (bool, int, float, str, complex, bytes, torch.dtype, torch.device, torch.Size, range, slice)
_HOOKS = sorted(name for name in vars(nn.Module()) if "_hooks" in name)
_APART = _SAYS_NOTHING.union(_PARTS, _OF_STATE, _HOOKS)


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
        modules = list(unet.modules())
        numbers = {id(module): k for k, module in enumerate(modules)}
        lines: list[Any] = [f"torch {torch.__version__} python {sys.version_info[:2]}"]
        lines += [self._module(module, numbers) for module in modules]
        described = 0
        while described < len(self._classes):  # a class may hold others
            lines.append(self._class(list(self._classes)[described]))
            described += 1
        # of version 0, which depends on the values alone: 1 ms where JSON takes 7 (SD v1.5, within its first call)
        self.digest = hashlib.sha256(marshal.dumps(lines, 0)).hexdigest()[:32]

    def _module(self, module: nn.Module, numbers: Mapping[int, int]) -> list[Any]:
        own, weights = vars(module), {**module._parameters, **module._buffers}
        hooks = ((name, self._hooks(own[name])) for name in _HOOKS if own[name])
        return [
            self._name(type(module)),
            [(str(name), numbers[id(child)]) for name, child in module._modules.items() if child is not None],
            [(str(name), None if one is None else self._tensor(one)) for name, one in weights.items()],
            self._mapping(own, 0, apart=_APART),
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
        own = {} if isinstance(value, nn.Module) else attribute(value, "__dict__", {})
        if own:  # each is described once: FSDP's hold each other, and hundreds of paths lead from one to the next
            if id(value) in self._objects:
                return [self._name(type(value)), list(self._objects).index(id(value))]
            self._objects[id(value)] = value
        return [self._name(type(value)), self._mapping(own, depth)]

    def _mapping(self, value: Mapping[Any, Any], depth: int, apart: Collection[str] = _SAYS_NOTHING) -> list[Any]:
        held = list(value.items())
        return [[str(name), self._value(one, depth + 1)] for name, one in held if name not in apart]

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
