"""Find the regions of a UNet from its graph alone: all of them, or the one that a `Choice` asks for.

A region is everything whose every path to the output passes one tensor, its exit, and that works below the resolution
of the tensors that enter it. Regions nest: below the highest level, below the next, and so on (Clockwork Diffusion,
arXiv 2312.08128, Sec. 4.1 and Fig. 8, splits SD v1.5 by hand at one of these places). A region may also be named by
hand, by its two ends or by the modules to skip; what is named is checked, not taken on trust.

`Search` is how: candidates by their entry edges, nested into one chain; or why there is none. `Choice` picks of these.

Whatever takes `region=` takes a `Region` or a `Choice`; the options of a choice may also be passed one by one, as
`share=0.9`. `split_options` and `region_or_choice` are how they all do it.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from typing import Any, TypedDict

import numpy as np
from torch import nn

from clockwork_hooks._numbers import percent, shape
from clockwork_hooks.errors import ArgumentError, RegionNotFoundError, is_several, is_whole, no_option
from clockwork_hooks.graph.recorder import ModuleCall
from clockwork_hooks.graph.tracing import Trace, module_paths, record
from clockwork_hooks.regions.build import Facts, Part, between, build, narrowed, nodes_of
from clockwork_hooks.regions.fingerprint import PREFIX
from clockwork_hooks.regions.flow import Edge
from clockwork_hooks.regions.region import Region


class ChoiceOptions(TypedDict, total=False):
    """The options of a `Choice` that functions also take one by one."""

    level: int | None
    resolution: int | tuple[int, ...] | None
    share: float | None
    modules: Iterable[str] | str | None
    entry: str | None
    exit: str | None
    cut: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which region to skip; without options the one below the highest level.

    `wrap`, `find_region`, `flops_report`, `bench` and `distill` take it as `region=`, instead of a `Region` that was
    found before. They also take these options one by one.

    Attributes:
        level: the region below this level; 1 is the highest resolution ("stage 1" of the paper), 2 the next.
        resolution: the region whose edge has this spatial shape: (32, 32), or 32 for all axes.
        share: the narrowest region that skips at least this share of the MACs, 0 to 1, at any level; with `level` or
            `resolution`, among those there. 0.9 is nearly all of the UNet (as DeepCache does), 0.3 its lowest levels.
        modules: dotted paths of the modules to skip, all their calls; "blocks.4:blocks.20" is a whole range. For
            UNets whose middle has no lower resolution, and for transformers.
        entry: dotted path of the module whose output enters; with `exit`.
        exit: dotted path of the module whose output leaves; every path from the entry to the UNet's output must
            pass it.
        cut: "outer" skips the downsampler into the region and the upsampler out of it too; "paper" leaves both
            running, so r_in comes after the first and r_out before the second.
        fingerprint: of a region that was found before: if the UNet has it, it is chosen, whatever level and cut say.
        strict: with a fingerprint: if the UNet does not have it, an error is raised.

    Raises:
        ArgumentError: an option is outside its rule, or several ways to choose are mixed.

    Example:
        >>> import clockwork_hooks as ch
        >>> from clockwork_hooks.models import load_model
        >>> unet, args, kwargs = load_model("sd15")  # on the meta device: no weights
        >>> region = ch.find_region(unet, *args, region=ch.Choice(resolution=32, cut="paper"), **kwargs)
        >>> f"{region.macs_share:.1%} of MACs, {region.exit.path}"
        '58.0% of MACs, up_blocks.2.attentions.2'

    Source: arXiv 2312.08128, Sec. 4.1; Fig. 8 for the paper's own cut of SD v1.5.
    """

    level: int | None = None
    resolution: int | tuple[int, ...] | None = None
    share: float | None = None
    modules: Iterable[str] | str | None = None
    entry: str | None = None
    exit: str | None = None
    cut: str = "outer"
    fingerprint: str | None = None
    strict: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.modules, str):
            object.__setattr__(self, "modules", (self.modules,))
        elif self.modules is not None:
            object.__setattr__(self, "modules", tuple(self.modules) if is_several(self.modules) else ())
        self._check_values()
        self._check_together()

    def _check_values(self) -> None:
        if self.cut not in ("outer", "paper"):
            raise ArgumentError("a cut is 'outer' or 'paper'", seen={"cut": repr(self.cut)}, do="pass one of these")
        if self.level is not None and not is_whole(self.level, 1):
            raise ArgumentError("a level is an int of at least 1", seen={"level": repr(self.level)}, do="pass level=1")
        axes = self.resolution if isinstance(self.resolution, tuple) else (self.resolution,)
        if self.resolution is not None and not (axes and all(is_whole(axis, 1) for axis in axes)):
            raise ArgumentError(
                "a resolution is one edge, or the spatial shape as a tuple",
                seen={"resolution": repr(self.resolution)},
                do="pass resolution=32 or resolution=(32, 32)",
            )
        if self.share is not None and not (isinstance(self.share, float) and 0 < self.share < 1):
            raise ArgumentError(
                "a share is a fraction of a full pass's MACs, between 0 and 1",
                seen={"share": repr(self.share)},
                do="pass {share}",
                arguments={"share": 0.5},
            )
        modules = self.modules
        if modules is not None and not (modules and all(isinstance(path, str) for path in modules)):
            raise ArgumentError(
                "modules= lists the dotted paths of the modules to skip",
                seen={"modules": repr(modules)},
                do='pass modules=["blocks.4", "blocks.5"]',
            )

    def _check_together(self) -> None:
        if (self.entry is None) != (self.exit is None):
            raise ArgumentError(
                "a region named by hand has an entry and an exit",
                seen={"entry": self.entry, "exit": self.exit},
                do="pass both: dotted paths of the modules whose outputs flow in and out",
            )
        ways = {name: getattr(self, name) for name in ("level", "resolution", "modules", "entry")}
        chosen = {name: value for name, value in ways.items() if value is not None}
        if {"modules", "entry"} & set(chosen):
            chosen |= {"share": self.share} if self.share is not None else {}
            chosen |= {"cut": self.cut} if self.cut != "outer" else {}
        if len(chosen) > 1:
            raise ArgumentError(
                "a region is chosen in one way: level=, resolution=, modules=, or entry= and exit=; share= and cut= go "
                "with the first two",
                seen=chosen,
                do="pass one of these",
            )

    @property
    def is_default(self) -> bool:
        """Does it ask for no region by name? Only where the edge lies may be said."""
        return replace(self, cut="outer") == Choice()

    @property
    def exits(self) -> frozenset[str]:
        """Paths of the modules whose last call returns the exit, where the choice tells."""
        named = [self.exit] if self.exit is not None else [path.rpartition(":")[2] for path in self.modules or ()]
        return frozenset(named)

    def find(self, trace: Trace, unet: nn.Module) -> Region:
        """The region in this trace.

        Raises:
            RegionNotFoundError: there is none like that; lists those there are.
            ArgumentError: a path names no module of this UNet.
        """
        return self.among(Search(trace, unet))

    def among(self, search: Search) -> Region:
        """`find`, in what a search has found."""
        if self.modules is not None:
            return by_modules(search.facts, self.modules)
        if self.entry is not None and self.exit is not None:
            return by_ends(search.facts, self.entry, self.exit)
        links = search.links()
        if self.fingerprint is not None:
            same = of_fingerprint(search.chain(), self.fingerprint, level=self.level, cut=self.cut)
            if same is not None:
                return same
        if self.strict:
            raise RegionNotFoundError(
                "the region must be one of this UNet's architecture",
                seen={"model": search.facts.trace.model, "fingerprint": self.fingerprint, **listed(search.chain())},
                do="use it with the UNet that it was found for, or leave it out; for a plan, measure this UNet: "
                "ch.plan(unet, generate, ...); so too if an earlier version made it, whose fingerprints do not begin "
                f"with {PREFIX}",
            )
        level = 1 if self.level is self.resolution is self.share is None else self.level
        fitting = [link for link in links if level in (None, link.level)]
        if not fitting:
            raise _none_such(search, "level", level, [link.level for link in links])
        edges = ((link, link.part if self.cut == "outer" else search.region(link).inner) for link in fitting)
        pairs = [(link, edge) for link, edge in edges if edge is not None]
        if not pairs:
            raise RegionNotFoundError(
                "the paper's cut lies between the region's downsampler and its upsampler",
                seen={"region": search.region(fitting[-1]).line},
                do='pass cut="outer"',
            )
        there: list[object] = [shape(edge.resolution) for _, edge in pairs]
        pairs = [(link, edge) for link, edge in pairs if self._has_resolution(edge.resolution)]
        if not pairs:
            raise _none_such(search, "resolution", self.resolution, there)
        if self.share is None and pairs[-1][0].part.resolution in search.small:
            raise search.no_region(search.chain())
        wide = [(link, edge) for link, edge in pairs if edge.macs_share >= (self.share or 0)]
        if not wide:
            raise _none_such(search, "share", percent(self.share or 0), [percent(e.macs_share) for _, e in pairs])
        link, edge = wide[-1]
        return edge if isinstance(edge, Region) else search.region(link)

    def _has_resolution(self, resolution: tuple[int, ...]) -> bool:
        if self.resolution is None or isinstance(self.resolution, tuple):
            return self.resolution in (None, resolution)
        return set(resolution) == {self.resolution}


_NAMED = "a region is chosen by options of known names"


def split_options(
    unet: nn.Module, kwargs: Mapping[str, Any], beside: Collection[str] = ()
) -> tuple[ChoiceOptions, dict[str, Any]]:
    """Tell the options of a choice from the arguments of the UNet's call.

    Args:
        unet: whose call it is.
        kwargs: both together.
        beside: options that the caller has too, and was not given.

    Raises:
        ArgumentError: the UNet takes no such argument, and an option has nearly that name.
    """
    options: Any = {name: value for name, value in kwargs.items() if name in ChoiceOptions.__annotations__}
    rest = {name: value for name, value in kwargs.items() if name not in options}
    taken = inspect.signature(unet.forward).parameters if isinstance(unet, nn.Module) else {}
    if not any(one.kind is one.VAR_KEYWORD for one in taken.values()):
        known, rule = (*ChoiceOptions.__annotations__, *beside), "options have known names" if beside else _NAMED
        for name in rest:
            if name not in taken and get_close_matches(name, known, n=1, cutoff=0.75):
                raise no_option(name, known, rule=rule)
    return options, rest


def region_or_choice(region: Region | Choice | None, options: Mapping[str, Any]) -> Region | Choice:
    """What `region=` and the options beside it ask for.

    Raises:
        ArgumentError: there is no such option, an option is outside its rule, or `region` and options are both given.
    """
    for name in options:
        if name not in ChoiceOptions.__annotations__:
            raise no_option(name, ChoiceOptions.__annotations__, rule=_NAMED)
    choice = Choice(**options)
    if region is None:
        return choice
    if not isinstance(region, (Region, Choice)):
        raise ArgumentError(
            "a region comes from find_region or find_regions",
            seen={"region": type(region).__name__},
            do="pass region=ch.find_region(unet, *args, level=1), or how to choose it: region=ch.Choice(level=1)",
        )
    if choice != Choice():
        beside = {name: value for name, value in options.items() if value is not None}
        said = region.line if isinstance(region, Region) else region
        raise ArgumentError(
            "region= is the whole choice: no other option can choose with it",
            seen={"region": said, **beside},
            do="pass region= alone",
        )
    return region


def found_or_why(wanted: Region | Choice, trace: Trace, unet: nn.Module) -> tuple[Region | None, str]:
    """The region in this trace, and ""; where a UNet has none, None and why. One asked for by name has to be there."""
    if isinstance(wanted, Region):
        return wanted, ""
    try:
        return wanted.find(trace, unet), ""
    except RegionNotFoundError as error:
        if not wanted.is_default:
            raise
        return None, str(error)


def _none_such(search: Search, name: str, wanted: object, there: Sequence[object]) -> RegionNotFoundError:
    values = list(dict.fromkeys(there))
    return RegionNotFoundError(
        f"there is no region of this {name}",
        seen={name: wanted, f"{name}s with a region": values, **listed(search.chain())},
        do=f"pass {'a smaller share' if name == 'share' else f'one of these {name}s'}, or name modules: {{modules}}",
        arguments={"modules": ...},
    )


# -- finding ----------------------------------------------------------------------------------------------------------


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


def find_region(unet: nn.Module, /, *args: Any, region: Choice | None = None, **kwargs: Any) -> Region:
    """One region: below the highest level by default, or chosen in one of the other ways.

    Args:
        unet: any UNet.
        *args: the arguments of one call.
        region: which one, a `Choice`; its options may be passed one by one instead: `level=2`, `share=0.9`, ...
        **kwargs: arguments of the call by name, and options of `Choice`.

    Returns:
        The region.

    Raises:
        RegionNotFoundError: there is no such region; lists those there are.
        ArgumentError: an option is outside its rule, or several ways to choose are mixed.

    Example:
        >>> from clockwork_hooks.models import load_model
        >>> unet, args, kwargs = load_model("sd15")  # on the meta device: no weights
        >>> print(find_region(unet, *args, resolution=32, cut="paper", **kwargs).line)
        down_blocks.0.downsamplers.0.conv → up_blocks.2.attentions.2, 32×32 down to 8×8, 58.0% of MACs, level 1
        >>> print(find_region(unet, *args, share=0.75, **kwargs).line)
        down_blocks.0.attentions.0 → up_blocks.3.attentions.0, 64×64 down to 8×8, 77.6% of MACs, level 1

    Source: arXiv 2312.08128, Sec. 4.1; Fig. 8 for the paper's own cut of SD v1.5.
    """
    options, kwargs = split_options(unet, kwargs)
    wanted = region_or_choice(region, options)
    return wanted if isinstance(wanted, Region) else wanted.find(record(unet, args, kwargs), unet)


def choose(trace: Trace, unet: nn.Module, **options: Any) -> Region:
    """`find_region` on an existing trace; the options are those of `Choice`."""
    return Choice(**options).find(trace, unet)


def regions_of(trace: Trace, unet: nn.Module) -> tuple[Region, ...]:
    """`find_regions` on an existing trace."""
    return Search(trace, unet).chain()


def match(search: Search, region: Region) -> Region | None:
    """The same region in another trace of the same UNet (another batch, size or device); None if it has none."""
    if region.cut != "hand":
        with contextlib.suppress(RegionNotFoundError):
            return of_fingerprint(search.chain(), region.fingerprint, level=region.level, cut=region.cut)
        return None
    skipped = [call.path for call in region.skipped]
    for by, named in ((by_ends, (region.entry.path, region.exit.path)), (by_modules, (skipped,))):
        with contextlib.suppress(RegionNotFoundError, ArgumentError):
            same = by(search.facts, *named)
            if same.fingerprint == region.fingerprint:
                return same
    return None


def skipped_nodes(trace: Trace, region: Region) -> set[int]:
    """Indices of the nodes that an adaptor pass does not run: those of the skipped module calls."""
    wanted = {(call.path, call.ordinal) for call in region.cut_plan.skipped}
    return {
        index for call in trace.calls if (call.path, call.ordinal) in wanted for index in range(call.first, call.last)
    }


def check_keep(unet: nn.Module, keep: object) -> tuple[str, ...]:
    """The paths of modules to keep; `ArgumentError` if one is no module of the UNet."""
    names = (keep,) if isinstance(keep, str) else keep
    if not isinstance(names, (tuple, list, set, frozenset)) or not all(isinstance(name, str) for name in names):
        raise ArgumentError(
            "keep= names modules that run on every pass, by their dotted paths",
            seen={"keep": repr(keep)[:80]},
            do='pass keep=["mid_block"]',
        )
    paths = {path for path in module_paths(unet).values() if path}
    for name in names:
        if name not in paths:
            alike = get_close_matches(name, paths, n=3)
            raise ArgumentError(
                "keep= names modules that run on every pass, by their dotted paths",
                seen={"keep": name, "modules with such names": ", ".join(alike) or "none"},
                do="pass paths as in unet.named_modules()",
            )
    return tuple(names)


def keeping(search: Search, region: Region, keep: tuple[str, ...]) -> Region:
    """The region, but calls of the modules to keep run, and all that their inputs come from.

    Args:
        search: of the trace where the region was found.
        region: in that trace.
        keep: dotted paths of modules.

    Raises:
        RegionNotFoundError: they need all of it, or return its exit.
    """
    if not keep:
        return region
    trace = search.facts.trace
    skipped = skipped_nodes(trace, region)
    needed: set[int] = set()
    for call in trace.calls:
        if call.path in keep:  # what lies outside of the region runs anyway
            needed.update(skipped.intersection(range(call.first, call.last)))
    for index in range(len(trace.nodes) - 1, -1, -1):
        if index in needed:
            node = trace.nodes[index]  # with all that it takes, also for its shape alone
            needed.update(int(one.meta["index"]) for one in (*node.all_input_nodes, *node.meta.get("after", ())))
    smaller = narrowed(search.facts, region, skipped - needed)
    if smaller is None:
        raise RegionNotFoundError(
            "with keep=, a part of the region must be left to skip, and its exit with it",
            seen={"region": region.line, "keep": ", ".join(keep)},
            do="keep fewer modules, or deeper ones",
        )
    return smaller


def near(path: str, paths: Iterable[str]) -> str:
    """The paths most like a wrong one, for an error."""
    return ", ".join(get_close_matches(path, list(dict.fromkeys(paths)), n=5, cutoff=0.4)) or "none"


# -- the search of one trace ------------------------------------------------------------------------------------------


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


# -- by its two ends ------------------------------------------------------------------------------------------------


def by_ends(facts: Facts, entry: str, exit: str) -> Region:
    """What lies between two module outputs: what depends on the entry and has no path that misses the exit.

    Raises:
        ArgumentError: a path is none of a module that returns one tensor depending on the sample.
        RegionNotFoundError: something else enters, or something goes round the exit.
    """
    source, target = (_output_of(facts, path, role) for path, role in ((entry, "entry"), (exit, "exit")))
    region = between(facts, source, target, level=0, cut="hand")
    if region is None:
        inside = facts.dominance.between(source, target)
        others = {facts.name(u) for u, _ in facts.dominance.crossing(facts.dominance.mask(inside))[0]} - {entry}
        raise RegionNotFoundError(
            "every path from the entry must pass the exit, and nothing else that depends on the sample may enter",
            seen={
                "entry": entry,
                "exit": exit,
                "also enters": ", ".join(sorted(others)) or "nothing",
                "goes round the exit": ", ".join(_round(facts, source, target)[:5]) or "nothing",
            },
            do="choose a later entry or an earlier exit; print(ch.trace(...).graph) shows the paths",
        )
    return region


def _round(facts: Facts, source: int, target: int) -> list[str]:
    """What comes from the source and reaches the output without the target, up to where the target is made."""
    trace, dominance = facts.trace, facts.dominance
    reached = {source}
    for n in range(source + 1, target):
        if not reached.isdisjoint(trace.sources[n]):
            reached.add(n)
    live = [n for n in sorted(reached - {source}) if dominance.live[n]]
    return list(dict.fromkeys(facts.name(n) for n in live if not dominance.within(n, target)))


def _output_of(facts: Facts, path: str, role: str) -> int:
    for call in reversed(facts.trace.calls):
        if call.path == path:
            nodes = nodes_of(call.output)
            if len(nodes) == 1 and facts.dominance.dep[nodes[0]]:
                return nodes[0]
    modules = [call.path for call in facts.trace.calls if call.path and len(nodes_of(call.output)) == 1]
    raise ArgumentError(
        f"the {role} is a called module that returns one tensor depending on the sample",
        seen={role: path, "near it": near(path, modules), "such modules": ", ".join(dict.fromkeys(modules[:40]))},
        do="pass one of these dotted paths",
    )


# -- by the modules to skip -----------------------------------------------------------------------------------------


def by_modules(facts: Facts, modules: Iterable[str]) -> Region:
    """All calls of these modules, if one of them returns a tensor that every path from all of them passes.

    Args:
        facts: of one trace.
        modules: dotted paths; "blocks.4:blocks.20" stands for these two and their siblings called in between.

    Raises:
        ArgumentError: a path is none of a module that is called.
        RegionNotFoundError: there are several exits, a module in between is not named, or a named one also serves
            what is not skipped.
    """
    trace, dominance = facts.trace, facts.dominance
    paths = [path for name in modules for path in _expanded(facts, name)]
    calls = [call for call in trace.calls if call.path in set(paths)]
    named = {n for call in calls for n in _operators(facts, call)}
    carrying = {n for n in named if dominance.dep[n]}
    if not carrying:
        raise RegionNotFoundError(
            "the modules of a region must depend on the sample",
            seen={"modules": ", ".join(paths)},
            do="name modules that compute something from the sample",
        )
    target = _exit(facts, calls, carrying)
    region = build(facts, target, dominance.around(carrying, target), level=0, cut="hand")
    skipped = skipped_nodes(trace, region) if region else set[int]()
    run = {n for n in skipped if facts.dominance.live[n] and facts.operator[n]}
    if region is None or not named <= run:
        raise RegionNotFoundError(
            "everything that a skipped module computes must serve the exit only",
            seen={"also used elsewhere": ", ".join(c.path or "" for c in calls if not _operators(facts, c) <= run)},
            do="leave these modules out, or name the smaller ones inside of them",
        )
    if others := _unnamed(facts, named, run):
        raise RegionNotFoundError(
            "what lies between the modules of a region is skipped with them",
            seen={"modules": ", ".join(paths), "not named": ", ".join(others)},
            do='name these too; "first:last" stands for a whole range',
        )
    return region


def _expanded(facts: Facts, name: str) -> list[str]:
    """The paths that one name stands for."""
    called = list(dict.fromkeys(call.path for call in facts.trace.calls if call.path))
    first, colon, last = name.partition(":")
    for path in (first, last) if colon else (first,):
        if path not in called:
            inside = [other for other in called if other.startswith(f"{path}.")]
            raise ArgumentError(
                "modules= names modules that the UNet calls",
                seen={"not called": path, "near it": ", ".join(inside[:5]) or near(path, called)},
                do="pass dotted paths as in named_modules(); a list of modules is not called, its modules are",
            )
    if not colon:
        return [first]
    siblings = [path for path in called if path.rpartition(".")[0] == first.rpartition(".")[0]]
    if last not in siblings or siblings.index(first) > siblings.index(last):
        raise ArgumentError(
            "a range goes from a module to one beside it that is called later",
            seen={"range": name, "beside the first": ", ".join(siblings)},
            do="pass for example blocks.4:blocks.20",
        )
    return siblings[siblings.index(first) : siblings.index(last) + 1]


def _operators(facts: Facts, call: ModuleCall) -> set[int]:
    """The live operators of a call."""
    return {n for n in range(call.first, call.last) if facts.dominance.live[n] and facts.operator[n]}


def _exit(facts: Facts, calls: list[ModuleCall], carrying: set[int]) -> int:
    """The one tensor among the outputs of the named calls that everything from them passes."""
    outputs = [n for call in calls for n in nodes_of(call.output)]
    dominance = facts.dominance
    for o in sorted(set(outputs), reverse=True):
        if dominance.dep[o] and all(dominance.within(n, o) for n in carrying):
            return o
    last = max((o for o in outputs if dominance.dep[o] and dominance.live[o]), default=max(carrying))
    outside = [
        c.path or "" for c in calls if any(not dominance.within(n, last) for n in _operators(facts, c) & carrying)
    ]
    raise RegionNotFoundError(
        "a region leaves through one tensor, which one of its modules returns and every path from the others passes",
        seen={"last output": facts.name(last), "goes round it": ", ".join(dict.fromkeys(outside)) or "nothing"},
        do="name the module where these come together too, or leave them out",
    )


def _unnamed(facts: Facts, named: set[int], run: set[int]) -> list[str]:
    """The outermost skipped calls with MACs and nothing named inside."""
    unnamed: list[str] = []
    until = 0
    for call in facts.trace.calls:
        nodes = _operators(facts, call)
        if call.path and call.first >= until and nodes and nodes <= run and not nodes & named:
            unnamed += [call.path] if any(facts.trace.macs[n] for n in nodes) else []
            until = call.last
    return list(dict.fromkeys(unnamed))
