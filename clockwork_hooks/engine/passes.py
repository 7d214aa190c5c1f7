"""One pass of the UNet: which module calls it skips, what it picks up at the boundary, what stands for the exit.

A UNet may write to its sample, pop from a list, fill in a dict, count its calls, draw noise. An adaptor pass that has
to be run again in full must not see that (`Before`): containers get their contents back, tensors that were written to
their values, where we have a copy, and torch's generators draw the same numbers again.
"""

from __future__ import annotations

import functools
import math
import random
import threading
import types
from collections import deque
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from clockwork_hooks._tree import address, attribute, copied, flat, is_changeable, leaf_at, map_leaves, refill, version
from clockwork_hooks.clock.loops import saved_for_again
from clockwork_hooks.engine.taint import Reads, Taint, Tainted, refuse
from clockwork_hooks.regions.cut import CutPlan, PassKind, Same, Slot, Wanted, fits

Emit = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


class Emitted(NamedTuple):
    """What a region emitted in a pass.

    Attributes:
        exit: its true exit, or the adaptor's output, as it was when it left the region.
        version: the tensor's counter of in-place writes then.
    """

    exit: torch.Tensor
    version: int

    @property
    def untouched(self) -> bool:
        """Is it still as it was emitted? What the trace does not know may write to it: a user's hook, FreeU."""
        return version(self.exit) == self.version


@dataclass(slots=True)
class Outcome:
    """What a pass has led to.

    Attributes:
        output: what the UNet returned.
        kind: what the pass was in the end.
        exits: region → what it emitted, until it is kept; a region inside the skipped one emits nothing.
        written: regions whose exit was written to after it left the region.
        complete: did every patched module get exactly the calls of the trace, and every exit come?
        entry: a copy of what flowed into the region, where it is kept.
        captured: boundary tensors by name, where they were picked up.
        watched: did patched modules ask a pass? Else nothing but the output is known.
        macs: multiply-accumulates that ran.
        reason: why the pass was full; None for an adaptor pass.
        skipped: the name of the region that an adaptor pass skipped, where there are several.
        blanks: did any skipped call return what stands in for its output?
        used: was anything of that used: read, written somewhere, left for the next call, or returned?
        repeated: will a backward pass run skipped calls again, in the middle of others, as checkpoints do?
        reached: was any patched module called?
    """

    output: Any
    kind: PassKind = "full"
    exits: dict[int, Emitted] = field(default_factory=dict)
    written: frozenset[int] = frozenset()
    complete: bool = False
    entry: torch.Tensor | None = None
    captured: Mapping[str, torch.Tensor] = field(default_factory=dict)
    watched: bool = True
    macs: int = 0
    reason: str | None = None
    skipped: str = ""
    blanks: bool = True
    used: bool = False
    repeated: bool = False
    reached: bool = True


class Exchanged(Exception):
    """The UNet's modules are others than the recorded: a static pass does not stand for what they do."""


class Pass:
    """One pass while it runs; patched modules ask it what to do.

    Args:
        plan: what is skipped and captured.
        kind: "full" or "adaptor".
        emit: makes the exit of an adaptor pass from the captured boundary tensors.
        copies: regions whose exit is kept as a copy: code that the trace does not know writes to it.
        looks: boundary tensors are picked up.
        keeps_entry: a copy of the entry is kept, for the next steps.
        judge: looks at the entry when the region begins, None if it has not come; a reason makes the pass full.
        proves: of a full pass: see whether skipped calls return what stands in for them; else it is not complete.
        shared: what skipped calls return in all passes of a plan that one has proved; None before.
        taint: follows what stands in for skipped outputs: nothing may come of it.
        reads: sees whether the UNet reads the exit that it is given; None where that is known.

    Attributes:
        captured: boundary tensors by name, once they have been seen.
        exits: region → what it emitted.
        entry: the entry's copy.
        reason: what `judge` said.
        blanks: has any skipped call returned what stands in for its output?
        adapting: does the adaptor run just now?
    """

    def __init__(
        self,
        plan: CutPlan,
        kind: PassKind,
        emit: Emit | None = None,
        *,
        copies: Collection[int] = (),
        looks: bool = True,
        keeps_entry: bool = False,
        judge: Callable[[torch.Tensor | None], str | None] | None = None,
        proves: bool = False,
        shared: dict[tuple[str, int], Any] | None = None,
        taint: Taint | None = None,
        reads: Reads | None = None,
    ) -> None:
        self.reads = reads
        self._proves, self._differs, self.taint = proves, False, taint or Taint()
        self.plan, self.kind, self.copies, self.looks, self.keeps_entry = plan, kind, copies, looks, keeps_entry
        self.captured: dict[str, torch.Tensor] = {}
        self.exits: dict[int, Emitted] = {}
        self.entry: torch.Tensor | None = None
        self.reason: str | None = None
        self.blanks = self.adapting = False
        self._emit, self._judge, self._shared = emit, judge, shared
        self._gradients = emit is not None and torch.is_grad_enabled()
        self._saved: list[Sequence[object]] = []
        self._somebody: Callable[[], None] | None = None
        self._outside = keeps_entry or judge is not None  # the region is yet to begin, and somebody waits for it
        self._moves = plan.moves(kind, looks=looks or proves)
        self._counts: dict[str, int] = {}
        self._observed: dict[tuple[str, str], int] = {}

    def like(self, emit: Emit | None, *, traced: bool = False) -> Pass:
        """A pass that does the same, with another `emit`; `traced`: torch.compile will trace it."""
        return (TracedPass if traced else Pass)(
            self.plan,
            self.kind,
            emit,
            copies=self.copies,
            looks=self.looks,
            keeps_entry=self.keeps_entry,
            taint=None if traced else self.taint.like(),  # what is traced has no placeholders
        )

    def proves_for(self, somebody: Callable[[], None]) -> None:
        """Have somebody called once this pass has shown that nothing of what it skips is used, nor kept."""
        self._somebody, self._shared = somebody, None  # of what other passes share nobody can tell who keeps it

    def proved(self) -> None:
        """It has."""
        if self._somebody is not None:
            self._somebody()

    @property
    def exit(self) -> torch.Tensor | None:
        """What this pass's own region emitted."""
        emitted = self.exits.get(self.plan.index)
        return None if emitted is None else emitted.exit

    @property
    def open(self) -> bool:
        """Does what the region is given decide, in the middle of the pass, whether the adaptor stands in?"""
        return self._judge is not None

    @property
    def others(self) -> dict[str, torch.Tensor]:
        """The entries of other regions, by the names of their ports."""
        return {name: tensor for name, tensor in self.captured.items() if name.startswith("entry ")}

    def enter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The pass begins: pick up what is taken from the UNet's own arguments."""
        move = self._moves.calls.get(("", 0))
        if move is not None and move.takes:
            self._pick(move.takes, (args, kwargs))

    def call(self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A patched module is called: skip or run it."""
        k = self._counts.get(path, 0)
        self._counts[path] = k + 1
        move = self._moves.calls.get((path, k))
        if move is None:
            return forward(*args, **kwargs)
        if move.takes:
            self._pick(move.takes, (args, kwargs))
        if move.skipped is not None:
            if self._outside:
                self._begin_region()
            if self.kind == "adaptor":
                self.blanks = True
                if self._gradients:
                    self._saved.append(saved_for_again(exits=bool(move.exits)))
                if move.skipped.same is None:
                    return self._stand_in(path, k, move.skipped.output)
                return self._stand_in_same(move.skipped.same, move.skipped.output, args, kwargs)
        output = forward(*args, **kwargs)
        if self._proves and move.skipped is not None:
            self._differs = self._differs or not fits(output, move.skipped.output)
        if move.gives:
            self._pick(move.gives, output)
        for at in move.exits:
            exit = output if isinstance(output, torch.Tensor) else leaf_at(output, at.leaf)
            if isinstance(exit, torch.Tensor):
                self._keep(at.region, exit.clone() if at.written or at.region in self.copies else exit)
        return output

    def skips(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Will the call of a patched module that begins now be skipped, so that its hooks are not called either?

        Not where it returns the exit: what hooks make of that belongs to what the adaptor stands in for.
        """
        if self.kind != "adaptor":
            return False
        move = self._moves.calls.get((path, self._counts.get(path, 0)))
        if move is None or move.skipped is None or move.exits:
            return False
        if self._outside:
            if move.takes:
                self._pick(move.takes, (args, kwargs))
            self._begin_region()
        return self.kind == "adaptor"

    def observe(self, path: str, side: Literal["input", "output"], value: Any) -> None:
        """A native hook saw a module's input or output."""
        k = self._observed.get((path, side), 0)
        self._observed[path, side] = k + 1
        move = self._moves.calls.get((path, k))
        if move is not None:
            self._pick(move.takes if side == "input" else move.gives, value)

    def outcome(self, output: Any) -> Outcome:
        """What the pass has led to, now that the UNet has returned."""
        written = frozenset(region for region, emitted in self.exits.items() if not emitted.untouched)
        if self.taint.follows:
            self._leave()
        return Outcome(
            self.taint.real(output),
            self.kind,
            self.exits,
            written,
            self.complete(),
            self.entry,
            self.captured,
            reason=self.reason,
            blanks=self.blanks,
            repeated=any(self._saved),
            reached=bool(self._counts),
        )

    def _leave(self) -> None:
        """Nothing that is kept is followed any more."""
        self.captured, self.entry = self.taint.real((self.captured, self.entry))
        for region, emitted in self.exits.items():
            exit = self.taint.real(emitted.exit)
            if exit is not emitted.exit:
                self._keep(region, exit)

    def complete(self) -> bool:
        """Did every patched module get exactly the calls of the trace, and every exit come?"""
        if self._differs or len(self.exits) != len(self._moves.exits):
            return False
        if self._counts == self._moves.counts:
            return True
        return {path: count for path, count in self._counts.items() if path in self.plan.counts} == self._moves.counts

    def _begin_region(self) -> None:
        """The first skipped call has come: up to here full and adaptor passes run the same modules."""
        self._outside = False
        entry = self.captured.get("entry")
        if self._judge is not None and self.kind == "adaptor":
            self.reason = self._judge(entry)
            if self.reason is not None:
                self.kind, self._moves = "full", self.plan.moves("full", looks=self.looks)
        if self.keeps_entry and entry is not None:
            self.entry = copied(entry)  # code that still runs may write to the tensor itself

    def _pick(self, wanted: Wanted, value: Any) -> None:
        values = flat(value)
        for name, leaf in wanted:  # another region's entry is kept for the next steps, as `entry` is
            if leaf >= len(values):
                self._differs = True
                continue
            self.captured[name] = copied(values[leaf]) if name.startswith("entry ") else values[leaf]

    def _stand_in(self, path: str, k: int, output: Any) -> Any:
        """What a skipped call returns."""
        shared = None if self._shared is None else self._shared.get((path, k))
        if shared is not None:  # making them anew takes 4 to 7 µs each, 0.1 ms a pass of SD v1.5
            return shared
        if self._shared is None or not _constant(output):
            return map_leaves(self._fill, output)
        shared = self._shared[path, k] = map_leaves(_shared, output)
        return shared

    def _stand_in_same(self, same: int, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a skipped call returns that returns one of its arguments: that, with what stands in put into it."""
        values = (*args, *kwargs.values())
        if same >= len(values) or not is_changeable(values[same]):
            self._differs = True
            return map_leaves(self._fill, output)
        given = flat((args, kwargs))

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, Same):
                return given[leaf.leaf] if leaf.leaf < len(given) else None
            return self._fill(leaf)

        refill(values[same], map_leaves(fill, output))
        return values[same]

    def _fill(self, leaf: Any) -> Any:
        if not isinstance(leaf, Slot):
            return leaf
        if leaf.exit and self._emit is not None:
            if self.taint.used or (self.captured and self.taint.reaches(self.captured)):
                refuse()
            self.adapting = True
            with self.taint.aside():
                exit = self._emit(self.taint.real(self.captured))
                own = leaf.written or self.plan.index in self.copies or self.reads is not None
                given = exit.clone() if own else exit
            self.adapting = False
            if self.reads is not None:
                self.reads.wait_for(given)
            self._keep(self.plan.index, exit)
            return given
        return self.taint.on(placeholder(leaf))

    def _keep(self, region: int, exit: torch.Tensor) -> None:
        self.exits[region] = Emitted(exit, version(exit))


class TracedPass(Pass):
    """A pass that torch.compile traces: what it decides is decided once, and it keeps copies of true exits.

    Copies, because a graph that writes to an exit later on would return it written to.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gradients = False  # a checkpoint in a graph runs again what is in the graph

    def _fill(self, leaf: Any) -> Any:
        if isinstance(leaf, Slot) and not (leaf.exit and self._emit is not None):
            own = leaf.shape if leaf.written else ()  # not every backend turns writes into copies
            return torch.zeros(own, dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)  # compiled away
        return super()._fill(leaf)

    def _keep(self, region: int, exit: torch.Tensor) -> None:
        adapted = self.kind == "adaptor" and region == self.plan.index
        self.exits[region] = Emitted(exit if adapted else exit.clone(), 0)


# -- what stands in the place of a skipped output -----------------------------------------------------------------


def placeholder(slot: Slot) -> torch.Tensor:
    """A tensor of the slot's shape that nobody may look into; it has no memory of its own where that is safe."""
    if slot.written:
        return torch.zeros(slot.shape, dtype=slot.dtype, device=slot.device)
    return _zero(slot.dtype, slot.device).expand(slot.shape)


def _shared(leaf: Any) -> Any:
    return Tainted(placeholder(leaf)) if isinstance(leaf, Slot) else leaf


def _constant(output: Any) -> bool:
    """May one such output serve all passes? Nobody can change a tuple, nor write to an expanded zero."""
    if isinstance(output, Slot):
        return not (output.exit or output.written)
    return output is None or (type(output) is tuple and all(map(_constant, output)))


@functools.lru_cache(maxsize=64)
def _zero(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype, device=device)


# -- which pass runs in this thread? ------------------------------------------------------------------------------


class Active(threading.local):
    """The pass that a wrapper is running, in each thread its own."""

    pass_: Pass | None = None


class Added:
    """What Clockwork puts among a module's attributes: only `remove()` takes it off, and nothing puts it back."""

    __slots__ = ()


class Owner(Protocol):
    """What patched modules ask: an engine.

    Attributes:
        active: the pass that it runs in this thread.
        tracing: the pass that torch.compile is tracing for it; outside of tracing there is none.
    """

    active: Active
    tracing: Pass | None


_PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)
_OPAQUE = (nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_DEEPEST = 6
_MODULE = frozenset(vars(nn.Module())) - {"training"}


class Before:
    """The arguments of one call, before it runs.

    Args:
        args, kwargs: of the call.
        written: places of tensors, in the order of `tensors`, that calls of this kind write to: copies are made.
        size: number of elements up to which tensors are copied that keep no count of writes; and all others, if
            `unsure`.
        always: a tensor that is copied whatever is known: the sample, which is what is written to most.
        objects: look into objects of any class, and at tensors of any kind, too.
        unet: what its modules hold beside their parameters is restored too.

    Attributes:
        tensors: those among the arguments, in a fixed order.
        versions: how often each of these tensors was written to.
        marks: which objects these arguments are and hold.
    """

    def __init__(
        self,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] = types.MappingProxyType({}),
        *,
        written: Collection[int] = (),
        size: float = 0,
        unsure: bool = False,
        always: Any = None,
        objects: bool = True,
        unet: nn.Module | None = None,
    ) -> None:
        self._own = None if unet is None else _Own(unet)
        self._objects = objects
        self.tensors: list[torch.Tensor] = []
        self._contents: list[Callable[[], None]] = []
        self.marks: list[int] = []
        self._generators: list[torch.Generator] = [torch.default_generator]
        for value in (*args, *kwargs.values()):
            self._look(value, 0)
        devices = {tensor.get_device() for tensor in self.tensors if tensor.is_cuda}
        self._generators += [torch.cuda.default_generators[index] for index in sorted(devices)]
        self._random = [(generator, _state(generator)) for generator in self._generators]
        self.versions = [version(tensor) for tensor in self.tensors]
        self._copies: dict[int, torch.Tensor] = {}
        for k, tensor in enumerate(self.tensors):
            small = (unsure or self.versions[k] < 0) and tensor.numel() <= size
            if tensor is always or small or k in written:
                self._copies[k] = copied(tensor)

    @property
    def written(self) -> set[int]:
        """Places of tensors that were written to since; of those that keep no count, none."""
        pairs = zip(self.tensors, self.versions, strict=True)
        return {k for k, (tensor, then) in enumerate(pairs) if version(tensor) != then}

    @property
    def changed(self) -> bool:
        """Do the UNet's modules hold anything else than before?"""
        return self._own is not None and self._own.changed

    def restore(self) -> bool:
        """Make all of it what it was; False if a tensor was written to of which there is no copy."""
        written = self.written
        if not written <= self._copies.keys():
            return False
        with torch.no_grad():
            for k, copy in self._copies.items():
                if k in written or self.versions[k] < 0:
                    self.tensors[k].copy_(copy)
        for restore in self._contents:
            restore()
        for generator, state in self._random:
            if state is not None:
                generator.set_state(state)
        if self._own is not None:
            self._own.restore()
        return True

    def _look(self, value: Any, depth: int) -> None:
        self.marks.append(id(value))
        if isinstance(value, torch.Tensor):
            if self._objects or (type(value) is torch.Tensor and value.layout == torch.strided):
                self.tensors.append(value)
            return
        if isinstance(value, torch.Generator):
            self._generators.append(value)
            return
        if isinstance(value, (*_PLAIN, *_OPAQUE)) or depth > _DEEPEST:
            return
        if isinstance(value, tuple):
            inner: Any = value
        elif isinstance(value, (list, deque)):
            inner = list(value)
            self._contents.append(lambda: _refill(value, inner))
        elif isinstance(value, MutableMapping):
            entries = dict(value)
            self._contents.append(lambda: _reset(value, entries))
            inner = entries.values()
        elif isinstance(value, set):
            members = set(value)
            self.marks += sorted(map(id, members))
            self._contents.append(lambda: refill(value, members))
            return
        elif isinstance(value, Mapping):
            inner = list(value.values())
        elif self._objects and (own := attribute(value, "__dict__")) is not None:
            attributes = dict(own)
            self._contents.append(lambda: _reset(own, attributes))
            inner = attributes.values()
        else:
            return
        for item in inner:
            self._look(item, depth + 1)


class _Own:
    """What a UNet's modules hold beside their parameters, before a pass: attributes, lists and dictionaries, buffers.

    Also the variables of functions among the attributes, and where Python's and NumPy's global generators are.

    Args:
        unet: the UNet.
    """

    def __init__(self, unet: nn.Module) -> None:
        self._random, self._numpy = random.getstate(), np.random.get_state()
        self._modules = [
            (vars(module), {name: value for name, value in vars(module).items() if name not in _MODULE})
            for module in unet.modules()
        ]
        values = [value for _, attributes in self._modules for value in attributes.values()]
        cells = [cell for value in values for cell in attribute(value, "__closure__") or ()]
        self._cells = [(cell, cell.cell_contents) for cell in cells if cell != types.CellType()]
        values += [module._buffers for module in unet.modules()] + [value for _, value in self._cells]
        self._before = Before(tuple(values), size=math.inf, unsure=True, objects=False)
        self._memory = [(tensor, tensor.data) for tensor in self._before.tensors]
        self._unet = unet
        storages = [address(tensor.untyped_storage()) for tensor in self._before.tensors]
        names = [(id(attributes), *attributes) for attributes, _ in self._modules]
        self._marks = (names, self._before.marks, self._before.versions, storages)

    @property
    def changed(self) -> bool:
        """Is anything of it another one now, or was anything written to?"""
        return _Own(self._unet)._marks != self._marks

    def restore(self) -> None:
        """Make it what it was."""
        for now, before in self._modules:
            for name in (now.keys() | before.keys()) - _MODULE:
                if isinstance(before.get(name), Added) or isinstance(now.get(name), Added):
                    continue  # the pass may have called `remove()`
                if name in before:
                    now[name] = before[name]
                else:
                    del now[name]
        random.setstate(self._random)
        np.random.set_state(self._numpy)
        for cell, value in self._cells:
            cell.cell_contents = value
        for tensor, memory in self._memory:
            if address(tensor.untyped_storage()) != address(memory.untyped_storage()):
                tensor.data = memory
        self._before.restore()


def _state(generator: torch.Generator) -> torch.Tensor | None:
    """Where a generator is; None within the capture of a CUDA graph, which asks for none."""
    try:
        return generator.get_state()
    except RuntimeError:
        return None


def _refill(value: Any, contents: list[Any]) -> None:
    if len(value) != len(contents) or any(one is not then for one, then in zip(value, contents, strict=True)):
        refill(value, contents)


def _reset(value: MutableMapping[Any, Any], entries: Mapping[Any, Any]) -> None:
    if value.keys() != entries.keys() or any(value[key] is not entries[key] for key in entries):
        refill(value, entries)
