"""What of a recorded call holds at other sizes: the order of its module calls, and a formula for its MACs.

A convolution, a linear layer or a norm costs so much for each number that it returns; an attention product so much for
each pair of a query's and a key's. So the sizes of what the module calls return tell the MACs, if every operator that
multiplies is one of these and belongs to such a call. Where one is not, there is no formula, and no guess.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from clockwork_hooks._tree import leaves
from clockwork_hooks.graph.bindings import TensorSpec
from clockwork_hooks.graph.operators import (
    CONVOLUTIONS,
    LENGTH_FIRST,
    SOFTMAXES,
    VIEWS,
    handle_of,
    kind,
    qualified_name,
)
from clockwork_hooks.graph.recorder import ModuleCall
from clockwork_hooks.graph.tracing import Trace

__all__ = ["Scaling"]

_SPLITS = frozenset(
    {"aten::split", "aten::chunk", "aten::split_with_sizes", "aten::unsafe_split", "aten::unsafe_chunk"}
)
_NORMS = frozenset({"aten::native_layer_norm", "aten::native_group_norm", "aten::layer_norm", "aten::group_norm"})
_SPREADS = frozenset({"aten::expand", "aten::repeat", "aten::slice", "aten::select", "aten::as_strided"})
_FARTHEST = 64  # operators between a product and the module call that its operand comes from


@dataclass(frozen=True, slots=True)
class _Pairs:
    """An attention product: so many MACs for each pair of a query's and a key's numbers, in each row of the queries.

    Attributes:
        call: index of the module call that it is in.
        macs: as traced.
        query, key: indices of the module calls that return what queries and keys are made of.
    """

    call: int
    macs: int
    query: int
    key: int


class Scaling:
    """The module calls of a trace in the order in which they return, and MACs by the sizes of what they return.

    Attributes:
        order: indices of the trace's module calls, without the root's.
        modules: for each of these the `id` of its module; 0 where it is not registered.
        at: (path, which of the module's calls) → its place in `order`.
    """

    def __init__(self, trace: Trace) -> None:
        self._parents = [call.parent for call in trace.calls]
        self.order = _returning(trace.calls)
        self.modules = tuple(trace.calls[index].module if trace.calls[index].path else 0 for index in self.order)
        named = ((k, trace.calls[index]) for k, index in enumerate(self.order))
        self.at = {(call.path, call.ordinal): k for k, call in named if call.path}
        self._place = {index: k for k, index in enumerate(self.order)}
        self._shapes = [_shape(call) for call in trace.calls]
        self._sizes = [math.prod(shape) if shape else 0 for shape in self._shapes]
        self._rates = np.zeros(len(trace.calls), dtype=np.int64)  # MACs for each number that a call returns
        self._pairs: list[_Pairs] = []

    @classmethod
    def of(cls, trace: Trace) -> Scaling | None:
        """The formula of this trace; None where some operator's MACs follow from no module call."""
        scaling = cls(trace)
        sources = _Sources(trace)
        whole = all(
            scaling._add(node, macs, sources) for node, macs in zip(trace.nodes, trace.macs, strict=True) if macs
        )
        return scaling if whole else None

    def _add(self, node: fx.Node, macs: int, sources: _Sources) -> bool:
        """Add one operator's term."""
        if handle_of(node) is not None:
            return False
        operator_kind = kind(node)
        if operator_kind in ("attention", "matmul"):
            ends = sources.pair(node)
            if ends is None or not all(self._sizes[end] for end in ends):
                return False
            self._pairs.append(_Pairs(node.meta["call"], macs, *ends))
            return True
        transposed = CONVOLUTIONS.get(qualified_name(node.target), False)
        transposed = bool(node.args[6]) if transposed is None and len(node.args) > 6 else transposed
        call: int | None = int(node.meta["call"])
        if transposed or call is None or self._sizes[call] != math.prod(node.meta.get("shape", (0,))):
            operand = next(iter(node.all_input_nodes), None)
            through = transposed or operator_kind == "linear"
            call = sources.of(operand if through else node) if operand is not None else None
        if not call or not self._sizes[call] or macs % self._sizes[call]:
            return False
        self._rates[call] += macs // self._sizes[call]
        return True

    def macs(self, shapes: Sequence[Sequence[int]], calls: frozenset[int] | None = None) -> int | None:
        """MACs at other sizes.

        Args:
            shapes: of the first tensor that each call returns, in the order of `order`; () where it returns none.
            calls: indices of the calls whose operators count; None for all.

        Returns:
            MACs; None where the formula gives no whole number, so that it is not the right one.
        """
        rates: NDArray[np.int64] = self._rates[list(self.order)]
        if calls is not None:
            rates = np.where([index in calls for index in self.order], rates, 0)
        sizes = [math.prod(shape) if shape else 0 for shape in shapes]
        total = int(np.dot(rates, np.array(sizes, dtype=np.int64)))
        for pairs in self._pairs:
            if calls is not None and pairs.call not in calls:
                continue
            query, key = self._place[pairs.query], self._place[pairs.key]
            above = pairs.macs * sizes[query] * sizes[key] * self._shapes[pairs.query][0]
            below = self._sizes[pairs.query] * self._sizes[pairs.key] * (shapes[query][0] if sizes[query] else 0)
            if not below or above % below:
                return None
            total += above // below
        return total

    def inside(self, path: str, ordinal: int) -> frozenset[int]:
        """Indices of a call and of all calls within it."""
        around = self.order[self.at[path, ordinal]]
        within = {around}
        for index in range(around + 1, len(self._parents)):  # calls are in order of their beginning
            if self._parents[index] not in within:
                break
            within.add(index)
        return frozenset(within)


class _Sources:
    """Which module call returned the numbers that an operator takes, through views and operators on single numbers?"""

    def __init__(self, trace: Trace) -> None:
        self._calls = trace.calls
        self._batch = trace.inputs[trace.sample].meta["shape"][0]
        self._returned: dict[fx.Node, int] = {}
        for call in trace.calls[1:]:
            first = next((leaf for _, leaf in leaves(call.output) if isinstance(leaf, TensorSpec)), None)
            if first is not None:
                self._returned[first.node] = call.index  # the innermost begins last

    def of(self, node: fx.Node) -> int | None:
        """The call whose first output this node's numbers are, or a fixed share of them."""
        return self._walk(node, through=False)

    def _walk(self, node: fx.Node, *, through: bool) -> int | None:
        """`through`: also through the product that a softmax was taken of, to its queries."""
        here: fx.Node | None = node
        for _ in range(_FARTHEST):
            if here is None or here in self._returned:
                return None if here is None else self._returned[here]
            here = self._before(here, through=through)
        return None

    def _before(self, node: fx.Node, *, through: bool) -> fx.Node | None:
        """The node that this one's numbers come from, one for one, or in parts of a fixed number."""
        if node.op != "call_function":
            return None
        name, operands = qualified_name(node.target), node.all_input_nodes
        if node.target is operator.getitem:
            whole = operands[0]
            if qualified_name(whole.target) == "aten::unbind":
                return whole.all_input_nodes[0] if self._takes_apart(whole) else None
            if qualified_name(whole.target) in _SPLITS | _NORMS:
                return whole.all_input_nodes[0] if _parts(node, whole.all_input_nodes[0]) else None
            return None
        if through and kind(node) == "matmul":
            return _factors(node)[0]
        if name == "aten::select":
            return operands[0] if self._takes_apart(node) else None
        alike = [source for source in operands if _numel(source) == _numel(node)]
        aligned = name in VIEWS or name in SOFTMAXES or name in _NORMS or torch.Tag.pointwise in node.target.tags  # type: ignore[union-attr]
        aligned = aligned or name in ("aten::baddbmm", "aten::dropout", "aten::native_dropout")
        return alike[0] if aligned and alike and name not in _SPREADS | {"aten::baddbmm"} else self._spread(node, name)

    def _takes_apart(self, node: fx.Node) -> bool:
        """Does it take queries, keys and values (or keys and values) apart, which are no rows of the batch?"""
        source, axis = node.all_input_nodes[0], node.args[1] if len(node.args) > 1 else 0
        size = source.meta["shape"][axis] if isinstance(axis, int) else 0
        return size in (2, 3) and size != self._batch

    def _spread(self, node: fx.Node, name: str) -> fx.Node | None:
        """An `expand` that leaves the shape as it is (attention by hand makes one) is a view."""
        source = next(iter(node.all_input_nodes), None)
        same = source is not None and source.meta.get("shape") == node.meta.get("shape")
        return source if same and name in ("aten::expand", "aten::slice") else None

    def pair(self, node: fx.Node) -> tuple[int, int] | None:
        """The calls that return queries and keys (or probabilities' queries, and values); None for other products."""
        query, key = _factors(node)
        if query is None or key is None:
            return None
        one, other = self._walk(query, through=True), self._walk(key, through=False)
        if one is None or other is None:
            return None
        rows, columns = self._tokens(one), self._tokens(other)
        if kind(node) == "attention":
            axis = -3 if qualified_name(node.target) in LENGTH_FIRST else -2
            fits = query.meta["shape"][axis] in rows and key.meta["shape"][axis] in columns
            return (one, other) if fits else None
        (*_, length, inner), (*_, width) = query.meta["shape"], key.meta["shape"]
        first = length in rows and width in columns and inner not in rows | columns
        second = length in rows and inner in columns and width not in rows | columns
        return (one, other) if first is not second else None

    def _tokens(self, call: int) -> set[int]:
        """How many tokens each row of what the call returns may have: of three axes, either of the last two."""
        shape = _shape(self._calls[call])
        return set(shape[1:]) if len(shape) == 3 else {math.prod(shape[2:])} if len(shape) > 3 else set()


def _returning(calls: Sequence[ModuleCall]) -> tuple[int, ...]:
    """The calls in the order in which they return, without the root's."""
    order, opened = [], [0]
    for call in calls[1:]:
        while opened[-1] != call.parent:
            order.append(opened.pop())
        opened.append(call.index)
    return (*order, *opened[:0:-1])


def _shape(call: ModuleCall) -> tuple[int, ...]:
    """Shape of the first tensor that a call returns; () where it returns none."""
    first = next((leaf for _, leaf in leaves(call.output) if isinstance(leaf, TensorSpec)), None)
    return () if first is None else first.shape


def _numel(node: fx.Node) -> int:
    return math.prod(node.meta.get("shape", (0,)))


def _parts(part: fx.Node, whole: fx.Node) -> bool:
    """Is it the whole, or one of a few parts of equal size?"""
    size = _numel(part)
    return bool(size) and _numel(whole) % size == 0 and _numel(whole) // size <= 4


def _factors(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The two tensors whose products an attention operator or a matrix product sums up."""
    at = 1 if qualified_name(node.target) in ("aten::baddbmm", "aten::addbmm", "aten::addmm") else 0
    one, other = (node.args[k] if len(node.args) > k else None for k in (at, at + 1))
    return (one if isinstance(one, fx.Node) else None), (other if isinstance(other, fx.Node) else None)
