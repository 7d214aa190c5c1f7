"""Training of the attribute classifier, and the measurement of how well it judges."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from clockwork_hooks.demo.classifier import Accuracy, AttributeClassifier, score
from clockwork_hooks.demo.degrade import add_noise, blur, damage, half_denoised, morph_partner
from clockwork_hooks.demo.scenes import draw_split, render_bytes

__all__ = ["judge_classifier", "train_classifier"]

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
