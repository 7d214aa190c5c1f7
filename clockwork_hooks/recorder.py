"""Records one call of a module as nodes of a `torch.fx.Graph`, while the call runs.

Two observers work together: a `TorchDispatchMode` sees every operator with its real tensors, and global module hooks
see where each module call begins and ends. Nothing of the module is touched, and no activation is kept alive: tensors
are known by weak reference and by their storage.
"""

from __future__ import annotations

import operator
import sys
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from clockwork_hooks.inputs import Arguments, is_number
from clockwork_hooks.tree import Leaf, map_leaves, tensors

__all__ = ["ModuleCall", "Recorder", "TensorSpec"]

_LOCK = threading.RLock()
_FACTORIES = (
    torch.ops.aten.full.default,
    torch.ops.aten.full_like.default,
    torch.ops.aten.new_full.default,
    torch.ops.aten.scalar_tensor.default,
    torch.ops.aten.fill_.Scalar,
)
_PLAIN = (str, int, float, bool, complex, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout)


@dataclass(frozen=True, slots=True)
class TensorSpec(Leaf):
    """What stands for a tensor once it is gone: the node that produced it, its shape, dtype and device."""

    node: fx.Node
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(slots=True)
class ModuleCall:
    """One call of one module.

    Attributes:
        index: number of the call in the trace; 0 is the root's.
        path: dotted path of the module under the root ("" for the root), None for a module that is not registered.
        scope: the path, or that of the nearest registered module around.
        kind: class name.
        ordinal: how many calls of the same module came before.
        parent: index of the enclosing call, -1 for the root.
        first, last: the call's nodes are those with first <= index < last.
        inputs: the arguments, (args, kwargs), with every tensor replaced by its `TensorSpec`.
        output: what the call returned, likewise.
    """

    index: int
    path: str | None
    scope: str
    kind: str
    ordinal: int
    parent: int
    first: int
    last: int = -1
    inputs: Any = ((), {})
    output: Any = None
    module: int = field(default=0, repr=False)


class Recorder(TorchDispatchMode):
    """Records between `start()` and `stop()`; both are called in the thread that calls the module."""

    def __init__(self, root: nn.Module, arguments: Arguments, paths: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.nodes: list[fx.Node] = []
        self.calls: list[ModuleCall] = []
        self.inputs: dict[str, fx.Node] = {}
        self.kept: dict[int, torch.Tensor] = {}
        self._root = root
        self._paths = paths
        self._stack: list[ModuleCall] = []
        self._ordinals: dict[int, int] = {}
        self._tensors: dict[int, tuple[weakref.ref[torch.Tensor], fx.Node]] = {}
        self._aliases: dict[tuple[Any, ...], fx.Node] = {}
        self._storages: dict[int, StorageWeakRef] = {}
        self._owners: dict[int, fx.Node] = {}
        self._writes: dict[int, fx.Node] = {}
        self._handles: list[Any] = []
        self._frame: FrameType | None = None
        self._thread = -1
        self._floor = sys.maxsize
        self._rank = 4
        self._numbers: list[tuple[Any, fx.Node]] = []
        self._weights = {
            id(tensor): (weakref.ref(tensor), name)
            for walk in (root.named_parameters, root.named_buffers)
            for name, tensor in walk(remove_duplicate=False)
        }
        for path, leaf in arguments.leaves():
            if isinstance(leaf, torch.Tensor) or is_number(leaf):
                node = self.inputs[path] = self._add("placeholder", "".join(c if c.isalnum() else "_" for c in path))
                node.meta["input"] = path
                if isinstance(leaf, torch.Tensor):
                    self._bind(leaf, node)
                else:
                    self._numbers.append((leaf, node))

    # -- begin and end -------------------------------------------------------------------------------------------

    def start(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, frame: FrameType, keep: int = 0) -> None:
        """Begin; the root's call is open from here on.

        Args:
            args, kwargs: the root's arguments.
            frame: the one that runs the root's call; once it is off the stack, recording was abandoned.
            keep: spatial rank of the sample, to keep a few likely exits alive (`kept`); 0 keeps none.
        """
        _LOCK.acquire()
        self._thread = threading.get_ident()
        self._frame = frame
        self._rank = keep
        self._open(self._root)
        self._stack[0].inputs = self._specs((args, dict(kwargs)))
        self._handles = [
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after, with_kwargs=True),
        ]
        self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self, output: Any = None) -> None:
        """End, whatever happened in between; idempotent."""
        if self._thread < 0:
            return
        try:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        finally:
            for handle in self._handles:
                handle.remove()
            while self._stack:
                self._close(output if len(self._stack) == 1 else None)
            self._thread, self._frame = -1, None
            self._tensors.clear()
            self._aliases.clear()
            self._storages.clear()
            _LOCK.release()

    def _abandoned(self) -> bool:
        """KeyboardInterrupt passes torch's always-called hooks by: has the root's frame left the stack?"""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is None and _get_current_dispatch_mode_stack()[-1] is self

    # -- module calls --------------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() != self._thread:
            return
        if self._abandoned():
            self.stop()
            return
        if module is self._root and len(self.calls) == 1 == len(self._stack):
            return
        self._open(module)
        self._stack[-1].inputs = (self._specs(args), {})

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if threading.get_ident() != self._thread or all(call.module != id(module) for call in self._stack):
            return
        while self._stack[-1].module != id(module):
            self._close(None)
        call = self._stack[-1]
        if kwargs:
            call.inputs = (call.inputs[0], self._specs(dict(kwargs), before=call.first))
        self._close(output)
        if self._rank and call.path is not None:
            self._keep(output)

    def _open(self, module: nn.Module) -> None:
        ordinal = self._ordinals.get(id(module), 0)
        self._ordinals[id(module)] = ordinal + 1
        path = "" if module is self._root else self._paths.get(id(module))
        parent, scope = (self._stack[-1].index, self._stack[-1].scope) if self._stack else (-1, "")
        scope = scope if path is None else path
        call = ModuleCall(len(self.calls), path, scope, type(module).__name__, ordinal, parent, len(self.nodes))
        call.module = id(module)
        self.calls.append(call)
        self._stack.append(call)

    def _close(self, output: Any) -> None:
        call = self._stack.pop()
        call.output = self._specs(output)
        call.last = len(self.nodes)

    def _specs(self, value: Any, before: int | None = None) -> Any:
        def spec(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            node = self._node(leaf)
            while before is not None and node.meta["index"] >= before and "was" in node.meta:
                node = node.meta["was"]
            return TensorSpec(node, tuple(leaf.shape), leaf.dtype, leaf.device)

        return map_leaves(spec, value)

    def _keep(self, output: Any) -> None:
        """Keep the first few outputs of each size on the way up: the region's exit is likely among them."""
        if not isinstance(output, torch.Tensor) or output.ndim < max(3, self._rank + 1):
            return
        size = output.shape[2:].numel()
        if size <= self._floor:
            self._floor = size
            self.kept.clear()
        elif sum(tensor.shape[2:].numel() == size for tensor in self.kept.values()) < 3:
            self.kept.setdefault(self._node(output).meta["index"], output)

    # -- operators -----------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        after: set[fx.Node] = set()
        node = self._add("call_function", func, self._lift(args, after), self._lift(kwargs, after))
        if self._numbers and func in _FACTORIES:
            after.update(source for number, source in self._numbers if number in args)
        if after:
            node.meta["after"] = tuple(after.difference(node.all_input_nodes))
        written = _written(func, args, kwargs)
        for tensor in written:
            self._write(tensor, node)
        if isinstance(out, torch.Tensor):
            if all(out is not tensor for tensor in tensors((args, kwargs))):  # contiguous, to, dropout may return self
                self._bind(out, node)
            node.meta.update(shape=tuple(out.shape), dtype=out.dtype, device=out.device)
        elif isinstance(out, (tuple, list)):
            for k, item in enumerate(out):
                if isinstance(item, torch.Tensor):
                    self._bind(item, self._add("call_function", operator.getitem, (node, k)))
        return out

    def _add(self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs or {})
        call = self._stack[-1] if self._stack else None
        node.meta.update(index=len(self.nodes), call=call.index if call else 0, module=call.scope if call else "")
        self.nodes.append(node)
        return node

    def _lift(self, value: Any, after: set[fx.Node]) -> Any:
        """The argument with nodes for tensors; a tensor written through another view also comes `after` the write."""
        if isinstance(value, torch.Tensor):
            node = self._node(value)
            last = self._writes.get(self._storage(value)) if self._writes else None
            if last is not None and last.meta["index"] > node.meta["index"]:
                after.add(last)
            return node
        if isinstance(value, (list, tuple)):
            return tuple(self._lift(item, after) for item in value)
        if isinstance(value, dict):
            return {key: self._lift(item, after) for key, item in value.items()}
        return value if isinstance(value, _PLAIN) else None

    # -- which node is this tensor? ------------------------------------------------------------------------------

    def _storage(self, tensor: torch.Tensor) -> int:
        """A number that names the tensor's storage as long as we record; 0 where it has none."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return 0
        key: int = storage._cdata
        if key not in self._storages:
            self._storages[key] = StorageWeakRef(storage)
        return key

    def _alias(self, tensor: torch.Tensor) -> tuple[Any, ...] | None:
        storage = self._storage(tensor)
        return (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype) if storage else None

    def _bind(self, tensor: torch.Tensor, node: fx.Node) -> None:
        node.meta.update(shape=tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device)
        self._tensors[id(tensor)] = (weakref.ref(tensor), node)
        if alias := self._alias(tensor):
            self._aliases[alias] = node
            node.meta["storage"] = alias[0]
            self._owners.setdefault(alias[0], node)

    def _write(self, tensor: torch.Tensor, node: fx.Node) -> None:
        """An in-place operator: its node is what the tensor is from now on, and what other views come after."""
        node.meta["was"] = self._node(tensor)
        self._bind(tensor, node)
        if storage := self._storage(tensor):
            self._writes[storage] = node

    def _node(self, tensor: torch.Tensor) -> fx.Node:
        known = self._tensors.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        alias = self._alias(tensor)
        if alias is not None and alias in self._aliases:
            return self._aliases[alias]
        weight = self._weights.get(id(tensor))
        if weight is not None and weight[0]() is tensor:
            node = self._add("get_attr", weight[1])
        elif alias is not None and alias[0] in self._owners:
            view = (self._owners[alias[0]], tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())
            node = self._add("call_function", torch.ops.aten.as_strided.default, view)
        else:
            node = self._constant(tensor)
        self._bind(tensor, node)
        return node

    def _constant(self, tensor: torch.Tensor) -> fx.Node:
        """A tensor from outside the call. `torch.tensor([t])` hides an int time in one: the value links them again."""
        with self.graph.inserting_before(next(iter(self.graph.nodes), None)):
            node = self._add("placeholder", f"constant_{len(self.nodes)}")
        node.meta["constant"] = True
        if self._numbers and tensor.numel() == 1 and tensor.device.type == "cpu":
            value = tensor.detach().item()
            node.meta["after"] = tuple(source for number, source in self._numbers if number == value)
        return node


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensor arguments that the operator writes to, by its schema."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    written = []
    for k, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += tensors(args[k] if k < len(args) else kwargs.get(argument.name))
    return written
