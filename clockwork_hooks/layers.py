"""Regions one inside the other: what each of them needs for one input signature, and a pass that keeps all exits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from clockwork_hooks.adaptors import Adaptor
from clockwork_hooks.boundary import Region
from clockwork_hooks.calls import ModuleCall
from clockwork_hooks.choice import Choice
from clockwork_hooks.errors import ArgumentError, RegionNotFoundError
from clockwork_hooks.graph import Trace
from clockwork_hooks.passes import Emit, Pass, version
from clockwork_hooks.regions import skipped_nodes
from clockwork_hooks.running import Prepared
from clockwork_hooks.skipping import Kind, Plan, SkippedCall, Slot
from clockwork_hooks.tree import leaves

__all__ = ["Clocked", "Layer", "NestedPass", "check", "plans"]

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
        super().__init__(region.plan, kind, stand_in, copies=layer.copies, looks=looks, blanks=layer.blanks)
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


def plans(trace: Trace, regions: list[Region]) -> list[tuple[Plan, Watched]]:
    """For each region: its plan, with the calls of all patched modules counted; and where the others' exits appear."""
    patched = {path for region in regions for path in region.plan.counts}
    calls = [call for call in trace.calls if call.path in patched]
    made: list[tuple[Plan, Watched]] = []
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
        made.append((replace(region.plan, counts=counts), {"full": whole, "adaptor": around}))
    return made


def _happens(trace: Trace, call: ModuleCall, chosen: set[int]) -> bool:
    """Does this call happen where the chosen ones are skipped?"""
    return all(around.index not in chosen for around in trace.ancestors(call))


def _has_exit(call: SkippedCall) -> bool:
    return any(isinstance(slot, Slot) and slot.exit for _, slot in leaves(call.output))
