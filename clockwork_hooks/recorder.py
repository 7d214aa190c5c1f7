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
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

from clockwork_hooks.inputs import Arguments, is_number
from clockwork_hooks.tree import Leaf, map_leaves, tensors

__all__ = ["ModuleCall", "Recorder", "TensorSpec"]

_ALIAS = torch.ops.aten.alias.default
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
        self.saved: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._root = root
        self._paths = paths
        self._stack: list[ModuleCall] = []
        self._ordinals: dict[int, int] = {}
        self._tensors: dict[int, tuple[weakref.ref[torch.Tensor], fx.Node]] = {}
        self._views: dict[int, dict[tuple[Any, ...], fx.Node]] = {}
        self._shared: dict[int, set[int]] = {}
        self._storages: dict[int, StorageWeakRef] = {}
        self._owners: dict[int, fx.Node] = {}
        self._owned: dict[int, torch.Tensor] = {}
        self._writes: dict[int, fx.Node] = {}
        self._handles: list[Any] = []
        self._frame: FrameType | None = None
        self._thread = -1
        self._caller = threading.current_thread()
        self._outside = False
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

    def start(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        frame: FrameType,
        keep: int = 0,
        outside: bool = False,
        save: bool = False,
    ) -> None:
        """Begin; the root's call is open from here on.

        Args:
            args, kwargs: the root's arguments.
            frame: the one that runs the root's call; once it is off the stack, recording was abandoned.
            keep: spatial rank of the sample, to keep a few likely exits alive (`kept`); 0 keeps none.
            outside: the root is yet to be called; else one of its own pre-hooks is what calls us.
            save: keep a copy of every parameter that the call writes to (`saved`).
        """
        self._outside = outside
        self._owned = _owners(self._root) if save else {}
        self._thread, self._caller = threading.get_ident(), threading.current_thread()
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
            self._leave()
        finally:
            for handle in self._handles:
                handle.remove()
                _global_forward_hooks_with_kwargs.pop(handle.id, None)  # torch forgets it, and warns of it ever after
            while self._stack:
                self._close(output if len(self._stack) == 1 else None)
            self._thread, self._frame = -1, None
            self._tensors.clear()
            self._views.clear()
            self._shared.clear()
            self._storages.clear()

    def _leave(self) -> None:
        """Take this mode off the thread's stack, and no other: after an interrupt there may be some above it."""
        if not any(mode is self for mode in _get_current_dispatch_mode_stack()):
            return
        above = []
        while (mode := _get_current_dispatch_mode_stack()[-1]) is not self:
            above.append(mode)
            _pop_mode()
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        for mode in reversed(above):
            _push_mode(mode)

    def _abandoned(self) -> bool:
        """KeyboardInterrupt passes torch's always-called hooks by: has the root's frame left the stack?"""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is None

    # -- module calls --------------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() != self._thread:
            if not self._caller.is_alive():
                self.stop()
            return
        if self._abandoned():
            self.stop()
            return
        if self._outside and module is self._root:
            self._outside = False
            return
        self._open(module)
        self._stack[-1].inputs = (self._specs(args), {})

    def _after(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        """Called with (kwargs, output); with the output alone where another thread sees us half registered."""
        if threading.get_ident() != self._thread or all(call.module != id(module) for call in self._stack):
            return
        while self._stack[-1].module != id(module):
            self._close(None)
        call = self._stack[-1]
        kwargs, output = rest
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
            if not isinstance(leaf, torch.Tensor) or is_lazy(leaf):
                return leaf
            node = self._node(leaf) if before is None else self._earlier(leaf, before)
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
        if self._abandoned():
            return func(*args, **kwargs)
        written = _written(func, args, kwargs)
        for tensor in written if self._owned else ():
            self._save(tensor)
        out = func(*args, **kwargs)
        node = self._add("call_function", func, self._lift(args), self._lift(kwargs))
        if self._numbers and func in _FACTORIES:
            given = [value for value in args if is_number(value)]
            node.meta["after"] = tuple(source for number, source in self._numbers if number in given)
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

    def _lift(self, value: Any) -> Any:
        """The argument with nodes for tensors."""
        if isinstance(value, torch.Tensor):
            return None if is_lazy(value) else self._node(value)
        if isinstance(value, (list, tuple)):
            return tuple(map(self._lift, value))
        if isinstance(value, dict):
            return {key: self._lift(item) for key, item in value.items()}
        return value if isinstance(value, _PLAIN) else None

    def _save(self, tensor: torch.Tensor) -> None:
        """Copy the parameter that is about to be written to for the first time."""
        weight = self._owned.pop(self._storage(tensor), None)
        if weight is not None:
            self.saved.append((weight, weight.clone()))

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

    def _bind(self, tensor: torch.Tensor, node: fx.Node) -> None:
        node.meta.update(shape=tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device)
        self._tensors[id(tensor)] = (weakref.ref(tensor), node)
        if storage := self._storage(tensor):
            self._views.setdefault(storage, {})[_view(tensor)] = node
            self._shared.setdefault(storage, set()).add(id(tensor))
            node.meta["storage"] = storage
            self._owners.setdefault(storage, node)

    def _write(self, tensor: torch.Tensor, node: fx.Node) -> None:
        """An in-place operator: its node is what the tensor is from now on; other views become nodes of their own."""
        node.meta["was"] = self._node(tensor)
        storage = self._storage(tensor)
        self._views.pop(storage, None)
        shared = self._shared.pop(storage, set())
        self._bind(tensor, node)
        if not storage:
            return
        self._writes[storage] = node
        for key in shared - {id(tensor)}:
            ref, before = self._tensors[key]
            other = ref()
            if other is not None and self._storage(other) == storage:
                now = self._add("call_function", _ALIAS, (before,))
                now.meta["after"] = (node,)
                self._bind(other, now)

    def _earlier(self, tensor: torch.Tensor, before: int) -> fx.Node:
        """The node that the tensor was before the node of index `before`."""
        node = self._node(tensor)
        while node.meta["index"] >= before:
            if "was" in node.meta:
                node = node.meta["was"]
            elif node.target is _ALIAS and "after" in node.meta:
                node = node.args[0]  # type: ignore[assignment]
            else:
                break
        return node

    def _node(self, tensor: torch.Tensor) -> fx.Node:
        known = self._tensors.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        storage = self._storage(tensor)
        same = self._views.get(storage, {}).get(_view(tensor))
        if same is not None:
            return same
        weight = self._weights.get(id(tensor))
        if weight is not None and weight[0]() is tensor:
            node = self._add("get_attr", weight[1])
        elif storage in self._owners:
            view = (self._owners[storage], tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())
            node = self._add("call_function", torch.ops.aten.as_strided.default, view)
            if storage in self._writes:
                node.meta["after"] = (self._writes[storage],)
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
            with torch._C._DisableTorchDispatch():
                value = tensor.detach().item()
            node.meta["after"] = tuple(source for number, source in self._numbers if number == value)
        return node


def _view(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What tells the views of one storage apart; none has this key where there is no storage."""
    try:
        return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
    except (NotImplementedError, RuntimeError):
        return ()


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


def _owners(root: nn.Module) -> dict[int, torch.Tensor]:
    """Storage → the parameter in it, where there is one in memory."""
    return {
        tensor.untyped_storage()._cdata: tensor
        for tensor in root.parameters()
        if tensor.layout == torch.strided and tensor.device.type != "meta" and not is_lazy(tensor)
    }
