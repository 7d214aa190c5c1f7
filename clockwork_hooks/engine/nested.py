"""Several regions, one inside the other, each on a clock of its own.

A pass skips the outermost region whose clock does not strike, and runs the rest: with clocks 2 and 4 the passes are
full, outer skipped, inner skipped, outer skipped, full, ... What each region emits is kept apart. A region inside a
skipped one emits nothing: its feature waits, and serves the next pass that runs the region around it. So it comes
from the step before *of the region's own sequence*, which are the steps that run everything around it; a region's
clock is a multiple of the clock around it, so that none is older than that one's period. A full pass that the clocks
did not ask for, for any doubt, lets go of what waits.

Regions one inside the other: what each of them needs for one input signature, and a pass that keeps all exits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from clockwork_hooks._tree import leaves, version
from clockwork_hooks.adaptors import Adaptor
from clockwork_hooks.clock import reasons
from clockwork_hooks.clock.timeline import Call, Kept, Position
from clockwork_hooks.engine import stand_in
from clockwork_hooks.engine.engine import Engine, Prepared, Running, likely_exits
from clockwork_hooks.engine.passes import Emit, Pass
from clockwork_hooks.errors import ArgumentError, RegionNotFoundError
from clockwork_hooks.graph.macs import node_macs
from clockwork_hooks.graph.recorder import ModuleCall
from clockwork_hooks.graph.tracing import Trace
from clockwork_hooks.regions.choice import Choice
from clockwork_hooks.regions.cut import CutPlan, Kind, SkippedCall, Slot
from clockwork_hooks.regions.find import skipped_nodes
from clockwork_hooks.regions.region import Region
from clockwork_hooks.schedule import Schedule

__all__ = ["Clocked", "Layer", "NestedEngine", "NestedPass", "check", "plans"]

# (path, how many calls of the module came before in this pass) → the regions whose exit that call returns
Exits = dict[tuple[str, int], tuple[tuple[int, SkippedCall], ...]]
Watched = Mapping[Kind, Exits]


@dataclass(slots=True)
class Clocked:
    """One region with its clock.

    Attributes:
        name: what the user called it: "level 1", "32×32", or its two ends.
        wanted: the region, or how to choose it.
        clock: full every so many steps.
        adaptor: stands in for it.
        loaded: the adaptor is ours to move.
        region: once it is known.
    """

    name: str
    wanted: Region | Choice
    clock: int
    adaptor: Adaptor
    loaded: bool = False
    region: Region | None = None


@dataclass(slots=True)
class Layer(Prepared):
    """One region for one input signature; `layers` are all of them, widest first."""

    index: int = 0
    layers: tuple[Layer, ...] = ()
    watched: Watched = field(default_factory=dict)


class NestedPass(Pass):
    """A pass that also keeps the exits of the regions around the skipped one; of all regions, if none is."""

    def __init__(self, layer: Layer, region: Region, kind: Kind, stand_in: Emit | None, *, looks: bool) -> None:
        super().__init__(region.cut_plan, kind, stand_in, copies=layer.copies, looks=looks, blanks=layer.blanks)
        self.index = layer.index
        self.others: dict[int, tuple[torch.Tensor, int]] = {}
        self._layers, self._watched = layer.layers, layer.watched[kind]

    def call(self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As `Pass.call`; and keep what it returns, if that is another region's exit."""
        k = self._counts.get(path, 0)
        output = super().call(path, forward, args, kwargs)
        for index, made in self._watched.get((path, k), ()):
            for (_, leaf), (_, slot) in zip(leaves(output), leaves(made.output), strict=False):
                if isinstance(slot, Slot) and slot.exit and isinstance(leaf, torch.Tensor):
                    exit = leaf.clone() if slot.written or self._layers[index].copies else leaf
                    self.others[index] = (exit, version(exit))
        return output

    def complete(self) -> bool:
        """Did the calls agree with the trace, and all exits come?"""
        expected = {index for found in self._watched.values() for index, _ in found}
        return super().complete() and expected == set(self.others)


def check(trace: Trace, placed: list[tuple[Clocked, Region]]) -> None:
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


def plans(trace: Trace, regions: list[Region]) -> list[tuple[CutPlan, Watched]]:
    """For each region: its plan, with the calls of all patched modules counted; and where the others' exits appear."""
    patched = {path for region in regions for path in region.cut_plan.counts}
    calls = [call for call in trace.calls if call.path in patched]
    made: list[tuple[CutPlan, Watched]] = []
    for index, region in enumerate(regions):
        skipped = {(call.path, call.ordinal) for call in region.skipped}
        chosen = {call.index for call in calls if (call.path, call.ordinal) in skipped}
        counts: dict[str, tuple[int, int]] = {}
        visible: dict[tuple[str, int], int] = {}
        for call in calls:
            path = str(call.path)
            full, seen = counts.get(path, (0, 0))
            visible[path, call.ordinal] = seen
            counts[path] = (full + 1, seen + _happens(trace, call, chosen))
        whole: Exits = {}
        around: Exits = {}
        for k, other in enumerate(regions):
            exit = next(call for call in other.skipped if _has_exit(call))
            if k != index:
                whole[exit.path, exit.ordinal] = (*whole.get((exit.path, exit.ordinal), ()), (k, exit))
            if k < index:
                place = (exit.path, visible[exit.path, exit.ordinal])
                around[place] = (*around.get(place, ()), (k, exit))
        made.append((replace(region.cut_plan, counts=counts), {"full": whole, "adaptor": around}))
    return made


def _happens(trace: Trace, call: ModuleCall, chosen: set[int]) -> bool:
    """Does this call happen where the chosen ones are skipped?"""
    return all(around.index not in chosen for around in trace.ancestors(call))


def _has_exit(call: SkippedCall) -> bool:
    return any(isinstance(slot, Slot) and slot.exit for _, slot in leaves(call.output))


@dataclass(slots=True)
class _Position(Position):
    """Where a call is, and where each region remembers its exit: in this call, and in the same one before."""

    calls: tuple[Call, ...] = ()
    befores: tuple[Call | None, ...] = ()


class NestedEngine(Engine):
    """Runs the calls of a UNet with several clocks.

    Args:
        unet: the UNet.
        clocks: regions with their clocks, in any order.
        time: name of the time input, None to find it.
        check_finite: look for NaN and infinity in what the adaptors return.
    """

    def __init__(self, unet: nn.Module, clocks: list[Clocked], *, time: str | None, check_finite: bool) -> None:
        self.clocks = clocks
        schedules = [Schedule.every(one.clock) for one in clocks]
        schedule = Schedule(
            lambda step: any(not each.is_full(step) for each in schedules),
            ", ".join(f"every({one.clock}) {one.name}" for one in clocks),
        )
        first = clocks[0]
        super().__init__(
            unet, first.adaptor, schedule, region=first.wanted, time=time, check_finite=check_finite, loaded=False
        )

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions, widest first; none before the first call."""
        return tuple(one.region for one in self.clocks if one.region is not None)

    @property
    def adaptors(self) -> tuple[Adaptor, ...]:
        """What stands in for each."""
        return tuple(one.adaptor for one in self.clocks)

    # -- the first call of a signature ---------------------------------------------------------------------------

    def _likely_exits(self) -> tuple[frozenset[str], ...]:
        return tuple(likely_exits(one.wanted, one.region) for one in self.clocks)

    def _prepare(self, trace: Trace) -> Prepared:
        found = [(one, *self._find(trace, one.wanted, one.region)) for one in self.clocks]
        costs = [node_macs(node) for node in trace.nodes]
        missing = next((why for _, region, why in found if region is None), None)
        if missing is not None:
            return Prepared(None, sum(costs), sum(costs), trace.time, trace.sample, missing)
        placed = sorted(
            ((one, region) for one, region, _ in found if region is not None), key=lambda pair: -pair[1].macs
        )
        if not self.regions:
            check(trace, placed)
            self.clocks = [one for one, _ in placed]
        for one, region in placed:
            stand_in.check_region(one.adaptor, region)
            one.region = one.region or region
        self.region, self.adaptor = placed[0][1], placed[0][0].adaptor
        layers = tuple(
            Layer(
                replace(region, cut_plan=plan),
                sum(costs),
                sum(costs) - sum(costs[n] for n in skipped_nodes(trace, region)),
                trace.time,
                trace.sample,
                name=one.name,
                index=k,
                watched=watched,
            )
            for k, ((one, region), (plan, watched)) in enumerate(
                zip(placed, plans(trace, [region for _, region in placed]), strict=True)
            )
        )
        for layer in layers:
            layer.layers = layers
            assert layer.region is not None  # set above
            self._install(layer.region)
        return layers[0]

    def _adopt(self, running: Running) -> Prepared | None:
        return None

    def _remember_recorded(
        self, running: Running, prepared: Prepared, position: Position, kept: Mapping[int, torch.Tensor]
    ) -> None:
        for layer in prepared.layers if isinstance(prepared, Layer) else ():
            super()._remember_recorded(running, layer, _of(position, layer.index), kept)

    # -- a call --------------------------------------------------------------------------------------------------

    def _locate(self, state: Any, running: Running, prepared: Prepared) -> Position:
        at = super()._locate(state, running, prepared)
        count = len(prepared.layers) - 1 if isinstance(prepared, Layer) else 0
        at.call.inner = tuple(Call() for _ in range(count))
        befores: tuple[Call | None, ...] = (at.before, *at.before.inner) if at.before is not None else ()
        if len(befores) != 1 + count:  # the call before was another signature's
            befores = (at.before, *(None,) * count)
        return _Position(
            at.trajectory,
            at.step,
            at.branch,
            at.ordinal,
            at.call,
            befores[0],
            at.doubt,
            (at.call, *at.call.inner),
            befores,
        )

    def _turn(self, running: Running, prepared: Prepared) -> Prepared:
        """The outermost region whose clock does not strike."""
        position = running.position
        if not isinstance(prepared, Layer) or position is None:
            return prepared
        strikes = ((position.step - 1) % one.clock == 0 for one in self.clocks)
        index = next((k for k, full in enumerate(strikes) if not full), 0)
        running.position = _of(position, index)
        return prepared.layers[index]

    def _pass(self, prepared: Prepared, region: Region, emit: Emit | None) -> Pass:
        assert isinstance(prepared, Layer)  # as it has a region
        looks = emit is not None and stand_in.looks(self._adaptor(prepared)[0])
        return NestedPass(prepared, region, "adaptor" if emit else "full", emit, looks=looks)

    def _adaptor(self, prepared: Prepared) -> tuple[Adaptor, bool]:
        one = self.clocks[prepared.index if isinstance(prepared, Layer) else 0]
        return one.adaptor, one.loaded

    def _remember(self, running: Running, run: Pass, prepared: Prepared, position: Position) -> None:
        """What this pass's own region emitted, what those around it did, and what waits inside of it."""
        super()._remember(running, run, prepared, position)
        assert isinstance(position, _Position)
        assert isinstance(prepared, Layer)
        assert isinstance(run, NestedPass)
        for layer, call, before in zip(prepared.layers, position.calls, position.befores, strict=True):
            if layer.index == run.index:
                continue
            if position.call.kept is None:  # whatever the reason, it holds for all
                call.missing = position.call.missing
            elif layer.index in run.others:
                exit, written = run.others[layer.index]
                if version(exit) != written:
                    layer.copies, call.missing = True, reasons.WRITTEN
                    continue
                call.kept = Kept(running.key, self._free(exit), written, running.weights)
            elif before is not None:  # inside of what was skipped: it emitted nothing
                call.kept, call.missing = before.take(), before.missing


def _of(position: Position, index: int) -> _Position:
    """The position as the region of this index sees it."""
    assert isinstance(position, _Position)  # from `_locate`
    return replace(position, call=position.calls[index], before=position.befores[index])
