"""The plan of an adaptor pass: what stands in for each skipped call, and where the boundary is picked up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from clockwork_hooks.bindings import TensorSpec
from clockwork_hooks.boundary import Side
from clockwork_hooks.calls import ModuleCall
from clockwork_hooks.dominance import Dominance, Mask
from clockwork_hooks.embeddings import Embeddings
from clockwork_hooks.graph import Trace
from clockwork_hooks.skipping import Plan, Port, SkippedCall, Slot
from clockwork_hooks.tree import leaves, map_leaves

__all__ = ["Planner"]

Leaf = tuple[ModuleCall, int, TensorSpec]  # a call, and the k-th leaf of what it takes or returns


@dataclass(slots=True)
class _Skipping:
    """What one plan skips.

    Attributes:
        calls: skipped ones, outermost.
        chosen: their indices.
        last: the one that returns the exit.
        exit: its node.
        run: nodes of these calls.
        visible: how many calls of its module come before a call in an adaptor pass, for modules of skipped calls.
    """

    calls: list[ModuleCall]
    chosen: set[int]
    last: ModuleCall
    exit: int
    run: Mask
    visible: dict[int, int]


class Planner:
    """Makes the plans of one trace. What is asked of every region is looked up once: regions can be many."""

    def __init__(self, trace: Trace, dom: Dominance, embeddings: Embeddings) -> None:
        self.trace, self.embeddings = trace, embeddings
        self._root = next(call for call in trace.calls if call.path is not None)
        self._calls: dict[str, list[ModuleCall]] = {}  # of one module
        self._taken: dict[int, list[Leaf]] = {}  # node → where calls take it in, and where they return it
        self._given: dict[int, list[Leaf]] = {}
        for call in trace.calls:
            if call.path is not None:
                self._calls.setdefault(call.path, []).append(call)
            for value, found in ((call.inputs, self._taken), (call.output, self._given)):
                for k, (_, leaf) in enumerate(leaves(value)):
                    if isinstance(leaf, TensorSpec):
                        found.setdefault(_node(leaf), []).append((call, k, leaf))
        self._writers: dict[Any, list[int]] = {}  # storage → nodes that write to it in place
        for n, node in enumerate(trace.nodes):
            if "was" in node.meta and node.meta.get("storage") is not None:
                self._writers.setdefault(node.meta["storage"], []).append(n)
        self._conditions: dict[bool | None, list[tuple[ModuleCall, int]]] = {True: [], False: [], None: []}
        for n, given in self._given.items():
            if dom.live[n] and not dom.dep[n]:
                self._conditions[embeddings.is_time(n)] += [(call, n) for call, *_ in given]
        self._stand_ins: dict[tuple[int, int], SkippedCall] = {}

    def producers(self) -> dict[int, list[ModuleCall]]:
        """Node → the calls of registered modules that return it, the outermost first."""
        found = {n: [call for call, *_ in given if call.path] for n, given in self._given.items()}
        return {n: calls for n, calls in found.items() if calls}

    def plan(
        self, calls: list[ModuleCall], last: ModuleCall, exit: int, entry: int, sides: tuple[Side, ...], run: Mask
    ) -> Plan:
        """Skip these calls; `last` of them returns the exit, `run` are their nodes."""
        skip = _Skipping(calls, {call.index for call in calls}, last, exit, run, {})
        counts = self._count(skip)

        def ports(*nodes: int) -> tuple[Port | None, int]:
            found = ((self._port(n, skip), n) for n in nodes)
            return next(((port, n) for port, n in found if port is not None), (None, -1))

        text, n = ports(*self.embeddings.text(sides, self._made(skip, time=False)))
        mask = self.embeddings.mask(n) if text is not None and len(text.shape) == 3 else None
        found = {
            "entry": ports(entry)[0],
            "time": ports(*self.embeddings.time(sides, self._made(skip, time=True)))[0],
            "text": text,
            "mask": None if mask is None else ports(mask)[0],
        }
        return Plan(
            tuple(self._stand_in(call, skip) for call in calls),
            {name: port for name, port in found.items() if port is not None},
            counts,
        )

    def _count(self, skip: _Skipping) -> dict[str, tuple[int, int]]:
        """Calls of each skipped module in a full pass and in an adaptor pass."""
        counts = {}
        for path in sorted({str(call.path) for call in skip.calls}, key=lambda path: self._calls[path][0].index):
            seen = 0
            for call in self._calls[path]:
                skip.visible[call.index] = seen
                seen += self._visible(call, skip)
            counts[path] = len(self._calls[path]), seen
        return counts

    def _stand_in(self, call: ModuleCall, skip: _Skipping) -> SkippedCall:
        """What an adaptor pass does instead of this call; the same in many plans, unless somebody writes to it."""
        key = call.index, skip.visible[call.index]
        if call is not skip.last and key in self._stand_ins:
            return self._stand_ins[key]
        written = False

        def slot(leaf: Any) -> Any:
            nonlocal written
            if not isinstance(leaf, TensorSpec):
                return leaf
            n = _node(leaf)
            writers = self._writers.get(self.trace.nodes[n].meta.get("storage"), ())
            later = any(w > n and not skip.run[w] for w in writers)  # by code that still runs
            written = written or bool(writers)
            return Slot(leaf.shape, leaf.dtype, leaf.device, call is skip.last and n == skip.exit, later)

        made = SkippedCall(str(call.path), call.ordinal, key[1], map_leaves(slot, call.output))
        if call is not skip.last and not written:
            self._stand_ins[key] = made
        return made

    def _made(self, skip: _Skipping, *, time: bool) -> Iterator[int]:
        """Nodes from the time, or from other conditions, that calls of an adaptor pass return before the exit."""
        for call, n in self._conditions[time]:
            if call.last <= skip.last.first and call.index not in skip.chosen and self._visible(call, skip):
                yield n

    def _port(self, n: int, skip: _Skipping) -> Port | None:
        """Where node n can be picked up before the exit is needed: taken by a call (skipped ones first) or returned."""

        def begun(found: dict[int, list[Leaf]], *, skipped: bool) -> Iterator[Leaf]:
            for call, k, leaf in found.get(n, ()):
                if call.index > skip.last.index:
                    return
                fits = call.path is not None and call is not self._root and (call.index in skip.chosen) is skipped
                if fits and self._visible(call, skip):
                    yield call, k, leaf

        ways: tuple[tuple[Literal["input", "output"], Iterator[Leaf]], ...] = (
            ("input", begun(self._taken, skipped=True)),
            ("input", begun(self._taken, skipped=False)),
            ("output", (one for one in begun(self._given, skipped=False) if one[0].last <= skip.last.first)),
            ("input", (one for one in self._taken.get(n, ()) if one[0] is self._root)),
        )
        for side, among in ways:
            for call, k, leaf in among:
                return Port(str(call.path), call.ordinal, self._seen(call, skip), side, k, leaf.shape, leaf.dtype)
        return None

    def _visible(self, call: ModuleCall, skip: _Skipping) -> bool:
        """Does this call happen in an adaptor pass?"""
        return all(around.index not in skip.chosen for around in self.trace.ancestors(call))

    def _seen(self, call: ModuleCall, skip: _Skipping) -> int:
        """How many calls of its module come before it in an adaptor pass."""
        if call.index in skip.visible:
            return skip.visible[call.index]
        return sum(self._visible(other, skip) for other in self._calls[str(call.path)] if other.index < call.index)


def _node(spec: TensorSpec) -> int:
    return int(spec.node.meta["index"])
