"""Which outputs of a call may turn out to be the region's exit? They are kept alive, as that is known only afterwards.

An exit is what the low resolutions leave through, so the next thing that happens to it is a *merge*: an operator takes
it together with a tensor that went round the low resolutions. At each merge the last module outputs before it are
kept, few of each shape. One that turns out to be passed by (an older tensor from below is used after the merge) leads
nowhere and is let go.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from clockwork_hooks._tree import address
from clockwork_hooks.graph.operators import is_spatial

__all__ = ["LikelyExits"]

_RECENT = 16  # module outputs that are looked for on the way to a merge, as long as somebody else holds them
_HELD = 2  # of those, the last ones are held: what is interpolated or padded before the merge is let go by the UNet
_NEAREST = 2  # of those, the ones that a merge keeps
_ALIKE = 3  # of one shape
_FAR = 24  # operators between a module's output and the merge


@dataclass(slots=True)
class _Candidate:
    """A module's output that was merged; `depth` says how low the resolutions were that it comes from."""

    tensor: torch.Tensor
    depth: int
    merge: int


class LikelyExits:
    """Watches operators and module outputs of one recorded call.

    Depths count the resolutions on the way down: a node that comes from the lowest one so far has the depth of that.

    Args:
        sample: the sample's placeholder.
        named: sets of paths of modules: what the last call of each set returns is kept in any case.

    Attributes:
        copied: nodes of those that were about to be written to: what is kept is a copy without a graph of autograd.
    """

    def __init__(self, sample: fx.Node | None, named: Iterable[frozenset[str]] = ()) -> None:
        self.copied: set[int] = set()
        self._named: list[tuple[frozenset[str], dict[int, torch.Tensor]]] = [(paths, {}) for paths in named]
        self._depths: dict[fx.Node, int] = {} if sample is None else {sample: 0}
        self._lowest, self._depth = math.inf, 0
        self._recent: dict[int, weakref.ref[torch.Tensor]] = {}
        self._held: dict[int, torch.Tensor] = {}
        self._candidates: dict[int, _Candidate] = {}

    def tensors(self) -> dict[int, torch.Tensor]:
        """What is kept, by the index of its node."""
        tensors = self._held | {index: candidate.tensor for index, candidate in self._candidates.items()}
        for _, outputs in self._named:
            tensors |= outputs
        return tensors

    def clear(self) -> None:
        """Let everything go."""
        self._named.clear()
        self._recent.clear()
        self._held.clear()
        self._candidates.clear()
        self._depths.clear()

    def saw(self, node: fx.Node) -> None:
        """An operator ran."""
        sources = [source for source in _sources(node) if self._depth_of(source) >= 0]
        depth = max(map(self._depth_of, sources), default=-1)
        positions = _positions(node) if depth >= 0 else 0
        if 0 < positions < self._lowest:
            self._lowest, self._depth = positions, self._depth + 1
            self._candidates = {n: one for n, one in self._candidates.items() if one.depth >= self._depth - 1}
        self._depths[node] = self._depth if positions == self._lowest else depth
        low = [source for source in sources if self._depths[source] == self._depth]
        if self._candidates:
            self._pass_by(node, sources)
        if low and len(low) < len(sources) and self._depths[node] == depth:
            for source in low:
                self._keep(source, node)

    def returned(self, path: str, outputs: list[tuple[fx.Node, torch.Tensor]]) -> None:
        """The module at this path returned these tensors."""
        for k, (paths, _) in enumerate(self._named):
            if path in paths:
                self._named[k] = paths, {node.meta["index"]: tensor for node, tensor in outputs}
        for node, tensor in outputs:
            if self._depth_of(node) == self._depth > 0:
                _put_last(self._recent, node.meta["index"], weakref.ref(tensor), most=_RECENT)
                _put_last(self._held, node.meta["index"], tensor, most=_HELD)

    def written(self, tensors: Iterable[torch.Tensor]) -> None:
        """Something is about to write to these (FreeU does): what is kept of them is kept as it is now."""
        storages = {storage for tensor in tensors if (storage := _storage(tensor))}
        for index, ref in list(self._recent.items()):
            if index not in self._held and (tensor := ref()) is not None and _storage(tensor) in storages:
                del self._recent[index]
        for index, tensor in self.tensors().items():
            if _storage(tensor) in storages:
                self._replace(index, tensor.clone())  # below autograd: the copy has no graph
                self.copied |= {index} if tensor.requires_grad else set()

    def _replace(self, index: int, tensor: torch.Tensor) -> None:
        if index in self._recent:
            self._recent[index] = weakref.ref(tensor)
        for outputs in (self._held, *(outputs for _, outputs in self._named)):
            if index in outputs:
                outputs[index] = tensor
        if index in self._candidates:
            self._candidates[index].tensor = tensor

    def _depth_of(self, node: fx.Node) -> int:
        """How low the resolutions were that the node comes from; -1 for what does not come from the sample."""
        if node not in self._depths:  # views and parts of outputs are made on demand
            self._depths[node] = max(map(self._depth_of, _sources(node)), default=-1)
        return self._depths[node]

    def _keep(self, source: fx.Node, merge: fx.Node) -> None:
        """Keep the last module outputs on the ways to this source of a merge."""
        ways, seen, reached = [source], {source}, 0
        while ways and reached < _NEAREST and len(seen) < _FAR:
            ways.sort(key=lambda node: int(node.meta["index"]))
            node = ways.pop()
            index = node.meta["index"]
            tensor = self._recent[index]() if index in self._recent else None
            if tensor is not None:
                reached += 1
                self._add(index, tensor, merge)
            more = [one for one in _sources(node) if one not in seen and self._depth_of(one) == self._depth]
            seen.update(more)
            ways += more

    def _add(self, index: int, tensor: torch.Tensor, merge: fx.Node) -> None:
        same = (one for one in self._candidates.values() if one.depth == self._depth)
        alike = sum(one.tensor.shape == tensor.shape for one in same)
        if index not in self._candidates and alike < _ALIKE:
            self._candidates[index] = _Candidate(tensor, self._depth, merge.meta["index"])

    def _pass_by(self, node: fx.Node, sources: list[fx.Node]) -> None:
        """Let candidates go that this operator passes by: it takes what is older and comes from as low.

        What it takes may be the exit instead: a residual block merges within, and adds its input after that.
        """
        now = node.meta["index"]
        for index, one in list(self._candidates.items()):
            older = [s for s in sources if s.meta["index"] < index and self._depths[s] >= one.depth]
            if older and one.merge < now:
                del self._candidates[index]
                self._keep(older[0], node)


def _put_last(recent: dict[int, Any], index: int, value: Any, *, most: int) -> None:
    recent.pop(index, None)
    recent[index] = value
    while len(recent) > most:
        del recent[next(iter(recent))]


def _sources(node: fx.Node) -> list[fx.Node]:
    after: tuple[fx.Node, ...] = node.meta.get("after", ())
    return [*node.all_input_nodes, *after]


def _positions(node: fx.Node) -> int:
    """Positions that a convolution, pooling or interpolation works at; 0 for others, and for gates of one pixel."""
    shape = node.meta.get("shape", ())
    if len(shape) < 3 or not is_spatial(node) or math.prod(shape[2:]) <= 1:
        return 0
    return math.prod(shape) // shape[1] if shape[1] else 0


def _storage(tensor: torch.Tensor) -> int:
    try:
        return 0 if tensor.is_nested else address(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return 0
