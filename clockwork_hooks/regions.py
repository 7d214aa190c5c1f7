"""Find the low-resolution regions of a UNet from its graph alone: no block names, no class list.

A region is everything whose every path to the output passes one tensor, its exit, and that works below the
resolution of the tensors that enter it. Regions nest: below the highest level, below the next, and so on
(Clockwork Diffusion, arXiv 2312.08128, Sec. 4.1 and Fig. 8, splits SD v1.5 by hand at one of these places).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from clockwork_hooks.boundary import Builder, Region
from clockwork_hooks.dominance import Dominance, Edge
from clockwork_hooks.errors import ArgumentError, RegionNotFoundError
from clockwork_hooks.graph import Trace, record
from clockwork_hooks.levels import Levels
from clockwork_hooks.macs import node_macs
from clockwork_hooks.report import shape

__all__ = ["choose", "find_region", "find_regions", "match", "regions_of", "skipped_nodes"]

SMALLEST, LARGEST = 0.20, 0.97
_TRIES = 12


def find_regions(unet: nn.Module, /, *args: Any, **kwargs: Any) -> tuple[Region, ...]:
    """Every region of the UNet's main chain, widest first.

    One call is traced (on the meta device too: no weights are needed). Several regions can lie below one level: the
    wider ones also skip blocks *at* that level; the last of a level is "the region below it".

    Args:
        unet: any UNet.
        *args: the arguments of one call, as in a sampling loop.
        **kwargs: likewise.

    Returns:
        The regions, widest first; each one contains the next.

    Raises:
        RegionNotFoundError: nothing can be skipped; says what was looked for, the resolutions seen, and how to name
            a region by hand.
        TraceError: the call could not be recorded.

    Example:
        >>> import torch, clockwork_hooks as ch
        >>> class Tiny(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stem, self.down = torch.nn.Conv2d(3, 8, 3, 1, 1), torch.nn.Conv2d(8, 32, 4, 2, 1)
        ...         self.body, self.up = torch.nn.Conv2d(32, 32, 3, 1, 1), torch.nn.ConvTranspose2d(32, 8, 4, 2, 1)
        ...         self.head = torch.nn.Conv2d(16, 3, 3, 1, 1)
        ...
        ...     def forward(self, x):
        ...         h = self.stem(x)
        ...         return self.head(torch.cat([h, self.up(self.body(self.down(h)))], 1))
        >>> (region,) = ch.find_regions(Tiny(), torch.zeros(1, 3, 16, 16))
        >>> region.entry.path, region.exit.path, region.resolution, region.bottleneck
        ('stem', 'up', (16, 16), (8, 8))

    Source: arXiv 2312.08128, Sec. 4.1, Appendix A.
    """
    return regions_of(record(unet, args, kwargs), unet)


def find_region(
    unet: nn.Module,
    /,
    *args: Any,
    level: int = 1,
    cut: Literal["outer", "paper"] = "outer",
    entry: str | None = None,
    exit: str | None = None,
    **kwargs: Any,
) -> Region:
    """One region: below the highest level by default, or named by hand.

    Args:
        unet: any UNet.
        *args: the arguments of one call.
        level: 1 is the region below the highest resolution ("stage 1" of the paper), 2 the one below the next.
        cut: "outer" skips the downsampler into the region and the upsampler out of it too; "paper" leaves both
            running, so r_in comes after the first and r_out before the second.
        entry: dotted path of the module whose output enters, for a region named by hand; with `exit`.
        exit: dotted path of the module whose output leaves; every path from the entry to the UNet's output must
            pass it.
        **kwargs: likewise arguments of the call.

    Returns:
        The region.

    Raises:
        RegionNotFoundError: there is no such region; lists those there are.
        ArgumentError: level, cut or a path is outside its rule.

    Source: arXiv 2312.08128, Sec. 4.1; Fig. 8 for the paper's own cut of SD v1.5.
    """
    return choose(record(unet, args, kwargs), unet, level=level, cut=cut, entry=entry, exit=exit)


def choose(
    trace: Trace,
    unet: nn.Module,
    *,
    level: int = 1,
    cut: str = "outer",
    entry: str | None = None,
    exit: str | None = None,
) -> Region:
    """`find_region` on an existing trace."""
    if cut not in ("outer", "paper"):
        raise ArgumentError("a cut is 'outer' or 'paper'", seen={"cut": repr(cut)}, do="pass one of these")
    if isinstance(level, bool) or not isinstance(level, int) or level < 1:
        raise ArgumentError("a level is an int of at least 1", seen={"level": repr(level)}, do="pass level=1")
    if (entry is None) != (exit is None):
        raise ArgumentError(
            "a region named by hand has an entry and an exit",
            seen={"entry": entry, "exit": exit},
            do="pass both: dotted paths of the modules whose outputs flow in and out",
        )
    finder = _Finder(trace, unet)
    if entry is not None and exit is not None:
        return finder.by_hand(entry, exit)
    regions = finder.chain()
    found = next((region for region in reversed(regions) if region.level == level), None)
    if found is not None and found.resolution in finder.small:
        raise finder.not_found(regions)
    if found is None:
        levels = sorted({region.level for region in regions})
        raise RegionNotFoundError(
            "there is a region below each level of the UNet but the last",
            seen={"level": level, "levels with a region": levels, **_listed(regions)},
            do=f"pass level={levels[-1]} or less",
        )
    if cut == "outer":
        return found
    if found.inner is None:
        raise RegionNotFoundError(
            "the paper's cut lies between the region's downsampler and its upsampler",
            seen={"region": found.line},
            do='pass cut="outer"',
        )
    return found.inner


def regions_of(trace: Trace, unet: nn.Module) -> tuple[Region, ...]:
    """`find_regions` on an existing trace."""
    return _Finder(trace, unet).chain()


def match(trace: Trace, unet: nn.Module, region: Region) -> Region | None:
    """The same region in another trace of the same UNet (another batch, size or device); None if it has none."""
    finder = _Finder(trace, unet)
    try:
        if region.cut == "hand":
            found = [finder.by_hand(region.entry.path, region.exit.path)]
        else:
            found = [r for outer in finder.chain() for r in (outer, outer.inner) if r is not None]
    except (RegionNotFoundError, ArgumentError):
        return None
    return next((r for r in found if r.fingerprint == region.fingerprint), None)


def skipped_nodes(trace: Trace, region: Region) -> set[int]:
    """Indices of the nodes that an adaptor pass does not run: those of the skipped module calls."""
    wanted = {(call.path, call.ordinal) for call in region.plan.skipped}
    return {
        index for call in trace.calls if (call.path, call.ordinal) in wanted for index in range(call.first, call.last)
    }


def _listed(regions: Iterable[Region]) -> dict[str, str]:
    return {f"region {k}": region.line for k, region in enumerate(regions)}


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An exit that dominates a low-resolution part; `exits` share its entries, widest first."""

    exits: tuple[int, ...]
    entries: tuple[Edge, ...]
    positions: int


class _Finder:
    """The search of one trace."""

    def __init__(self, trace: Trace, unet: nn.Module) -> None:
        self.trace = trace
        self.dom = Dominance(trace)
        self.levels = Levels(trace)
        self.build = Builder(trace, unet, self.dom, self.levels)
        self.rejected: list[str] = []
        self.small: set[tuple[int, ...]] = set()
        self._weighted = self._after_weights()

    def _after_weights(self) -> list[bool]:
        """Nodes that carry the sample through at least one weighted operator; a region's entry is one of them."""
        found = [False] * len(self.trace.nodes)
        for n, node in enumerate(self.trace.nodes):
            if self.dom.dep[n]:
                found[n] = any(found[u] for u in self.dom.sources[n]) or node_macs(node) > 0
        return found

    def chain(self) -> tuple[Region, ...]:
        """The widest region, then again and again the widest that lies in it."""
        found: list[tuple[_Candidate, Region]] = []
        for candidate in sorted(self._candidates(), key=lambda c: -self.dom.size(c.exits[0])):
            if found and not self.dom.within(candidate.exits[0], found[-1][0].exits[0]):
                continue
            region = self._region(candidate)
            if region is not None:
                found.append((candidate, region))
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
        spatial = [(n, node) for n, node in enumerate(self.trace.nodes) if self.levels.is_spatial(node)]
        for entries, exits in groups.items():
            top = max((positions[u] or 0 for u, _ in entries), default=0)
            if not top or not any(self._weighted[u] for u, _ in entries if positions[u] == top):
                continue
            widest = max(exits, key=self.dom.size)
            if self.levels.positions(self.trace.nodes[widest]) != top:
                continue
            if any(self.levels.shrinks(node, top) and self.dom.within(n, widest) for n, node in spatial):
                yield _Candidate(tuple(sorted(exits, key=self.dom.size, reverse=True)), entries, top)

    def _region(self, candidate: _Candidate) -> Region | None:
        """The candidate's region from the top-most of its exits that a module call returns; None if too small."""
        for o in candidate.exits:
            region = self.build.region(o, self.dom.members(o), level=0, cut="outer")
            if region is None:
                continue
            if SMALLEST <= region.macs_share <= LARGEST:
                return region
            self.rejected.append(region.line)
            if region.macs_share < SMALLEST:
                self.small.add(region.resolution)
            return None
        self.rejected.append(f"{self.build.name(candidate.exits[0])}: no module returns the exit")
        return None

    def _inner(self, outer: Region) -> Region | None:
        """The cut inside the downsampler into the region and the upsampler out of it (Appendix A, Fig. 8).

        Its exit is the widest at the next lower resolution; its entry the first tensor there that all else comes from.
        """
        top = self.levels.positions(self.trace.nodes[outer.entry.node]) or 0
        inside = sorted(n for n in self.dom.members(outer.exit.node) if self.dom.dep[n])
        positions = {n: self.levels.positions(self.trace.nodes[n]) or 0 for n in inside}
        edge = max((p for p in positions.values() if p < top), default=0)
        exits = sorted((n for n in inside if positions[n] == edge > 0), key=self.dom.size, reverse=True)
        for o in exits[:_TRIES]:
            for d in [n for n in inside if self.dom.within(n, o) and positions[n] == edge][:_TRIES]:
                region = self.between(d, o, level=outer.level, cut="paper") if d != o else None
                if region is not None:
                    return region
        return None

    def between(self, source: int, target: int, *, level: int, cut: str) -> Region | None:
        """What depends on `source` and reaches the output only through `target`, if nothing else enters."""
        inside = self.dom.between(source, target)
        if target not in inside or {u for u, _ in self.dom.crossing(inside)[0]} != {source}:
            return None
        return self.build.region(target, inside, level=level, cut=cut)

    def by_hand(self, entry: str, exit: str) -> Region:
        """What lies between two module outputs: descendants of the entry whose every path passes the exit."""
        source, target = (self._output_of(path, role) for path, role in ((entry, "entry"), (exit, "exit")))
        region = self.between(source, target, level=0, cut="hand")
        if region is None:
            inside = self.dom.between(source, target)
            others = {self.build.name(u) for u, _ in self.dom.crossing(inside)[0]} - {entry}
            raise RegionNotFoundError(
                "every path from the entry must pass the exit, and nothing else that depends on the sample may enter",
                seen={"entry": entry, "exit": exit, "also enters": ", ".join(sorted(others)) or "nothing"},
                do="choose a later entry or an earlier exit; print(ch.trace(...).graph) shows the paths",
            )
        return region

    def _output_of(self, path: str, role: str) -> int:
        for call in reversed(self.trace.calls):
            if call.path == path:
                specs = self.build.tensors(call.output)
                if len(specs) == 1 and self.dom.dep[specs[0].node.meta["index"]]:
                    return int(specs[0].node.meta["index"])
        known = [call.path for call in self.trace.calls if call.path and len(self.build.tensors(call.output)) == 1]
        raise ArgumentError(
            f"the {role} is a called module that returns one tensor depending on the sample",
            seen={role: path, "such modules": ", ".join(dict.fromkeys(known[:40]))},
            do="pass one of these dotted paths",
        )

    def _resolutions(self) -> str:
        return ", ".join(dict.fromkeys(map(shape, self.levels.spatial.values()))) or "none"

    def not_found(self, wider: tuple[Region, ...] = ()) -> RegionNotFoundError:
        """What was looked for and what is there; `wider` regions may be had, but not by default."""
        merges = self._upward_exits()
        seen: dict[str, object] = {
            "model": self.trace.model,
            "sample": "×".join(map(str, self.trace.inputs[self.trace.sample].meta["shape"])),
            "resolutions": self._resolutions(),
        }
        if merges:
            seen["several exits lead back up"] = ", ".join(merges)
        for k, line in enumerate(self.rejected):
            seen[f"rejected {k}"] = line
        seen.update(_listed(wider))
        return RegionNotFoundError(
            "a region is a part that works below the resolution of its entry and leaves through one tensor that a "
            f"module returns, with {SMALLEST:.0%} to {LARGEST:.0%} of the MACs",
            seen=seen,
            do=("take a wider one: wrap(unet, region=find_regions(...)[0]); or " if wider else "")
            + "name a part by hand: find_region(..., entry='blocks.4', exit='blocks.20'), modules whose outputs flow in"
            " and out",
        )

    def _upward_exits(self) -> list[str]:
        """Operators of the highest resolution fed from below it."""
        top = next(iter(self.levels.spatial), 0)
        found: list[str] = []
        for n, node in enumerate(self.trace.nodes):
            if self.dom.live[n] and self.dom.dep[n] and self.levels.positions(node) == top:
                below = [u for u in self.dom.sources[n] if (self.levels.positions(self.trace.nodes[u]) or top) < top]
                if any(self.dom.dep[u] for u in below):
                    found.append(self.build.name(n))
        return found if len(found) > 1 else []
