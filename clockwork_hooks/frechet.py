"""The Fréchet distance between two sets of pictures, over any feature extractor, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clockwork_hooks.errors import ArgumentError

__all__ = ["Statistics", "frechet_distance", "statistics_of", "statistics_of_features"]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Mean (F,) and covariance (F, F) of features, in float64, and of how many pictures."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    count: int = 0


@torch.no_grad()
def statistics_of(features: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> Statistics:
    """Feature statistics of pictures, a batch at a time.

    Args:
        features: pictures (B, 3, H, W) in [0, 1] to features (B, F).
        batches: the pictures, at least two in all; several thousand for a stable distance.

    Returns:
        Mean and covariance of all features.

    Raises:
        ArgumentError: fewer than two pictures.

    Example:
        >>> pictures = torch.rand(8, 3, 4, 4)
        >>> statistics_of(lambda x: x.flatten(1), pictures.split(4)).mean.shape
        (48,)
    """
    found = [features(batch).double().cpu() for batch in batches if len(batch)]
    return statistics_of_features(torch.cat(found) if found else torch.empty(0, 1))


def statistics_of_features(rows: Tensor) -> Statistics:
    """Mean and covariance of features (N, F).

    Raises:
        ArgumentError: fewer than two rows.
    """
    if len(rows) < 2:
        raise ArgumentError("a covariance needs at least two pictures", seen={"pictures": len(rows)}, do="pass more")
    values = rows.double().cpu().numpy()
    return Statistics(values.mean(0), np.atleast_2d(np.cov(values, rowvar=False)), len(values))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared Fréchet distance of two Gaussians: ‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2(Σ_a^½ Σ_b Σ_a^½)^½).

    The root is taken of a symmetric product, by eigenvalues, so it is real and exact for singular covariances too.
    """
    root = _root(a.covariance)
    cross = np.linalg.eigvalsh(root @ b.covariance @ root)
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(cross.clip(min=0)).sum()
    return float(((a.mean - b.mean) ** 2).sum() + spread)


def _root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)
