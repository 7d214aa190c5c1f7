"""What `distill` needs to train an adaptor for the demo model: its sampler, captions of scenes, and the scenes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clockwork_hooks.demo.captions import decode, write_captions
from clockwork_hooks.demo.model import GUIDANCE, LATENT_SHAPE, DemoModel, load_demo, to_latents
from clockwork_hooks.demo.scenes import Scenes, draw_split, render_bytes
from clockwork_hooks.errors import ArgumentError, is_whole


@dataclass(frozen=True, slots=True)
class Recipe:
    """The demo model's sampler over numbered training captions, none of which its evaluation asks for.

    Attributes:
        model: the demo model.
        sampler: a name in `SCHEDULERS`.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        scenes: of the captions.
        captions: what `distill` draws from, by number.
        latent_size: edge of the latents; below 32 it is quicker, and no picture anybody would look at.

    Example:
        >>> from clockwork_hooks.demo.recipe import Recipe
        >>> recipe = Recipe.of(captions=4, latent_size=8)
        >>> recipe.captions[0]
        'a large cyan star to the right of a small pink circle on a dark red background'
        >>> distill(adaptor="resnet", **recipe.arguments())  # doctest: +SKIP
    """

    model: DemoModel
    sampler: str
    steps: int
    guidance: float
    scenes: Scenes
    captions: tuple[str, ...]
    latent_size: int = LATENT_SHAPE[1]

    @classmethod
    def of(
        cls,
        *,
        device: str | torch.device = "cpu",
        sampler: str = "dpm++",
        steps: int = 8,
        guidance: float = GUIDANCE,
        captions: int = 4096,
        latent_size: int = LATENT_SHAPE[1],
        seed: int = 11,
    ) -> Recipe:
        """Load the model and draw captions.

        Args:
            device: where to train.
            sampler: a name in `SCHEDULERS`.
            steps: denoising steps.
            guidance: classifier-free guidance scale.
            captions: how many to draw.
            latent_size: edge of the latents.
            seed: of the captions.

        Raises:
            ArgumentError: a number is none, or too small.
        """
        for name, value in (("steps", steps), ("captions", captions), ("latent_size", latent_size)):
            if not is_whole(value, 1):
                raise ArgumentError(f"{name} is an int of at least 1", seen={name: repr(value)}, do=f"pass {name}=8")
        scenes = draw_split(captions, seed, test=False)
        texts = tuple(decode(write_captions(scenes, seed)))
        return cls(load_demo(device), sampler, steps, guidance, scenes, texts, latent_size)

    def arguments(self, mode: str = "unrolled") -> dict[str, Any]:
        """Arguments of `distill`: unet, generate, prompts, guidance, facts; images and noise for "forward_noise"."""
        more = {"images": self.clean, "add_noise": self.noised} if mode == "forward_noise" else {}
        facts = {"sampler": self.sampler, "model": "the demo model of clockwork_hooks"}
        prompts = range(len(self.captions))
        common = {"unet": self.model.unet, "generate": self.generate, "prompts": prompts, "mode": mode}
        return {**common, "guidance": self.guidance, "facts": facts, **more}

    def generate(self, batch: Sequence[int]) -> Tensor:
        """Latents of the captions with these numbers, from fresh noise."""
        model = self.model
        noise = torch.randn(len(batch), LATENT_SHAPE[0], self.latent_size, self.latent_size, device=model.device)
        hidden = model.encode_prompts([self.captions[k] for k in batch])
        return model.denoise(noise, hidden, steps=self.steps, guidance=self.guidance, scheduler=self.sampler)

    def clean(self, batch: Sequence[int]) -> Tensor:
        """Latents of the scenes themselves."""
        images = render_bytes(self.scenes[np.array(batch)], self.model.device).float() / 255
        return to_latents(images)[..., : self.latent_size, : self.latent_size]

    def noised(self, clean: Tensor, noise: Tensor, time: float) -> Tensor:
        """The model's own forward process at a timestep."""
        level = self.model.scheduler("ddim").alphas_cumprod[round(time)].item()
        return math.sqrt(level) * clean + math.sqrt(1 - level) * noise
