"""The attribute classifier: reads a scene back into its attributes, or says that it cannot.

It judges the generator, which never sees it. Every attribute has a class "unreadable", trained on noisy, blurred,
blended and empty pictures, so a picture that is half a scene scores low instead of being guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from clockwork_hooks.demo.captions import ANY, parse
from clockwork_hooks.demo.scenes import COLUMNS, IMAGE_SIZE, NONE
from clockwork_hooks.errors import ArgumentError

__all__ = ["FEATURES", "UNREADABLE", "Accuracy", "AttributeClassifier", "attribute_accuracy", "score"]

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
            "every picture has its prompt",
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
