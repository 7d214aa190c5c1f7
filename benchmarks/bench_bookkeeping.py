"""What our own bookkeeping costs: placing a call, choosing its pass, skipping calls, keeping the exit, counting.

    python -m pytest -n 0 -s benchmarks/bench_bookkeeping.py

The demo model's sampler and every UNet of the zoo, one thread of this CPU. The time spent in our own code is measured
within the calls themselves, so both sides are under the same load. Where a step takes 5 ms, it should be 1.3% at most.
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
from benchmarks.harness import Results
from clockwork_hooks.demo import load_demo
from clockwork_hooks.engine.engine import Engine
from clockwork_hooks.engine.hooks import Forward, RootHook
from tests.zoo import ZOO

STEPS, CALLS = 8, 24
LIMIT, SHORTEST = 0.013, 0.005
COMMAND = "python -m pytest -n 0 -s benchmarks/bench_bookkeeping.py"
OUT = Path(os.environ.get("BOOKKEEPING_OUT", Path(__file__).parent / "results" / "bookkeeping.json"))
pytestmark = pytest.mark.usefixtures("one_thread")

now = time.perf_counter  # a thread's own time would take longer to ask for


class Own:
    """Seconds of each call of a wrapped UNet that are ours: the engine, and what patched forwards add to theirs.

    Clocks stand around the engine and the UNet's own forward in it, and around each patched forward and what it stands
    for. Two of the latter and the functions they are read in cost as much as they measure, so the same two also stand
    around the UNet's first layer, which nothing patches: what they show there is taken off once for each patched call
    (`clocks`).
    """

    def __init__(self, cw: ch.ClockworkWrapper) -> None:
        self.calls: list[float] = []
        self.clocks: list[float] = []
        self._patched: list[int] = []
        self._unet, self._inner = cw.unet, 0.0

    @contextlib.contextmanager
    def watched(self) -> Iterator[Own]:
        """Within it, calls are timed."""
        hook, serve, patched = RootHook.__call__, Engine.__call__, Forward.__call__
        hooks = [0.0]

        def timed_hook(one: RootHook, *given: Any) -> None:
            start = now()
            hook(one, *given)
            hooks[0] = now() - start

        def timed_serve(one: Engine, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            self.calls.append(hooks[0])
            self._patched.append(0)
            output, spent = self._around(serve, one, self._within(forward), args, kwargs)
            self.calls[-1] += spent
            return output

        def timed_forward(one: Forward, *args: Any, **kwargs: Any) -> Any:
            output, spent = self._around(patched, one, *args, **kwargs)
            self.calls[-1] += spent
            self._patched[-1] += 1
            return output

        def timed_nothing(*args: Any, **kwargs: Any) -> Any:
            output, spent = self._around(theirs, *args, **kwargs)
            self.clocks.append(spent)
            return output

        first = next(module for module in self._unet.modules() if module._parameters and not module._modules)
        theirs = self._within(first.forward)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RootHook, "__call__", timed_hook)
            patch.setattr(Engine, "__call__", timed_serve)
            patch.setattr(Forward, "__call__", timed_forward)
            for module in self._unet.modules():
                forward = vars(module).get("forward")
                if isinstance(forward, Forward):
                    patch.setattr(forward, "forward", self._within(forward.forward))
            patch.setitem(vars(first), "forward", timed_nothing)
            yield self

    def net(self) -> list[float]:
        """Of each call, the clocks' own time taken off."""
        once = statistics.median(self.clocks) if self.clocks else 0.0
        return [spent - once * count for spent, count in zip(self.calls, self._patched, strict=True)]

    def _around(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
        """(what it returns, seconds outside of `_within`)."""
        before, start = self._inner, now()
        output = function(*args, **kwargs)
        spent = now() - start
        outside = spent - (self._inner - before)
        self._inner = before + spent
        return output, outside

    def _within(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def theirs(*args: Any, **kwargs: Any) -> Any:
            before, start = self._inner, now()
            output = forward(*args, **kwargs)
            self._inner = before + now() - start
            return output

        return theirs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers
def test_demo(benchmark: Any, results: Results) -> None:
    """`benchmark` times a trajectory at clock 2; the share of our own code is in its extra_info."""
    demo = load_demo()
    noise, hidden = demo.noise(1, seed=0), demo.encode_prompts(["a red square"])
    with ch.wrap(demo.unet, clock=2) as cw:
        demo.denoise(noise, hidden, steps=STEPS)  # recorded, warm
        with Own(cw).watched() as own:
            benchmark.pedantic(lambda: demo.denoise(noise, hidden, steps=STEPS), rounds=5, iterations=1)
    share = _row(results, "demo", own, benchmark.stats.stats.median / STEPS)
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
        _row(results, name, own, step)


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


def _row(results: Results, model: str, own: Own, step: float) -> float:
    net = own.net()
    ours = statistics.fmean(map(statistics.median, (net[::2], net[1::2])))
    raw = statistics.fmean(map(statistics.median, (own.calls[::2], own.calls[1::2])))
    share = ours / step
    met = None if step < SHORTEST else share <= LIMIT
    row = {"own_us": 1e6 * ours, "clocks_us": 1e6 * (raw - ours), "share": share, "calls": len(net), "met": met}
    results.add("bookkeeping", model=model, step_ms=1e3 * step, **row)
    return share
