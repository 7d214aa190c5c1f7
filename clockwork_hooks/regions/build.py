"""Make a region of one trace: from its exit and the nodes inside to what is skipped, picked up and saved."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from clockwork_hooks._tree import map_leaves
from clockwork_hooks.graph.bindings import TensorSpec
from clockwork_hooks.graph.operators import operator_name
from clockwork_hooks.graph.recorder import ModuleCall
from clockwork_hooks.regions.cut import CutPlan, Port, SkippedCall, Slot
from clockwork_hooks.regions.dominance import Mask
from clockwork_hooks.regions.facts import Facts, Leaf, index_of
from clockwork_hooks.regions.region import Boundary, Region, Side

__all__ = ["between", "build", "without"]


def build(facts: Facts, exit: int, nodes: Iterable[int], *, level: int, cut: str) -> Region | None:
    """The region that leaves through node `exit`; None where no skippable module call returns it."""
    if exit not in facts.producers:
        return None
    inside = facts.dominance.mask(nodes) & ~facts.input
    skipping = _skipping(facts, inside, exit)
    edges, side_nodes = facts.dominance.crossing(inside)
    if skipping is None or not edges:
        return None
    entry_nodes = sorted({u for u, _ in edges})
    entry = max(entry_nodes, key=lambda u: (facts.positions[u], u))
    entries = tuple(_boundary(facts, u) for u in entry_nodes)
    sides = tuple(_side(facts, n) for n in side_nodes if not facts.trace.nodes[n].meta.get("constant"))
    cut_plan = _cut_plan(facts, skipping, entry, sides)
    costs = _costs(facts, skipping)
    left = Counter(
        operator_name(facts.trace.nodes[n])
        for n in np.flatnonzero(inside & ~skipping.nodes & facts.dominance.depends & facts.operator).tolist()
    )
    leaving = _boundary(facts, exit)
    return Region(
        model=facts.trace.model,
        entry=next(e for e in entries if e.node == entry),
        exit=leaving,
        entries=entries,
        sides=sides,
        level=level,
        cut=cut,
        resolution=facts.levels.spatial.get(facts.positions[entry], facts.trace.nodes[entry].meta["shape"][2:]),
        bottleneck=next((space for space, *_ in reversed(costs["by_level"]) if math.prod(space) > 1), ()),
        leftover=tuple(sorted(left.items())),
        sample=facts.trace.sample,
        times=facts.trace.times,
        full_macs=facts.trace.full_macs or 1,
        **costs,
        fingerprint=facts.fingerprints.of(entry_nodes, exit, inside),
        cut_plan=cut_plan,
        signature=facts.trace.signature,
        residuals=facts.residuals,
        unread=facts.trace.unread,
        scratch=facts.trace.scratch,
        uncounted=facts.trace.uncounted,
        structure=facts.structure,
    )


def between(facts: Facts, source: int, target: int, *, level: int, cut: str) -> Region | None:
    """The region of what depends on `source` and reaches the output only through `target`, if nothing else enters."""
    inside = facts.dominance.between(source, target)
    if target not in inside or {u for u, _ in facts.dominance.crossing(facts.dominance.mask(inside))[0]} != {source}:
        return None
    return build(facts, target, inside, level=level, cut=cut)


def without(facts: Facts, region: Region, needed: set[int]) -> Region | None:
    """The same region, but calls with a node of `needed` run; None if none is left that returns the exit."""
    inside, skipped = facts.dominance.mask([]), {(call.path, call.ordinal) for call in region.skipped}
    for call in facts.trace.calls:
        if (call.path, call.ordinal) in skipped:
            inside[call.first : call.last] = True
    inside[list(needed)] = False
    skipping = _skipping(facts, inside & ~facts.input, region.exit.node)
    if skipping is None:
        return None
    cut_plan = _cut_plan(facts, skipping, region.entry.node, region.sides)
    return replace(region, cut_plan=cut_plan, inner=None, structure="", **_costs(facts, skipping))


# -- what is skipped ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Skipping:
    """What one region skips.

    Attributes:
        calls: the skipped ones, outermost.
        chosen: their indices.
        last: the one that returns the exit.
        exit: the node of the exit.
        nodes: those of these calls.
        visible: index of a call → how many calls of its module come before it in an adaptor pass, for modules of
            skipped calls.
    """

    calls: list[ModuleCall]
    chosen: set[int]
    last: ModuleCall
    exit: int
    nodes: Mask
    visible: dict[int, int]


def _skipping(facts: Facts, inside: Mask, exit: int) -> _Skipping | None:
    """The calls that lie inside; None if none of them returns the exit."""
    calls = facts.skippable(inside)
    returning = {call.index for call in facts.producers.get(exit, ())}
    last = next((call for call in calls if call.index in returning), None)
    if last is None:
        return None
    nodes = np.zeros_like(inside)
    for call in calls:
        nodes[call.first : call.last] = True
    return _Skipping(calls, {call.index for call in calls}, last, exit, nodes, {})


def _costs(facts: Facts, skipping: _Skipping) -> dict[str, Any]:
    """The fields of a region that say what is saved."""
    macs, parameters = int(facts.macs[skipping.nodes].sum()), facts.parameters(skipping.calls)
    return {
        "macs": macs,
        "macs_share": macs / (facts.trace.full_macs or 1),
        "parameters": parameters,
        "parameter_share": parameters / (facts.total_parameters or 1),
        "by_level": facts.macs_by_level(skipping.nodes),
    }


# -- what crosses the edge ------------------------------------------------------------------------------------------


def _boundary(facts: Facts, n: int) -> Boundary:
    node = facts.trace.nodes[n]
    calls = facts.producers.get(n, [])[::-1]
    return Boundary(
        path=facts.name(n),
        call=calls[0].ordinal if calls else 0,
        paths=tuple(str(call.path) for call in calls),
        shape=node.meta["shape"],
        dtype=node.meta["dtype"],
        resolution=facts.levels.resolution(node) or tuple(node.meta["shape"][2:]),
        node=n,
    )


def _side(facts: Facts, n: int) -> Side:
    node = facts.trace.nodes[n]
    inputs = facts.embeddings.inputs(n)
    kind: Literal["time", "context", "constant"] = "context" if inputs else "constant"
    if set(inputs) & set(facts.trace.times[:1]):
        kind = "time"
    path = facts.name(n) if n in facts.producers else str(node.meta["module"])
    return Side(kind, inputs, path, node.meta.get("shape", ()), node.meta.get("dtype", torch.float32), n)


# -- what a pass looks up -------------------------------------------------------------------------------------------


def _cut_plan(facts: Facts, skipping: _Skipping, entry: int, sides: tuple[Side, ...]) -> CutPlan:
    """What stands in for each skipped call, and where the boundary is picked up."""
    counts = _count(facts, skipping)

    def first_port(*nodes: int) -> tuple[Port | None, int]:
        ports = ((_port(facts, n, skipping), n) for n in nodes)
        return next(((port, n) for port, n in ports if port is not None), (None, -1))

    text, n = first_port(*facts.embeddings.text(sides, _returned(facts, skipping, time=False)))
    mask = facts.embeddings.mask(n) if text is not None and len(text.shape) == 3 else None
    ports = {
        "entry": first_port(entry)[0],
        "time": first_port(*facts.embeddings.time(sides, _returned(facts, skipping, time=True)))[0],
        "text": text,
        "mask": None if mask is None else first_port(mask)[0],
    }
    return CutPlan(
        tuple(_stand_in(facts, call, skipping) for call in skipping.calls),
        {name: port for name, port in ports.items() if port is not None},
        counts,
    )


def _count(facts: Facts, skipping: _Skipping) -> dict[str, tuple[int, int]]:
    """Calls of each skipped module in a full pass and in an adaptor pass."""
    counts = {}
    for path in sorted({str(call.path) for call in skipping.calls}, key=lambda path: facts.calls[path][0].index):
        seen = 0
        for call in facts.calls[path]:
            skipping.visible[call.index] = seen
            seen += _happens(facts, call, skipping)
        counts[path] = len(facts.calls[path]), seen
    return counts


def _stand_in(facts: Facts, call: ModuleCall, skipping: _Skipping) -> SkippedCall:
    """What an adaptor pass does instead of this call; the same in many regions, unless somebody writes to it."""
    key = call.index, skipping.visible[call.index]
    if call is not skipping.last and key in facts.stand_ins:
        return facts.stand_ins[key]
    written = False

    def slot(leaf: Any) -> Any:
        nonlocal written
        if not isinstance(leaf, TensorSpec):
            return leaf
        n = index_of(leaf)
        writers = facts.writers.get(facts.trace.nodes[n].meta.get("storage"), ())
        later = any(w > n and not skipping.nodes[w] for w in writers)  # by code that still runs
        written = written or bool(writers)
        return Slot(leaf.shape, leaf.dtype, leaf.device, call is skipping.last and n == skipping.exit, later)

    stand_in = SkippedCall(str(call.path), call.ordinal, key[1], map_leaves(slot, call.output))
    if call is not skipping.last and not written:
        facts.stand_ins[key] = stand_in
    return stand_in


def _returned(facts: Facts, skipping: _Skipping, *, time: bool) -> Iterator[int]:
    """Nodes from the time, or from other conditions, that calls of an adaptor pass return before the exit."""
    for call, n in facts.from_conditions(time=time):
        if call.last <= skipping.last.first and call.index not in skipping.chosen and _happens(facts, call, skipping):
            yield n


def _port(facts: Facts, n: int, skipping: _Skipping) -> Port | None:
    """Where node n can be picked up before the exit is needed: taken by a call (skipped ones first) or returned."""

    def begun(table: dict[int, list[Leaf]], *, skipped: bool) -> Iterator[Leaf]:
        for call, k, leaf in table.get(n, ()):
            if call.index > skipping.last.index:
                return
            fits = call.path is not None and call is not facts.root and (call.index in skipping.chosen) is skipped
            if fits and _happens(facts, call, skipping):
                yield call, k, leaf

    ways: tuple[tuple[Literal["input", "output"], Iterator[Leaf]], ...] = (
        ("input", begun(facts.takers, skipped=True)),
        ("input", begun(facts.takers, skipped=False)),
        ("output", (one for one in begun(facts.givers, skipped=False) if one[0].last <= skipping.last.first)),
        ("input", (one for one in facts.takers.get(n, ()) if one[0] is facts.root)),
    )
    for side, among in ways:
        for call, k, leaf in among:
            return Port(str(call.path), call.ordinal, _seen(facts, call, skipping), side, k, leaf.shape, leaf.dtype)
    return None


def _happens(facts: Facts, call: ModuleCall, skipping: _Skipping) -> bool:
    """Does this call happen in an adaptor pass?"""
    return all(around.index not in skipping.chosen for around in facts.trace.ancestors(call))


def _seen(facts: Facts, call: ModuleCall, skipping: _Skipping) -> int:
    """How many calls of its module come before it in an adaptor pass."""
    if call.index in skipping.visible:
        return skipping.visible[call.index]
    return sum(_happens(facts, other, skipping) for other in facts.calls[str(call.path)] if other.index < call.index)
