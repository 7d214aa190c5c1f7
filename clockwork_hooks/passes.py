"""One running pass: which module calls it skips, what it picks up at the boundary, what it puts in the exit's place."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from clockwork_hooks.pooling import masked_mean
from clockwork_hooks.tree import Leaf, leaves, map_leaves

__all__ = [
    "Pass",
    "Plan",
    "Port",
    "SkippedCall",
    "Slot",
    "TracedPass",
    "active_pass",
    "end_pass",
    "start_pass",
    "tracing_pass",
    "version",
]

Kind = Literal["full", "adaptor"]


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
class SkippedCall:
    """One module call that an adaptor pass does not run.

    Attributes:
        path: dotted path of the module.
        ordinal: which of the module's calls in a full pass, from 0.
        visible: which of the module's calls in an adaptor pass, where calls inside skipped ones do not happen.
        output: what the call returns, with a `Slot` for each tensor.
    """

    path: str
    ordinal: int
    visible: int
    output: Any = field(repr=False, compare=False)


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


@dataclass(frozen=True, slots=True)
class Plan:
    """Which calls are skipped, where the exit is, what is captured; for one region and one input signature.

    Attributes:
        skipped: the calls, in order; exactly one has the exit among its slots.
        ports: boundary tensors to pick up, by name.
        counts: path of each patched module → its number of calls in a full pass and in an adaptor pass.
        events: kind of a pass → what happens when in it; made from the others.
    """

    skipped: tuple[SkippedCall, ...]
    ports: Mapping[str, Port]
    counts: Mapping[str, tuple[int, int]]
    events: Mapping[Kind, Events] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        kinds: tuple[Kind, ...] = ("full", "adaptor")
        object.__setattr__(self, "events", {kind: Events.of(self, kind) for kind in kinds})


@dataclass(frozen=True, slots=True)
class Events:
    """A plan as passes of one kind look things up in it, at each call of a patched module.

    Attributes:
        skipped: the skipped calls by (path, how many calls of the module came before).
        ports: (name, leaf) of what is picked up, by (path, how many calls came before, side).
        counts: how often each patched module is called; those that are not are left out.
    """

    skipped: Mapping[tuple[str, int], SkippedCall]
    ports: Mapping[tuple[str, int, str], tuple[tuple[str, int], ...]]
    counts: Mapping[str, int]

    @classmethod
    def of(cls, plan: Plan, kind: Kind) -> Events:
        """What happens in passes of this kind."""
        which = 1 if kind == "adaptor" else 0
        ports: dict[tuple[str, int, str], tuple[tuple[str, int], ...]] = {}
        for name, port in plan.ports.items():
            key = (port.path, (port.ordinal, port.visible)[which], port.side)
            ports[key] = (*ports.get(key, ()), (name, port.leaf))
        return cls(
            {(call.path, (call.ordinal, call.visible)[which]): call for call in plan.skipped},
            ports,
            {path: counts[which] for path, counts in plan.counts.items() if counts[which]},
        )


class Pass:
    """One running call of the UNet.

    Args:
        plan: what is skipped and captured.
        kind: "full" or "adaptor".
        emit: makes the exit of an adaptor pass from the captured boundary tensors.
        copies: code that the trace does not know writes to the exit: what is kept has memory of its own.

    Attributes:
        kind: "full" or "adaptor".
        captured: boundary tensors by name, once they have been seen; where a mask comes with the text's tokens, their
            mean in place of both.
        exit: what the region emitted: its true exit, or the adaptor's output; as it was, whatever the UNet's own
            code writes to it afterwards.
    """

    def __init__(
        self,
        plan: Plan,
        kind: Kind,
        emit: Callable[[Mapping[str, torch.Tensor]], torch.Tensor] | None = None,
        *,
        copies: bool = False,
    ) -> None:
        self.plan = plan
        self.copies = copies
        self.kind: Kind = kind
        self.captured: dict[str, torch.Tensor] = {}
        self.exit: torch.Tensor | None = None
        self._written = -1
        self._emit = emit
        self._events = plan.events[kind]
        self._counts: dict[str, int] = {}
        self._hooked: dict[str, int] = {}

    def enter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The pass begins: pick up what is taken from the UNet's own arguments."""
        self._capture("", 0, "input", (args, kwargs))

    def call(self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A patched module is called: skip or run it."""
        k = self._counts.get(path, 0)
        self._counts[path] = k + 1
        self._capture(path, k, "input", (args, kwargs))
        found = self._events.skipped.get((path, k))
        if found is None:
            output = forward(*args, **kwargs)
            self._capture(path, k, "output", output)
            return output
        if self.kind == "adaptor":
            return map_leaves(self._fill, found.output)
        output = forward(*args, **kwargs)
        for (_, leaf), (_, slot) in zip(leaves(output), leaves(found.output), strict=False):
            if isinstance(slot, Slot) and slot.exit and isinstance(leaf, torch.Tensor):
                self._keep(leaf.clone() if slot.written or self.copies else leaf)
        return output

    def observe(self, path: str, side: Literal["input", "output"], value: Any) -> None:
        """A native hook saw a module's input or output."""
        k = self._hooked.get(f"{side} {path}", 0)
        self._hooked[f"{side} {path}"] = k + 1
        self._capture(path, k, side, value)

    def complete(self) -> bool:
        """Did every patched module get exactly the calls of the trace, and the exit its tensor?"""
        if self.exit is None:
            return False
        if self._counts == self._events.counts:
            return True
        return {path: count for path, count in self._counts.items() if path in self.plan.counts} == self._events.counts

    def untouched(self) -> bool:
        """Is the exit still as it was emitted? What the trace does not know may write to it: a user's hook, FreeU."""
        return self.exit is not None and version(self.exit) == self._written

    def _capture(self, path: str, k: int, side: str, value: Any) -> None:
        wanted = self._events.ports.get((path, k, side))
        if wanted is None:
            return
        found = [leaf for _, leaf in leaves(value)]
        for name, leaf in wanted:
            self.captured[name] = found[leaf]
        if "mask" in self.captured and "text" in self.captured:
            self.captured["text"] = masked_mean(self.captured["text"], self.captured.pop("mask"))

    def _fill(self, leaf: Any) -> Any:
        if not isinstance(leaf, Slot):
            return leaf
        if leaf.exit and self._emit is not None:
            made = self._emit(self.captured)
            self._keep(made)
            return made.clone() if leaf.written or self.copies else made
        return placeholder(leaf)

    def _keep(self, exit: torch.Tensor) -> None:
        self.exit, self._written = exit, version(exit)


class TracedPass(Pass):
    """A pass that torch.compile traces: what it decides is decided once, and it keeps a copy of the exit.

    A copy, because a graph that writes to the exit later on would return it written to.
    """

    def _fill(self, leaf: Any) -> Any:
        if isinstance(leaf, Slot) and not (leaf.exit and self._emit is not None):
            return torch.zeros((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)  # compiled away
        return super()._fill(leaf)

    def _keep(self, exit: torch.Tensor) -> None:
        self.exit = exit.clone() if self.kind == "full" else exit


def version(tensor: torch.Tensor) -> int:
    """A counter of in-place writes to the tensor and its views; -1 for inference tensors, which keep none."""
    return -1 if tensor.is_inference() else tensor._version


def placeholder(slot: Slot) -> torch.Tensor:
    """A tensor of the slot's shape that nobody may look into; it has no memory of its own where that is safe."""
    if slot.written:
        return torch.zeros(slot.shape, dtype=slot.dtype, device=slot.device)
    return _zero(slot.dtype, slot.device).expand(slot.shape)


@functools.lru_cache(maxsize=64)
def _zero(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype, device=device)


# -- which pass runs in this thread? ------------------------------------------------------------------------------

_RUNNING = threading.local()


def active_pass(owner: object) -> Pass | None:
    """The pass that `owner` (a wrapper) is running in this thread."""
    found: Pass | None = getattr(_RUNNING, "passes", {}).get(id(owner))
    return found


def tracing_pass(owner: object) -> Pass | None:
    """The pass that torch.compile is tracing for `owner`; outside of tracing there is none."""
    found: Pass | None = getattr(owner, "tracing", None)
    return found


def start_pass(owner: object, run: Pass) -> None:
    """From here on, patched modules of `owner` ask `run`."""
    if not hasattr(_RUNNING, "passes"):
        _RUNNING.passes = {}
    _RUNNING.passes[id(owner)] = run


def end_pass(owner: object) -> Pass | None:
    """Patched modules run as they are again; idempotent."""
    found: Pass | None = getattr(_RUNNING, "passes", {}).pop(id(owner), None)
    return found
