"""What all benchmarks share: fair timing, and results that say where they come from.

Sides are warmed up, then run in turns (round by round, in changing order), each run between two device
synchronisations; reported are medians with the quartiles. Every row is written as soon as it is there.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "DeepCache", "tomesd", "fvcore", "numpy", "pytest-benchmark")


def environment(device: str, seed: int) -> dict[str, Any]:
    """What a result depends on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "seed": seed,
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


class Results:
    """Rows of several tables in one JSON file, complete after every row."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"environment": dict(settings)}

    def add(self, table: str, **row: Any) -> None:
        """Append a row, print it, write the file."""
        self.data.setdefault(table, []).append(row)
        say(f"{table}: " + ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
        self.write()

    def write(self) -> None:
        """Write all of it, in the place of what was there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(self.path)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one run: the median, the quartiles, the number of runs."""

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
        low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        return cls(statistics.median(seconds), low, high, len(seconds))


def synchronize(device: str) -> None:
    """Wait for all that was launched."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds of one run, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def in_turns(
    sides: Mapping[str, Callable[[], Any]],
    device: str,
    *,
    rounds: int,
    warmup: int = 1,
    until: float | None = None,
    least: int = 1,
    measure: Callable[[Callable[[], Any], str], float] = timed,
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
    """
    for _ in range(warmup):
        for run in sides.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order, shuffle = list(sides), random.Random(0)
    for k in range(rounds):
        if k >= least and until is not None and time.monotonic() > until:
            break
        shuffle.shuffle(order)
        for name in order:
            seconds[name].append(measure(sides[name], device))
    return {name: Timing.of(values) for name, values in seconds.items()}


def reason(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:300]


def say(text: str) -> None:
    """Print now."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
