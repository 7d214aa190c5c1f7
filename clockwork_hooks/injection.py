"""Injection: rows of a batch take over the features and the self-attention of the first ones, by native hooks.

Where to inject is read off the graph. The way up has blocks that take in a skip; PnP injects the output of the second
of three at one level above the bottleneck, and the queries and keys of all self-attention that follows. Equal queries
and keys are equal attention maps, so nothing of an attention layer's inside needs to be known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from clockwork_hooks.bindings import TensorSpec
from clockwork_hooks.calls import ModuleCall
from clockwork_hooks.errors import ArgumentError
from clockwork_hooks.graph import Trace, module_paths
from clockwork_hooks.levels import Levels
from clockwork_hooks.macs import operator_name
from clockwork_hooks.tree import leaves, map_leaves

__all__ = ["Injection", "find_injection", "injected"]

ROWS = 3  # source, negative, target


@dataclass(frozen=True, slots=True)
class Injection:
    """What is injected, and for how long.

    Attributes:
        features: paths of modules whose output is a feature to inject.
        attention: paths of the projections to queries and to keys of self-attention.
        until_features: τ_f, the share of the steps in which features are injected.
        until_attention: τ_A, likewise for self-attention.

    Example:
        >>> Injection(features=("up_blocks.1.resnets.1",), until_features=0.5).attention
        ()
    """

    features: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    until_features: float = 0.8
    until_attention: float = 0.5

    def __post_init__(self) -> None:
        for name in ("until_features", "until_attention"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ArgumentError(
                    f"{name} is a share of the steps, 0 to 1", seen={name: repr(value)}, do=f"pass {name}=0.5"
                )

    def check(self, unet: nn.Module) -> None:
        """Raise `ArgumentError` if a path is no module's."""
        known = set(module_paths(unet).values())
        missing = [path for path in (*self.features, *self.attention) if path not in known]
        if missing:
            raise ArgumentError(
                "an injection names modules of the UNet",
                seen={"no such module": ", ".join(missing)},
                do='pass dotted paths, as in features=("up_blocks.1.resnets.1",)',
            )


def find_injection(trace: Trace, *, until_features: float = 0.8, until_attention: float = 0.5) -> Injection:
    """Where Plug-and-Play injects, on any UNet.

    Args:
        trace: of a call of the UNet.
        until_features, until_attention: τ_f and τ_A; with τ_A = 0 none is asked for, and none has to be there.

    Returns:
        Of the blocks on the way up that take in a skip one level above the bottleneck, the middle one; and queries and
        keys of all self-attention after it.

    Raises:
        ArgumentError: no such block, or no such self-attention, is found; name the modules yourself.

    Example:
        >>> from clockwork_hooks.graph import trace
        >>> from clockwork_hooks.models import load_model
        >>> unet, args, kwargs = load_model("sd15")
        >>> found = find_injection(trace(unet, *args, **kwargs))
        >>> found.features, len(found.attention)
        (('up_blocks.1.resnets.1',), 16)

    Source: arXiv 2211.12572, Sec. 4 (its layers 4, and 4 to 11).
    """
    blocks = _joins(trace)
    sizes = sorted({positions for positions, _ in blocks})
    if not blocks:
        raise ArgumentError(
            "features are injected where the way up takes in a skip by concatenation",
            seen={"model": trace.model, "such blocks": 0},
            do="pass injection=Injection(features=(...), attention=(...)) with paths of modules",
        )
    wanted = sizes[min(1, len(sizes) - 1)]
    level = [call for positions, call in blocks if positions == wanted]
    chosen = level[len(level) // 2]
    attention = [path for node in trace.nodes if node.meta["index"] >= chosen.first for path in _projections(node)]
    found = Injection((str(chosen.path),), tuple(dict.fromkeys(attention)), until_features, until_attention)
    if until_attention and not attention:
        raise ArgumentError(
            "self-attention is injected where two linear layers make queries and keys of one tensor",
            seen={"model": trace.model, "features are injected at": chosen.path, "such attention after it": 0},
            do="pass injection=find_injection(trace, until_attention=0) to inject features alone, or name the layers "
            "with Injection(features=(...), attention=(...))",
        )
    return found


def _joins(trace: Trace) -> list[tuple[int, ModuleCall]]:
    """Calls that are given a concatenation of two maps along the channels, with their positions, in order."""
    levels, found = Levels(trace), []
    carrying = trace.reachable([trace.inputs[trace.sample]])
    joined = {
        node
        for node in trace.nodes
        if operator_name(node) == "cat"
        and levels.resolution(node)
        and sum(source in carrying for source in node.all_input_nodes) > 1
    }
    for call in trace.calls:
        given = [leaf.node for _, leaf in leaves(call.inputs) if isinstance(leaf, TensorSpec)]
        whole = next((node for node in given if node in joined), None)
        if whole is not None and call.path:
            joined.discard(whole)  # the outermost call that takes it in; what is inside of it comes later
            found.append((levels.positions(whole) or 0, call))
    return found


def _projections(node: fx.Node) -> tuple[str, ...]:
    """Paths of the linear layers that make an attention's queries and keys, if both come from one tensor."""
    if node.op != "call_function" or "dot_product" not in operator_name(node):
        return ()
    query, key = (_linear(argument) if isinstance(argument, fx.Node) else None for argument in node.args[:2])
    if query is None or key is None or query is key or query.args[0] is not key.args[0]:
        return ()
    return query.meta["module"], key.meta["module"]


def _linear(node: fx.Node) -> fx.Node | None:
    """The linear layer that a tensor comes from, through views alone."""
    for _ in range(12):
        if node.op != "call_function":
            return None
        if operator_name(node) in ("linear", "addmm", "mm", "matmul"):
            return node
        if len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    return None


class Injecting:
    """The hooks of an injection while they are attached.

    Attributes:
        silent: nothing is injected in a call for which this is true.
    """

    def __init__(self, unet: nn.Module, injection: Injection) -> None:
        self.silent: Callable[[], bool] = lambda: False
        self._injection = injection
        self._on = {"features": False, "attention": False}
        self._handles = [
            unet.get_submodule(path).register_forward_hook(self._hook(kind))
            for kind, paths in (("features", injection.features), ("attention", injection.attention))
            for path in paths
        ]

    def at(self, progress: float) -> None:
        """A step begins, at this share of the steps: 0 for the first."""
        self._on["features"] = progress < self._injection.until_features
        self._on["attention"] = progress < self._injection.until_attention

    def remove(self) -> None:
        """Take the hooks off; idempotent."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, kind: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not self._on[kind] or self.silent():
                return None
            return map_leaves(lambda leaf: _first_rows(leaf) if isinstance(leaf, Tensor) else leaf, output)

        return hook


@contextlib.contextmanager
def injected(unet: nn.Module, injection: Injection) -> Iterator[Injecting]:
    """The injection's hooks are on the UNet inside, and off after it, also after an exception."""
    attached = Injecting(unet, injection)
    try:
        yield attached
    finally:
        attached.remove()


def _first_rows(leaf: Tensor) -> Tensor:
    """The first third of the rows in the place of all thirds."""
    first = leaf[: leaf.shape[0] // ROWS]
    return torch.cat([first] * ROWS)
