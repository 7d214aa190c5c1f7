"""What a wrapped UNet may return, known from being told the true step and branch of each call.

Imports nothing that places calls: neither the timeline nor the wrapper.
"""

import copy
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from tests.small_unet import EXIT, reference


class Judge:
    """Calls a wrapped UNet and its plain twin.

    A call may return the plain output; or the output with the exit that the same call of the step before emitted.
    Nothing else, ever.

    Args:
        unet: the UNet, before or after it is wrapped.
        plain: its twin; a copy by default, so that `unet` must not be wrapped yet.
        path: of the module that emits the exit.
    """

    def __init__(self, unet: nn.Module, plain: nn.Module | None = None, path: str = EXIT) -> None:
        self.unet, self.plain, self.path = unet, plain or copy.deepcopy(unet), path
        self.letters = ""
        self._step: dict[Hashable, tuple[int, list[torch.Tensor], list[torch.Tensor]]] = {}

    def begin(self) -> None:
        """A trajectory begins."""
        self._step.clear()

    def forget(self, branch: Hashable) -> None:
        """What this branch emitted is of no use any more: its conditions have changed."""
        self._step.pop(branch, None)

    @property
    def share(self) -> float:
        """Adaptor passes among all calls."""
        return self.letters.count("A") / len(self.letters)

    def call(self, *args: Any, step: int, branch: Hashable = 0, **kwargs: Any) -> Any:
        """One call, of which the step and the branch are told; what it returns has been checked."""
        was, now, before = self._step.get(branch, (0, [], []))
        if was != step:
            now, before = [], now if was == step - 1 else []
        got = self.unet(*args, **kwargs)
        with torch.no_grad():
            full, emitted = reference(self.plain, *args, path=self.path, **kwargs)
            if _same(got, full):
                self.letters += "F"
            else:
                assert len(now) < len(before), "a cached exit where the step before has none for this call"
                clocked, emitted = reference(self.plain, *args, path=self.path, exit=before[len(now)], **kwargs)
                assert _same(got, clocked), "stale: not what this call of the branch emitted in the step before"
                self.letters += "A"
        self._step[branch] = (step, [*now, emitted], before)
        return got


def _same(one: Any, other: Any) -> bool:
    pick = [value if isinstance(value, torch.Tensor) else value[0] for value in (one, other)]
    return torch.equal(pick[0].detach(), pick[1].detach())
