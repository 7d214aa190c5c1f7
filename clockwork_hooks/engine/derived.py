"""A signature that differs from a recorded one in sizes alone: its plan is taken over, and proved by what calls do.

Control flow may depend on sizes, so nothing is taken on trust. The first call of such a signature runs in full, and the
module calls in it are compared with the recorded ones, one by one; they give the sizes. The first adaptor pass runs on
placeholders that pass themselves on (taint.py): what is made of one is one, whatever operators the UNet puts between
its modules. If none of them reaches the output, nor the adaptor, nor memory that is real, the output has come of the
inputs and of the exit alone, and so will that of the passes after it. Any doubt: the pass is run again in full, and the
signature is recorded like a first one.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode  # public, though its module's name is not

from clockwork_hooks._tree import address, leaves, map_leaves, tensors
from clockwork_hooks.engine.chain import RegionUse, Signature
from clockwork_hooks.errors import ArgumentError
from clockwork_hooks.graph.arguments import Arguments, time_candidates
from clockwork_hooks.graph.recorder import eager, written_by
from clockwork_hooks.graph.scaling import Scaling
from clockwork_hooks.graph.tracing import Trace
from clockwork_hooks.regions.cut import CutPlan, Port, SkippedCall, Slot

__all__ = ["Derived", "Recorded", "form"]


def form(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """A call's key without its sizes: equal for calls that differ in these alone."""
    arguments, *modes = key
    return (*(len(part) if type(part) is torch.Size else part for part in arguments), *modes)


class Recorded:
    """What of a recorded signature holds at other sizes.

    Args:
        signature: as recorded.
        trace: of its first call.
        scaling: of the trace.
    """

    def __init__(self, signature: Signature, scaling: Scaling) -> None:
        self.signature, self.scaling = signature, scaling
        plans = [use.plan for use in signature.regions]
        self.outputs = {scaling.at[call.path, call.ordinal] for plan in plans for call in plan.skipped}
        ports = [port for plan in plans for port in plan.ports.values() if port.path]
        self.outputs |= {scaling.at[port.path, port.ordinal] for port in ports if port.side == "output"}
        self.inputs = {scaling.at[port.path, port.ordinal] for port in ports if port.side == "input"}

    @classmethod
    def of(cls, signature: Signature, trace: Trace) -> Recorded | None:
        """None where something was recorded that may be another at other sizes, and that calls would not show.

        So are arguments that are no conditions because of what operators did with them (they were only added, or not
        read), operators without a formula for their MACs, and kernels that no dispatcher sees.
        """
        if not signature.regions or trace.unread or any(use.region.residuals for use in signature.regions):
            return None
        if any(map(_unseen, trace.nodes)):
            return None
        scaling = Scaling.of(trace)
        return None if scaling is None else cls(signature, scaling)

    def fits(self, arguments: Arguments, time: str | None) -> bool:
        """Is the time of this call the same argument, and told by its name?"""
        try:
            times = time_candidates(arguments, sample=self.signature.sample, time=time)
        except ArgumentError:
            return False
        return times == (() if self.signature.time is None else (self.signature.time,))


@dataclass(slots=True)
class Derived(Signature):
    """A signature that differs in sizes alone from a recorded one; until it is `proved`, its plan is that one's.

    Attributes:
        source: the recorded one.
        seen: have the module calls of a full pass been compared?
    """

    source: Recorded | None = None
    seen: bool = False

    @classmethod
    def of(cls, source: Recorded) -> Derived:
        """The signature of a first call of other sizes; what calls have shown of the recorded one is not taken over."""
        before = source.signature
        uses = tuple(RegionUse(use.region, use.plan, 0, name=use.name) for use in before.regions)
        return cls(0, before.time, before.sample, uses, uncounted=before.uncounted, source=source, traced=False)

    @contextlib.contextmanager
    def watching(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[_Watch]:
        """Compare the module calls that the block makes in this thread."""
        assert self.source is not None
        watch = _Watch(self.source, args, kwargs)
        handle = register_module_forward_hook(watch, with_kwargs=True)
        eager.enter()
        try:
            with watch.left:
                yield watch
        finally:
            eager.leave()
            handle.remove()
            # torch forgets to take this off, and warns of it ever after
            getattr(nn_module, "_global_forward_hooks_with_kwargs", {}).pop(handle.id, None)


class Left(TorchDispatchMode):
    """What of the tensors that a call makes of its inputs outlives it: a module may read it in the next step.

    A skipped module leaves nothing behind, so that what it left in the step before would be stale.

    Args:
        inputs: of the call.
    """

    def __init__(self, inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._inputs = {id(tensor) for tensor in tensors(inputs)}
        self._made: dict[int, weakref.ref[torch.Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        of_inputs = any(id(one) in self._inputs or self._is_made(one) for one in tensors((args, kwargs)))
        out = func(*args, **kwargs)
        for one in (*tensors(out), *written_by(func, args, kwargs)) if of_inputs else ():
            if id(one) not in self._inputs:
                self._made[id(one)] = weakref.ref(one)
        return out

    def _is_made(self, tensor: torch.Tensor) -> bool:
        made = self._made.get(id(tensor))
        return made is not None and made() is tensor

    def beside(self, unet: nn.Module, values: Any) -> bool:
        """Is anything left, beside these values? Where autograd keeps tensors too, only what modules hold counts."""
        known = {address(tensor.untyped_storage()) for tensor in tensors(values) if _is_plain(tensor)}
        if torch.is_grad_enabled():
            held = [tensor for module in unet.modules() for tensor in tensors(dict(vars(module)))]
            left = [tensor for tensor in held if self._is_made(tensor)]
        else:
            left = [tensor for tensor in (made() for made in self._made.values()) if tensor is not None]
        return any(not _is_plain(tensor) or address(tensor.untyped_storage()) not in known for tensor in left)


class _Watch:
    """A hook on all modules: are they called as recorded, and what do they return at these sizes?"""

    def __init__(self, recorded: Recorded, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.left = Left((args, kwargs))
        self._recorded, self._arguments = recorded, (args, kwargs)
        self._thread = threading.get_ident()
        self._shapes: list[tuple[int, ...]] = []
        self._outputs: dict[int, Any] = {}
        self._inputs: dict[int, list[Any]] = {}
        self.differs = False

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.differs or threading.get_ident() != self._thread:
            return
        k, modules = len(self._shapes), self._recorded.scaling.modules
        if k == len(modules) or (modules[k] and modules[k] != id(module)):
            self.differs = True
            return
        first = output if isinstance(output, torch.Tensor) else next(iter(tensors(output)), None)
        self._shapes.append(() if first is None else first.shape)
        if k in self._recorded.outputs:
            self._outputs[k] = map_leaves(_slot, output)
        if k in self._recorded.inputs:
            self._inputs[k] = [_slot(leaf) for _, leaf in leaves((args, kwargs))]

    def apply(self, signature: Signature) -> bool:
        """Give a signature the sizes that were seen; False, and nothing is done, if calls were others than recorded."""
        recorded = self._recorded
        if self.differs or len(self._shapes) != len(recorded.scaling.modules):
            return False
        full = recorded.scaling.macs(self._shapes)
        pairs = list(zip(signature.regions, recorded.signature.regions, strict=True))
        plans = [self._plan(use.plan) for _, use in pairs]
        skipped = [self._skipped_macs(use.plan) for _, use in pairs]
        if full is None or None in plans or None in skipped:
            return False
        signature.full_macs = full
        for use, plan, macs in zip(signature.regions, plans, skipped, strict=True):
            use.plan, use.rest_macs = plan or use.plan, full - (macs or 0)
        return True

    def _skipped_macs(self, plan: CutPlan) -> int | None:
        scaling = self._recorded.scaling
        inside = frozenset[int]().union(*(scaling.inside(call.path, call.ordinal) for call in plan.skipped))
        return scaling.macs(self._shapes, inside)

    def _plan(self, plan: CutPlan) -> CutPlan | None:
        """The plan with these sizes; None where a call returns something else than the recorded one."""
        skipped = [self._skipped(call) for call in plan.skipped]
        ports = {name: self._port(port) for name, port in plan.ports.items()}
        if None in skipped or None in ports.values():
            return None
        return replace(
            plan, skipped=tuple(filter(None, skipped)), ports={n: p for n, p in ports.items() if p is not None}
        )

    def _skipped(self, call: SkippedCall) -> SkippedCall | None:
        output = self._outputs[self._recorded.scaling.at[call.path, call.ordinal]]
        recorded, now = ([leaf for _, leaf in leaves(value)] for value in (call.output, output))
        if len(recorded) != len(now) or not all(map(_alike, recorded, now)):
            return None
        flags = iter([leaf for leaf in recorded if isinstance(leaf, Slot)])

        def flagged(leaf: Any) -> Any:
            if not isinstance(leaf, Slot):
                return leaf
            before = next(flags)
            return replace(leaf, exit=before.exit, written=before.written)

        return replace(call, output=map_leaves(flagged, output))

    def _port(self, port: Port) -> Port | None:
        if not port.path:
            values = [_slot(leaf) for _, leaf in leaves(self._arguments)]
        else:
            k = self._recorded.scaling.at[port.path, port.ordinal]
            values = self._inputs[k] if port.side == "input" else [leaf for _, leaf in leaves(self._outputs[k])]
        leaf = values[port.leaf] if port.leaf < len(values) else None
        same = isinstance(leaf, Slot) and len(leaf.shape) == len(port.shape) and leaf.dtype == port.dtype
        return replace(port, shape=leaf.shape) if same and isinstance(leaf, Slot) else None


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


def _unseen(node: fx.Node) -> bool:
    """Is it a tensor that code filled which no dispatcher sees?"""
    after = node.meta.get("after", ())
    return node.target is torch.ops.aten.alias.default and not all("was" in one.meta for one in after)


def _slot(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor) or leaf.is_nested:
        return leaf
    return Slot(tuple(leaf.shape), leaf.dtype, leaf.device)


def _alike(recorded: Any, now: Any) -> bool:
    """Are these leaves of two calls' outputs the same but for sizes?"""
    if not isinstance(recorded, Slot) or not isinstance(now, Slot):
        return type(recorded) is type(now)
    return len(recorded.shape) == len(now.shape) and (recorded.dtype, recorded.device) == (now.dtype, now.device)
