"""Skip module calls and pick up tensors, and undo both: all surgery on the user's modules is in this file.

A forward hook cannot keep a forward from running, so what may be skipped or run otherwise gets an instance-level
`forward`: the UNet itself hands its calls to the engine, a module with skipped calls asks the pass that is running.
What only observes is a native hook.
"""

from __future__ import annotations

import functools
import inspect
import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import get_ident
from typing import Any, Literal

from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils.hooks import RemovableHandle

from clockwork_hooks._tree import attribute
from clockwork_hooks.clock import reasons
from clockwork_hooks.engine.passes import Added, Owner
from clockwork_hooks.errors import WrapError
from clockwork_hooks.regions.cut import CutPlan

# (the forward that it stands for, args, kwargs) → what the call returns
Serve = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class _Instead(Added):
    """Stands in front of one module's forward; copies and pickles as the forward that it stands for.

    Without a `__dict__`: who wraps it in turn (accelerate, by `functools.update_wrapper`) copies that along.

    Attributes:
        module: whose forward it is.
        own: was that an attribute of the module itself, and not of its class?
    """

    __slots__ = ("__name__", "__wrapped__", "_behind", "_of_class", "module", "own")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own = "forward" in vars(module)
        self.__name__ = "forward"
        self._of_class = getattr(type(module), "forward", None)  # looking it up along the MRO takes 0.4 µs more a call
        self.forward = module.forward

    @property
    def forward(self) -> Any:
        """The forward that it stands for: of a module without its own, that of the class which it has now.

        ToMe gives modules another class, and others put another function into the class itself.
        """
        if not self.own and (now := getattr(type(self.module), "forward", None)) is not self._of_class:
            self._of_class, self.forward = now, forward_of(type(self.module)).__get__(self.module)
        return self._behind

    @forward.setter
    def forward(self, forward: Any) -> None:
        self._behind = self.__wrapped__ = forward  # inspect.signature looks at the second

    def __reduce__(self) -> tuple[Any, ...]:
        return (_same, (self.forward,)) if self.own else (_class_forward, (self.module,))

    @property
    def attached(self) -> bool:
        """Is this still what the module's `forward` is?"""
        return vars(self.module).get("forward") is self

    def unlink(self) -> None:
        """Take this and nothing else away, wherever later patches have put it."""
        if self.attached and not self.own:
            del self.module.forward
            return
        for name, value in list(vars(self.module).items()):
            if value is self:
                vars(self.module)[name] = self.forward
            inner: Any = value
            while isinstance(inner, _Instead):  # another wrapper's, around ours
                if inner.forward is self:
                    inner.own, inner.forward = self.own, self.forward
                inner = inner.forward


class Forward(_Instead):
    """Stands in front of the forward of a module with skipped calls."""

    __slots__ = ("owner", "path")

    def __init__(self, owner: Owner, path: str, module: nn.Module) -> None:
        super().__init__(module)
        self.path = path
        self.owner: Owner | None = owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Ask the pass that runs; without one, run."""
        owner = self.owner
        pass_ = None if owner is None else owner.tracing or owner.active.pass_
        return self.forward(*args, **kwargs) if pass_ is None else pass_.call(self.path, self.forward, args, kwargs)

    def remove(self) -> None:
        """Unlink it; whoever still holds it gets the module's own forward."""
        self.owner = None
        self.unlink()


class PastHooks(Added):
    """Stands in front of a module's call, hooks and all: those of a skipped module are not called, as it is not.

    It lies where `module.compile()` puts its callable, as hooks run around `forward`; torch leaves that out of copies
    and pickles.
    """

    __slots__ = ("before", "forward")

    def __init__(self, forward: Forward, before: Any) -> None:
        self.forward = forward
        self.before = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Where the pass that runs skips this call, go past the hooks."""
        forward = self.forward
        owner = forward.owner
        pass_ = None if owner is None else owner.tracing or owner.active.pass_
        if pass_ is not None and pass_.skips(forward.path, args, kwargs):
            return forward(*args, **kwargs)
        return forward.module._call_impl(*args, **kwargs)

    def remove(self) -> None:
        """Take it away, and with it what other wrappers have left below."""
        attributes = vars(self.forward.module)
        above = attributes.get("_compiled_call_impl")
        if above is self:
            below = self.before
            while isinstance(below, PastHooks) and below.forward.owner is None:
                below = below.before
            if below is None:
                del attributes["_compiled_call_impl"]
            else:
                attributes["_compiled_call_impl"] = below


class RootForward(_Instead):
    """Stands in front of the UNet's forward: every call of it, also one that no hook sees, is the engine's.

    Attributes:
        name: of the module's attribute that holds it.
    """

    __slots__ = ("_asked", "_due", "_proved", "name", "serve")

    def __init__(self, module: nn.Module, serve: Serve) -> None:
        super().__init__(module)
        self.serve: Serve | None = serve
        self.name = "forward"
        self._asked: Any = None  # somebody's forward in front of ours, of which a call will show whether it comes here
        self._proved: Any = None  # one from which a call came
        self._due: set[int] = set()  # threads in which a call has begun that has not come here

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Let the engine run the call."""
        serve = self.serve
        self._due.discard(get_ident())
        if self._asked is not None:
            self._proved, self._asked = self._asked, None
        return self.forward(*args, **kwargs) if serve is None else serve(self.forward, args, kwargs)

    def expect(self) -> bool:
        """A call begins: did the one before it, in this thread, come here? Else a forward in front answered it."""
        thread = get_ident()
        came = thread not in self._due
        self._due.add(thread)
        return came

    def reached(self) -> bool:
        """Will the call that begins now come here, as far as can be told?"""
        attributes = vars(self.module)
        outer = attributes.get("forward")
        if outer is self or attributes.get(self.name) is self or (outer is not None and outer is self._proved):
            return True
        own = outer is None or attribute(outer, "__func__") is type(self.module).forward
        if own or outer is self._asked:  # the last call with this one did not
            return False
        self._asked = outer
        return True

    @property
    def __code__(self) -> Any:  # torch.export looks here
        return inspect.unwrap(self.forward).__code__

    def remove(self) -> None:
        """Unlink it; whoever still holds it gets the UNet's own forward."""
        self.serve = None
        self.unlink()


def forward_of(cls: type[nn.Module]) -> Any:
    """What a class has for a forward, not bound: of TorchScript's, `cls.forward` raises."""
    return next(vars(base)["forward"] for base in cls.__mro__ if "forward" in vars(base))


def _same(value: Any) -> Any:
    return value


def _class_forward(module: nn.Module) -> Callable[..., Any]:
    return functools.partial(type(module).forward, module)


class BoundaryHook:
    """A native hook that only looks; copies and pickles as a hook that does nothing."""

    def __init__(self, owner: Owner, path: str, side: Literal["input", "output"]) -> None:
        self.owner, self.path, self.side = owner, path, side

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        """A module has been given its input, or has returned."""
        pass_ = self.owner.tracing or self.owner.active.pass_
        if pass_ is not None and pass_.looks:
            pass_.observe(self.path, self.side, output if self.side == "output" else (args, kwargs))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()


class _Nothing:
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class RootHook:
    """The native hook on the UNet itself: it comes before every call, and sees whose and whether it is ours.

    Args:
        owner: who has attached itself to the UNet: a wrapper, or `distill` while it records.
        look: called with the module; before it looks up its own forward, unlike `RootForward`.
    """

    def __init__(self, owner: object, look: Callable[[nn.Module], None]) -> None:
        self.owner, self._look = owner, look

    def __call__(self, module: nn.Module, args: Any) -> None:
        """A call begins."""
        self._look(module)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()


def _observed(plan: CutPlan) -> Iterator[tuple[str, Literal["input", "output"]]]:
    """Modules to hook, and on which side: those at the boundary that have no forward of ours."""
    return ((port.path, port.side) for port in plan.ports.values() if port.path and port.path not in plan.counts)


class Census:
    """Which modules a UNet consists of, and what their classes do, at one moment."""

    def __init__(self, unet: nn.Module) -> None:
        modules = walk(unet)
        self._seen = list(map(weakref.ref, modules))
        self._classes = list(map(type, modules))
        self._forwards = {cls: forward_of(cls) for cls in set(self._classes)}

    def holds(self, unet: nn.Module) -> bool:
        """Does it still consist of the same ones, in the same places, of the same classes?"""
        now = walk(unet)
        if len(now) != len(self._seen) or any(one() is not module for one, module in zip(self._seen, now, strict=True)):
            return False
        same = self._classes == list(map(type, now))
        return same and all(forward_of(cls) is forward for cls, forward in self._forwards.items())


class Code:
    """What calls of modules run that torch.compile has no guards on: functions of their classes, and hooks.

    Args:
        roots: whose modules.
        hooks: those count that are not on the roots, and not ours.
    """

    def __init__(self, roots: Sequence[nn.Module], *, hooks: bool) -> None:
        self._roots, self._hooks = roots, hooks
        self._seen = self._now()

    def holds(self) -> bool:
        """Is all of it the very same as then?"""
        now = self._now()
        return len(now) == len(self._seen) and all(map(operator.is_, now, self._seen))

    def _now(self) -> list[Any]:
        modules = [module for root in self._roots for module in walk(root)]
        bases = dict.fromkeys(base for cls in dict.fromkeys(map(type, modules)) for base in cls.__mro__[:-1])
        seen = [value for base in bases for name, value in vars(base).items() if _runs_in_calls(name, value)]
        if self._hooks:
            inner = [table for module in modules if module not in self._roots for table in _hooks_of(module)]
            everywhere = nn_module._global_forward_pre_hooks, nn_module._global_forward_hooks
            tables = filter(None, (*inner, *everywhere))
            seen += [
                hook for table in tables for hook in table.values() if not isinstance(hook, (BoundaryHook, RootHook))
            ]
        return seen


def _runs_in_calls(name: str, value: Any) -> bool:
    """Is it a function, property or the like? Dynamo itself replaces two of `nn.Module`, when it first compiles."""
    return hasattr(type(value), "__get__") and name not in ("__init__", "__setstate__")


def _hooks_of(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return module._forward_pre_hooks, module._forward_hooks


def walk(unet: nn.Module) -> list[nn.Module]:
    """The modules in a fixed order, one that is shared as often as it is held (`modules()` lists it once).

    `named_modules` writes paths too: 106 µs and not 31 for the demo's 252 modules, which are walked twice a run.
    """
    modules, rest = [], [unet]
    while rest:
        module = rest.pop()
        modules.append(module)
        if children := module._modules:  # most have none: asked first, that takes 31 µs and not 50
            rest += [child for child in children.values() if child is not None]
    return modules


class Installed:
    """What is installed on a UNet and the modules under it, and how to take it back."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._lock = threading.RLock()
        self._closed = False
        self._forwards: dict[str, Forward] = {}
        self._observers: dict[tuple[str, str], RemovableHandle] = {}
        self._fronts: dict[str, PastHooks] = {}
        self._compiled: list[tuple[nn.Module, Any]] = []
        self._root: RootForward | None = None
        self._hook: Any = None
        self._optimized: nn.Module | None = None
        self._its_forward: Any = None

    # -- the UNet itself -----------------------------------------------------------------------------------------

    def attach(self, unet: nn.Module, owner: object, serve: Serve, missed: Callable[[str], None]) -> None:
        """Let `serve` run the UNet's calls.

        Args:
            unet: the UNet.
            owner: who asks for it.
            serve: given the UNet's own forward and a call's arguments, returns what the call returns.
            missed: called with the reason when a call begins that `serve` will not get, as somebody has put an older
                forward back; or where it did not get the one before, as another forward has answered that.
        """

        def look(module: nn.Module) -> None:
            if module is not unet:
                raise WrapError(
                    "a wrapped UNet must run as the object that was wrapped, with its own modules and weights",
                    seen={"unet": type(unet).__name__, "called": "a replica of it, as DataParallel makes them"},
                    do="wrap each process's own UNet and use DistributedDataParallel, or call remove() first",
                )
            came = self._root is None or self._root.expect()
            reached = self._root is not None and self._root.reached()
            if not came:  # the call before this one
                missed(reasons.ANSWERED if reached else reasons.REPLACED)
            if not reached:
                missed(reasons.REPLACED)
                self._front(unet, serve)

        self._closed = False
        if self._optimized is not None:
            self.answer_for(self._optimized, unet)
        try:
            self._hook = unet.register_forward_pre_hook(RootHook(owner, look), prepend=True)
            self._front(unet, serve)
            self.run_eagerly(unet)
        except BaseException:
            self.remove()
            raise

    def answer_for(self, optimized: nn.Module, unet: nn.Module) -> None:
        """Let the output of `torch.compile` call the UNet that it was made of, as it is: whoever holds it is served."""
        with self._lock:
            if self._its_forward is None:
                self._optimized, self._its_forward = optimized, vars(optimized)["forward"]
                vars(optimized)["forward"] = unet.__call__

    def _front(self, unet: nn.Module, serve: Serve) -> None:
        with self._lock:
            if self._closed:
                return
            if self._root is not None:
                self._root.remove()
            self._root = RootForward(unet, serve)
            name, inner = _innermost(unet)
            if name == "forward":
                _put(unet, self._root, "")
            else:  # behind accelerate's: it puts what it holds back when it goes
                self._root.forward = inner
                self._root.name, vars(unet)[name] = name, self._root

    # -- the modules under it ------------------------------------------------------------------------------------

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
            except BaseException:  # after an interrupt the next call adds it: the UNet itself stays ours until `close`
                self._take_off()
                raise

    def _add(self, plan: CutPlan, modules: Mapping[str, nn.Module], *, looks: bool) -> None:
        for path in plan.counts:
            forward = self._forwards.get(path)
            if forward is None or not forward.attached:
                if forward is not None:
                    forward.remove()
                self._forwards[path] = self._patch(path, modules[path])
            self._go_past_hooks(path)
        for path, side in _observed(plan) if looks else ():
            if not self._observes(path, side):
                module, hook = modules[path], BoundaryHook(self._owner, path, side)
                add = module.register_forward_hook if side == "output" else module.register_forward_pre_hook
                self._observers[path, side] = add(hook, with_kwargs=True)

    def _observes(self, path: str, side: str) -> bool:
        """Is our hook there? Others may have cleared a module's hooks, or put them back as they were."""
        hook = self._observers.get((path, side))
        return hook is not None and hook.id in (hook.hooks_dict_ref() or ())

    def _patch(self, path: str, module: nn.Module) -> Forward:
        forward = Forward(self._owner, path, module)
        _put(module, forward, path)
        self.run_eagerly(module)
        return forward

    def _go_past_hooks(self, path: str) -> None:
        forward, front = self._forwards[path], self._fronts.get(path)
        now = vars(forward.module).get("_compiled_call_impl")
        if (
            front is not None and front.forward is forward and isinstance(now, PastHooks)
        ):  # below another wrapper's, maybe
            return
        if now is not None and not isinstance(now, PastHooks):
            self.run_eagerly(forward.module)
            now = None
        self._fronts[path] = instead = PastHooks(forward, now)
        vars(forward.module)["_compiled_call_impl"] = instead

    def run_eagerly(self, module: nn.Module) -> None:
        """Set a module's in-place compilation (`module.compile()`) aside: it would inline the decision to skip."""
        compiled = vars(module).get("_compiled_call_impl")
        if compiled is not None and not isinstance(compiled, PastHooks):
            self._compiled.append((module, compiled))
            module._compiled_call_impl = None

    def renew(self, modules: Mapping[str, nn.Module]) -> None:
        """Take away what is on modules that have left their places."""
        with self._lock:
            for path, forward in list(self._forwards.items()):
                if modules.get(path) is not forward.module:
                    self._forwards.pop(path).remove()
                    self._fronts.pop(path).remove()
            for place in list(self._observers):
                self._observers.pop(place).remove()

    def intact(self, plan: CutPlan, *, looks: bool = True) -> bool:
        """Is all that the plan needs still there, as `add` has put it?"""
        for path in plan.counts:
            forward = self._forwards.get(path)
            if forward is None:
                return False
            attributes = vars(forward.module)
            if attributes.get("forward") is not forward:
                return False
            if type(attributes.get("_compiled_call_impl")) is not PastHooks:  # somebody has compiled it in place
                return False
        return not looks or all(self._observes(path, side) for path, side in _observed(plan))

    # -- undo ----------------------------------------------------------------------------------------------------

    @property
    def paths(self) -> tuple[str, ...]:
        """Modules with skipped calls."""
        return tuple(self._forwards)

    @property
    def closed(self) -> bool:
        """Has everything been taken back, and nothing been attached since?"""
        return self._closed

    def close(self) -> None:
        """Take everything back, until `attach`; idempotent."""
        with self._lock:
            self._closed = True
            self.remove()

    def remove(self) -> None:
        """Take everything back; idempotent."""
        with self._lock:
            if self._root is not None:
                self._root.remove()
                self._root = None
            if self._hook is not None:
                self._hook.remove()
                self._hook = None
            if self._optimized is not None and self._its_forward is not None:
                vars(self._optimized)["forward"], self._its_forward = self._its_forward, None
            self._take_off()
            while self._compiled:
                module, compiled = self._compiled[-1]
                module._compiled_call_impl = compiled
                self._compiled.pop()

    def _take_off(self) -> None:
        """Take back what is on the modules under the UNet."""
        tables: tuple[dict[Any, Any], ...] = (self._forwards, self._fronts, self._observers)
        for table in tables:
            for place, one in list(table.items()):
                one.remove()
                del table[place]  # after it: what an interrupt has left is taken off when asked again


def _put(module: nn.Module, forward: Any, path: str) -> None:
    """Make it the forward of the module at this path."""
    try:
        module.forward = forward
    except Exception as error:
        raise WrapError(
            "the UNet and its skipped modules must allow a `forward` on the instance",
            seen={"module": path or "the UNet itself", "class": type(module).__name__, "error": error},
            do="pass the UNet before scripting or freezing it",
        ) from error


def _innermost(module: nn.Module) -> tuple[str, Callable[..., Any]]:
    """Name and value of the attribute that holds a module's own forward: accelerate's hooks keep it in another one."""
    forward = vars(module).get("forward")
    wrapped = attribute(forward, "__wrapped__")
    if wrapped is not None and not isinstance(forward, _Instead):
        for name, value in vars(module).items():
            if value is wrapped:
                return name, value
    return "forward", module.forward
