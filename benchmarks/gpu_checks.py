"""Is a captured or compiled wrapper right? Compared with eager on the device itself; part of `gpu_latency.py`."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.utils import counters

import clockwork_hooks as ch
from benchmarks.harness import Results, reason
from benchmarks.setting import Loop
from benchmarks.sides import Bench, Variant
from clockwork_hooks.demo.model import GUIDANCE, DemoModel, load_demo

PROMPTS = ("a large red circle on a blue background", "a small green ring at the top on a grey background")
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-2}


def _calibrated(demo: DemoModel, kind: str) -> dict[str, Any]:
    """An adaptor of the demo model on the rule that it is for."""
    schedule = ch.Schedule.early(2)

    def generate(prompts: Sequence[str]) -> Any:
        return demo.sample(prompts)

    options: dict[str, Any] = {"guidance": GUIDANCE, "log_snr": demo.scheduler("dpm++"), "kind": kind}
    adaptor = ch.calibrate(demo.unet, generate, [PROMPTS], schedule=schedule, **options)
    return {"adaptor": adaptor, "schedule": schedule}


def _clocks(demo: DemoModel) -> dict[str, Any]:
    """The widest region on clock 2, and what lies in it on clock 4."""
    call = torch.cat([demo.noise(2, 0)] * 2).to(demo.unet.dtype), torch.tensor(900, device=demo.device)
    regions = ch.find_regions(demo.unet, *call, encoder_hidden_states=demo.encode_prompts(PROMPTS))
    return {"clocks": {regions[0]: 2, regions[-1]: 4}}


WAYS: dict[str, Callable[[DemoModel], dict[str, Any]]] = {
    "clock 2": lambda demo: {"clock": 2},
    "clocks 2 and 4": _clocks,
    "affine": partial(_calibrated, kind="affine"),
    "affine+trend": partial(_calibrated, kind="affine+trend"),
    "exit+entry+before+trend": partial(_calibrated, kind="exit+entry+before+trend"),
}


def equality(
    results: Results, device: str, mode: str, options: dict[str, Any], dtype: torch.dtype, way: str = "clock 2"
) -> None:
    """The demo model's UNet: every pass on the inputs of the eager run, then a whole trajectory of its own."""
    name = {"mode": mode, "dtype": str(dtype).removeprefix("torch."), "side": way}
    torch.backends.cudnn.allow_tf32 = dtype is not torch.float32  # its rounding is larger than the bound
    demo = load_demo(device, dtype)
    wrapped = WAYS[way](demo)
    twin = copy.deepcopy(demo.unet)
    inputs: list[tuple[Any, Any]] = []
    outputs: list[Tensor] = []

    def watch(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        inputs.append((args, kwargs))
        outputs.append(output.sample.clone())

    try:
        with (
            ch.wrap(demo.unet, **wrapped),
            ch.wrap(twin, **{**wrapped, "adaptor": copy.deepcopy(wrapped.get("adaptor"))}) as cw,
        ):
            demo.sample(PROMPTS)  # the first trajectory may have a full pass more: its first call is recorded
            handle = demo.unet.register_forward_hook(watch, with_kwargs=True)
            eager = demo.sample(PROMPTS)
            handle.remove()
            cw.compile(**options)
            demo.sample(PROMPTS, unet=twin)  # traced, counted
            demo.sample(PROMPTS, unet=twin)  # compiled
            graphs = _graphs()
            with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
                cw.reset()
                errors = [
                    float((twin(*args, **kwargs).sample - output).abs().max() / output.abs().max())
                    for (args, kwargs), output in zip(inputs, outputs, strict=True)
                ]
                own = demo.sample(PROMPTS, unet=twin)
            compiled = _graphs() - graphs
            reasons = dict(cw.stats.reasons)
    except Exception as error:
        results.add("checks", check="each pass equals eager", **name, passed=False, reason=reason(error))
        return
    finally:
        torch.backends.cudnn.allow_tf32 = True
    worst = max(errors)
    results.add("checks", check="each pass equals eager", **name, worst=worst, passed=worst <= BOUNDS[dtype])
    noise = float(((own - eager).float() ** 2).mean())
    psnr = -10 * math.log10(noise) if noise else math.inf
    results.add("checks", check="trajectory PSNR, dB", **name, worst=min(psnr, 999.0), passed=psnr >= 50)
    results.add("checks", check="graphs compiled while passes alternate", **name, worst=compiled, passed=compiled == 0)
    results.add("checks", check="reasons of full passes", **name, reasons=reasons, passed=set(reasons) <= KNOWN)


KNOWN = {"first step", "scheduled", "traced"}


def model_equality(results: Results, bench: Bench, loop: Loop, mode: str, variant: Variant) -> None:
    """The benchmarked model itself, in its own dtype: the first four passes of a trajectory."""
    name = {"mode": mode, "model": bench.model.name, "dtype": str(bench.model.dtype).removeprefix("torch.")}
    name["side"] = variant.name
    sides = []
    try:
        for one in ("eager", mode):
            side = bench.open(variant, loop, one)
            bench.warm(side, loop, one)
            sides.append(side)
        t = loop.scheduler.timesteps
        sample = torch.cat([loop.noise, loop.noise])
        with torch.no_grad():
            got = [[side.call(sample, step, **loop.conditions).sample for step in t[:4]] for side in sides]
    except Exception as error:
        results.add("checks", check="each pass equals eager", **name, passed=False, reason=reason(error))
        return
    worst = max(float((a - b).abs().max() / b.abs().max()) for b, a in zip(*got, strict=True))
    results.add(
        "checks", check="each pass equals eager", **name, worst=worst, passed=worst <= BOUNDS.get(bench.model.dtype, 0)
    )


def waits(results: Results, bench: Bench, loop: Loop, mode: str) -> None:
    """How often a loop in steady state waits for the device, with Clockwork and without."""
    if not bench.model.device.startswith("cuda"):
        return
    counts = {}
    for variant in (Variant(), Variant("clockwork", 2)):
        try:
            side = bench.open(variant, loop, mode)
            for _ in range(2):
                loop(side.call)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                loop(side.call)
        except Exception as error:
            results.add("checks", check="waits for the device", mode=mode, passed=False, reason=reason(error))
            return
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts[variant.kind] = sum("synchroniz" in str(one.message) for one in seen)
    more = counts["clockwork"] - counts["plain"]
    results.add("checks", check="waits for the device in 8 steps", mode=mode, **counts, worst=more, passed=more <= 1)


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])
