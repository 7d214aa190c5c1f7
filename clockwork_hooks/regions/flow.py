"""How the sample flows through a trace: what all its ways to the output pass (`Dominance`), and at which `Levels`.

Post-dominators of a trace, and what enters their subtrees:

- dep: depends on the sample
- live: reaches an output
- P(o): everything whose every path to an output passes node o: the subtree of o in the post-dominator tree
- entries: edges into P(o) that carry something that depends on the sample

Convolutions, pooling and interpolation say where their spatial axes are. Their operands give the levels, counted in
*positions*: spatial positions times batch times frames, so that a video's 2-D and 3-D views of one tensor agree and
the time axis is no resolution. Token and channels-last tensors are matched to those levels.

A tensor's shape can have many readings (heads times tokens, the tokens of a text), so what an *operator* works at is
no matter of its shape: it is the level of the last convolution, pooling or interpolation on the sample's way
(`Levels.at`). Where these lead to one level alone, linear layers that merge and split tokens (HDiT) tell the levels.
Tables, pictures, regions and refusals all ask this one rule.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from clockwork_hooks.graph.operators import is_spatial, kind, operator_name
from clockwork_hooks.graph.tracing import Trace, sources

Edge = tuple[int, int]
Mask = NDArray[np.bool_]  # a set of nodes, one value a node

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


class Dominance:
    """Post-dominators of one trace; nodes are named by their index (`node.meta["index"]`), sources before users.

    One pass backwards finds, for every live node, its immediate post-dominator as the lowest common ancestor of its
    users (Cooper, Harvey, Kennedy, "A Simple, Fast Dominance Algorithm", on an acyclic graph).
    """

    def __init__(self, trace: Trace) -> None:
        self.nodes = trace.nodes
        count = len(self.nodes)
        self.sources = trace.sources
        self.users: list[list[int]] = [[] for _ in range(count)]
        for v, taken in enumerate(self.sources):
            for u in taken:
                self.users[u].append(v)
        self.dep = trace.reached(trace.sample)
        self.live = [False] * count
        self.parent = [count] * count
        self._depth = [0] * count + [0]
        self._post_dominators({node.meta["index"] for node in trace.outputs})
        self._first, self._last = self._intervals()
        self._tree = np.array(sorted(np.flatnonzero(self.live).tolist(), key=self._first.__getitem__), dtype=np.int64)
        self.depends, self.lives = np.array(self.dep), np.array(self.live)
        self._source = np.array([u for taken in self.sources for u in taken], dtype=np.int64)
        self._user = np.repeat(np.arange(count), [len(taken) for taken in self.sources])
        self._loaded = np.array([node.op == "get_attr" for node in self.nodes])
        self._entries: dict[int, list[Edge]] | None = None

    def residuals(self, inputs: Mapping[str, fx.Node]) -> tuple[str, ...]:
        """Paths of the inputs that are only added to feature maps of their own shape, as a ControlNet's outputs are."""
        return tuple(path for path, node in inputs.items() if self._only_added(node, inputs.values()))

    def _only_added(self, node: fx.Node, inputs: Collection[fx.Node]) -> bool:
        n, shape = node.meta["index"], node.meta.get("shape", ())
        users = [self.nodes[v] for v in self.users[n]]
        if self.dep[n] or len(shape) < 3 or not users:
            return False
        return all(
            self._adds(user, n, inputs) if len(sources(user)) > 1 else self._only_added(user, inputs) for user in users
        )

    def _adds(self, user: fx.Node, n: int, inputs: Collection[fx.Node]) -> bool:
        """Is node n added to what the network has made of the sample so far, element by element?"""
        others = [node for node in sources(user) if node.meta["index"] != n]
        alike = all(node.meta.get("shape") == self.nodes[n].meta["shape"] for node in (user, *others))
        carrying = all(self.dep[node.meta["index"]] and node not in inputs for node in others)
        return user.target in _ADDITIONS and bool(others) and alike and carrying

    def _post_dominators(self, outputs: set[int]) -> None:
        end = len(self.nodes)
        for n in reversed(range(end)):
            users = [v for v in self.users[n] if self.live[v]]
            if n in outputs:
                self.live[n], self.parent[n] = True, end
            elif users:
                self.live[n] = True
                meet = users[0]
                for v in users[1:]:
                    meet = self._meet(meet, v)
                self.parent[n] = meet
            if self.live[n]:
                self._depth[n] = self._depth[self.parent[n]] + 1

    def _meet(self, a: int, b: int) -> int:
        while a != b:
            if self._depth[a] >= self._depth[b]:
                a = self.parent[a]
            else:
                b = self.parent[b]
        return a

    def _intervals(self) -> tuple[list[int], list[int]]:
        """Number the tree so that P(o) is the interval [first[o], last[o])."""
        count = len(self.nodes)
        size = [1] * (count + 1)
        for n in range(count):
            if self.live[n]:
                size[self.parent[n]] += size[n]
        first = [0] * (count + 1)
        offset = [1] * (count + 1)
        for n in range(count - 1, -1, -1):
            if self.live[n]:
                up = self.parent[n]
                first[n] = first[up] + offset[up]
                offset[up] += size[n]
        return first, [first[n] + size[n] for n in range(count + 1)]

    def size(self, o: int) -> int:
        """How many nodes P(o) has."""
        return self._last[o] - self._first[o]

    def within(self, n: int, o: int) -> bool:
        """Is n in P(o)?"""
        return self.live[n] and self._first[o] <= self._first[n] < self._last[o]

    def totals(self, values: Sequence[int]) -> list[int]:
        """For every node o the sum over P(o) of one value a node."""
        sums = [*values, 0]
        for n in range(len(self.nodes)):
            if self.live[n]:
                sums[self.parent[n]] += sums[n]  # a post-dominator comes later, so sums[n] is complete
        return sums

    def members(self, o: int) -> NDArray[np.int64]:
        """P(o)."""
        return self._tree[self._first[o] - 1 : self._last[o] - 1] if self.live[o] else self._tree[:0]

    def mask(self, nodes: Iterable[int]) -> Mask:
        """A set of nodes as one value a node."""
        mask = np.zeros(len(self.nodes), dtype=np.bool_)
        mask[nodes if isinstance(nodes, np.ndarray) else list(nodes)] = True
        return mask

    def places(self, nodes: Iterable[int]) -> list[int]:
        """Where these nodes are in the tree, for `holds`."""
        return sorted(self._first[n] for n in nodes if self.live[n])

    def holds(self, o: int, places: list[int]) -> bool:
        """Is one of them in P(o)?"""
        k = bisect_left(places, self._first[o])
        return k < len(places) and places[k] < self._last[o]

    def between(self, source: int, target: int) -> set[int]:
        """What depends on `source` and reaches the output only through `target`, with what serves that alone."""
        return self._served(self._led({source}, target) - {source}, target)

    def around(self, seeds: set[int], target: int) -> set[int]:
        """The same of several nodes in P(target), with these."""
        return self._served(self._led(seeds, target), target)

    def _led(self, seeds: set[int], target: int) -> set[int]:
        """The seeds, and what depends on them in P(target)."""
        dependent = set(seeds)
        for v in range(min(seeds) + 1, target + 1):
            if self.dep[v] and self.within(v, target) and any(u in dependent for u in self.sources[v]):
                dependent.add(v)
        return dependent

    def _served(self, nodes: set[int], target: int) -> set[int]:
        """With what does not depend on the sample and serves these alone."""
        for n in range(target - 1, -1, -1):
            if not self.dep[n] and self.within(n, target) and all(v in nodes for v in self.users[n] if self.live[v]):
                nodes.add(n)
        return nodes

    def entries(self) -> dict[int, list[Edge]]:
        """For every node o that depends on the sample: the edges into P(o) that do, too.

        The edge u→v enters P(o) for each o on v's way up the tree until the meeting point with u's way.
        """
        if self._entries is not None:
            return self._entries
        entries = self._entries = {}
        for v in range(len(self.nodes)):
            if not (self.live[v] and self.dep[v]):
                continue
            for u in set(self.sources[v]):
                if self.dep[u]:
                    o = v
                    while o != self.parent[u]:
                        entries.setdefault(o, []).append((u, v))
                        o = self.parent[o]
        return entries

    def crossing(self, inside: Mask) -> tuple[list[Edge], list[int]]:
        """Edges into a set of nodes: those that carry the sample, and the other nodes that feed it."""
        into = inside[self._user] & ~inside[self._source]
        source, user = self._source[into], self._user[into]
        carry = self.depends[source]
        sides = np.unique(source[~carry & ~self._loaded[source]])
        return sorted(set(zip(source[carry].tolist(), user[carry].tolist(), strict=True))), sides.tolist()


class Levels:
    """Resolution levels of a trace.

    Attributes:
        spatial: positions → spatial shape, largest first; e.g. {4096: (64, 64), 1024: (32, 32)}.
        at: for each node the positions of the level that it works at; 0 before the first spatial operator.
        worked: the positions of the levels at which something multiplies, largest first.
    """

    def __init__(self, trace: Trace) -> None:
        self._rank = len(trace.inputs[trace.sample].meta["shape"])
        shapes: dict[int, tuple[int, ...]] = {}
        self._by_node: dict[fx.Node, int] = {}
        self._matched: dict[fx.Node, int | None] = {}
        carrying = trace.carrying  # a condition's own levels are not the UNet's
        for node in filter(carrying.__contains__, trace.nodes):
            for operand in self._operands(node):
                shape = operand.meta["shape"]
                count = math.prod(shape) // shape[1]
                space = shape[2:]
                self._by_node.setdefault(operand, count)
                if count not in shapes or self._rank_of(space) < self._rank_of(shapes[count]):
                    shapes[count] = space
        self._tokens: dict[fx.Node, int] = {}  # linear layers → tokens, where these make the levels
        self._place(trace, carrying, shapes)
        if len(self.worked) < 2 and (layers := _merging_layers(trace, carrying)):
            batch, _, *space = trace.inputs[trace.sample].meta["shape"]
            self._tokens = layers
            self._by_node.update(layers)
            shapes |= {count: _space(count // batch, tuple(space)) for count in layers.values()}
            self._place(trace, carrying, shapes)

    def _place(self, trace: Trace, carrying: set[fx.Node], shapes: Mapping[int, tuple[int, ...]]) -> None:
        """Let every node work at one of the levels of these shapes."""
        self.spatial = dict(sorted(shapes.items(), reverse=True))
        self.at = self._at(trace, carrying)
        self.worked = sorted({p for p, macs in zip(self.at, trace.macs, strict=True) if p and macs}, reverse=True)

    def _at(self, trace: Trace, carrying: set[fx.Node]) -> list[int]:
        """The level of the last spatial operator that carries the sample.

        One pixel is a level only where a convolution or a window of a pooling leads down to it: the one that a gate
        (squeeze and excitation) makes of a whole map is none.
        """
        levels, here, pixel = [], 0, False
        for node in trace.nodes:
            if node in self._tokens:
                here = self._tokens[node]
            elif node in carrying and node in self._by_node and is_spatial(node):
                if math.prod(node.meta["shape"][2:]) > 1:
                    here = self._by_node[node]
                else:
                    source = next(iter(node.all_input_nodes)).meta.get("shape", ())
                    pixel |= math.prod(source[2:]) > 1 and "adaptive" not in operator_name(node)
                    here = self._by_node[node] if pixel else here
            levels.append(here)
        return levels

    def _rank_of(self, space: tuple[int, ...]) -> tuple[bool, int]:
        """Which of two views names a level: the one without frames, but no view along the frames alone."""
        return len(space) < min(2, self._rank - 2), len(space)

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        if not is_spatial(node):
            return []
        source = next(iter(node.all_input_nodes), None)
        return [n for n in (source, node) if n is not None and len(n.meta.get("shape", ())) >= 3 and n.meta["shape"][1]]

    def positions(self, node: fx.Node) -> int | None:
        """Positions of a node's tensor, matched to the known levels; None where no reading of the shape fits."""
        if node in self._by_node:
            return self._by_node[node]
        if node not in self._matched:
            self._matched[node] = self._match(node)
        return self._matched[node]

    def _match(self, node: fx.Node) -> int | None:
        shape = node.meta.get("shape", ())
        if len(shape) < 3 or 0 in shape:
            return None
        total = math.prod(shape)
        last = len(shape) - 1
        axes = [1, last] if len(shape) >= self._rank else [last, 1]
        fitting = [axis for axis in axes if total // shape[axis] in self.spatial]
        alike = [
            axis for axis in fitting if _holds(shape[1:axis] + shape[axis + 1 :], self.spatial[total // shape[axis]])
        ]
        return next((total // shape[axis] for axis in (*alike, *fitting)), None)

    def channels(self, node: fx.Node) -> int | None:
        """Size of the axis that is neither batch, nor frames, nor space."""
        count = self.positions(node)
        return math.prod(node.meta["shape"]) // count if count else None

    def resolution(self, node: fx.Node) -> tuple[int, ...] | None:
        """Spatial shape of a node's level, e.g. (32, 32)."""
        count = self.positions(node)
        return None if count is None else self.spatial.get(count)

    def shrinks(self, node: fx.Node, below: int) -> bool:
        """Does this spatial operator work at fewer positions than `below`, on more than one pixel?"""
        if node in self._tokens:
            return self._tokens[node] < below
        small = self._by_node.get(node, below) < below
        return small and is_spatial(node) and math.prod(node.meta["shape"][2:]) > 1


def _merging_layers(trace: Trace, carrying: set[fx.Node]) -> dict[fx.Node, int]:
    """Linear layers on the sample's way → how many tokens they work on; empty unless tokens are merged *and* split.

    A layer merges where its input holds the values of k times as many tokens of an earlier layer, put side by side (as
    in HDiT); it splits where its output becomes the tokens of a later one, or joins as many. Tokens that are joined to
    others, as those of a text, change the number of values, and tell nothing.
    """
    tokens: dict[fx.Node, int] = {}  # of what holds the values of a linear layer's output, in whatever shape
    layers: dict[fx.Node, int] = {}
    merges: set[tuple[int, int]] = set()
    splits: set[tuple[int, int]] = set()
    for node in filter(carrying.__contains__, trace.nodes):
        shape = node.meta.get("shape", ())
        size = math.prod(shape)
        sources = [source for source in node.all_input_nodes if source in tokens]
        if kind(node) == "linear" and size:
            count = layers[node] = tokens[node] = size // shape[-1]
            before = [tokens[source] for source in sources]
        else:
            before = [tokens[source] for source in sources if math.prod(source.meta["shape"]) == size]
            if not before:
                continue
            count = tokens[node] = max(before)  # of a skip and what joins it from below, the skip's
        merges |= {(other, count) for other in before if other > count and other % count == 0}
        splits |= {(count, other) for other in before if other < count and count % other == 0}
    levels = {count for pair in merges & splits for count in pair}
    return {node: count for node, count in layers.items() if count in levels}


def _space(positions: int, sample: tuple[int, ...]) -> tuple[int, ...]:
    """The spatial shape of so many tokens of one sample: its own, made smaller alike along every axis."""
    ratio = max(round((math.prod(sample) / positions) ** (1 / len(sample))), 1)
    shape = tuple(axis // ratio for axis in sample)
    return shape if math.prod(shape) == positions else (positions,)


def _holds(axes: tuple[int, ...], space: tuple[int, ...]) -> bool:
    """Are these axes of a tensor the spatial ones, as they are or flattened to tokens?"""
    return axes[-len(space) :] == space or (len(axes) == 1 and axes[0] == math.prod(space))
