"""A pool of rendered scenes and their captions on the training device, so that training is never starved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clockwork_hooks.demo.captions import MAX_TOKENS, write_captions
from clockwork_hooks.demo.scenes import IMAGE_SIZE, Scenes, draw_scenes, held_out, render

__all__ = ["ScenePool", "draw_split", "render_bytes"]

_CHUNK = 4096


def draw_split(count: int, seed: int | np.random.Generator, *, test: bool) -> Scenes:
    """Draw scenes of the training combinations, or (`test`) of those held out from training.

    Args:
        count: how many.
        seed: an int, or a generator to go on drawing from.
        test: which side of `held_out`.

    Returns:
        `count` scenes.
    """
    rng = np.random.default_rng(seed)
    share = 1 / 18 if test else 15 / 16.5
    drawn: list[Scenes] = []
    while sum(map(len, drawn)) < count:
        scenes = draw_scenes(int(count / share) + 64, rng)
        drawn.append(scenes[held_out(scenes.attributes) == test])
    columns = (np.concatenate([getattr(s, name) for s in drawn])[:count] for name in Scenes.__slots__)
    return Scenes(*columns)


def render_bytes(scenes: Scenes, device: torch.device | str) -> Tensor:
    """Render scenes in chunks. Args: N scenes, a device. Returns: (N, 3, 64, 64) uint8 on it."""
    images = torch.empty((len(scenes), 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=device)
    for start in range(0, len(scenes), _CHUNK):
        rows = slice(start, start + _CHUNK)
        images[rows] = (render(scenes[rows], device=device) * 255).round().to(torch.uint8)
    return images


@dataclass(slots=True)
class ScenePool:
    """Scenes ready for training.

    Attributes:
        images: (N, 3, 64, 64) uint8.
        tokens: (N, 18) int64.
        refreshed: how many scenes were drawn anew since the start.
    """

    images: Tensor
    tokens: Tensor
    rng: np.random.Generator
    refreshed: int = 0

    @classmethod
    def draw(cls, count: int, seed: int, device: torch.device | str) -> ScenePool:
        """Fill a pool with `count` scenes of the training combinations."""
        images = torch.empty((count, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=device)
        pool = cls(
            images, torch.zeros((count, MAX_TOKENS), dtype=torch.int64, device=device), np.random.default_rng(seed)
        )
        pool.refresh(count)
        pool.refreshed = 0
        return pool

    def refresh(self, count: int) -> None:
        """Replace the `count` oldest scenes by new ones: the stream is endless, the memory is not."""
        size = len(self.images)
        scenes = draw_split(count, self.rng, test=False)
        tokens = torch.from_numpy(write_captions(scenes, self.rng, leave_out=0.1))
        images = render_bytes(scenes, self.images.device)
        rows = (torch.arange(count, device=images.device) + self.refreshed) % size
        self.images[rows] = images
        self.tokens[rows] = tokens.to(images.device)
        self.refreshed += count
