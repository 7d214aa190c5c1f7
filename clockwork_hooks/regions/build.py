"""Make regions of one trace: from an exit and the set of nodes inside to what is skipped, captured and saved.

The plan of an adaptor pass: what stands in for each skipped call, and where the boundary is picked up.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from clockwork_hooks._tree import leaves, map_leaves
from clockwork_hooks.graph.bindings import TensorSpec
from clockwork_hooks.graph.operators import operator_name
from clockwork_hooks.graph.recorder import ModuleCall
from clockwork_hooks.graph.tracing import Trace, module_paths
from clockwork_hooks.regions.cut import CutPlan, Port, SkippedCall, Slot
from clockwork_hooks.regions.dominance import Dominance, Mask
from clockwork_hooks.regions.embeddings import Embeddings
from clockwork_hooks.regions.levels import Levels
from clockwork_hooks.regions.region import Boundary, Region, Side

__all__ = ["Builder", "Planner"]

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
    ) -> CutPlan:
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
        return CutPlan(
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


class Builder:
    """Makes regions of one trace from an exit and the set of nodes inside."""

    def __init__(self, trace: Trace, unet: nn.Module, dom: Dominance, levels: Levels) -> None:
        self.trace, self.unet, self.dom, self.levels = trace, unet, dom, levels
        self.macs = trace.macs
        self.embeddings = Embeddings(trace, dom)
        self._planner = Planner(trace, dom, self.embeddings)
        self._producers = self._planner.producers()
        named = module_paths(unet)
        self._modules = {named[id(module)]: module for module in unet.modules() if id(module) in named}
        self._total_macs = sum(self.macs)
        self._total_weights = sum(parameter.numel() for parameter in unet.parameters())
        self._residuals = dom.residuals(trace.inputs)
        self._weights: dict[str, dict[int, int]] = {}
        self._operator = np.array([node.op == "call_function" for node in trace.nodes])
        self._input = np.array([node.op == "placeholder" for node in trace.nodes])
        self._work = np.array(self.macs, dtype=np.int64)
        self._working = np.flatnonzero(self._work > 0)
        self._at = np.array(levels.at, dtype=np.int64)
        self._first, self._last = (np.array([getattr(call, end) for call in trace.calls]) for end in ("first", "last"))
        self._named = np.array([bool(call.path) for call in trace.calls])

    @staticmethod
    def tensors(value: Any) -> list[TensorSpec]:
        """The recorded tensors of a call's inputs or output."""
        return [leaf for _, leaf in leaves(value) if isinstance(leaf, TensorSpec)]

    def returned(self, n: int) -> bool:
        """Does a registered module return node n?"""
        return n in self._producers

    def name(self, n: int) -> str:
        """What to call node n: the innermost module that returns it, else its operator and where it ran."""
        node = self.trace.nodes[n]
        if n in self._producers:
            return str(self._producers[n][-1].path)
        if node.op != "call_function":
            return str(node.name)
        return f"{operator_name(node)} in {node.meta['module'] or 'the root'}"

    def region(self, o: int, nodes: Iterable[int], *, level: int, cut: str) -> Region | None:
        """The region that leaves through node o; None where no skippable module call returns it."""
        if o not in self._producers:
            return None
        inside = self.dom.mask(nodes) & ~self._input
        skipped = self._skippable(inside)
        returning = {call.index for call in self._producers[o]}
        last = next((call for call in skipped if call.index in returning), None)
        if last is None:
            return None
        run = np.zeros_like(inside)
        for call in skipped:
            run[call.first : call.last] = True
        edges, side_nodes = self.dom.crossing(inside)
        entry_nodes = sorted({u for u, _ in edges})
        if not entry_nodes:
            return None
        size = {u: self.levels.positions(self.trace.nodes[u]) or 0 for u in entry_nodes}
        entry = max(entry_nodes, key=lambda u: (size[u], u))
        sides = tuple(self._side(n) for n in side_nodes if not self.trace.nodes[n].meta.get("constant"))
        cut_plan = self._planner.plan(skipped, last, o, entry, sides, run)
        macs, total = int(self._work[run].sum()), self._total_macs or 1
        weights, all_weights = self._parameters(skipped), self._total_weights or 1
        left = Counter(
            operator_name(self.trace.nodes[n])
            for n in np.flatnonzero(inside & ~run & self.dom.depends & self._operator).tolist()
        )
        entries = tuple(self._boundary(u) for u in entry_nodes)
        exit = self._boundary(o)
        by_level = self._by_level(run)
        return Region(
            model=self.trace.model,
            entry=next(e for e in entries if e.node == entry),
            exit=exit,
            entries=entries,
            sides=sides,
            level=level,
            cut=cut,
            resolution=self.levels.spatial.get(size[entry], self.trace.nodes[entry].meta["shape"][2:]),
            bottleneck=next((space for space, *_ in reversed(by_level) if math.prod(space) > 1), ()),
            leftover=tuple(sorted(left.items())),
            sample=self.trace.sample,
            times=self.trace.times,
            full_macs=total,
            macs=macs,
            macs_share=macs / total,
            parameters=weights,
            parameter_share=weights / all_weights,
            by_level=by_level,
            fingerprint=self._fingerprint(entries, exit, cut_plan),
            cut_plan=cut_plan,
            signature=self.trace.signature,
            residuals=self._residuals,
        )

    def without(self, region: Region, needed: set[int]) -> Region | None:
        """The same region, but calls with a node of `needed` run; None if none is left that returns the exit."""
        wanted = {(call.path, call.ordinal) for call in region.skipped}
        inside = np.zeros(len(self.trace.nodes), dtype=bool)
        for call in self.trace.calls:
            if (call.path, call.ordinal) in wanted:
                inside[call.first : call.last] = True
        inside[list(needed)] = False
        skipped = self._skippable(inside & ~self._input)
        returning = {call.index for call in self._producers.get(region.exit.node, ())}
        last = next((call for call in skipped if call.index in returning), None)
        if last is None:
            return None
        run = np.zeros_like(inside)
        for call in skipped:
            run[call.first : call.last] = True
        macs, weights = int(self._work[run].sum()), self._parameters(skipped)
        return replace(
            region,
            cut_plan=self._planner.plan(skipped, last, region.exit.node, region.entry.node, region.sides, run),
            macs=macs,
            macs_share=macs / (self._total_macs or 1),
            parameters=weights,
            parameter_share=weights / (self._total_weights or 1),
            by_level=self._by_level(run),
            inner=None,
        )

    def _skippable(self, inside: Mask) -> list[ModuleCall]:
        """Outermost registered calls with all their live operators inside, one at least depending on the sample."""
        counts = self._operator & self.dom.lives
        outside = np.concatenate([[0], np.cumsum(counts & ~inside)])
        carrying = np.concatenate([[0], np.cumsum(counts & inside & self.dom.depends)])
        whole = (outside[self._last] == outside[self._first]) & (carrying[self._last] > carrying[self._first])
        found = np.flatnonzero(self._named & whole)
        starts, chosen, k = self._first[found].tolist(), [], 0  # calls are in order of their beginning
        while k < len(starts):
            chosen.append(self.trace.calls[found[k]])
            k = bisect_left(starts, chosen[-1].last, k + 1)
        return chosen

    def _boundary(self, n: int) -> Boundary:
        node = self.trace.nodes[n]
        calls = self._producers.get(n, [])[::-1]
        return Boundary(
            path=self.name(n),
            call=calls[0].ordinal if calls else 0,
            paths=tuple(str(call.path) for call in calls),
            shape=node.meta["shape"],
            dtype=node.meta["dtype"],
            resolution=self.levels.resolution(node) or tuple(node.meta["shape"][2:]),
            node=n,
        )

    def _side(self, n: int) -> Side:
        node = self.trace.nodes[n]
        inputs = self.embeddings.inputs(n)
        kind: Literal["time", "context", "constant"] = "context" if inputs else "constant"
        if set(inputs) & set(self.trace.times[:1]):
            kind = "time"
        path = self.name(n) if n in self._producers else str(node.meta["module"])
        return Side(kind, inputs, path, node.meta.get("shape", ()), node.meta.get("dtype", torch.float32), n)

    def _parameters(self, skipped: list[ModuleCall]) -> int:
        found: dict[int, int] = {}
        for path in {str(call.path) for call in skipped}:
            if path not in self._weights:
                module = self._modules.get(path)
                self._weights[path] = {id(p): p.numel() for p in module.parameters()} if module is not None else {}
            found |= self._weights[path]
        return sum(found.values())

    def _by_level(self, run: Mask) -> tuple[tuple[tuple[int, ...], int, int], ...]:
        """(spatial shape, MACs on the way down, MACs on the way up), widest first."""
        nodes = self._working[run[self._working]]
        at = self._at[nodes]
        turn = nodes[at == at[at > 0].min()].max() if at.any() else 0  # the last one of the lowest level
        rows = []
        for p in sorted(set(at.tolist()), reverse=True):
            down, up = (int(self._work[nodes[(at == p) & arm]].sum()) for arm in (nodes <= turn, nodes > turn))
            rows.append((self.levels.spatial.get(p, ()), down, up))
        return tuple(rows)

    def _fingerprint(self, entries: tuple[Boundary, ...], exit: Boundary, cut_plan: CutPlan) -> str:
        def port(boundary: Boundary) -> list[Any]:
            node = self.trace.nodes[boundary.node]  # an operator has another name in another mode: its scope has not
            path = boundary.path if boundary.paths else f"in {node.meta['module']}"
            return [path, boundary.call, self.levels.channels(self.trace.nodes[boundary.node])]

        told = [[port(e) for e in entries], port(exit), [[c.path, c.ordinal] for c in cut_plan.skipped]]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
