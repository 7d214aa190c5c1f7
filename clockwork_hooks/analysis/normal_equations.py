"""Linear least squares from sums: what is seen goes into normal equations, from which any kind of map is solved for.

Features are, in order: 1; the cached exit; the entry less the one that came with the cached exit; that one; and, for
kernels alone, the cached exit at the positions around. The
target is the exit less the cached one, so weights of zero are the identity. All sums are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["KINDS", "Kind", "NormalEquations", "Shape", "shared_basis"]

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_CHUNK = 1 << 16  # rows that are made float64 at once


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of map.

    Attributes:
        form: of `CalibratedAdaptor`.
        reads: what the matrix reads; a kernel also reads the cached exit around each position.
        gain_only: one number for all channels.
    """

    form: str
    reads: tuple[str, ...] = ("exit",)
    gain_only: bool = False


KINDS = {
    "gain": Kind("affine", gain_only=True),
    "affine": Kind("affine"),
    "exit": Kind("linear"),
    "exit+entry": Kind("linear", ("exit", "entry")),
    "exit+entry+before": Kind("linear", ("exit", "entry", "entry_cached")),
    "kernel": Kind("kernel", ("exit", "entry", "entry_cached")),
    "low rank": Kind("low rank", ("exit", "entry", "entry_cached")),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Channels of the exit, of the entry (0 for none), and of the positions around the exit's (0 but for kernels)."""

    exit: int
    entry: int
    around: int = 0

    @property
    def features(self) -> int:
        """How many there are."""
        return 1 + self.exit + 2 * self.entry + self.around

    def change(self, reads: Sequence[str], like: Tensor) -> Tensor:
        """(features that are read, all features): what is read, as sums of all features; 1 included."""
        eye = torch.eye(self.features, dtype=like.dtype, device=like.device)
        exit, difference, before = eye[: 1 + self.exit], eye[1 + self.exit :][: self.entry], eye[-self.entry :]
        if "entry_cached" in reads:
            return eye
        return torch.cat((exit, difference + before)) if "entry" in reads else exit


@dataclass(slots=True)
class NormalEquations:
    """The sums over all positions seen so far.

    Attributes:
        shape: channels.
        gram: (p, p), of features with features; its first entry is the number of positions.
        cross: (p, C), of features with targets.
        square: (C,), of targets with themselves.
        exit_square: of exits with themselves.
        low, high: (C,) the least and the greatest exit.
    """

    shape: Shape
    gram: Tensor
    cross: Tensor
    square: Tensor
    exit_square: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def empty(cls, shape: Shape, device: torch.device) -> NormalEquations:
        """Nothing seen yet; on a device without float64 the sums are on the CPU."""
        device = torch.device("cpu") if device.type == "mps" else device
        zeros = torch.zeros(shape.features, shape.features, dtype=torch.float64, device=device)
        endless = torch.full((shape.exit,), torch.inf, dtype=torch.float64, device=device)
        cross, square = zeros.new_zeros(shape.features, shape.exit), zeros.new_zeros(shape.exit)
        return cls(shape, zeros, cross, square, zeros.new_zeros(()), endless, -endless)

    def add(
        self,
        cached: Tensor,
        exit: Tensor,
        entry: Tensor | None,
        before: Tensor | None,
        around: Tensor | None = None,
    ) -> None:
        """Add positions: (n, C) exits, cached and true; (n, E) entries, now and with the cached exit; (n, A) around."""
        for start in range(0, len(exit), _CHUNK):
            rows = slice(start, start + _CHUNK)
            was, now = (x[rows].to(self.gram.device).double() for x in (cached, exit))
            columns = [was.new_ones(len(was), 1), was]
            if entry is not None and before is not None:
                here, there = (x[rows].to(self.gram.device).double() for x in (entry, before))
                columns += [here - there, there]
            if around is not None:
                columns.append(around[rows].to(self.gram.device).double())
            features, target = torch.cat(columns, 1), now - was
            self.gram.addmm_(features.T, features)
            self.cross.addmm_(features.T, target)
            self.square += target.square().sum(0)
            self.exit_square += now.square().sum()
            self.low, self.high = torch.minimum(self.low, now.amin(0)), torch.maximum(self.high, now.amax(0))

    def __add__(self, other: NormalEquations) -> NormalEquations:
        return NormalEquations(
            self.shape,
            self.gram + other.gram,
            self.cross + other.cross,
            self.square + other.square,
            self.exit_square + other.exit_square,
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
        )

    @property
    def count(self) -> float:
        """Positions seen."""
        return float(self.gram[0, 0])

    def finite(self) -> bool:
        """Are all sums numbers?"""
        return bool(self.gram.isfinite().all() and self.cross.isfinite().all())

    def error(self, weights: Tensor) -> float:
        """‖r̂ - r‖² / ‖r‖² over the positions seen, r̂ by these weights, (p, C)."""
        explained = 2 * (weights * self.cross).sum() - (weights * (self.gram @ weights)).sum()
        return float((self.square.sum() - explained).clamp_min(0) / self.exit_square.clamp_min(1e-300))

    # -- solving: weights are (p, C), rows of what is not read zero ---------------------------------------------------

    def solve(self, kind: Kind, ridge: float) -> Tensor:
        """The least squares of a kind, (p, C); of the low-rank kind, before its rank is cut.

        Args:
            kind: which.
            ridge: relative to the diagonal of the covariance.
        """
        if kind.gain_only:
            return self._gain(ridge)
        affine = self._affine(ridge)
        if kind.form == "affine":
            return affine
        if kind.form == "low rank":
            return affine + self._linear(self.cross - self.gram @ affine, kind.reads, ridge)
        return self._linear(self.cross, kind.reads, ridge)

    def cut(self, weights: Tensor, ridge: float, basis: Tensor) -> Tensor:
        """Low-rank weights: of what is beyond gain and bias, what lies in the basis, (rank, C)."""
        gain = self._affine(ridge)
        low_rank = gain + (weights - gain) @ basis.T @ basis
        low_rank[0] = (self.cross[0] - self.gram[0, 1:] @ low_rank[1:]) / self.gram[0, 0].clamp_min(1)
        return low_rank

    def _gain(self, ridge: float) -> Tensor:
        own = 1 + torch.arange(self.shape.exit, device=self.gram.device)
        above, below = self.cross[own, own - 1].sum(), self.gram.diagonal()[own].sum()
        weights = torch.zeros_like(self.cross)
        weights[own, own - 1] = above / (below * (1 + ridge)).clamp_min(1e-300)
        return weights

    def _affine(self, ridge: float) -> Tensor:
        own = 1 + torch.arange(self.shape.exit, device=self.gram.device)
        count, mean, target = self.gram[0, 0].clamp_min(1), self.gram[0, own], self.cross[0]
        variance = self.gram.diagonal()[own] - mean.square() / count
        covariance = self.cross[own, own - 1] - mean * target / count
        gain = covariance / (variance * (1 + ridge)).clamp_min(1e-12 * variance.amax().clamp_min(1e-300))
        weights = torch.zeros_like(self.cross)
        weights[own, own - 1], weights[0] = gain, (target - gain * mean) / count
        return weights

    def _linear(self, cross: Tensor, reads: Sequence[str], ridge: float) -> Tensor:
        """Centred, so that the ridge does not pull at the bias."""
        change = self.shape.change(reads, self.gram)
        gram, cross = change @ self.gram @ change.T, change @ cross
        count, mean = gram[0, 0].clamp_min(1), gram[0, 1:]
        covariance = gram[1:, 1:] - torch.outer(mean, mean) / count
        diagonal = covariance.diagonal().clamp_min(1e-12 * covariance.diagonal().amax().clamp_min(1e-300))
        scale = diagonal.rsqrt()
        scaled = covariance * scale[:, None] * scale
        scaled.diagonal().add_(ridge)
        target = (cross[1:] - torch.outer(mean, cross[0]) / count) * scale[:, None]
        inner = torch.linalg.solve(scaled, target) * scale[:, None]
        bias = (cross[:1] - mean[None] @ inner) / count
        weights: Tensor = change.T @ torch.cat((bias, inner))
        return weights

    def added(self, weights: Tensor, ridge: float) -> Tensor:
        """(C, C): the covariance of what these low-rank weights add to gain and bias."""
        inner = weights - self._affine(ridge)
        mean = self.gram[:1] / self.gram[0, 0].clamp_min(1)
        covariance: Tensor = inner.T @ (self.gram - self.gram[0, 0] * mean.T @ mean) @ inner
        return covariance


def shared_basis(added: Sequence[Tensor], rank: int) -> Tensor:
    """(rank, C): the directions of the exit in which several maps do most, each map of equal weight.

    Source: reduced-rank regression, Izenman, "Reduced-rank regression for the multivariate linear model", 1975.
    """
    total = sum((one / one.trace().clamp_min(1e-300) for one in added), torch.zeros_like(added[0]))
    basis: Tensor = torch.linalg.eigh(total).eigenvectors[:, -rank:].flip(1).T.contiguous()
    return basis
