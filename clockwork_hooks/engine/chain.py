"""The regions of a wrapped UNet, one inside the other, each on a clock of its own; a single region is a chain of one.

A pass skips the widest region whose clock does not strike, and runs the rest: with clocks 2 and 4 the passes are
full, outer skipped, inner skipped, outer skipped, full, ... What each region emits is kept apart. A region inside a
skipped one emits nothing: its feature waits, and serves the next pass that runs the region around it. So it comes
from the step before *of the region's own sequence*, which are the steps that run everything around it; a region's
clock is a multiple of the clock around it, so that none is older than that one's period. A full pass that the clocks
did not ask for, for any doubt, lets go of what waits.

Source: arXiv 2312.08128, Sec. 4.1 and Fig. 8 (one region).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from clockwork_hooks.adaptors import stand_in
from clockwork_hooks.adaptors.stand_in import Adaptor, IdentityAdaptor, needs_of
from clockwork_hooks.clock import reasons
from clockwork_hooks.clock.times import may_be_form
from clockwork_hooks.engine.stats import OtherSteps
from clockwork_hooks.errors import ArgumentError, RegionNotFoundError
from clockwork_hooks.graph.arguments import Arguments, Inputs
from clockwork_hooks.graph.tracing import Trace
from clockwork_hooks.regions.cut import CutPlan, Exits, PassKind, Port, SkippedCall, entry_of
from clockwork_hooks.regions.find import Choice, Search, keeping, match, skipped_nodes
from clockwork_hooks.regions.region import Region
from clockwork_hooks.schedule import Schedule


@dataclass(slots=True)
class ClockedRegion:
    """One region of the chain, as `wrap` was told.

    Attributes:
        wanted: the region, or how to choose it.
        schedule: which steps are full.
        adaptor: stands in for it.
        movable: the adaptor is ours to move to the exit's device and dtype.
        name: what the user calls it, where there are several: "level 1", "32×32", or its two ends.
        clock: full every so many steps; 0 where something else says which steps are full.
        keep: modules that run on adaptor passes too.
        region: once it is known.
        follows: an adaptor pass has written what is skipped to memory of its own: later ones follow it there.
        usual: where the schedule depends on the number of steps, the one that the adaptor was made for; 0 for none.
        needs: what the adaptor takes beyond the four inputs of `Adaptor`.
        looks: has it a use for boundary tensors? The identity has none, so none are picked up for it.
        keeps_entry: do later steps look at what flowed into the region?
        keeps_trail: does the adaptor look at how the exit moved between the last two full passes?
        tells_time: is the adaptor told the time of this call, or of earlier ones, or prepared for it?
        prepare: makes, of times that are known as numbers, what the adaptor needs of them; None where it does not.
        other_steps: warns of a number of steps; None where there is nothing to warn of.
    """

    wanted: Region | Choice
    schedule: Schedule
    adaptor: Adaptor
    movable: bool = False
    name: str = ""
    clock: int = 0
    keep: tuple[str, ...] = ()
    region: Region | None = None
    follows: bool = field(default=False, init=False)
    usual: int = field(default=0, init=False)
    needs: frozenset[str] = field(default=frozenset(), init=False)
    looks: bool = field(default=False, init=False)
    keeps_entry: bool = field(default=False, init=False)
    keeps_trail: bool = field(default=False, init=False)
    tells_time: bool = field(default=False, init=False)
    prepare: Callable[[Sequence[float], Any], Any] | None = field(default=None, init=False)
    other_steps: OtherSteps | None = None

    def __post_init__(self) -> None:
        self.take(self.adaptor, self.schedule)

    def take(self, adaptor: Adaptor, schedule: Schedule) -> None:
        """This adaptor and this schedule from now on; what passes ask of them is worked out here."""
        self.adaptor, self.schedule, self.needs = adaptor, schedule, needs_of(adaptor)
        counts = stand_in.schedules_of(adaptor)[1] if schedule.counts_from_end else ()
        self.usual = counts[0] if len(counts) == 1 else 0
        self.looks = type(adaptor) is not IdentityAdaptor
        self.keeps_entry = schedule.threshold is not None or "entry_cached" in self.needs
        self.keeps_trail = "trend" in self.needs
        self.tells_time = self.keeps_trail or not self.needs.isdisjoint({"position", "position_cached", "prepared"})
        self.prepare = getattr(adaptor, "prepare", None) if "prepared" in self.needs else None

    def skips(self, step: int, steps: int | None) -> bool:
        """May this step use the adaptor, in a run of so many? Of None, nobody has said: then as many as are usual."""
        return self.schedule.skips(step, self.usual if steps is None and step <= self.usual else steps)

    def find(self, search: Search) -> tuple[Region | None, str]:
        """The region of a trace: the one known from other inputs, if it is there; or None, and why.

        Raises:
            RegionNotFoundError: nothing can be skipped, and never could.
        """
        before = self.wanted if isinstance(self.wanted, Region) else self.region
        region = match(search, before) if before is not None else None
        if isinstance(self.wanted, Region) or region is not None:
            return None if region is None else keeping(search, region, self.keep), reasons.OTHER_REGION
        try:
            return keeping(search, self.wanted.among(search), self.keep), ""
        except RegionNotFoundError:
            if before is None:
                raise
            return None, reasons.NO_REGION

    @property
    def likely_exits(self) -> frozenset[str]:
        """Paths of modules of which the one called last may return the exit, as far as something is known before."""
        paths = set(self.region.exit.paths) if self.region is not None else set()
        saved = getattr(self.adaptor, "region", None)
        if isinstance(saved, Mapping):  # a saved adaptor knows where its exit was
            paths.add(str((saved.get("exit") or {}).get("path")))
        return frozenset(paths) | (self.wanted.exits if isinstance(self.wanted, Choice) else frozenset())


@dataclass(slots=True)
class RegionUse:
    """What calls of one input signature need of one region of the chain.

    Attributes:
        region: as it is for these inputs.
        plan: what its adaptor passes skip, with the calls of all patched modules counted.
        rest_macs: what an adaptor pass runs, without its adaptor.
        adaptor_macs: of the adaptor, once it has run.
        proved: has an adaptor pass shown that nothing of what is skipped is used, beside the exit?
        used: so many adaptor passes, one after another, have shown the opposite.
        changes: did the pass that proved it leave anything in the UNet's modules? Then more passes may.
        shared: what skipped calls return, once it is proved.
        name: tells adaptor passes apart where there are several regions.
    """

    region: Region
    plan: CutPlan
    rest_macs: int
    adaptor_macs: int | None = None
    proved: bool = False
    used: int = 0
    changes: bool = False
    shared: dict[tuple[str, int], Any] = field(default_factory=dict)
    name: str = ""


@dataclass(slots=True)
class Signature:
    """What all calls of one input signature have in common.

    Attributes:
        full_macs: of a full pass.
        time, sample: paths of these inputs.
        regions: widest first; empty where these inputs have none, and `why` says so.
        key: one object for all its calls: comparing two is one `is`.
        written: which tensors among the arguments, in the order of `Before`, such calls write to.
        differed: so many passes, one after another, called their modules in another way than the recorded ones.
        recorded: was such a call recorded here? Else the region was found elsewhere, and the first pass that is watched
            has to show that it holds.
        traced: does its plan come of such a call recorded here?
        uncounted: operators of the trace that may multiply and accumulate, and are in no count.
        inputs: what the leaves of its calls' arguments are, once `see` has looked at one.
        copies: regions whose exit is kept as a copy: code that the trace does not know writes to it, or might, as
            inference tensors keep no count of writes.
    """

    full_macs: int
    time: str | None
    sample: str
    regions: tuple[RegionUse, ...] = ()
    why: str = ""
    key: tuple[Any, ...] = ()
    written: set[int] = field(default_factory=set)
    differed: int = 0
    recorded: bool = True
    traced: bool = True
    uncounted: tuple[str, ...] = ()
    inputs: Inputs = field(init=False)
    copies: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.copies = set(range(len(self.regions))) if torch.is_inference_mode_enabled() else set()

    def see(self, arguments: Arguments, ignored: Callable[[str], bool]) -> None:
        """Find out what the leaves of these arguments are: all tell the branch but sample, time and residuals.

        Nor do those tell one that the user ignores.
        """
        region = self.regions[0].region if self.regions else None
        unread, residuals = (region.unread, region.residuals) if region else ((), ())
        paths, apart = list(arguments.paths), {self.sample, self.time, *residuals}
        conditions = tuple(k for k, path in enumerate(paths) if path not in apart and not ignored(path))
        self.inputs = Inputs(
            paths.index(self.time) if self.time in paths else None,
            conditions,
            tuple(paths[k] for k in conditions),
            unread,
            any(may_be_form(arguments.flat[k], unread=paths[k] in unread) for k in conditions),
            any(may_be_form(arguments.flat[k], unread=False) for k in conditions),
        )


def single(region: Region, time: str | None) -> Signature:
    """What calls need of a region that was found for such a call: no trace is needed."""
    use = RegionUse(region, region.cut_plan, region.full_macs - region.macs)
    return Signature(
        region.full_macs,
        time,
        region.sample,
        (use,),
        uncounted=region.uncounted,
        recorded=False,
        traced=bool(region.structure),  # else it comes from a file
    )


def prepare(trace: Trace, unet: nn.Module, chain: list[ClockedRegion]) -> Signature:
    """What calls like the traced one need of the chain, which is put in order at the first trace, widest first.

    Raises:
        RegionNotFoundError: nothing can be skipped, or the regions do not lie one inside the other.
        ArgumentError: a clock is no multiple of the one around it.
        AdaptorError: an adaptor was made for another region.
    """
    uncounted = trace.uncounted
    search = Search(trace, unet)
    located = [(clocked, *clocked.find(search)) for clocked in chain]
    missing = next((why for _, region, why in located if region is None), None)
    if missing is not None:
        return Signature(trace.full_macs, trace.time, trace.sample, why=missing, uncounted=uncounted)
    placed = [(clocked, region) for clocked, region, _ in located if region is not None]
    placed.sort(key=lambda pair: -pair[1].macs)
    if any(clocked.region is None for clocked in chain):
        _check_nesting(trace, placed)
        chain[:] = [clocked for clocked, _ in placed]
    for clocked, region in placed:
        stand_in.check_region(clocked.adaptor, region)
        if clocked.schedule.threshold is not None and "entry" not in region.cut_plan.ports:
            raise RegionNotFoundError(
                "an adaptive schedule compares the region's entry, so some module must take or return it",
                seen={"region": region.line, "entry": region.entry.path},
                do="choose another region, or another schedule",
            )
        clocked.region = clocked.region or region
    plans = _plans(trace, [region for _, region in placed], [clocked.keeps_entry for clocked, _ in placed])
    uses = tuple(
        RegionUse(region, plan, trace.full_macs - region.macs, name=clocked.name)
        for (clocked, region), plan in zip(placed, plans, strict=True)
    )
    return Signature(trace.full_macs, trace.time, trace.sample, uses, uncounted=uncounted)


def _check_nesting(trace: Trace, placed: Sequence[tuple[ClockedRegion, Region]]) -> None:
    """Each region lies inside the one before, and its clock is a multiple of that one's."""
    for (outer, around), (inner, region) in itertools.pairwise(placed):
        seen = {
            "outer": f"{outer.name}, clock {outer.clock}: {around.line}",
            "inner": f"{inner.name}, clock {inner.clock}: {region.line}",
        }
        if not skipped_nodes(trace, region) < skipped_nodes(trace, around):
            raise RegionNotFoundError(
                "regions with clocks of their own lie one inside the other",
                seen=seen,
                do="choose them by level, or from find_regions(...), where each contains the next",
            )
        if inner.clock % outer.clock or inner.clock == outer.clock:
            raise ArgumentError(
                "the clock of a region inside another is a multiple of that one's: it runs only when that one does",
                seen=seen,
                do=f"pass {2 * outer.clock} for the inner one",
            )


def _plans(trace: Trace, regions: list[Region], keeps_entry: list[bool]) -> list[CutPlan]:
    """Each region's plan, with the calls of all patched modules counted, and where the others' exits appear.

    So do the entries of those that keep them.
    """
    if len(regions) == 1:
        return [regions[0].cut_plan]
    patched = {path for region in regions for path in region.cut_plan.counts}
    calls = [call for call in trace.calls if call.path in patched]
    exits = [next(call for call in region.skipped if call.exit[1] is not None) for region in regions]
    plans = []
    for index, region in enumerate(regions):
        skipped = {(call.path, call.ordinal) for call in region.skipped}
        chosen = {call.index for call in calls if (call.path, call.ordinal) in skipped}
        counts: dict[str, tuple[int, int]] = {}
        visible: dict[tuple[str, int], int] = {}
        for call in calls:
            path = str(call.path)
            full, seen = counts.get(path, (0, 0))
            visible[path, call.ordinal] = seen
            counts[path] = (full + 1, seen + trace.happens(call, chosen))
        whole: dict[tuple[str, int], tuple[tuple[int, SkippedCall], ...]] = {}
        around: dict[tuple[str, int], tuple[tuple[int, SkippedCall], ...]] = {}
        for other, exit in enumerate(exits):
            if other != index:
                place = (exit.path, exit.ordinal)
                whole[place] = (*whole.get(place, ()), (other, exit))
            if other < index:
                place = (exit.path, visible[exit.path, exit.ordinal])
                around[place] = (*around.get(place, ()), (other, exit))
        ports = dict(region.cut_plan.ports)
        for other, keeps in enumerate(keeps_entry):
            entry = regions[other].cut_plan.ports.get("entry")
            if keeps and other != index and entry is not None:
                visible_at = _visible(trace, entry, chosen) if other < index else -1  # an inner region emits nothing
                ports[entry_of(other)] = replace(entry, visible=visible_at)
        others: dict[PassKind, Exits] = {"full": whole, "adaptor": around}
        plans.append(replace(region.cut_plan, counts=counts, index=index, others=others, ports=ports))
    return plans


def _visible(trace: Trace, port: Port, skipped: set[int]) -> int:
    """Which of its module's calls a port is where those calls are skipped."""
    before = (call for call in trace.calls if call.path == port.path and call.ordinal < port.ordinal)
    return sum(trace.happens(call, skipped) for call in before)
