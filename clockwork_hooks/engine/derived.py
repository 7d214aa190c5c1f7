"""A signature that differs from a recorded one in sizes alone: its plan is taken over, and proved by what calls do.

Control flow may depend on sizes, so nothing is taken on trust. The first call of such a signature runs in full, and the
module calls in it are compared with the recorded ones, one by one; they give the sizes. The first adaptor pass runs on
placeholders that pass themselves on (taint.py): what is made of one is one, whatever operators the UNet puts between
its modules. If none of them reaches the output, nor the adaptor, nor memory that is real, the output has come of the
inputs and of the exit alone, and so will that of the passes after it. Any doubt: the pass is run again in full, and the
signature is recorded like a first one.

A convolution, a linear layer or a norm costs so much for each number that it returns; an attention product so much for
each pair of a query's and a key's. So the sizes of what the module calls return tell the MACs (`Scaling`), if every
operator that multiplies is one of these and belongs to such a call. Where one is not, there is no formula, no guess.
"""

from __future__ import annotations

import contextlib
import math
import operator
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.module import register_module_forward_hook

from clockwork_hooks._tree import address, flat, leaf_at, map_leaves, tensors
from clockwork_hooks.engine.chain import RegionUse, Signature
from clockwork_hooks.errors import ArgumentError
from clockwork_hooks.graph.arguments import Arguments, time_candidates
from clockwork_hooks.graph.operators import (
    CONVOLUTIONS,
    LENGTH_FIRST,
    SOFTMAXES,
    VIEWS,
    handle_of,
    kind,
    qualified_name,
)
from clockwork_hooks.graph.recorder import ModuleCall, OperatorMode, specs_in, written_by
from clockwork_hooks.graph.tracing import Trace
from clockwork_hooks.regions.cut import CutPlan, Port, Same, SkippedCall, Slot

_ALIAS = torch.ops.aten.alias.default
_MOST_SIGNATURES = 64  # are kept
_MOST_DOUBTS = 2  # calls that were others at other sizes, until all such are recorded


def without_sizes(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """A call's key without its sizes: equal for calls that differ in these alone."""
    arguments, *modes = key
    return (*(len(part) if type(part) is torch.Size else part for part in arguments), *modes)


class Recorded:
    """What of a recorded signature holds at other sizes.

    Args:
        signature: as recorded.
        trace: of its first call.
        scaling: of the trace.
    """

    def __init__(self, signature: Signature, scaling: Scaling) -> None:
        self.signature, self.scaling = signature, scaling
        plans = [use.plan for use in signature.regions]
        self.outputs = {scaling.at[call.path, call.ordinal] for plan in plans for call in plan.skipped}
        ports = [port for plan in plans for port in plan.ports.values() if port.path]
        self.outputs |= {scaling.at[port.path, port.ordinal] for port in ports if port.side == "output"}
        self.inputs = {scaling.at[port.path, port.ordinal] for port in ports if port.side == "input"}

    @classmethod
    def of(cls, signature: Signature, trace: Trace) -> Recorded | None:
        """None where something was recorded that may be another at other sizes, and that calls would not show.

        So are arguments that are no conditions because of what operators did with them (they were only added, or not
        read), operators without a formula for their MACs, and kernels that no dispatcher sees.
        """
        if not signature.regions or trace.unread or any(use.region.residuals for use in signature.regions):
            return None
        if any(map(_unseen, trace.nodes)):
            return None
        scaling = Scaling.of(trace)
        return None if scaling is None else cls(signature, scaling)

    def fits(self, arguments: Arguments, time: str | None) -> bool:
        """Is the time of this call the same argument, and told by its name?"""
        try:
            times = time_candidates(arguments, sample=self.signature.sample, time=time)
        except ArgumentError:
            return False
        return times == (() if self.signature.time is None else (self.signature.time,))


@dataclass(slots=True)
class Derived(Signature):
    """A signature that differs in sizes alone from a recorded one; until it is `proved`, its plan is that one's.

    Attributes:
        source: the recorded one.
        seen: have the module calls of a full pass been compared?
    """

    source: Recorded | None = None
    seen: bool = False

    @classmethod
    def of(cls, source: Recorded) -> Derived:
        """The signature of a first call of other sizes; what calls have shown of the recorded one is not taken over."""
        before = source.signature
        uses = tuple(RegionUse(use.region, use.plan, 0, name=use.name) for use in before.regions)
        return cls(0, before.time, before.sample, uses, uncounted=before.uncounted, source=source, traced=False)

    @contextlib.contextmanager
    def watching(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[_Watch]:
        """Compare the module calls that the block makes in this thread."""
        assert self.source is not None
        watch = _Watch(self.source, args, kwargs)
        handle = register_module_forward_hook(watch, with_kwargs=True)
        try:
            with watch.left:
                yield watch
        finally:
            handle.remove()
            # torch forgets to take this off, and warns of it ever after
            getattr(nn_module, "_global_forward_hooks_with_kwargs", {}).pop(handle.id, None)


class Signatures:
    """What is known of the input signatures of an engine's calls, by the calls' keys.

    Of many, the one that no call has had for longest is let go.

    Attributes:
        recordings: how often calls of a key were recorded.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Signature] = {}
        self._unanalysed: dict[tuple[Any, ...], None] = {}  # in the recording of their calls something failed
        self._recorded: dict[tuple[Any, ...], Recorded] = {}  # by what of a key says nothing of sizes
        self._doubts: Counter[tuple[Any, ...]] = Counter()  # how often such calls were others at other sizes
        self._not_derived: dict[tuple[Any, ...], None] = {}  # their calls are others at their sizes
        self.recordings: Counter[tuple[Any, ...]] = Counter()

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[Signature]:
        """Those that are known now, whatever other threads add meanwhile."""
        return iter(list(self._known.values()))

    def get(self, key: tuple[Any, ...]) -> Signature | None:
        """That of a key; None where none is known."""
        return self._known.get(key)

    def used(self, signature: Signature) -> None:
        """A call has it: it is the last that is let go."""
        if len(self._known) > _MOST_SIGNATURES // 2:  # their order begins to matter
            _put_last(self._known, signature.key, signature)

    def put(self, key: tuple[Any, ...], signature: Signature) -> list[tuple[Any, ...]]:
        """Keep one: the keys of those that are let go for it."""
        signature.key = key
        oldest = _put_last(self._known, key, signature)
        for one in oldest:
            self.recordings.pop(one, None)
        return oldest

    def put_recorded(self, key: tuple[Any, ...], recorded: Recorded) -> None:
        """Calls like those of this key may be derived from it at other sizes."""
        _put_last(self._recorded, without_sizes(key), recorded)

    def recorded_for(self, key: tuple[Any, ...]) -> Recorded | None:
        """What such calls are derived from; None where nothing is, or where calls were others at other sizes."""
        doubted = key in self._not_derived or self._doubts[without_sizes(key)] >= _MOST_DOUBTS
        return None if doubted else self._recorded.get(without_sizes(key))

    def doubt(self, key: tuple[Any, ...]) -> None:
        """A call of a derived one was another: the next is recorded."""
        self._known.pop(key, None)
        _put_last(self._not_derived, key, None)
        self._doubts[without_sizes(key)] += 1

    def fail(self, key: tuple[Any, ...]) -> bool:
        """The recording of such a call failed: none is analysed from now on. Is it the first?"""
        first = not self._unanalysed
        self._known.pop(key, None)
        _put_last(self._unanalysed, key, None)
        return first

    def has_failed(self, key: tuple[Any, ...]) -> bool:
        """Has the recording of such a call failed?"""
        return key in self._unanalysed

    def forget(self) -> None:
        """Nothing of it holds any more; what remains is how often calls were recorded."""
        for table in (self._known, self._unanalysed, self._recorded, self._not_derived, self._doubts):
            table.clear()


def _put_last(table: dict[tuple[Any, ...], Any], key: tuple[Any, ...], value: Any) -> list[tuple[Any, ...]]:
    """Put it at the end of a table, from whose beginning what is too much is let go: the keys of that."""
    table.pop(key, None)
    table[key] = value
    oldest = list(table)[:-_MOST_SIGNATURES]
    for one in oldest:
        del table[one]
    return oldest


class Left(OperatorMode):
    """What of the tensors that a call makes of its inputs outlives it: a module may read it in the next step.

    A skipped module leaves nothing behind, so that what it left in the step before would be stale.

    Args:
        inputs: of the call.
    """

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        self._products = {id(tensor): weakref.ref(tensor) for tensor in tensors(inputs)}
        self._inputs = frozenset(self._products)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        of_inputs = any(map(self._comes_of_inputs, (*args, *kwargs.values())))
        out = func(*args, **kwargs)
        if of_inputs:
            self._add((out, *written_by(func, args, kwargs)))
        return out

    # What an operator takes and returns is a tensor or a list of them. `tensors` looks into containers of any kind, and
    # takes a third of what watching a call of a small SD costs.

    def _comes_of_inputs(self, value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return any(map(self._comes_of_inputs, value))
        product = self._products.get(id(value))
        return product is not None and product() is value

    def _add(self, values: Iterable[Any]) -> None:
        for one in values:
            if isinstance(one, torch.Tensor):
                self._products[id(one)] = weakref.ref(one)
            elif isinstance(one, (list, tuple)):
                self._add(one)

    def beside(self, unet: nn.Module, values: Any) -> bool:
        """Is anything left, beside these values? Where autograd keeps tensors too, only what modules hold counts."""
        beside = {address(tensor.untyped_storage()) for tensor in tensors(values) if _is_plain(tensor)}
        if torch.is_grad_enabled():
            held = [tensor for module in unet.modules() for tensor in tensors(dict(vars(module)))]
            left = [tensor for tensor in held if self._comes_of_inputs(tensor)]
        else:
            left = [tensor for tensor in (product() for product in self._products.values()) if tensor is not None]
        made = [tensor for tensor in left if id(tensor) not in self._inputs]
        return any(not _is_plain(tensor) or address(tensor.untyped_storage()) not in beside for tensor in made)


class _Watch:
    """A hook on all modules: are they called as recorded, and what do they return at these sizes?"""

    def __init__(self, recorded: Recorded, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.left = Left((args, kwargs))
        self._recorded, self._arguments = recorded, (args, kwargs)
        self._thread = threading.get_ident()
        self._shapes: list[tuple[int, ...]] = []
        self._outputs: dict[int, Any] = {}
        self._inputs: dict[int, list[Any]] = {}
        self.differs = False

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.differs or threading.get_ident() != self._thread:
            return
        k, modules = len(self._shapes), self._recorded.scaling.modules
        if k == len(modules) or (modules[k] and modules[k] != id(module)):
            self.differs = True
            return
        first = output if isinstance(output, torch.Tensor) else next(iter(tensors(output)), None)
        self._shapes.append(() if first is None else first.shape)
        if k in self._recorded.outputs:
            self._outputs[k] = map_leaves(_slot, output)
        if k in self._recorded.inputs:
            self._inputs[k] = [_slot(leaf) for leaf in flat((args, kwargs))]

    def apply(self, signature: Signature) -> bool:
        """Give a signature the sizes that were seen; False, and nothing is done, if calls were others than recorded."""
        recorded = self._recorded
        if self.differs or len(self._shapes) != len(recorded.scaling.modules):
            return False
        full = recorded.scaling.macs(self._shapes)
        pairs = list(zip(signature.regions, recorded.signature.regions, strict=True))
        plans = [self._plan(use.plan) for _, use in pairs]
        skipped = [self._skipped_macs(use.plan) for _, use in pairs]
        if full is None or None in plans or None in skipped:
            return False
        signature.full_macs = full
        for use, plan, macs in zip(signature.regions, plans, skipped, strict=True):
            use.plan, use.rest_macs = plan or use.plan, full - (macs or 0)
        return True

    def _skipped_macs(self, plan: CutPlan) -> int | None:
        scaling = self._recorded.scaling
        inside = frozenset[int]().union(*(scaling.inside(call.path, call.ordinal) for call in plan.skipped))
        return scaling.macs(self._shapes, inside)

    def _plan(self, plan: CutPlan) -> CutPlan | None:
        """The plan with these sizes; None where a call returns something else than the recorded one."""
        skipped = [self._skipped(call) for call in plan.skipped]
        ports = {name: self._port(port) for name, port in plan.ports.items()}
        if None in skipped or None in ports.values():
            return None
        return replace(
            plan, skipped=tuple(filter(None, skipped)), ports={n: p for n, p in ports.items() if p is not None}
        )

    def _skipped(self, call: SkippedCall) -> SkippedCall | None:
        output = self._outputs[self._recorded.scaling.at[call.path, call.ordinal]]
        recorded, now = (flat(value) for value in (call.output, output))
        if len(recorded) != len(now) or not all(map(_alike, recorded, now)):
            return None
        recorded_leaves = iter(recorded)

        def flagged(leaf: Any) -> Any:
            before = next(recorded_leaves)
            if isinstance(before, Same) or not isinstance(leaf, Slot):
                return before if isinstance(before, Same) else leaf
            return replace(leaf, exit=before.exit, written=before.written)

        return replace(call, output=map_leaves(flagged, output))

    def _port(self, port: Port) -> Port | None:
        if not port.path:
            leaf = _slot(leaf_at(self._arguments, port.leaf))
        else:
            k = self._recorded.scaling.at[port.path, port.ordinal]
            leaf = leaf_at((self._inputs if port.side == "input" else self._outputs)[k], port.leaf)
        same = isinstance(leaf, Slot) and len(leaf.shape) == len(port.shape) and leaf.dtype == port.dtype
        return replace(port, shape=leaf.shape) if same and isinstance(leaf, Slot) else None


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


def _unseen(node: fx.Node) -> bool:
    """Is it a tensor that code filled which no dispatcher sees?"""
    return node.target is _ALIAS and not all("was" in one.meta for one in node.meta.get("after", ()))


def _slot(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor) or leaf.is_nested:
        return leaf
    return Slot(tuple(leaf.shape), leaf.dtype, leaf.device)


def _alike(recorded: Any, now: Any) -> bool:
    """Are these leaves of two calls' outputs the same but for sizes?"""
    if isinstance(recorded, Same):
        return isinstance(now, Slot)
    if not isinstance(recorded, Slot) or not isinstance(now, Slot):
        return type(recorded) is type(now)
    return len(recorded.shape) == len(now.shape) and (recorded.dtype, recorded.device) == (now.dtype, now.device)


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
            for first in specs_in(call.output)[:1]:
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
    return next((spec.shape for spec in specs_in(call.output)), ())


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
