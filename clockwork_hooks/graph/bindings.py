"""Which node of the graph is this tensor? It is known by weak reference and by its storage, never kept alive."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from clockwork_hooks._tree import Leaf, address, held, leaves, map_leaves
from clockwork_hooks.graph.arguments import Arguments, is_number

__all__ = ["Bindings", "NodeMeta", "TensorSpec", "describe"]

_ALIAS = torch.ops.aten.alias.default
_BLANK = frozenset(
    f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)
_PLAIN = (str, int, float, bool, complex, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout)


class NodeMeta(TypedDict, total=False):
    """What `node.meta` of a recorded graph holds: every key that the recorder writes, and when it does.

    Attributes:
        index: number of the node in the order in which the operators ran; `trace.nodes[index]` is the node. Always.
        call: index of the module call that the node belongs to. Always.
        module: dotted path of that call's module, "" for the root; of the nearest registered one around it. Always.
        shape: of the node's tensor; missing where there are several outputs, and where the tensor is nested.
        dtype: of the node's tensor.
        device: of the node's tensor.
        storage: number of the tensor's storage while recording; nodes with the same one share memory.
        input: path of the argument that a placeholder is: "sample", "added_cond_kwargs.time_ids".
        nested: True where the tensor's rows have different lengths.
        constant: True for a placeholder of a tensor that is no argument: it was made outside of the call.
        was: of an in-place operator, the node that the tensor was before it.
        after: nodes that must come first though they are no argument: writes through another view, a number that
            became a tensor, what code filled that nobody saw.
    """

    index: int
    call: int
    module: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    storage: int
    input: str
    nested: bool
    constant: bool
    was: fx.Node
    after: tuple[fx.Node, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec(Leaf):
    """What stands for a tensor once it is gone: its node, shape (of a nested tensor none), dtype and device."""

    node: fx.Node
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Bindings:
    """The graph as it grows, and the tensors that its nodes stand for.

    Attributes:
        graph: the graph.
        nodes: its nodes by index.
        inputs: path of each tensor or number among the arguments → its placeholder.
        numbers: the numbers among the arguments, each with its placeholder.
    """

    def __init__(self, root: nn.Module, arguments: Arguments) -> None:
        self.graph = fx.Graph()
        self.nodes: list[fx.Node] = []
        self.inputs: dict[str, fx.Node] = {}
        self.numbers: list[tuple[Any, fx.Node]] = []
        self._call, self._module = 0, ""
        self._tensors: dict[int, tuple[weakref.ref[torch.Tensor], fx.Node]] = {}
        self._views: dict[int, dict[tuple[Any, ...], fx.Node]] = {}
        self._shared: dict[int, set[int]] = {}
        self._storages: dict[int, Any] = {}
        self._owners: dict[int, fx.Node] = {}
        self._writes: dict[int, fx.Node] = {}
        self._blank: set[int] = set()
        self._weights = {
            id(tensor): (weakref.ref(tensor), name)
            for walk in (root.named_parameters, root.named_buffers)
            for name, tensor in walk(remove_duplicate=False)
        }
        for path, leaf in arguments.leaves():
            if isinstance(leaf, torch.Tensor) or is_number(leaf):
                node = self.inputs[path] = self.add("placeholder", "".join(c if c.isalnum() else "_" for c in path))
                node.meta["input"] = path
                if isinstance(leaf, torch.Tensor):
                    self.bind(leaf, node)
                else:
                    self.numbers.append((leaf, node))

    def within(self, call: int, module: str) -> None:
        """The nodes that come belong to this module call, of a module at this dotted path."""
        self._call, self._module = call, module

    def forget(self) -> None:
        """Let go of every tensor: nothing more will be recorded."""
        self._tensors.clear()
        self._views.clear()
        self._shared.clear()
        self._storages.clear()

    def add(self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> fx.Node:
        """Append a node to the graph."""
        node = self.graph.create_node(op, target)
        if args:  # put in afterwards: `create_node` would walk them once more, a sixth of what recording takes
            node.args = args
        if kwargs:
            node.kwargs = kwargs
        node.meta.update(index=len(self.nodes), call=self._call, module=self._module)
        self.nodes.append(node)
        return node

    def lift(self, value: Any) -> Any:
        """The argument with nodes for tensors."""
        if isinstance(value, torch.Tensor):
            return None if is_lazy(value) else self.node(value)
        if isinstance(value, (list, tuple)):
            return tuple(map(self.lift, value))
        if isinstance(value, dict):
            return {key: self.lift(item) for key, item in value.items()}
        return value if isinstance(value, _PLAIN) else None

    def specs(self, value: Any, before: int | None = None) -> Any:
        """The structure with a `TensorSpec` for each tensor; as before the node of index `before`, if given."""

        def spec(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or is_lazy(leaf):
                return leaf
            node = self.node(leaf) if before is None else self.earlier(leaf, before)
            return TensorSpec(node, () if leaf.is_nested else tuple(leaf.shape), leaf.dtype, leaf.device)

        return map_leaves(spec, value)

    def storage(self, tensor: torch.Tensor) -> int:
        """A number that names the tensor's storage as long as we record; 0 where it has none."""
        if tensor.is_nested:
            return 0
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return 0
        key = address(storage)
        if key not in self._storages:
            self._storages[key] = held(storage)
        return key

    def bind(self, tensor: torch.Tensor, node: fx.Node) -> None:
        """From here on the tensor is this node's."""
        describe(node, tensor)
        self._tensors[id(tensor)] = (weakref.ref(tensor), node)
        if storage := self.storage(tensor):
            self._views.setdefault(storage, {})[_view(tensor)] = node
            self._shared.setdefault(storage, set()).add(id(tensor))
            node.meta["storage"] = storage
            self._owners.setdefault(storage, node)
            if node.op == "call_function" and getattr(node.target, "_schema", node).name in _BLANK:
                self._blank.add(storage)

    def write(self, tensor: torch.Tensor, node: fx.Node) -> None:
        """An in-place operator: its node is what the tensor is from now on; other views become nodes of their own."""
        node.meta["was"] = self.node(tensor)
        storage = self.storage(tensor)
        self._blank.discard(storage)
        self._views.pop(storage, None)
        shared = self._shared.pop(storage, set())
        self.bind(tensor, node)
        if not storage:
            return
        self._writes[storage] = node
        for key in shared - {id(tensor)}:
            ref, before = self._tensors[key]
            other = ref()
            if other is not None and self.storage(other) == storage:
                now = self.add("call_function", _ALIAS, (before,))
                now.meta["after"] = (node,)
                self.bind(other, now)

    @property
    def any_blank(self) -> bool:
        """Is there memory that no operator seen so far has written to?"""
        return bool(self._blank)

    def blank(self, tensor: torch.Tensor) -> bool:
        """Is it memory that no operator seen so far has written to?"""
        return bool(self._blank) and self.storage(tensor) in self._blank

    def reveal(self, tensor: torch.Tensor, first: int, taken: Any) -> None:
        """Unseen code made its values, out of what its call took and all since the node of index `first`."""
        source = self.node(tensor)
        inside = {leaf.node for _, leaf in leaves(taken) if isinstance(leaf, TensorSpec)} | set(self.nodes[first:])
        now = self.add("call_function", _ALIAS, (source,))
        now.meta["after"] = tuple(sorted(inside - {source, now}, key=lambda node: int(node.meta["index"])))
        self._blank.discard(self.storage(tensor))
        self.bind(tensor, now)

    def earlier(self, tensor: torch.Tensor, before: int) -> fx.Node:
        """The node that the tensor was before the node of index `before`."""
        node = self.node(tensor)
        while node.meta["index"] >= before:
            if "was" in node.meta:
                node = node.meta["was"]
            elif node.target is _ALIAS and "after" in node.meta:
                node = node.args[0]  # type: ignore[assignment]
            else:
                break
        return node

    def node(self, tensor: torch.Tensor) -> fx.Node:
        """Its own node, that of an equal view, a weight's, a new view of what owns its storage, or a constant."""
        entry = self._tensors.get(id(tensor))
        if entry is not None and entry[0]() is tensor:
            return entry[1]
        storage = self.storage(tensor)
        same = self._views.get(storage, {}).get(_view(tensor))
        if same is not None:
            return same
        weight = self._weights.get(id(tensor))
        if weight is not None and weight[0]() is tensor:
            node = self.add("get_attr", weight[1])
        elif storage in self._owners:
            view = (self._owners[storage], tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())
            node = self.add("call_function", torch.ops.aten.as_strided.default, view)
            if storage in self._writes:
                node.meta["after"] = (self._writes[storage],)
        else:
            node = self._constant(tensor)
        self.bind(tensor, node)
        return node

    def _constant(self, tensor: torch.Tensor) -> fx.Node:
        """A tensor from outside the call. `torch.tensor([t])` hides an int time in one: the value links them again."""
        with self.graph.inserting_before(next(iter(self.graph.nodes), None)):
            node = self.add("placeholder", f"constant_{len(self.nodes)}")
        node.meta["constant"] = True
        if self.numbers and tensor.numel() == 1 and tensor.device.type == "cpu":
            value = _number(tensor)
            node.meta["after"] = tuple(source for number, source in self.numbers if number == value)
        return node


def _number(tensor: torch.Tensor) -> Any:
    """The value of a tensor of one element, read behind the recorder's back; None where torch has no way to."""
    unseen = getattr(torch._C, "_DisableTorchDispatch", None)
    if unseen is None:
        return None
    with unseen():
        return tensor.detach().item()


def describe(node: fx.Node, tensor: torch.Tensor) -> None:
    """Write down what the node's tensor looks like."""
    node.meta.update(dtype=tensor.dtype, device=tensor.device)
    node.meta.update({"nested": True} if tensor.is_nested else {"shape": tuple(tensor.shape)})


def _view(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What tells the views of one storage apart; none has this key where there is no storage."""
    try:
        return (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype) if not tensor.is_nested else ()
    except (NotImplementedError, RuntimeError):
        return ()
