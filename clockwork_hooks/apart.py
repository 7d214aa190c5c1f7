"""Calls that stand apart from a sampling loop: compiled or traced, transformed, or run again by a backward pass.

What a transform computes is of the UNet, not of an approximation that depends on the call before; and a call that is
run again has to do what it did the first time. So both are full passes, and belong to no trajectory.
"""

from __future__ import annotations

import torch

from clockwork_hooks import reasons

__all__ = ["stands_apart"]


def stands_apart() -> str | None:
    """Why the call that begins now is none of a sampling loop's; None where it is. Reads seven flags of torch.

    Example:
        >>> seen = []
        >>> def f(x):
        ...     seen.append(stands_apart())
        ...     return x * x
        >>> f(torch.ones(1)), torch.func.vjp(f, torch.ones(1))[0]
        (tensor([1.]), tensor([1.]))
        >>> seen
        [None, 'within a transform of torch.func']
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or _proxies():
        return reasons.COMPILED
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return reasons.TRANSFORMED
    if torch._C._current_graph_task_id() != -1:  # it is run again
        return reasons.REPEATED
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint":  # it will be
        return reasons.REPEATED
    if not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled():  # as in any `autograd.Function`
        return reasons.REPEATED
    return None


def _proxies() -> bool:
    """Do `make_fx` and its kin record a graph?"""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
