"""What analysis costs: trace, find_regions, flops_report and a first call, on meta, and how that grows with the UNet.

    python -m pytest -n 0 -s benchmarks/bench_analysis.py

Each case runs in a process of its own, one thread: CPU seconds of each stage, and how far the process's largest
resident size rose above what it was with the UNet in place. Results go to benchmarks/results/analysis.json.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import clockwork_hooks as ch
from benchmarks.guided import GuidedUNet, ResBlock
from benchmarks.harness import Results

MODELS = ("sd15", "sdxl", "svd")
DEEPER = tuple(f"depth {n}" for n in (4, 16, 60, 230))  # more layers in a block: as many skips, 2k to 94k nodes
LONGER = tuple(f"blocks {n}" for n in (10, 20, 80, 270))  # more blocks a level: as many more skips, and regions
COMMAND = "python -m pytest -n 0 -s benchmarks/bench_analysis.py"
OUT = Path(os.environ.get("ANALYSIS_OUT", Path(__file__).parent / "results" / "analysis.json"))


def measure(case: str) -> dict[str, Any]:
    """The stages of one case, in this process."""
    torch.set_num_threads(1)
    unet, args, kwargs = _made(case)
    before, row, start = _peak(), {"case": case}, time.thread_time()

    def stage(name: str, run: Callable[[], Any]) -> Any:
        nonlocal start
        start = time.thread_time()
        found = run()
        row[f"{name}_s"] = time.thread_time() - start
        return found

    with torch.no_grad():
        traced = stage("trace", lambda: ch.trace(unet, *args, **kwargs))
        row["nodes"] = len(traced.nodes)
        row["modules"] = sum(1 for _ in unet.modules())
        del traced
        regions = stage("find_regions", lambda: ch.find_regions(unet, *args, **kwargs))
        row["regions"] = len(regions)
        stage("flops_report", lambda: ch.flops_report(unet, *args, **kwargs))
        with ch.wrap(unet) as cw:
            stage("first_call", lambda: unet(*args, **kwargs))
            twice = [torch.cat([one, one]) if isinstance(one, torch.Tensor) and one.ndim else one for one in args]
            if not kwargs:
                stage("other_sizes", lambda: unet(*twice))
            stage("plain_call", lambda: cw.unet(*args, **kwargs))
    row["total_s"] = sum(row[f"{name}_s"] for name in ("trace", "find_regions", "flops_report"))
    row["peak_mib"] = (_peak() - before) / 1024
    return row


def _made(case: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    if case in MODELS:
        from clockwork_hooks.models import load_model

        loaded = load_model(case)
        return loaded.unet, loaded.args, loaded.kwargs
    kind, count = case.split()
    with torch.device("meta"):
        unet = GuidedUNet(8, (1, 2, 4), blocks=int(count) if kind == "blocks" else 2, attention=())
        for block in (*unet.input_blocks, *unet.output_blocks) if kind == "depth" else ():
            last = [layer for layer in block if isinstance(layer, ResBlock)]
            width = last[-1].norm.num_channels if last else 0
            for _ in range(int(count) if last else 0):
                block.insert(1, ResBlock(width, 32, width))
        return unet, (torch.empty(1, 3, 32, 32), torch.empty(1)), {}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB


def _apart(case: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_analysis", case],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


@pytest.mark.parametrize("model", MODELS)
def test_models(model: str, benchmark: Any, results: Results) -> None:
    """Architectures at their real sizes, without weights."""
    row = benchmark.pedantic(_apart, (model,), rounds=1)
    results.add("models", **row)


@pytest.mark.parametrize("kind", ["depth", "blocks"])
def test_growth(kind: str, benchmark: Any, results: Results) -> None:
    """Seconds grow no faster than n log n, with as many regions or with more."""
    analysis: list[float] = []
    calls: list[float] = []

    def run() -> None:
        for case in DEEPER if kind == "depth" else LONGER:
            row = _apart(case)
            work = row["nodes"] * math.log2(row["nodes"])
            analysis.append(1e6 * row["total_s"] / work)
            calls.append(1e6 * (row["first_call_s"] + row["other_sizes_s"] - 2 * row["plain_call_s"]) / work)
            results.add("growth", kind=kind, **row, us_per_work=analysis[-1], call_us_per_work=calls[-1])

    benchmark.pedantic(run, rounds=1)
    for seconds in (analysis, calls):
        assert seconds[-1] < 1.25 * seconds[-2]  # a quarter is the machine's


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(measure(sys.argv[1])))
