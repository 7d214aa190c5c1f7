"""The MACs of calls as they really run, whoever changed the model: a peer's cache, a patched block, another sampler."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from clockwork_hooks.graph import module_paths
from clockwork_hooks.inputs import Binder
from clockwork_hooks.macs import node_macs
from clockwork_hooks.recorder import Recorder

__all__ = ["counting"]


@contextlib.contextmanager
def counting(unet: nn.Module) -> Iterator[list[int]]:
    """Record every call of `unet` in the block and count its MACs; slow, so for one batch and not for all.

    Args:
        unet: not wrapped: a wrapper counts on its own (`cw.stats`).

    Yields:
        MACs of each call so far: convolutions and matrix products, attention products counted.

    Example:
        >>> import torch
        >>> layer = torch.nn.Conv2d(3, 8, 3, padding=1)
        >>> with counting(layer) as macs:
        ...     _ = layer(torch.zeros(1, 3, 4, 4))
        >>> macs  # 16 positions of 3·3·3·8
        [3456]
    """
    found: list[int] = []
    running: list[Recorder] = []
    bind, paths = Binder(unet.forward), module_paths(unet)

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder = Recorder(unet, bind(args, kwargs), paths)
        running.append(recorder)
        recorder.start(args, kwargs, frame=sys._getframe(1))

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        recorder = running.pop()
        recorder.stop(output)
        found.append(sum(map(node_macs, recorder.bindings.nodes)))

    handles = [
        unet.register_forward_pre_hook(begin, with_kwargs=True),
        unet.register_forward_hook(end, with_kwargs=True),
    ]
    try:
        yield found
    finally:
        for recorder in running:
            recorder.stop()
        for handle in handles:
            handle.remove()
