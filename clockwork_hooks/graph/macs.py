"""MACs of one recorded operator, from its recorded shapes: no weights, no arithmetic, any device.

MACs are those of convolutions and matrix products; 1 MAC = 2 FLOPs. fvcore's own op handles do the counting: the nodes
are shown to them as the jit values they expect. Where fvcore has no handle (`convolution`, every attention operator)
or another idea (`matmul` that broadcasts, `einsum` rounded to four digits), the shapes are first brought into a form
that a handle counts exactly, or the products are counted here. An operator that is neither counted nor known to
multiply-accumulate nothing is of kind "unknown", so that a report can name it: never a silent 0.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import math
import operator
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import fx

from clockwork_hooks._tree import map_leaves
from clockwork_hooks.errors import ArgumentError, CountError, is_whole
from clockwork_hooks.graph.operators import (
    BLOCKS,
    CONVOLUTIONS,
    LENGTH_FIRST,
    LINEARS,
    MATMULS,
    NORMS,
    Handle,
    handle_of,
    is_attention,
    kind,
    operator_name,
    qualified_name,
)

__all__ = ["node_macs"]

Shape = tuple[int, ...]


class _Value:
    """What fvcore's handles ask of a `torch._C.Value`: a tensor's sizes, or a constant."""

    __slots__ = ("shape", "value")

    def __init__(self, shape: Sequence[int] | None, value: object = None) -> None:
        self.shape = shape
        self.value = value

    def isCompleteTensor(self) -> bool:
        return self.shape is not None

    def type(self) -> _Value:
        return self

    def sizes(self) -> list[int]:
        return list(self.shape or ())

    def toIValue(self) -> object:
        return self.value


@functools.cache
def _fvcore(handle: str) -> Callable[..., Any]:
    handle_of: Callable[..., Any] = getattr(_handles(), handle)
    return handle_of


@functools.cache
def _handles() -> ModuleType:
    """The handles of fvcore, from their file: the package around it loads checkpoints, losses and tables (0.2 s)."""
    name = "fvcore.nn.jit_handles"
    package = importlib.util.find_spec("fvcore") if name not in sys.modules else None
    folders = (package.submodule_search_locations or []) if package is not None else []
    file = next((path for folder in folders if (path := Path(folder, "nn", "jit_handles.py")).is_file()), None)
    spec = None if file is None else importlib.util.spec_from_file_location("fvcore_jit_handles", file)
    if spec is None or spec.loader is None:
        return importlib.import_module(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def node_macs(node: fx.Node, *, attention: bool = True, norms: str | None = None) -> int:
    """MACs of one recorded operator, from its recorded shapes.

    Args:
        node: an operator of a graph that `trace` or `record` made, in inference mode (whole `conv2d`, `linear`,
            attention) or of a live call (`convolution`, `addmm`, `bmm`, device-specific variants).
        attention: count attention products too: B·H·Lq·Lk·(d_qk + d_v), masked or not. False leaves out attention
            operators and the products of attention written by hand: matrix products without a weight whose result
            feeds a softmax, or with an operand that comes from one, through scales, masks, casts and views.
            Attention without a softmax cannot be told from another product, and stays counted.
        norms: "fvcore" adds its estimate for normalisations, 5 per element (4 without a weight; batch norm in
            evaluation 2 or 1); None counts none.

    Returns:
        MACs, as the user's `handle` counts them where there is one; 0 for operators of kind "none" and "unknown".

    Raises:
        ArgumentError: `norms` is neither None nor "fvcore".
        CountError: an operator that multiplies has no recorded shapes.

    Example:
        >>> import torch, clockwork_hooks as ch
        >>> traced = ch.trace(torch.nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8))
        >>> node_macs(traced.outputs[0])  # 6·6 pixels, 8·3·3·3 weights
        7776

    Source: arXiv 2312.08128, Appendix A counts with `attention=False`.
    """
    if norms not in (None, "fvcore"):
        raise ArgumentError(
            'norms is None or "fvcore"', seen={"norms": norms}, do='pass norms="fvcore" or leave it out'
        )
    own = handle_of(node)
    if own is not None:
        return _counted(node, own)
    operator_kind = kind(node)
    if operator_kind == "none" or operator_kind == "unknown" or (operator_kind == "norm" and norms is None):
        return 0
    if operator_kind == "convolution":
        return _convolution(node)
    if operator_kind == "linear" and qualified_name(node.target) in LINEARS:
        return _linear(node)
    if operator_kind == "attention":
        return _attention(node, attention)
    if operator_kind == "norm":
        return _norm(node)
    if not attention and is_attention(node):
        return 0
    return _matmul(node)


def _counted(node: fx.Node, count: Handle) -> int:
    """What the user's handle says."""

    def shapes(value: Any) -> Any:
        return map_leaves(lambda leaf: leaf.meta.get("shape", ()) if isinstance(leaf, fx.Node) else leaf, value)

    parts = [user for user in node.users if user.target is operator.getitem]
    several = tuple(shapes(part) for part in sorted(parts, key=lambda part: int(str(part.args[1]))))
    macs = count(tuple(map(shapes, _arguments(node))), node.meta.get("shape", several))
    if not is_whole(macs, 0):
        raise CountError(
            "an operator's handle returns its MACs, a whole number from 0 on",
            seen={"operator": operator_name(node), "returned": repr(macs)},
            do="return an int",
        )
    return macs


# -- counting -------------------------------------------------------------------------------------------------------


def _convolution(node: fx.Node) -> int:
    arguments = _arguments(node)
    x, weight, out = _shape(node, arguments[0]), _shape(node, arguments[1]), _out(node)
    if len(x) < len(weight):  # unbatched
        x, out = (1, *x), (1, *out)
    transposed = CONVOLUTIONS[qualified_name(node.target)]
    if transposed is None:
        transposed = bool(arguments[6])
    return int(_fvcore("conv_flop_count")(x, weight, out, transposed=transposed))


def _linear(node: fx.Node) -> int:
    arguments = _arguments(node)
    x, weight = _shape(node, arguments[0]), _shape(node, arguments[1])
    return int(_fvcore("linear_flop_jit")([_Value(x), _Value((1, *weight)[-2:])], []))


def _matmul(node: fx.Node) -> int:
    name, arguments = qualified_name(node.target), _arguments(node)
    if name == "aten::einsum":
        return _einsum(arguments[0], [_shape(node, operand) for operand in arguments[1]], arguments[2])
    if name == "aten::inner":
        a = _shape(node, arguments[0])
        return math.prod((*_out(node), *a[-1:]))
    if name == "aten::tensordot":
        a = _shape(node, arguments[0])
        return math.prod((*_out(node), *(a[axis] for axis in arguments[2])))
    left, right = MATMULS[name]
    a, b = _shape(node, arguments[left]), _shape(node, arguments[right])
    a, b = (a if len(a) > 1 else (1, *a)), (b if len(b) > 1 else (*b, 1))  # a vector is a row or a column
    pairs = itertools.zip_longest(reversed(a[:-2]), reversed(b[:-2]), fillvalue=1)
    batch = math.prod(max(pair) for pair in pairs)  # batch axes broadcast
    return int(_fvcore("matmul_flop_jit")([_Value((batch, *a[-2:])), _Value((batch, *b[-2:]))], []))


def _einsum(equation: str, shapes: Sequence[Shape], path: Sequence[int] | None) -> int:
    """Exact, pair by pair as torch contracts; a pair that shares no summed index is an elementwise product, no MAC.

    fvcore's handle knows two equations; for any other it reads the count that numpy prints, of four digits.
    """
    terms, _, out = equation.replace(" ", "").partition("->")
    operands, axes = [], 0  # label → size of each operand; broadcast axes are numbered from the last
    for term, shape in zip(terms.split(","), shapes, strict=True):
        before, dots, after = term.partition("...")
        free = len(shape) - len(before) - len(after)
        axes = max(axes, free if dots else 0)
        operands.append(dict(zip([*before, *map(str, range(free, 0, -1)), *after], shape, strict=True)))
    letters = out.replace(".", "") if "->" in equation else [x for x in terms if x.isalpha() and terms.count(x) == 1]
    labels = {*letters, *map(str, range(1, axes + 1))}
    macs = 0
    while len(operands) > 1:
        pair = (0, len(operands) - 1 if len(operands) < len(shapes) else 1)
        if path is not None:
            pair, path = (path[0], path[1]), path[2:]
        b, a = (operands.pop(k) for k in sorted(pair, reverse=True))
        later = labels.union(*operands)
        sizes = {label: max(a.get(label, 1), b.get(label, 1)) for label in {*a, *b}}
        summed = {label for label in a if a[label] != 1 and b.get(label, 1) != 1} - later
        if summed:
            macs += math.prod(size for label, size in sizes.items() if label in later or label in summed)
        operands.append({label: size for label, size in sizes.items() if label in later})
    return macs


def _attention(node: fx.Node, products: bool) -> int:
    name, arguments = qualified_name(node.target), _arguments(node)
    if name in BLOCKS:
        return _block(node, arguments, products, encoder=name.endswith("fwd"))
    if not products:
        return 0
    q, k, v = (_shape(node, value) for value in arguments[:3])
    if name not in LENGTH_FIRST:
        return math.prod(_out(node)[:-1]) * k[-2] * (q[-1] + v[-1])
    if len(q) != 4 or arguments[3 if "flash" in name else 4] is not None:
        raise CountError(
            "attention over packed sequences of different lengths cannot be counted from shapes",
            seen={"operator": operator_name(node), "query": q},
            do="trace the model with padded, batched sequences",
        )
    return math.prod(q[:-1]) * k[1] * (q[-1] + v[-1])


def _block(node: fx.Node, arguments: Sequence[Any], products: bool, *, encoder: bool) -> int:
    """`nn.MultiheadAttention` or `nn.TransformerEncoderLayer` as one operator, as torch runs them in evaluation."""
    q, k, v = [_shape(node, arguments[0])] * 3 if encoder else [_shape(node, value) for value in arguments[:3]]
    rows, width = math.prod(q[:-1]), q[-1]
    macs = (2 * rows + math.prod(k[:-1]) + math.prod(v[:-1])) * width**2  # projections of query, output, key, value
    if encoder:
        macs += rows * sum(math.prod(_shape(node, arguments[weight])) for weight in (14, 16))
    return macs + 2 * rows * k[-2] * width if products else macs


def _norm(node: fx.Node) -> int:
    weight, training = NORMS[qualified_name(node.target)]
    arguments = _arguments(node)
    values = [_Value(None) for _ in range(6)]
    values[0] = _Value((1, math.prod(_shape(node, arguments[0]))))  # the handle refuses more than five axes
    values[1] = _Value(None if arguments[weight] is None else (1,))
    if training is None:
        return int(_fvcore("norm_flop_counter")(1)(values, []))
    values[5] = _Value(None, bool(training >= 0 and arguments[training]))
    return int(_fvcore("batchnorm_flop_jit")(values, []))


def _arguments(node: fx.Node) -> list[Any]:
    """The operator's arguments in its schema's order, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    arguments = schema.arguments[len(node.args) :] if schema is not None else ()
    return [*node.args, *(node.kwargs.get(value.name, value.default_value) for value in arguments)]


def _shape(node: fx.Node, value: Any) -> Shape:
    shape = value.meta.get("shape") if isinstance(value, fx.Node) else None
    if shape is None:
        raise CountError(
            "an operator's MACs follow from the recorded shapes of its tensors",
            seen={"operator": operator_name(node), "in": node.meta.get("module", "") or "the root", "operand": value},
            do="trace a call with plain, dense tensors",
        )
    return tuple(shape)


def _out(node: fx.Node) -> Shape:
    """Shape of the first output; operators with several are followed by `getitem` nodes that hold them."""
    if "shape" in node.meta:
        return tuple(node.meta["shape"])
    first = next((user for user in node.users if user.target is operator.getitem and user.args[1] == 0), None)
    return _shape(node, first)
