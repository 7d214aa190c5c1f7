"""Which operators does every path to the output pass? Post-dominators of a trace, and what enters their subtrees.

- dep: depends on the sample
- live: reaches an output
- P(o): everything whose every path to an output passes node o: the subtree of o in the post-dominator tree
- entries: edges into P(o) that carry something that depends on the sample
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from clockwork_hooks.graph.tracing import Trace, sources

__all__ = ["Dominance", "Mask"]

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
        self.sources = [[node.meta["index"] for node in needed] for needed in trace.sources]
        self.users: list[list[int]] = [[] for _ in range(count)]
        for v, taken in enumerate(self.sources):
            for u in taken:
                self.users[u].append(v)
        self.dep = [False] * count
        self._mark_dep(trace.inputs[trace.sample])
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

    def _mark_dep(self, sample: fx.Node) -> None:
        self.dep[sample.meta["index"]] = True
        for v in range(len(self.nodes)):
            self.dep[v] = self.dep[v] or any(self.dep[u] for u in self.sources[v])

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
