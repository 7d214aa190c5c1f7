"""Trace one call of a UNet into a `torch.fx.Graph` that also knows its module calls.

`torch.fx.symbolic_trace` gives up on most UNets (control flow on tensors, `len`, einops); running the call once and
recording it does not. The module calls are what skipping needs: "the k-th call of module M", with its nodes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from clockwork_hooks.errors import AmbiguousInputError, TraceError, first_line
from clockwork_hooks.graph.arguments import Arguments, Binder, find_sample, may_be_label, parameters_of, time_candidates
from clockwork_hooks.graph.operators import kind, node_macs, operator_name
from clockwork_hooks.graph.recorder import ModuleCall, Recorder, garbage_kept, specs_in

LIKE = ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like")
NEW = ("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided")
SHAPE_ONLY = frozenset(f"aten::{name}" for name in (*LIKE, *NEW))
FIRST_ONLY = frozenset({"aten::expand_as", "aten::view_as", "aten::reshape_as", "aten::type_as"})
PERIODIC = frozenset({"aten::sin", "aten::cos", "aten::log", "aten::log2", "aten::log1p"})


@dataclass(frozen=True)
class Trace:
    """One recorded call.

    Attributes:
        graph: the operators as a standard `torch.fx.Graph`; `NodeMeta` lists what the nodes' `meta` holds.
        nodes: all nodes by index, in the order in which they ran.
        calls: the module calls in order of their beginning; `calls[0]` is the root's.
        inputs: path of each tensor or number among the arguments → its placeholder.
        outputs: nodes of the tensors returned.
        sample: path of the noisy input.
        times: paths of the inputs that may be the time, best first.
        signature: shapes, dtypes and presence of the arguments: the trace holds for calls of this signature.
        model: class name of the root.

    Example:
        >>> import clockwork_hooks as ch
        >>> traced = ch.trace(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.SiLU()), torch.zeros(1, 3, 8, 8))
        >>> [call.path for call in traced.calls]
        ['', '0', '1']
        >>> traced.outputs[0].meta["shape"]
        (1, 8, 6, 6)
    """

    graph: fx.Graph
    nodes: tuple[fx.Node, ...]
    calls: tuple[ModuleCall, ...]
    inputs: Mapping[str, fx.Node]
    outputs: tuple[fx.Node, ...]
    sample: str
    times: tuple[str, ...]
    signature: tuple[Any, ...]
    model: str

    @functools.cached_property
    def macs(self) -> tuple[int, ...]:
        """MACs of each node, attention products counted, as `node_macs` gives them; worked out once."""
        return tuple(map(node_macs, self.nodes))

    @functools.cached_property
    def full_macs(self) -> int:
        """MACs of the whole call."""
        return sum(self.macs)

    @property
    def time(self) -> str | None:
        """Path of the time input; None where the UNet has none.

        Raises:
            AmbiguousInputError: several inputs may be the time.
        """
        if len(self.times) <= 1:
            return self.times[0] if self.times else None
        raise AmbiguousInputError(
            "the time must be one input, and several inputs may be it",
            seen={"model": self.model, "inputs that may be the time": ", ".join(self.times)},
            do=f'name it: time="{self.times[0]}"',
        )

    @property
    def context(self) -> tuple[str, ...]:
        """Paths of the other tensor inputs: text, masks, class labels, residuals."""
        others = {self.sample, *self.times[:1]}
        return tuple(path for path, node in self.inputs.items() if path not in others and "shape" in node.meta)

    @functools.cached_property
    def uncounted(self) -> tuple[str, ...]:
        """Names of the operators that may multiply and accumulate, and that nothing here can count."""
        return tuple(dict.fromkeys(operator_name(node) for node in self.nodes if kind(node) == "unknown"))

    @functools.cached_property
    def unread(self) -> tuple[str, ...]:
        """Paths of the tensor inputs that no operator reads, nor the output holds."""
        idle = {path: node for path, node in self.inputs.items() if "dtype" in node.meta and not node.users}
        beside = {source for node in self.nodes for source in node.meta.get("after", ())} if idle else set()
        beside |= {node.meta["was"] for node in self.nodes if "was" in node.meta} if idle else set()
        return tuple(path for path, node in idle.items() if node not in beside)

    @functools.cached_property
    def scratch(self) -> tuple[str, ...]:
        """Dotted paths of the buffers that the call overwrites before anything reads them."""
        pairs = ((node, list(node.users)) for node in self.nodes if node.op == "get_attr")
        return tuple(str(node.target) for node, users in pairs if len(users) == 1 and _overwrites(users[0], node))

    def ancestors(self, call: ModuleCall) -> Iterator[ModuleCall]:
        """The calls around `call`, innermost first, without the call itself."""
        while call.parent >= 0:
            call = self.calls[call.parent]
            yield call

    def happens(self, call: ModuleCall, skipped: Collection[int]) -> bool:
        """Does the call happen, itself skipped or not, where the calls of these indices are skipped?"""
        return all(around.index not in skipped for around in self.ancestors(call))

    @functools.cached_property
    def sources(self) -> tuple[tuple[int, ...], ...]:
        """Of each node, the indices of those whose values it needs."""
        return tuple(tuple([source.meta["index"] for source in sources(node)]) for node in self.nodes)

    @functools.cached_property
    def _origins(self) -> list[int]:
        """Of each node, the inputs that its value depends on, a bit each."""
        bits = [0] * len(self.nodes)
        for k, node in enumerate(self.inputs.values()):
            bits[node.meta["index"]] |= 1 << k  # one tensor may be two inputs
        for n, needed in enumerate(self.sources):
            for source in needed:
                bits[n] |= bits[source]
        return bits

    def origins(self, n: int) -> tuple[str, ...]:
        """Paths of the inputs that the value of the node of index `n` depends on; of an input its own."""
        return tuple(path for k, path in enumerate(self.inputs) if self._origins[n] >> k & 1)

    def reached(self, path: str) -> list[bool]:
        """Of each node, does its value depend on this input?"""
        bit = 1 << list(self.inputs).index(path)
        return [bool(bits & bit) for bits in self._origins]

    @functools.cached_property
    def carrying(self) -> set[fx.Node]:
        """The nodes whose values depend on the sample, which is one."""
        return set(itertools.compress(self.nodes, self.reached(self.sample)))

    def __str__(self) -> str:
        shape = "×".join(map(str, self.inputs[self.sample].meta["shape"]))
        return f"Trace of {self.model}: {len(self.nodes)} nodes, {len(self.calls)} module calls, {self.sample} {shape}"


def sources(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes whose *values* this node needs: shape-only operators such as `zeros_like` need none."""
    after: tuple[fx.Node, ...] = node.meta.get("after", ())
    if node.op != "call_function":
        return after
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        if schema.name in SHAPE_ONLY:
            return after
        if schema.name in FIRST_ONLY:
            return (*node.all_input_nodes[:1], *after)
    return (*node.all_input_nodes, *after)


def _overwrites(node: fx.Node, memory: fx.Node) -> bool:
    return node.target is torch.ops.aten.copy_.default and node.args[0] is memory and node.args[1] is not memory


def trace(unet: nn.Module, /, *args: Any, **kwargs: Any) -> Trace:
    """Run `unet(*args, **kwargs)` once and return what ran, as a graph.

    Works on any device, on meta without weights in memory; parameters, buffers, hooks, training flags and the random
    state are what they were.

    Args:
        unet: any `nn.Module`.
        *args: its arguments, as it is called in a sampling loop.
        **kwargs: likewise.

    Returns:
        The trace; `.graph` is a `torch.fx.Graph`.

    Raises:
        TraceError: `unet` is no module or has lazy ones that were never called, its forward does not take these
            arguments, none of them can be the sample, or the call itself failed on meta for want of a meta kernel.

    Example:
        >>> import clockwork_hooks as ch
        >>> print(ch.trace(torch.nn.Conv2d(3, 8, 3, device="meta"), torch.zeros(1, 3, 8, 8, device="meta")))
        Trace of Conv2d: 4 nodes, 1 module calls, input 1×3×8×8
    """
    return record(unet, args, kwargs)


def record(unet: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, time: str | None = None) -> Trace:
    """`trace`, with the name of the time input where the user gave it."""
    if not isinstance(unet, nn.Module):
        raise TraceError(
            "only an nn.Module can be traced", seen={"got": type(unet).__name__}, do="pass the UNet, not the pipeline"
        )
    if any(map(is_lazy, (*unet.parameters(), *unet.buffers()))):
        raise TraceError(
            "a UNet must have all its parameters before it is traced",
            seen={"model": type(unet).__name__, "parameters without a shape": "those of lazy modules"},
            do="call it once",
        )
    arguments = Binder(unet.forward)(args, kwargs)
    devices = {tensor.device for tensor in unet.parameters() if tensor.device.type == "cuda"}
    random = torch.random.fork_rng(devices=sorted(devices, key=str))
    with garbage_kept(), torch.inference_mode(), random, _unchanged(unet):
        try:
            with recording(unet, args, kwargs, arguments, restore=True) as recorder:
                unet(*args, **kwargs)
        except TypeError as error:
            _check_arguments(unet, args, kwargs, error)
            raise
        except RuntimeError as error:  # NotImplementedError is one
            if not _for_want_of_values(error):
                raise
            raise TraceError(
                "on the meta device every operator needs a meta kernel",
                seen={"model": type(unet).__name__, "error": first_line(error)},
                do="trace on a real device, or register a fake kernel: torch.library.register_fake",
            ) from error
    return finish(recorder, unet, arguments, time=time)


def _check_arguments(unet: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: TypeError) -> None:
    """Raise `TraceError` where the forward does not take these arguments."""
    takes = inspect.Signature(parameters_of(unet.forward))
    if not takes.parameters:  # of TorchScript, for example, nobody knows
        return
    try:
        takes.bind(*args, **kwargs)
    except TypeError as why:
        passed = [type(value).__name__ for value in args] + [f"{name}=" for name in kwargs]
        raise TraceError(
            "a UNet is analysed in one call, which needs all required arguments of its forward",
            seen={
                "forward": f"{type(unet).__name__}.forward({', '.join(takes.parameters)})",
                "passed": ", ".join(passed) or "nothing",
                "error": str(why),
            },
            do="pass the arguments of one call after the UNet, as your sampling loop does",
        ) from error


def _for_want_of_values(error: RuntimeError) -> bool:
    text = str(error).lower()
    return (
        "no fake impl" in text or "meta tensor" in text or (isinstance(error, NotImplementedError) and "meta" in text)
    )


@contextlib.contextmanager
def recording(
    unet: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    arguments: Arguments | None = None,
    *,
    restore: bool = False,
) -> Iterator[Recorder]:
    """Record the one call of `unet` that the block makes; `restore` takes back what it writes to parameters."""
    recorder = Recorder(unet, arguments or Binder(unet.forward)(args, kwargs), module_paths(unet))
    recorder.start(args, kwargs, frame=sys._getframe(2), outside=True, save=restore)  # the block's frame
    try:
        yield recorder
    finally:
        recorder.stop()
        for weight, before in recorder.saved:
            weight.copy_(before)


@contextlib.contextmanager
def _unchanged(unet: nn.Module) -> Iterator[None]:
    """Take back what a call makes and counts: buffers, submodules, caches (as inference tensors of no use later)."""
    buffers = [(buffer, buffer.clone()) for buffer in unet.buffers() if buffer.device.type != "meta"]
    before = [(vars(module), dict(vars(module))) for module in unet.modules()]
    inner = [value for _, seen in before for value in seen.values() if isinstance(value, dict)]
    before += [(value, dict(value)) for value in inner]
    try:
        yield
    finally:
        for now, then in before:
            if now.keys() != then.keys() or any(now[name] is not then[name] for name in then):
                now.clear()
                now.update(then)
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def finish(recorder: Recorder, unet: nn.Module, arguments: Arguments, *, time: str | None = None) -> Trace:
    """Turn a stopped recorder into a trace: find outputs, sample and time."""
    bindings = recorder.bindings
    returned = specs_in(recorder.calls[0].output)
    sample = find_sample(arguments, [spec.shape for spec in returned])
    if sample is None:
        raise TraceError(
            "a UNet's call has a sample: a tensor with batch, channel and at least one spatial axis",
            seen={"model": type(unet).__name__, "arguments": ", ".join(bindings.inputs) or "none"},
            do="pass the sample as an argument of the UNet's call",
        )
    outputs = [spec.node for spec in returned]
    bindings.graph.output(tuple(outputs))
    times = time_candidates(arguments, sample=sample, time=time)
    traced = Trace(
        bindings.graph,
        tuple(bindings.nodes),
        tuple(recorder.calls),
        bindings.inputs,
        tuple(outputs),
        sample,
        times,
        arguments.signature,
        type(unet).__name__,
    )
    if len(times) > 1:
        return replace(traced, times=_periodic(traced) or times)
    doubtful = time is None and any(may_be_label(path, arguments.get(path)) for path in times)
    return replace(traced, times=_periodic(traced)) if doubtful else traced


def _periodic(traced: Trace) -> tuple[str, ...]:
    """Those that feed sin, cos or log without the sample's help, as a time does, and a class label does not."""

    def periodic(path: str) -> bool:
        reached = set(itertools.compress(traced.nodes, traced.reached(path)))
        names = (getattr(getattr(node.target, "_schema", None), "name", "") for node in reached - traced.carrying)
        return not PERIODIC.isdisjoint(names)

    return tuple(path for path in traced.times if periodic(path))


def modules_of(unet: nn.Module) -> dict[str, nn.Module]:
    """The registered modules by their first dotted path, without torch.compile's `_orig_mod` on the way to it."""
    return {path.replace("_orig_mod.", ""): module for path, module in unet.named_modules()}


def module_paths(unet: nn.Module) -> dict[int, str]:
    """These paths by the modules' ids."""
    return {id(module): path for path, module in modules_of(unet).items()}
