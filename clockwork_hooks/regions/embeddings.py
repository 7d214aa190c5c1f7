"""Which tensors of a trace tell an adaptor the time and the text? Found by what the graph does with them.

Both are sought among what feeds the region and does not depend on the sample. A condition is an *embedding*: a vector
(B, D) or tokens (B, L, D) whose last axis a linear layer reads, or made. So masks, sizes and maps are none, whatever
they are called.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import fx

from clockwork_hooks.graph.operators import BLOCKS, VIEWS, kind, operator_name, qualified_name
from clockwork_hooks.graph.tracing import Trace
from clockwork_hooks.regions.dominance import Dominance
from clockwork_hooks.regions.region import Side

__all__ = ["Embeddings"]

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
        self._reached = {
            path: {n.meta["index"] for n in trace.reachable([node])}
            for path, node in trace.inputs.items()
            if path != trace.sample
        }
        self._embeddings: dict[int, bool] = {}

    def inputs(self, n: int) -> tuple[str, ...]:
        """Paths of the inputs that node n's value comes from, the sample left out."""
        return tuple(path for path, reached in self._reached.items() if n in reached)

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
