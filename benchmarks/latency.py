"""Latencies of the sides of a model: trajectories, single passes, throughput; what `gpu_latency.py` is made of."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Results, environment, in_turns, reason, say, synchronize
from benchmarks.setting import Loop, build
from benchmarks.sides import Bench, Side, Variant

PLAIN = Variant()


class Latency:
    """A run: its device, its clock, its results.

    Args:
        path: of the JSON file.
        device: "cuda" or "cpu".
        minutes: wall-clock time, all in all.
        tiny: models of a tenth of the width.
        compile_options: of torch.compile, for the mode "compile".
        timed: False runs every side until it is warm, and times none.
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
    ) -> None:
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
        """A model, built when it is first needed; others give their memory back."""
        if name not in self.benches:
            self.benches.clear()
            self.free()
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

    def trajectories(
        self, name: str, batch: int, steps: int, mode: str, variants: Iterable[Variant], *, rounds: int, limit: float
    ) -> None:
        """Whole sampling loops of all the variants, in turns."""
        limit = min(limit, self.left())
        bench, until = self.bench(name), time.monotonic() + limit
        opened = until - 0.2 * limit  # what is left then is for timing
        sides: dict[str, tuple[Side, Loop]] = {}
        where = {"model": name, "batch": batch, "steps": steps, "mode": mode}
        for variant in variants:
            if time.monotonic() > opened and sides:
                self.results.add("failures", **where, side=variant.name, reason="no time was left")
                continue
            loop, start = Loop(bench.model, batch, steps), time.monotonic()
            try:
                side = bench.open(variant, loop, mode)
                bench.warm(side, loop, mode)
                sides[variant.name] = side, loop
                say(f"ready: {variant.name}, {time.monotonic() - start:.1f} s")
            except Exception as error:
                self.results.add("failures", **where, side=variant.name, reason=reason(error))
        runs: dict[str, Callable[[], Any]] = {
            side: (lambda loop=loop, call=one.call: loop(call)) for side, (one, loop) in sides.items()
        }
        if not self.timed:
            runs.clear()
        timings = in_turns(runs, self.device, rounds=rounds, warmup=0, until=until, least=3)
        plain = timings.get("plain")
        if plain is not None and mode == "eager":
            self.eager[name, batch, steps] = plain.median
        eager = self.eager.get((name, batch, steps))
        plain_macs = sides["plain"][0].macs if "plain" in sides else None
        plain_macs = plain_macs or steps * bench.find(Loop(bench.model, batch, steps))["outer"].full_macs
        for label, timing in timings.items():
            side, loop = sides[label]
            ideal = timings.get(Variant("ideal", side.variant.clock, "identity", side.variant.cut).name)
            ours = side.variant.kind == "clockwork"
            macs = side.macs or (plain_macs if label == "plain" else None)
            full = bench.find(loop)["outer"].full_macs * steps
            self.results.add(
                "latency",
                **where,
                side=label,
                kind=side.variant.kind,
                clock=side.variant.clock,
                adaptor=side.variant.adaptor if ours else None,
                cut=side.variant.cut if ours or side.variant.kind == "ideal" else None,
                ms_per_image=1e3 * timing.median / loop.images,
                ms_per_step=1e3 * timing.median / steps,
                spread=timing.spread,
                runs=timing.runs,
                speedup=plain.median / timing.median if plain else None,
                speedup_to_eager=eager / timing.median if eager else None,
                macs_ratio=macs / (full if ours else plain_macs) if macs else None,
                tflops=2 * macs / timing.median / 1e12 if macs else None,
                to_ideal=timing.median / ideal.median if ideal and ours else None,
                peak_memory_gib=side.memory / 2**30 if side.memory else None,
            )
        sides.clear()
        runs.clear()
        self.free()

    def passes(self, name: str, batch: int, mode: str, *, rounds: int, limit: float) -> None:
        """Single passes: full and adaptor, against the UNet alone, the hand-pruned UNet and the adaptor alone."""
        limit = min(limit, self.left())
        bench, until = self.bench(name), time.monotonic() + limit
        opened = until - 0.2 * limit
        steps, skip = (20, 4) if self.device != "cpu" else (8, 3)
        adaptor_steps = set(range(2, steps + 1))
        loop = Loop(bench.model, batch, steps)
        loop.scheduler.set_timesteps(steps, device=self.device)
        times, sample = loop.scheduler.timesteps, torch.cat([loop.noise, loop.noise])

        def run(call: Any) -> Callable[[], float]:
            @torch.no_grad()
            def seconds() -> float:
                begin = getattr(call, "begin", lambda: None)
                begin()
                for t in times[:skip]:
                    call(sample, t, **loop.conditions, return_dict=False)
                synchronize(self.device)
                start = time.perf_counter()
                for t in times[skip:]:
                    call(sample, t, **loop.conditions, return_dict=False)
                synchronize(self.device)
                return (time.perf_counter() - start) / (steps - skip)

            return seconds

        wanted: dict[str, tuple[Variant, Any]] = {
            "plain": (PLAIN, None),
            "clockwork, clock 1": (Variant("clockwork"), ()),
        }
        for cut in ("outer", "paper"):
            wanted[f"ideal adaptor pass, {cut} cut"] = Variant("ideal", steps, cut=cut), None
            for adaptor in ("identity", "ResNet"):
                wanted[f"adaptor pass, {adaptor}, {cut} cut"] = Variant("clockwork", 2, adaptor, cut), adaptor_steps
        sides: dict[str, Side] = {}
        for label, (variant, schedule) in wanted.items():
            try:
                start = time.monotonic()
                sides[label] = bench.open(variant, loop, mode, schedule=schedule)
                for _ in range(2):
                    run(sides[label].call)()
                say(f"ready: {label}, {time.monotonic() - start:.1f} s")
            except Exception as error:
                sides.pop(label, None)
                where = {"model": name, "batch": batch, "mode": mode}
                self.results.add("failures", **where, side=label, reason=reason(error))
            if time.monotonic() > opened:
                break
        runs = {label: run(side.call) for label, side in sides.items() if self.timed}
        timings = in_turns(
            runs, self.device, rounds=rounds, warmup=0, until=until, least=3, measure=lambda seconds, _: seconds()
        )
        for label, timing in timings.items():
            side = sides[label]
            against = "plain" if "clock 1" in label else f"ideal adaptor pass, {side.variant.cut} cut"
            base = timings.get(against)
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
