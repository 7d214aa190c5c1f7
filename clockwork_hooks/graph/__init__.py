"""One recorded call of a module as a graph: operators, module calls, arguments, MACs of an operator."""

from clockwork_hooks.graph.node import Node, NodeMeta
from clockwork_hooks.graph.operators import handle, handles, node_macs, operator_name
from clockwork_hooks.graph.recorder import ModuleCall
from clockwork_hooks.graph.tracing import Trace, trace

__all__ = ["ModuleCall", "Node", "NodeMeta", "Trace", "handle", "handles", "node_macs", "operator_name", "trace"]
