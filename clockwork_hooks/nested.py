"""Several regions, one inside the other, each on a clock of its own.

A pass skips the outermost region whose clock does not strike, and runs the rest: with clocks 2 and 4 the passes are
full, outer skipped, inner skipped, outer skipped, full, ... What each region emits is kept apart. A region inside a
skipped one emits nothing: its feature waits, and serves the next pass that runs the region around it. So it comes
from the step before *of the region's own sequence*, which are the steps that run everything around it; a region's
clock is a multiple of the clock around it, so that none is older than that one's period. A full pass that the clocks
did not ask for, for any doubt, lets go of what waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from clockwork_hooks import emit, reasons
from clockwork_hooks.adaptors import Adaptor
from clockwork_hooks.boundary import Region
from clockwork_hooks.branches import Call, Kept
from clockwork_hooks.engine import Engine
from clockwork_hooks.graph import Trace
from clockwork_hooks.layers import Clocked, Layer, NestedPass, check, plans
from clockwork_hooks.macs import node_macs
from clockwork_hooks.passes import Emit, Pass, version
from clockwork_hooks.preparation import likely_exits
from clockwork_hooks.regions import skipped_nodes
from clockwork_hooks.running import Prepared, Running
from clockwork_hooks.schedule import Schedule
from clockwork_hooks.timeline import Position

__all__ = ["NestedEngine"]


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
            emit.check_region(one.adaptor, region)
            one.region = one.region or region
        self.region, self.adaptor = placed[0][1], placed[0][0].adaptor
        layers = tuple(
            Layer(
                replace(region, plan=plan),
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

    def _pass(self, prepared: Prepared, region: Region, stand_in: Emit | None) -> Pass:
        assert isinstance(prepared, Layer)  # as it has a region
        looks = stand_in is not None and emit.looks(self._adaptor(prepared)[0])
        return NestedPass(prepared, region, "adaptor" if stand_in else "full", stand_in, looks=looks)

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
