"""Fair timing: sides run in turns, each run from an idle device to an idle device; medians with quartiles."""

from __future__ import annotations

import contextlib
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one run.

    Attributes:
        median, low, high: over the runs; low and high are the quartiles.
        runs: how many there were.
    """

    median: float
    low: float
    high: float
    runs: int

    @property
    def spread(self) -> float:
        """The distance of the quartiles, as a share of the median."""
        return (self.high - self.low) / self.median

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Of the seconds of each run."""
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        return cls(statistics.median(seconds), low, high, len(seconds))


def synchronize(device: str | torch.device) -> None:
    """Wait for all that was launched on a CUDA, XPU or MPS device; a CPU has nothing to wait for."""
    kind = torch.device(device).type
    if kind in ("cuda", "xpu"):
        getattr(torch, kind).synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def now(device: str | torch.device) -> float:
    """Seconds on a clock that only goes forward, when the device is idle."""
    synchronize(device)
    return time.perf_counter()


def measured(run: Callable[[], T], device: str | torch.device) -> tuple[T, float]:
    """What a run returns, and its seconds, from an idle device to an idle device.

    Example:
        >>> output, seconds = measured(lambda: sum(range(9)), "cpu")
        >>> output, seconds > 0
        (36, True)
    """
    start = now(device)
    output = run()
    return output, now(device) - start


def timed(run: Callable[[], Any], device: str | torch.device) -> float:
    """Seconds of one run."""
    return measured(run, device)[1]


def device_name(device: str | torch.device = "cpu") -> str:
    """What a result was measured on: the GPU's name, or the processor's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def in_turns(
    sides: Mapping[str, Callable[[], Any]],
    device: str,
    *,
    rounds: int,
    warmup: int = 1,
    until: float | None = None,
    least: int = 1,
    measure: Callable[[Callable[[], Any], str], float] = timed,
    tell: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """Time the sides in turns; the order changes from round to round, so none always follows the same one.

    Args:
        sides: what to run, by name.
        device: what to wait for.
        rounds: runs of each side.
        warmup: runs of each side before.
        until: `time.monotonic()` after which no round begins.
        least: rounds that are made however late it is.
        measure: seconds of one run.
        tell: gets the name of a side before each of its runs.

    Returns:
        The timing of each side.

    Example:
        >>> times = in_turns({"a": lambda: sum(range(9)), "b": lambda: None}, "cpu", rounds=3)
        >>> times["a"].runs, times["a"].low <= times["a"].median <= times["a"].high
        (3, True)
    """
    for _ in range(warmup):
        for name, run in sides.items():
            tell(name)
            run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order, shuffle = list(sides), random.Random(0)
    for k in range(rounds):
        if k >= least and until is not None and time.monotonic() > until:
            break
        shuffle.shuffle(order)
        for name in order:
            tell(name)
            seconds[name].append(measure(sides[name], device))
    return {name: Timing.of(values) for name, values in seconds.items()}
