"""A UNet's blocks, levels and skips, read off its trace, for the picture of it as a U.

A block is the outermost module call that works at one resolution and lies wholly inside or wholly outside of the
region; a skip is an edge that leaves before the bottleneck and arrives after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any, Literal

from torch import nn

from clockwork_hooks.graph.operators import is_spatial
from clockwork_hooks.graph.tracing import Trace, record
from clockwork_hooks.regions.find import Choice, found_or_why, region_or_choice, skipped_nodes, split_options
from clockwork_hooks.regions.flow import Dominance, Levels
from clockwork_hooks.regions.region import Region
from clockwork_hooks.reports.u_drawing import Block, Diagram, Skip

_MOST = 9  # blocks of one arm of one level; more are drawn together
_LEAST = 0.001  # of all MACs: what is less and no convolution gets no block of its own


def diagram(unet: nn.Module, /, *args: Any, region: Region | Choice | None = None, **kwargs: Any) -> Diagram:
    """Draw any UNet as a U.

    Args:
        unet: any UNet; on the meta device too.
        *args: the arguments of one call.
        region: shaded in the picture, a `Region` or a `Choice`; None for the default one, if there is one.
        **kwargs: arguments of the call by name, and options of `Choice`.

    Returns:
        The diagram; `.to_svg()`, `.save("unet.png")`, and notebooks show it.

    Raises:
        TraceError: the call could not be recorded.
        RegionNotFoundError: the options ask for a region that the UNet does not have.

    Example:
        >>> import torch, clockwork_hooks as ch
        >>> from clockwork_hooks.models import load_model
        >>> unet, args, kwargs = load_model("ddpm-cifar10")
        >>> picture = ch.diagram(unet, *args, **kwargs)
        >>> picture.levels, len(picture.skips)
        (((32, 32), (16, 16), (8, 8), (4, 4)), 9)

    Source: arXiv 2312.08128, Fig. 3 and Fig. 8 draw SD v1.5 in this way.
    """
    options, kwargs = split_options(unet, kwargs)
    wanted = region_or_choice(region, options)
    traced = record(unet, args, kwargs)
    return diagram_of(traced, found_or_why(wanted, traced, unet)[0])


def diagram_of(trace: Trace, region: Region | None) -> Diagram:
    """`diagram` on an existing trace."""
    view = View(trace, region)
    blocks = [replace(block, level=view.rank[block.level]) for block in _merged(list(view.blocks()))]
    spaces = tuple(view.levels.spatial.get(p, ()) for p in view.order)
    return Diagram(trace.model, spaces, tuple(blocks), tuple(view.skips(blocks)), region)


class View:
    """The trace with, for every node, its MACs, its level (in positions), and whether it is skipped."""

    def __init__(self, trace: Trace, region: Region | None) -> None:
        self.trace = trace
        self.dominance, self.levels = Dominance(trace), Levels(trace)
        self.skipped = skipped_nodes(trace, region) if region is not None else set[int]()
        self.macs = trace.macs
        self.spatial = {n for n, node in enumerate(trace.nodes) if self.macs[n] and is_spatial(node)}
        self.order = self.levels.worked or [0]  # a transformer's layers name no level: one, of no size, holds them all
        self.rank = {p: k for k, p in enumerate(self.order)}
        self.at = [p if p in self.rank else self.order[0] for p in self.levels.at]  # a time embedding stands at the top
        carrying = [n for n in range(len(trace.nodes)) if self.macs[n] and self.dominance.dep[n]]
        lowest = min((self.at[n] for n in carrying), default=0)
        self.turn = max((n for n in carrying if self.at[n] == lowest), default=0)

    def blocks(self) -> Iterator[Block]:
        """The outermost calls that are of one kind all through, and what their parents compute themselves.

        What is small and holds no convolution (a time embedding, a position embedding) goes with its neighbour.
        """
        blocks, total = list(self.whole()), sum(self.macs)
        for k, block in enumerate(blocks):
            small = block.macs < _LEAST * total and not any(
                map(self.spatial.__contains__, range(block.first, block.last))
            )
            after = blocks[k + 1] if k + 1 < len(blocks) else None
            if small and after and (after.level, after.skipped) == (block.level, block.skipped):
                blocks[k + 1] = replace(after, macs=after.macs + block.macs, first=block.first)
            else:
                yield block

    def whole(self) -> Iterator[Block]:
        """Before small ones go with their neighbours."""
        until = 0
        for call in self.trace.calls:
            if not call.path or call.first < until:
                continue
            kinds = self._kinds(call.first, call.last)
            if len(kinds) == 1:
                yield from self._loose(until, call.first)
                yield self._block(str(call.path), call.first, call.last, *kinds.pop())
                until = call.last
        yield from self._loose(until, len(self.trace.nodes))

    def _kinds(self, first: int, last: int) -> set[tuple[int, bool]]:
        """(level, skipped?) of what multiplies in there."""
        return {(self.at[n], n in self.skipped) for n in range(first, last) if self.macs[n]}

    def _loose(self, first: int, last: int) -> Iterator[Block]:
        nodes = [n for n in range(first, last) if self.macs[n]]
        for (at, skipped), group in groupby(nodes, key=lambda n: (self.at[n], n in self.skipped)):
            own = list(group)
            name = str(self.trace.nodes[own[0]].meta["module"]) or "(the UNet itself)"
            yield self._block(name, own[0], own[-1] + 1, at, skipped)

    def _block(self, name: str, first: int, last: int, at: int, skipped: bool) -> Block:
        arm: Literal["down", "up"] = "down" if first <= self.turn else "up"
        return Block(name, at, arm, sum(self.macs[first:last]), skipped, 1, first, last)

    def skips(self, blocks: list[Block]) -> Iterator[Skip]:
        """Edges over the turn between the two arms, once for each pair of blocks."""
        owner = {n: k for k, block in enumerate(blocks) for n in range(block.first, block.last)}
        seen: set[Skip] = set()
        floor = len(self.order) - 1
        for v in range(self.turn + 1, len(self.trace.nodes)):
            if not (self.dominance.dep[v] and self.dominance.live[v]):
                continue
            target = next((k for k, block in enumerate(blocks) if block.last > v), None)
            for u in self.dominance.sources[v]:
                source = self._block_of(u, owner)
                if target is None or source is None or u > self.turn or not self.dominance.dep[u]:
                    continue
                skip = Skip(source, target)
                crosses = (blocks[source].arm, blocks[target].arm) == ("down", "up")
                if crosses and blocks[source].level != floor and skip not in seen:
                    seen.add(skip)
                    yield skip

    def _block_of(self, n: int, owner: dict[int, int]) -> int | None:
        """The block that node n is an output of; sums and copies that parents make in between are followed back."""
        while n not in owner:
            carrying = [u for u in self.dominance.sources[n] if self.dominance.dep[u]]
            if not carrying:
                return None
            n = carrying[0]
        return owner[n]


def _merged(blocks: list[Block]) -> list[Block]:
    """Neighbours of a crowded arm are drawn as one, those with the most of their path in common first."""
    drawn: list[Block] = []
    for _, group in groupby(blocks, key=lambda block: (block.level, block.arm)):
        cell = list(group)
        while len(cell) > _MOST:
            alike = [(len(_common(a.name, b.name)), -a.macs - b.macs, k) for k, (a, b) in _pairs(cell)]
            if not alike:
                break
            k = max(alike)[2]
            a, b = cell[k], cell[k + 1]
            name = ".".join(_common(a.name, b.name)) or a.name
            cell[k : k + 2] = [
                replace(a, name=name, macs=a.macs + b.macs, calls=a.calls + b.calls, first=a.first, last=b.last)
            ]
        drawn += cell
    return drawn


def _pairs(cell: list[Block]) -> Iterator[tuple[int, tuple[Block, Block]]]:
    for k, (a, b) in enumerate(pairwise(cell)):
        if a.skipped == b.skipped:
            yield k, (a, b)


def _common(one: str, other: str) -> list[str]:
    parts: list[str] = []
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        parts.append(a)
    return parts
