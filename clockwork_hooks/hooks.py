"""Skip module calls and capture tensors, and undo both: all surgery on the user's modules is in this file.

A forward hook cannot keep a forward from running, so a module with skipped calls gets an instance-level `forward`
that counts the calls and asks the running `Pass` what to do; what only observes is a native hook.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from clockwork_hooks.errors import WrapError
from clockwork_hooks.tree import Leaf, leaves, map_leaves

__all__ = ["Installed", "Pass", "Plan", "Port", "RootHook", "SkippedCall", "Slot", "end_pass", "start_pass", "version"]

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
    """Where a boundary tensor can be picked up: the k-th leaf of what a module call takes or returns."""

    path: str
    ordinal: int
    visible: int
    side: Literal["input", "output"]
    leaf: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Which calls are skipped, where the exit is, what is captured; for one region and one input signature.

    Attributes:
        skipped: the calls, in order; exactly one has the exit among its slots.
        ports: boundary tensors to pick up, by name.
        counts: path of each patched module → its number of calls in a full pass and in an adaptor pass.
    """

    skipped: tuple[SkippedCall, ...]
    ports: Mapping[str, Port]
    counts: Mapping[str, tuple[int, int]]

    def key(self, kind: Kind) -> dict[tuple[str, int], SkippedCall]:
        """The skipped calls by (path, how many calls of the module came before in a pass of this kind)."""
        return {(call.path, call.visible if kind == "adaptor" else call.ordinal): call for call in self.skipped}


class Pass:
    """One running call of the UNet.

    Attributes:
        kind: "full" or "adaptor".
        captured: boundary tensors by name, once they have been seen.
        exit: what the region emitted: its true exit, or the adaptor's output; as it was, whatever the UNet's own
            code writes to it afterwards.
    """

    def __init__(
        self, plan: Plan, kind: Kind, emit: Callable[[Mapping[str, torch.Tensor]], torch.Tensor] | None = None
    ) -> None:
        self.plan = plan
        self.kind: Kind = kind
        self.captured: dict[str, torch.Tensor] = {}
        self.exit: torch.Tensor | None = None
        self._written = -1
        self._emit = emit
        self._calls = plan.key(kind)
        self._counts: dict[str, int] = {}
        self._hooked: dict[str, int] = {}

    def call(self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A patched module is called: skip or run it."""
        k = self._counts.get(path, 0)
        self._counts[path] = k + 1
        self._capture(path, k, "input", (args, kwargs))
        found = self._calls.get((path, k))
        if found is None:
            return forward(*args, **kwargs)
        if self.kind == "adaptor":
            return map_leaves(self._fill, found.output)
        output = forward(*args, **kwargs)
        for (_, leaf), (_, slot) in zip(leaves(output), leaves(found.output), strict=False):
            if isinstance(slot, Slot) and slot.exit and isinstance(leaf, torch.Tensor):
                self._keep(leaf.clone() if slot.written else leaf)
        return output

    def observe(self, path: str, side: Literal["input", "output"], value: Any) -> None:
        """A native hook saw a module's input or output."""
        k = self._hooked.get(f"{side} {path}", 0)
        self._hooked[f"{side} {path}"] = k + 1
        self._capture(path, k, side, value)

    def complete(self) -> bool:
        """Did every patched module get exactly the calls of the trace, and the exit its tensor?"""
        which = 1 if self.kind == "adaptor" else 0
        expected = {path: counts[which] for path, counts in self.plan.counts.items() if counts[which]}
        seen = {path: count for path, count in self._counts.items() if path in self.plan.counts}
        return seen == expected and self.exit is not None

    def untouched(self) -> bool:
        """Is the exit still as it was emitted? What the trace does not know may write to it: a user's hook, FreeU."""
        return self.exit is not None and version(self.exit) == self._written

    def _capture(self, path: str, k: int, side: str, value: Any) -> None:
        for name, port in self.plan.ports.items():
            wanted = port.visible if self.kind == "adaptor" else port.ordinal
            if (port.path, port.side, wanted) == (path, side, k):
                self.captured[name] = [leaf for _, leaf in leaves(value)][port.leaf]

    def _fill(self, leaf: Any) -> Any:
        if not isinstance(leaf, Slot):
            return leaf
        if leaf.exit and self._emit is not None:
            made = self._emit(self.captured)
            self._keep(made)
            return made.clone() if leaf.written else made
        return placeholder(leaf)

    def _keep(self, exit: torch.Tensor) -> None:
        self.exit, self._written = exit, version(exit)


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


def start_pass(owner: object, run: Pass) -> None:
    """From here on, patched modules of `owner` ask `run`."""
    if not hasattr(_RUNNING, "passes"):
        _RUNNING.passes = {}
    _RUNNING.passes[id(owner)] = run


def end_pass(owner: object) -> Pass | None:
    """Patched modules run as they are again; idempotent."""
    found: Pass | None = getattr(_RUNNING, "passes", {}).pop(id(owner), None)
    return found


# -- surgery ------------------------------------------------------------------------------------------------------


class Forward:
    """Stands in front of one module's forward; copies and pickles as the forward that it stands for.

    Without a `__dict__`: who wraps it in turn (accelerate, by `functools.update_wrapper`) copies that along.
    """

    __slots__ = ("__name__", "__wrapped__", "forward", "module", "own", "owner", "path")

    def __init__(self, owner: object, path: str, module: nn.Module) -> None:
        self.path = path
        self.module = module
        self.owner: object | None = owner
        self.own = "forward" in vars(module)
        self.forward: Callable[..., Any] = module.forward
        self.__name__ = "forward"
        self.__wrapped__ = self.forward  # inspect.signature looks here

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = active_pass(self.owner)
        if run is None:
            return self.forward(*args, **kwargs)
        return run.call(self.path, self.forward, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_same, (self.forward,)) if self.own else (_class_forward, (self.module,))

    @property
    def attached(self) -> bool:
        """Is this still what the module's `forward` is?"""
        return vars(self.module).get("forward") is self

    def remove(self) -> None:
        """Unlink this and nothing else, wherever later patches have put it."""
        self.owner = None
        if self.attached and not self.own:
            del self.module.forward
            return
        for name, value in list(vars(self.module).items()):
            if value is self:
                vars(self.module)[name] = self.forward


def _same(value: Any) -> Any:
    return value


def _class_forward(module: nn.Module) -> Callable[..., Any]:
    return functools.partial(type(module).forward, module)


class Observer:
    """A native hook that only looks; copies and pickles as a hook that does nothing."""

    def __init__(self, owner: object, path: str, side: Literal["input", "output"]) -> None:
        self.owner, self.path, self.side = owner, path, side

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        run = active_pass(self.owner)
        if run is not None:
            run.observe(self.path, self.side, output if self.side == "output" else (args, kwargs))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()


class _Nothing:
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class RootHook:
    """One of the two native hooks on the UNet itself; copies and pickles as a hook that does nothing."""

    def __init__(self, owner: object, act: Callable[..., Any]) -> None:
        self.owner, self._act = owner, act

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> Any:
        """Open or close a call of the UNet."""
        return self._act(module, args, kwargs, *output)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()


class Installed:
    """What is installed on the modules under a root, and how to take it back."""

    def __init__(self, owner: object) -> None:
        self._owner = owner
        self._lock = threading.RLock()
        self._forwards: dict[str, Forward] = {}
        self._observers: dict[tuple[str, str], Any] = {}
        self._compiled: list[tuple[nn.Module, Any]] = []

    def add(self, plan: Plan, modules: Mapping[str, nn.Module]) -> None:
        """Patch the modules with skipped calls and hook the ones observed: all, or none after an error.

        A forward of ours that somebody has replaced meanwhile (accelerate's offload hooks come and go) is put back.

        Args:
            plan: what is skipped and captured.
            modules: dotted path → module.

        Raises:
            WrapError: a module refuses an instance-level forward (TorchScript).
        """
        with self._lock:  # threads that trace at the same time would patch twice
            try:
                self._add(plan, modules)
            except BaseException:
                self.remove()
                raise

    def _add(self, plan: Plan, modules: Mapping[str, nn.Module]) -> None:
        for path in plan.counts:
            known = self._forwards.get(path)
            if known is None or not known.attached:
                if known is not None:
                    known.remove()
                self._forwards[path] = self._patch(path, modules[path])
        for port in plan.ports.values():
            if port.path not in plan.counts and (port.path, port.side) not in self._observers:
                module, hook = modules[port.path], Observer(self._owner, port.path, port.side)
                add = module.register_forward_hook if port.side == "output" else module.register_forward_pre_hook
                self._observers[port.path, port.side] = add(hook, with_kwargs=True)

    def _patch(self, path: str, module: nn.Module) -> Forward:
        forward = Forward(self._owner, path, module)
        try:
            module.forward = forward
        except Exception as error:
            raise WrapError(
                "a skipped module must allow an instance-level forward",
                seen={"module": path, "class": type(module).__name__, "error": error},
                do="pass the UNet before scripting or freezing it",
            ) from error
        self.run_eagerly(module)
        return forward

    def run_eagerly(self, module: nn.Module) -> None:
        """Set a module's in-place compilation (`module.compile()`) aside: it would inline the decision to skip."""
        compiled = vars(module).get("_compiled_call_impl")
        if compiled is not None:
            self._compiled.append((module, compiled))
            module._compiled_call_impl = None

    def intact(self, plan: Plan) -> bool:
        """Are all forwards that the plan needs still ours?"""
        return all(path in self._forwards and self._forwards[path].attached for path in plan.counts)

    def remove(self) -> None:
        """Take everything back; idempotent."""
        with self._lock:
            while self._forwards:
                self._forwards.popitem()[1].remove()
            while self._observers:
                self._observers.popitem()[1].remove()
            while self._compiled:
                module, compiled = self._compiled.pop()
                module._compiled_call_impl = compiled
