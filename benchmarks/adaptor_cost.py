"""What an adaptor costs by itself, on a GPU: as one CUDA graph, in two memory formats, and kernel by kernel.

    python -m benchmarks.adaptor_cost --out DIR                       on a GPU
    python -m benchmarks.adaptor_cost --out DIR --tiny --device cpu   a rehearsal in miniature

SD1.5 and SDXL, guidance batch 2, the ResNet adaptor at both cuts; calibrated kinds with and without the kernel of
`adaptors/fused.py`. DIR/adaptor_cost.json; it takes a minute.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Results, environment, in_turns, say, synchronize
from benchmarks.ideal import Graphed
from benchmarks.setting import Loop, build
from benchmarks.sides import Bench, Variant
from clockwork_hooks.adaptors import fused
from clockwork_hooks.adaptors.calibrated import CalibratedAdaptor
from clockwork_hooks.regions.region import Layout

REPEATS = 20
SOLVED = {"affine": ("affine", False), "exit": ("linear", False), "exit+entry": ("linear", True)}
TIMES = (800.0, 900.0)


def inputs(region: Any, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """What the adaptor is given, at random."""
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(sizes, generator=generator).to(device, dtype) for name, sizes in region.inputs.items()}
    exit = torch.randn(region.exit.shape, generator=generator).to(device, dtype)
    return {"entry": made.get("entry"), "exit_cached": exit, "time": made.get("time"), "text": made.get("text")}


def measure(results: Results, bench: Bench, name: str, device: str, dtype: torch.dtype) -> None:
    """The ResNet adaptor at both cuts of one model."""
    for cut in ("outer", "paper"):
        region = bench.find(Loop(bench.model, 2, 8))[cut]
        given, runs, first = inputs(region, device, dtype), {}, None
        for layout in (torch.contiguous_format, torch.channels_last):
            adaptor = bench.adaptor(Variant("clockwork", 2, "ResNet", cut), region).to(memory_format=layout)
            call: Callable[..., Any] = Graphed(adaptor) if device != "cpu" else adaptor
            with torch.no_grad():
                made = call(**given)
                runs[str(layout).removeprefix("torch.")] = partial(_repeat, call, given)
                if first is None:
                    first = made
                    _kernels(results, name, cut, adaptor, given, device)
                else:
                    torch.testing.assert_close(made, first, rtol=1e-2, atol=1e-2)
        for layout_name, timing in in_turns(runs, device, rounds=15, warmup=2).items():
            ms = 1e3 * timing.median / REPEATS
            results.add("adaptor", model=name, cut=cut, layout=layout_name, ms=ms, spread=timing.spread)


@torch.no_grad()
def solved(results: Results, bench: Bench, name: str, cut: str, device: str) -> None:
    """Calibrated kinds, with weights at random: torch's kernels, and one in the place of the element-wise ones."""
    region = bench.find(Loop(bench.model, 2, 8))[cut]
    given = inputs(region, device, bench.model.dtype)
    given["entry"] = given["exit_cached"].flip(1)  # as a calibrated adaptor sees it, of the exit's size
    like = Layout.of_boundary(region.exit)
    for kind, (form, reads) in SOLVED.items():
        adaptor = CalibratedAdaptor(form=form, knots=1, points=0, exit=like, **({"entry": like} if reads else {}))
        adaptor.table.data[0, 2 * like.channels + 1 :].normal_(0.0, 0.01)
        adaptor = adaptor.to(device)
        call = partial(adaptor, **given, prepared=adaptor.prepare(TIMES, given["exit_cached"]))
        runs, sides, outputs = {}, {}, []
        for side in ("torch's kernels", "one kernel"):
            fused.DEVICES = ("cuda",) if side == "one kernel" else ()
            outputs.append(call())
            sides[side] = _launched(call, device)
            runs[side] = _replayed(call, device)
        torch.testing.assert_close(*outputs, rtol=1e-2, atol=1e-2)
        for side, timing in in_turns(runs, device, rounds=30, warmup=2).items():
            us = 1e6 * timing.median / REPEATS
            results.add("solved", model=name, cut=cut, shape=list(region.exit.shape), kind=kind, side=side, us=us,
                        spread=timing.spread, host_us=sides[side])  # fmt: skip
    fused.DEVICES = ("cuda",)


def _launched(call: Callable[[], Any], device: str) -> float:
    """Microseconds of the host to launch one call."""
    calls = 100 if device != "cpu" else 2
    for _ in range(calls):
        call()
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(calls):
        call()
    seconds = time.perf_counter() - begun
    synchronize(device)
    return 1e6 * seconds / calls


def _replayed(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """So many calls as one CUDA graph."""
    calls = partial(_repeat, call, {})
    if device == "cpu":
        return calls
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph.replay


@torch.no_grad()
def _repeat(call: Callable[..., Any], given: dict[str, Any]) -> None:
    for _ in range(REPEATS):
        call(**given)


def _kernels(results: Results, name: str, cut: str, adaptor: Any, given: dict[str, Any], device: str) -> None:
    """The kernels of one call."""
    cuda = device != "cpu"
    adaptor(**given)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        adaptor(**given)
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, key))
    for row in rows[:15]:
        results.add("kernels", model=name, cut=cut, kernel=row.key[:90], calls=row.count, us=getattr(row, key))
    results.add("kernels", model=name, cut=cut, kernel="all", calls=sum(row.count for row in rows),
                us=sum(getattr(row, key) for row in rows))  # fmt: skip


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for adaptor_cost.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of a tenth of the width: a rehearsal")
    options = parser.parse_args()
    results = Results(options.out / "adaptor_cost.json", environment(options.device, 0))
    dtype = torch.float32 if options.device == "cpu" else torch.float16
    for name in ("sd15", "sdxl"):
        bench = Bench(build(name, options.device, dtype, tiny=options.tiny))
        measure(results, bench, name, options.device, dtype)
        for cut in ("outer", "widest"):
            solved(results, bench, name, cut, options.device)
    say(f"done: {results.path}")


if __name__ == "__main__":
    main()
