"""Latencies of the sides of a model: trajectories, single passes, throughput; what `gpu_latency.py` is made of."""

from __future__ import annotations

import copy
import gc
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import clockwork_hooks as ch
from benchmarks.harness import Results, Timing, environment, in_turns, mark, reason, say, seconds_between, synchronize
from benchmarks.setting import GUIDANCE, Loop, build
from benchmarks.sides import PLANNED, Bench, Side, Variant
from clockwork_hooks.analysis.normal_equations import KINDS

PLAIN = Variant()
AT_CLOCK_2 = ", at clock 2"  # of a pass between two full ones
PASSES = (  # (adaptor, cut), the most important first: where time is short the last ones are left out
    ("ideal", "outer"), ("identity", "outer"), ("affine", "outer"), ("exit", "outer"), ("exit+entry", "outer"),
    ("identity", "widest"), ("affine", "widest"), ("exit+entry", "widest"), ("exit+entry+before+trend", "widest"),
    ("affine+trend", "widest"), ("ResNet", "outer"), ("ideal", "paper"), ("identity", "paper"), ("ResNet", "paper"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Group:
    """What takes turns: variants of one number of steps.

    Attributes:
        steps: of the sampler.
        variants: the most important first.
        rounds: runs of each.
        limit: seconds, after which nothing is opened and no round begins.
    """

    steps: int
    variants: Sequence[Variant]
    rounds: int
    limit: float


class Latency:
    """A run: its device, its clock, its results.

    Args:
        path: of the JSON file.
        device: "cuda" or "cpu".
        minutes: wall-clock time, all in all.
        tiny: models of a tenth of the width.
        compile_options: of torch.compile, for the mode "compile".
        timed: False runs every side until it is warm, and times none.
        sides: a pattern: only the sides in whose names it is found.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str,
        minutes: float,
        tiny: bool,
        compile_options: dict[str, Any],
        timed: bool = True,
        sides: str = "",
    ) -> None:
        self.sides = sides
        self.device, self.tiny, self.compile_options, self.timed = device, tiny, compile_options, timed
        self.deadline = time.monotonic() + 60 * minutes
        self.results = Results(path, environment(device, 0))
        self.dtype = torch.float32 if device == "cpu" else torch.float16
        self.eager: dict[Any, float] = {}
        self.benches: dict[str, Bench] = {}
        self.counted: dict[str, dict[Any, tuple[float, float]]] = {}

    def take(self, earlier: dict[str, Any]) -> None:
        """Go on from the results of an earlier run."""
        now = self.results.data["environment"]
        self.results.data = {**earlier, "environment": {**now, "before": earlier["environment"]}}
        for row in earlier.get("latency", []):
            if row["mode"] == "eager" and row["side"] == "plain":
                self.eager[row["model"], row["batch"], row["steps"]] = row["ms_per_step"] * row["steps"] / 1e3

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def bench(self, name: str) -> Bench:
        """A model, built when it is first needed."""
        if name not in self.benches:
            model = build(name, self.device, self.dtype, tiny=self.tiny)
            made = Bench(model, self.compile_options, counted=self.counted.setdefault(name, {}))
            self.benches[name] = made
            say(f"{name}: {model.parameters / 1e6:.0f} M parameters")
        return self.benches[name]

    def free(self) -> None:
        """What nothing holds any more."""
        gc.collect()
        torch._dynamo.reset()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def trajectories(self, name: str, batch: int, mode: str, groups: Iterable[Group]) -> None:
        """Whole sampling loops, group by group; what does not depend on the number of steps is opened once."""
        opened: dict[Variant, Side] = {}
        for group in groups:
            self._group(name, batch, mode, group, opened)
        opened.clear()
        self.free()

    def _group(self, name: str, batch: int, mode: str, group: Group, opened: dict[Variant, Side]) -> None:
        """All variants of a group, in turns."""
        limit = min(group.limit, self.left()) if self.timed else self.left()
        bench, until = self.bench(name), time.monotonic() + limit
        late = until - 0.2 * limit  # what is left then is for timing
        where = {"model": name, "batch": batch, "steps": group.steps, "mode": mode}
        sides: dict[str, tuple[Side, Loop]] = {}
        for variant in group.variants:
            if not re.search(self.sides, variant.name):
                continue
            base = replace(variant, steps=0)
            if time.monotonic() > late and sides and base not in opened:
                self.results.add("failures", **where, side=variant.name, reason="no time was left")
                continue
            loop, start = Loop(bench.model, batch, variant.steps or group.steps), time.monotonic()
            try:
                side = replace(opened[base], variant=variant) if base in opened else bench.open(variant, loop, mode)
                bench.warm(side, loop, mode)
                sides[variant.name] = side, loop
                if variant.any_steps:
                    opened[base] = side
                say(f"ready: {variant.name}, {time.monotonic() - start:.1f} s")
            except Exception as error:
                self.results.add("failures", **where, side=variant.name, reason=reason(error))
        runs: dict[str, Callable[[], Any]] = {
            side: (lambda loop=loop, call=one.call: loop(call)) for side, (one, loop) in sides.items()
        }
        if self.timed:
            timings = in_turns(runs, self.device, rounds=group.rounds, warmup=0, until=until, least=3)
            self._rows(bench, where, sides, timings)

    def _rows(
        self, bench: Bench, where: dict[str, Any], sides: dict[str, tuple[Side, Loop]], timings: dict[str, Timing]
    ) -> None:
        """A row for each side, with what it is relative to the others."""
        steps, key = where["steps"], (where["model"], where["batch"], where["steps"])
        plain = timings.get("plain")
        if plain is not None and where["mode"] == "eager":
            self.eager[key] = plain.median
        eager = self.eager.get(key)
        plain_macs = sides["plain"][0].macs if "plain" in sides else None
        plain_macs = plain_macs or steps * bench.find(Loop(bench.model, where["batch"], steps))["outer"].full_macs
        for label, timing in timings.items():
            side, loop = sides[label]
            variant = side.variant
            ideal = timings.get(Variant("ideal", variant.clock, "identity", variant.cut).name)
            ideal = None if variant.planned else ideal
            ours = variant.kind == "clockwork"
            macs = side.macs or (plain_macs * loop.steps / steps if variant.kind == "plain" else None)
            full = bench.find(loop)["outer"].full_macs * steps
            self.results.add(
                "latency",
                **where,
                side=label,
                kind=variant.kind,
                clock=None if variant.planned else variant.clock,
                schedule=str(PLANNED[loop.steps]) if variant.planned else None,
                adaptor=variant.adaptor if ours else None,
                cut=variant.cut if ours or variant.kind == "ideal" else None,
                steps_run=loop.steps,
                ms_per_image=1e3 * timing.median / loop.images,
                ms_per_step=1e3 * timing.median / loop.steps,
                spread=timing.spread,
                runs=timing.runs,
                speedup=plain.median / timing.median if plain else None,
                speedup_to_eager=eager / timing.median if eager else None,
                macs_ratio=macs / (full if ours else plain_macs) if macs else None,
                tflops=2 * macs / timing.median / 1e12 if macs else None,
                to_ideal=timing.median / ideal.median if ideal and ours else None,
                peak_memory_gib=side.memory / 2**30 if side.memory else None,
            )

    def passes(self, name: str, batch: int, mode: str, *, rounds: int, limit: float) -> None:
        """Single passes: full and adaptor, against the UNet alone, the hand-pruned UNet and the adaptor alone.

        Adaptor passes come in a row first, in which each keeps its exit for the next one, and then at clock 2, each
        between two full ones.
        """
        limit = min(limit, self.left()) if self.timed else self.left()
        bench, until = self.bench(name), time.monotonic() + limit
        opened = until - 0.2 * limit
        steps, skip = (24, 4) if self.device != "cpu" else (14, 3)
        clocked = range(steps - 6, steps + 1, 2)
        row = range(3, clocked[0] - 1)  # two full passes first: between them there is a trend; the last keeps nothing
        adaptor_steps = {*row, *clocked}
        loop = Loop(bench.model, batch, steps)
        loop.scheduler.set_timesteps(steps, device=self.device)
        times, sample = loop.scheduler.timesteps, torch.cat([loop.noise, loop.noise])

        at_clock_2: dict[str, list[float]] = {}

        def run(call: Any, label: str) -> Callable[[], float]:
            @torch.no_grad()
            def seconds() -> float:
                begin = getattr(call, "begin", lambda: None)
                begin()
                marks = []
                for t in times:
                    call(sample, t, **loop.conditions, return_dict=False)
                    marks.append(mark(self.device))  # no wait: what the first launch waits for is no pass's time
                alone = [seconds_between(marks[step - 2], marks[step - 1]) for step in clocked]
                at_clock_2.setdefault(label, []).append(sum(alone) / len(alone))
                return seconds_between(marks[skip - 1], marks[row[-1] - 2]) / (row[-1] - 1 - skip)

            return seconds

        wanted: dict[str, tuple[Variant, Any]] = {
            "plain": (PLAIN, None),
            "clockwork, clock 1": (Variant("clockwork"), ()),
        }
        for adaptor, cut in PASSES[:3] if self.tiny and mode == "compile" else PASSES:
            if adaptor == "ideal":
                wanted[f"ideal adaptor pass, {cut} cut"] = Variant("ideal", steps, cut=cut), None
            else:
                wanted[f"adaptor pass, {adaptor}, {cut} cut"] = Variant("clockwork", 2, adaptor, cut), adaptor_steps
        sides: dict[str, Side] = {}
        where = {"model": name, "batch": batch, "mode": mode}
        for label, (variant, schedule) in wanted.items():
            if not re.search(self.sides, label):
                continue
            if time.monotonic() > opened:
                self.results.add("failures", **where, side=label, reason="no time was left")
                continue
            try:
                start = time.monotonic()
                sides[label] = bench.open(variant, loop, mode, schedule=schedule)
                for _ in range(2):
                    run(sides[label].call, label)()
                say(f"ready: {label}, {time.monotonic() - start:.1f} s")
            except Exception as error:
                sides.pop(label, None)
                self.results.add("failures", **where, side=label, reason=reason(error))
        runs = {label: run(side.call, label) for label, side in sides.items() if self.timed}
        at_clock_2.clear()
        timings = in_turns(
            runs, self.device, rounds=rounds, warmup=0, until=until, least=3, measure=lambda seconds, _: seconds()
        )
        clocked_2 = {f"{label}{AT_CLOCK_2}": Timing.of(values) for label, values in at_clock_2.items()
                     if label.startswith("adaptor pass")}  # fmt: skip
        timings |= clocked_2
        for label, timing in timings.items():
            side = sides[label.removesuffix(AT_CLOCK_2)]
            against = "plain" if "clock 1" in label else f"ideal adaptor pass, {side.variant.cut} cut"
            if label in clocked_2 or side.variant.adaptor in KINDS:
                against = f"adaptor pass, identity, {side.variant.cut} cut" + AT_CLOCK_2 * (label in clocked_2)
            base = timings.get(against) if against != label else None
            macs = _macs_per_pass(side, label)
            self.results.add(
                "passes",
                model=name,
                batch=batch,
                mode=mode,
                side=label,
                ms=1e3 * timing.median,
                spread=timing.spread,
                gmacs=macs / 1e9 if macs else None,
                against=against if base and side.variant.kind == "clockwork" else None,
                ratio=timing.median / base.median if base and side.variant.kind == "clockwork" else None,
            )
        sides.clear()
        self.free()

    def calibrate(self, name: str, schedule: ch.Schedule, *, prompts: int, images: int, steps: int) -> None:
        """`ch.calibrate` as a user calls it, and sampling the same batches: seconds, and the memory at the peak."""
        if not self.timed:
            return
        bench, cuda = self.bench(name), self.device.startswith("cuda")
        loop, runs = Loop(bench.model, 2 * images, steps), 0
        batches = [bench.model.random_conditions(2 * images, seed) for seed in range(prompts // images)]
        unet = bench.model.twin()
        generate = loop.generate(unet)

        def counted(batch: Any, seed: int) -> Any:
            nonlocal runs
            sample = generate(batch, seed)
            runs += 1  # the trace ends in the first call
            return sample

        def measured(act: Callable[[], Any]) -> tuple[Any, float, float | None]:
            self.free()
            before = torch.cuda.memory_allocated() if cuda else 0
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            synchronize(self.device)
            start = time.perf_counter()
            output = act()
            synchronize(self.device)
            seconds = time.perf_counter() - start
            own = bench.model.weight_bytes  # other models may be on the device
            return output, seconds, (torch.cuda.max_memory_allocated() - before + own) / 2**30 if cuda else None

        generate(batches[0], 0)  # kernels are loaded, algorithms chosen
        _, sampling, sampling_gib = measured(lambda: [generate(batch, 0) for batch in batches[:2]])
        adaptor, seconds, gib = measured(
            lambda: ch.calibrate(unet, counted, batches, guidance=GUIDANCE, schedule=schedule, log_snr=loop.scheduler)
        )
        self.results.add(
            "calibrate",
            model=name,
            schedule=str(schedule),
            prompts=prompts,
            images=images,
            steps=steps,
            guidance=GUIDANCE,
            kind=adaptor.report.kind,
            region=adaptor.report.region,
            rows=adaptor.report.samples,
            runs=runs / len(batches),
            seconds=seconds,
            sampling_s=sampling / 2 * len(batches),
            beyond_sampling_s=seconds - sampling / 2 * runs,
            peak_memory_gib=gib,
            sampling_gib=sampling_gib,
            memory_ratio=gib / sampling_gib if gib and sampling_gib else None,
        )

    def choices(self, name: str, batch: int, mode: str, *, rounds: int) -> None:
        """What is the user's business: memory format, fused projections; full passes and clock 2."""
        bench = self.bench(name)
        loop = Loop(bench.model, batch, 8)
        original, runs = bench.model.unet, {}

        def last(unet: Any) -> Any:
            return unet.to(memory_format=torch.channels_last)

        def fused(unet: Any) -> Any:
            unet.fuse_qkv_projections()
            return unet

        for choice, change in {"as it is": lambda unet: unet, "channels_last": last, "fused q, k, v": fused}.items():
            for variant in (PLAIN, Variant("clockwork", 2)):
                try:
                    bench.model.unet = change(copy.deepcopy(original))
                    side = bench.open(variant, loop, mode)
                    for _ in range(2):
                        loop(side.call)
                    runs[choice, variant.kind] = lambda call=side.call: loop(call)
                except Exception as error:
                    self.results.add("failures", model=name, mode=mode, side=choice, reason=reason(error))
                finally:
                    bench.model.unet = original
        timings = in_turns(runs, self.device, rounds=rounds, warmup=0)
        for (choice, kind), timing in timings.items():
            base = timings["as it is", kind]
            self.results.add(
                "choices",
                model=name,
                batch=batch,
                mode=mode,
                choice=choice,
                kind=kind,
                ms_per_step=1e3 * timing.median / 8,
                spread=timing.spread,
                gain=base.median / timing.median,
            )
        runs.clear()
        self.free()

    def throughput(self, name: str, batches: Iterable[int], mode: str, *, rounds: int) -> None:
        """Images a second, and what the cache takes."""
        bench = self.bench(name)
        region = bench.find(Loop(bench.model, 2, 8))["outer"]
        element = torch.empty((), dtype=self.dtype).element_size()
        cache = 2 * element * region.exit.shape[1] * region.exit.resolution[0] * region.exit.resolution[1]
        for batch in batches:
            runs = {}
            for variant in (PLAIN, Variant("clockwork", 2)):
                if self.left() < 15:
                    return
                loop = Loop(bench.model, batch, 8)
                try:
                    side = bench.open(variant, loop, mode)
                    for _ in range(2):
                        loop(side.call)
                    runs[variant.kind] = lambda loop=loop, call=side.call: loop(call)
                except Exception as error:
                    self.results.add(
                        "failures", model=name, batch=batch, mode=mode, side=variant.name, reason=reason(error)
                    )
            for kind, timing in in_turns(runs, self.device, rounds=rounds, warmup=0).items():
                self.results.add(
                    "throughput",
                    model=name,
                    batch=batch,
                    mode=mode,
                    kind=kind,
                    steps=8,
                    images_per_s=batch / 2 / timing.median,
                    spread=timing.spread,
                    cache_mib_per_image=cache / 2**20 if kind == "clockwork" else 0.0,
                )
            runs.clear()
            self.free()

    def profile(self, name: str, batch: int, mode: str) -> None:
        """Where the time of an adaptor pass goes, by kernel."""
        from torch.profiler import ProfilerActivity, profile

        bench = self.bench(name)
        loop = Loop(bench.model, batch, 8)
        try:
            side = bench.open(Variant("clockwork", 2), loop, mode, schedule=set(range(2, 9)))
            for _ in range(2):
                loop(side.call)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device != "cpu" else [])]
            with profile(activities=activities) as seen:
                loop(side.call)
        except Exception as error:
            self.results.add("failures", model=name, batch=batch, mode=mode, side="profile", reason=reason(error))
            return
        key = "self_device_time_total" if self.device != "cpu" else "self_cpu_time_total"
        rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, key))
        total = sum(getattr(row, key) for row in rows)
        for row in rows[:12]:
            self.results.add(
                "profile",
                model=name,
                batch=batch,
                mode=mode,
                kernel=row.key[:90],
                calls=row.count,
                us=getattr(row, key),
                share=getattr(row, key) / total if total else None,
            )


def _macs_per_pass(side: Side, label: str) -> float | None:
    if side.wrapper is None or not label.startswith("adaptor pass"):
        return None
    stats = side.wrapper.stats
    full = stats.macs_plain / (stats.full_passes + stats.adaptor_passes)
    return (stats.macs_run - full * stats.full_passes) / max(stats.adaptor_passes, 1)
