"""Make a region of one trace: from its exit and the nodes inside to what is skipped, picked up and saved.

`Facts` is what the search and the making of regions look up in a trace: dominance, levels, embeddings, and what calls
take and return. `Embeddings` are the tensors that tell an adaptor the time and the text, found by what the graph does
with them: among what feeds the region and does not depend on the sample. A condition is an *embedding*: a vector (B,
D) or tokens (B, L, D) whose last axis a linear layer reads, or made. So masks, sizes and maps are none, whatever
their names.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import fx, nn

from clockwork_hooks._tree import flat, map_leaves
from clockwork_hooks.graph.operators import BLOCKS, VIEWS, kind, operator_name, qualified_name
from clockwork_hooks.graph.recorder import ModuleCall, TensorSpec, specs_in
from clockwork_hooks.graph.tracing import Trace, modules_of
from clockwork_hooks.regions.cut import CutPlan, Port, Same, SkippedCall, Slot
from clockwork_hooks.regions.fingerprint import Fingerprints, structure
from clockwork_hooks.regions.flow import Dominance, Levels, Mask
from clockwork_hooks.regions.region import Boundary, Region, Side

Leaf = tuple[ModuleCall, int, TensorSpec]  # a call, and the k-th leaf of what it takes or returns


def index_of(spec: TensorSpec) -> int:
    """The index of the node that holds a recorded tensor."""
    return int(spec.node.meta["index"])


def nodes_of(value: object) -> list[int]:
    """The nodes that hold the recorded tensors of a call's inputs or output."""
    return [index_of(spec) for spec in specs_in(value)]


class Facts:
    """Tables of one trace. What is asked for every region is looked up once: regions can be many.

    Attributes:
        trace: what was recorded.
        dominance, levels, embeddings: of the trace.
        macs, positions, worked_at: one value a node; positions of its tensor, 0 where the shape tells none, and of the
            level that it works at.
        operator, input: is the node an operator, is it an input? Likewise.
        total_parameters: of the UNet.
        residuals: paths of the inputs that are only added to feature maps.
        root: the call of the UNet itself.
        calls: path of a module → its calls.
        takers, givers: node → where calls take it in, and where they return it.
        producers: node → the calls of registered modules that return it, the outermost first.
        conditions: (call, node) of what calls return that comes from the time (True), or from other conditions (False).
        writers: storage → the nodes that write to it in place.
        stand_ins: (call, how many calls of its module come before) → the skipped call, once one was made that is the
            same in every region.
    """

    def __init__(self, trace: Trace, unet: nn.Module) -> None:
        self.trace, self._unet = trace, unet
        self.dominance, self.levels = Dominance(trace), Levels(trace)
        self.embeddings = Embeddings(trace, self.dominance)
        self.residuals = self.dominance.residuals(trace.inputs)
        self._modules = modules_of(unet)
        parameters = (one for module in self._modules.values() for one in module._parameters.values())
        self.total_parameters = sum({id(one): one.numel() for one in parameters if one is not None}.values())
        self._parameters: dict[str, dict[int, int]] = {}
        self.stand_ins: dict[tuple[int, int], SkippedCall] = {}
        self._read_nodes()
        self._read_calls()

    @functools.cached_property
    def fingerprints(self) -> Fingerprints:
        """What tells the trace's regions apart, and is the same in every code of the network."""
        return Fingerprints(self.trace, self.dominance, self.levels)

    @functools.cached_property
    def structure(self) -> str:
        """What the UNet is made of."""
        try:
            return structure(self._unet)
        except Exception:  # not all that modules hold can be read: accelerate's maps name more weights than they have
            return ""

    def _read_nodes(self) -> None:
        nodes = self.trace.nodes
        self.macs = np.array(self.trace.macs, dtype=np.int64)
        self.positions = np.array([self.levels.positions(node) or 0 for node in nodes], dtype=np.int64)
        self.worked_at = np.array(self.levels.at, dtype=np.int64)
        self.operator: Mask = np.array([node.op == "call_function" for node in nodes])
        self.input: Mask = np.array([node.op == "placeholder" for node in nodes])
        self.writers: dict[object, list[int]] = {}
        for n, node in enumerate(nodes):
            if "was" in node.meta and node.meta.get("storage") is not None:
                self.writers.setdefault(node.meta["storage"], []).append(n)

    def _read_calls(self) -> None:
        calls = self.trace.calls
        self.root = next(call for call in calls if call.path is not None)
        self.calls: dict[str, list[ModuleCall]] = {}
        self.takers: dict[int, list[Leaf]] = {}
        self.givers: dict[int, list[Leaf]] = {}
        for call in calls:
            if call.path is not None:
                self.calls.setdefault(call.path, []).append(call)
            for value, table in ((call.inputs, self.takers), (call.output, self.givers)):
                for k, leaf in enumerate(flat(value)):
                    if isinstance(leaf, TensorSpec):
                        table.setdefault(index_of(leaf), []).append((call, k, leaf))
        registered = ((n, [call for call, *_ in givers if call.path]) for n, givers in self.givers.items())
        self.producers = {n: producers for n, producers in registered if producers}
        self._firsts, self._lasts = (np.array([getattr(call, end) for call in calls]) for end in ("first", "last"))
        self._registered = np.array([bool(call.path) for call in calls])
        self._put = {node for call in calls for node, _ in call.puts}
        self._kept = {node for call in calls for node, _ in call.keeps}
        self.conditions: dict[bool | None, list[tuple[ModuleCall, int]]] = {True: [], False: [], None: []}
        for n, givers in self.givers.items():
            if self.dominance.live[n] and not self.dominance.dep[n]:
                self.conditions[self.embeddings.is_time(n)] += [(call, n) for call, *_ in givers]

    def name(self, n: int) -> str:
        """What to call node n: the innermost module that returns it, else its operator and where it ran."""
        node = self.trace.nodes[n]
        if n in self.producers:
            return str(self.producers[n][-1].path)
        if node.op != "call_function":
            return str(node.target)
        return f"{operator_name(node)} in {node.meta['module'] or 'the root'}"

    def skippable(self, inside: Mask, exit: int, *, keeps: bool) -> list[ModuleCall]:
        """Outermost registered calls with all their live operators inside, one at least depending on the sample.

        Where a call puts the exit into its arguments, as modules that work on one dictionary do, code outside may read
        it there. So such calls run, and what is skipped is within them; placeholders go through the dictionary.

        Args:
            inside: the operators.
            exit: of the region.
            keeps: the same goes for what calls put on their modules.
        """
        counts = self.operator & self.dominance.lives
        outside = np.concatenate([[0], np.cumsum(counts & ~inside)])
        carrying = np.concatenate([[0], np.cumsum(counts & inside & self.dominance.depends)])
        whole = outside[self._lasts] == outside[self._firsts]
        whole &= carrying[self._lasts] > carrying[self._firsts]
        if exit in self._put or (keeps and exit in self._kept):
            made = np.zeros_like(inside)  # by calls that may be skipped: in an adaptor pass it is a placeholder
            for k in np.flatnonzero(self._registered & whole).tolist():
                made[self._firsts[k] : self._lasts[k]] = True
            puts = (call.puts + call.keeps * keeps for call in self.trace.calls)
            whole &= np.array([not any(_leaves(put, exit, made) for put in each) for each in puts])
        chosen, indices, k = list[ModuleCall](), np.flatnonzero(self._registered & whole), 0
        starts = self._firsts[indices].tolist()  # calls are in order of their beginning
        while k < len(starts):
            chosen.append(self.trace.calls[indices[k]])
            k = bisect_left(starts, chosen[-1].last, k + 1)
        return chosen

    def parameters(self, calls: list[ModuleCall]) -> int:
        """How many parameters the modules of these calls have; one that several share counts once."""
        sizes: dict[int, int] = {}
        for path in {str(call.path) for call in calls}:
            if path not in self._parameters:
                module = self._modules.get(path)
                self._parameters[path] = {id(p): p.numel() for p in module.parameters()} if module is not None else {}
            sizes |= self._parameters[path]
        return sum(sizes.values())

    def macs_by_level(self, run: Mask) -> tuple[tuple[tuple[int, ...], int, int], ...]:
        """(spatial shape, MACs on the way down, MACs on the way up) of these nodes, widest first."""
        nodes = np.flatnonzero(run & (self.macs > 0))
        at = self.worked_at[nodes]
        turn = nodes[at == at[at > 0].min()].max() if at.any() else 0  # the last one of the lowest level
        rows = []
        for p in sorted(set(at.tolist()), reverse=True):
            down, up = (int(self.macs[nodes[(at == p) & arm]].sum()) for arm in (nodes <= turn, nodes > turn))
            rows.append((self.levels.spatial.get(p, ()), down, up))
        return tuple(rows)


def _leaves(put: tuple[int, int | None], exit: int, made: Mask) -> bool:
    """Is this what a call puts where code outside may read it: something new, or the exit in memory from outside?"""
    node, memory = put
    return memory is None or (node == exit and not made[memory])


_CAT = frozenset({"aten::cat", "aten::concat"})
_KEPT = {f"aten::{name}" for name in ("repeat", "repeat_interleave", "index_select", "dropout", "native_dropout")}
_NORMED = {f"aten::{name}" for name in ("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")}
_MIXED = {f"aten::{name}" for name in ("silu", "gelu", "relu", "where", "add", "mul")}
# what leaves an embedding one: views, casts and copies, norms over its width, a sum with another embedding
_PASSED = VIEWS | _CAT | _KEPT | _NORMED | {"getitem"}


class Embeddings:
    """The time and the text of one trace."""

    def __init__(self, trace: Trace, dominance: Dominance) -> None:
        self._trace, self._dominance = trace, dominance
        self._embeddings: dict[int, bool] = {}

    def inputs(self, n: int) -> tuple[str, ...]:
        """Paths of the inputs that node n's value comes from, the sample left out."""
        return tuple(path for path in self._trace.origins(n) if path != self._trace.sample)

    def is_time(self, n: int) -> bool | None:
        """Does node n's value come from the time? None where it comes from no input but the sample."""
        paths = self.inputs(n)
        return bool(set(paths) & set(self._trace.times[:1])) if paths else None

    def time(self, sides: Sequence[Side], returned: Iterable[int]) -> list[int]:
        """Nodes that hold the time's embedding, best first.

        Args:
            sides: what feeds the region.
            returned: nodes made from the time that module calls of an adaptor pass return, before the exit: where the
                embedding is made inside the region, it is one of these.
        """
        fed = [side.node for side in sides if side.kind == "time"]
        nodes = self._vectors(fed) or self._on_the_way(returned) or self._tokens(fed)
        return nodes or [n for n in fed if getattr(self._trace.nodes[n].meta.get("dtype"), "is_floating_point", False)]

    def text(self, sides: Sequence[Side], returned: Iterable[int]) -> list[int]:
        """Nodes that hold the text's embedding, or that of another condition: pooled vectors first, then tokens.

        A pooled vector often enters through the time embedding (SDXL): then the input itself is the node. `returned`
        are nodes made from conditions other than the time.
        """
        fed = [side.node for side in sides if side.kind == "context"]
        conditions = {path for side in sides for path in side.inputs} - set(self._trace.times[:1])
        inputs = [node.meta["index"] for path, node in self._trace.inputs.items() if path in conditions]
        vectors, tokens = self._vectors(fed) + self._vectors(inputs), self._tokens(fed) + self._tokens(inputs)
        return vectors or tokens or self._on_the_way(returned)

    def mask(self, text: int) -> int | None:
        """The input that says which of the text's tokens are padding: boolean or called a mask, and (B, L)."""
        rows, length = self._trace.nodes[text].meta["shape"][:2]
        for path, node in self._trace.inputs.items():
            sizes, dtype = node.meta.get("shape", ()), node.meta.get("dtype")
            called = "mask" in path.rsplit(".", 1)[-1].lower()
            fits = len(sizes) == 2 and sizes[1] == length and sizes[0] > 0 and rows % sizes[0] == 0
            if fits and (called or dtype == torch.bool):
                return int(node.meta["index"])
        return None

    # -- what is an embedding? ---------------------------------------------------------------------------------------

    def _vectors(self, nodes: Iterable[int]) -> list[int]:
        return [n for n in dict.fromkeys(nodes) if self._rank(n) == 2 and self._embeds(n)]

    def _tokens(self, nodes: Iterable[int]) -> list[int]:
        return [n for n in dict.fromkeys(nodes) if self._rank(n) == 3 and self._embeds(n)]

    def _on_the_way(self, returned: Iterable[int]) -> list[int]:
        """Vectors that modules make on the way; the most used first: an embedding is shared, a projection is not."""
        return sorted(self._vectors(returned), key=lambda n: (-len(self._dominance.users[n]), -n))

    def _rank(self, n: int) -> int:
        """Number of axes, those of size one at the end left out; 0 where nothing has a width."""
        node = self._trace.nodes[n]
        sizes = node.meta.get("shape", ())
        if not sizes or not node.meta["dtype"].is_floating_point:
            return 0
        if len(sizes) > 2 and math.prod(sizes[2:]) == 1:
            return 2 if sizes[1] > 1 else 0
        return len(sizes) if sizes[-1] > 1 else 0

    def _embeds(self, n: int) -> bool:
        """Is the last axis (the second, where one-sized axes follow) what a linear layer reads, or made?"""
        if n not in self._embeddings:
            self._embeddings[n] = self._is_written(n) or self._is_read(n)
        return self._embeddings[n]

    def _is_written(self, n: int) -> bool:
        node = self._trace.nodes[n]
        for _ in range(8):
            if _reads_features(node) or (self._rank(n) == 2 and kind(node) == "convolution"):
                return True
            before = [source for source in node.all_input_nodes if source.op == "call_function"]
            if node.op != "call_function" or qualified_name(node.target) not in _PASSED | _MIXED or not before:
                return False
            node = before[0]
        return False

    def _is_read(self, n: int) -> bool:
        width = self._trace.nodes[n].meta["shape"][-1]
        ways, seen = [self._trace.nodes[n]], {n}
        while ways:
            at = ways.pop()
            for user in at.users:
                if user.op == "output":
                    continue
                index, last = user.meta["index"], (user.meta.get("shape") or (0,))[-1]
                if index in seen:
                    continue
                seen.add(index)
                if _reads_features(user) and at in user.all_input_nodes[:2]:
                    return True
                passed = _PASSED if self._dominance.dep[index] else _PASSED | _MIXED
                name = qualified_name(user.target) if user.op == "call_function" else ""
                if (last == width and name in passed) or (last > width and name in _CAT):
                    ways.append(user)
        return False


def _reads_features(node: fx.Node) -> bool:
    """Is this a linear layer, an embedding, or attention with its projections?"""
    if node.op != "call_function":
        return False
    return kind(node) == "linear" or operator_name(node) == "embedding" or qualified_name(node.target) in BLOCKS


class Part:
    """A part of the trace that leaves through one node, which a call returns: what a region of it would skip.

    A search makes regions of those parts alone that it is asked for: of a UNet with 518, a first call then takes 11.4 s
    in the place of 13.6 (`python benchmarks/bench_analysis.py "blocks 270"`).

    Attributes:
        exit: the node.
        entries: nodes that flow in, in order.
        entry: the one at the highest resolution.
        macs_share: of the calls that would be skipped, in the MACs of a full pass.
    """

    def __init__(self, facts: Facts, exit: int, inside: Mask, skipping: _Skipping) -> None:
        edges, self.sides = facts.dominance.crossing(inside)
        self.facts, self.exit, self.inside, self.skipping = facts, exit, inside, skipping
        self.entries = sorted({u for u, _ in edges})
        self.entry = max(self.entries, key=lambda u: (facts.positions[u], u), default=-1)
        self.macs_share = _macs(facts, skipping)["macs_share"]

    @classmethod
    def of(cls, facts: Facts, exit: int, nodes: Iterable[int]) -> Part | None:
        """The part of these nodes; None where nothing enters it, or no skippable module call returns its exit."""
        if exit not in facts.producers:
            return None
        inside = facts.dominance.mask(nodes) & ~facts.input
        skipping = _skipping(facts, inside, exit)
        part = None if skipping is None else cls(facts, exit, inside, skipping)
        return part if part is not None and part.entries else None

    @property
    def resolution(self) -> tuple[int, ...]:
        """Of the entry."""
        facts = self.facts
        shape: tuple[int, ...] = facts.trace.nodes[self.entry].meta["shape"][2:]
        return facts.levels.spatial.get(facts.positions[self.entry], shape)

    def region(self, *, level: int, cut: str) -> Region:
        """The region of it."""
        facts, exit, inside, skipping, entry = self.facts, self.exit, self.inside, self.skipping, self.entry
        entries = tuple(_boundary(facts, u) for u in self.entries)
        sides = tuple(_side(facts, n) for n in self.sides if not facts.trace.nodes[n].meta.get("constant"))
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
            resolution=self.resolution,
            bottleneck=next((space for space, *_ in reversed(costs["by_level"]) if math.prod(space) > 1), ()),
            leftover=tuple(sorted(left.items())),
            sample=facts.trace.sample,
            times=facts.trace.times,
            full_macs=facts.trace.full_macs or 1,
            **costs,
            fingerprint=facts.fingerprints.of(self.entries, exit, inside),
            cut_plan=cut_plan,
            signature=facts.trace.signature,
            residuals=facts.residuals,
            unread=facts.trace.unread,
            scratch=facts.trace.scratch,
            uncounted=facts.trace.uncounted,
            structure=facts.structure,
        )


def build(facts: Facts, exit: int, nodes: Iterable[int], *, level: int, cut: str) -> Region | None:
    """The region that leaves through node `exit`; None where no skippable module call returns it."""
    part = Part.of(facts, exit, nodes)
    return None if part is None else part.region(level=level, cut=cut)


def between(facts: Facts, source: int, target: int, *, level: int, cut: str) -> Region | None:
    """The region of what depends on `source` and reaches the output only through `target`, if nothing else enters."""
    inside = facts.dominance.between(source, target)
    if target not in inside or {u for u, _ in facts.dominance.crossing(facts.dominance.mask(inside))[0]} != {source}:
        return None
    return build(facts, target, inside, level=level, cut=cut)


def narrowed(facts: Facts, region: Region, nodes: Iterable[int]) -> Region | None:
    """The same region, but calls with a node beside these run; None if none is left that returns the exit."""
    skipping = _skipping(facts, facts.dominance.mask(nodes) & ~facts.input, region.exit.node)
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
    returning = {call.index for call in facts.producers.get(exit, ())}
    for keeps in (True, False):  # what a module keeps is seldom read by others: rather so than not at all
        calls = facts.skippable(inside, exit, keeps=keeps)
        last = next((call for call in calls if call.index in returning), None)
        if last is not None:
            break
    else:
        return None
    nodes = np.zeros_like(inside)
    for call in calls:
        nodes[call.first : call.last] = True
    return _Skipping(calls, {call.index for call in calls}, last, exit, nodes, {})


def _macs(facts: Facts, skipping: _Skipping) -> dict[str, Any]:
    macs = int(facts.macs[skipping.nodes].sum())
    return {"macs": macs, "macs_share": macs / (facts.trace.full_macs or 1)}


def _costs(facts: Facts, skipping: _Skipping) -> dict[str, Any]:
    """The fields of a region that say what is saved."""
    parameters = facts.parameters(skipping.calls)
    return {
        **_macs(facts, skipping),
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
            seen += facts.trace.happens(call, skipping.chosen)
        counts[path] = len(facts.calls[path]), seen
    return counts


def _stand_in(facts: Facts, call: ModuleCall, skipping: _Skipping) -> SkippedCall:
    """What an adaptor pass does instead of this call; the same in many regions, unless somebody writes to it."""
    key = call.index, skipping.visible[call.index]
    if call is not skipping.last and key in facts.stand_ins:
        return facts.stand_ins[key]
    written = False
    taken = (
        [] if call.same is None else [index_of(one) if isinstance(one, TensorSpec) else -1 for one in flat(call.inputs)]
    )

    def slot(leaf: Any) -> Any:
        nonlocal written
        if not isinstance(leaf, TensorSpec):
            return leaf
        n = index_of(leaf)
        if n in taken:  # it has left that as it was
            return Same(taken.index(n))
        writers = facts.writers.get(facts.trace.nodes[n].meta.get("storage"), ())
        later = any(w > n and not skipping.nodes[w] for w in writers)  # by code that still runs
        written = written or bool(writers)
        return Slot(leaf.shape, leaf.dtype, leaf.device, call is skipping.last and n == skipping.exit, later)

    stand_in = SkippedCall(str(call.path), call.ordinal, key[1], map_leaves(slot, call.output), call.same)
    if call is not skipping.last and not written:
        facts.stand_ins[key] = stand_in
    return stand_in


def _returned(facts: Facts, skipping: _Skipping, *, time: bool) -> Iterator[int]:
    """Nodes from the time, or from other conditions, that calls of an adaptor pass return before the exit."""
    for call, n in facts.conditions[time]:
        if (
            call.last <= skipping.last.first
            and call.index not in skipping.chosen
            and facts.trace.happens(call, skipping.chosen)
        ):
            yield n


def _port(facts: Facts, n: int, skipping: _Skipping) -> Port | None:
    """Where node n can be picked up before the exit is needed: taken by a call (skipped ones first) or returned."""

    def begun(table: dict[int, list[Leaf]], *, skipped: bool) -> Iterator[Leaf]:
        for call, k, leaf in table.get(n, ()):
            if call.index > skipping.last.index:
                return
            fits = call.path is not None and call is not facts.root and (call.index in skipping.chosen) is skipped
            if fits and facts.trace.happens(call, skipping.chosen):
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


def _seen(facts: Facts, call: ModuleCall, skipping: _Skipping) -> int:
    """How many calls of its module come before it in an adaptor pass."""
    if call.index in skipping.visible:
        return skipping.visible[call.index]
    return sum(
        facts.trace.happens(other, skipping.chosen) for other in facts.calls[str(call.path)] if other.index < call.index
    )
