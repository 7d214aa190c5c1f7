"""How many files and functions of the package a newcomer passes through: those that run, for five ways through it.

    python benchmarks/files_entered.py

Counted with `sys.setprofile`: distinct functions that ran, and their files. The first round only imports.
Nothing is timed.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import clockwork_hooks as ch
from clockwork_hooks.adaptors import ResNetAdaptor

ROOT = Path(ch.__file__).parent


class Small(torch.nn.Module):
    """Two levels, the time as a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = torch.nn.Conv2d(3, 8, 3, 1, 1), torch.nn.Conv2d(8, 32, 4, 2, 1)
        self.body, self.up = torch.nn.Conv2d(32, 32, 3, 1, 1), torch.nn.ConvTranspose2d(32, 8, 4, 2, 1)
        self.head = torch.nn.Conv2d(16, 3, 3, 1, 1)

    def forward(self, x: Any, t: Any) -> Any:
        fine = self.stem(x)
        return self.head(torch.cat([fine, self.up(self.body(self.down(fine)) * t)], 1))


def entered(way: Callable[[], object]) -> tuple[list[str], int]:
    """The files, below the package, whose functions the call runs, and how many functions they are."""
    functions: set[types.CodeType] = set()

    def seen(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_name != "<module>" and code.co_filename.startswith(f"{ROOT}/"):
            functions.add(code)

    sys.setprofile(seen)
    try:
        way()
    finally:
        sys.setprofile(None)
    return sorted({str(Path(code.co_filename).relative_to(ROOT)) for code in functions}), len(functions)


def ways() -> dict[str, tuple[list[str], int]]:
    """Name → files, and how many functions."""
    x, times = torch.randn(1, 3, 16, 16), torch.linspace(900.0, 100.0, 9)
    unet, other = Small().eval(), Small().eval()
    with torch.no_grad(), ch.wrap(unet, clock=2):
        counts = {"a first call": entered(lambda: unet(x, times[0]))}
        for time in times[1:6]:
            unet(x, time)
        counts["a full pass"] = entered(lambda: unet(x, times[6]))
        counts["a warm adaptor pass"] = entered(lambda: unet(x, times[7]))
    counts["flops_report"] = entered(lambda: ch.flops_report(unet, x, times[0]))
    adaptor = ResNetAdaptor.for_region(ch.find_region(other, x, times[0]))
    with torch.no_grad(), ch.wrap(other, adaptor, clock=2):
        other(x, times[0])
        counts["a first pass with a ResNet adaptor"] = entered(lambda: other(x, times[1]))
    return counts


if __name__ == "__main__":
    ways()
    for name, (files, functions) in ways().items():
        print(f"{name}: {len(files)} files, {functions} functions\n    {' '.join(files)}")
