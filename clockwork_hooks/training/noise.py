"""Forward-noise training: the UNet is given noised images in the place of what the sampler has.

The sampler still decides at which times, with which conditions and in which branches the UNet is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clockwork_hooks.clock import Clock
from clockwork_hooks.errors import DistillError
from clockwork_hooks.running import Running

__all__ = ["Noise", "with_sample"]


@dataclass(frozen=True, slots=True)
class Noise:
    """What forward-noise training needs: images, and how they are noised.

    Attributes:
        images: batch of prompts → (B, ...) clean samples, in the space that the sampler diffuses.
        add_noise: (clean samples, noise of their shape, time as the UNet is told it) → the UNet's input.
    """

    images: Callable[[Any], Tensor]
    add_noise: Callable[[Tensor, Tensor, float], Tensor]


def with_sample(
    running: Running,
    clock: Clock,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    replace: Callable[[float], Tensor],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with another sample.

    Args:
        running: the call.
        clock: reads its time.
        args, kwargs: as given.
        replace: time → sample, (B, ...); repeated where the call holds several branches of B rows.

    Raises:
        DistillError: the call has no one time, or a sample of another shape.

    Source: arXiv 2312.08128, Sec. 5.4 and Fig. 7 ("regular distillation").
    """
    prepared, arguments = running.prepared, running.arguments
    assert prepared is not None  # the engine has placed the call
    time, _ = clock.read(arguments.get(prepared.time)) if prepared.time else (None, None)
    sample = arguments.get(prepared.sample)
    if time is None:
        raise DistillError(
            "forward noise needs the time of every call, one for all rows",
            seen={"time input": prepared.time},
            do='use mode="unrolled", or pass time=',
        )
    made = replace(time)
    if sample.shape[1:] != made.shape[1:] or sample.shape[0] % made.shape[0]:
        raise DistillError(
            "noised images are shaped like the sample that the UNet is called with",
            seen={"sample": tuple(sample.shape), "noised images": tuple(made.shape)},
            do="make images(batch) return what the sampler diffuses, latents for a latent model",
        )
    made = made.to(sample).repeat(sample.shape[0] // made.shape[0], *[1] * (made.ndim - 1))
    at = list(arguments.values).index(prepared.sample)
    if at < len(args):
        return (*args[:at], made, *args[at + 1 :]), kwargs
    return args, {**kwargs, prepared.sample: made}
