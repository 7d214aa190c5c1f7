"""Seconds that `ch.calibrate` takes on the demo model, and an adaptor pass beside the identity's.

    python -m benchmarks.calibration_cost --out DIR                            on a GPU, into DIR/calibration_cost.json
    python -m benchmarks.calibration_cost --out DIR --device cpu --seconds 1   calibration alone, on a CPU
    python -m benchmarks.calibration_cost --out DIR --device cpu --batch 2     in miniature

64 prompts, 8 DPM++ steps, guidance 1.5, the widest region, adaptor steps 3, 4, 6 and 7. Each way of calling the UNet
(eager, CUDA graphs, compiled) times the kinds in turns, each on a copy of the model; a time is the device's, the mean
of the four steps' medians over all rounds: before a full step, an adaptor pass keeps nothing, so they are not alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import clockwork_hooks as ch
from benchmarks.harness import Results, environment, mark, say, seconds_between, synchronize
from clockwork_hooks.analysis.calibration import CalibratedAdaptor, calibrate
from clockwork_hooks.demo.evaluate import held_out_prompts
from clockwork_hooks.demo.model import DemoModel, load_demo

AT, STEPS, GUIDANCE = (3, 4, 6, 7), 8, 1.5
KINDS = ("identity", "affine", "exit+entry")
WAYS: dict[str, dict[str, Any] | None] = {  # options of `cw.compile`
    "eager": None,
    "cudagraphs": {"mode": "cudagraphs"},
    "compile": {},
    "compiled-cudagraphs": {"mode": "compiled-cudagraphs"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for calibration_cost.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64, help="prompts")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=150, help="begin no way of calling after these")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy")  # diffusers and NumPy 2
    started, cuda = time.monotonic(), str(options.device).startswith("cuda")
    dtype = torch.float16 if cuda else torch.float32
    results = Results(
        options.out / "calibration_cost.json",
        {**environment(options.device, 0), "batch": options.batch, "dtype": str(dtype)},
    )
    models = {kind: load_demo(options.device, dtype) for kind in KINDS}
    adaptors: dict[str, Any] = {"identity": "identity"}
    for kind in ("auto", *KINDS[1:]):
        model = models["identity" if kind == "auto" else kind]
        for repeat in range(3 if kind == "auto" else 1):
            synchronize(options.device)
            begun = time.perf_counter()
            adaptors[kind] = calibrated(model, kind, options.batch)
            synchronize(options.device)
            results.add("calibrate", kind=kind, repeat=repeat, seconds=time.perf_counter() - begun)
    for way in WAYS if cuda else ("eager",):
        if time.monotonic() - started > options.seconds:
            say(f"{way}: no time is left")
            continue
        for kind, rounds in passes(models, adaptors, way, options).items():
            by_step = [statistics.quantiles(times, n=4) for times in zip(*rounds, strict=True)]
            lower, middle, upper = (1e3 * statistics.mean(times) for times in zip(*by_step, strict=True))
            results.add("adaptor pass", way=way, kind=kind, ms=middle, lower=lower, upper=upper)
    return 0


def widest(model: DemoModel, count: int) -> ch.Region:
    """The widest region of the demo model's UNet, for calls with so many prompts."""
    sample, hidden = inputs(model, count)
    position = torch.tensor(1, device=model.device)
    return ch.find_regions(model.unet, sample, position, encoder_hidden_states=hidden)[0]


def inputs(model: DemoModel, count: int) -> tuple[Tensor, Tensor]:
    """Noise and encoded prompts, both guidance branches in one batch."""
    noise, hidden = model.noise(count, 0), model.encode_prompts(held_out_prompts(count))
    return torch.cat([noise, noise]).to(hidden.dtype), hidden


def calibrated(model: DemoModel, kind: str, count: int) -> CalibratedAdaptor:
    """An adaptor of a kind, from so many prompts."""

    def generate(prompts: Sequence[str]) -> Tensor:
        return model.denoise(model.noise(len(prompts), 1), model.encode_prompts(prompts), steps=STEPS,
                             guidance=GUIDANCE, scheduler="dpm++")  # fmt: skip

    return calibrate(
        model.unet, generate, [held_out_prompts(count)], guidance=GUIDANCE, schedule=ch.Schedule.at(AT),
        region=widest(model, count), kind=kind, log_snr=model.scheduler("dpm++"),
    )  # fmt: skip


@torch.no_grad()
def passes(
    models: dict[str, DemoModel], adaptors: dict[str, Any], way: str, options: argparse.Namespace
) -> dict[str, list[list[float]]]:
    """Kind → round → seconds of each adaptor pass."""
    solver = models["identity"].scheduler("dpm++")
    solver.set_timesteps(STEPS)
    times = solver.timesteps.to(options.device)
    wrapped = {
        kind: ch.wrap(model.unet, adaptors[kind], schedule=ch.Schedule.at(AT), region=widest(model, options.batch))
        for kind, model in models.items()
    }
    seconds: dict[str, list[list[float]]] = {kind: [] for kind in models}
    try:
        for kind, cw in wrapped.items():
            begun = time.perf_counter()
            if (how := WAYS[way]) is not None:
                cw.compile(**how)
            for _ in range(3):
                trajectory(models[kind], cw, times, options)
            say(f"{way}, {kind}: ready in {time.perf_counter() - begun:.1f} s")
        for number in range(options.rounds):
            for kind in KINDS[number % len(KINDS) :] + KINDS[: number % len(KINDS)]:
                seconds[kind].append(trajectory(models[kind], wrapped[kind], times, options))
    finally:
        for cw in wrapped.values():
            cw.remove()
    return seconds


def trajectory(model: DemoModel, cw: Any, times: Tensor, options: argparse.Namespace) -> list[float]:
    """Seconds of the adaptor passes of one trajectory."""
    sample, hidden = inputs(model, options.batch)
    before, marks = cw.stats.adaptor_passes, [mark(options.device)]
    for position in times:
        sample = sample - 0.1 * model.unet(sample, position, encoder_hidden_states=hidden).sample
        marks.append(mark(options.device))
    if cw.stats.adaptor_passes - before != len(AT):
        raise RuntimeError(f"{cw.stats.adaptor_passes - before} adaptor passes, not {len(AT)}")
    return [seconds_between(marks[step - 1], marks[step]) for step in AT]


if __name__ == "__main__":
    raise SystemExit(main())
