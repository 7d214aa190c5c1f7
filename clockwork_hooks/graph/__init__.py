"""One recorded call of a module as a torch.fx graph: operators, module calls, arguments, MACs of an operator."""

from clockwork_hooks.graph.operators import handle, handles, node_macs, operator_name
from clockwork_hooks.graph.recorder import ModuleCall, NodeMeta
from clockwork_hooks.graph.tracing import Trace, trace

__all__ = ["ModuleCall", "NodeMeta", "Trace", "handle", "handles", "node_macs", "operator_name", "trace"]
