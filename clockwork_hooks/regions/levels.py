"""At which resolution does a tensor of the trace live?

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

from torch import fx

from clockwork_hooks.graph.operators import is_spatial, kind, operator_name
from clockwork_hooks.graph.tracing import Trace

__all__ = ["Levels"]


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
        carrying = trace.reachable([trace.inputs[trace.sample]])  # a condition's own levels are not the UNet's
        for node in filter(carrying.__contains__, trace.nodes):
            for operand in self._operands(node):
                shape = operand.meta["shape"]
                count = math.prod(shape) // shape[1]
                space = shape[2:]
                self._by_node.setdefault(operand, count)
                if count not in shapes or self._rank_of(space) < self._rank_of(shapes[count]):
                    shapes[count] = space
        self.spatial = dict(sorted(shapes.items(), reverse=True))
        self._tokens: dict[fx.Node, int] = {}  # linear layers → tokens, where these make the levels
        self.at = self._at(trace, carrying)
        self.worked = self._worked(trace)
        if len(self.worked) < 2 and (layers := _merging_layers(trace, carrying)):
            batch, _, *space = trace.inputs[trace.sample].meta["shape"]
            self._tokens = layers
            self._by_node.update(layers)
            shapes |= {count: _space(count // batch, tuple(space)) for count in layers.values()}
            self.spatial = dict(sorted(shapes.items(), reverse=True))
            self.at = self._at(trace, carrying)
            self.worked = self._worked(trace)

    def _worked(self, trace: Trace) -> list[int]:
        return sorted({p for p, macs in zip(self.at, trace.macs, strict=True) if p and macs}, reverse=True)

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
        if not is_spatial(node):
            return False
        count = self._by_node.get(node)
        return count is not None and count < below and math.prod(node.meta["shape"][2:]) > 1


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
