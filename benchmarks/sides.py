"""The sides of a latency benchmark: plain, Clockwork, Clockwork by hand, and the peers, each in a mode."""

from __future__ import annotations

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
from benchmarks.setting import Loop, Model
from clockwork_hooks.adaptors import ResNetAdaptor
from clockwork_hooks.regions.find import choose, regions_of


@dataclass(frozen=True, slots=True)
class Variant:
    """What runs.

    Attributes:
        kind: "plain", "clockwork", "ideal" (Clockwork by hand), "DeepCache", "DeepCache, static by hand", "tomesd",
            "tomesd, nothing random" (it draws which tokens to merge from a generator of its own).
        clock: a full pass every so many steps (DeepCache's interval).
        adaptor: "identity" or "ResNet".
        cut: "outer", "paper", or "widest" (what DeepCache's branch 0 skips).
    """

    kind: str = "plain"
    clock: int = 1
    adaptor: str = "identity"
    cut: str = "outer"

    @property
    def name(self) -> str:
        """As in the tables."""
        if self.kind.startswith(("plain", "tomesd")):
            return self.kind
        if self.kind.startswith("DeepCache"):
            return f"{self.kind}, interval {self.clock}, branch 0"
        return f"{self.kind}, clock {self.clock}, {self.adaptor}, {self.cut} cut"


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
        adaptor = self.adaptor(variant, region)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ch.NoEffectWarning)
            clock = variant.clock if schedule is None else None
            cw = ch.wrap(unet, adaptor, clock=clock, region=region, schedule=schedule)
        if mode == "cudagraphs":
            cw.compile(mode="cudagraphs")
        elif mode == "compile":
            cw.compile(**self.compile_options)
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
            weights = sum(p.numel() * p.element_size() for p in self.model.unet.parameters())
            side.memory = torch.cuda.max_memory_allocated() - before + weights
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
