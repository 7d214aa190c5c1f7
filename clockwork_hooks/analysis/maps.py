"""The feature maps of a UNet that an analysis looks at, chosen from its graph: none is named in the code.

The first convolution, what comes out of each way down, the bottleneck, and what comes out of each region on the way
up: the maps of arXiv 2312.08128, Sec. 3 and App. C, on any UNet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from torch import Tensor, nn

from clockwork_hooks._numbers import shape
from clockwork_hooks._tree import leaves
from clockwork_hooks.errors import ArgumentError, RegionNotFoundError
from clockwork_hooks.graph.bindings import TensorSpec
from clockwork_hooks.graph.operators import is_spatial
from clockwork_hooks.graph.tracing import Trace
from clockwork_hooks.regions.blocks import View
from clockwork_hooks.regions.dominance import Dominance
from clockwork_hooks.regions.find import regions_of
from clockwork_hooks.regions.levels import Levels
from clockwork_hooks.regions.region import Region

__all__ = ["FeatureMap", "choose_maps", "find_maps", "leaf_of", "region_name"]

Kind = Literal["first", "down", "bottleneck", "up"]


@dataclass(frozen=True, slots=True)
class FeatureMap:
    """A tensor that a module call returns.

    Attributes:
        name: "first", "down 32×32", "bottleneck 8×8", "up 64×64": where it is in the U.
        kind: first convolution, end of a level's way down, bottleneck, or a region's exit on the way up.
        path: dotted path of the module that returns it.
        call: which of the module's calls, from 0.
        leaf: which tensor of what the call returns.
        shape: as traced.
        resolution: spatial shape.
    """

    name: str
    kind: Kind
    path: str
    call: int
    leaf: int
    shape: tuple[int, ...]
    resolution: tuple[int, ...]


def leaf_of(output: Any, k: int) -> Tensor | None:
    """The k-th leaf of what a module returned, if it is a tensor."""
    values = [leaf for _, leaf in leaves(output)]
    return values[k] if k < len(values) and isinstance(values[k], Tensor) else None


def find_maps(trace: Trace, unet: nn.Module) -> tuple[FeatureMap, ...]:
    """The maps of one trace, in the order in which they are made.

    Args:
        trace: of one call of `unet`.
        unet: the UNet.

    Returns:
        The first convolution, the end of each level's way down but the last, the bottleneck, and the exit of the
        region below each level; fewer where the UNet has no such thing.

    Example:
        >>> from clockwork_hooks.models import load_model
        >>> from clockwork_hooks.graph import trace
        >>> unet, args, kwargs = load_model("ddpm-cifar10")
        >>> [found.name for found in find_maps(trace(unet, *args, **kwargs), unet)][:3]
        ['first', 'down 32×32', 'down 16×16']

    Source: arXiv 2312.08128, Sec. 3, Fig. 2 (upsampling outputs) and App. C (bottleneck, downsampling, conv_in).
    """
    return tuple(_Search(trace, unet).maps())


def region_name(region: Region) -> str:
    """How the analyses call a region: level, edge, share of the MACs."""
    cut = "" if region.cut == "outer" else f" {region.cut}"
    return f"level {region.level}{cut}, {region.macs_share:.1%} of MACs"


def choose_maps(maps: Sequence[FeatureMap], names: Iterable[str] | None) -> tuple[FeatureMap, ...]:
    """Those of the maps that are named; all for None.

    Raises:
        ArgumentError: a name is no map's; lists those that are.
    """
    if names is None:
        return tuple(maps)
    by_name = {one.name: one for one in maps}
    wanted = [names] if isinstance(names, str) else list(names)
    wrong = [name for name in wanted if name not in by_name]
    if wrong or not wanted:
        close = [match for name in wrong for match in get_close_matches(str(name), by_name, n=1)]
        raise ArgumentError(
            "maps are chosen by their names",
            seen={"no such map": ", ".join(map(str, wrong)) or "none given", "maps": ", ".join(by_name)},
            do="pass {maps}",
            arguments={"maps": close or list(by_name)[:1]},
        )
    return tuple(by_name[name] for name in wanted)


class _Search:
    """Reads the maps off a trace."""

    def __init__(self, trace: Trace, unet: nn.Module) -> None:
        self.trace, self.unet = trace, unet
        self.dom, self.levels = Dominance(trace), Levels(trace)
        # node → the innermost call that computes and returns it, and where among its outputs; a call that only hands it
        # on, as an `nn.Identity` on a shortcut does, is on one of its ways alone
        self.producers: dict[int, tuple[Any, int]] = {}
        for call in trace.calls:
            for k, (_, leaf) in enumerate(leaves(call.output)):
                n = leaf.node.meta["index"] if isinstance(leaf, TensorSpec) else -1
                if call.path and call.first <= n < call.last and self.dom.dep[n]:
                    self.producers[n] = (call, k)
        self.at = {n: self.levels.positions(trace.nodes[n]) or 0 for n in self.producers}
        self.worked = self.levels.worked

    def maps(self) -> Iterator[FeatureMap]:
        if not self.worked:
            return
        bottom = self._bottleneck()
        first = next((n for n in sorted(self.producers) if is_spatial(self.trace.nodes[n])), None)
        if first is not None:
            yield self._map("first", "first", first)
        for positions in self.worked[:-1]:
            last = self._last_before(positions, bottom)
            if last is not None and last != first:
                yield self._map("down", "down", last)
        if bottom is not None:
            yield self._map("bottleneck", "bottleneck", bottom)
        yield from self._exits()

    def _crossing(self) -> list[int]:
        """For each node, how many tensors that depend on the sample are made up to there and used after it."""
        count = len(self.trace.nodes)
        change = [0] * (count + 1)
        for u in range(count):
            users = [v for v in self.dom.users[u] if self.dom.live[v]] if self.dom.dep[u] and self.dom.live[u] else []
            if users:
                change[u] += 1
                change[max(users)] -= 1
        crossing, now = [], 0
        for n in range(count):
            now += change[n]
            crossing.append(now)
        return crossing

    def _bottleneck(self) -> int | None:
        """Of what whole blocks at the lowest level return, the last one that all skips go round."""
        crossing, floor = self._crossing(), self.worked[-1]
        whole = {(block.first, block.last) for block in View(self.trace, None).whole()}
        returned = {
            leaf.node.meta["index"]
            for call in self.trace.calls
            if (call.first, call.last) in whole
            for _, leaf in leaves(call.output)
            if isinstance(leaf, TensorSpec)
        }
        low = [n for n in returned & self.producers.keys() if self.at[n] == floor and self.dom.live[n]]
        return max(low, key=lambda n: (crossing[n], n), default=None)

    def _last_before(self, positions: int, bottom: int | None) -> int | None:
        low = [
            n for n in self.producers if self.at[n] == positions and self.dom.live[n] and (bottom is None or n < bottom)
        ]
        lower = [n for n in self.producers if self.at[n] in self.worked and self.at[n] < positions]
        return max((n for n in low if not lower or n < min(lower)), default=None)

    def _exits(self) -> Iterator[FeatureMap]:
        """Exits of the regions below each level, the lowest first."""
        try:
            regions = regions_of(self.trace, self.unet)
        except RegionNotFoundError:
            return
        for region in sorted({r.level: r for r in regions}.values(), key=lambda r: -r.level):
            if region.exit.node in self.producers:
                yield self._map("up", "up", region.exit.node)

    def _map(self, word: str, kind: Kind, n: int) -> FeatureMap:
        call, leaf = self.producers[n]
        space = self.levels.resolution(self.trace.nodes[n]) or ()
        name = word if kind == "first" else f"{word} {shape(space)}"
        return FeatureMap(name, kind, str(call.path), call.ordinal, leaf, self.trace.nodes[n].meta["shape"], space)
