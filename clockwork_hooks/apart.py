"""Calls that stand apart from a sampling loop: compiled or traced, transformed, or run again by a backward pass.

What a transform computes is of the UNet, not of an approximation that depends on the call before; and a call that is
run again has to do what it did the first time. So both are full passes, and belong to no trajectory.
"""

from __future__ import annotations

from torch import is_inference_mode_enabled
from torch._C import (
    _current_graph_task_id,
    _get_dispatch_mode,
    _get_tracing_state,
    _is_fwd_grad_enabled,
    _len_torch_dispatch_stack,
    _TorchDispatchModeKey,
)
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._C._functorch import peek_interpreter_stack

from clockwork_hooks.reasons import COMPILED, REPEATED, TRANSFORMED

__all__ = ["stands_apart"]


def stands_apart(*, compiling: bool = False) -> str | None:
    """Why the call that begins now is none of a sampling loop's; None where it is. Reads six flags of torch.

    Args:
        compiling: what `torch.compiler.is_compiling()` says.

    Example:
        >>> import torch
        >>> seen = []
        >>> def f(x):
        ...     seen.append(stands_apart())
        ...     return x * x
        >>> f(torch.ones(1)), torch.func.vjp(f, torch.ones(1))[0]
        (tensor([1.]), tensor([1.]))
        >>> seen
        [None, 'within a transform of torch.func']
    """
    if compiling or _get_tracing_state() is not None:
        return COMPILED
    if _len_torch_dispatch_stack() and _get_dispatch_mode(_TorchDispatchModeKey.PROXY) is not None:  # `make_fx`
        return COMPILED
    if peek_interpreter_stack() is not None:
        return TRANSFORMED
    if _current_graph_task_id() != -1:  # it is run again
        return REPEATED
    hooks = _top_saved_tensors_default_hooks(False)
    if hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint":  # it will be
        return REPEATED
    if not _is_fwd_grad_enabled() and not is_inference_mode_enabled():  # as in any `autograd.Function`
        return REPEATED
    return None
