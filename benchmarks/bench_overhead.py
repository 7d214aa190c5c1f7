"""What Clockwork costs where it saves nothing, and how far an adaptor pass is from the same UNet pruned by hand.

    python -m pytest -n 0 -s benchmarks/bench_overhead.py

One thread of this CPU; sides run in turns, pass by pass, and what is measured is the thread's own CPU time, so
other processes disturb little. Narrow UNets with all their modules: that is the worst case, since bookkeeping costs
the same for a wide one. pytest-benchmark shows the wall-clock time of a pass; ratios go to
benchmarks/results/overhead.json (or where OVERHEAD_OUT says).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clockwork_hooks as ch
from benchmarks.blanks import Blank, blank
from benchmarks.guided import GuidedUNet
from benchmarks.harness import Results
from benchmarks.ideal import HandClock
from benchmarks.setting import Loop, build
from clockwork_hooks.engine import passes
from clockwork_hooks.engine.passes import placeholder
from clockwork_hooks.regions.cut import Slot

STEPS, ROUNDS = 24, 9
COMMAND = "python -m pytest -n 0 -s benchmarks/bench_overhead.py"
OUT = Path(os.environ.get("OVERHEAD_OUT", Path(__file__).parent / "results" / "overhead.json"))
pytestmark = pytest.mark.usefixtures("one_thread")

Call = Callable[[Any], Any]


class GuidedByHand:
    """`GuidedUNet` with clock `STEPS`: below the highest level nothing is called but in the first step.

    Args:
        unet: a UNet that nothing else uses.
        downs: input blocks above the region; the others are in it.
    """

    def __init__(self, unet: GuidedUNet, downs: int) -> None:
        self.unet, self.downs, self.exit = unet, downs, None
        self.ups = len(unet.output_blocks) - downs
        unet.output_blocks[self.ups - 1].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.exit = output

    def begin(self) -> None:
        """A trajectory begins."""
        self.exit = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        unet = self.unet
        if self.exit is None:
            full: Tensor = unet(x, t)
            return full
        emb, h, skips = unet.embed(t), x, []
        for module in unet.input_blocks[: self.downs]:
            h = module(h, emb)
            skips.append(h)
        h = self.exit
        for module in unet.output_blocks[self.ups :]:
            h = module(torch.cat([h, skips.pop()], 1), emb)
        output: Tensor = unet.out(h)
        return output


def sd15() -> tuple[dict[str, Any], list[Call], dict[str, Any]]:
    """Sides of the sd15 architecture at a tenth of its width, its calls at the steps, and the wrappers."""
    model = build("sd15", "cpu", torch.float32, tiny=True)
    loop = Loop(model, 2, STEPS)
    loop.scheduler.set_timesteps(STEPS)
    sample = torch.cat([loop.noise, loop.noise])
    sides = {"plain": model.twin(), "clock 1": model.twin(), "adaptor pass": model.twin()}
    sides["ideal"] = HandClock(model.twin(), STEPS, "outer")
    calls = [lambda side, t=t: side(sample, t, **loop.conditions, return_dict=False) for t in loop.scheduler.timesteps]
    return sides, calls, _wrapped(sides)


def guided() -> tuple[dict[str, Any], list[Call], dict[str, Any]]:
    """The same for a UNet as guided-diffusion writes them."""

    def make() -> GuidedUNet:
        torch.manual_seed(0)
        return GuidedUNet(32, (1, 2, 4), blocks=2)

    sides: dict[str, Any] = {"plain": make(), "clock 1": make(), "adaptor pass": make()}
    sides["ideal"] = GuidedByHand(make(), downs=3)
    x, times = torch.randn(2, 3, 32, 32), torch.linspace(999, 0, STEPS)
    return sides, [lambda side, t=t: side(x, t.expand(2)) for t in times], _wrapped(sides)


def _wrapped(sides: dict[str, Any]) -> dict[str, Any]:
    return {
        "clock 1": ch.wrap(sides["clock 1"], schedule=()),
        "adaptor pass": ch.wrap(sides["adaptor pass"], schedule=set(range(2, STEPS + 1))),
    }


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [sd15, guided])
def test_overhead(make: Callable[[], Any], benchmark: Any, results: Results) -> None:
    """Clock 1 against plain; an adaptor pass against the hand-pruned UNet, which gives the same numbers."""
    sides, calls, wrappers = make()
    for _ in range(2):
        outputs = {name: _trajectory(side, calls) for name, side in sides.items()}
    torch.testing.assert_close(outputs["clock 1"], outputs["plain"], rtol=0, atol=0)
    torch.testing.assert_close(outputs["adaptor pass"], outputs["ideal"])
    assert wrappers["adaptor pass"].stats.adaptor_passes >= 2 * (STEPS - 1) - 1
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for side in sides.values():
            getattr(side, "begin", lambda: None)()
            calls[0](side)
        for call in calls[1:]:  # in turns, pass by pass: what comes and goes meets all sides alike
            for name, side in sides.items():
                start = time.thread_time()
                call(side)
                spent[name].append(time.thread_time() - start)
    benchmark.pedantic(_trajectory, (sides["adaptor pass"], calls), rounds=3)
    ms = {name: 1e3 * statistics.median(values) for name, values in spent.items()}
    for name, base in (("clock 1", "plain"), ("adaptor pass", "ideal")):
        ratios = sorted(a / b for a, b in zip(spent[name], spent[base], strict=True))
        row = {
            "ms": ms[name],
            "base": base,
            "base_ms": ms[base],
            "more_us": 1e3 * (ms[name] - ms[base]),
            "ratio": statistics.median(ratios),
            "low": ratios[len(ratios) // 4],
            "high": ratios[3 * len(ratios) // 4],
        }
        results.add("overhead", model=make.__name__, side=name, passes=len(ratios), **row)
        benchmark.extra_info[name] = row["ratio"]


def _trajectory(side: Any, calls: list[Call]) -> list[Tensor]:
    getattr(side, "begin", lambda: None)()
    outputs = [call(side) for call in calls]
    return [output if isinstance(output, Tensor) else output[0] for output in outputs]


def test_placeholders(benchmark: Any, results: Results) -> None:
    """What may stand where a skipped output was: a zero, expanded; memory that nobody clears; zeros; meta; a subclass.

    A meta tensor would be the cheapest to forget about, but code that runs on may not mix it with real ones; a
    subclass that runs on meta may, and computes nothing.
    """
    shape = (2, 1280, 16, 16)
    slot = Slot(shape, torch.float32, torch.device("cpu"))
    kinds: dict[str, Callable[[], Tensor]] = {
        "zero, expanded": lambda: placeholder(slot),
        "empty": lambda: torch.empty(shape),
        "zeros": lambda: torch.zeros(shape),
        "meta": lambda: torch.empty(shape, device="meta"),
        "subclass on meta": lambda: blank(slot),
    }
    many = 200

    def run(make: Callable[[], Tensor]) -> float:
        start = time.thread_time()
        for _ in range(many):
            make()
        return (time.thread_time() - start) / many

    spent = {name: [] for name in kinds}  # type: dict[str, list[float]]
    for _ in range(15):
        for name, make in kinds.items():
            spent[name].append(run(make))
    benchmark(kinds["zero, expanded"])
    for name, make in kinds.items():
        made = make()
        on_meta = made.device.type == "meta" or isinstance(made, Blank)
        memory = 0 if on_meta else made.untyped_storage().nbytes()
        mixes = made.device.type != "meta"
        row = {"us": 1e6 * statistics.median(spent[name]), "bytes": memory, "mixes": mixes}
        results.add("placeholders", kind=name, shape=list(shape), **row)


@pytest.mark.parametrize("channels", [32, 96])
def test_a_pass_on_placeholders(channels: int, results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adaptor pass of a UNet whose own code joins skipped outputs with `torch.cat`: on expanded zeros, on meta."""
    calls: dict[str, Callable[[int], Any]] = {}
    for name, make in (("zero, expanded", placeholder), ("subclass on meta", blank)):
        monkeypatch.setattr(passes, "placeholder", make)  # a wrapper makes its placeholders once
        torch.manual_seed(0)
        unet, x, times = (
            GuidedUNet(channels, (1, 2, 4), blocks=2),
            torch.randn(2, 3, 32, 32),
            torch.arange(999.0, 0, -9),
        )
        ch.wrap(unet, schedule=set(range(2, 999)))
        calls[name] = lambda k, unet=unet, x=x, times=times: unet(x, times[k].expand(2))
        calls[name](0), calls[name](1)
    torch.testing.assert_close(*(call(2) for call in calls.values()))
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(3, 23):
        for name, call in calls.items():
            start = time.thread_time()
            call(k)
            spent[name].append(time.thread_time() - start)
    for name, seconds in spent.items():
        results.add("placeholder_passes", channels=channels, kind=name, ms=1e3 * statistics.median(seconds))
