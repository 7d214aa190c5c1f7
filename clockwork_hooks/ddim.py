"""DDIM's deterministic path between a picture and noise, walked in either direction."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from clockwork_hooks.errors import ArgumentError

__all__ = ["Path"]


class Path:
    """The times of a DDIM run and what lies between them.

    Attributes:
        numbers: the times, descending.
        times: the same on the device, one tensor.
        levels: ᾱ at each.
        clean: ᾱ of a picture without noise.

    Args:
        scheduler: a diffusers scheduler with betas (its `alphas_cumprod`, spacing and prediction type are read).
        steps: how many times.
        device: where the UNet wants them.

    Raises:
        ArgumentError: the scheduler has no betas, its model predicts pictures, or steps are outside their rule.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> Path(DDIMScheduler(timestep_spacing="trailing"), 4, torch.device("cpu")).numbers
        [999, 749, 499, 249]

    Source: arXiv 2010.02502, Sec. 4.1.
    """

    def __init__(self, scheduler: Any, steps: int, device: torch.device) -> None:
        from diffusers import DDIMScheduler

        if not hasattr(scheduler, "alphas_cumprod"):
            raise ArgumentError(
                "DDIM inversion reads alphas_cumprod off a diffusers scheduler",
                seen={"scheduler": type(scheduler).__name__},
                do="pass a DDIMScheduler with the model's betas",
            )
        most = scheduler.config.num_train_timesteps
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= most:
            raise ArgumentError(f"steps are an int from 1 to {most}", seen={"steps": repr(steps)}, do="pass steps=50")
        ddim = DDIMScheduler.from_config(scheduler.config)
        ddim.set_timesteps(steps)
        self.numbers: list[int] = ddim.timesteps.tolist()
        self.times = ddim.timesteps.to(device)
        self.levels: list[float] = ddim.alphas_cumprod[ddim.timesteps].tolist()
        self.clean = float(ddim.final_alpha_cumprod)
        self._predicts = str(ddim.config.prediction_type)
        if self._predicts not in ("epsilon", "v_prediction"):
            raise ArgumentError(
                "a UNet that is inverted predicts noise or v: a picture alone does not tell the noise of none",
                seen={"prediction_type": self._predicts},
                do="edit with another model",
            )

    def move(self, made: Tensor, x: Tensor, now: float, then: float) -> Tensor:
        """From the noise level ᾱ = now to ᾱ = then along DDIM's deterministic path, in either direction.

        Args:
            made: (B, C, ...) the UNet's output at x.
            x: (B, C, ...) latents at `now`.
            now, then: ᾱ, in (0, 1].

        Returns:
            (B, C, ...) latents at `then`.

        Source: arXiv 2010.02502, Eq. 12 with σ = 0.
        """
        signal, sigma = math.sqrt(now), math.sqrt(1 - now)
        if self._predicts == "v_prediction":
            clean, noise = signal * x - sigma * made, signal * made + sigma * x
        else:
            clean, noise = (x - sigma * made) / max(signal, 1e-6), made
        return math.sqrt(then) * clean + math.sqrt(1 - then) * noise
