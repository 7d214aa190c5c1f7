"""One call of a wrapped UNet: place it in time, decide full or adaptor, run it, remember what the region emitted.

Nothing stale is ever returned: a cached exit serves only the step right after its own, for the same conditions and the
same input signature. Any doubt costs a full pass, and its reason is counted.

What the calls of an input signature need: found from the first of them, which is traced as it runs.

One call of the UNet that is under way, and what all calls of its input signature have in common.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from sys import _getframe, exc_info
from types import FrameType
from typing import Any

import torch
from torch import is_grad_enabled, is_inference_mode_enabled, nn
from torch._C import _is_any_autocast_enabled

from clockwork_hooks._tree import tensors, version
from clockwork_hooks.adaptors import Adaptor
from clockwork_hooks.clock import reasons
from clockwork_hooks.clock.loops import State, States
from clockwork_hooks.clock.reasons import stands_apart
from clockwork_hooks.clock.timeline import Kept, Position, Timeline
from clockwork_hooks.clock.weights import Weights
from clockwork_hooks.engine import stand_in
from clockwork_hooks.engine.hooks import Installed
from clockwork_hooks.engine.passes import Active, Emit, Pass
from clockwork_hooks.engine.stats import Stats
from clockwork_hooks.errors import RegionNotFoundError
from clockwork_hooks.graph.arguments import Arguments, Binder, time_candidates
from clockwork_hooks.graph.macs import node_macs
from clockwork_hooks.graph.recorder import Recorder
from clockwork_hooks.graph.tracing import Trace, finish, module_paths
from clockwork_hooks.regions.choice import Choice
from clockwork_hooks.regions.cut import Kind
from clockwork_hooks.regions.find import match, skipped_nodes
from clockwork_hooks.regions.region import Region
from clockwork_hooks.schedule import Schedule

__all__ = ["Engine", "Preparation", "Prepared", "Running", "likely_exits", "mode", "on_stack"]

_COMMON = ("cpu", "cuda", "xpu")


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
    # code that the trace does not know writes to the exit, or might: inference tensors keep no count of writes
    copies: bool = field(default_factory=torch.is_inference_mode_enabled)
    varies: bool = False  # an adaptor pass called modules in another way than the trace: full ones are watched for it
    name: str = ""  # tells adaptor passes apart where there are several regions
    blanks: dict[tuple[str, int], Any] = field(default_factory=dict)  # what skipped calls return in every pass
    key: tuple[Any, ...] | None = None  # of all its calls the same object, which is soon compared
    places: tuple[int | None, tuple[int, ...]] | None = None  # once `place` has looked

    def place(self, arguments: Arguments) -> tuple[int | None, tuple[int, ...]]:
        """Where among the arguments' leaves the time is, and what tells the branch: all but sample, time, residuals."""
        paths = list(arguments.paths)
        apart = {self.sample, self.time, *(self.region.residuals if self.region is not None else ())}
        told = tuple(k for k, path in enumerate(paths) if path not in apart)
        self.places = paths.index(self.time) if self.time in paths else None, told
        return self.places


@dataclass(slots=True)
class Running:
    """One call of the UNet that is under way; `trains`: in training mode, with gradients on."""

    frame: FrameType
    error: BaseException | None
    arguments: Arguments
    key: tuple[Any, ...]
    trains: bool
    weights: Hashable = None
    recorder: Recorder | None = None
    prepared: Prepared | None = None
    position: Position | None = None
    run: Pass | None = None
    cached: torch.Tensor | None = None
    reason: str | None = None


def mode(training: bool, arguments: Arguments) -> tuple[Any, ...]:
    """What changes the computation beside the inputs: training, autocast, gradients."""
    kind = _kind(arguments.device)
    if kind is None or (kind in _COMMON and not _is_any_autocast_enabled()):  # asks for less: no text
        autocast = None
    else:
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return training, autocast, is_grad_enabled(), is_inference_mode_enabled()


@functools.lru_cache(maxsize=64)  # `device.type` makes a string, which takes ten times as long
def _kind(device: torch.device | None) -> str | None:
    """What autocast is switched on for; None where there is none, as on meta."""
    kind = "cpu" if device is None else device.type
    return kind if torch.amp.is_autocast_available(kind) else None


def on_stack(wanted: FrameType | None) -> bool:
    """Is this frame still running?"""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None


class Preparation:
    """Records first calls, finds the region in them, patches the modules with skipped calls.

    Args:
        unet: the UNet.
        adaptor: stands in for the region.
        region: the region to skip, or how to choose it.
        time: name of the time input, None to find it.
        keep_graph: under autograd, a kept exit stays in the graph of the call that made it.

    Attributes:
        looks: all passes pick boundary tensors up, also those that have no use for them.
        skips: some pass may need modules to be patched; else that waits until one does.
    """

    looks = False
    skips = True

    def __init__(
        self, unet: nn.Module, adaptor: Adaptor, *, region: Region | Choice, time: str | None, keep_graph: bool
    ) -> None:
        self.unet, self.adaptor, self.time, self.keep_graph = unet, adaptor, time, keep_graph
        self.wanted = region
        self.region = region if isinstance(region, Region) else None
        self.active = Active()
        self.resting = False
        self.tracing: Pass | None = None  # set in what torch.compile traces, never while anything runs
        self.installed = Installed(self)
        self._prepared: dict[tuple[Any, ...], Prepared] = {}

    @property
    def regions(self) -> tuple[Region, ...]:
        """The region, once it is known."""
        return () if self.region is None else (self.region,)

    @property
    def adaptors(self) -> tuple[Adaptor, ...]:
        """What stands in for it."""
        return (self.adaptor,)

    def _record(self, running: Running, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rank = max((leaf.ndim - 2 for leaf in tensors(running.arguments.flat)), default=1)
        running.recorder = Recorder(self.unet, running.arguments, module_paths(self.unet))
        running.recorder.start(args, kwargs, frame=running.frame, keep=max(rank, 1), exits=self._likely_exits())

    def _likely_exits(self) -> tuple[frozenset[str], ...]:
        """For each region, paths of modules that may return its exit, where something is known before the trace."""
        return (likely_exits(self.wanted, self.region),)

    def _traced(self, running: Running, output: Any) -> tuple[Prepared, dict[int, torch.Tensor]]:
        """Turn the recorded call into a plan: (what its signature needs, likely exits that were kept alive by node)."""
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
        prepared = self._prepared[running.key] = self._prepare(trace)
        return prepared, kept

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
            stand_in.check_region(self.adaptor, region)
            if self.skips:
                self._install(region)
            self.region = self.region or region
        return Prepared(region, full, rest, trace.time, trace.sample, why)

    def _adopt(self, running: Running) -> Prepared | None:
        """The plan of the region that the user found before, if it was found for such a call: no trace is needed."""
        region, autocast = self.wanted, running.key[2]
        if not isinstance(region, Region) or region.signature != running.arguments.signature or autocast is not None:
            return None
        if self.skips:
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
        modules = {known[id(module)]: module for module in self.unet.modules()}
        self.installed.add(region.cut_plan, modules, looks=self.looks or stand_in.looks(self.adaptor))


def likely_exits(wanted: Region | Choice, known: Region | None) -> frozenset[str]:
    """Paths of modules of which the one called last may return the region's exit."""
    paths = frozenset(known.exit.paths) if known is not None else frozenset[str]()
    return paths | (wanted.exits if isinstance(wanted, Choice) else frozenset[str]())


log = logging.getLogger("clockwork_hooks")


class Engine(Preparation):
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

    _turn: Any = None  # of several regions, the one that this step may skip: `Prepared` of the call → of that one
    _above = 2  # frames above `begin`: the hook's, the root's call

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
        super().__init__(unet, adaptor, region=region, time=time, keep_graph=keep_graph)
        self.schedule, self.check_finite, self.loaded = schedule, check_finite, loaded
        self.enabled, self.skips = True, self.looks or not schedule.never_skips
        self.steps: Callable[[Timeline, Any], None] | None = None
        self.stats, self.states, self.weights = Stats(), States(), Weights(unet)
        self._last: tuple[Running, State] | None = None  # of the calls that have begun: nearly always the one that ends
        self._binder = Binder(unet.forward)

    # -- the two hooks -------------------------------------------------------------------------------------------

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a call: choose its pass and start it."""
        compiling = torch.compiler.is_compiling()
        if compiling:  # by `unet.compile()` after `wrap`: set aside from the next call on
            torch.compiler.disable(self.installed.run_eagerly)(module)
        state = self.states.current()
        if state.running:
            if on_stack(state.running[0].frame):
                state.running.append(None)
                return
            self.clean(state)  # KeyboardInterrupt is no Exception: torch did not call `end`
        if not self.enabled:
            return
        names = self._binder.forms.get((len(args), *kwargs)) or self._binder.names(len(args), tuple(kwargs))
        arguments = Arguments(names, (*args, *kwargs.values()))
        key = (arguments.signature, *mode(module.training, arguments))
        running = Running(_getframe(self._above), exc_info()[1], arguments, key, module.training and key[3])
        state.running.append(running)
        self._last = running, state
        running.reason = stands_apart(compiling=compiling)
        if running.reason is not None:
            state.timeline.reset()
            return
        running.prepared = prepared = self._prepared.get(key) or self._adopt(running)
        if prepared is None:
            self._record(running, args, kwargs)
            return
        running.key = prepared.key = prepared.key or key
        running.position = self._locate(state, running, prepared)
        if self._turn is not None:
            running.prepared = prepared = self._turn(running, prepared)
        running.reason = self._why_full(running)
        kept = running.position.before.take() if running.position.before is not None else None
        if prepared.region is not None and (running.reason is None or not self._idle(running.position)):
            self._start(running, prepared, prepared.region, kept, (args, kwargs))

    def _start(self, running: Running, prepared: Prepared, region: Region, kept: Kept | None, call: Any) -> None:
        if running.weights is None:  # a full pass
            running.weights = self.weights.since(running.position.trajectory if running.position else 0)
        if not self.installed.intact(region.cut_plan):  # full passes need it too: they keep the exit
            self._install(region)
        cached = running.cached = kept.exit if running.reason is None and kept is not None else None
        emit = None if cached is None else lambda captured: self._emit(running, cached, captured)
        running.run = self.active.run = run = self._pass(prepared, region, emit)
        alone = type(run) is Pass and self.states.alone and not (self.installed.fronted or prepared.varies)
        self.resting = run.rests = alone and emit is None and not run.looks
        if run.looks:
            run.enter(*call)

    def _idle(self, position: Position) -> bool:
        """Is nothing to be kept, as the next step is full too? Then the UNet runs as if it were not wrapped."""
        watched = self.looks or self.installed.fronted
        return not watched and not self.schedule.uses_adaptor(position.step + 1)

    def end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """After a call, also one that raised: count it, remember the exit, leave nothing behind."""
        last, self._last = self._last, None
        if last is None or last[0].frame is not _getframe(self._above):  # another thread's, or a call within a call
            state = self.states.current()
            running = state.running.pop() if state.running else None
            if running is None:
                return None
        else:
            running, state = last
            state.running.pop()
        if running.run is not None:
            self.active.run, self.resting = None, False
        if exc_info()[1] is not running.error:
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

    def _pass(self, prepared: Prepared, region: Region, emit: Emit | None) -> Pass:
        looks = self.looks or (emit is not None and stand_in.looks(self._adaptor(prepared)[0]))
        kind: Kind = "adaptor" if emit else "full"
        return Pass(region.cut_plan, kind, emit, copies=prepared.copies, looks=looks, blanks=prepared.blanks)

    def clean(self, state: State) -> None:
        """End whatever an interrupted call has left open in this thread."""
        self.active.run, self.resting, self._last = None, False, None
        for running in state.running:
            if running is not None and running.recorder is not None:
                running.recorder.stop()
        state.running.clear()
        state.timeline.reset()

    # -- full or adaptor? ----------------------------------------------------------------------------------------

    def _locate(self, state: State, running: Running, prepared: Prepared) -> Position:
        timeline, flat = state.timeline, running.arguments.flat
        at, told = prepared.places or prepared.place(running.arguments)
        given = None if at is None else flat[at]
        if self.steps is not None and prepared.time is not None:
            self.steps(timeline, given)
        asked = at is not None and (not timeline.declared or timeline.opened)  # else the time does not matter
        time, place = state.clock.read(given) if asked else (None, None)
        return timeline.at(time, place, [flat[k] for k in told], has_time=prepared.time is not None)

    def _why_full(self, running: Running) -> str | None:
        """The reason for a full pass; None for an adaptor pass."""
        prepared, position = running.prepared, running.position
        if prepared is None or position is None or prepared.region is None:
            return prepared.why if prepared else reasons.TRACED
        if position.step <= 1 or not self.schedule.uses_adaptor(position.step):
            return position.scheduled
        if position.doubt is not None:
            return position.doubt
        if running.trains:
            return reasons.TRAINING
        before = position.before
        if before is None or before.kept is None:
            return before.missing if before else reasons.NOT_KEPT
        if before.kept.key is not running.key and before.kept.key != running.key:
            return reasons.CHANGED
        running.weights = self.weights.state(position.trajectory)
        if before.kept.weights != running.weights:
            return reasons.WEIGHTS
        if before.kept.version != version(before.kept.exit):
            return reasons.WRITTEN
        return None

    # -- the end of a pass ---------------------------------------------------------------------------------------

    def _finish_recording(self, state: State, running: Running, output: Any) -> None:
        prepared, kept = self._traced(running, output)
        running.weights = self.weights.state()  # lazy ones are made in the call
        position = self._locate(state, running, prepared)
        self._remember_recorded(running, prepared, position, kept)
        reason = position.scheduled if self.schedule.is_full(position.step) else reasons.TRACED
        self._count(position, reason, prepared.full_macs, prepared.full_macs)

    def _remember_recorded(
        self, running: Running, prepared: Prepared, position: Position, kept: Mapping[int, torch.Tensor]
    ) -> None:
        """If the likely exits kept alive include the exit, it is remembered."""
        if prepared.region is not None:
            exit, position.call.missing = kept.get(prepared.region.exit.node), reasons.TRACED
            if exit is not None:
                exit = exit.clone() if prepared.copies else exit
                position.call.kept = Kept(running.key, self._free(exit), version(exit), running.weights)

    def _finish(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], running: Running) -> Any:
        prepared, position, run, replaced = running.prepared, running.position, running.run, None
        assert prepared is not None  # `begin` set both
        assert position is not None
        adaptor_pass = run is not None and run.kind == "adaptor"
        cost = prepared.rest_macs + (prepared.adaptor_macs or 0) if adaptor_pass else prepared.full_macs
        if run is not None and run.kind == "adaptor" and not run.complete():
            running.reason, prepared.varies = reasons.DIFFERED, True
            cost += prepared.full_macs
            assert prepared.region is not None  # else there was no adaptor pass
            run = self.active.run = self._pass(prepared, prepared.region, None)
            try:
                run.enter(args, kwargs)
                replaced = module.forward(*args, **kwargs)
            finally:
                self.active.run = None
        if run is not None:
            self._remember(running, run, prepared, position)
        self._count(position, running.reason, cost, prepared.full_macs, prepared.name)
        return replaced

    def _count(self, position: Position, reason: str | None, run: int, plain: int, region: str = "") -> None:
        self.stats.count(reason, run, plain, position.trajectory, position.step, region)
        if log.isEnabledFor(logging.DEBUG):
            where = (position.trajectory, position.step, position.branch.label, position.ordinal + 1)
            kind = f"full: {reason}" if reason else f"adaptor {region}".strip()
            log.debug("trajectory %d, step %d, branch %s, call %d: %s", *where, kind)

    def _remember(self, running: Running, run: Pass, prepared: Prepared, position: Position) -> None:
        """Keep what the region emitted for the step after this one, unless it may not be what it was."""
        if running.trains:
            position.call.missing = reasons.TRAINING  # nothing will be reused: no memory is taken from the training
        elif not run.complete() or run.exit is None:
            position.call.missing = reasons.DIFFERED
        elif not run.untouched():
            prepared.copies = True  # a user's hook, or FreeU switched on after the trace: from now on we keep a copy
            position.call.missing = reasons.WRITTEN
        else:
            exit = self._free(run.exit) if run.exit.requires_grad else run.exit
            position.call.kept = Kept(running.key, exit, run.written, running.weights)

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
                stand_in.place(adaptor, cached)
            made, prepared.adaptor_macs = stand_in.count_and_run(adaptor, captured, cached)
        else:
            made = stand_in.run(adaptor, captured, cached)
        same = made is cached
        if isinstance(made, torch.Tensor) and (same or stand_in.fits(made, cached)) and not self.check_finite:
            return made
        where = {"step": position.step, "region": prepared.region.line, "adaptor": type(adaptor).__name__}
        return stand_in.check(made, cached, finite=self.check_finite, where=where)

    def _adaptor(self, prepared: Prepared) -> tuple[Adaptor, bool]:
        """The adaptor of a region, and whether it is ours to move."""
        return self.adaptor, self.loaded
