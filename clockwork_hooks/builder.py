"""Make regions of one trace: from an exit and the set of nodes inside to what is skipped, captured and saved."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from typing import Any, Literal

import torch
from torch import nn

from clockwork_hooks.bindings import TensorSpec
from clockwork_hooks.boundary import Boundary, Region, Side
from clockwork_hooks.dominance import Dominance
from clockwork_hooks.embeddings import Embeddings
from clockwork_hooks.graph import Trace, module_paths
from clockwork_hooks.levels import Levels
from clockwork_hooks.macs import node_macs, operator_name
from clockwork_hooks.passes import Plan, Port, SkippedCall, Slot
from clockwork_hooks.recorder import ModuleCall
from clockwork_hooks.tree import leaves, map_leaves

__all__ = ["Builder"]


class Builder:
    """Makes regions of one trace from an exit and the set of nodes inside."""

    def __init__(self, trace: Trace, unet: nn.Module, dom: Dominance, levels: Levels) -> None:
        self.trace, self.unet, self.dom, self.levels = trace, unet, dom, levels
        self.macs = [node_macs(node) for node in trace.nodes]
        self._producers: dict[int, list[ModuleCall]] = {}
        for call in trace.calls:
            if call.path:
                for spec in self.tensors(call.output):
                    self._producers.setdefault(spec.node.meta["index"], []).append(call)
        self._writers: dict[Any, list[int]] = {}  # storage → nodes that write to it in place
        for n, node in enumerate(trace.nodes):
            if "was" in node.meta and node.meta.get("storage") is not None:
                self._writers.setdefault(node.meta["storage"], []).append(n)
        named = module_paths(unet)
        self._modules = {named[id(module)]: module for module in unet.modules() if id(module) in named}
        self._total_macs = sum(self.macs)
        self._total_weights = sum(parameter.numel() for parameter in unet.parameters())
        self.embeddings = Embeddings(trace, dom)

    @staticmethod
    def tensors(value: Any) -> list[TensorSpec]:
        """The recorded tensors of a call's inputs or output."""
        return [leaf for _, leaf in leaves(value) if isinstance(leaf, TensorSpec)]

    def name(self, n: int) -> str:
        """What to call node n: the innermost module that returns it, else its operator and where it ran."""
        node = self.trace.nodes[n]
        if n in self._producers:
            return str(self._producers[n][-1].path)
        if node.op != "call_function":
            return str(node.name)
        return f"{operator_name(node)} in {node.meta['module'] or 'the root'}"

    def region(self, o: int, inside: set[int], *, level: int, cut: str) -> Region | None:
        """The region that leaves through node o; None where no skippable module call returns it."""
        inside = {n for n in inside if self.trace.nodes[n].op != "placeholder"}
        skipped = self._skippable(inside)
        last = next((c for c in skipped if any(s.node.meta["index"] == o for s in self.tensors(c.output))), None)
        if last is None:
            return None
        run = {index for call in skipped for index in range(call.first, call.last)}
        edges, side_nodes = self.dom.crossing(inside)
        entry_nodes = sorted({u for u, _ in edges})
        if not entry_nodes:
            return None
        size = {u: self.levels.positions(self.trace.nodes[u]) or 0 for u in entry_nodes}
        entry = max(entry_nodes, key=lambda u: (size[u], u))
        sides = tuple(self._side(n) for n in side_nodes if not self.trace.nodes[n].meta.get("constant"))
        plan = self._plan(skipped, last, o, entry, sides, run)
        macs, total = sum(self.macs[n] for n in run), self._total_macs or 1
        weights, all_weights = self._parameters(skipped), self._total_weights or 1
        left = Counter(
            operator_name(self.trace.nodes[n])
            for n in inside - run
            if self.dom.dep[n] and self.trace.nodes[n].op == "call_function"
        )
        entries = tuple(self._boundary(u) for u in entry_nodes)
        exit = self._boundary(o)
        by_level = self._by_level(run, size[entry])
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
            fingerprint=self._fingerprint(entries, exit, plan),
            plan=plan,
            signature=self.trace.signature,
            residuals=self.dom.residuals(self.trace.inputs),
        )

    def _skippable(self, inside: set[int]) -> list[ModuleCall]:
        """Outermost registered calls with all their live operators inside, one at least depending on the sample."""
        outside, carrying = [0], [0]
        for n, node in enumerate(self.trace.nodes):
            counts = node.op == "call_function" and self.dom.live[n]
            outside.append(outside[-1] + (counts and n not in inside))
            carrying.append(carrying[-1] + (counts and n in inside and self.dom.dep[n]))
        chosen: list[ModuleCall] = []
        until = 0
        for call in self.trace.calls:
            whole = outside[call.last] == outside[call.first] and carrying[call.last] > carrying[call.first]
            if call.path and call.first >= until and whole:
                chosen.append(call)
                until = call.last
        return chosen

    def _plan(
        self, skipped: list[ModuleCall], last: ModuleCall, o: int, entry: int, sides: tuple[Side, ...], run: set[int]
    ) -> Plan:
        chosen = {call.index for call in skipped}
        paths = {call.path for call in skipped}
        visible: dict[int, int] = {}
        counts: dict[str, tuple[int, int]] = {}
        for call in self.trace.calls:
            if call.path is not None and call.path in paths:
                full, seen = counts.get(call.path, (0, 0))
                visible[call.index] = seen
                counts[call.path] = (full + 1, seen + self._visible(call, chosen))

        def slot(leaf: Any, call: ModuleCall) -> Any:
            if not isinstance(leaf, TensorSpec):
                return leaf
            n = leaf.node.meta["index"]
            return Slot(leaf.shape, leaf.dtype, leaf.device, call is last and n == o, self._written_later(n, run))

        def ports(*nodes: int) -> tuple[Port | None, int]:
            found = ((self._port(n, last, visible, chosen), n) for n in nodes)
            return next(((port, n) for port, n in found if port is not None), (None, -1))

        before = [c for c in self.trace.calls if c.last <= last.first and self._visible(c, chosen | {last.index})]
        made = [s.node.meta["index"] for c in before if c.index not in chosen for s in self.tensors(c.output)]
        text, n = ports(*self.embeddings.text(sides, made))
        mask = self.embeddings.mask(n) if text is not None and len(text.shape) == 3 else None
        found = {
            "entry": ports(entry)[0],
            "time": ports(*self.embeddings.time(sides, made))[0],
            "text": text,
            "mask": None if mask is None else ports(mask)[0],
        }

        def stand_in(call: ModuleCall) -> SkippedCall:
            output = map_leaves(lambda leaf: slot(leaf, call), call.output)
            return SkippedCall(str(call.path), call.ordinal, visible[call.index], output)

        return Plan(
            tuple(map(stand_in, skipped)),
            {name: port for name, port in found.items() if port is not None},
            counts,
        )

    def _port(self, n: int, last: ModuleCall, visible: dict[int, int], chosen: set[int]) -> Port | None:
        """Where node n can be picked up before the exit is needed: taken by a call (skipped ones first) or returned."""
        root, *begun = (c for c in self.trace.calls[: last.index + 1] if c.path is not None)
        calls = [c for c in begun if self._visible(c, chosen)]
        skipped = [c for c in calls if c.index in chosen]
        others = [c for c in calls if c.index not in chosen]
        ended = [c for c in others if c.last <= last.first]
        for side, among in (("input", skipped), ("input", others), ("output", ended), ("input", [root])):
            for call in among:
                value = call.inputs if side == "input" else call.output
                for k, (_, leaf) in enumerate(leaves(value)):
                    if isinstance(leaf, TensorSpec) and leaf.node.meta["index"] == n:
                        seen = visible.get(call.index, self._seen(call, chosen))
                        return Port(str(call.path), call.ordinal, seen, side, k, leaf.shape, leaf.dtype)  # type: ignore[arg-type]
        return None

    def _visible(self, call: ModuleCall, chosen: set[int]) -> bool:
        """Does this call happen in an adaptor pass?"""
        return all(around.index not in chosen for around in self.trace.ancestors(call))

    def _seen(self, call: ModuleCall, chosen: set[int]) -> int:
        earlier = [c for c in self.trace.calls[: call.index] if c.path == call.path]
        return sum(self._visible(c, chosen) for c in earlier)

    def _boundary(self, n: int) -> Boundary:
        node = self.trace.nodes[n]
        calls = sorted(self._producers.get(n, []), key=lambda call: -call.index)
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

    def _written_later(self, n: int, run: set[int]) -> bool:
        """Does code that still runs write to the storage of node n's tensor after it was made?"""
        storage = self.trace.nodes[n].meta.get("storage")
        return storage is not None and any(w > n and w not in run for w in self._writers.get(storage, ()))

    def _parameters(self, skipped: list[ModuleCall]) -> int:
        modules = [self._modules[call.path] for call in skipped if call.path in self._modules]
        return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())

    def _by_level(self, run: set[int], edge: int) -> tuple[tuple[tuple[int, ...], int, int], ...]:
        found: dict[int, list[int]] = {}
        order = sorted(n for n in run if self.macs[n])
        # Text keys and the like are no feature maps: they count where the operators before them work.
        known = [(n, self.levels.positions(self.trace.nodes[n]) if self.dom.dep[n] else None) for n in order]
        # Heads times tokens can look like a level above the edge; only padding, which a convolution shows, is one.
        known = [(n, p if p and (p <= edge or self.levels.is_spatial(self.trace.nodes[n])) else None) for n, p in known]
        floor = min((p for n, p in known if p and self.levels.is_spatial(self.trace.nodes[n])), default=0)
        turn = max((n for n, p in known if p == floor), default=0)
        at = next((p for _, p in known if p and p >= floor), floor)
        for n, p in known:
            at = p if p and p >= floor else at
            arms = found.setdefault(at, [0, 0])
            arms[n > turn] += self.macs[n]
        return tuple((self.levels.spatial.get(p, ()), *found[p]) for p in sorted(found, reverse=True))  # type: ignore[misc]

    def _fingerprint(self, entries: tuple[Boundary, ...], exit: Boundary, plan: Plan) -> str:
        def port(boundary: Boundary) -> list[Any]:
            return [boundary.path, boundary.call, self.levels.channels(self.trace.nodes[boundary.node])]

        told = [[port(e) for e in entries], port(exit), [[c.path, c.ordinal] for c in plan.skipped]]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
