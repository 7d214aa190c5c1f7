"""The attribute classifier: reads a scene back into its attributes, or says that it cannot; and how it is trained.

It judges the generator, which never sees it. Every attribute has a class "unreadable", trained on noisy, blurred,
blended and empty pictures, so a picture that is half a scene scores low instead of being guessed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from clockwork_hooks.demo.captions import ANY, parse
from clockwork_hooks.demo.scenes import (
    COLOURS,
    COLUMNS,
    IMAGE_SIZE,
    NONE,
    SHAPES,
    WHITE_BACKGROUND,
    Scenes,
    draw_split,
    render_bytes,
)
from clockwork_hooks.errors import ArgumentError

UNREADABLE = -2
FEATURES = 160
_CHUNK = 1024  # images per forward pass when reading


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How many of the attributes asked for are there.

    Attributes:
        total: the share, in [0, 1], over all asked attributes of all pictures.
        by_attribute: the same per column of `COLUMNS`, and only for columns that were asked for.
        perfect: the share of pictures with every asked attribute right.
        unreadable: the share of asked attributes that the classifier refused to read.
        asked: how many attributes were asked for.
    """

    total: float
    by_attribute: dict[str, float]
    perfect: float
    unreadable: float
    asked: int


class AttributeClassifier(nn.Module):
    """A small CNN with one head for each attribute; the last class of each head is "unreadable"."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2),
            *_conv(12, 48, 1), *_conv(48, 64, 2), *_conv(64, 64, 1), *_conv(64, 96, 2), *_conv(96, 96, 1),
            *_conv(96, 128, 2), nn.Conv2d(128, 64, 1), nn.SiLU(), nn.Flatten(),
            nn.Linear(64 * (IMAGE_SIZE // 16) ** 2, FEATURES),
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Linear(FEATURES, len(values) + 1) for values in COLUMNS.values())

    def features(self, images: Tensor) -> Tensor:
        """What the heads read, also the space of the Fréchet distance.

        Args:
            images: (B, 3, 64, 64) in [0, 1].

        Returns:
            (B, 160) features.

        Raises:
            ArgumentError: pictures of another shape.
        """
        if images.ndim != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ArgumentError(
                f"the attribute classifier reads RGB pictures of {IMAGE_SIZE}×{IMAGE_SIZE} pixels",
                seen={"shape": tuple(images.shape)},
                do=f"pass a batch of shape (B, 3, {IMAGE_SIZE}, {IMAGE_SIZE})",
            )
        body: Tensor = self.body(images * 2 - 1)
        return body

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits of each attribute: nine tensors (B, values + 1). Args: images (B, 3, 64, 64) in [0, 1]."""
        features = F.silu(self.features(images))
        return [head(features) for head in self.heads]

    @torch.no_grad()
    def read(self, images: Tensor) -> NDArray[np.int64]:
        """Read pictures.

        Args:
            images: (B, 3, 64, 64) in [0, 1], on any device.

        Returns:
            (B, 9) indices into the values of `COLUMNS`, `UNREADABLE` (-2) where there is nothing clear to read.
        """
        if len(images) == 0:
            return np.empty((0, len(COLUMNS)), dtype=np.int64)
        weight = self.heads[0].weight
        rows = []
        for chunk in images.split(_CHUNK):
            logits = self(chunk.to(weight.device, weight.dtype))
            choice = torch.stack([values.argmax(1) for values in logits], 1)
            last = torch.tensor([values.shape[1] - 1 for values in logits], device=choice.device)
            rows.append(torch.where(choice == last, UNREADABLE, choice).cpu().numpy())
        return np.concatenate(rows)


def _conv(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU()


def attribute_accuracy(classifier: AttributeClassifier, images: Tensor, prompts: Sequence[str]) -> Accuracy:
    """How well pictures show what their prompts ask for.

    Args:
        classifier: reads the pictures.
        images: (B, 3, 64, 64) in [0, 1].
        prompts: B captions; attributes that they leave open are not counted.

    Returns:
        The shares of attributes that are right.

    Raises:
        ArgumentError: there are more pictures than prompts, or fewer.
        CaptionError: a prompt that cannot be read.
    """
    if len(images) != len(prompts):
        raise ArgumentError(
            "pictures and prompts must be equally many",
            seen={"pictures": len(images), "prompts": len(prompts)},
            do="pass equally many",
        )
    return score(classifier.read(images), parse(prompts))


def score(seen: NDArray[np.int64], wanted: NDArray[np.int64]) -> Accuracy:
    """Compare attributes read with attributes wanted.

    An object that should not be there is asked for once, in "count", not again in its shape, colour and size.

    Args:
        seen: (B, 9) as `AttributeClassifier.read` gives them.
        wanted: (B, 9) as `captions.parse` gives them.

    Returns:
        The shares of attributes that are right.
    """
    absent = np.array([values.index(NONE) if NONE in values else -3 for values in COLUMNS.values()])
    asked = (wanted != ANY) & (wanted != absent)
    right = (seen == wanted) & asked
    count = max(int(asked.sum()), 1)
    columns = [(name, int(asked[:, i].sum()), int(right[:, i].sum())) for i, name in enumerate(COLUMNS)]
    return Accuracy(
        total=float(right.sum() / count),
        by_attribute={name: hits / total for name, total, hits in columns if total},
        perfect=float((right == asked).all(1).mean()) if len(asked) else 0.0,
        unreadable=float(((seen == UNREADABLE) & asked).sum() / count),
        asked=int(asked.sum()),
    )


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
    *, device: str, seconds: float, log: Log, batch: int = 512, scenes: int = 400_000, seed: int = 0
) -> AttributeClassifier:
    """Train the classifier for some time; the learning rate is warmed up, then falls in a cosine to zero.

    Args:
        device: where to train.
        seconds: how long, counted after the scenes are drawn.
        log: takes one record every few hundred iterations.
        batch: scenes an iteration.
        scenes: how many different scenes are drawn (all of training combinations); damage is drawn anew each time.
        seed: of everything.

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
    rate = 2e-3  # at its peak
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


def judge_classifier(classifier: AttributeClassifier) -> dict[str, Any]:
    """Measure the classifier on held-out scenes, as they are and damaged.

    Returns:
        For each damage the shares of right and of unreadable attributes. On strong damage a low share of right
        answers and a high share of unreadable ones is good: the classifier judges and does not guess.
    """
    device = next(classifier.parameters()).device
    scenes = draw_split(4096, 99, test=True)
    images = render_bytes(scenes, device).float() / 255
    generator = torch.Generator().manual_seed(99)
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
    return {name: asdict(score(classifier.read(seen), scenes.attributes)) for name, seen in damages.items()}
