"""Training of the attribute classifier: the damage it must read through or refuse, and how well it judges."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from clockwork_hooks.demo.classifier import Accuracy, AttributeClassifier, score
from clockwork_hooks.demo.scenes import COLOURS, COLUMNS, SHAPES, WHITE_BACKGROUND, Scenes, draw_split, render_bytes

__all__ = ["add_noise", "blur", "damage", "half_denoised", "judge_classifier", "morph_partner", "train_classifier"]


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


Log = Callable[[dict[str, Any]], None]


def train_classifier(
    *, device: str, seconds: float, log: Log, batch: int = 512, scenes: int = 400_000, seed: int = 0, rate: float = 2e-3
) -> AttributeClassifier:
    """Train the classifier for some time.

    Args:
        device: where to train.
        seconds: how long, counted after the scenes are drawn.
        log: takes one record every few hundred iterations.
        batch: scenes an iteration.
        scenes: how many different scenes are drawn (all of training combinations); damage is drawn anew each time.
        seed: of everything.
        rate: peak learning rate; warmed up, then a cosine down to zero over the given time.

    Returns:
        The trained classifier, in evaluation mode.
    """
    torch.manual_seed(seed)
    drawn = draw_split(scenes, seed, test=False)
    partners = morph_partner(drawn, seed + 1)
    images, partner_images = render_bytes(drawn, device), render_bytes(partners, device)
    labels = torch.from_numpy(drawn.attributes).to(device)
    partner_labels = torch.from_numpy(partners.attributes).to(device)

    classifier = AttributeClassifier().to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=rate, weight_decay=0.02)
    started, iteration, elapsed = time.monotonic(), 0, 0.0
    while elapsed < seconds:
        fraction = elapsed / seconds
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (iteration + 1) / 200) * 0.5 * (1 + np.cos(np.pi * fraction))
        rows = torch.randint(0, scenes, (batch,), device=device)
        inputs, wanted = damage(
            images[rows].float() / 255, partner_images[rows].float() / 255, labels[rows], partner_labels[rows]
        )
        logits = classifier(inputs)
        loss = torch.stack([F.cross_entropy(head, wanted[:, i]) for i, head in enumerate(logits)]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
        iteration += 1
        if iteration % 200 == 0:
            log({"stage": "classifier", "iteration": iteration, "loss": float(loss), "seconds": round(elapsed, 1)})
        elapsed = time.monotonic() - started
    return classifier.eval()


def judge_classifier(classifier: AttributeClassifier, *, count: int = 4096, seed: int = 99) -> dict[str, Any]:
    """Measure the classifier on held-out scenes, as they are and damaged.

    Args:
        classifier: to measure.
        count: scenes for each measurement.
        seed: of the scenes and of the damage.

    Returns:
        For each damage the shares of right and of unreadable attributes. On strong damage a low share of right
        answers and a high share of unreadable ones is good: the classifier judges and does not guess.
    """
    device = next(classifier.parameters()).device
    scenes = draw_split(count, seed, test=True)
    images = render_bytes(scenes, device).float() / 255
    generator = torch.Generator().manual_seed(seed)
    damages: dict[str, Tensor] = {
        "clean": images,
        "slight noise 0.05": add_noise(images, 0.05, generator),
        "slight blur 0.8 px": blur(images, 0.8),
        "noise 0.5": add_noise(images, 0.5, generator),
        "blur 5 px": blur(images, 5.0),
        "half-denoised, sigma 0.7": half_denoised(images, 0.7, generator),
        "half-denoised blurred, sigma 0.6": half_denoised(blur(images, 2.0), 0.6, generator),
        "blend of two scenes": (images + images.roll(1, 0)) / 2,
        "no objects": images[:, :, :1, :1].expand_as(images).contiguous(),
    }
    return {name: asdict(_judge(classifier, picture, scenes.attributes)) for name, picture in damages.items()}


def _judge(classifier: AttributeClassifier, images: Tensor, wanted: NDArray[np.int64]) -> Accuracy:
    return score(classifier.read(images), wanted)
