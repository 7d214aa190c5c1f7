"""Run the adaptor, and see that it and what it returns fit the region before the UNet sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from clockwork_hooks.adaptors import Adaptor, IdentityAdaptor
from clockwork_hooks.errors import AdaptorError
from clockwork_hooks.graph.macs import node_macs
from clockwork_hooks.graph.tracing import recording
from clockwork_hooks.regions.region import Region
from clockwork_hooks.reports.tables import shape

__all__ = ["check", "check_region", "count_and_run", "fits", "looks", "place", "region_options", "run"]


def run(adaptor: Adaptor, captured: Mapping[str, torch.Tensor], cached: torch.Tensor) -> Any:
    """Call the adaptor with what was picked up at the boundary."""
    return adaptor(captured.get("entry"), cached, time=captured.get("time"), text=captured.get("text"))


def count_and_run(adaptor: Adaptor, captured: Mapping[str, torch.Tensor], cached: torch.Tensor) -> tuple[Any, int]:
    """`run`, recorded: also the MACs that the adaptor took."""
    module = adaptor if isinstance(adaptor, nn.Module) else _Function(adaptor)
    entry, options = captured.get("entry"), {"time": captured.get("time"), "text": captured.get("text")}
    with recording(module, (entry, cached), options) as recorder:
        made = run(module, captured, cached)
    return made, sum(map(node_macs, recorder.bindings.nodes))


def region_options(adaptor: Adaptor) -> dict[str, Any]:
    """The options of `Choice` that find the region an adaptor was made for; none where it knows of no region."""
    return dict(getattr(adaptor, "region_options", None) or {})


def check_region(adaptor: Adaptor, region: Region) -> None:
    """Let an adaptor that knows its region (`LearnedAdaptor.check_region`) refuse another one."""
    known = getattr(adaptor, "check_region", None)
    if known is not None:
        known(region)


def place(adaptor: Adaptor, like: torch.Tensor) -> None:
    """Move an adaptor's parameters to the exit's device and dtype; as plain tensors, also in inference mode."""
    if isinstance(adaptor, nn.Module):
        with torch.inference_mode(False):
            adaptor.to(like.device, like.dtype)


def looks(adaptor: Adaptor) -> bool:
    """Has it a use for boundary tensors? The identity has none, so none are picked up for it."""
    return type(adaptor) is not IdentityAdaptor


def fits(made: Any, cached: torch.Tensor) -> bool:
    """Does what the adaptor returned look like the exit of the step before?"""
    if made is cached:
        return True
    alike = isinstance(made, torch.Tensor) and made.shape == cached.shape and made.dtype == cached.dtype
    return alike and made.device == cached.device


def check(made: Any, cached: torch.Tensor, *, finite: bool, where: Mapping[str, object]) -> torch.Tensor:
    """What the adaptor returned, if it may stand in for the exit.

    Args:
        made: what it returned.
        cached: the exit of the step before, whose shape, dtype and device it must have.
        finite: look for NaN and infinity too; waits for the device.
        where: step, region and adaptor, for the error.

    Raises:
        AdaptorError: it may not.
    """
    if not isinstance(made, torch.Tensor) or not fits(made, cached):
        raise AdaptorError(
            "an adaptor returns a tensor like the region's exit",
            seen={"exit": _looks(cached), "returned": _looks(made), **where},
            do="make the adaptor's output fit Region.exit",
        )
    if finite and not bool(torch.isfinite(made).all()):
        raise AdaptorError("an adaptor returns finite numbers", seen=where, do="train it longer, or with float32")
    return made


class _Function(nn.Module):
    """An adaptor that is no module, as one: for the recorder."""

    def __init__(self, function: Adaptor) -> None:
        super().__init__()
        self._function = (function,)  # a tuple: whatever it is, it is no submodule

    def forward(self, entry: Any, exit_cached: Any, **options: Any) -> Any:
        return self._function[0](entry, exit_cached, **options)


def _looks(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{shape(value.shape)} {value.dtype} {value.device}"
