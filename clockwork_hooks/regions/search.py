"""Search one trace for its regions: candidates by their entry edges, nested into one chain; or why there is none."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from torch import nn

from clockwork_hooks._numbers import shape
from clockwork_hooks.errors import RegionNotFoundError
from clockwork_hooks.graph.recorder import ModuleCall
from clockwork_hooks.graph.tracing import Trace
from clockwork_hooks.regions.build import Facts, Part, between, nodes_of
from clockwork_hooks.regions.flow import Edge
from clockwork_hooks.regions.region import Region

SMALLEST, LARGEST = 0.20, 0.97
_TRIES = 12


def listed(regions: Iterable[Region]) -> dict[str, str]:
    """Regions as lines of an error."""
    return {f"region {k}": region.line for k, region in enumerate(regions)}


def of_fingerprint(
    chain: Iterable[Region], fingerprint: str, *, level: int | None = None, cut: str = "outer"
) -> Region | None:
    """The region of a chain, or the paper's cut of one, that has this fingerprint; None if there is none.

    Of several, which are then cut at the same values, the one of this level and cut.
    """
    edges = (edge for outer in chain for edge in (outer, outer.inner) if edge is not None)
    alike = [edge for edge in edges if edge.fingerprint == fingerprint]
    return max(alike, key=lambda edge: (edge.cut == cut) + (edge.level == level), default=None)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An exit that dominates a low-resolution part; `exits` share its entries, widest first."""

    exits: tuple[int, ...]
    entries: tuple[Edge, ...]
    positions: int


@dataclass(frozen=True, slots=True)
class Link:
    """A part of the chain, and the level below which it lies."""

    part: Part
    level: int


class Search:
    """The search of one trace.

    Attributes:
        facts: what it looks up.
        small: resolutions of the levels below which the region is too small.
    """

    def __init__(self, trace: Trace, unet: nn.Module) -> None:
        self.facts = Facts(trace, unet)
        self.small: set[tuple[int, ...]] = set()
        self._rejected: list[Part | str] = []
        self._links: tuple[Link, ...] = ()
        self._regions: dict[Link, Region] = {}
        self._lows: dict[int, list[int]] = {}
        self._cuts: dict[Edge, Region | None] = {}

    def chain(self) -> tuple[Region, ...]:
        """The region with the most MACs, then again and again the one with the most MACs that lies in it.

        Raises:
            RegionNotFoundError: there is none.
        """
        return tuple(map(self.region, self.links()))

    def region(self, link: Link) -> Region:
        """The region of a part of the chain."""
        if link not in self._regions:
            region = link.part.region(level=link.level, cut="outer")
            self._regions[link] = replace(region, inner=self._inner(region))
        return self._regions[link]

    def links(self) -> tuple[Link, ...]:
        """The chain, of which no region is made yet; raises as `chain` does."""
        self._links = self._links or self._nested()
        return self._links

    def _nested(self) -> tuple[Link, ...]:
        self._rejected = []
        chosen: list[tuple[_Candidate, Part]] = []
        dominance = self.facts.dominance
        macs = dominance.totals(self.facts.trace.macs)
        for candidate in sorted(self._candidates(), key=lambda c: (-macs[c.exits[0]], -dominance.size(c.exits[0]))):
            around = chosen[-1][0] if chosen else None
            if around and not dominance.within(candidate.exits[0], around.exits[0]):
                continue
            part = self._part(candidate)
            if part is None:
                continue
            if SMALLEST <= part.macs_share <= LARGEST:
                chosen.append((candidate, part))
                continue
            self._rejected.append(part)
            if part.macs_share < SMALLEST and self._holds_most(candidate, around):
                self.small.add(part.resolution)
        if not chosen:
            raise self.no_region()
        edges = sorted({candidate.positions for candidate, _ in chosen}, reverse=True)
        return tuple(Link(part, edges.index(candidate.positions) + 1) for candidate, part in chosen)

    def _candidates(self) -> Iterable[_Candidate]:
        """Exits grouped by their entry edges, where the exit is back at the entries' resolution."""
        dominance, levels, nodes = self.facts.dominance, self.facts.levels, self.facts.trace.nodes
        groups: dict[tuple[Edge, ...], list[int]] = {}
        for o, edges in dominance.entries().items():
            groups.setdefault(tuple(sorted(edges)), []).append(o)
        weighted, positions = self._after_weights(), self.facts.positions.tolist()
        largest = max(levels.spatial, default=0)
        lower = [(n, node) for n, node in enumerate(nodes) if levels.shrinks(node, largest)]
        narrow: dict[int, list[int]] = {}  # positions of a level → where the work below it is
        for entries, exits in groups.items():
            top = max((positions[u] for u, _ in entries), default=0)
            if not top or not any(weighted[u] for u, _ in entries if positions[u] == top):
                continue
            widest = max(exits, key=dominance.size)
            if positions[widest] != top:
                continue
            if top not in narrow:
                narrow[top] = dominance.places(n for n, node in lower if levels.shrinks(node, top))
            if dominance.holds(widest, narrow[top]):
                yield _Candidate(tuple(sorted(exits, key=dominance.size, reverse=True)), entries, top)

    def _after_weights(self) -> list[bool]:
        """Nodes that carry the sample through at least one weighted operator; a region's entry is one of them."""
        dominance = self.facts.dominance
        after = [False] * len(self.facts.trace.nodes)
        for n, macs in enumerate(self.facts.trace.macs):
            if dominance.dep[n]:
                after[n] = any(after[u] for u in dominance.sources[n]) or macs > 0
        return after

    def _part(self, candidate: _Candidate) -> Part | None:
        """The candidate's part from the top-most of its exits that a module call returns."""
        for o in candidate.exits:
            part = Part.of(self.facts, o, self.facts.dominance.members(o))
            if part is not None:
                return part
        self._rejected.append(f"{self.facts.name(candidate.exits[0])}: no module returns the exit")
        return None

    def _holds_most(self, candidate: _Candidate, around: _Candidate | None) -> bool:
        """Does it hold most of the work below its level? A small "U" of its own inside a block does not."""
        top, trace = candidate.positions, self.facts.trace
        if top not in self._lows:
            positions = self.facts.positions.tolist()
            low = [macs if 0 < p < top else 0 for macs, p in zip(trace.macs, positions, strict=True)]
            self._lows[top] = self.facts.dominance.totals(low)
        totals = self._lows[top]
        whole = around.exits[0] if around else len(trace.nodes)
        return 2 * totals[candidate.exits[0]] > totals[whole]

    def _inner(self, outer: Region) -> Region | None:
        """The cut inside the downsampler into the region and the upsampler out of it (Appendix A, Fig. 8).

        Its exit is the widest at the next lower resolution; its entry the first tensor there that all else comes from.
        """
        dominance, top = self.facts.dominance, self.facts.positions[outer.entry.node]
        inside = np.sort(dominance.members(outer.exit.node))
        inside = inside[dominance.depends[inside]]
        positions = self.facts.positions[inside]
        edge = positions[positions < top].max(initial=0)
        there = inside[positions == edge].tolist() if edge else []
        for o in sorted(there, key=dominance.size, reverse=True)[:_TRIES]:
            for d in islice((n for n in there if dominance.within(n, o)), _TRIES):
                if (d, o) not in self._cuts:  # many regions have one cut
                    self._cuts[d, o] = between(self.facts, d, o, level=0, cut="paper") if d != o else None
                region = self._cuts[d, o]
                if region is not None:
                    return replace(region, level=outer.level)
        return None

    def no_region(self, wider: tuple[Region, ...] = ()) -> RegionNotFoundError:
        """What was looked for and what is there; `wider` regions may be had, but not by default."""
        trace, levels = self.facts.trace, self.facts.levels
        seen: dict[str, object] = {
            "model": trace.model,
            "sample": shape(trace.inputs[trace.sample].meta["shape"]),
            "resolutions": ", ".join(dict.fromkeys(map(shape, levels.spatial.values()))) or "none",
            "why": _reason(self.facts, self.small),
        }
        for k, one in enumerate(self._rejected):
            seen[f"rejected {k}"] = one if isinstance(one, str) else one.region(level=0, cut="outer").line
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


# -- why there is none ----------------------------------------------------------------------------------------------


def _reason(facts: Facts, small: set[tuple[int, ...]]) -> str:
    """What stands in the way of a region: no lower resolution, several ways back up or none, its size, or no skip.

    The highest level speaks first. Where one way leads back up to it and nothing goes round that way, a region may be
    of a lower level, so the next one is asked.
    """
    worked, spatial = sorted(_worked(facts), reverse=True), facts.levels.spatial
    if len(worked) < 2:
        return f"no resolution change: every layer works at {_space(facts, max(worked, default=0))}"
    passed = ""  # what all passes, at the highest level
    for level in worked[:-1]:
        exits = _upward(facts, level)
        if len(exits) > 1:
            names = [name if count == 1 else f"{name} ({count}×)" for name, count in Counter(exits).items()]
            to = f" to {_space(facts, level)}" if passed else ""
            return f"no single exit: several exits lead back up{to}: {', '.join(names)}"
        if not exits and not passed:
            return f"nothing leads back up to {_space(facts, level)}"
        if spatial[level] in small:
            return f"what lies below {_space(facts, level)} is too small a part"
        passed = passed or exits[0]
    return (
        f"nothing of {_space(facts, worked[0])} goes round the low resolutions: all passes {passed}, and kept from "
        "the step before it would repeat that step's output"
    )


def _space(facts: Facts, positions: int) -> str:
    return shape(facts.levels.spatial.get(positions, ())) or "one resolution"


def _worked(facts: Facts) -> set[int]:
    """Levels at which something multiplies and modules return maps: those of filters padded by functions are none."""
    dominance = facts.dominance
    nodes = {n for call in facts.trace.calls if call.path for n in nodes_of(call.output)}
    returned = {int(facts.positions[n]) for n in nodes if dominance.live[n] and dominance.dep[n]}
    return returned & set(facts.levels.worked)


def _upward(facts: Facts, top: int) -> list[str]:
    """What takes lower resolutions and gives the highest: the outermost such module calls, then bare operators."""
    dominance, spatial, positions = facts.dominance, facts.levels.spatial, facts.positions.tolist()

    def levels_of(nodes: list[int]) -> set[int]:
        """Positions of those that depend on the sample; gates of one pixel and unknown ones left out."""
        levels = {positions[n] for n in nodes if dominance.dep[n] and dominance.live[n]}
        return {p for p in levels if math.prod(spatial.get(p, (1,))) > 1}

    def lifts(call: ModuleCall) -> bool:
        below, above = levels_of(nodes_of(call.inputs)), levels_of(nodes_of(call.output))
        return above == {top} and bool(below) and max(below) < top

    names: dict[int, str] = {}
    inside: set[int] = set()
    below: set[int] = set()  # nodes below the top, and patches of tokens unfolded on their way to the top's shape
    for call in facts.trace.calls[1:]:
        if call.path and call.first not in inside and lifts(call):
            names[call.first] = call.path
            inside.update(range(call.first, call.last))
    space = spatial[top]
    for n, node in enumerate(facts.trace.nodes):
        here = levels_of([n])
        rises = here == {top} and any(u in below for u in dominance.sources[n])
        folded = tuple(node.meta.get("shape", ()))[-len(space) :] != space  # channels in the batch, space to channels
        if (here and max(here) < top) or (rises and folded):
            below.add(n)
        elif rises and n not in inside:
            names[n] = _origin(facts, n)
    return [name for _, name in sorted(names.items())]


def _origin(facts: Facts, n: int) -> str:
    """The name of node n; of an operator that only views what a module returns, that module's too."""
    source, operator, nodes = n, facts.name(n), facts.trace.nodes
    while source not in facts.producers:
        values = math.prod(nodes[source].meta.get("shape", ()))
        carrying = [u for u in facts.dominance.sources[source] if facts.dominance.dep[u]]
        if len(carrying) != 1 or math.prod(nodes[carrying[0]].meta.get("shape", ())) < values:
            return operator
        source = carrying[0]
    return operator if source == n else f"{operator}, of {facts.name(source)}"
