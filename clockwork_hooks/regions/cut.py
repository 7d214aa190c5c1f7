"""What a pass skips, what it picks up at the boundary, and where its exit is: found once, looked up at every call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import torch

from clockwork_hooks._tree import Leaf, flat, leaves

PassKind = Literal["full", "adaptor"]


@dataclass(frozen=True, slots=True)
class Slot(Leaf):
    """What stands in for one tensor of a skipped call's output.

    Attributes:
        shape, dtype, device: as in the trace.
        exit: this is the region's exit: the adaptor's output comes here.
        written: code that still runs writes to it in place, so it needs memory of its own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    exit: bool = False
    written: bool = False


@dataclass(frozen=True, slots=True)
class Same(Leaf):
    """Stands for a tensor that a call has found in its arguments, and left there.

    Attributes:
        leaf: which leaf of (args, kwargs) it is.
    """

    leaf: int


@dataclass(frozen=True, slots=True)
class SkippedCall:
    """One module call that an adaptor pass does not run.

    Attributes:
        path: dotted path of the module.
        ordinal: which of the module's calls in a full pass, from 0.
        visible: which of the module's calls in an adaptor pass, where calls inside skipped ones do not happen.
        output: what the call returns, with a `Slot` for each tensor.
        same: which of its arguments the call returns, with these contents; None where it returns something new.
    """

    path: str
    ordinal: int
    visible: int
    output: Any = field(repr=False, compare=False)
    same: int | None = None

    @property
    def exit(self) -> tuple[int, Slot | None]:
        """Which leaf of the output is the exit, and its slot; (-1, None) if none is."""
        outputs = enumerate(flat(self.output))
        return next(((k, leaf) for k, leaf in outputs if isinstance(leaf, Slot) and leaf.exit), (-1, None))


@dataclass(frozen=True, slots=True)
class Port:
    """Where a boundary tensor can be picked up: the k-th leaf of what a module call takes or returns.

    Attributes:
        path: dotted path of the module; "" for the UNet itself, whose arguments `Pass.enter` is given.
        ordinal, visible: which of its calls, as in `SkippedCall`.
        side: what it takes, or what it returns.
        leaf: which of the leaves.
        shape, dtype: of the tensor, as traced.
    """

    path: str
    ordinal: int
    visible: int
    side: Literal["input", "output"]
    leaf: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def fits(output: Any, expected: Any) -> bool:
    """Does what a call returned look like what stands for it: the same parts, of the same shapes and dtypes?"""
    parts, slots = list(leaves(output)), list(leaves(expected))
    paths_agree = [path for path, _ in parts] == [path for path, _ in slots]
    return paths_agree and all(_fits(part, slot) for (_, part), (_, slot) in zip(parts, slots, strict=True))


def _fits(part: Any, slot: Any) -> bool:
    if isinstance(slot, Same):
        return isinstance(part, torch.Tensor)
    if not isinstance(slot, Slot):
        return type(part) is type(slot) and (type(part) not in (bool, int, str) or part == slot)
    if not isinstance(part, torch.Tensor) or part.is_nested:
        return False
    return (tuple(part.shape), part.dtype, part.device) == (slot.shape, slot.dtype, slot.device)


def entry_of(index: int) -> str:
    """The name by which a pass of another region picks up the entry of this one."""
    return f"entry {index}"


@dataclass(frozen=True, slots=True)
class CutPlan:
    """Which calls are skipped, where the exit is, what is captured; for one region and one input signature.

    Attributes:
        skipped: the calls, in order; exactly one has the exit among its slots.
        ports: boundary tensors to pick up, by name; of several regions with clocks, the entries of the others that
            later steps look at too, as `entry_of(index)`.
        counts: path of each patched module → its number of calls in a full pass and in an adaptor pass.
        index: of several regions with clocks, which one this is; widest first.
        others: where the exits of the other regions appear: in a full pass all of them, in an adaptor pass those of
            the regions around this one.
    """

    skipped: tuple[SkippedCall, ...]
    ports: Mapping[str, Port]
    counts: Mapping[str, tuple[int, int]]
    index: int = 0
    others: Mapping[PassKind, Exits] = field(default_factory=dict)
    _moves: dict[tuple[PassKind, bool], Moves] = field(default_factory=dict, init=False, repr=False, compare=False)

    def data(self) -> dict[str, Any] | None:
        """The plan in JSON's own types; None where a skipped call returns something that JSON does not hold.

        One of its arguments, for example, with other contents.
        """
        if any(call.same is not None for call in self.skipped):
            return None
        ports = {name: {**_fields(port), "dtype": str(port.dtype)} for name, port in self.ports.items()}
        try:
            skipped = [{**_fields(call), "output": _written(call.output)} for call in self.skipped]
        except TypeError:
            return None
        return {"skipped": skipped, "ports": ports, "counts": {path: list(two) for path, two in self.counts.items()}}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> CutPlan:
        """The plan that `data` gave.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it gave something else.
        """
        skipped = (SkippedCall(**{**call, "output": _read(call["output"])}) for call in data["skipped"])
        ports = {
            name: Port(**{**port, "shape": tuple(port["shape"]), "dtype": dtype_of(port["dtype"])})
            for name, port in data["ports"].items()
        }
        counts = {path: (full, adaptor) for path, (full, adaptor) in data["counts"].items()}
        return cls(tuple(skipped), ports, counts)

    def moves(self, kind: PassKind, *, looks: bool) -> Moves:
        """What happens in passes of this kind; worked out on first use.

        Args:
            kind: "full" or "adaptor".
            looks: boundary tensors are picked up.
        """
        moves = self._moves.get((kind, looks))
        if moves is None:
            moves = self._moves[kind, looks] = Moves.of(self, kind, looks=looks)
        return moves


def dtype_of(text: str) -> torch.dtype:
    """The dtype that prints so.

    Raises:
        ValueError: none does.
    """
    dtype = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no dtype is called {text}")
    return dtype


def _fields(one: SkippedCall | Port) -> dict[str, Any]:
    return {each.name: getattr(one, each.name) for each in fields(one) if each.name != "same"}


def _written(value: Any) -> Any:
    """What a skipped call returns, in JSON's own types: a container is a mapping with its kind as the one key."""
    if isinstance(value, Slot):
        return {"tensor": [list(value.shape), str(value.dtype), str(value.device), value.exit, value.written]}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_written(one) for one in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _written(one) for key, one in value.items()}}
    if value is None or type(value) in (bool, int, str):
        return value
    raise TypeError(f"JSON holds no {type(value).__name__}")


def _read(value: Any) -> Any:
    """What `_written` wrote."""
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        shape, dtype, device, exit, written = held
        return Slot(tuple(shape), dtype_of(dtype), torch.device(device), exit, written)
    if kind == "dict":
        return {key: _read(one) for key, one in held.items()}
    return {"tuple": tuple, "list": list}[kind](_read(one) for one in held)


Wanted = tuple[tuple[str, int], ...]
# (path, how many calls of the module came before in this pass) → (region, its call that returns the exit)
Exits = Mapping[tuple[str, int], tuple[tuple[int, SkippedCall], ...]]


class ExitAt(NamedTuple):
    """Where a call returns an exit: of which region, as which leaf, and does code that still runs write to it?"""

    region: int
    leaf: int
    written: bool


@dataclass(slots=True)
class Move:
    """What happens at one call of a module.

    Attributes:
        takes, gives: (name, leaf) of what is picked up from its arguments, and from what it returns.
        skipped: the skipped call that it is.
        exits: the exits among what it returns.
    """

    takes: Wanted = ()
    gives: Wanted = ()
    skipped: SkippedCall | None = None
    exits: tuple[ExitAt, ...] = ()


@dataclass(frozen=True, slots=True)
class Moves:
    """A plan as passes of one kind look things up in it. A call that is not listed runs as it is.

    Attributes:
        calls: by (path, how many calls of the module came before).
        counts: how often each patched module is called; those that are not are left out.
        exits: the regions whose exits appear.
    """

    calls: Mapping[tuple[str, int], Move]
    counts: Mapping[str, int]
    exits: frozenset[int]

    @classmethod
    def of(cls, plan: CutPlan, kind: PassKind, *, looks: bool) -> Moves:
        """What happens in passes of this kind."""
        which = 1 if kind == "adaptor" else 0
        calls: dict[tuple[str, int], Move] = {}
        for name, port in plan.ports.items() if looks else ():
            move = calls.setdefault((port.path, (port.ordinal, port.visible)[which]), Move())
            if port.side == "input":
                move.takes = (*move.takes, (name, port.leaf))
            else:
                move.gives = (*move.gives, (name, port.leaf))
        for call in plan.skipped:
            at = _exit_of(plan.index, call)
            if at or kind == "adaptor" or looks:  # else it runs, and nobody looks at what it returns
                move = calls.setdefault((call.path, (call.ordinal, call.visible)[which]), Move())
                move.skipped, move.exits = call, (*move.exits, *at)
        for place, others in plan.others.get(kind, {}).items():
            move = calls.setdefault(place, Move())
            move.exits += tuple(at for region, call in others for at in _exit_of(region, call))
        counts = {path: counts[which] for path, counts in plan.counts.items() if counts[which]}
        return cls(calls, counts, frozenset(at.region for move in calls.values() for at in move.exits))


def _exit_of(region: int, call: SkippedCall) -> tuple[ExitAt, ...]:
    leaf, slot = call.exit
    return () if slot is None else (ExitAt(region, leaf, slot.written),)
