"""What is remembered of one call of one module in a trace."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ModuleCall"]


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
