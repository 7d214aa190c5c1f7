"""One call of a wrapped UNet: place it in time, decide full or adaptor, run it, remember what the region emitted.

Nothing stale is ever returned: a cached exit serves only the step right after its own, for the same conditions and the
same input signature. Any doubt costs a full pass, and its reason is counted.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn

from clockwork_hooks import emit, reasons
from clockwork_hooks.adaptors import Adaptor
from clockwork_hooks.apart import stands_apart
from clockwork_hooks.boundary import Region
from clockwork_hooks.branches import Kept
from clockwork_hooks.choice import Choice
from clockwork_hooks.errors import RegionNotFoundError
from clockwork_hooks.graph import Trace, finish, module_paths
from clockwork_hooks.hooks import Installed
from clockwork_hooks.inputs import Arguments, Binder, time_candidates
from clockwork_hooks.macs import node_macs
from clockwork_hooks.passes import Pass, end_pass, start_pass, version
from clockwork_hooks.recorder import Recorder
from clockwork_hooks.regions import match, skipped_nodes
from clockwork_hooks.schedule import Schedule
from clockwork_hooks.state import State, States
from clockwork_hooks.stats import Stats
from clockwork_hooks.timeline import Position, Timeline
from clockwork_hooks.tree import tensors
from clockwork_hooks.weights import Weights

__all__ = ["Emit", "Engine", "Prepared", "Running", "likely_exits"]

Emit = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]

log = logging.getLogger("clockwork_hooks")


@dataclass(slots=True)
class Prepared:
    """What calls of one input signature need; `region` is None where they have none, and `why` says so."""

    region: Region | None
    full_macs: int
    rest_macs: int
    time: str | None
    sample: str
    why: str = ""
    adaptor_macs: int | None = None
    copies: bool = False  # code that the trace does not know writes to the exit
    name: str = ""  # tells adaptor passes apart where there are several regions


@dataclass(slots=True)
class Running:
    """One call of the UNet that is under way."""

    frame: FrameType
    error: BaseException | None
    arguments: Arguments
    key: tuple[Any, ...]
    weights: Hashable
    recorder: Recorder | None = None
    prepared: Prepared | None = None
    position: Position | None = None
    run: Pass | None = None
    cached: torch.Tensor | None = None
    reason: str | None = None


class Engine:
    """Runs the calls of one wrapped UNet; `begin` and `end` are the two hooks on its root.

    Args:
        unet: the UNet.
        adaptor: stands in for the region.
        schedule: which steps are full.
        region: the region to skip, or how to choose it.
        time: name of the time input, None to find it.
        check_finite: look for NaN and infinity in what the adaptor returns (waits for the device once a pass).
        keep_graph: under autograd, a kept exit stays in the graph of the call that made it.
        loaded: the adaptor is ours to move to the exit's device and dtype.
    """

    def __init__(
        self,
        unet: nn.Module,
        adaptor: Adaptor,
        schedule: Schedule,
        *,
        region: Region | Choice,
        time: str | None,
        check_finite: bool,
        keep_graph: bool = False,
        loaded: bool = False,
    ) -> None:
        self.unet, self.adaptor, self.schedule = unet, adaptor, schedule
        self.time, self.check_finite, self.keep_graph, self.loaded = time, check_finite, keep_graph, loaded
        self.wanted = region
        self.region = region if isinstance(region, Region) else None
        self.enabled = True
        self.steps: Callable[[Timeline, Any], None] | None = None
        self.tracing: Pass | None = None  # set in what torch.compile traces, never while anything runs
        self.stats = Stats()
        self.states = States()
        self.installed = Installed(self)
        self.weights = Weights(unet)
        self._binder = Binder(unet.forward)
        self._prepared: dict[tuple[Any, ...], Prepared] = {}

    @property
    def regions(self) -> tuple[Region, ...]:
        """The region, once it is known."""
        return () if self.region is None else (self.region,)

    @property
    def adaptors(self) -> tuple[Adaptor, ...]:
        """What stands in for it."""
        return (self.adaptor,)

    # -- the two hooks -------------------------------------------------------------------------------------------

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a call: choose its pass and start it."""
        state = self.states.current()
        if state.running:
            if _on_stack(state.running[0].frame):
                state.running.append(None)
                return
            self.clean(state)  # KeyboardInterrupt is no Exception: torch did not call `end`
        if not self.enabled:
            return
        arguments = self._binder(args, kwargs)
        key = (arguments.signature, *_mode(module, arguments))
        frame = sys._getframe(3)  # ours ← the wrapper's ← the hook's ← the root's call
        running = Running(frame, sys.exc_info()[1], arguments, key, self.weights.state())
        state.running.append(running)
        running.reason = stands_apart()
        if running.reason is not None:
            state.timeline.reset()
            return
        running.prepared = prepared = self._prepared.get(running.key) or self._adopt(running)
        if prepared is None:
            self._record(running, args, kwargs)
            return
        running.position = self._locate(state, running, prepared)
        running.prepared = prepared = self._turn(running, prepared)
        running.reason = self._why_full(running)
        if prepared.region is not None:
            if not self.installed.intact(prepared.region.plan):  # full passes need it too: they keep the exit
                self._install(prepared.region)
            before = running.position.before
            kept = before.take() if before is not None else None
            adapt = running.reason is None and kept is not None
            stand_in = (lambda captured: self._emit(running, kept.exit, captured)) if adapt and kept else None
            running.run = self._pass(prepared, prepared.region, stand_in)
            running.cached = kept.exit if adapt and kept else None
            running.run.enter(args, kwargs)
            start_pass(self, running.run)

    def end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """After a call, also one that raised: count it, remember the exit, leave nothing behind."""
        state = self.states.current()
        running: Running | None = state.running.pop() if state.running else None
        if running is None:
            return None
        end_pass(self)
        if sys.exc_info()[1] is not running.error:
            if running.recorder is not None:
                running.recorder.stop()
            state.timeline.reset()
            return None
        if running.recorder is not None:
            self._finish_recording(state, running, output)
            return None
        if running.prepared is None:
            known = (one.full_macs for key, one in self._prepared.items() if key[0] == running.key[0])
            cost = next(known, 0)  # not known before a call of this signature was recorded
            self._count(state.timeline.nowhere(running.reason or ""), running.reason, cost, cost)
            return None
        return self._finish(module, args, kwargs, running)

    def _pass(self, prepared: Prepared, region: Region, stand_in: Emit | None) -> Pass:
        return Pass(region.plan, "adaptor" if stand_in else "full", stand_in, copies=prepared.copies)

    def _turn(self, running: Running, prepared: Prepared) -> Prepared:
        """Which region is it that this step may skip? There is but one."""
        return prepared

    def clean(self, state: State) -> None:
        """End whatever an interrupted call has left open in this thread."""
        end_pass(self)
        for running in state.running:
            if running is not None and running.recorder is not None:
                running.recorder.stop()
        state.running.clear()
        state.timeline.reset()

    # -- full or adaptor? ----------------------------------------------------------------------------------------

    def _locate(self, state: State, running: Running, prepared: Prepared) -> Position:
        arguments = running.arguments
        if self.steps is not None and prepared.time is not None:
            self.steps(state.timeline, arguments.get(prepared.time))
        name = prepared.time if state.timeline.needs_time else None
        time, place = state.clock.read(arguments.get(name)) if name else (None, None)
        residuals = prepared.region.residuals if prepared.region is not None else ()
        apart = {prepared.sample, prepared.time, *residuals}
        conditions = [leaf for path, leaf in arguments.leaves() if path not in apart]
        return state.timeline.at(time, place, conditions, has_time=prepared.time is not None)

    def _why_full(self, running: Running) -> str | None:
        """The reason for a full pass; None for an adaptor pass."""
        prepared, position = running.prepared, running.position
        if prepared is None or position is None or prepared.region is None:
            return prepared.why if prepared else reasons.TRACED
        if self.schedule.is_full(position.step):
            return _on_schedule(position)
        if position.doubt is not None:
            return position.doubt
        if torch.is_grad_enabled() and self.unet.training:
            return reasons.TRAINING
        before = position.before
        if before is None or before.kept is None:
            return before.missing if before else reasons.NOT_KEPT
        if before.kept.key != running.key:
            return reasons.CHANGED
        if before.kept.weights != running.weights:
            return reasons.WEIGHTS
        if before.kept.version != version(before.kept.exit):
            return reasons.WRITTEN
        return None

    # -- the first call of a signature ---------------------------------------------------------------------------

    def _record(self, running: Running, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rank = max((leaf.ndim - 2 for leaf in tensors(running.arguments.values)), default=1)
        running.recorder = Recorder(self.unet, running.arguments, module_paths(self.unet))
        running.recorder.start(args, kwargs, frame=running.frame, keep=max(rank, 1), exits=self._likely_exits())

    def _likely_exits(self) -> tuple[frozenset[str], ...]:
        """For each region, paths of modules that may return its exit, where something is known before the trace."""
        return (likely_exits(self.wanted, self.region),)

    def _finish_recording(self, state: State, running: Running, output: Any) -> None:
        """Turn the recorded call into a plan; if the likely exits kept alive include the exit, it is remembered."""
        recorder = running.recorder
        assert recorder is not None  # only called for recorded calls
        kept = dict(recorder.kept)
        for named in recorder.named.values():
            kept |= named
        for node in recorder.cut if self.keep_graph else ():
            kept.pop(node, None)
        recorder.kept.clear()
        recorder.named.clear()
        recorder.stop(output)
        trace = finish(recorder, self.unet, running.arguments, time=self.time)
        prepared = self._prepare(trace)
        self._prepared[running.key] = prepared
        position = self._locate(state, running, prepared)
        self._remember_recorded(running, prepared, position, kept)
        reason = _on_schedule(position) if self.schedule.is_full(position.step) else reasons.TRACED
        self._count(position, reason, prepared.full_macs, prepared.full_macs)

    def _remember_recorded(
        self, running: Running, prepared: Prepared, position: Position, kept: Mapping[int, torch.Tensor]
    ) -> None:
        if prepared.region is not None:
            exit, position.call.missing = kept.get(prepared.region.exit.node), reasons.TRACED
            if exit is not None:
                position.call.kept = Kept(running.key, self._free(exit), version(exit), running.weights)

    def _find(self, trace: Trace, wanted: Region | Choice, known: Region | None) -> tuple[Region | None, str]:
        """The region of this trace: the one known from other inputs if it is there; None, and why."""
        known = wanted if isinstance(wanted, Region) else known
        region = match(trace, self.unet, known) if known is not None else None
        if isinstance(wanted, Region) or region is not None:
            return region, reasons.OTHER_REGION
        try:
            return wanted.find(trace, self.unet), ""
        except RegionNotFoundError:
            if known is None:
                raise
            return None, reasons.NO_REGION

    def _prepare(self, trace: Trace) -> Prepared:
        region, why = self._find(trace, self.wanted, self.region)
        costs = [node_macs(node) for node in trace.nodes]
        full = sum(costs)
        rest = full - sum(costs[n] for n in skipped_nodes(trace, region)) if region is not None else full
        if region is not None:
            emit.check_region(self.adaptor, region)
            self._install(region)
            self.region = self.region or region
        return Prepared(region, full, rest, trace.time, trace.sample, why)

    def _adopt(self, running: Running) -> Prepared | None:
        """The plan of the region that the user found before, if it was found for such a call: no trace is needed."""
        region, autocast = self.wanted, running.key[2]
        if not isinstance(region, Region) or region.signature != running.arguments.signature or autocast is not None:
            return None
        self._install(region)
        time = time_candidates(running.arguments, sample=region.sample, time=self.time) if self.time else region.times
        if len(time) > 1:
            return None
        rest = region.full_macs - region.macs
        prepared = Prepared(region, region.full_macs, rest, time[0] if time else None, region.sample)
        self._prepared[running.key] = prepared
        return prepared

    def _install(self, region: Region) -> None:
        known = module_paths(self.unet)
        self.installed.add(region.plan, {known[id(module)]: module for module in self.unet.modules()})

    # -- the end of a pass ---------------------------------------------------------------------------------------

    def _finish(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], running: Running) -> Any:
        prepared, position, run, replaced = running.prepared, running.position, running.run, None
        assert prepared is not None  # `begin` set both
        assert position is not None
        adaptor_pass = run is not None and run.kind == "adaptor"
        cost = prepared.rest_macs + (prepared.adaptor_macs or 0) if adaptor_pass else prepared.full_macs
        if run is not None and run.kind == "adaptor" and not run.complete():
            running.reason = reasons.DIFFERED
            cost += prepared.full_macs
            assert prepared.region is not None  # else there was no adaptor pass
            run = self._pass(prepared, prepared.region, None)
            run.enter(args, kwargs)
            start_pass(self, run)
            try:
                replaced = module.forward(*args, **kwargs)
            finally:
                end_pass(self)
        if run is not None:
            self._remember(running, run, prepared, position)
        self._count(position, running.reason, cost, prepared.full_macs, prepared.name)
        return replaced

    def _count(self, position: Position, reason: str | None, run: int, plain: int, region: str = "") -> None:
        self.stats.count(reason, run, plain, trajectory=position.trajectory, step=position.step, region=region)
        if log.isEnabledFor(logging.DEBUG):
            where = (position.trajectory, position.step, position.branch.label, position.ordinal + 1)
            log.debug(
                "trajectory %d, step %d, branch %s, call %d: %s",
                *where,
                f"full: {reason}" if reason else f"adaptor {region}".strip(),
            )

    def _remember(self, running: Running, run: Pass, prepared: Prepared, position: Position) -> None:
        """Keep what the region emitted for the step after this one, unless it may not be what it was."""
        if self.unet.training and torch.is_grad_enabled():
            position.call.missing = reasons.TRAINING  # nothing will be reused: no memory is taken from the training
        elif not run.complete() or run.exit is None:
            position.call.missing = reasons.DIFFERED
        elif not run.untouched():
            prepared.copies = True  # a user's hook, or FreeU switched on after the trace: from now on we keep a copy
            position.call.missing = reasons.WRITTEN
        else:
            position.call.kept = Kept(running.key, self._free(run.exit), version(run.exit), running.weights)

    def _free(self, exit: torch.Tensor) -> torch.Tensor:
        """The exit to keep: without the graph that made it, unless gradients shall flow into the step before."""
        return exit.detach() if exit.requires_grad and not self.keep_graph else exit

    def _emit(self, running: Running, cached: torch.Tensor, captured: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run the adaptor and check what it returns before the UNet sees it."""
        prepared, position = running.prepared, running.position
        assert prepared is not None  # an adaptor pass has all three
        assert position is not None
        assert prepared.region is not None
        adaptor, loaded = self._adaptor(prepared)
        if prepared.adaptor_macs is None:
            if loaded:
                emit.place(adaptor, cached)
            made, prepared.adaptor_macs = emit.count_and_run(adaptor, captured, cached)
        else:
            made = emit.run(adaptor, captured, cached)
        where = {"step": position.step, "region": prepared.region.line, "adaptor": type(adaptor).__name__}
        return emit.check(made, cached, finite=self.check_finite, where=where)

    def _adaptor(self, prepared: Prepared) -> tuple[Adaptor, bool]:
        """The adaptor of a region, and whether it is ours to move."""
        return self.adaptor, self.loaded


def likely_exits(wanted: Region | Choice, known: Region | None) -> frozenset[str]:
    """Paths of modules of which the one called last may return the region's exit."""
    paths = frozenset(known.exit.paths) if known is not None else frozenset[str]()
    return paths | (wanted.exits if isinstance(wanted, Choice) else frozenset[str]())


def _on_schedule(position: Position) -> str:
    """Why a full step is full. In a first step doubts count: a call that cannot be placed never gets beyond it."""
    return reasons.SCHEDULED if position.step > 1 else position.doubt or reasons.FIRST


def _on_stack(wanted: FrameType | None) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None


def _mode(module: nn.Module, arguments: Arguments) -> tuple[Any, ...]:
    """What changes the computation beside the inputs: training, autocast, gradients."""
    kind = next((arg.device.type for arg in arguments.values.values() if isinstance(arg, torch.Tensor)), "cpu")
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # meta has none
    autocast = torch.get_autocast_dtype(kind) if casts else None
    return module.training, autocast, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
