"""Damage to pictures: mild damage that must not matter, and strong damage that must make them unreadable."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clockwork_hooks.demo.scenes import COLOURS, COLUMNS, SHAPES, WHITE_BACKGROUND, Scenes

__all__ = ["add_noise", "blur", "damage", "half_denoised", "morph_partner"]


def blur(images: Tensor, sigma: Tensor | float) -> Tensor:
    """Gaussian blur. Args: images (B, 3, H, W); sigma in pixels, one for all or (B,). Returns: the same shape."""
    width = images.shape[-1]
    sigmas = torch.as_tensor(sigma, device=images.device, dtype=images.dtype).reshape(-1, 1, 1).clamp(min=1e-3)
    at = torch.arange(width, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-((at[:, None] - at[None, :]) ** 2) / (2 * sigmas**2))
    kernel = (kernel / kernel.sum(-1, keepdim=True))[:, None]
    return kernel @ images @ kernel.transpose(-1, -2)


def add_noise(images: Tensor, sigma: Tensor | float, generator: torch.Generator | None = None) -> Tensor:
    """White noise, clipped. Args: images (B, 3, H, W) in [0, 1]; sigma in the same unit, one for all or (B,)."""
    sigmas = torch.as_tensor(sigma, device=images.device, dtype=images.dtype).reshape(-1, 1, 1, 1)
    return (images + sigmas * _noise(images, generator)).clamp(0, 1)


def half_denoised(images: Tensor, level: Tensor | float, generator: torch.Generator | None = None) -> Tensor:
    """What a sampler shows when it stops early: x_t = √(1-σ²)·x + σ·noise, in the model's range, clipped.

    Args:
        images: (B, 3, H, W) in [0, 1].
        level: σ in [0, 1], one for all or (B,).
        generator: of the noise.

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    levels = torch.as_tensor(level, device=images.device, dtype=images.dtype).reshape(-1, 1, 1, 1)
    mixed = (1 - levels**2).sqrt() * (images * 2 - 1) + levels * _noise(images, generator)
    return ((mixed + 1) / 2).clamp(0, 1)


def _noise(images: Tensor, generator: torch.Generator | None) -> Tensor:
    device = images.device if generator is None else generator.device
    return torch.randn(images.shape, generator=generator, device=device, dtype=images.dtype).to(images.device)


def morph_partner(scenes: Scenes, seed: int = 0) -> Scenes:
    """The same geometry with other shapes and colours (each changed with chance ½), to blend with."""
    rng = np.random.default_rng(seed)
    attributes: NDArray[np.int64] = scenes.attributes.copy()
    white_ground = attributes[:, 0] == WHITE_BACKGROUND
    for shape, colour in ((3, 4), (6, 7)):
        there = attributes[:, shape] < len(SHAPES)
        change = there & (rng.random(len(scenes)) < 0.5)
        attributes[change, shape] = rng.integers(0, len(SHAPES), int(change.sum()))
        change = there & (rng.random(len(scenes)) < 0.5)
        drawn = rng.integers(0, len(COLOURS) - white_ground)
        attributes[change, colour] = drawn[change]
    return Scenes(attributes, scenes.centre, scenes.radius, scenes.angle, scenes.tint)


def damage(images: Tensor, partners: Tensor, labels: Tensor, partner_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Damage a training batch: 55% mildly (labels stay), the rest beyond reading (labels become "unreadable").

    Strong damage is noise, blur, the half-denoised state (of a sharp or a blurred scene), a blend with another scene, a
    blend with the morph partner (only what differs is unreadable), and a scene without its objects.

    Args:
        images: (B, 3, H, W) in [0, 1].
        partners: (B, 3, H, W), the pictures of `morph_partner`.
        labels: (B, 9) class indices.
        partner_labels: (B, 9), likewise.

    Returns:
        Damaged pictures (B, 3, H, W) and their labels (B, 9).
    """
    count, device = len(images), images.device
    unreadable = torch.tensor([len(values) for values in COLUMNS.values()], device=device)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, device=device)

    kind = torch.rand(count, device=device)
    kinds = [(kind >= low) & (kind < high) for low, high in pairwise(_EDGES)]
    _, noisy, blurred, halfway, blended, morphed, empty = kinds

    sigma = torch.where(draw(0, 1) < 0.5, draw(0.0, 1.0), 0.0)
    sigma = torch.where(blurred, draw(4.0, 10.0), sigma)
    sigma = torch.where(halfway & (draw(0, 1) < 0.5), draw(0.5, 3.0), sigma)
    weight = draw(0.35, 0.65)[:, None, None, None]
    other = torch.where(morphed[:, None, None, None], partners, images.roll(1, 0))
    images = torch.where((blended | morphed)[:, None, None, None], torch.lerp(images, other, weight), images)
    images = torch.where(empty[:, None, None, None], images[:, :, :1, :1], images)
    images = blur(images, sigma)
    level = torch.where(halfway, draw(0.5, 1.0), 0.0)
    images = torch.where(halfway[:, None, None, None], half_denoised(images, level), images)
    images = add_noise(images, torch.where(noisy, draw(0.4, 1.2), draw(0.0, 0.07) * (draw(0, 1) < 0.6)))

    gone = (noisy | blurred | halfway | blended)[:, None].expand(-1, labels.shape[1]).clone()
    gone |= morphed[:, None] & (labels != partner_labels)
    gone[:, 1:] |= empty[:, None]
    return images, torch.where(gone, unreadable, labels)


_EDGES = (0.0, 0.55, 0.65, 0.72, 0.82, 0.87, 0.97, 1.01)
