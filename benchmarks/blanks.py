"""The alternative to an expanded zero in a skipped output's place: a tensor whose operators run on meta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Blank(Tensor):
    """Says it is on a real device, holds a meta tensor; whatever is computed from it is a `Blank` too."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> Blank:
        made: Blank = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=device
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Blank({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found: list[torch.device] = []

        def hold(leaf: Tensor) -> Tensor:
            found.append(leaf.device)
            return leaf.held if isinstance(leaf, Blank) else leaf.to("meta")

        args, kwargs = tree_map_only(Tensor, hold, (args, kwargs or {}))
        kwargs = {key: "meta" if key == "device" else value for key, value in kwargs.items()}
        return tree_map_only(Tensor, lambda held: Blank(held, found[0]), func(*args, **kwargs))


def blank(slot: Any) -> Tensor:
    """As `clockwork_hooks.engine.passes.placeholder`."""
    return Blank(torch.empty(slot.shape, dtype=slot.dtype, device="meta"), slot.device)
