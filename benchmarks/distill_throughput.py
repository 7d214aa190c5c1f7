"""How fast adaptors are trained on one GPU and on two: recording trajectories, learning from them, and memory.

    python -m benchmarks.distill_throughput --out DIR            # one process, then two; under 3 minutes in all
    python -m benchmarks.distill_throughput --out DIR --models demo --processes 1
    python -m benchmarks.distill_throughput --out DIR --tiny     # in miniature on a CPU, with gloo

Each process samples its own batch of prompts, so two do twice the work of one: the speed-up is the ratio of prompts a
second, over recording and training together. The demo UNet is float32 with TensorFloat-32; SD v1.5 has random
weights in float16, 8 DPM++ steps, guidance 7.5, the paper's cut and batch. Parts that are in DIR are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import environment
from clockwork_hooks.training import distill, local_device

MODELS = ("demo", "sd15")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.worker:
        work(options)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    for model in options.models.split(","):
        for processes in map(int, options.processes.split(",")):
            part = options.out / f"{model}-{processes}.json"
            if part.exists():
                continue
            started = time.monotonic()
            made = subprocess.run(launch(options, model, processes, part), check=False)
            print(f"{part.name}: {time.monotonic() - started:.0f} s, exit code {made.returncode}", flush=True)
    found = {path.stem: json.loads(path.read_text()) for path in sorted(options.out.glob("*-*.json"))}
    summary = {"environment": environment(options.device, 0), "runs": found, "speed_up": speed_ups(found)}
    (options.out / "distill_throughput.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary["speed_up"], indent=2))
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="folder of the parts and of distill_throughput.json")
    made.add_argument("--models", default=",".join(MODELS), help="by commas: " + ", ".join(MODELS))
    made.add_argument("--processes", default="1,2", help="numbers of processes, by commas")
    made.add_argument("--trajectories", type=int, default=16, help="measured, in each process")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    made.add_argument("--tiny", action="store_true", help="small latents, batch 1, few steps, on the CPU")
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return made


def launch(options: argparse.Namespace, model: str, processes: int, part: Path) -> list[str]:
    """The command of one run: plain Python for one process, `accelerate launch` for more."""
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", "0", "--module"]
    command += ["benchmarks.distill_throughput", "--worker", "--models", model, "--out", str(part)]
    command += ["--trajectories", str(options.trajectories), "--device", options.device]
    return [*command, *["--tiny"] * options.tiny]


def work(options: argparse.Namespace) -> None:
    """One process of a run: warm up, measure, and let the first one write."""
    device = "cpu" if options.tiny or options.device == "cpu" else local_device()
    world = int(os.environ.get("WORLD_SIZE", 1))
    given = (demo if options.models == "demo" else sd15)(device, options.tiny)
    common = {**given, "adaptor": "resnet", "lr": 1e-4, "hold": 2, "tf32": True, "progress": False}
    if torch.cuda.is_available() and device != "cpu":
        torch.cuda.set_device(device)
    distill(**common, trajectories=2 * world)  # kernels are chosen, NCCL connects
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    result = distill(**common, trajectories=options.trajectories * world)
    prompts = result.trajectories * given["batch"]
    losses = result.losses
    told = {
        "model": options.models,
        "processes": result.settings["processes"],
        "batch": given["batch"],
        "trajectories": result.trajectories,
        "prompts": prompts,
        "seconds": result.seconds,
        "recording_seconds": result.recording_seconds,
        "prompts_per_second": prompts / result.seconds,
        "gradient_steps_per_second": result.students["adaptor"].updates / result.seconds,
        "memory_gb": None if device == "cpu" else torch.cuda.max_memory_allocated() / 1e9,
        "buffer_gb": result.buffer_peak / 1e9,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "environment": environment("cpu" if device == "cpu" else "cuda", 0),
    }
    if int(os.environ.get("RANK", 0)) == 0:
        options.out.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def demo(device: str, tiny: bool) -> dict[str, Any]:
    """The demo model and its sampler."""
    from clockwork_hooks.demo.recipe import Recipe

    small = {"steps": 3, "latent_size": 8, "captions": 8} if tiny else {}
    return {**Recipe.of(device=device, **small).arguments(), "batch": 1 if tiny else 128}


def sd15(device: str, tiny: bool) -> dict[str, Any]:
    """SD v1.5's architecture with random weights, 8 DPM++ steps over random hidden states."""
    from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel

    from clockwork_hooks.models import load_model

    dtype = torch.float32 if tiny else torch.float16
    torch.manual_seed(0)
    if tiny:
        blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "block_out_channels": (8, 16)}
        blocks |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1, "norm_num_groups": 4}
        unet: Any = UNet2DConditionModel(sample_size=8, cross_attention_dim=16, attention_head_dim=4, **blocks)
    else:
        unet = load_model("sd15", device=device)[0].to(dtype)
    unet = unet.eval()
    width, edge, steps = unet.config.cross_attention_dim, unet.config.sample_size, 3 if tiny else 8

    def generate(batch: Sequence[int]) -> None:
        solver = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        solver.set_timesteps(steps, device=device)
        latents = torch.randn(len(batch), 4, edge, edge, device=device, dtype=dtype)
        hidden = torch.randn(2 * len(batch), 77, width, device=device, dtype=dtype)
        for t in solver.timesteps:
            both = solver.scale_model_input(torch.cat([latents, latents]), t)
            plain, told = unet(both, t, encoder_hidden_states=hidden).sample.chunk(2)
            latents = solver.step(plain + 7.5 * (told - plain), t, latents).prev_sample

    more = {"batch": 1, "cut": "outer"} if tiny else {"batch": 16, "cut": "paper", "precision": "bf16"}
    return {"unet": unet, "generate": generate, "prompts": range(1024), "guidance": 7.5, "buffer_gb": 16, **more}


def speed_ups(found: dict[str, Any]) -> dict[str, float]:
    """Prompts a second of several processes against one, by model."""
    ones = {run["model"]: run for run in found.values() if run["processes"] == 1}
    return {
        f"{run['model']}, {run['processes']} processes": run["prompts_per_second"]
        / ones[run["model"]]["prompts_per_second"]
        for run in found.values()
        if run["processes"] > 1 and run["model"] in ones
    }


if __name__ == "__main__":
    raise SystemExit(main())
