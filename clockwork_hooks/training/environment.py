"""The surroundings of a training run, each as it was afterwards: the frozen UNet, Accelerate, TensorFloat-32."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clockwork_hooks.errors import ArgumentError, DistillError, need
from clockwork_hooks.training.options import TrainingOptions

__all__ = ["accelerated", "frozen", "local_device", "quietly", "tf32"]


def local_device() -> str:
    """Where this process trains: its own GPU under `accelerate launch`, else the first one, else the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def frozen(unet: nn.Module) -> Iterator[None]:
    """No gradients for the UNet's parameters and evaluation mode inside; every flag as it was afterwards."""
    modes = [(module, module.training) for module in unet.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
    unet.eval()
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def accelerated(unet: nn.Module, options: TrainingOptions, folder: Path | None, own: Any) -> Iterator[Any]:
    """Accelerate on the UNet's device, with trackers: the user's own, or a fresh one."""
    device = next((tensor.device for tensor in (*unet.parameters(), *unet.buffers())), torch.device("cpu"))
    need("training runs on Hugging Face Accelerate", "accelerate", install="clockwork-hooks[train]")
    if options.tracker is not None:
        need("losses are logged with TensorBoard", "tensorboard", install="clockwork-hooks[train]")
        if folder is None and own is None:
            raise ArgumentError(
                "losses are logged in the run's folder",
                seen={"tracker": options.tracker, "folder": None},
                do="pass folder=",
            )
    import accelerate
    from accelerate.state import AcceleratorState

    fresh = own is None and not AcceleratorState._shared_state
    accelerator = own or accelerate.Accelerator(
        mixed_precision=options.precision,
        cpu=device.type == "cpu",
        log_with=options.tracker,
        project_dir=str(folder) if folder is not None else None,
    )
    try:
        if accelerator.device.type != device.type or (
            accelerator.num_processes > 1 and device.index not in (None, accelerator.device.index)
        ):
            raise ArgumentError(
                "the UNet is on the device of its process",
                seen={"unet": device, "process": accelerator.device},
                do="move it before: unet.to(accelerate.Accelerator().device)",
            )
        if options.tracker is not None and own is None:
            accelerator.init_trackers("logs")
        yield accelerator
    finally:
        if options.tracker is not None and own is None:
            accelerator.end_training()
        if fresh and accelerator.num_processes == 1:  # the next run in this process may want another precision
            AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def tf32(wanted: bool) -> Iterator[None]:
    """Float32 products use TensorFloat-32 inside, where wanted."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    if wanted:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        if wanted:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def quietly(error: BaseException | None) -> Iterator[None]:
    """While an error is on its way out, another one while saving does not hide it, but warns."""
    try:
        yield
    except DistillError as other:
        if error is None:
            raise
        warnings.warn(f"what was trained could not be saved either: {other}", RuntimeWarning, stacklevel=5)
