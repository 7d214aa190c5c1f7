"""How a boundary tensor is laid out, and how to make a plain feature map (B, C, *space) of it and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from clockwork_hooks._numbers import shape
from clockwork_hooks.errors import AdaptorError
from clockwork_hooks.regions.region import Boundary

__all__ = ["Layout"]

Order = Literal["channels first", "channels last", "tokens", "tokens last"]


@dataclass(frozen=True, slots=True)
class Layout:
    """The axes of a boundary tensor.

    Attributes:
        channels: number of channels.
        space: spatial shape as traced, frames among it where they have an axis of their own.
        order: "channels first" (B, C, *space), "channels last" (B, *space, C), "tokens" (B, positions, C) or
            "tokens last" (B, C, positions).

    Example:
        >>> tokens = Layout(8, (4, 6), "tokens")
        >>> tokens.to_map(torch.zeros(2, 24, 8)).shape
        torch.Size([2, 8, 4, 6])
    """

    channels: int
    space: tuple[int, ...]
    order: Order = "channels first"

    def __post_init__(self) -> None:
        object.__setattr__(self, "space", tuple(self.space))
        if self.order not in ("channels first", "channels last", "tokens", "tokens last"):
            raise AdaptorError(
                "a layout has one of four orders", seen={"order": self.order}, do='e.g. "channels first"'
            )

    @classmethod
    def of(cls, value: Layout | Mapping[str, Any]) -> Layout:
        """A layout, or the mapping that a configuration holds in its place."""
        return value if isinstance(value, Layout) else cls(**value)

    @classmethod
    def of_boundary(cls, boundary: Boundary) -> Layout:
        """Find the axes of a boundary tensor from its resolution.

        Raises:
            AdaptorError: no axis order fits.
        """
        sizes, space = boundary.shape, boundary.resolution
        first, last, count = sizes[2:], sizes[1:-1], math.prod(space)
        if space and len(sizes) >= 3:
            if first[-len(space) :] == space:
                return cls(sizes[1], first)
            if last[-len(space) :] == space:
                return cls(sizes[-1], last, "channels last")
            if len(sizes) == 3 and sizes[1] == count:
                return cls(sizes[2], space, "tokens")
            if len(sizes) == 3 and sizes[2] == count:
                return cls(sizes[1], space, "tokens last")
        raise AdaptorError(
            "a boundary is (B, C, *space), (B, *space, C), (B, positions, C) or (B, C, positions)",
            seen={"boundary": boundary.path, "shape": shape(sizes), "resolution": shape(space)},
            do="choose another region, or write an adaptor for this one",
        )

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.space)

    def to_map(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor as (B, C, *space).

        Raises:
            AdaptorError: it has other channels or another number of axes, or its tokens form no such grid.
        """
        axis = 1 if self.order in ("channels first", "tokens last") else -1
        flat = self.order.startswith("tokens")
        if x.ndim != (3 if flat else self.rank + 2) or x.shape[axis] != self.channels:
            raise AdaptorError(
                "a boundary tensor is laid out as in the region that the adaptor was made for",
                seen={"adaptor": f"{self.channels} channels, {self.order}", "got": shape(x.shape)},
                do="make an adaptor for this region: for_region(region)",
            )
        x = x.movedim(axis, 1)
        return x.unflatten(2, self._grid(x.shape[2])) if flat else x

    def from_map(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_map`."""
        x = x.flatten(2) if self.order.startswith("tokens") else x
        return x if self.order in ("channels first", "tokens last") else x.movedim(1, -1)

    def _grid(self, count: int) -> tuple[int, ...]:
        """The grid of that many tokens: the traced one, or one of the same proportions."""
        scale = (count / math.prod(self.space)) ** (1 / self.rank)
        grid = tuple(round(size * scale) for size in self.space)
        if math.prod(grid) != count:
            raise AdaptorError(
                "tokens form a grid of the traced proportions",
                seen={"traced": shape(self.space), "tokens": count},
                do="make an adaptor for a region that was found at this size",
            )
        return grid
