"""Copies of what a call of the UNet was given and gave, which nobody writes to."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from clockwork_hooks.passes import Pass, version
from clockwork_hooks.training.calls import Call, Needs
from clockwork_hooks.tree import map_leaves, tensors

__all__ = ["Copies", "Given"]

Given = tuple[tuple[Any, ...], dict[str, Any]]


class Copies:
    """Copies tensors for one trajectory.

    Args:
        where: the device that copies go to; None leaves them where their originals are.
    """

    def __init__(self, where: torch.device | str | None = None) -> None:
        self._where = torch.device(where) if where is not None else None
        self._kept: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}

    def copy(self, tensor: Any) -> Any:
        """An ordinary tensor of its own, without gradient; what is no tensor, as it is."""
        if not isinstance(tensor, Tensor):
            return tensor
        with torch.inference_mode(False):
            where = self._where or tensor.device
            made = tensor.detach()
            return made.clone() if where == made.device else made.to(where)

    def share(self, leaf: Any) -> Any:
        """A copy made once a trajectory: conditions are the same objects at every step."""
        if not isinstance(leaf, Tensor):
            return leaf
        key = (id(leaf), version(leaf), leaf.device)
        if key not in self._kept:
            self._kept[key] = (leaf, self.copy(leaf))
        return self._kept[key][1]

    def keep(self, call: Call, needs: Needs, run: Pass, given: Given, output: Any, moving: Collection[Any]) -> None:
        """Put into a call what is needed of it.

        Args:
            call: to be filled.
            needs: what of it.
            run: the full pass that served it.
            given: its arguments.
            output: what the UNet returned.
            moving: those arguments that differ from step to step; the others are shared by the steps.
        """
        if needs.exit:
            call.exit = self.copy(run.exit)
        if needs.arguments:
            call.args, call.kwargs = map_leaves(
                lambda leaf: self.copy(leaf) if any(leaf is one for one in moving) else self.share(leaf), given
            )
        if needs.captured:
            call.captured = {
                name: self.copy(tensor) if name == "entry" else self.share(tensor)
                for name, tensor in run.captured.items()
            }
        if needs.output:
            call.output = self.copy(tensors(output)[0])
