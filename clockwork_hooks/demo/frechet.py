"""The Fréchet distance between two sets of pictures, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clockwork_hooks.demo.classifier import AttributeClassifier
from clockwork_hooks.errors import ArgumentError

__all__ = ["Statistics", "frechet_distance", "statistics_of"]

_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Statistics:
    """Mean (F,) and covariance (F, F) of features, in float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]


@torch.no_grad()
def statistics_of(classifier: AttributeClassifier, images: Tensor) -> Statistics:
    """Feature statistics of pictures.

    Args:
        classifier: gives the features.
        images: (N, 3, 64, 64) in [0, 1], N at least 2; several thousand for a stable distance.

    Returns:
        Mean and covariance of the (N, F) features.

    Raises:
        ArgumentError: fewer than two pictures.
    """
    if len(images) < 2:
        raise ArgumentError("a covariance needs at least two pictures", seen={"pictures": len(images)}, do="pass more")
    weight = classifier.heads[0].weight
    chunks = [
        classifier.features(chunk.to(weight.device, weight.dtype)).double().cpu() for chunk in images.split(_CHUNK)
    ]
    features = torch.cat(chunks).numpy()
    return Statistics(features.mean(0), np.cov(features, rowvar=False))


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
