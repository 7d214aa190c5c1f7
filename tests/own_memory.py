"""A module that writes all its outputs to one place, as a CUDA graph does; such writes leave no mark."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Home(nn.Module):
    """Hands out the memory that it holds, a part of a workspace for each shape.

    Args:
        module: makes the outputs.
        way: of `WAYS`.
    """

    def __init__(self, module: nn.Module, way: str) -> None:
        super().__init__()
        self.module, self.way = module, way
        self.places: dict[Any, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        output = self.module(x).detach()
        key = (output.shape, torch.is_inference_mode_enabled())
        if key not in self.places:
            place = torch.empty(2, *output.shape, dtype=output.dtype)[1]
            self.places[key] = output.clone().untyped_storage() if self.way == "of a storage" else place
        if self.way == "of a storage":
            given = torch.empty(0).set_(self.places[key], 0, output.shape, output.stride())
            given.data.copy_(output)
            return given
        self.places[key].data.copy_(output)
        return WAYS[self.way](self.places[key])


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda place: place,
    "a view": lambda place: place.detach(),
    "a part": lambda place: place[:],
    "of numpy": lambda place: torch.from_numpy(place.numpy()),
    "by dlpack": lambda place: torch.from_dlpack(place.numpy()),
    "of a storage": lambda place: place,  # which is held as that alone
}
