"""The nodes of a recorded call: what `torch.fx.Node` says of an operator, and nothing else.

`torch.fx` gives each node a name, links and tables: 13 of the 133 ms that a first call of SD v1.5's structure took
longer (2,725 nodes, a tenth as wide; thread time in turns). Nothing here asks for them; `trace.graph` has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypedDict

import torch

from clockwork_hooks._tree import Leaf


class NodeMeta(TypedDict, total=False):
    """What `node.meta` of a recorded node holds: every key that the recorder writes, and when it does.

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
    was: Node
    after: tuple[Node, ...]


class Node(Leaf):
    """An operator that ran, a weight that it took or an argument; each attribute is as `torch.fx.Node` has it.

    Attributes:
        op: "placeholder", "get_attr", "call_function" or, once, "output".
        target: the argument's name, the weight's dotted path, the operator.
        args, kwargs: what the operator took, with nodes for tensors.
        meta: what is known of it (`NodeMeta`).
        all_input_nodes: those among the arguments, each once.
        users: nodes that have it among theirs.
    """

    __slots__ = ("all_input_nodes", "args", "kwargs", "meta", "op", "target", "users")

    def __init__(
        self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, **meta: Any
    ) -> None:
        self.op, self.target, self.args, self.kwargs = op, target, args, kwargs or {}
        self.meta: dict[str, Any] = meta
        self.users: list[Node] = []
        self.all_input_nodes = list(dict.fromkeys(_nodes((args, self.kwargs))))
        for node in self.all_input_nodes:
            node.users.append(self)

    def __repr__(self) -> str:
        return f"Node({self.op}, {self.target})"


def _nodes(values: Iterable[Any]) -> Iterator[Node]:
    """The nodes among arguments, which are in tuples and dictionaries."""
    for one in values:
        if type(one) is Node:
            yield one
        elif type(one) is tuple:
            yield from _nodes(one)
        elif type(one) is dict:
            yield from _nodes(one.values())
