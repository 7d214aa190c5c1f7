"""Skip module calls and capture tensors, and undo both: all surgery on the user's modules is in this file.

A forward hook cannot keep a forward from running, so a module with skipped calls gets an instance-level `forward`
that counts the calls and asks the running `Pass` what to do; what only observes is a native hook.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

from clockwork_hooks.engine.passes import Owner
from clockwork_hooks.errors import WrapError
from clockwork_hooks.regions.cut import CutPlan

__all__ = ["Installed", "RootHook"]


class Forward:
    """Stands in front of one module's forward; copies and pickles as the forward that it stands for.

    Without a `__dict__`: who wraps it in turn (accelerate, by `functools.update_wrapper`) copies that along.
    """

    __slots__ = ("__name__", "__wrapped__", "exits", "forward", "module", "own", "owner", "path")

    def __init__(self, owner: Owner, path: str, module: nn.Module) -> None:
        self.path = path
        self.module = module
        self.owner: Owner | None = owner
        self.exits = False
        self.own = "forward" in vars(module)
        self.forward: Callable[..., Any] = module.forward
        self.__name__ = "forward"
        self.__wrapped__ = self.forward  # inspect.signature looks here

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner
        if owner is None or (owner.resting and not self.exits):
            return self.forward(*args, **kwargs)
        run = owner.tracing or owner.active.run
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
            while isinstance(value, Forward):  # another wrapper's, around ours
                if value.forward is self:
                    value.forward = value.__wrapped__ = self.forward
                    value.own = self.own
                value = value.forward


def _same(value: Any) -> Any:
    return value


def _class_forward(module: nn.Module) -> Callable[..., Any]:
    return functools.partial(type(module).forward, module)


class RootForward(Forward):
    """Stands in front of the root's forward while the wrapper is compiled; `owner` is called with forward and call."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Let the owner run the call."""
        return self.owner(self.forward, args, kwargs) if callable(self.owner) else self.forward(*args, **kwargs)


class Observer:
    """A native hook that only looks; copies and pickles as a hook that does nothing."""

    def __init__(self, owner: Owner, path: str, side: Literal["input", "output"]) -> None:
        self.owner, self.path, self.side = owner, path, side

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        run = self.owner.tracing or self.owner.active.run
        if run is not None and run.looks:
            run.observe(self.path, self.side, output if self.side == "output" else (args, kwargs))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()


class _Nothing:
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class RootHook:
    """One of the two native hooks on the UNet itself; copies and pickles as a hook that does nothing."""

    def __init__(
        self, owner: object, act: Callable[..., Any], failed: Callable[[BaseException], None] | None = None
    ) -> None:
        self.owner, self._act, self._failed = owner, act, failed

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> Any:
        """Open or close a call of the UNet; `failed` is called after any error of ours."""
        try:
            return self._act(module, args, kwargs, *output)
        except BaseException as error:
            if self._failed is not None:
                self._failed(error)
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()


class Installed:
    """What is installed on the modules under a root, and how to take it back."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._lock = threading.RLock()
        self._closed = False
        self._forwards: dict[str, Forward] = {}
        self._observers: dict[tuple[str, str], Any] = {}
        self._compiled: list[tuple[nn.Module, Any]] = []
        self._root: RootForward | None = None
        self._pairs: dict[int, tuple[CutPlan, list[tuple[dict[str, Any], Forward]]]] = {}

    def add(self, plan: CutPlan, modules: Mapping[str, nn.Module], *, looks: bool = True) -> None:
        """Patch the modules with skipped calls and hook the ones observed: all, or none after an error.

        A forward of ours that somebody has replaced meanwhile (accelerate's offload hooks come and go) is put back.

        Args:
            plan: what is skipped and captured.
            modules: dotted path → module.
            looks: boundary tensors are picked up, so modules are observed.

        Raises:
            WrapError: a module refuses an instance-level forward (TorchScript).
        """
        with self._lock:  # threads that trace at the same time would patch twice
            if self._closed:  # another thread's call is under way: its pass finds nothing patched, and is full
                return
            try:
                self._add(plan, modules, looks=looks)
            except BaseException:
                self.remove()
                raise

    def _add(self, plan: CutPlan, modules: Mapping[str, nn.Module], *, looks: bool) -> None:
        self._pairs.clear()
        for path in plan.counts:
            known = self._forwards.get(path)
            if known is None or not known.attached:
                if known is not None:
                    known.remove()
                self._forwards[path] = self._patch(path, modules[path])
        for call in plan.skipped:
            self._forwards[call.path].exits |= call.exit[0] >= 0
        for port in plan.ports.values() if looks else ():
            if port.path and port.path not in plan.counts and (port.path, port.side) not in self._observers:
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

    def front(self, module: nn.Module, act: Callable[..., Any]) -> None:
        """Put `act(forward, args, kwargs)` in front of the root's forward: a native hook cannot skip it."""
        with self._lock:
            if self._closed:
                return
            if self._root is not None:
                self._root.remove()
            self._root = module.forward = RootForward(act, "", module)  # type: ignore[arg-type]

    @property
    def fronted(self) -> bool:
        """Does something run in the place of the root's forward?"""
        return self._root is not None

    def intact(self, plan: CutPlan) -> bool:
        """Are all forwards that the plan needs still ours?"""
        if self._root is not None and not self._root.attached:
            self.front(self._root.module, self._root.owner)  # type: ignore[arg-type]
        found = self._pairs.get(id(plan))
        if found is None:
            with self._lock:
                ours = [self._forwards[path] for path in plan.counts if path in self._forwards]
                if len(ours) < len(plan.counts):
                    return False
                found = self._pairs[id(plan)] = plan, [(vars(forward.module), forward) for forward in ours]
        for held, forward in found[1]:  # noqa: SIM110 - a generator takes twice as long
            if held.get("forward") is not forward:
                return False
        return True

    def close(self) -> None:
        """Take everything back for good; idempotent."""
        with self._lock:
            self._closed = True
            self.remove()

    def remove(self) -> None:
        """Take everything back; idempotent."""
        with self._lock:
            if self._root is not None:
                self._root.remove()
                self._root = None
            self._pairs.clear()
            while self._forwards:
                self._forwards.popitem()[1].remove()
            while self._observers:
                self._observers.popitem()[1].remove()
            while self._compiled:
                module, compiled = self._compiled.pop()
                module._compiled_call_impl = compiled
