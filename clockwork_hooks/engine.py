"""One call of a wrapped UNet: place it in time, decide full or adaptor, run it, remember what the region emitted.

Nothing stale is ever returned: a cached exit serves only the step right after its own, for the same conditions and the
same input signature. Any doubt costs a full pass, and its reason is counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from sys import _getframe, exc_info
from typing import Any

import torch
from torch import nn

from clockwork_hooks import emit, reasons
from clockwork_hooks.adaptors import Adaptor
from clockwork_hooks.apart import stands_apart
from clockwork_hooks.boundary import Region
from clockwork_hooks.branches import Kept
from clockwork_hooks.choice import Choice
from clockwork_hooks.inputs import Arguments, Binder
from clockwork_hooks.passes import Emit, Pass, version
from clockwork_hooks.preparation import Preparation
from clockwork_hooks.running import Prepared, Running, mode, on_stack
from clockwork_hooks.schedule import Schedule
from clockwork_hooks.skipping import Kind
from clockwork_hooks.state import State, States
from clockwork_hooks.stats import Stats
from clockwork_hooks.timeline import Position, Timeline
from clockwork_hooks.weights import Weights

__all__ = ["Engine"]

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
        if not self.installed.intact(region.plan):  # full passes need it too: they keep the exit
            self._install(region)
        cached = running.cached = kept.exit if running.reason is None and kept is not None else None
        stand_in = None if cached is None else lambda captured: self._emit(running, cached, captured)
        running.run = self.active.run = run = self._pass(prepared, region, stand_in)
        alone = type(run) is Pass and self.states.alone and not (self.installed.fronted or prepared.varies)
        self.resting = run.rests = alone and stand_in is None and not run.looks
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

    def _pass(self, prepared: Prepared, region: Region, stand_in: Emit | None) -> Pass:
        looks = self.looks or (stand_in is not None and emit.looks(self._adaptor(prepared)[0]))
        kind: Kind = "adaptor" if stand_in else "full"
        return Pass(region.plan, kind, stand_in, copies=prepared.copies, looks=looks, blanks=prepared.blanks)

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
                emit.place(adaptor, cached)
            made, prepared.adaptor_macs = emit.count_and_run(adaptor, captured, cached)
        else:
            made = emit.run(adaptor, captured, cached)
        same = made is cached
        if isinstance(made, torch.Tensor) and (same or emit.fits(made, cached)) and not self.check_finite:
            return made
        where = {"step": position.step, "region": prepared.region.line, "adaptor": type(adaptor).__name__}
        return emit.check(made, cached, finite=self.check_finite, where=where)

    def _adaptor(self, prepared: Prepared) -> tuple[Adaptor, bool]:
        """The adaptor of a region, and whether it is ours to move."""
        return self.adaptor, self.loaded
