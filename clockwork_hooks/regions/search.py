"""The search for regions in one trace: candidates by their entry edges, nested into one chain.

Why has a UNet no region? One sentence for the error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from torch import nn

from clockwork_hooks.errors import RegionNotFoundError
from clockwork_hooks.graph.recorder import ModuleCall
from clockwork_hooks.graph.tracing import Trace
from clockwork_hooks.regions.build import Builder
from clockwork_hooks.regions.dominance import Dominance, Edge
from clockwork_hooks.regions.levels import Levels
from clockwork_hooks.regions.region import Region
from clockwork_hooks.reports.tables import shape

__all__ = ["Finder", "listed", "of_fingerprint", "reason"]


def reason(trace: Trace, dom: Dominance, levels: Levels, build: Builder, small: Collection[tuple[int, ...]]) -> str:
    """What stands in the way of a region: no lower resolution, several ways back up or none, its size, or no skip.

    The highest level speaks first. Where one way leads back up to it and nothing goes round that way, a region may be
    of a lower level, so the next one is asked.

    Args:
        trace, dom, levels, build: of the search that found nothing.
        small: resolutions of the levels below which a region is too small.
    """
    worked = sorted(_worked(trace, dom, levels, build), reverse=True)
    if len(worked) < 2:
        return f"no resolution change: every layer works at {_space(levels, max(worked, default=0))}"
    passed = ""  # what all passes, at the highest level
    for level in worked[:-1]:
        exits = _upward(trace, dom, levels, build, level)
        if len(exits) > 1:
            names = [name if count == 1 else f"{name} ({count}×)" for name, count in Counter(exits).items()]
            to = f" to {_space(levels, level)}" if passed else ""
            return f"no single exit: several exits lead back up{to}: {', '.join(names)}"
        if not exits and not passed:
            return f"nothing leads back up to {_space(levels, level)}"
        if levels.spatial[level] in small:
            return f"what lies below {_space(levels, level)} is too small a part"
        passed = passed or exits[0]
    return (
        f"nothing of {_space(levels, worked[0])} goes round the low resolutions: all passes {passed}, and kept from "
        "the step before it would repeat that step's output"
    )


def _space(levels: Levels, positions: int) -> str:
    return shape(levels.spatial.get(positions, ())) or "one resolution"


def _worked(trace: Trace, dom: Dominance, levels: Levels, build: Builder) -> set[int]:
    """Levels at which something multiplies and modules return maps: those of filters padded by functions are none."""
    made = {spec.node.meta["index"] for call in trace.calls if call.path for spec in build.tensors(call.output)}
    returned = {levels.positions(dom.nodes[n]) or 0 for n in made if dom.live[n] and dom.dep[n]}
    return returned & set(levels.worked)


def _upward(trace: Trace, dom: Dominance, levels: Levels, build: Builder, top: int) -> list[str]:
    """What takes lower resolutions and gives the highest: the outermost such module calls, then bare operators."""

    def of(nodes: list[int]) -> set[int]:
        """Positions of those that depend on the sample; gates of one pixel and unknown ones left out."""
        found = {levels.positions(dom.nodes[n]) or 0 for n in nodes if dom.dep[n] and dom.live[n]}
        return {p for p in found if math.prod(levels.spatial.get(p, (1,))) > 1}

    def lifts(call: ModuleCall) -> bool:
        taken, given = (of([s.node.meta["index"] for s in build.tensors(v)]) for v in (call.inputs, call.output))
        return given == {top} and bool(taken) and max(taken) < top

    names: dict[int, str] = {}
    inside: set[int] = set()
    below: set[int] = set()  # nodes below the top, and patches of tokens unfolded on their way to the top's shape
    for call in trace.calls[1:]:
        if call.path and call.first not in inside and lifts(call):
            names[call.first] = call.path
            inside.update(range(call.first, call.last))
    space = levels.spatial[top]
    for n, node in enumerate(dom.nodes):
        here = of([n])
        rises = here == {top} and any(u in below for u in dom.sources[n])
        folded = tuple(node.meta.get("shape", ()))[-len(space) :] != space  # channels in the batch, space to channels
        if (here and max(here) < top) or (rises and folded):
            below.add(n)
        elif rises and n not in inside:
            names[n] = _origin(dom, build, n)
    return [name for _, name in sorted(names.items())]


def _origin(dom: Dominance, build: Builder, n: int) -> str:
    """The name of node n; of an operator that only views what a module returns, that module's too."""
    source, operator = n, build.name(n)
    while not build.returned(source):
        values = math.prod(dom.nodes[source].meta.get("shape", ()))
        carrying = [u for u in dom.sources[source] if dom.dep[u]]
        if len(carrying) != 1 or math.prod(dom.nodes[carrying[0]].meta.get("shape", ())) < values:
            return operator
        source = carrying[0]
    return operator if source == n else f"{operator}, of {build.name(source)}"


SMALLEST, LARGEST = 0.20, 0.97
_TRIES = 12


def listed(regions: Iterable[Region]) -> dict[str, str]:
    """Regions as lines of an error."""
    return {f"region {k}": region.line for k, region in enumerate(regions)}


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An exit that dominates a low-resolution part; `exits` share its entries, widest first."""

    exits: tuple[int, ...]
    entries: tuple[Edge, ...]
    positions: int


class Finder:
    """The search of one trace."""

    def __init__(self, trace: Trace, unet: nn.Module) -> None:
        self.trace = trace
        self.dom = Dominance(trace)
        self.levels = Levels(trace)
        self.build = Builder(trace, unet, self.dom, self.levels)
        self.rejected: list[str] = []
        self.small: set[tuple[int, ...]] = set()  # levels below which the region is too small
        self._weighted = self._after_weights()
        self._positions = np.array([self.levels.positions(node) or 0 for node in trace.nodes], dtype=np.int64)
        self._lows: dict[int, list[int]] = {}
        self._cuts: dict[Edge, Region | None] = {}

    def _after_weights(self) -> list[bool]:
        """Nodes that carry the sample through at least one weighted operator; a region's entry is one of them."""
        found = [False] * len(self.trace.nodes)
        for n, macs in enumerate(self.build.macs):
            if self.dom.dep[n]:
                found[n] = any(found[u] for u in self.dom.sources[n]) or macs > 0
        return found

    def chain(self) -> tuple[Region, ...]:
        """The region with the most MACs, then again and again the one with the most MACs that lies in it."""
        found: list[tuple[_Candidate, Region]] = []
        macs = self.dom.totals(self.build.macs)
        for candidate in sorted(self._candidates(), key=lambda c: (-macs[c.exits[0]], -self.dom.size(c.exits[0]))):
            around = found[-1][0] if found else None
            if around and not self.dom.within(candidate.exits[0], around.exits[0]):
                continue
            region = self._region(candidate)
            if region is None:
                continue
            if SMALLEST <= region.macs_share <= LARGEST:
                found.append((candidate, region))
                continue
            self.rejected.append(region.line)
            if region.macs_share < SMALLEST and self._holds_most(candidate, around):
                self.small.add(region.resolution)
        if not found:
            raise self.not_found()
        edges = sorted({candidate.positions for candidate, _ in found}, reverse=True)
        levelled = [replace(region, level=edges.index(candidate.positions) + 1) for candidate, region in found]
        return tuple(replace(region, inner=self._inner(region)) for region in levelled)

    def _candidates(self) -> Iterable[_Candidate]:
        """Exits grouped by their entry edges, where the exit is back at the entries' resolution."""
        groups: dict[tuple[Edge, ...], list[int]] = {}
        for o, edges in self.dom.entries().items():
            groups.setdefault(tuple(sorted(edges)), []).append(o)
        positions = {u: self.levels.positions(self.trace.nodes[u]) for u in {u for edges in groups for u, _ in edges}}
        largest = max(self.levels.spatial, default=0)
        lower = [(n, node) for n, node in enumerate(self.trace.nodes) if self.levels.shrinks(node, largest)]
        narrow: dict[int, list[int]] = {}  # positions of a level → where the work below it is
        for entries, exits in groups.items():
            top = max((positions[u] or 0 for u, _ in entries), default=0)
            if not top or not any(self._weighted[u] for u, _ in entries if positions[u] == top):
                continue
            widest = max(exits, key=self.dom.size)
            if self.levels.positions(self.trace.nodes[widest]) != top:
                continue
            if top not in narrow:
                narrow[top] = self.dom.places(n for n, node in lower if self.levels.shrinks(node, top))
            if self.dom.holds(widest, narrow[top]):
                yield _Candidate(tuple(sorted(exits, key=self.dom.size, reverse=True)), entries, top)

    def _region(self, candidate: _Candidate) -> Region | None:
        """The candidate's region from the top-most of its exits that a module call returns."""
        for o in candidate.exits:
            region = self.build.region(o, self.dom.members(o), level=0, cut="outer")
            if region is not None:
                return region
        self.rejected.append(f"{self.build.name(candidate.exits[0])}: no module returns the exit")
        return None

    def _holds_most(self, candidate: _Candidate, around: _Candidate | None) -> bool:
        """Does it hold most of the work below its level? A small "U" of its own inside a block does not."""
        top = candidate.positions
        if top not in self._lows:
            low = [
                macs if 0 < p < top else 0 for macs, p in zip(self.build.macs, self._positions.tolist(), strict=True)
            ]
            self._lows[top] = self.dom.totals(low)
        totals = self._lows[top]
        whole = around.exits[0] if around else len(self.trace.nodes)
        return 2 * totals[candidate.exits[0]] > totals[whole]

    def _inner(self, outer: Region) -> Region | None:
        """The cut inside the downsampler into the region and the upsampler out of it (Appendix A, Fig. 8).

        Its exit is the widest at the next lower resolution; its entry the first tensor there that all else comes from.
        """
        top = self._positions[outer.entry.node]
        inside = np.sort(self.dom.members(outer.exit.node))
        inside = inside[self.dom.depends[inside]]
        positions = self._positions[inside]
        edge = positions[positions < top].max(initial=0)
        there = inside[positions == edge].tolist() if edge else []
        for o in sorted(there, key=self.dom.size, reverse=True)[:_TRIES]:
            for d in list(islice((n for n in there if self.dom.within(n, o)), _TRIES)):
                if (d, o) not in self._cuts:  # many regions have one cut
                    self._cuts[d, o] = self.between(d, o, level=0, cut="paper") if d != o else None
                region = self._cuts[d, o]
                if region is not None:
                    return replace(region, level=outer.level)
        return None

    def between(self, source: int, target: int, *, level: int, cut: str) -> Region | None:
        """What depends on `source` and reaches the output only through `target`, if nothing else enters."""
        inside = self.dom.between(source, target)
        if target not in inside or {u for u, _ in self.dom.crossing(self.dom.mask(inside))[0]} != {source}:
            return None
        return self.build.region(target, inside, level=level, cut=cut)

    def _resolutions(self) -> str:
        return ", ".join(dict.fromkeys(map(shape, self.levels.spatial.values()))) or "none"

    def not_found(self, wider: tuple[Region, ...] = ()) -> RegionNotFoundError:
        """What was looked for and what is there; `wider` regions may be had, but not by default."""
        seen: dict[str, object] = {
            "model": self.trace.model,
            "sample": shape(self.trace.inputs[self.trace.sample].meta["shape"]),
            "resolutions": self._resolutions(),
            "why": reason(self.trace, self.dom, self.levels, self.build, self.small),
        }
        for k, line in enumerate(self.rejected):
            seen[f"rejected {k}"] = line
        seen.update(listed(wider))
        return RegionNotFoundError(
            "a region is a part that works below the resolution of its entry and leaves through one tensor that a "
            f"module returns, with {SMALLEST:.0%} to {LARGEST:.0%} of the MACs",
            seen=seen,
            do=("take a wider one: {share}; or " if wider else "")
            + "name a part by hand: find_region(..., {entry}, {exit}), modules whose outputs flow in and out; or "
            "{modules}, those to skip",
            arguments={
                "share": SMALLEST,
                "entry": "blocks.4",
                "exit": "blocks.20",
                "modules": ["blocks.5:blocks.20"],
            },
        )


def of_fingerprint(chain: Iterable[Region], fingerprint: str) -> Region | None:
    """The region of a chain, or the paper's cut of one, that has this fingerprint; None if there is none."""
    found = (edge for outer in chain for edge in (outer, outer.inner) if edge is not None)
    return next((region for region in found if region.fingerprint == fingerprint), None)
