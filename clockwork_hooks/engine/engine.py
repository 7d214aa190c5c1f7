"""One call of a wrapped UNet: place it, decide full or adaptor, run it, remember what the regions emitted, count it.

Nothing stale is ever returned: a cached exit serves only the step right after its own, for the same conditions and the
same input signature. Any doubt costs a full pass, and its reason is counted.

Source: arXiv 2312.08128, Sec. 4.1.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from clockwork_hooks._tree import address, copied, is_sole, tensors, version
from clockwork_hooks.adaptors import stand_in
from clockwork_hooks.clock import reasons
from clockwork_hooks.clock.conditions import FORM, Snapshot, Weights
from clockwork_hooks.clock.loops import State, States, stands_apart
from clockwork_hooks.clock.timeline import Feature, Position, Timeline, Trail
from clockwork_hooks.clock.times import Told, is_read_at_once
from clockwork_hooks.engine.chain import ClockedRegion, RegionUse, Signature, prepare, single
from clockwork_hooks.engine.derived import Derived, Recorded, Signatures
from clockwork_hooks.engine.fresh import Following, Watching
from clockwork_hooks.engine.hooks import Census, Installed
from clockwork_hooks.engine.passes import Active, Before, Emit, Emitted, Exchanged, Outcome, Pass
from clockwork_hooks.engine.rows import HELPED, Batch, Rows, serves
from clockwork_hooks.engine.stats import (
    MoreSteps,
    NoAdaptorPass,
    OtherSteps,
    Stats,
    Watchers,
    warn_of_dear,
    warn_of_failure,
)
from clockwork_hooks.engine.taint import Reads, SkippedValueError, Taint, holds_placeholder, may_cause
from clockwork_hooks.errors import ArgumentError, WrapError
from clockwork_hooks.graph.arguments import Arguments, Binder, has_time, time_candidates
from clockwork_hooks.graph.recorder import Recorder, garbage_kept
from clockwork_hooks.graph.tracing import Trace, finish, module_paths, modules_of, record
from clockwork_hooks.regions.cut import CutPlan, entry_of
from clockwork_hooks.regions.region import Region
from clockwork_hooks.schedule import Schedule

__all__ = ["Decision", "Engine", "Observer", "StaticCalls", "UNetCall"]

log = logging.getLogger("clockwork_hooks")
_MISSED = (AttributeError, IndexError, KeyError, StopIteration, TypeError)  # of who looks for what is not there
_DIFFERED, _RECORDINGS = 8, 8  # passes that differ until calls are recorded anew, and how often at most


class Decision(NamedTuple):
    """What a pass shall be.

    Attributes:
        reason: why it is full; None for an adaptor pass.
        region: of the chain, the one that the step may skip.
        feature: what that region emitted one step before, where it may serve.
    """

    reason: str | None
    region: int = 0
    feature: Feature | None = None


@dataclass(slots=True, eq=False)
class UNetCall:
    """One call of the UNet that is under way.

    Attributes:
        forward: the UNet's own forward.
        args, kwargs: its arguments.
        arguments: the same by name.
        key: input signature and modes.
        trains: is the UNet in training mode, with gradients on?
        signature: what calls of this key have in common, once one was recorded.
        place: which step, branch and trajectory it belongs to, once that is known.
        weights: state of the UNet's weights; None where nothing is kept of the call, nor serves it.
        time: its time input as it was passed, once its place is known; a copy, where somebody is told of it after the
            call. None where there is none.
        told: the same, as an adaptor is told it: where one prepares itself for it, and reading it waits for nothing,
            with its number. None where no adaptor is told the time.
        times_differ: are its rows at different times, in which an adaptor is told one?
        decision: what it shall be; made also where an engine that teaches runs it in full whatever it says.
        due: the widest region that its step may skip, None where the schedule says full; asked once, as a function may
            change its mind.
        unread: does nobody read what it emits, as the next step is full?
        idle: and may it run as if the UNet were not wrapped, if it is full too?
        trails: of each region, the full passes of the steps before; None where they tell nothing of this call.
        inside: does the UNet's own code run just now?
    """

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arguments: Arguments
    key: tuple[Any, ...]
    trains: bool
    signature: Signature | None = None
    place: Position | None = None
    weights: Hashable = None
    time: Any = None
    told: Told | None = None
    times_differ: bool = False
    decision: Decision | None = None
    due: int | None = None
    unread: bool = False
    idle: bool = False
    trails: tuple[Trail | None, ...] = ()
    inside: bool = False

    def run(self) -> Any:
        """Call the UNet's own forward."""
        self.inside = True
        output = self.forward(*self.args, **self.kwargs)
        self.inside = False
        return output


class Given(NamedTuple):
    """What an adaptor is given beside the cached exit and what a pass picks up; see `AdaptorInputs`.

    Attributes:
        past: what is known of earlier steps.
        position: the time of this call.
        prepared: what the adaptor has prepared for these times, in place of them.
    """

    past: stand_in.Past
    position: torch.Tensor | None = None
    prepared: Any = None


class Observer(Protocol):
    """Sees the calls that an engine runs."""

    def before(self, call: UNetCall) -> None:
        """The call is about to run. Its place is unknown if it is the first of its signature.

        May put other arguments into `call.args` and `call.kwargs`.
        """
        ...

    def after(self, call: UNetCall, outcome: Outcome) -> None:
        """The call has returned, and what its regions emitted is remembered."""
        ...


class StaticCalls(Protocol):
    """Runs passes as static callables: compiled, or captured as CUDA graphs.

    What was compiled or captured of other modules does not count, so the engine, too, looks at modules after the first
    pass of a trajectory, and runs it again if they are others: before it, the device would wait (1.3 ms for SD v1.5's
    modules).
    """

    def ready(self, call: UNetCall, pass_: Pass) -> bool:
        """Is this a pass that one can stand for?"""
        ...

    def run(self, call: UNetCall, pass_: Pass, feature: Feature | None) -> Outcome:
        """Run it.

        Raises:
            Exchanged: modules are others than the recorded, and nothing counts as run.
        """
        ...

    def holds(self) -> bool:
        """Is what a launch does not see of the modules' Python as it was when the first one was compiled?"""
        ...

    def forget(self, key: Hashable = None) -> None:
        """Passes are other ones from now on; those of one input signature, if its key is passed."""
        ...


class Engine:
    """Runs the calls of one UNet.

    Args:
        unet: the UNet.
        chain: its regions with their clocks, in any order.
        time: name of the time input, None to find it.
        check_finite: look for NaN and infinity in what an adaptor returns (waits for the device once a pass).
        keep_graph: under autograd, a kept exit stays in the graph of the call that made it.
        ignore: dotted paths of arguments that tell nothing.
        branch: gives the key of a call's branch from its arguments by name.
        oldest: a branch is served from its own step before, which may be so many steps back.

    Attributes:
        enabled: off, the UNet runs as if nothing were attached.
        observers: see every call.
        looks: all passes pick boundary tensors up, for an observer; else those whose adaptor has a use for them.
        teaches: decide as always, but run everything in full, to record what adaptor steps would be given.
        records_first: record the first call of a signature apart, before it runs like the others.
        step_reader: declares steps that a scheduler tells; called with timeline and time before a call is placed.
        static: runs passes as static callables, once the wrapper is compiled.
    """

    def __init__(
        self,
        unet: nn.Module,
        chain: list[ClockedRegion],
        *,
        time: str | None = None,
        check_finite: bool = False,
        keep_graph: bool = False,
        ignore: Sequence[str] = (),
        branch: Callable[[Mapping[str, Any]], Hashable] | None = None,
        oldest: int = 1,
    ) -> None:
        self.unet, self.chain, self.time, self.branch = unet, chain, time, branch
        self._keeps_entry = any(clocked.keeps_entry for clocked in chain)
        self._keeps_trail = any(clocked.keeps_trail for clocked in chain)
        self._tells_time = any(clocked.tells_time for clocked in chain)
        self._prepares = any(clocked.prepare is not None for clocked in chain)
        self.check_finite, self.keep_graph = check_finite, keep_graph
        self.enabled, self.looks, self.teaches, self.records_first = True, False, False, False
        self.observers: list[Observer] = []
        self.step_reader: Callable[[Timeline, Any], None] | None = None
        self.static: StaticCalls | None = None
        self.tracing: Pass | None = None  # set in what torch.compile traces, never while anything runs
        self.active = Active()
        self.installed = Installed(self)
        self._no_adaptor_pass, self._watchers, self._more_steps = NoAdaptorPass(), Watchers(), MoreSteps()
        for one in chain:
            counts = stand_in.schedule_of(one.adaptor)[1]
            asks = one.schedule if one.schedule.counts_from_end and not one.usual else None
            names = one.schedule if one.schedule.last_named and not counts else None
            warner = OtherSteps(type(one.adaptor).__name__, counts, asks, names)
            one.other_steps = warner if counts or asks or names else None
        self.stats, self.states, self.weights = Stats(), States(oldest), Weights(unet)
        self._signatures = Signatures()
        self._census = Census(unet)
        self._dear = False  # has somebody been told that an adaptor pass costs more than a full one?
        self._looked_at, self._adopts = 0, True  # the last trajectory of which modules were looked at
        self._binder = Binder(unet.forward, ignore)
        self._failed: Callable[[BaseException], None] = lambda error: None

    def attach(self, owner: object, failed: Callable[[BaseException], None] | None = None) -> None:
        """Take the UNet's calls over.

        Args:
            owner: who is named where somebody else wants to wrap it.
            failed: called after an error that is not the UNet's own.
        """
        self._failed = failed or self._failed
        self.installed.attach(self.unet, owner, self, self._missed)

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions that are known, widest first."""
        return tuple(clocked.region for clocked in self.chain if clocked.region is not None)

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Operators of the recorded calls that are in no count."""
        return tuple(dict.fromkeys(name for signature in self._signatures for name in signature.uncounted))

    @property
    def schedule(self) -> Schedule:
        """Which steps are full: of several regions, those in which none is skipped."""
        if len(self.chain) == 1:
            return self.chain[0].schedule
        names = ", ".join(f"{clocked.schedule} {clocked.name}" for clocked in self.chain)
        return Schedule(self.skips_at, names)

    @property
    def ticks(self) -> bool:
        """Is there one region, on a plain clock, whose adaptor was made for no other schedule?"""
        one = self.chain[0]
        return len(self.chain) == 1 and one.schedule.is_clock and not stand_in.schedules_of(one.adaptor)[0]

    def skips_at(self, step: int, steps: int | None = None) -> bool:
        """May this step skip any region, in a trajectory of so many? None where that is not known."""
        return self._due(step, steps) is not None

    def _due(self, step: int, steps: int | None) -> int | None:
        """The widest region whose clock does not strike; None where all do."""
        for region, clocked in enumerate(self.chain):
            if clocked.skips(step, steps):
                return region
        return None

    def _own_steps(self, region: int, step: int, steps: int | None) -> tuple[int, int | None]:
        """The same without the steps in which a wider region is skipped, and this one within it."""
        skipped = {k for k in range(1, max(step, steps or 0) + 1) for one in self.chain[:region] if one.skips(k, steps)}
        return step - sum(k <= step for k in skipped), None if steps is None else steps - len(skipped)

    # -- one call ------------------------------------------------------------------------------------------------

    def __call__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call; stands in front of the UNet's forward."""
        if torch.compiler.is_dynamo_compiling():  # by `unet.compile()` after `wrap`: set aside from the next call on
            torch.compiler.disable(self._set_aside)()
            return forward(*args, **kwargs)
        state = self.states.current()
        if state.calls or not self.enabled:  # a call within a call belongs to that one
            return forward(*args, **kwargs)
        call: UNetCall | None = None
        try:
            call = self._open(forward, args, kwargs)
            state.calls.append(call)
            return self._serve(state, call)
        except BaseException as error:
            state.timeline.reset()
            if call is None or not call.inside:
                self._failed(error)
            raise
        finally:
            state.calls.clear()

    def _serve(self, state: State, call: UNetCall) -> Any:
        reason = stands_apart() or (reasons.COMPILED if _fake(call.arguments) else None)
        if reason is not None:
            return self._run_apart(state, call, reason)
        call.signature = self._signatures.get(call.key)
        if call.signature is None:
            if _empty(call.arguments):
                return self._run_apart(state, call, reasons.EMPTY)
            if self._signatures.has_failed(call.key):
                return self._run_apart(state, call, reasons.UNANALYSED)
            call.signature = self._unrecorded(call)
            if call.signature is None:
                return self._record(state, call)
        call.key = call.signature.key
        self._signatures.used(call.signature)
        call.place = self._place(state, call, call.signature)
        begins = call.place.trajectory != self._looked_at
        if begins and self.static is None and self._exchanged(call.place):
            self.forget()
            return self._record(state, call)
        call.decision = self.decide(state, call, call.signature, call.place)
        batch = self._batch(state, call, call.signature)
        if batch is not None:
            call.decision = self._by_rows(state, call, batch, call.decision)
        if call.decision.reason is None and (other := self.chain[call.decision.region].other_steps) is not None:
            step, steps = call.place.step, state.timeline.steps
            own = self._own_steps(call.decision.region, step, steps) if call.decision.region else None
            other.look(step, steps, own=own, pipeline=self.step_reader is not None)
        if call.decision.reason == reasons.SCHEDULED:
            self._more_steps.look(call.place.turn, state.timeline.declared_steps, self.chain[0].schedule)
        for observer in self.observers:
            observer.before(call)
        written = call.signature.written
        before = Before(call.args, call.kwargs, written=written) if begins and self.static is not None else None
        try:
            outcome = self._run(state, call, call.signature, call.place)
        except Exchanged:
            self.forget()
            return self._record(state, call)
        self.weights.leave()
        if outcome.kind == "full" and holds_placeholder(outcome.output):
            raise _lost(call)
        if before is not None and self._exchanged(call.place):  # and what has run was made of those before, maybe
            self.forget()
            if not before.restore():
                raise _written_to(call, "modules were exchanged")
            return self._record(state, call)
        self._remember(call, call.signature, call.place, outcome)
        if batch is not None:
            Rows.remember(state.timeline, call.place, batch, call.place.call.feature)
        if outcome.watched:
            self._follow(call, call.signature, outcome)
        self._count(call.place, outcome, call.signature.full_macs)
        for observer in self.observers:
            observer.after(call, outcome)
        return outcome.output

    def _open(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> UNetCall:
        arguments = self._binder(args, kwargs)
        training, gradients = self.unet.training, torch.is_grad_enabled()
        key = (arguments.signature, training, _autocast(arguments), gradients, torch.is_inference_mode_enabled())
        return UNetCall(forward, args, kwargs, arguments, key, training and gradients)

    def _run_apart(self, state: State, call: UNetCall, reason: str) -> Any:
        """A call that is none of a sampling loop's: nothing is reused in it, and nothing of it is remembered."""
        state.timeline.reset()
        output = call.run()
        self._count_plain(state.timeline.nowhere(reason), reason, call.key[0])
        return output

    def _place(
        self, state: State, call: UNetCall, signature: Signature, originals: Sequence[Any] | None = None
    ) -> Position:
        """Which step, branch and trajectory the call belongs to, what the schedule says, and the weights it runs with.

        Args:
            state: of the loop.
            call: the call.
            signature: of the call.
            originals: the arguments' leaves before the call, where it has run already and may have written to them.
        """
        timeline, leaves = state.timeline, call.arguments.flat if originals is None else originals
        inputs = signature.inputs
        at = inputs.time
        time = None if at is None else leaves[at]
        time = time.time if type(time) is Snapshot else time  # the recorded call has written to it
        if state.sampler is not None and at is not None:
            _declare(timeline, state.sampler.begins(state.reader.read(time)[0]), ordered=not state.sampler.each)
        elif self.step_reader is not None and signature.time is not None:
            self.step_reader(timeline, time)
        # a tensor that is the time itself, as in `cross_attention_kwargs={"timestep": t}`, says nothing more
        given = call.arguments.flat
        own = given[at] if at is not None and isinstance(given[at], torch.Tensor) else None
        values = [leaves[k] if own is None or given[k] is not own else FORM for k in inputs.conditions]
        # of declared steps the time does not matter but to what may be the time in another form
        asked = at is not None and (not timeline.declared or timeline.opened or inputs.read_forms)
        may_differ = self._tells_time and isinstance(time, torch.Tensor) and _may_differ(time)
        prepares = self._prepares and at is not None and is_read_at_once(time)
        number, entry = state.reader.read(time) if asked or may_differ or prepares else (None, None)
        call.times_differ = may_differ and number is None
        known, call.time = number if prepares else None, time
        if isinstance(time, torch.Tensor) and (self.observers or (self._tells_time and known is None)):
            call.time = copied(time)  # a loop, or the UNet, may write its next one over it
        if self._tells_time and time is not None and not call.times_differ:
            call.told = Told(call.time, known)
        if not asked:
            number, entry = None, None
        key = None if self.branch is None else _key(self.branch, call.arguments)
        place = timeline.at(number, entry, values, inputs, key=key)
        place.split(len(signature.regions))
        if state.sampler is not None:
            state.sampler.placed((place.branch.names, place.branch.number))
            if state.sampler.each and place.turn > 1:  # its first two evaluations are full
                place.turn -= 1
        if place.restarts and (call.trains or all(clocked.schedule.never_skips for clocked in self.chain)):
            place.restarts = 0  # nobody expects these to be a run
        call.due, call.unread = self._due(place.turn, timeline.steps), self._unread(state, place)
        call.idle = call.unread and self.static is None
        if call.due is not None or not call.idle:  # else nobody asks for them
            call.weights = self.weights.state()
        return place

    def decide(self, state: State, call: UNetCall, signature: Signature, place: Position) -> Decision:
        """Full, and why; or the region whose adaptor stands in, and what it emitted before. It only asks."""
        if not signature.regions:
            return Decision(signature.why)
        region = call.due
        if region is None:
            return Decision(place.scheduled)
        clocked = self.chain[region]
        if isinstance(signature, Derived) and not signature.seen:
            return Decision(reasons.TRACED, region)
        reason = place.doubt or (reasons.TRAINING if call.trains else None)
        memory = place.befores[region]
        if reason is None and (memory is None or memory.feature is None):
            reason = reasons.NOT_KEPT if memory is None else memory.missing
        if reason is not None or memory is None or memory.feature is None:
            return Decision(reason, region)
        reason = memory.feature.stale(call.key, call.weights)
        if reason is None and call.times_differ and clocked.tells_time:
            reason = reasons.TIMES
        if reason is None and memory.feature.entry is None and clocked.keeps_entry:
            reason = reasons.TRACED if memory.missing == reasons.TRACED else reasons.UNSEEN
        if reason is None and clocked.keeps_trail:
            trail = memory.feature.trail
            reason = reasons.TREND if trail is None or trail.broken else None
        schedule = clocked.schedule
        if reason is None and schedule.threshold is not None:
            step, verdict = state.decided
            if step == (place.trajectory, place.step):
                reason = verdict
            elif memory.feature.age >= schedule.longest:
                reason = reasons.LONGEST
        return Decision(reason, region, memory.feature)

    def _run(self, state: State, call: UNetCall, signature: Signature, place: Position) -> Outcome:
        """Run the pass that was decided on; in full, if the UNet calls its modules in another way than the trace."""
        decision = call.decision or Decision(signature.why)
        if decision.reason == reasons.LONGEST:  # it holds for the other calls of the step
            state.decided = ((place.trajectory, place.step), decision.reason)
        reason = decision.reason or (reasons.TEACHER if self.teaches else None)
        call.trails = self._trails(call, place) if self._keeps_trail else ()
        place.release(len(place.befores) if reason else decision.region + 1)
        if isinstance(signature, Derived) and not signature.seen:
            return self._compare(state, call, signature, reason)
        if not signature.regions or (reason is not None and call.idle):
            return Outcome(_in_full(call, Taint()), watched=False, macs=signature.full_macs, reason=reason)
        use = signature.regions[decision.region]
        self.install(use.plan)  # full passes need it too: they keep the exits
        pass_ = self._pass(state, call, Decision(reason, decision.region, decision.feature))
        if pass_.kind == "full":
            outcome = self.execute(call, pass_, None, eager=not signature.recorded)
            outcome.macs, outcome.reason = signature.full_macs, reason
            return outcome
        before = self._before(call, signature, stateless=use.proved and not use.changes)
        try:
            outcome = self.execute(call, pass_, decision.feature)
        except Exception as error:
            # where a call was skipped that puts something somewhere, it is not there
            missed = not use.proved and pass_.blanks and type(error) in _MISSED
            exchanged, ours = not self.intact, pass_.taint.used or missed or may_cause(error)
            if not (exchanged or (ours and not pass_.adapting)) or not before.restore():
                raise
            call.inside = False
            if exchanged:  # within the trajectory: what was recorded does not fit these modules
                self.forget()
                return Outcome(call.run(), watched=False, macs=signature.full_macs, reason=reasons.DIFFERED)
            outcome = Outcome(None, "adaptor", used=True)  # if it is the UNet's own, the full pass has it too
        signature.written |= before.written
        if outcome.kind == "full":  # the schedule has seen the region's entry
            outcome.macs = signature.full_macs
            return outcome
        outcome.macs, outcome.skipped = use.rest_macs + (use.adaptor_macs or 0), use.name
        if outcome.complete and not (outcome.used or outcome.repeated or self.installed.closed):
            use.changes = before.changed if not use.proved else use.changes
            use.proved, use.used = True, 0
            pass_.proved()
            return outcome
        return self._again(call, signature, pass_, before, outcome)

    def _compare(self, state: State, call: UNetCall, signature: Derived, reason: str | None) -> Outcome:
        """The first call of other sizes, in full: are the module calls those of the recorded one?"""
        patches = self._patches
        for use in signature.regions if patches else ():
            self.install(use.plan)
        pass_ = self._pass(state, call, Decision(reason or reasons.TRACED))
        with signature.watching(call.args, call.kwargs) as watch:
            outcome = self.execute(call, pass_, None, eager=True)
        outcome.watched = patches
        own = (call.args, call.kwargs, outcome.output, list(outcome.exits.values()), outcome.entry, outcome.captured)
        left = watch.left.beside(self.unet, own)
        if (outcome.complete or not patches) and not left and watch.apply(signature):
            signature.seen = True
        else:
            self._doubt(call)
            outcome.watched = False
        outcome.macs, outcome.reason = signature.full_macs, reason
        return outcome

    def _doubt(self, call: UNetCall, use: RegionUse | None = None) -> None:
        """Calls of this signature are not what was taken for granted: the next is recorded, or all are full.

        Args:
            call: one that has shown it.
            use: the region of which something was used that is skipped; None where calls were others than recorded.
        """
        signature = call.signature
        if isinstance(signature, Derived) and (use is None or not use.proved):
            self._signatures.doubt(call.key)
        elif signature is None or use is None or not signature.traced:
            self.forget()
        else:
            use.used += 1
            if not use.proved or use.used >= _DIFFERED:
                signature.regions, signature.why = (), reasons.USED

    def _again(self, call: UNetCall, signature: Signature, pass_: Pass, before: Before, outcome: Outcome) -> Outcome:
        """The full pass in the place of an adaptor pass that called modules, or used values, as the trace does not."""
        use = signature.regions[call.decision.region if call.decision else 0]
        unproved = not signature.traced and not use.proved
        # else the UNet came to its output without the region, as a step cache does: nothing is amiss
        if not (outcome.blanks or outcome.used or unproved):
            outcome.kind, outcome.reason, outcome.skipped = "full", reasons.DIFFERED, ""
            outcome.macs = signature.full_macs
            return outcome
        outcome.used = outcome.used and not outcome.repeated  # a graph that holds what stands in is the checkpoint's
        why = reasons.USED if outcome.used else reasons.REPEATED if outcome.repeated else reasons.DIFFERED
        if not before.restore():
            raise _written_to(call, why)
        if outcome.used and pass_.taint.exchanged(self.unet):
            raise _lost(call)
        clocked = self.chain[pass_.plan.index]
        began = self._begin_to_follow(call, clocked, pass_.taint) if outcome.used else None
        again = began or self.full_pass(call)
        again.macs, again.reason = outcome.macs + signature.full_macs, why
        again.used = outcome.used and not (began and clocked.follows)
        if unproved and not outcome.used:
            self._doubt(call)
        return again

    def _begin_to_follow(self, call: UNetCall, clocked: ClockedRegion, taint: Taint) -> Outcome | None:
        """The full pass after one that failed as it wrote a placeholder to memory of its own; None if it was another.

        If nobody keeps what the full pass makes, later adaptor passes follow placeholders into such memory.
        """
        if clocked.follows or not taint.wrote_to_its_own:
            return None
        full = self._full(call, Watching)
        outcome = self.execute(call, full, None, eager=True)
        results = (outcome.output, outcome.exits, outcome.captured, outcome.entry)
        clocked.follows = not full.taint.outlives(self.unet, results)
        return outcome

    def _before(self, call: UNetCall, signature: Signature, *, stateless: bool) -> Before:
        """The arguments, for the case that the adaptor pass which begins now has to be run again.

        And what the UNet's modules hold, until one such pass has left all of that as it was.
        """
        sample = call.arguments.get(signature.sample)
        size = sample.numel() if isinstance(sample, torch.Tensor) else 0
        written, unet, unsure = signature.written, None if stateless else self.unet, not stateless
        return Before(call.args, call.kwargs, written=written, size=size, unsure=unsure, always=sample, unet=unet)

    def full_pass(self, call: UNetCall) -> Outcome:
        """Run a placed call in full, whatever was decided; its own exit is the outcome's."""
        return self.execute(call, self._full(call), None, eager=True)

    def _full(self, call: UNetCall, taint: type[Taint] = Taint) -> Pass:
        decision = (call.decision or Decision(None))._replace(reason=reasons.DIFFERED)
        return self._pass(self.states.current(), call, decision, taint)

    def execute(self, call: UNetCall, pass_: Pass, feature: Feature | None, *, eager: bool = False) -> Outcome:
        """Let the UNet run with a pass that its patched modules ask, or a static callable that stands for it."""
        if self.static is not None and not eager and self.static.ready(call, pass_):
            return self.static.run(call, pass_, feature)
        outcome = self._as_it_is(call, pass_)
        if outcome.kind == "adaptor":
            values = (outcome.output, outcome.exits, outcome.captured, outcome.entry)
            outcome.used = pass_.taint.reaches(values) or pass_.taint.outlives(self.unet)
            outcome.used = outcome.used or (pass_.reads is not None and pass_.reads.missed(outcome.output))
        return outcome

    def _as_it_is(self, call: UNetCall, pass_: Pass) -> Outcome:
        self.active.pass_ = pass_
        try:
            if pass_.looks:
                pass_.enter(call.args, call.kwargs)
            if pass_.kind == "full":
                output = _in_full(call, pass_.taint)
            else:
                with pass_.reads or contextlib.nullcontext(), pass_.taint:
                    output = call.run()
        finally:
            self.active.pass_ = None
        return pass_.outcome(output)

    def _batch(self, state: State, call: UNetCall, signature: Signature) -> Batch | None:
        """The rows of the call, where the user has named them, and one region without a threshold is skipped."""
        names = state.timeline.row_names
        if not names or len(signature.regions) != 1 or self.chain[0].schedule.threshold is not None:
            return None
        exits = (call.exit[1] for call in signature.regions[0].plan.skipped)
        exit = next(slot.shape for slot in exits if slot is not None)
        batch = Batch(names, call.arguments.signature, signature.inputs.paths, exit)
        sample = call.arguments.get(signature.sample)
        if not state.timeline.rows_exact and not batch.fits(sample):
            return None
        batch.check(sample)
        return batch

    def _by_rows(self, state: State, call: UNetCall, batch: Batch, decision: Decision) -> Decision:
        """The adaptor where each row of the batch is one of the step before; full where the branch had other names."""
        assert call.signature is not None  # the call has a place
        assert call.place is not None
        if decision.reason is None:
            own = (rows.batch.names for rows in state.timeline.rows if rows.feature is decision.feature)
            if next(own, None) == batch.names:
                return decision
            decision = Decision(reasons.NEW)
        if decision.reason not in HELPED or not call.place.certain or call.trains:
            return decision
        if call.times_differ and self.chain[0].tells_time:
            return Decision(reasons.TIMES)
        values = [call.arguments.flat[k] for k in call.signature.inputs.conditions]
        values = call.place.branch.conditions.with_forms(values)  # one that was the time until now is a condition
        feature = serves(state.timeline, call.place, batch, values, call.key, call.weights)
        if feature is None or (feature.entry is None and self.chain[0].keeps_entry):
            return decision
        return Decision(None, 0, feature)

    def _remember(self, call: UNetCall, signature: Signature, place: Position, outcome: Outcome) -> None:
        """Keep what each region emitted for the step after this one, unless it may not be what it was."""
        signature.copies |= outcome.written  # a user's hook, or FreeU switched on after the trace: from now on a copy
        if call.unread or not outcome.watched:
            return
        for index, memory in enumerate(place.calls):
            before = place.befores[index]
            if call.trains:
                memory.missing = reasons.TRAINING  # nothing will be reused: no memory is taken from the training
            elif not outcome.complete:
                memory.missing = reasons.DIFFERED
            elif index in outcome.written:
                memory.missing = reasons.WRITTEN
            elif index in outcome.exits:
                memory.feature = self._feature(call, outcome, index)
            elif before is not None:  # inside of what was skipped: what it emitted before waits
                memory.feature, memory.missing = before.take(), before.missing

    def _feature(self, call: UNetCall, outcome: Outcome, index: int) -> Feature:
        own = call.decision is not None and index == call.decision.region
        entry = outcome.entry if own else outcome.captured.get(entry_of(index))
        before, adapted = call.decision.feature if call.decision is not None else None, outcome.kind == "adaptor"
        exit, clocked = self._own(outcome.exits, index, None if before is None else before.exit), self.chain[index]
        feature = Feature(call.key, exit, version(exit), call.weights, entry)
        feature.told = call.told if clocked.tells_time else None
        if own and before is not None and adapted and clocked.schedule.threshold is not None:
            feature.full_entry, feature.age = before.compared, before.age + 1
            feature.entry = feature.entry if "entry_cached" in clocked.needs else feature.full_entry  # nobody reads it
        if clocked.keeps_trail:
            trail = call.trails[index] if index < len(call.trails) else None
            first = call.place is not None and call.place.turn == 1
            feature.trail = trail if own and adapted else Trail.after(trail, exit, feature.told, first=first)
        return feature

    def given(self, call: UNetCall, clocked: ClockedRegion, feature: Feature) -> Given:
        """What the adaptor is given beside what the pass picks up: the times, or what it has prepared for them."""
        numbers = None if clocked.prepare is None else self._numbers(call, clocked, feature)
        prepared = None if clocked.prepare is None or numbers is None else clocked.prepare(numbers, feature.exit)
        past = stand_in.Past.of(feature, times=prepared is None)
        if prepared is not None or call.told is None or "position" not in clocked.needs:
            return Given(past, None, prepared)
        return Given(past, call.told.tensor(feature.exit.device))

    def _numbers(self, call: UNetCall, clocked: ClockedRegion, feature: Feature) -> tuple[float, ...] | None:
        """The times that an adaptor is told, as numbers; None where one of them is not known as one."""
        now = None if call.told is None else call.told.number
        before = None if feature.told is None else feature.told.number
        if now is None or before is None:
            return None
        if not clocked.keeps_trail:
            return now, before
        trail = feature.trail
        if trail is None or trail.trend is None:  # the times tell that there is no way between two full passes
            return now, before, before, before
        return None if trail.numbers is None else (now, before, *trail.numbers)

    def _trails(self, call: UNetCall, place: Position) -> tuple[Trail | None, ...]:
        """The trails that this call's regions go on with: those of the step before, if that is what came before it.

        Steps that are not known to be one trajectory yet go on too: who uses the trail asks when they are known to be.
        """
        if place.doubt not in (None, reasons.EVIDENCE):
            return ()
        features = [None if before is None else before.feature for before in place.befores]
        return tuple(None if one is None or one.stale(call.key, call.weights) else one.trail for one in features)

    def _count(self, place: Position, outcome: Outcome, full_macs: int) -> None:
        if outcome.reason is not None and not self.records_first:  # who records trajectories wants to see them
            if outcome.reason in (reasons.FIRST, reasons.UNREADABLE):
                self._no_adaptor_pass.runs_tell = self._runs_tell
            self._no_adaptor_pass.count(outcome.reason, place, self.stats.adaptor_passes)
        if outcome.reason is None and outcome.macs > full_macs and not (self._dear or self.looks):
            self._dear = True
            names = dict.fromkeys(type(one.adaptor).__name__ for one in self.chain)
            warn_of_dear(", ".join(names), outcome.macs, full_macs)
        self.stats.count(outcome.reason, outcome.macs, full_macs, place.trajectory, place.step, outcome.skipped)
        if log.isEnabledFor(logging.DEBUG):
            where = (place.trajectory, place.step, place.branch.label, place.ordinal + 1)
            kind = f"full: {outcome.reason}" if outcome.reason else f"adaptor {outcome.skipped}".strip()
            log.debug("trajectory %d, step %d, branch %s, call %d: %s", *where, kind)

    @property
    def _runs_tell(self) -> bool:
        """Does a run without an adaptor pass tell anything? Not where loops take turns, or where none is meant."""
        meant = self._patches and not self.observers and not (self.unet.training and torch.is_grad_enabled())
        return meant and self.states.alone

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record such a call ahead, apart from any run, in the modes in which it may come."""
        state = self.states.current()
        try:
            calls = list(self._calls_ahead(args, kwargs))
            state.calls.append(calls[0])  # what the recording calls is the UNet's own
            if all(self._signatures.get(call.key) or self._adopt_ahead(call) for call in calls):
                return
            trace = self._record_apart(calls[0])
            for call in calls:
                if self._signatures.get(call.key) is None:
                    with torch.inference_mode(call.key[4]):
                        self._learn(call, trace)
        finally:
            state.calls.clear()

    def _adopt_ahead(self, call: UNetCall) -> Signature | None:
        with torch.inference_mode(call.key[4]):
            return self._adopt(call)

    def _calls_ahead(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[UNetCall]:
        """The call as it would be with gradients as they are now, without, and in inference mode."""
        for mode in (contextlib.nullcontext(), torch.no_grad(), torch.inference_mode()):
            with mode:
                yield self._open(self.unet.forward, args, kwargs)

    # -- passes --------------------------------------------------------------------------------------------------

    def _pass(self, state: State, call: UNetCall, decision: Decision, taint: type[Taint] | None = None) -> Pass:
        assert call.signature is not None  # the call has a place
        use, clocked = call.signature.regions[decision.region], self.chain[decision.region]
        emit: Emit | None = None
        judge: Callable[[torch.Tensor | None], str | None] | None = None
        if decision.reason is None:
            emit = partial(self._emit, call, decision)
            decided = call.place is not None and state.decided[0] == (call.place.trajectory, call.place.step)
            if clocked.schedule.threshold is not None and not decided:
                judge = partial(self._judge, state, call, decision)
        scratch = self._scratch(use.region.scratch) if use.region.scratch else ()
        taint = taint or (Following if clocked.follows and emit is not None else Taint)
        return Pass(
            use.plan,
            "full" if emit is None else "adaptor",
            emit,
            copies=call.signature.copies,
            looks=self.looks or self._keeps_entry or (emit is not None and clocked.looks),
            keeps_entry=clocked.keeps_entry,
            judge=judge,
            proves=emit is None and not call.signature.recorded,
            shared=use.shared if use.proved else None,
            taint=taint(scratch),
            reads=Reads() if emit is not None and not use.proved else None,
        )

    def _scratch(self, paths: Sequence[str]) -> list[int]:
        """The storages of the tensors that stand at these dotted paths among the attributes of the UNet's modules."""
        places = [path.rpartition(".") for path in paths]
        held = [getattr(self.unet.get_submodule(parent), name) for parent, _, name in places]
        return [address(tensor.untyped_storage()) for tensor in held]

    def _emit(self, call: UNetCall, decision: Decision, captured: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run the adaptor, and check what it returns before the UNet sees it."""
        assert call.signature is not None  # the call has a place
        assert decision.feature is not None  # it is an adaptor pass
        use, clocked = call.signature.regions[decision.region], self.chain[decision.region]
        adaptor, cached = clocked.adaptor, decision.feature.exit
        if use.adaptor_macs is None and clocked.movable:
            stand_in.place(adaptor, cached)
        given = self.given(call, clocked, decision.feature)
        inputs = stand_in.inputs(captured, cached, *given)
        step = None if call.place is None else call.place.step
        where = {"step": step, "region": use.region, "adaptor": adaptor}
        shared = captured if given.position is None else {**captured, "position": given.position}  # it is kept, too
        lent = stand_in.Lent(shared, compares=use.adaptor_macs is None)
        if use.adaptor_macs is None:
            exit, use.adaptor_macs = stand_in.count_and_call(adaptor, inputs)
        else:
            exit = stand_in.call(adaptor, inputs)
        lent.check(where)
        if exit is cached and not self.check_finite:
            return decision.feature.exit
        return stand_in.owned(stand_in.check(exit, cached, finite=self.check_finite, where=where), cached)

    def _judge(self, state: State, call: UNetCall, decision: Decision, entry: torch.Tensor | None) -> str | None:
        """Why the pass that has come to this entry is full after all; None if the adaptor may stand in."""
        before = None if decision.feature is None else decision.feature.compared
        if call.place is None or entry is None or before is None or entry.shape != before.shape:
            return reasons.UNSEEN
        step = (call.place.trajectory, call.place.step)
        moved = self.chain[decision.region].schedule.moved(entry, before)
        state.decided = (step, reasons.MOVED if moved else None)
        return state.decided[1]

    def _unread(self, state: State, place: Position) -> bool:
        """Does nobody read what this step emits, as the next one is full?"""
        return not (self._keeps_trail or self.looks or self.skips_at(place.turn + 1, state.timeline.steps))

    def _own(self, exits: dict[int, Emitted], index: int, cached: torch.Tensor | None) -> torch.Tensor:
        """The exit to keep, taken out of the outcome of its call, which has returned: in memory that is ours alone.

        Whoever still holds that memory may write to it, and need not leave a mark: then it is a copy. What was kept
        before, and has served as it is, is kept on: who has held it since is not asked.
        """
        if exits[index].exit is cached:
            return cached
        if self.observers:  # they look at it later
            return self._free(exits[index].exit).clone()
        exit = self._free(exits.pop(index).exit)
        if exit.requires_grad:  # its graph holds it, too
            return exit.clone()
        exit = exit.detach()  # of an object that others hold there is one more now; else it is gone
        return exit if is_sole(exit) else exit.clone()

    def _free(self, exit: torch.Tensor) -> torch.Tensor:
        """The exit without the graph that it comes from, unless gradients shall flow into the step before."""
        return exit.detach() if exit.requires_grad and not self.keep_graph else exit

    # -- the first call of a signature ---------------------------------------------------------------------------

    def _unrecorded(self, call: UNetCall) -> Signature | None:
        """What can be known of the first of such calls before it runs; None if it is to be recorded as it runs."""
        signature = self._adopt(call)
        if signature is None and self.records_first:
            signature = self._learn(call, self._record_apart(call))
        return signature or self._derive(call)

    def _record_apart(self, call: UNetCall) -> Trace:
        """Record such a call apart from any run; what it has written to its arguments is taken back."""
        before = Before(call.args, call.kwargs, size=math.inf, unsure=True)
        try:
            return record(self.unet, call.args, call.kwargs, time=self._named_time(call))
        finally:
            before.restore()

    def _named_time(self, call: UNetCall) -> str | None:
        """The time that the user has named; or a region that was found before has, in calls of any size."""
        regions = [] if self.time else [one.wanted for one in self.chain if isinstance(one.wanted, Region)]
        for region in regions:
            if len(region.times) == 1 and has_time(call.arguments, region.times[0], sample=region.sample):
                return region.times[0]
        return self.time

    def _derive(self, call: UNetCall) -> Signature | None:
        """The signature of a call that differs from a recorded one in sizes alone; its first call will compare them."""
        recorded = self._signatures.recorded_for(call.key)
        if recorded is None or not recorded.fits(call.arguments, self._named_time(call)):
            return None
        return self._put(call, Derived.of(recorded))

    def _adopt(self, call: UNetCall) -> Signature | None:
        """The signature of a region that the user found before, if it was found for such a call."""
        region, autocast = self.chain[0].wanted, call.key[2]
        if len(self.chain) > 1 or not isinstance(region, Region) or autocast is not None or not self._adopts:
            return None
        if self.chain[0].keep:  # what feeds the modules to keep stands in a trace
            return None
        if not region.is_for(call.arguments.signature):
            return None
        times = time_candidates(call.arguments, sample=region.sample, time=self.time) if self.time else region.times
        if len(times) > 1:
            return None
        self.chain[0].region = region
        return self._begin(self._new(call, single(region, times[0] if times else None)))

    def _record(self, state: State, call: UNetCall) -> Any:
        """Run the first call of a signature, or of modules that were exchanged, in full, and record it as it runs."""
        with garbage_kept():
            return self._run_recorded(state, call)

    def _run_recorded(self, state: State, call: UNetCall) -> Any:
        for observer in self.observers if call.decision is None else ():  # else they know of it
            observer.before(call)
        snapshots = [Snapshot.of(leaf) for leaf in call.arguments.flat]
        recorder = Recorder(self.unet, call.arguments, module_paths(self.unet))
        exits = tuple(clocked.likely_exits for clocked in self.chain)
        recorder.start(call.args, call.kwargs, frame=sys._getframe(), keep=True, exits=exits)
        try:
            output = call.run()
            likely = recorder.likely_exits(graph=self.keep_graph)
        except BaseException:
            recorder.stop()
            raise
        recorder.stop(output)
        later = bool(self._signatures)
        try:
            call.signature = self._learn(call, finish(recorder, self.unet, call.arguments, time=self._named_time(call)))
        except Exception as error:
            if not later or isinstance(error, Warning):  # the first call says so, and leaves the UNet unwrapped
                raise
            return self._leave_unanalysed(state, call, error, output)
        if call.place is None:
            before = [one.now if isinstance(one, Snapshot) else one for one in snapshots]
            call.place = self._place(state, call, call.signature, before)  # after it: lazy weights appear in the call
        call.weights = self.weights.state()  # also where modules that were exchanged have begun it anew
        call.place.split(len(call.signature.regions))
        uses = zip(call.signature.regions, call.place.calls, self.chain, strict=False)
        for use, memory, clocked in uses:  # these inputs may have no region
            exit, memory.missing = likely.get(use.region.exit.node), reasons.TRACED
            if exit is not None:
                exit = self._free(exit).clone()  # others, the recorder among them, may still hold it
                told = call.told if clocked.tells_time else None
                memory.feature = Feature(call.key, exit, version(exit), call.weights, told=told)
                if clocked.keeps_trail:
                    memory.feature.trail = Trail.after(None, exit, told, first=call.place.turn == 1)
        if (batch := self._batch(state, call, call.signature)) is not None:
            Rows.remember(state.timeline, call.place, batch, call.place.call.feature)
        reason = call.place.scheduled if call.due is None else reasons.TRACED
        macs = call.signature.full_macs
        outcome = Outcome(output, watched=False, macs=macs, reason=reason)
        self._count(call.place, outcome, macs)
        for observer in self.observers:
            observer.after(call, outcome)
        return output

    def _leave_unanalysed(self, state: State, call: UNetCall, error: Exception, output: Any) -> Any:
        """Calls of this signature are full from now on; those of others are served as before."""
        if self._signatures.fail(call.key):
            warn_of_failure(error)
        state.timeline.reset()
        self._count_plain(state.timeline.nowhere(reasons.UNANALYSED), reasons.UNANALYSED, call.key[0])
        return output

    def _learn(self, call: UNetCall, trace: Trace) -> Signature:
        """Find the regions in a trace, and see to them."""
        signature = self._new(call, prepare(trace, self.unet, self.chain))
        recorded = Recorded.of(signature, trace)
        if recorded is not None:
            self._signatures.put_recorded(call.key, recorded)
        return self._begin(signature)

    def _begin(self, signature: Signature) -> Signature:
        """A signature is known from now on: patch the modules with skipped calls, if a step may skip any."""
        if self._patches:
            for use in signature.regions:
                self.install(use.plan)
            self._watchers.look(self.unet, self.installed.paths, self.chain[0].keep)
        return signature

    def _new(self, call: UNetCall, signature: Signature) -> Signature:
        if self._signatures and not self.intact:
            self.forget()
        self._census = Census(self.unet)
        _check_ignored(signature, self._binder)
        self._no_adaptor_pass.needless = self._binder.needless(call.arguments.paths)
        self._signatures.recordings[call.key] += 1
        return self._put(call, signature)

    def _put(self, call: UNetCall, signature: Signature) -> Signature:
        """Keep a signature; what is static of one that is let go for it goes, too."""
        signature.see(call.arguments, self._binder.ignores)
        for oldest in self._signatures.put(call.key, signature):
            if self.static is not None:
                self.static.forget(oldest)
        return signature

    @property
    def _patches(self) -> bool:
        """Are modules patched? Not where it is certain that no step can skip any, and nobody looks."""
        return self.looks or not all(clocked.schedule.never_skips for clocked in self.chain)

    # -- modules that are exchanged ------------------------------------------------------------------------------

    @property
    def intact(self) -> bool:
        """Does the UNet consist of the modules whose calls were recorded?"""
        return self._census.holds(self.unet)

    def _exchanged(self, place: Position) -> bool:
        """Are modules, or what runs static of them, others than when that was recorded? Looked up once a trajectory."""
        self._looked_at = place.trajectory
        if self.skips_at(place.step + 1):
            self._watchers.look(self.unet, self.installed.paths, self.chain[0].keep)
        return place.step == 1 and not (self.intact and (self.static is None or self.static.holds()))

    def _follow(self, call: UNetCall, signature: Signature, outcome: Outcome) -> None:
        """Calls that differ from the recorded ones again and again are recorded anew; some that always do are full."""
        if outcome.used and call.decision is not None:
            self._doubt(call, signature.regions[call.decision.region])
            return
        if outcome.reason == reasons.REPEATED:  # the UNet checkpoints more than what is skipped
            signature.regions, signature.why = (), reasons.REPEATED
            return
        if outcome.complete and outcome.reason != reasons.DIFFERED:
            signature.differed, signature.recorded = 0, True  # a pass has shown as much as a recording
            return
        if not signature.recorded and outcome.reached:  # not what the region's file says, or other modules than then
            self.forget()
            return
        signature.differed += outcome.reached  # else a step cache has answered: what is recorded still holds
        if signature.differed >= _DIFFERED or not self.intact:
            if self._signatures.recordings[call.key] < _RECORDINGS:
                self.forget()
            else:
                signature.regions, signature.why = (), reasons.DIFFERED

    def forget(self) -> None:
        """What was recorded does not hold any more: the next call of each signature is recorded, and patched, anew."""
        self._signatures.forget()
        self._adopts = False
        self.weights = Weights(self.unet)  # those of modules that are gone tell nothing
        self.installed.renew(modules_of(self.unet))
        if self.static is not None:
            self.static.forget()

    def install(self, plan: CutPlan) -> None:
        """See to it that the modules with skipped calls ask the pass that runs, and that it sees the boundary."""
        looks = self.looks or self._keeps_entry or any(one.looks for one in self.chain)
        if not self.installed.intact(plan, looks=looks):
            self.installed.add(plan, modules_of(self.unet), looks=looks)

    # -- calls that are not ours ---------------------------------------------------------------------------------

    def _count_plain(self, place: Position, reason: str, inputs: Hashable) -> None:
        """A call that ran as if nothing were attached; what it cost is known once such a call was recorded."""
        cost = next((signature.full_macs for signature in self._signatures if signature.key[0] == inputs), 0)
        self._count(place, Outcome(None, watched=False, macs=cost, reason=reason), cost)

    def _missed(self, reason: str) -> None:
        """A call runs past us, or has: what is kept may not be of the step before the next one."""
        if self.enabled:
            timeline = self.states.current().timeline
            timeline.reset()
            self._count_plain(timeline.nowhere(reason), reason, None)

    def _set_aside(self) -> None:
        """Somebody compiles the wrapped UNet: its decisions would be compiled in."""
        self.installed.run_eagerly(self.unet)
        timeline = self.states.current().timeline
        timeline.reset()
        self._count_plain(timeline.nowhere(reasons.COMPILED), reasons.COMPILED, None)


def _in_full(call: UNetCall, taint: Taint) -> Any:
    """Run a full pass, which has no placeholders: one that it asks for a value was kept by an earlier pass."""
    try:
        with taint:
            output = call.run()
    except SkippedValueError as error:
        raise _lost(call) from error
    if taint.used:
        raise _lost(call)
    return output


def _written_to(call: UNetCall, why: str) -> WrapError:
    """A pass cannot be run again: the error that says so."""
    return WrapError(
        "a pass that has to run again in full needs unchanged arguments",
        seen={
            "step": None if call.place is None else call.place.step,
            "why again": why,
            "meanwhile": "the UNet has written to them",
        },
        do="let the UNet write to copies of its arguments; or make the step that differs a full step in the schedule",
    )


def _lost(call: UNetCall) -> WrapError:
    """What the UNet would have used is a placeholder: the error that says so."""
    return WrapError(
        "a UNet must not keep the output of a skipped module for its next call",
        seen={
            "step": None if call.place is None else call.place.step,
            "kept": "in an adaptor pass, and not in the first one",
        },
        do="let the UNet keep it from its first steps on, so that it is noticed; or remove() the wrapper",
    )


def _check_ignored(signature: Signature, binder: Binder) -> None:
    """Raise `ArgumentError` if the sample or the time is ignored."""
    for what, path in (("sample", signature.sample), ("time", signature.time)):
        if path is not None and binder.ignores(path):
            raise ArgumentError(
                "sample and time are no conditions, so they cannot be ignored",
                seen={"ignore": ", ".join(binder.ignored), what: path},
                do="leave it out of ignore=",
            )


def _declare(timeline: Timeline, begun: str | None, *, ordered: bool) -> None:
    """Tell the timeline what begins with the next call: a "run", a "step", or neither.

    Args:
        timeline: of the loop.
        begun: what begins.
        ordered: steps go one way in time; single evaluations of a sampler need not.
    """
    if begun == "run" or (begun is None and not timeline.declared):  # after an error in the middle of a step
        timeline.reset()
    if begun is not None:
        timeline.declare()
        timeline.opened = ordered


def _may_differ(time: torch.Tensor) -> bool:
    """Has a time several elements, which are not one that is expanded to all rows?"""
    return time.numel() > 1 and any(time.stride())


def _key(branch: Callable[[Mapping[str, Any]], Hashable], arguments: Arguments) -> Hashable:
    """What the user's function says of a call: the key of its branch."""
    key = branch(arguments.values)
    try:
        if tensors(key):  # one is equal to itself, whatever is written to it
            raise TypeError
        hash(key)
    except TypeError as error:
        raise ArgumentError(
            "branch= must return a key that can be hashed: a text, a number, or a tuple of these",
            seen={"got": type(key).__name__},
            do='return "cond" or "uncond"; for a tensor its value: int(args["label"])',
        ) from error
    return key


def _fake(arguments: Arguments) -> bool:
    """Are these the tensors without values by which torch.compile, torch.export and planners of memory try a call?"""
    return any(type(leaf) is FakeTensor for leaf in arguments.flat)


def _empty(arguments: Arguments) -> bool:
    """Has a tensor that may be the sample no rows?"""
    dense = (leaf for leaf in arguments.flat if isinstance(leaf, torch.Tensor) and not leaf.is_nested)
    return any(leaf.ndim >= 3 and not leaf.shape[0] for leaf in dense)


def _autocast(arguments: Arguments) -> torch.dtype | None:
    """What autocast computes in on the inputs' device; None where it is off."""
    kind = _autocast_kind(arguments.device)
    return torch.get_autocast_dtype(kind) if kind and torch.is_autocast_enabled(kind) else None


@functools.cache  # to ask a device for its type takes 12 µs where caches are cold
def _autocast_kind(device: torch.device | None) -> str | None:
    kind = "cpu" if device is None else device.type
    return kind if torch.amp.is_autocast_available(kind) else None
