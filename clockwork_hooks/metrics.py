"""Metrics of pictures: each is two functions, pictures to rows of numbers, and all rows to scores.

Paired metrics compare with the plain picture from the same noise, distributional ones with a set of real pictures,
task metrics with what was asked for. A metric of your own is any object with `better`, `observe` and `score`. The
Fréchet distance is computed in float64, over any feature extractor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clockwork_hooks.errors import ArgumentError, need

__all__ = [
    "Better",
    "ClipScore",
    "Frechet",
    "Metric",
    "Paired",
    "Statistics",
    "clip_score",
    "fid",
    "frechet_distance",
    "psnr",
    "relative_l2",
    "statistics_of",
    "statistics_of_features",
]

Better = Literal["higher", "lower"]
SAME_DB = 100.0  # stands for the infinite PSNR of equal pictures


@runtime_checkable
class Metric(Protocol):
    """One way of judging pictures; it keeps no state, so any number of variants can be judged side by side.

    Example:
        >>> class Brightness:
        ...     better = {"brightness": "higher"}
        ...
        ...     def observe(self, images, plain, conditions):
        ...         return images.mean((1, 2, 3))[:, None]
        ...
        ...     def score(self, rows):
        ...         return {"brightness": float(rows.mean())}
        >>> isinstance(Brightness(), Metric)
        True
    """

    @property
    def better(self) -> Mapping[str, Better]:
        """Name of each score → is a higher or a lower value better?"""
        ...

    def observe(self, images: Tensor, plain: Tensor | None, conditions: Any) -> Tensor | None:
        """A row of numbers for each picture.

        Args:
            images: (B, 3, H, W) in [0, 1].
            plain: the plain pictures from the same noise; None when it is the plain pictures that are judged.
            conditions: what the pictures were made from, as given to `evaluate`: often B prompts.

        Returns:
            (B, K), K at least 1; None where this metric says nothing about these pictures.
        """
        ...

    def score(self, rows: Tensor) -> dict[str, float]:
        """The scores of all pictures together. Args: rows (N, K), float64, on the CPU."""
        ...


def psnr(images: Tensor, plain: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures (B, ...) in [0, 1], one by one; 100 dB stands for equal ones.

    Args:
        images: to judge, (B, ...), floating.
        plain: to compare with, of the same shape.

    Returns:
        (B,), in dB, at least of single precision.

    Raises:
        ArgumentError: the two are no floating tensors of one shape.

    Example:
        >>> psnr(torch.full((2, 3, 4, 4), 0.6), torch.full((2, 3, 4, 4), 0.5)).round()
        tensor([20., 20.])
    """
    images, plain = _comparable(images, plain)
    return (-10 * (images - plain).square().flatten(1).mean(1).log10()).clamp_max(SAME_DB)


def relative_l2(samples: Tensor, plain: Tensor) -> Tensor:
    """‖x - plain‖ / ‖plain‖ of samples (B, ...), one by one.

    Args:
        samples: x, (B, ...), floating.
        plain: to compare with, of the same shape.

    Returns:
        (B,), a share: 0.01 is 1%, at least of single precision.

    Raises:
        ArgumentError: the two are no floating tensors of one shape.

    Example:
        >>> relative_l2(torch.full((2, 3, 4, 4), 1.5), torch.ones(2, 3, 4, 4))
        tensor([0.5000, 0.5000])
    """
    samples, plain = _comparable(samples, plain)
    far: Tensor = (samples - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1).clamp_min(1e-12)
    return far


def _comparable(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both, of at least single precision: the square of a small difference is 0 in half precision."""
    for each in (one, other):
        if not isinstance(each, Tensor) or not each.is_floating_point() or each.shape != one.shape:
            raise ArgumentError(
                "only two floating tensors of the same shape can be compared",
                seen={"first": _described(one), "second": _described(other)},
                do="pass batches (B, ...) of as many; of bytes, `images / 255`",
            )
    precise = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
    return one.to(precise), other.to(precise)


def _described(value: object) -> str:
    return f"{value.dtype}, {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


@dataclass(frozen=True, slots=True)
class Paired:
    """Likeness to the plain pictures from the same noise: PSNR in dB, SSIM and relative L2 distance.

    Means over the pictures. SSIM is torchmetrics', relative L2 is ‖x - plain‖ / ‖plain‖. The PSNR of equal pictures
    counts as 100 dB.

    Example:
        >>> plain = torch.rand(2, 3, 16, 16)
        >>> rows = Paired().observe((plain + 0.1).clamp(0, 1), plain, None)
        >>> sorted(Paired().score(rows))
        ['PSNR', 'SSIM', 'relative L2']
    """

    @property
    def better(self) -> Mapping[str, Better]:
        """Two where higher is better, one where lower is."""
        return {"PSNR": "higher", "SSIM": "higher", "relative L2": "lower"}

    def observe(self, images: Tensor, plain: Tensor | None, conditions: Any) -> Tensor | None:
        """PSNR, SSIM and relative L2 (B, 3); None for the plain pictures themselves."""
        need("SSIM is torchmetrics'", "torchmetrics", install="clockwork-hooks[evaluate]")
        from torchmetrics.functional.image import structural_similarity_index_measure

        if plain is None:
            return None
        if images.shape != plain.shape:
            raise ArgumentError(
                "pictures are paired with the plain ones from the same noise, one by one",
                seen={"pictures": tuple(images.shape), "plain": tuple(plain.shape)},
                do="let generate return pictures of one shape for a batch and seed, whatever the variant",
            )
        images, plain = images.float(), plain.float()
        ssim = structural_similarity_index_measure(images, plain, data_range=1.0, reduction="none")
        rows = psnr(images, plain), torch.as_tensor(ssim).reshape(-1), relative_l2(images, plain)
        return torch.stack(rows, 1)

    def score(self, rows: Tensor) -> dict[str, float]:
        """Means over the pictures."""
        return dict(zip(self.better, rows.mean(0).tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a Fréchet distance compares.

    Attributes:
        mean: of the features, (F,), float64.
        covariance: of the features, (F, F), float64.
        count: how many pictures they are of; 0 where that is not known.
    """

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
    rows = [features(batch).double().cpu() for batch in batches if len(batch)]
    return statistics_of_features(torch.cat(rows) if rows else torch.empty(0, 1))


def statistics_of_features(rows: Tensor) -> Statistics:
    """Mean and covariance of features.

    Args:
        rows: (N, F), of any dtype and device; computed in float64.

    Returns:
        Both, and N.

    Raises:
        ArgumentError: fewer than two rows.

    Example:
        >>> statistics_of_features(torch.tensor([[0.0], [2.0]])).covariance
        array([[2.]])
    """
    if len(rows) < 2:
        raise ArgumentError("a covariance needs at least two pictures", seen={"pictures": len(rows)}, do="pass more")
    values = rows.double().cpu().numpy()
    return Statistics(values.mean(0), np.atleast_2d(np.cov(values, rowvar=False)), len(values))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared Fréchet distance of two Gaussians: ‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2(Σ_a^½ Σ_b Σ_a^½)^½).

    The root is taken of a symmetric product, by eigenvalues, so it is real and exact for singular covariances too.

    Args:
        a, b: statistics of the same features.

    Returns:
        The distance, in units of the features squared; 0 for equal statistics.

    Example:
        >>> same = statistics_of_features(torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 0.0]]))
        >>> moved = Statistics(same.mean + 3, same.covariance, same.count)
        >>> round(frechet_distance(same, same), 9), round(frechet_distance(same, moved), 9)
        (0.0, 18.0)

    Source: Heusel et al., arXiv 1706.08500, Eq. 6.
    """
    root = _root(a.covariance)
    cross = np.linalg.eigvalsh(root @ b.covariance @ root)
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(cross.clip(min=0)).sum()
    return float(((a.mean - b.mean) ** 2).sum() + spread)


def _root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)


@dataclass(frozen=True, slots=True)
class Frechet:
    """Squared Fréchet distance to a set of real pictures, in the space of any feature extractor.

    Values of different extractors, or of different numbers of pictures, cannot be compared.

    Args:
        features: pictures (B, 3, H, W) in [0, 1] to features (B, F).
        reference: `statistics_of` the real pictures, with the same extractor.
        name: of the score.

    Example:
        >>> extract = lambda images: images.mean((2, 3))
        >>> metric = Frechet(extract, statistics_of(extract, [torch.rand(64, 3, 8, 8)]))
        >>> metric.score(metric.observe(torch.rand(64, 3, 8, 8), None, None))["Fréchet"] < 1
        True
    """

    features: Callable[[Tensor], Tensor]
    reference: Statistics
    name: str = "Fréchet"

    @property
    def better(self) -> Mapping[str, Better]:
        """Lower is better."""
        return {self.name: "lower"}

    def observe(self, images: Tensor, plain: Tensor | None, conditions: Any) -> Tensor:
        """Features (B, F)."""
        return self.features(images)

    def score(self, rows: Tensor) -> dict[str, float]:
        """The distance of all pictures to the reference."""
        return {self.name: frechet_distance(self.reference, statistics_of_features(rows))}


def fid(real: Iterable[Tensor], *, feature: nn.Module | None = None, weights: Path | str | None = None) -> Frechet:
    """The usual FID: Fréchet distance in Inception features, with torchmetrics' network and weights of your own.

    Args:
        real: batches of real pictures (B, 3, H, W) in [0, 1].
        feature: another extractor, from uint8 pictures to (B, F); None for torch-fidelity's Inception v3.
        weights: file of the Inception weights (pt_inception-2015-12-05), for machines without network.

    Returns:
        A metric named "FID".

    Raises:
        ArgumentError: torchmetrics is not installed; or Inception is asked for, and torch-fidelity is not.

    Source: Heusel et al., arXiv 1706.08500; the paper's Tab. 1 uses it on 5,000 MS-COCO pictures.
    """
    need("FID is torchmetrics'", "torchmetrics", install="clockwork-hooks[evaluate]")
    if feature is None:
        need("the FID's Inception v3 is torch-fidelity's", "torch_fidelity", install="torch-fidelity")
    from torchmetrics.image.fid import FrechetInceptionDistance

    path = None if weights is None else str(weights)
    options: dict[str, Any] = {"feature_extractor_weights_path": path} if feature is None else {"feature": feature}
    network = FrechetInceptionDistance(**options).inception

    def features(images: Tensor) -> Tensor:
        rows: Tensor = network.to(images.device)(_bytes(images))
        return rows.flatten(1)

    return Frechet(features, statistics_of(features, real), "FID")


@dataclass(frozen=True, slots=True)
class ClipScore:
    """How well pictures fit their prompts: the mean cosine of CLIP's two embeddings, as in the paper (not times 100).

    torchmetrics' CLIPScore is 100 times this; its 1.9 does not run with transformers 5, so the cosine is taken here.

    Args:
        model: a `transformers.CLIPModel`.
        processor: its `CLIPProcessor`; longer prompts are cut to what the model reads.
    """

    model: Any
    processor: Any

    @property
    def better(self) -> Mapping[str, Better]:
        """Higher is better."""
        return {"CLIP": "higher"}

    @torch.no_grad()
    def observe(self, images: Tensor, plain: Tensor | None, conditions: Any) -> Tensor:
        """The cosine of each picture and its prompt (B, 1)."""
        longest = self.model.config.text_config.max_position_embeddings
        inputs = self.processor(
            text=list(conditions), images=list(_bytes(images)), return_tensors="pt", padding=True, truncation=True,
            max_length=longest,
        )  # fmt: skip
        embeddings = self.model.to(images.device)(**inputs.to(images.device))
        cosines: Tensor = nn.functional.cosine_similarity(embeddings.image_embeds, embeddings.text_embeds)
        return cosines[:, None]

    def score(self, rows: Tensor) -> dict[str, float]:
        """The mean over the pictures."""
        return {"CLIP": float(rows.mean())}


def clip_score(folder: Path | str) -> ClipScore:
    """CLIP score with a CLIP model from a local folder (`config.json`, weights, tokenizer, image processor).

    Args:
        folder: as `CLIPModel.save_pretrained` and `CLIPProcessor.save_pretrained` write it.

    Returns:
        A metric named "CLIP": the mean cosine of a picture and its prompt, -1 to 1 (not times 100).

    Raises:
        ArgumentError: there is no such folder, or transformers is not installed.

    Source: Hessel et al., arXiv 2104.08718; the paper's Tab. 1.
    """
    if not Path(folder).is_dir():
        raise ArgumentError(
            "a CLIP model is loaded from a folder on this machine",
            seen={"folder": folder},
            do="download one first: hf download openai/clip-vit-large-patch14 --local-dir clip",
        )
    need("CLIP is that of transformers", "transformers", install="clockwork-hooks[diffusers]")
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    return ClipScore(model, CLIPProcessor.from_pretrained(folder, local_files_only=True))


def _bytes(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)
