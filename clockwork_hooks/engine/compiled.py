"""Compiled calls: two static callables per input signature, one for full and one for adaptor passes.

    full(args)            → output, exit
    adaptor(args, cached) → output, exit

Hooks, timeline, schedule and statistics stay eager; only what the root's forward does is replaced, for one call, by
the callable of the pass that was chosen. The decisions within a pass (which calls are skipped, where the exit is) are
constants by then, so each callable is one graph; the exit leaves it and enters it as an ordinary tensor.
"""

from __future__ import annotations

import contextlib
import itertools
import numbers
import threading
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from clockwork_hooks._tree import map_leaves, version
from clockwork_hooks.engine import stand_in
from clockwork_hooks.engine.passes import Pass, TracedPass
from clockwork_hooks.errors import CompileError
from clockwork_hooks.regions.cut import CutPlan, Kind

if TYPE_CHECKING:
    from clockwork_hooks.engine.engine import Engine, Running

__all__ = ["Compiled", "Ran", "Static"]

_NUMBERS = itertools.count()

Static = Callable[..., "tuple[Any, torch.Tensor | None, bool]"]


class Ran(Pass):
    """A pass that a static callable has run."""

    def __init__(
        self, plan: CutPlan, kind: Kind, exit: torch.Tensor | None, *, whole: bool, untouched: bool = True
    ) -> None:
        super().__init__(plan, kind)
        self.exit, self._whole, self._untouched = exit, whole, untouched
        self.written = -1 if exit is None else version(exit)

    def complete(self) -> bool:
        """Did the calls agree with the trace, when this pass was compiled?"""
        return self._whole and self.exit is not None

    def untouched(self) -> bool:
        """Was the exit as it was emitted at the end of the pass, when this pass was compiled?"""
        return self._untouched


class Compiled:
    """Runs the calls of a compiled wrapper; it is called in the place of the root's forward.

    Args:
        engine: decides what runs.
        options: what `torch.compile` gets beside `fullgraph=True`.
        pooled: outputs lie in the memory of CUDA graphs, which the next call overwrites.
    """

    def __init__(self, engine: Engine, options: dict[str, Any], *, pooled: bool) -> None:
        self.engine, self.options, self.pooled = engine, options, pooled
        self._static: dict[tuple[Any, ...], Static] = {}
        self._lock = threading.Lock()

    def __call__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call of the root's forward."""
        running = self.running()
        if running is None or running.run is None or running.prepared is None or not self.ready(running):
            return forward(*args, **kwargs)
        args, kwargs = with_tensor_time(running, args, kwargs)
        output, ran = self.run(running, running.run, forward, args, kwargs)
        finite, cached = self.engine.check_finite, running.cached
        if cached is not None and ran.exit is not None and (finite or not stand_in.fits(ran.exit, cached)):
            where = {"step": running.position and running.position.step, "adaptor": type(self.engine.adaptor).__name__}
            stand_in.check(ran.exit, cached, finite=finite, where=where)
        running.run = ran
        return output

    def running(self) -> Running | None:
        """The call of the UNet that is under way in this thread; None for one that is not ours to speed up."""
        stack = self.engine.states.current().running
        return stack[-1] if stack else None

    def ready(self, running: Running) -> bool:
        """The first adaptor pass of a signature runs as it is: its MACs are counted and its output is checked."""
        return running.cached is None or (running.prepared is not None and running.prepared.adaptor_macs is not None)

    def run(
        self, running: Running, run: Pass, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Pass]:
        """Run this pass as its static callable does: (output, what it did)."""
        key = (running.key, run.kind, run.copies)
        with self._lock:
            static = self._static.get(key)
            if static is None:
                made = self._make(run, forward)
                static = self._static[key] = torch.compile(made, fullgraph=True, **self.options)
        if self.pooled:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            with _counting_in_checkpoints():
                output, exit, whole = static(args, kwargs, running.cached)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            raise CompileError(
                "a compiled UNet is one graph, for full passes and for adaptor passes",
                seen={"pass": run.kind, "error": str(error).strip().split("\n", 1)[0]},
                do='read the cause above; or call cw.compile(mode="cudagraphs"), which needs no graph of operators',
            ) from error
        if self.pooled:
            output = map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, output)
            exit = exit.clone() if exit is not None and exit is not running.cached else exit
        return output, Ran(run.plan, run.kind, exit, whole=whole)

    def _make(self, run: Pass, forward: Callable[..., Any]) -> Static:
        engine, adaptor = self.engine, self.engine.adaptor
        plan, kind, copies, looks = run.plan, run.kind, run.copies, run.looks

        def static(args: tuple[Any, ...], kwargs: dict[str, Any], cached: Any) -> tuple[Any, torch.Tensor | None, bool]:
            def adapt(captured: Mapping[str, torch.Tensor]) -> torch.Tensor:
                made: torch.Tensor = stand_in.run(adaptor, captured, cached)
                return made

            run = engine.tracing = TracedPass(
                plan, kind, adapt if kind == "adaptor" else None, copies=copies, looks=looks
            )
            run.enter(args, kwargs)
            output = forward(*args, **kwargs)
            engine.tracing = None
            return output, run.exit, run.complete()

        return _with_code_of_its_own(static, f"{kind}_pass_{next(_NUMBERS)}")


def with_tensor_time(
    running: Running, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with its time as a tensor on the sample's device: a number would be a constant of what is compiled."""
    prepared, values = running.prepared, running.arguments.values
    time = values.get(prepared.time) if prepared is not None and prepared.time is not None else None
    if prepared is None or time is None:
        return args, kwargs
    device = running.arguments.get(prepared.sample).device
    if isinstance(time, torch.Tensor):
        if time.device == device:
            return args, kwargs
        lifted = time.to(device)
    elif isinstance(time, numbers.Integral):
        lifted = torch.full((), int(time), dtype=torch.int64, device=device)  # a kernel, no copy to wait for
    else:
        lifted = torch.full((), float(time), device=device)
    made = [lifted if name == prepared.time else value for name, value in values.items()]
    return tuple(made[: len(args)]), dict(zip(kwargs, made[len(args) :], strict=True))


def _counting_in_checkpoints() -> contextlib.AbstractContextManager[None]:
    """Calls are counted also within `torch.utils.checkpoint`; what its backward runs again does not count."""
    option = "skip_fwd_side_effects_in_bwd_under_checkpoint"  # without it, dynamo refuses: a CompileError
    if not torch.is_grad_enabled() or not hasattr(torch._dynamo.config, option):
        return contextlib.nullcontext()
    patched: contextlib.AbstractContextManager[None] = torch._dynamo.config.patch({option: True})
    return patched


def _with_code_of_its_own(function: Static, name: str) -> Static:
    """Dynamo keeps graphs, limits and what it learned about shapes by code object: one for each callable."""
    assert isinstance(function, types.FunctionType)
    code = (
        function.__code__.replace(co_name=name, co_qualname=name)
        if hasattr(function.__code__, "co_qualname")
        else function.__code__.replace(co_name=name)
    )
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
