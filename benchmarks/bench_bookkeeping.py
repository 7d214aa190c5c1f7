"""What our own bookkeeping costs: placing a call, choosing its pass, skipping calls, keeping the exit, counting.

    python -m pytest -n 0 -s benchmarks/bench_bookkeeping.py

The demo model's sampler and every UNet of the zoo, one thread of this CPU. The time spent in our own code is measured
within the calls themselves, so both sides are under the same load. Where a step takes 5 ms, it should be 1% at most.
Rows go to benchmarks/results/bookkeeping.json (or where BOOKKEEPING_OUT says).
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import clockwork_hooks as ch
from benchmarks.harness import Results, environment
from clockwork_hooks.demo import load_demo
from clockwork_hooks.passes import Pass
from tests.zoo import ZOO

STEPS, CALLS = 8, 24
LIMIT, SHORTEST = 0.01, 0.005
COMMAND = "python -m pytest -n 0 -s benchmarks/bench_bookkeeping.py"
OUT = Path(os.environ.get("BOOKKEEPING_OUT", Path(__file__).parent / "results" / "bookkeeping.json"))

now = time.perf_counter  # it is read twice for each patched call: a thread's own time would take longer to ask for


@pytest.fixture(scope="module")
def results() -> Results:
    """One file for all tests of this run."""
    return Results(OUT, {**environment("cpu", 0), "load": os.getloadavg(), "command": COMMAND})


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Own:
    """Seconds of each call of a wrapped UNet that are ours: its two hooks, and what patched calls add to theirs."""

    def __init__(self, cw: ch.ClockworkWrapper) -> None:
        self.calls: list[float] = []
        self._engine, self._call = cw._engine, Pass.call
        self._theirs = 0.0

    @contextlib.contextmanager
    def watched(self) -> Iterator[Own]:
        """Within it, calls are timed."""
        engine, call = self._engine, self._call
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "begin", self._timed(engine.begin, opens=True))
            patch.setattr(engine, "end", self._timed(engine.end))
            patch.setattr(
                Pass, "call", lambda *args: self._add(lambda: call(*args[:2], self._forward(args[2]), *args[3:]))
            )
            yield self

    def _timed(self, function: Callable[..., Any], *, opens: bool = False) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            if opens:
                self.calls.append(0.0)
            return self._add(lambda: function(*args))

        return timed

    def _patched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def patched(run: Pass, path: str, forward: Callable[..., Any], *rest: Any) -> Any:
            return self._add(lambda: call(run, path, self._forward(forward), *rest))

        return patched

    def _add(self, run: Callable[[], Any]) -> Any:
        theirs, start = self._theirs, now()
        try:
            return run()
        finally:
            spent = now() - start
            self.calls[-1] += spent - (self._theirs - theirs)
            self._theirs = theirs + spent

    def _forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            before, start = self._theirs, now()
            try:
                return forward(*args, **kwargs)
            finally:
                self._theirs = before + now() - start

        return run


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers
def test_demo(benchmark: Any, results: Results) -> None:
    """`benchmark` times a trajectory at clock 2; the share of our own code is in its extra_info."""
    demo = load_demo()
    noise, hidden = demo.noise(1, seed=0), demo.encode_prompts(["a red square"])
    with ch.wrap(demo.unet, clock=2) as cw:
        demo.denoise(noise, hidden, steps=STEPS)  # recorded, warm
        with Own(cw).watched() as own:
            benchmark.pedantic(lambda: demo.denoise(noise, hidden, steps=STEPS), rounds=5, iterations=1)
    share = _row(results, "demo", own.calls, benchmark.stats.stats.median / STEPS)
    benchmark.extra_info["share"] = round(share, 5)
    assert share < LIMIT


def test_zoo(results: Results) -> None:
    """Every UNet that is served, at clock 2; a step is a full and an adaptor pass's mean."""
    for name, make in ZOO.items():
        case = make()
        with warnings.catch_warnings(), torch.no_grad(), ch.wrap(case.model, clock=2) as cw:
            warnings.simplefilter("ignore")
            _calls(cw, case, 4)
            with Own(cw).watched() as own:
                step = _calls(cw, case, CALLS)
        _row(results, name, own.calls, step)


def _calls(cw: ch.ClockworkWrapper, case: Any, count: int) -> float:
    """Call the UNet in declared steps; its medians of full and adaptor passes, averaged."""
    spent = []
    for _ in range(count):
        args, kwargs = case.inputs()
        with cw.step():
            start = now()
            case.model(*args, **kwargs)
            spent.append(now() - start)
    return statistics.fmean(map(statistics.median, (spent[::2], spent[1::2])))


def _row(results: Results, model: str, own: list[float], step: float) -> float:
    ours = statistics.fmean(map(statistics.median, (own[::2], own[1::2])))
    share = ours / step
    met = None if step < SHORTEST else share <= LIMIT
    results.add("bookkeeping", model=model, step_ms=1e3 * step, own_us=1e6 * ours, share=share, calls=len(own), met=met)
    return share
