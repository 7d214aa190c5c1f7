"""Compiled passes: static callables per input signature, one for full passes and one for each region's adaptor passes.

    full(args)                          → output, exits, entries
    adaptor(args, cached exit, what is known of its and of earlier times) → output, exits, entries

Timeline, schedule and statistics stay eager; only the UNet's forward is replaced, for one call, by the callable of the
pass that was decided on. The decisions within a pass (which calls are skipped, where the exit is) are constants by
then, so each callable is one graph; exits leave it and enter it as ordinary tensors.

A callable is launched in two tries. The first runs a graph that dynamo has, and compiles nothing; if none fits, nothing
of the UNet has run. Before the second try, which compiles, the engine looks whether modules have been exchanged. So a
look at all modules comes before a launch only where compiling takes far longer.
"""

from __future__ import annotations

import contextlib
import itertools
import numbers
import re
import threading
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from clockwork_hooks._tree import map_leaves, version
from clockwork_hooks.adaptors import stand_in
from clockwork_hooks.engine.hooks import Code
from clockwork_hooks.engine.passes import Emitted, Exchanged, Outcome, Pass
from clockwork_hooks.errors import CompileError
from clockwork_hooks.regions.cut import PassKind

if TYPE_CHECKING:
    from clockwork_hooks.clock.timeline import Feature
    from clockwork_hooks.engine.engine import Engine, Given, UNetCall

__all__ = ["Compiled", "Static"]

_NUMBERS = itertools.count()

# output, region → exit, entry, those of others, complete
Results = tuple[Any, dict[int, torch.Tensor], "torch.Tensor | None", dict[str, torch.Tensor], bool]
Static = Callable[..., Results]  # of args, kwargs, cached
# The same: one runs a graph that is there, or raises `_NoGraphFits`; the other compiles one if need be.
Tries = tuple[Static, Static]
Cached = tuple["torch.Tensor | None", "Given | None"]  # exit, and what an adaptor is given beside it


class _NoGraphFits(Exception):
    """None of the graphs that dynamo has is for such a call; nothing has run."""


class Unproved(Exception):
    """The graph that fits is yet to be proved, or nothing is compiled; nothing has run."""

    def __init__(self, graph: _Proved | None) -> None:
        super().__init__()
        self.graph = graph


class Compiled:
    """Runs the passes of a compiled wrapper.

    Args:
        engine: decides what runs.
        options: mode, backend and options of `torch.compile`.
        pooled: outputs lie in the memory of CUDA graphs, which the next call overwrites.

    Attributes:
        unseen_hooks: another hook on an inner module goes unnoticed in a launch.
    """

    unseen_hooks = True

    def __init__(self, engine: Engine, options: dict[str, Any], *, pooled: bool) -> None:
        self.engine, self.options, self.pooled = engine, options, pooled
        self._static: dict[tuple[Any, ...], Tries] = {}
        self._lock = threading.Lock()
        self._code: Code | None = None

    def holds(self) -> bool:
        """Do the modules' classes and hooks stand as they stood when the first pass was compiled?"""
        return self._code is None or self._code.holds()

    def begin(self) -> None:
        """A pass is about to be compiled."""
        if self._code is None:
            adaptors = (clocked.adaptor for clocked in self.engine.chain)
            roots = [self.engine.unet, *(one for one in adaptors if isinstance(one, nn.Module))]
            self._code = Code(roots, hooks=self.unseen_hooks)

    def ready(self, call: UNetCall, pass_: Pass) -> bool:
        """The first adaptor pass of a signature runs as it is, as its MACs are counted.

        So does one of which an adaptive schedule decides only when the region begins.
        """
        if call.signature is None or pass_.open:
            return False
        return pass_.kind == "full" or call.signature.regions[pass_.plan.index].proved

    def run(self, call: UNetCall, pass_: Pass, feature: Feature | None) -> Outcome:
        """Run a pass as its static callable does.

        Raises:
            CompileError: it is not one graph.
            Exchanged: no graph fits, as modules are others than the recorded; nothing has run.
            AdaptorError: the adaptor returned what does not fit the region.
        """
        args, kwargs = with_tensor_time(call)
        cached: Cached = (None, None)
        if pass_.kind == "adaptor" and feature is not None:
            cached = feature.exit, self._given(call, pass_, feature)
        outcome = self.launch(call, pass_, args, kwargs, cached)
        exit, finite = outcome.exits.get(pass_.plan.index), self.engine.check_finite
        if cached[0] is not None and exit is not None and (finite or not stand_in.fits(exit.exit, cached[0])):
            adaptor = self.engine.chain[pass_.plan.index].adaptor
            where = {"step": call.place and call.place.step, "adaptor": adaptor}
            stand_in.check(exit.exit, cached[0], finite=finite, where=where)
        return outcome

    def _given(self, call: UNetCall, pass_: Pass, feature: Feature) -> Given:
        """What the adaptor is given; where there is no trend yet, zero: one callable serves both."""
        clocked = self.engine.chain[pass_.plan.index]
        given = self.engine.given(call, clocked, feature)
        if given.past.trend is None and clocked.keeps_trail:
            positions = None if given.past.position is None else given.past.position.expand(2)
            past = given.past._replace(trend=torch.zeros_like(feature.exit), trend_positions=positions)
            given = given._replace(past=past)
        return given

    def forget(self, signature: Hashable = None) -> None:
        """Passes are other ones from now on: what was compiled is let go; of one signature, if its key is passed."""
        with self._lock:
            let_go(self._static, signature)
            if signature is None:
                self._code = None

    def launch(
        self, call: UNetCall, pass_: Pass, args: tuple[Any, ...], kwargs: dict[str, Any], cached: Cached
    ) -> Outcome:
        """Run the pass, compiled first if need be."""
        try:
            results = self.results(call, pass_, args, kwargs, cached)
        except Unproved as error:
            return self.run_as_it_is(call, pass_, error)
        if self.pooled:
            output, exits, entry, others, complete = results
            output = map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, output)
            if call.unread:
                return outcome_of(pass_, output, *results[1:])
            exits = {region: exit if exit is cached[0] else exit.clone() for region, exit in exits.items()}
            entry = None if entry is None else entry.clone()
            results = output, exits, entry, {name: other.clone() for name, other in others.items()}, complete
        return outcome_of(pass_, *results)

    def run_as_it_is(self, call: UNetCall, pass_: Pass, error: Unproved) -> Outcome:
        """Run the pass uncompiled, which shows whether its graph may run from now on."""
        if error.graph is not None:
            pass_.proves_for(error.graph.release)
        return self.engine.execute(call, pass_, None, eager=True)

    def results(
        self, call: UNetCall, pass_: Pass, args: tuple[Any, ...], kwargs: dict[str, Any], cached: Cached
    ) -> Results:
        """What the static callable of a pass returns for these inputs.

        Raises:
            CompileError: it is not one graph.
            Exchanged: no graph fits, as modules are others than the recorded; nothing has run.
            Unproved: its graph may not run yet; nothing has run.
        """
        forward = id(getattr(call.forward, "__func__", call.forward))  # another one once the UNet has another class
        key = (call.key, pass_.plan.index, pass_.kind, frozenset(pass_.copies), forward)
        with self._lock:
            static = self._static.get(key)
            if static is None:
                self.begin()
                static = self._static[key] = self._tries(self._make(call, pass_), pass_.kind)
        run, compile_and_run = static
        if self.pooled:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            with _counting_in_checkpoints():
                call.inside = True
                try:
                    return run(args, kwargs, cached, False)
                except _NoGraphFits:
                    call.inside = False
                    if not (self.engine.intact and self.holds()):
                        raise Exchanged from None
                    call.inside = True
                    return compile_and_run(args, kwargs, cached)
        except _NoGraphFits:
            raise Unproved(None) from None
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            if type(error).__name__ == "FailOnRecompileLimitHit":
                raise CompileError(
                    "values that the UNet holds in Python are constants of a compiled pass: they may take few "
                    "different values",
                    seen={"pass": pass_.kind, "graphs": torch._dynamo.config.recompile_limit},
                    do="let the UNet count in a buffer, not in a Python number (torch has logged what differed); or "
                    "raise torch._dynamo.config.recompile_limit",
                ) from error
            raise CompileError(
                "a compiled UNet must be one graph for full passes, and one for adaptor passes",
                seen={"pass": pass_.kind, "error": str(error).strip().split("\n", 1)[0]},
                do='read the cause above; or call cw.compile(mode="cudagraphs"), which needs no graph of operators',
            ) from error
        finally:
            call.inside = False
            self.engine.tracing = None  # where nothing is compiled (`TORCHDYNAMO_DISABLE`) the static callable set it

    def _tries(self, static: Static, kind: PassKind) -> Tries:
        """How a static callable is launched: `torch._dynamo.run` calls it as it is where no graph fits."""
        options = _without_our_guards(**self.options)
        if kind == "adaptor":
            options["backend"] = _proving(options["backend"])
        compiled: Static = torch.compile(static, fullgraph=True, **options)
        run = getattr(torch._dynamo, "run", None)
        return static if run is None else run(compiled), compiled

    def _make(self, call: UNetCall, pass_: Pass) -> Static:
        engine, adaptor, forward = self.engine, self.engine.chain[pass_.plan.index].adaptor, call.forward
        kind = pass_.kind

        def static(args: tuple[Any, ...], kwargs: dict[str, Any], cached: Cached, compiles: bool = True) -> Any:
            # in a graph the first is a constant: no guard; an adaptor pass that is not compiled has to be proved
            if not torch.compiler.is_dynamo_compiling() and not (compiles and kind == "full"):
                raise _NoGraphFits

            def adapt(captured: Mapping[str, torch.Tensor]) -> torch.Tensor:
                exit, given = cached
                assert exit is not None  # it is an adaptor pass
                assert given is not None
                adapted: torch.Tensor = stand_in.call(adaptor, stand_in.inputs(captured, exit, *given))
                return adapted if not isinstance(adapted, torch.Tensor) else stand_in.owned(adapted, exit)

            traced = engine.tracing = pass_.like(adapt if kind == "adaptor" else None, traced=True)
            traced.enter(args, kwargs)
            output = forward(*args, **kwargs)
            engine.tracing = None
            exits = {region: emitted.exit for region, emitted in traced.exits.items()}
            return output, exits, traced.entry, traced.others, traced.complete()

        return _with_code_of_its_own(static, f"{kind}_pass_{next(_NUMBERS)}")


class _Proved:
    """A compiled graph of adaptor passes: it runs once a pass that ran as it is has shown that it may.

    A graph is for one state of the UNet: in another one its Python may use what is skipped in another way.
    """

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run, self._proved = run, False

    def release(self) -> None:
        """From now on it runs."""
        self._proved = True

    def __call__(self, *inputs: Any) -> Any:
        if not self._proved:  # the code around it changes what the UNet counts after it has run: nothing has changed
            raise Unproved(self)
        return self._run(*inputs)


def _proving(backend: Any) -> Callable[..., _Proved]:
    """A backend of torch.compile whose graphs have to be proved."""

    def compile(graph: Any, inputs: Any, **given: Any) -> _Proved:
        if backend == "inductor" and "options" in given:  # as torch.compile names them
            given["config_patches"] = given.pop("options")
        return _Proved(torch._dynamo.lookup_backend(backend)(graph, inputs, **given))

    return compile


def _without_our_guards(mode: str | None, backend: Any, options: dict[str, Any] | None) -> dict[str, Any]:
    """The same for `torch.compile`, with no guards on pass and engine: while the callable lives they are the same.

    With them, the guards of an adaptor pass of SD v1.5 take 102 µs in the place of 87, cold 192 in the place of 162;
    those of a pass by hand take 81 and 157.
    """
    if mode not in (None, "default"):
        if backend != "inductor":
            return {"mode": mode, "backend": backend}
        options = torch._inductor.list_mode_options(mode)
    return {"backend": backend, "options": {"guard_filter_fn": _are_not_ours, **(options or {})}}


def _are_not_ours(guards: Sequence[Any]) -> list[bool]:
    """Which guards to keep: none on what `static` closes over, nor on which engine it is that patched modules ask."""
    return [
        not re.match(r"(pass_|engine)\b", guard.name)
        and not (guard.guard_type == "DUPLICATE_INPUT" and type(guard.value).__module__.startswith(__package__))
        for guard in guards
    ]


def let_go(static: dict[tuple[Any, ...], Any], signature: Hashable) -> None:
    """Remove what was made for calls of one signature; of all, if it is None."""
    for key in [key for key in static if signature is None or key[0] == signature]:
        del static[key]


def outcome_of(
    pass_: Pass,
    output: Any,
    exits: Mapping[int, torch.Tensor],
    entry: torch.Tensor | None,
    others: Mapping[str, torch.Tensor],
    complete: bool,
) -> Outcome:
    """The outcome of a pass that a static callable has run; whether its calls agreed was seen when it was made."""
    emitted = {region: Emitted(exit, version(exit)) for region, exit in exits.items()}
    return Outcome(output, pass_.kind, emitted, frozenset(), complete, entry, others)


def with_tensor_time(call: UNetCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with its time as a tensor on the sample's device: a number would be a constant of what is compiled."""
    signature, values = call.signature, call.arguments.values
    time = values.get(signature.time) if signature is not None and signature.time is not None else None
    if signature is None or time is None:
        return call.args, call.kwargs
    device = call.arguments.get(signature.sample).device
    if isinstance(time, torch.Tensor):
        if time.device == device:
            return call.args, call.kwargs
        lifted = time.to(device)
    elif isinstance(time, numbers.Integral):
        lifted = torch.full((), int(time), dtype=torch.int64, device=device)  # a kernel, no copy to wait for
    else:
        lifted = torch.full((), float(time), device=device)
    changed = [lifted if name == signature.time else value for name, value in values.items()]
    return tuple(changed[: len(call.args)]), dict(zip(call.kwargs, changed[len(call.args) :], strict=True))


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
