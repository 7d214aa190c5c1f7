"""DDIM inversion with Clockwork: the deterministic sampler run backwards takes a picture to its noise.

Source: arXiv 2312.08128, Sec. 5.3 and App. D.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clockwork_hooks.acceptance import check_unet
from clockwork_hooks.adaptors import Adaptor
from clockwork_hooks.attach import wrap
from clockwork_hooks.boundary import Region
from clockwork_hooks.ddim import Path
from clockwork_hooks.errors import ArgumentError
from clockwork_hooks.progress import progress
from clockwork_hooks.report import shape
from clockwork_hooks.schedule import Schedule, check_clock
from clockwork_hooks.stats import Counts
from clockwork_hooks.tree import leaves
from clockwork_hooks.wrapper import ClockworkWrapper

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Conditions", "Inversion", "call", "check_source", "clocked", "counts", "dtype_of", "invert", "told"]

Conditions = Tensor | Mapping[str, Any]
Steps = Schedule | Iterable[int] | Callable[[int], bool]


@dataclass(frozen=True, slots=True)
class Inversion:
    """The way of a source to noise.

    Attributes:
        latents: time → (B, C, ...) float32 latents at that time's noise level, times ascending.
        conditions: what the UNet was told about the source: keyword arguments of its call.
        passes: what ran.
    """

    latents: Mapping[int, Tensor] = field(repr=False)
    conditions: Mapping[str, Any] = field(repr=False)
    passes: Counts

    @property
    def noise(self) -> Tensor:
        """(B, C, ...) float32 latents at the last time: where editing starts from."""
        return self.latents[max(self.latents)]

    def at(self, time: int) -> Tensor:
        """(B, C, ...) latents at the nearest time that there is."""
        return self.latents[min(self.latents, key=lambda known: abs(known - time))]


@torch.no_grad()
def invert(
    unet: nn.Module,
    scheduler: Any,
    source: Tensor,
    conditions: Conditions,
    *,
    steps: int = 100,
    clock: int = 1,
    schedule: Steps | None = None,
    region: Region | None = None,
    adaptor: Adaptor | str | None = None,
    console: Console | None = None,
) -> Inversion:
    """Take a source to noise by DDIM inversion: the deterministic sampler run backwards, times ascending.

    Args:
        unet: any diffusers UNet; not wrapped, and the same as before when this returns or raises.
        scheduler: a diffusers scheduler with betas (its `alphas_cumprod`, spacing and prediction type are read).
        source: (B, C, ...) floating latents without noise, on the UNet's device.
        conditions: what the UNet is told about the source: hidden states (B, L, D), or keyword arguments of its call,
            whose tensors have B rows.
        steps: N, of the inversion.
        clock: one full pass every `clock` steps.
        schedule: in the place of a clock, as in `wrap`; its first step is the one at the least noise.
        region, adaptor: as in `wrap`.
        console: where the progress bar goes; None for standard error.

    Returns:
        The latents at every time.

    Raises:
        ArgumentError: an option is outside its rule, or the source is not of the UNet's shape.
        RegionNotFoundError: nothing of the UNet can be skipped.

    Example:
        >>> from diffusers import DDIMScheduler, UNet2DModel
        >>> unet = UNet2DModel(
        ...     8,
        ...     block_out_channels=(8, 16),
        ...     norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",) * 2,
        ...     up_block_types=("UpBlock2D",) * 2,
        ... ).eval()
        >>> way = invert(unet, DDIMScheduler(), torch.zeros(1, 3, 8, 8), {}, steps=6, clock=3)
        >>> way.noise.shape, way.passes.full_passes, way.passes.adaptor_passes
        (torch.Size([1, 3, 8, 8]), 2, 4)

    Source: arXiv 2312.08128, App. D, Eq. 4 (cost).
    """
    check_unet(unet)
    check_source(unet, source)
    path, given = Path(scheduler, steps, source.device), told(conditions, len(source))
    x, kept, level = source.float(), {}, path.clean
    with clocked(unet, clock, schedule, region, adaptor) as cw, progress(console) as bar:
        task = bar.add_task("inversion", total=steps)
        for k in reversed(range(steps)):
            cw.step()
            x = path.move(call(cw, x, path.times[k], given), x, level, path.levels[k])
            kept[path.numbers[k]], level = x, path.levels[k]
            bar.advance(task)
    return Inversion(kept, given, counts(cw))


def check_source(unet: Any, source: Any) -> None:
    """Raise `ArgumentError` if the source is no batch of latents of the UNet's."""
    channels = getattr(getattr(unet, "config", None), "in_channels", None)
    if not isinstance(source, Tensor) or not source.is_floating_point() or source.ndim < 3 or not len(source):
        seen = {
            "source": f"{source.dtype}, {shape(source.shape)}" if isinstance(source, Tensor) else type(source).__name__
        }
        raise ArgumentError(
            "a source is a batch of floating latents (B, C, ...)", seen=seen, do="encode the picture with the VAE"
        )
    if channels is not None and source.shape[1] != channels:
        raise ArgumentError(
            "a source has the channels of the UNet's sample",
            seen={"source": shape(source.shape), "the UNet's in_channels": channels},
            do="pass latents (B, C, ...): encode the picture with the model's own VAE",
        )


def told(conditions: Conditions, rows: int) -> dict[str, Any]:
    """Keyword arguments of the UNet's call, each tensor with as many rows as the source.

    Raises:
        ArgumentError: a tensor has other rows.
    """
    given = {"encoder_hidden_states": conditions} if isinstance(conditions, Tensor) else dict(conditions)
    wrong = {
        path: shape(leaf.shape) or "no rows"
        for path, leaf in leaves(given)
        if isinstance(leaf, Tensor) and leaf.shape[:1] != (rows,)
    }
    if wrong:
        raise ArgumentError(
            "every tensor that the UNet is told has one row a picture",
            seen={"pictures": rows, **wrong},
            do=f"expand it to {rows} row{'s' * (rows != 1)}",
        )
    return given


@contextlib.contextmanager
def clocked(
    unet: nn.Module, clock: int, schedule: Steps | None, region: Region | None, adaptor: Adaptor | str | None
) -> Iterator[ClockworkWrapper]:
    """The UNet wrapped for one loop; clock 1 is the plain loop, and warns of nothing."""
    check_clock(clock)
    ticks = Schedule.every(clock) if schedule is None else schedule
    with wrap(unet, adaptor, schedule=ticks, region=region) as cw, cw.trajectory():
        yield cw


def call(cw: ClockworkWrapper, x: Tensor, time: Tensor, given: Mapping[str, Any]) -> Tensor:
    """The UNet's output in float32, made in its own type.

    Raises:
        ArgumentError: it has another shape than x.
    """
    output = cw(x.to(dtype_of(cw.unet)), time, **given)
    made: Tensor = output if isinstance(output, Tensor) else output.sample
    if made.shape != x.shape:
        raise ArgumentError(
            "a UNet that is inverted predicts as many channels as it is given, and no variance",
            seen={"given": shape(x.shape), "predicted": shape(made.shape)},
            do="edit with another model",
        )
    return made.float()


def dtype_of(unet: nn.Module) -> torch.dtype:
    """The type that the UNet's parameters have."""
    return next((p.dtype for p in unet.parameters() if p.is_floating_point()), torch.float32)


def counts(cw: ClockworkWrapper) -> Counts:
    """A copy of what ran, that stays when the wrapper goes."""
    stats = cw.stats
    passes = (stats.full_passes, stats.adaptor_passes, stats.reasons.copy(), stats.regions.copy())
    return Counts(*passes, stats.macs_run, stats.macs_plain)
