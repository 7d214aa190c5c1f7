"""What our own bookkeeping costs: placing a call, choosing its pass, keeping the exit, counting.

    python -m pytest -n 0 -s benchmarks/bench_bookkeeping.py

The demo model's sampler on this machine's CPU, one thread. The time spent in the two hooks on the UNet is measured
within the calls of real trajectories, so both sides are under the same load; it must stay below 1% of a step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import clockwork_hooks as ch
from clockwork_hooks.demo import load_demo

STEPS = 8
LIMIT = 0.01


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers
def test_bookkeeping(benchmark: Any) -> None:
    """`benchmark` times a trajectory at clock 2; the share of the hooks is in its extra_info."""
    demo = load_demo()
    noise, hidden = demo.noise(1, seed=0), demo.encode_prompts(["a red square"])
    own: list[float] = []
    with ch.wrap(demo.unet, clock=2) as cw:
        engine = cw._engine
        demo.denoise(noise, hidden, steps=STEPS)  # recorded, warm
        engine.begin = _timed(engine.begin, own)  # type: ignore[method-assign]
        engine.end = _timed(engine.end, own)  # type: ignore[method-assign]
        benchmark.pedantic(lambda: demo.denoise(noise, hidden, steps=STEPS), rounds=5, iterations=1)
    pairs = [begin + end for begin, end in zip(own[::2], own[1::2], strict=True)]
    step = benchmark.stats.stats.median / STEPS
    benchmark.extra_info.update(
        per_call_us=round(statistics.median(pairs) * 1e6, 1), share=round(statistics.median(pairs) / step, 5)
    )
    print(f"\n{statistics.median(pairs) * 1e6:.0f} µs a call, {statistics.median(pairs) / step:.2%} of a step")
    assert statistics.median(pairs) < LIMIT * step


def _timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args)
        finally:
            spent.append(time.perf_counter() - start)

    return timed
