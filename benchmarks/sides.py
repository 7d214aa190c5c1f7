"""The sides of a latency benchmark: plain, Clockwork, Clockwork by hand, and the peers, each in a mode."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import clockwork_hooks as ch
from benchmarks.ideal import Compiled, Graphed, HandClock
from benchmarks.peers import DeepCache, DeepCacheByHand, tome
from benchmarks.setting import GUIDANCE, Loop, Model
from clockwork_hooks.adaptors import ResNetAdaptor
from clockwork_hooks.analysis.normal_equations import KINDS
from clockwork_hooks.regions.find import choose, regions_of

PLANNED = {  # steps of the sampler → which of them the adaptor serves: 46% and 76% fewer MACs of sd15
    8: ch.Schedule.at((3, 4, 6, 7)),
    50: ch.Schedule.at(ch.Schedule.early(6).adaptor_steps(50)),
}
IMAGES = 2  # that an adaptor is calibrated on: weights are random, so only its time and its memory mean anything


def clockwork_options(options: dict[str, Any]) -> dict[str, Any]:
    """Of `cw.compile`, where others are compiled with these: what is compiled is captured by Clockwork."""
    return {**options, "mode": "compiled-cudagraphs"} if options.get("mode") == "reduce-overhead" else options


@dataclass(frozen=True, slots=True)
class Variant:
    """What runs.

    Attributes:
        kind: "plain", "clockwork", "ideal" (Clockwork by hand), "DeepCache", "DeepCache, static by hand", "tomesd",
            "tomesd, nothing random" (it draws which tokens to merge from a generator of its own).
        clock: a full pass every so many steps (DeepCache's interval).
        adaptor: "identity", "ResNet", or a kind of `ch.calibrate`.
        cut: "outer", "paper", or "widest" (what DeepCache's branch 0 skips).
        planned: the schedule is that of `PLANNED`; the clock counts nothing.
        steps: of plain: the sampler takes so many, not as many as the table says; 0 takes those.
        torchs: of Clockwork, compiled: torch captures what it has compiled ("reduce-overhead"), as plain has it.
    """

    kind: str = "plain"
    clock: int = 1
    adaptor: str = "identity"
    cut: str = "outer"
    planned: bool = False
    steps: int = 0
    torchs: bool = False

    @property
    def name(self) -> str:
        """As in the tables."""
        if self.kind.startswith(("plain", "tomesd")):
            return f"{self.kind}, {self.steps} steps" if self.steps else self.kind
        if self.kind.startswith("DeepCache"):
            return f"{self.kind}, interval {self.clock}, branch 0"
        when = "planned" if self.planned else f"clock {self.clock}"
        return f"{self.kind}, {when}, {self.adaptor}, {self.cut} cut" + ", torch's CUDA graphs" * self.torchs

    @property
    def any_steps(self) -> bool:
        """May one side of it run loops of different numbers of steps? DeepCache's helper reads the loop's scheduler."""
        return not self.planned and self.kind != "DeepCache"


@dataclass(slots=True)
class Side:
    """A variant that is ready to run in a mode."""

    variant: Variant
    call: Callable[..., Any]
    wrapper: ch.ClockworkWrapper | None = None
    memory: int | None = None
    macs: float | None = None


@dataclass(slots=True)
class Bench:
    """What sides of one model have in common: its regions, how functions are made static, MACs counted before."""

    model: Model
    compile_options: dict[str, Any] = field(default_factory=lambda: {"mode": "reduce-overhead"})
    regions: dict[int, dict[str, ch.Region]] = field(default_factory=dict)
    counted: dict[Any, tuple[float, float]] = field(default_factory=dict)
    adaptors: dict[Any, Any] = field(default_factory=dict)

    def find(self, loop: Loop) -> dict[str, ch.Region]:
        """The regions by cut, found for the loop's own calls: no side has to trace again."""
        if loop.batch not in self.regions:
            loop.scheduler.set_timesteps(loop.steps, device=self.model.device)
            sample = torch.cat([loop.noise, loop.noise])
            unet, call = self.model.unet, {**loop.conditions, "return_dict": False}
            trace = ch.trace(unet, sample, loop.scheduler.timesteps[0], **call)
            outer = choose(trace, unet)
            assert outer.inner is not None
            self.regions[loop.batch] = {"outer": outer, "paper": outer.inner, "widest": regions_of(trace, unet)[0]}
        return self.regions[loop.batch]

    def calibrated(self, variant: Variant, loop: Loop, schedule: ch.Schedule) -> Any:
        """A calibrated adaptor of the variant's kind, solved for once."""
        key = variant.adaptor, variant.cut, loop.steps, str(schedule)
        if key not in self.adaptors:
            unet, small = self.model.twin(), Loop(self.model, 2 * IMAGES, loop.steps)
            self.adaptors[key] = ch.calibrate(
                unet, small.generate(unet), [IMAGES], guidance=GUIDANCE, schedule=schedule, ridge=1e-3, refit=False,
                region=self.find(loop)[variant.cut], kind=variant.adaptor, log_snr=small.scheduler,
            )  # fmt: skip
        return copy.deepcopy(self.adaptors[key])

    def adaptor(self, variant: Variant, region: ch.Region) -> Any:
        """The adaptor of a variant; the ResNet's zeros are made random: a fresh one would be the identity."""
        if variant.adaptor == "identity":
            return None
        torch.manual_seed(0)
        adaptor = ResNetAdaptor.for_region(region)
        for parameter in adaptor.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=1e-3)
        return adaptor.to(self.model.device, self.model.dtype).eval().requires_grad_(False)

    def make(self, mode: str) -> Callable[[Any], Any]:
        """How a plain function becomes static."""
        if mode == "eager":
            return lambda function: function
        return Graphed if mode == "cudagraphs" else partial(Compiled, **self.compile_options)

    def open(self, variant: Variant, loop: Loop, mode: str, *, schedule: Any = None) -> Side:
        """A side, not yet warm."""
        unet, make = self.model.twin(), self.make(mode)
        if variant.kind == "plain":
            return Side(variant, make(unet))
        if variant.kind == "ideal":
            return Side(variant, HandClock(unet, variant.clock, variant.cut, make))
        if variant.kind.startswith("tomesd"):
            return Side(variant, make(tome(unet, rand=variant.kind == "tomesd")))
        if variant.kind == "DeepCache":
            return Side(variant, make(DeepCache(unet, loop, variant.clock)))
        if variant.kind.startswith("DeepCache"):
            return Side(variant, DeepCacheByHand(unet, loop, variant.clock, make))
        region = self.find(loop)[variant.cut]
        if variant.planned:
            schedule = PLANNED[loop.steps]
        steps = ch.Schedule.every(variant.clock) if schedule is None else ch.Schedule.of(schedule)
        solved = variant.adaptor in KINDS
        adaptor = self.calibrated(variant, loop, steps) if solved else self.adaptor(variant, region)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ch.NoEffectWarning)
            clock = variant.clock if schedule is None else None
            cw = ch.wrap(unet, adaptor, clock=clock, region=region, schedule=schedule)
        if mode == "cudagraphs":
            cw.compile(mode="cudagraphs")
        elif mode == "compile":
            cw.compile(**(self.compile_options if variant.torchs else clockwork_options(self.compile_options)))
        return Side(variant, unet, cw)

    def warm(self, side: Side, loop: Loop, mode: str) -> None:
        """Run it: traces, compiles, captures; its memory and its MACs."""
        cuda = self.model.device.startswith("cuda")
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = 0
        for _ in range(1 if mode == "eager" and side.wrapper is None else 2):
            start = side.wrapper.stats.macs_run if side.wrapper is not None else 0
            loop(side.call)
        if cuda:
            peak = torch.cuda.max_memory_allocated() - before + self.model.weight_bytes
            side.memory = max(peak, side.memory or 0)  # of one that has run before, what it took then
        if side.wrapper is not None:
            side.macs = side.wrapper.stats.macs_run - start
        else:
            side.macs = self._count(side, loop, mode)

    def _count(self, side: Side, loop: Loop, mode: str) -> float | None:
        """MACs of one run by torch's counter, of its first step and its second one; the other modes run the same.

        With the mathematical attention: torch's counter gives 0 for the fused kernels of a CPU.
        """
        kind, clock = side.variant.kind, side.variant.clock
        key = kind.split(",")[0], side.variant.cut, loop.batch
        if key not in self.counted and mode == "eager":
            totals = []
            for steps in (1, 2):
                short = Loop(self.model, loop.batch, steps)
                loop.scheduler.set_timesteps(steps, device=self.model.device)  # DeepCache's helper looks there
                short.scheduler = loop.scheduler
                with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                    short(side.call)
                totals.append(counter.get_total_flops() / 2)
            self.counted[key] = totals[0], totals[1] - totals[0]
        if key not in self.counted:
            return None
        first, second = self.counted[key]
        full = -(-loop.steps // clock)
        return full * first + (loop.steps - full) * second
