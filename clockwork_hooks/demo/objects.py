"""Where are the objects of a picture? By their difference from the background: no model is asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["layout_error", "objects"]

_FAR = 0.25  # of a colour channel in [0, 1]: more than tints and a sampler's shading
_SMALLEST = 12  # pixels


def objects(picture: Tensor) -> NDArray[np.float64]:
    """The objects of a picture: regions that hang together and differ from the background.

    Args:
        picture: (3, H, W) in [0, 1]; its border is background.

    Returns:
        (N, 3) rows of centre x, centre y and radius √(area/π) in pixels, largest first.
    """
    border = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], 1)
    background = border.median(1).values
    mask = ((picture - background[:, None, None]).abs().amax(0) > _FAR).cpu().numpy()
    discs: list[tuple[Any, ...]] = []
    labels = _labels(mask)
    for label in range(1, int(labels.max()) + 1):
        y, x = np.nonzero(labels == label)
        if len(x) >= _SMALLEST:
            discs.append((x.mean(), y.mean(), (len(x) / np.pi) ** 0.5))
    return np.array(sorted(discs, key=lambda row: -row[2]), dtype=np.float64).reshape(-1, 3)


def _labels(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Numbers the connected parts, from 1: each pixel takes its neighbours' largest number until nothing changes."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        around = np.max(
            [padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]], 0
        )
        spread = np.where(mask, around, 0)
        if (spread == labels).all():
            break
        labels = spread
    return np.searchsorted(np.unique(np.append(labels, 0)), labels).astype(np.int64)


def layout_error(before: Tensor, after: Tensor) -> tuple[float, float, int]:
    """How far objects have moved, and how much they have grown or shrunk.

    Each object of the first picture is compared with the nearest one of the second. One that has none within its own
    radius is gone from its place, wherever the nearest may be: it counts as moved by its radius.

    Args:
        before, after: (B, 3, H, W) pictures in [0, 1].

    Returns:
        Mean distance of the centres in pixels, mean relative difference of the radii (1 for those gone), and the
        number of objects that appeared or vanished; 0 for the means if the first pictures show none.

    Example:
        >>> import torch
        >>> first, second = torch.zeros(2, 1, 3, 64, 64)
        >>> first[..., 10:20, 10:20] = 1
        >>> second[..., 10:20, 13:23] = 1
        >>> layout_error(first, second)
        (3.0, 0.0, 0)
    """
    moved, grown, lost = [], [], 0
    for one, other in zip(before, after, strict=True):
        old, new = objects(one), objects(other)
        lost += abs(len(old) - len(new))
        for x, y, radius in old:
            far = np.hypot(new[:, 0] - x, new[:, 1] - y)
            there = len(far) > 0 and far.min() <= radius
            moved.append(far.min() if there else radius)
            grown.append(abs(new[far.argmin(), 2] / radius - 1) if there else 1.0)
    return float(np.mean(moved or [0])), float(np.mean(grown or [0])), lost
