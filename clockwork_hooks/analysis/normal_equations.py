"""Linear least squares from sums: what is seen goes into normal equations, from which any kind of map is solved for.

Features are, in order: 1; the cached exit; the entry less the one that came with the cached exit; that one; and, for
kernels alone, the cached exit at the positions around. The
target is the exit less the cached one, so weights of zero are the identity. All sums are float64.

Beside these each channel may have a feature of its own, its trend: how it moved between the last two full passes. Its
weight is solved for together with the others, from what is left of target and trend where the others explain nothing
of the trend (the theorem of Frisch, Waugh and Lovell), so it needs no sums of trends of two channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["KINDS", "AdaptorKind", "NormalEquations", "Shape", "shared_basis"]

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_LEAST = 1e-12  # a ridge of 0 stands for it: features that move as another one does have weights then too
_STILL = 1e-10  # a feature that moves by 1e-5 of its size stands still: sums in float64 tell no less of many rows
_CHUNK = 1 << 11  # rows that are made float64 at once; 8192 take 0.3 GiB more for SD v1.5, and no less time


@dataclass(frozen=True, slots=True)
class AdaptorKind:
    """A kind of map.

    Attributes:
        form: of `CalibratedAdaptor`.
        reads: what the matrix reads; a kernel also reads the cached exit around each position.
        gain_only: one number for all channels.
        trend: each channel's trend is read too, by a gain of its own.
    """

    form: str
    reads: tuple[str, ...] = ("exit",)
    gain_only: bool = False
    trend: bool = False


_ALL = ("exit", "entry", "entry_cached")
KINDS = {
    "gain": AdaptorKind("affine", gain_only=True),
    "affine": AdaptorKind("affine"),
    "affine+trend": AdaptorKind("affine", trend=True),
    "exit": AdaptorKind("linear"),
    "exit+trend": AdaptorKind("linear", trend=True),
    "exit+entry": AdaptorKind("linear", ("exit", "entry")),
    "exit+entry+trend": AdaptorKind("linear", ("exit", "entry"), trend=True),
    "exit+entry+before": AdaptorKind("linear", _ALL),
    "exit+entry+before+trend": AdaptorKind("linear", _ALL, trend=True),
    "kernel": AdaptorKind("kernel", _ALL),
    "low rank": AdaptorKind("low rank", _ALL),
    "low rank+trend": AdaptorKind("low rank", _ALL, trend=True),
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
        exit, entries = eye[: 1 + self.exit], eye[1 + self.exit :]
        difference, before = entries[: self.entry], entries[self.entry :][: self.entry]
        if "entry_cached" in reads:
            return eye
        return torch.cat((exit, difference + before)) if "entry" in reads else exit


@dataclass(slots=True)
class NormalEquations:
    """The sums over all positions seen so far.

    Attributes:
        shape: channels.
        upper: (p·(p + 1) / 2,), the upper triangle of `gram`: there is one for each position of a calibration.
        cross: (p, C), of features with targets.
        square: (C,), of targets with themselves.
        exit_square: of exits with themselves.
        low, high: (C,) the least and the greatest exit.
        trend_gram: (p, C), of features with trends.
        trend_cross, trend_square: (C,), of each trend with its channel's target, and with itself.
    """

    shape: Shape
    upper: Tensor
    cross: Tensor
    square: Tensor
    exit_square: Tensor
    low: Tensor
    high: Tensor
    trend_gram: Tensor
    trend_cross: Tensor
    trend_square: Tensor

    @classmethod
    def empty(cls, shape: Shape, device: torch.device) -> NormalEquations:
        """Nothing seen yet; on a device without float64 the sums are on the CPU."""
        device = torch.device("cpu") if device.type == "mps" else device
        zeros = torch.zeros(shape.features * (shape.features + 1) // 2, dtype=torch.float64, device=device)
        endless = torch.full((shape.exit,), torch.inf, dtype=torch.float64, device=device)
        cross, square = zeros.new_zeros(shape.features, shape.exit), zeros.new_zeros(shape.exit)
        trends = torch.zeros_like(cross), torch.zeros_like(square), torch.zeros_like(square)
        return cls(shape, zeros, cross, square, zeros.new_zeros(()), endless, -endless, *trends)

    def add(
        self,
        cached: Tensor,
        exit: Tensor,
        entry: Tensor | None,
        before: Tensor | None,
        around: Tensor | None = None,
        trend: Tensor | None = None,
        *,
        stretch: float = 1.0,
    ) -> None:
        """Add positions: (n, C) exits, cached and true, and trends; (n, E) entries, now and before; (n, A) around.

        `stretch`: how many times longer their step is than the one that weights are for. Features are as an adaptor
        takes them there: so many times as large, but for what changes by itself, the entry's difference and the trend.
        """

        def as_taken(x: Tensor) -> Tensor:
            return x if stretch == 1.0 else x * stretch  # most are as they are: no copy of them

        triangle = self._triangle()
        for start in range(0, len(exit), _CHUNK):
            rows = slice(start, start + _CHUNK)
            was, now = (x[rows].to(self.upper.device).double() for x in (cached, exit))
            columns = [was.new_full((len(was), 1), stretch), as_taken(was)]
            if entry is not None and before is not None:
                here, there = (x[rows].to(self.upper.device).double() for x in (entry, before))
                columns += [here - there, as_taken(there)]
            if around is not None:
                columns.append(as_taken(around[rows].to(self.upper.device).double()))
            features, target = torch.cat(columns, 1), now - was
            self.upper += (features.T @ features)[triangle]
            self.cross.addmm_(features.T, target)
            self.square += target.square().sum(0)
            self.exit_square += now.square().sum()
            if trend is not None:
                own = trend[rows].to(self.upper.device).double()
                self.trend_gram.addmm_(features.T, own)
                self.trend_cross += (own * target).sum(0)
                self.trend_square += own.square().sum(0)
            self.low, self.high = torch.minimum(self.low, now.amin(0)), torch.maximum(self.high, now.amax(0))

    def __add__(self, other: NormalEquations) -> NormalEquations:
        return NormalEquations(
            self.shape,
            self.upper + other.upper,
            self.cross + other.cross,
            self.square + other.square,
            self.exit_square + other.exit_square,
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            self.trend_gram + other.trend_gram,
            self.trend_cross + other.trend_cross,
            self.trend_square + other.trend_square,
        )

    def widen(self, *others: NormalEquations) -> None:
        """Take the least and the greatest exits of others for seen, too."""
        for other in others:
            self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)

    @property
    def count(self) -> float:
        """Positions seen."""
        return float(self.upper[0])

    @property
    def gram(self) -> Tensor:
        """(p, p), of features with features; its first entry is the number of positions."""
        gram = self.upper.new_empty(self.shape.features, self.shape.features)
        rows, columns = self._triangle()
        gram[rows, columns] = gram[columns, rows] = self.upper
        return gram

    def _triangle(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the upper triangle."""
        rows, columns = torch.triu_indices(self.shape.features, self.shape.features, device=self.upper.device)
        return rows, columns

    @property
    def finite(self) -> bool:
        """Are all sums numbers?"""
        sums = (self.upper, self.cross, self.square, self.exit_square, self.trend_gram, self.trend_square)
        return all(bool(one.isfinite().all()) for one in sums)

    @property
    def identity(self) -> float:
        """`error` of weights of zero: of the cached exit as it is."""
        return float(self.square.sum() / self.exit_square.clamp_min(1e-300))

    def error(self, weights: Tensor) -> float:
        """‖r̂ - r‖² / ‖r‖² over the positions seen, r̂ by these weights, (p + 1, C)."""
        inner, trend = weights[:-1], weights[-1]
        explained = 2 * (inner * self.cross).sum() - (inner * (self.gram @ inner)).sum()
        explained += (2 * trend * (self.trend_cross - (inner * self.trend_gram).sum(0))).sum()
        explained -= (trend.square() * self.trend_square).sum()
        return float((self.square.sum() - explained).clamp_min(0) / self.exit_square.clamp_min(1e-300))

    # -- solving: weights are (p + 1, C), the last row that of the trend; rows of what is not read are zero ------------

    def solve(self, kind: AdaptorKind, ridge: float) -> Tensor:
        """The least squares of a kind, (p + 1, C); of the low-rank kind, before its rank is cut.

        Args:
            kind: which.
            ridge: relative to the diagonal of the covariance; an endless one leaves the identity.
        """
        if ridge == math.inf:
            return self.cross.new_zeros(self.shape.features + 1, self.shape.exit)
        trend = self._trend(kind, ridge) if kind.trend else torch.zeros_like(self.square)
        return torch.cat((self._others(kind, ridge, self._rest(trend)), trend[None]))

    def _trend(self, kind: AdaptorKind, ridge: float) -> Tensor:
        """(C,), each trend's weight, beside a kind's other ones."""
        alone, beside = self._others(kind, ridge, self.cross), self._others(kind, ridge, self.trend_gram)
        left = self.trend_square - (self.trend_gram * beside).sum(0) + ridge * self.trend_square
        target = self.trend_cross - (self.trend_gram * alone).sum(0)
        seen = left > 1e-9 * self.trend_square.amax().clamp_min(1e-300)
        return torch.where(seen, target / torch.where(seen, left, 1.0), 0.0)

    def _rest(self, trend: Tensor) -> Tensor:
        """(p, C), of features with what these weights of the trends leave of the targets."""
        return self.cross - self.trend_gram * trend

    def _others(self, kind: AdaptorKind, ridge: float, cross: Tensor) -> Tensor:
        """(p, C), least squares with this in the place of features with targets."""
        if kind.gain_only:
            return self._gain(cross, ridge)
        if kind.form == "linear" or kind.form == "kernel":
            return self._linear(cross, kind.reads, ridge)
        affine = self._affine(cross, ridge)
        return affine if kind.form == "affine" else affine + self._linear(cross - self.gram @ affine, kind.reads, ridge)

    def affine(self, weights: Tensor, ridge: float) -> Tensor:
        """(p, C), gain and bias alone, beside the trends' weights of these, (p + 1, C)."""
        if ridge == math.inf:
            return torch.zeros_like(self.cross)
        return self._affine(self._rest(weights[-1]), ridge)

    def cut(self, weights: Tensor, ridge: float, basis: Tensor) -> Tensor:
        """Low-rank weights: of what is beyond gain, bias and trend, what lies in the basis, (rank, C)."""
        if ridge == math.inf:
            return weights
        cross, trend = self._rest(weights[-1]), weights[-1:]
        gain = self.affine(weights, ridge)
        low_rank = gain + (weights[:-1] - gain) @ basis.T @ basis
        gram = self.gram
        low_rank[0] = (cross[0] - gram[0, 1:] @ low_rank[1:]) / gram[0, 0].clamp_min(1)
        return torch.cat((low_rank, trend))

    def _gain(self, cross: Tensor, ridge: float) -> Tensor:
        own, gram = 1 + torch.arange(self.shape.exit, device=cross.device), self.gram
        above, below = cross[own, own - 1].sum(), gram.diagonal()[own].sum()
        weights = torch.zeros_like(cross)
        weights[own, own - 1] = above / (below * (1 + ridge)).clamp_min(1e-300)
        return weights

    def _affine(self, cross: Tensor, ridge: float) -> Tensor:
        own, gram = 1 + torch.arange(self.shape.exit, device=cross.device), self.gram
        count, mean, target = gram[0, 0].clamp_min(1), gram[0, own], cross[0]
        variance = gram.diagonal()[own] - mean.square() / count
        covariance = cross[own, own - 1] - mean * target / count
        below = (variance * (1 + ridge)).clamp_min(1e-12 * variance.amax().clamp_min(1e-300))
        gain = torch.where(_moves(variance, gram.diagonal()[own]), covariance / below, 0.0)
        weights = torch.zeros_like(cross)
        weights[own, own - 1], weights[0] = gain, (target - gain * mean) / count
        return weights

    def _linear(self, cross: Tensor, reads: Sequence[str], ridge: float) -> Tensor:
        """Centred, so that the ridge does not pull at the bias."""
        change = self.shape.change(reads, self.upper)
        gram, cross = change @ self.gram @ change.T, change @ cross
        count, mean = gram[0, 0].clamp_min(1), gram[0, 1:]
        covariance = gram[1:, 1:] - torch.outer(mean, mean) / count
        diagonal = covariance.diagonal().clamp_min(1e-12 * covariance.diagonal().amax().clamp_min(1e-300))
        moves = _moves(covariance.diagonal(), gram.diagonal()[1:])
        scale = torch.where(moves, diagonal.rsqrt(), 0.0)
        scaled = covariance * scale[:, None] * scale
        scaled.diagonal().add_(torch.where(moves, max(ridge, _LEAST), 1.0))
        target = (cross[1:] - torch.outer(mean, cross[0]) / count) * scale[:, None]
        inner = torch.linalg.solve(scaled, target) * scale[:, None]
        bias = (cross[:1] - mean[None] @ inner) / count
        weights: Tensor = change.T @ torch.cat((bias, inner))
        return weights

    def added(self, weights: Tensor, ridge: float) -> Tensor:
        """(C, C): the covariance of what these low-rank weights add to gain, bias and trend."""
        inner = weights[:-1] - self.affine(weights, ridge)
        gram = self.gram
        mean = gram[:1] / gram[0, 0].clamp_min(1)
        covariance: Tensor = inner.T @ (gram - gram[0, 0] * mean.T @ mean) @ inner
        return covariance


def _moves(variance: Tensor, square: Tensor) -> Tensor:
    """Which features do more than stand still, by their centred and their plain sum of squares?

    Of the others the difference of the two is a rounding error, and a weight that followed from it could be anything.
    """
    return variance > _STILL * square


def shared_basis(added: Sequence[Tensor], rank: int) -> Tensor:
    """(rank, C): the directions of the exit in which several maps do most, each map of equal weight.

    Source: reduced-rank regression, Izenman, "Reduced-rank regression for the multivariate linear model", 1975.
    """
    total = sum((one / one.trace().clamp_min(1e-300) for one in added), torch.zeros_like(added[0]))
    basis: Tensor = torch.linalg.eigh(total).eigenvectors[:, -rank:].flip(1).T.contiguous()
    return basis
