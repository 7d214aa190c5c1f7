"""One call of the UNet that is under way, and what all calls of its input signature have in common."""

from __future__ import annotations

import functools
import sys
from collections.abc import Hashable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import is_grad_enabled, is_inference_mode_enabled
from torch._C import _is_any_autocast_enabled

from clockwork_hooks.boundary import Region
from clockwork_hooks.inputs import Arguments
from clockwork_hooks.passes import Pass
from clockwork_hooks.recorder import Recorder
from clockwork_hooks.timeline import Position

__all__ = ["Prepared", "Running", "mode", "on_stack"]

_COMMON = ("cpu", "cuda", "xpu")


@dataclass(slots=True)
class Prepared:
    """What calls of one input signature need; `region` is None where they have none, and `why` says so."""

    region: Region | None
    full_macs: int
    rest_macs: int
    time: str | None
    sample: str
    why: str = ""
    adaptor_macs: int | None = None
    # code that the trace does not know writes to the exit, or might: inference tensors keep no count of writes
    copies: bool = field(default_factory=torch.is_inference_mode_enabled)
    varies: bool = False  # an adaptor pass called modules in another way than the trace: full ones are watched for it
    name: str = ""  # tells adaptor passes apart where there are several regions
    blanks: dict[tuple[str, int], Any] = field(default_factory=dict)  # what skipped calls return in every pass
    key: tuple[Any, ...] | None = None  # of all its calls the same object, which is soon compared
    places: tuple[int | None, tuple[int, ...]] | None = None  # once `place` has looked

    def place(self, arguments: Arguments) -> tuple[int | None, tuple[int, ...]]:
        """Where among the arguments' leaves the time is, and what tells the branch: all but sample, time, residuals."""
        paths = list(arguments.paths)
        apart = {self.sample, self.time, *(self.region.residuals if self.region is not None else ())}
        told = tuple(k for k, path in enumerate(paths) if path not in apart)
        self.places = paths.index(self.time) if self.time in paths else None, told
        return self.places


@dataclass(slots=True)
class Running:
    """One call of the UNet that is under way; `trains`: in training mode, with gradients on."""

    frame: FrameType
    error: BaseException | None
    arguments: Arguments
    key: tuple[Any, ...]
    trains: bool
    weights: Hashable = None
    recorder: Recorder | None = None
    prepared: Prepared | None = None
    position: Position | None = None
    run: Pass | None = None
    cached: torch.Tensor | None = None
    reason: str | None = None


def mode(training: bool, arguments: Arguments) -> tuple[Any, ...]:
    """What changes the computation beside the inputs: training, autocast, gradients."""
    kind = _kind(arguments.device)
    if kind is None or (kind in _COMMON and not _is_any_autocast_enabled()):  # asks for less: no text
        autocast = None
    else:
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return training, autocast, is_grad_enabled(), is_inference_mode_enabled()


@functools.lru_cache(maxsize=64)  # `device.type` makes a string, which takes ten times as long
def _kind(device: torch.device | None) -> str | None:
    """What autocast is switched on for; None where there is none, as on meta."""
    kind = "cpu" if device is None else device.type
    return kind if torch.amp.is_autocast_available(kind) else None


def on_stack(wanted: FrameType | None) -> bool:
    """Is this frame still running?"""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None
