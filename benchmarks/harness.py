"""What all benchmarks share: fair timing, and results that say where they come from.

Sides are warmed up, then run in turns (round by round, in changing order), each run between two device
synchronisations; reported are medians with the quartiles. Every row is written as soon as it is there.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from clockwork_hooks.analysis.timing import Timing, device_name, in_turns, synchronize, timed

__all__ = [
    "PACKAGES", "Results", "Timing", "environment", "in_turns", "mark", "reason", "say", "seconds_between",
    "student", "synchronize", "timed",
]  # fmt: skip

_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # of 2 to 10
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
        "device": device_name(device),
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


def mark(device: str) -> Any:
    """This moment in the device's own queue."""
    if not device.startswith("cuda"):
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(one: Any, other: Any) -> float:
    """Two marks; waits for the second one."""
    if isinstance(one, float):
        return float(other - one)
    other.synchronize()
    return float(one.elapsed_time(other)) / 1e3


def student(count: int) -> float:
    """The 97.5% quantile of Student's t for the mean of so many; of more than ten that of ten, which is wider."""
    return _STUDENT[min(count, 10) - 2]


def reason(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:300]


def say(text: str) -> None:
    """Print now."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
