"""Captured calls: full and adaptor passes as plain CUDA graphs, without a compiler.

A graph replays kernels at fixed addresses. So inputs are copied into buffers, outputs are copied out of the pool that
all graphs share, and a graph is thrown away when weights have moved. Nothing else is fixed: an adaptor pass gets the
exit of the step before through a buffer, as it gets the sample. What a pass writes to the UNet's own buffers it writes
once a call: capturing, which runs the pass thrice, puts them back.

Whether the modules still are what was captured is looked up once a trajectory and where `Weights` has seen something,
and in every call whether weights have moved. Both take the host a while, so they come after the launch; what was
launched does not count if the answer is no. A launch must not read memory that is gone, so before it only one question
is asked: has a weight's storage been freed? A pass that writes to the UNet's buffers is launched after all questions.
Globals and closures that its functions read are not looked at.

What torch.compile has made can be captured, too. Its guards are asked where a pass is captured; what they would see
later, the looks above have to see. With torch's own CUDA graphs, which ask them and look at every weight before each
launch, eight steps of SD v1.5 take an H200 35.7 ms in the place of 33.1 (benchmarks/gpu_latency.py).
"""

from __future__ import annotations

import contextlib
import enum
import functools
import itertools
import logging
import operator
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from clockwork_hooks._tree import attribute, flat, leaves, map_leaves, tensors, version
from clockwork_hooks.adaptors import stand_in
from clockwork_hooks.adaptors.ahead import beside
from clockwork_hooks.clock.conditions import Weights
from clockwork_hooks.engine.compiled import Cached, Compiled, Unproved, let_go, outcome_of
from clockwork_hooks.engine.passes import Emitted, Exchanged, Outcome, Pass
from clockwork_hooks.errors import ArgumentError, CompileError, NoEffectWarning, warn

if TYPE_CHECKING:
    from clockwork_hooks.engine.engine import Engine, UNetCall

__all__ = ["Captured"]

DEVICES = ("cuda",)
_MOVES, _PAYS = 8, 6  # so often in a row are graphs let go that ran less often; capturing two runs six passes
_GRAPHS, _DEEPEST = 64, 4


@dataclass(slots=True)
class _Buffer:
    """A graph's input: its memory, the tensor that was last copied there, and does the UNet write to its argument?"""

    memory: torch.Tensor
    returns: bool = False
    source: weakref.ref[torch.Tensor] | None = None
    written: tuple[int, int] = (-1, -1)

    def fill(self, value: torch.Tensor, trajectory: int) -> None:
        """Copy `value` in, unless this trajectory has done so: writes by CUDA graphs or through `.data` go unmarked."""
        now = trajectory, version(value)
        if now[1] < 0 or now != self.written or self.source is None or self.source() is not value:
            self.memory.copy_(value, non_blocking=True)
            self.source, self.written = weakref.ref(value), now


@dataclass(slots=True)
class _Graph:
    """One captured pass.

    Attributes:
        graph: what is replayed.
        inputs: its buffers, in the order of the tensors of a call.
        cached: the one of the exit that an adaptor pass is given.
        outcome: what the pass led to, in the graph's memory.
        constants: what else the call held; kept, as keys have their ids.
        writes: does it write to the UNet's own buffers or arguments? Then it is launched once, when all is known.
    """

    graph: torch.cuda.CUDAGraph
    inputs: list[_Buffer]
    cached: torch.Tensor | None
    outcome: Outcome
    constants: list[Any] = field(repr=False)
    writes: bool = False

    def replay(self, values: list[torch.Tensor], call: UNetCall, cached: torch.Tensor | None) -> Outcome:
        """Launch it on these inputs; what it leads to is copied out of the graph's memory, unless nobody reads it."""
        trajectory = -1 if call.place is None else call.place.trajectory
        sample = None if call.signature is None else call.arguments.get(call.signature.sample)
        for buffer, value in zip(self.inputs, values, strict=True):
            if value is sample:
                buffer.source = None  # a sampler may write to it as it likes
            buffer.fill(value, trajectory)
        self.graph.replay()
        for buffer, value in zip(self.inputs, values, strict=True):
            if buffer.returns:
                value.copy_(buffer.memory)
        output = map_leaves(_copy, self.outcome.output)
        if call.unread:
            return replace(self.outcome, output=output)
        exits = {}
        for region, emitted in self.outcome.exits.items():  # an adaptor may return what it was given
            exit = cached if emitted.exit is self.cached and cached is not None else emitted.exit.clone()
            exits[region] = Emitted(exit, version(exit))
        entry = _copy(self.outcome.entry)
        others = {name: tensor.clone() for name, tensor in self.outcome.captured.items() if name.startswith("entry ")}
        captured = {**self.outcome.captured, **others}
        return replace(self.outcome, output=output, exits=exits, entry=entry, captured=captured)


class _Refused(Exception):
    """CUDA cannot capture a pass; its cause says why."""


class Captured(Compiled):
    """Runs the passes of a wrapper as captured CUDA graphs.

    Args:
        engine: decides what runs.
        compiled: makes the passes that are captured; None captures them as they are.

    Raises:
        ArgumentError: the UNet is not on a CUDA device.
    """

    def __init__(self, engine: Engine, compiled: Compiled | None = None) -> None:
        super().__init__(engine, {}, pooled=True)
        held = itertools.chain(engine.unet.parameters(), engine.unet.buffers())
        device = next((one.device for one in held), torch.device("cpu"))
        if device.type not in DEVICES:
            raise ArgumentError(
                "CUDA graphs replay launches of CUDA kernels: the UNet must be on a CUDA device",
                seen={"device": device},
                do="move it there first; if it is offloaded between runs, call cw.compile(): that needs no fixed place",
            )
        self.compiled = compiled
        self.unseen_hooks = compiled is not None  # as they are, passes have them among the contents
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        self._on_devices: dict[Hashable, bool] = {}
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._moves, self._passes, self._refused = 0, 0, False
        self._counters = Weights(engine.unet)
        self._state: Hashable = None
        self._contents: _Contents | None = None
        self._places: list[int] = []
        self._storages: list[Any] = []
        self._freed: list[Any] = []
        self._watched = False

    def forget(self, signature: Hashable = None) -> None:
        """Passes are other ones from now on: what was captured is let go; of one signature, if its key is passed."""
        super().forget(signature)
        if self.compiled is not None:
            self.compiled.forget(signature)
        self._wait()
        let_go(self._graphs, signature)
        self._on_devices.clear()

    def ready(self, call: UNetCall, pass_: Pass) -> bool:
        """Is this pass one that a graph can stand for?"""
        return super().ready(call, pass_) and (self.compiled is not None or self._can_capture(call))

    def _can_capture(self, call: UNetCall) -> bool:
        if self._moves > _MOVES or self._refused:
            return False
        if torch.is_grad_enabled():
            if self.compiled is None:
                _warn("a captured pass has no gradients: it runs as it is; call the UNet under torch.no_grad()")
            return False
        if call.key not in self._on_devices:  # the key says on which
            devices = {tensor.device.type for tensor in tensors(call.arguments.values)}
            self._on_devices[call.key] = devices <= {"cuda", "cpu"}
        return self._on_devices[call.key]

    def launch(
        self, call: UNetCall, pass_: Pass, args: tuple[Any, ...], kwargs: dict[str, Any], cached: Cached
    ) -> Outcome:
        """Replay the pass, captured first if need be."""
        if self.compiled is not None and not self._can_capture(call):
            return self._uncaptured(call, pass_, args, kwargs, cached)
        inputs = flat((args, kwargs, cached))
        values = [leaf for leaf in inputs if isinstance(leaf, torch.Tensor)]
        constants = tuple(leaf for leaf in inputs if not isinstance(leaf, torch.Tensor))
        with self._lock:
            self._passes += 1
            gone = bool(self._freed) if self._watched else self._moved_away()
            if gone:
                self._look()  # before any replay: what it would read may be gone
            self._follow()
            key = (call.key, pass_.plan.index, pass_.kind, frozenset(pass_.copies), *map(_constant, constants))
            graph = self._graphs.get(key)
            outcome = graph.replay(values, call, cached[0]) if graph is not None and not graph.writes else None
            before, self._state = self._state, self._counters.state()
            anew = (self._state != before and not gone) or (call.place is not None and call.place.step == 1)
            if (anew or self._moved_away()) and self._look():
                graph = outcome = None
            if outcome is not None:
                return outcome
            if graph is None:
                return self._capture_and_replay(key, call, pass_, args, kwargs, cached)
            return graph.replay(values, call, cached[0])

    def _capture_and_replay(
        self,
        key: tuple[Any, ...],
        call: UNetCall,
        pass_: Pass,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cached: Cached,
    ) -> Outcome:
        if len(self._graphs) >= _GRAPHS:
            _warn(f"more than {_GRAPHS} constants and shapes: passes with others run uncaptured; pass tensors")
            return self._uncaptured(call, pass_, args, kwargs, cached)
        self.begin()
        try:
            graph = self._graphs[key] = self._capture(call, pass_, args, kwargs, cached)
        except Unproved as error:
            return self.run_as_it_is(call, pass_, error)
        except _Refused as refused:
            why = str(refused.__cause__).strip().split("\n", 1)[0]
            if self.compiled is None:
                raise CompileError(
                    "a captured pass must not wait for the device or read values on it",
                    seen={"pass": pass_.kind, "error": why},
                    do="call cw.compile(), or leave the wrapper as it is",
                ) from refused.__cause__
            self._refused = True
            _warn(f"what is compiled cannot be captured, and runs without CUDA graphs: {why}")
            return self._uncaptured(call, pass_, args, kwargs, cached)
        values = [leaf for leaf in flat((args, kwargs, cached)) if isinstance(leaf, torch.Tensor)]
        return graph.replay(values, call, cached[0])

    def _uncaptured(
        self, call: UNetCall, pass_: Pass, args: tuple[Any, ...], kwargs: dict[str, Any], cached: Cached
    ) -> Outcome:
        if self.compiled is not None:
            return self.compiled.launch(call, pass_, args, kwargs, cached)
        return self.engine.execute(call, pass_, None, eager=True)

    def _capture(
        self,
        call: UNetCall,
        wanted: Pass,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cached: Cached,
    ) -> _Graph:
        device = next(tensor.device for tensor in self._weights)
        buffers: list[_Buffer] = []

        def buffer(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            with torch.inference_mode(False):  # so that writes to it are counted
                buffers.append(_Buffer(leaf.detach().to(device, copy=True)))
            return buffers[-1].memory

        args, kwargs, cached = map_leaves(buffer, (args, kwargs, cached))
        unwritten = [version(one.memory) for one in buffers]
        own = [] if self._contents is None else self._contents.buffers
        before = [(tensor, version(tensor), tensor.clone()) for tensor in own]
        cache = torch.is_autocast_cache_enabled()
        if self.compiled is None:  # where they are compiled, they are in it, and a guard asks for the same state
            torch.set_autocast_cache_enabled(False)  # casts of weights belong into the graph
        graph = torch.cuda.CUDAGraph()
        try:
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(2):  # libraries choose algorithms and make workspaces on first use
                    self._pass(call, wanted, args, kwargs, cached)
            torch.cuda.current_stream(device).wait_stream(side)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            try:
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    outcome = self._pass(call, wanted, args, kwargs, cached)
            except (RuntimeError, NotImplementedError) as error:  # what has just run twice: the capture is what is new
                call.inside = False
                raise _Refused from error
        finally:
            torch.set_autocast_cache_enabled(cache)
            changed = [(one, value) for one, written, value in before if version(one) != written or written < 0]
            for tensor, value in changed:
                with torch.inference_mode(tensor.is_inference()):
                    tensor.copy_(value)
        for one, count in zip(buffers, unwritten, strict=True):
            one.returns = version(one.memory) != count
        constants = [leaf for leaf in flat((args, kwargs, cached)) if not isinstance(leaf, torch.Tensor)]
        writes = bool(changed) or any(one.returns for one in buffers)
        return _Graph(graph, buffers, cached[0], outcome, constants, writes=writes)

    def _pass(self, call: UNetCall, wanted: Pass, args: Any, kwargs: Any, cached: Cached) -> Outcome:
        """Run a pass like the wanted one on other inputs."""
        if self.compiled is not None:
            return outcome_of(wanted, *self.compiled.results(call, wanted, args, kwargs, cached))
        engine, adaptor, (exit, given) = self.engine, self.engine.chain[wanted.plan.index].adaptor, cached
        adapt = None
        branch: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if exit is not None and given is not None:
            branch = beside(exit.device)

            def adapt(captured: Mapping[str, torch.Tensor]) -> Any:
                return stand_in.call(adaptor, stand_in.inputs(captured, exit, *given))

        pass_ = wanted.like(adapt)
        pass_.enter(args, kwargs)
        engine.active.pass_ = pass_
        try:
            call.inside = True
            with branch, pass_.taint:
                output = call.forward(*args, **kwargs)
            call.inside = False
            outcome = pass_.outcome(output)
            outcome.used = pass_.taint.reaches((outcome.output, outcome.exits, outcome.captured, outcome.entry))
            return outcome
        finally:
            engine.active.pass_ = None

    def _follow(self) -> None:
        """Buffers are shared: a stream waits for the one that used them before."""
        stream = torch.cuda.current_stream(self._weights[0].device)
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def _look(self) -> bool:
        """Drop the graphs if weights have moved or anything about the modules is another: were there any?

        Raises:
            Exchanged: modules themselves are others than the recorded.
        """
        adaptors = [clocked.adaptor for clocked in self.engine.chain]
        contents = self._contents
        if contents is None or not contents.hold(adaptors):
            contents = _Contents(self.engine.unet, adaptors)
            if not (self.engine.intact and self.holds()):
                raise Exchanged
        places = [tensor.data_ptr() for tensor in contents.weights]
        same = contents is self._contents and places == self._places
        dropped = not same and bool(self._graphs)
        if dropped:
            self._wait()
            self._graphs.clear()
            self._pool = None
            self._moves = 0 if self._passes >= _PAYS else self._moves + 1
            self._passes = 0
            if self._moves > _MOVES:
                _warn(
                    "weights move between calls (offloading?), or what the UNet holds changes: a captured pass cannot "
                    "follow, passes run uncaptured"
                )
        self._contents, self._places = contents, places
        if not (same and self._watched) or self._freed:
            self._watch()
        return dropped

    def _wait(self) -> None:
        """Graphs are about to go: one may be running, on the memory of what it was made from."""
        if self._graphs:
            torch.cuda.current_stream(self._weights[0].device).synchronize()

    @property
    def _weights(self) -> list[torch.Tensor]:
        return [] if self._contents is None else self._contents.weights

    def _moved_away(self) -> bool:
        """Are weights somewhere else than when modules were last looked at?"""
        return not self._weights or [tensor.data_ptr() for tensor in self._weights] != self._places

    def _watch(self) -> None:
        """Be told when a weight's storage is freed, by a weak reference that lives as long as the memory does."""
        freed: list[Any] = []
        self._freed = freed
        try:
            self._storages = [weakref.ref(tensor.untyped_storage(), freed.append) for tensor in self._weights]
        except (NotImplementedError, RuntimeError):  # a tensor without a storage of its own: places tell
            self._storages = []
        self._watched = bool(self._storages) and not freed


class _Contents:
    """Whatever the Python of the UNet and the adaptors could decide by, at one moment: attributes, and all within them.

    Once that was listed, only what holds something is compared with what it holds now: where all is the very same, what
    lies deeper is, too. Of SD v1.5's 709 modules that takes 0.9 ms, and listing it again 6.3 (process time on a CPU).

    Attributes:
        weights: parameters, buffers, and the tensors that other attributes hold.
        buffers: these without the parameters.
    """

    def __init__(self, unet: nn.Module, adaptors: Sequence[Any]) -> None:
        roots = [unet, *(adaptor for adaptor in adaptors if isinstance(adaptor, nn.Module))]
        others = (one for one in adaptors if not isinstance(one, nn.Module))
        self._adaptors = adaptors
        self._modules = [module for root in roots for module in root.modules()]
        self._owners = [*self._modules, *(one for one in others if isinstance(attribute(one, "__dict__"), dict))]
        bases = (base for cls in dict.fromkeys(map(type, self._owners)) for base in cls.__mro__)
        self._classes = [base for base in dict.fromkeys(bases) if base not in nn.Module.__mro__]
        self._attributes = self._now()
        held = _Held(self._attributes, besides=self._modules)
        self._dicts, self._lists, self._slots = held.dicts, held.lists, held.slots
        self._parts = self._inside()
        parameters = [tensor for root in roots for tensor in root.parameters()]
        known = {*map(id, parameters)}
        buffers = {id(tensor): tensor for root in roots for tensor in root.buffers()}
        device = next((tensor.device for tensor in (*parameters, *buffers.values())), None)
        free = {id(one): one for one in held.tensors if one.device == device and id(one) not in known}
        self.buffers = [*(buffers | free).values()]
        self.weights = parameters + self.buffers

    def hold(self, adaptors: Sequence[Any]) -> bool:
        """Is all of it, and are the adaptors, the same as then?"""
        return (
            _same(self._adaptors, adaptors)
            and _same(self._attributes, self._now())
            and _same(self._parts, self._inside())
        )

    def _now(self) -> list[Any]:
        attributes = itertools.chain.from_iterable(vars(owner).values() for owner in (*self._owners, *self._classes))
        return [*map(type, self._owners), *attributes]

    def _inside(self) -> list[Any]:
        return [
            *itertools.chain.from_iterable(map(dict.values, self._dicts)),
            *itertools.chain.from_iterable(self._lists),
            *(_in_slot(*one) for one in self._slots),
        ]


class _Held:
    """What lies within some values, however deep: in containers, and in objects that are no functions and not ours.

    Attributes:
        dicts, lists: whatever can come to hold something else; of an object its attributes.
        slots: (object, slot) of those that have some.
        tensors: plain ones.
    """

    def __init__(self, values: Sequence[Any], *, besides: Sequence[Any]) -> None:
        self.dicts: list[dict[Any, Any]] = []
        self.lists: list[Any] = []
        self.slots: list[tuple[Any, Any]] = []
        self.tensors: list[torch.Tensor] = []
        seen, self._rest = {id(one): one for one in besides}, [*values]
        while self._rest:
            value = self._rest.pop()
            if type(value) not in _PLAIN and id(value) not in seen:
                seen[id(value)] = value
                self._open(value, type(value))

    def _open(self, value: Any, kind: Any) -> None:
        if kind is dict or kind is OrderedDict:  # nearly always
            self.dicts.append(value)
            self._rest += value.values()
        elif issubclass(kind, torch.Tensor):
            if kind is torch.Tensor and value.layout is torch.strided:
                self.tensors.append(value)
        elif issubclass(kind, (list, set, deque, tuple)):
            self._rest += value
            if kind is not tuple:  # the same tuple holds the same
                self.lists.append(value)
        elif not issubclass(kind, _CLOSED) and not kind.__module__.startswith("clockwork_hooks."):
            tables = [value] if issubclass(kind, dict) else []
            own = attribute(value, "__dict__")  # `__dictoffset__` does not tell: TypeVar's is not 0 in Python 3.12
            tables += [own] if isinstance(own, dict) else []
            slots = [(value, one) for one in _slots(kind)]
            self.dicts += tables
            self.slots += slots
            self._rest += [*itertools.chain.from_iterable(map(dict.values, tables)), *(_in_slot(*one) for one in slots)]


@functools.lru_cache(maxsize=1024)
def _slots(kind: Any) -> list[Any]:
    return [one for base in kind.__mro__ for one in vars(base).values() if type(one) is types.MemberDescriptorType]


def _in_slot(value: Any, slot: Any) -> Any:
    try:
        return slot.__get__(value)
    except AttributeError:  # nothing
        return None


_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None)})
# there is one of each, it is known by who it is, or (a logger) nobody computes by it
_CLOSED: tuple[type, ...] = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType)
_CLOSED += (enum.Enum, logging.Logger)


def _same(before: Sequence[Any], now: Sequence[Any]) -> bool:
    """Are these the very same things, or plain values that are equal?"""
    return len(before) == len(now) and (
        all(map(operator.is_, before, now)) or all(map(_alike, before, now))  # nearly always the first: no call each
    )


def _alike(before: Any, now: Any) -> bool:
    if before is now or type(before) is not type(now):
        return before is now
    if type(before) is tuple:
        return _same(before, now)
    return type(before) in _PLAIN and repr(before) == repr(now)  # 0.0 equals -0.0, and is another one


def _constant(value: Any, depth: int = 0) -> Hashable:
    """What tells a constant: plain ones their value, objects who they are and what they hold."""
    if isinstance(value, torch.Tensor):  # held by an object, it is no input: the graph reads it where it lies
        return value.data_ptr(), value.shape, value.stride(), value.dtype
    if isinstance(value, (bool, int, float, str, type(None))):
        return type(value), value
    held = vars(value) if depth < _DEEPEST and attribute(value, "__dict__") is not None and not callable(value) else {}
    return id(value), *((path, _constant(leaf, depth + 1)) for path, leaf in leaves(held))


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _warn(text: str) -> None:
    warn(text, NoEffectWarning)
