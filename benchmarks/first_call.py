"""The first call of a start: the plain UNet, wrapped, and wrapped with the file of a region of an earlier start.

    python benchmarks/first_call.py [--rounds 5]

Every start is a process of its own, with one thread. Measured is all that a user waits for, `wrap` and the first call,
and the second call beside it, in seconds of the processor: others may be at work on the machine.
Models: the demo model, and a UNet of SD v1.5's blocks with few channels: as many modules and operators, and little to
compute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import clockwork_hooks as ch

SIDES = ("plain", "wrapped", "with the file")


def demo_model() -> tuple[torch.nn.Module, tuple[Any, ...]]:
    """The demo's UNet with one prompt, under guidance."""
    from clockwork_hooks.demo import DEMO_PROMPTS, load_demo

    demo = load_demo()
    return demo.unet, (torch.cat([demo.noise(1, seed=0)] * 2), torch.tensor(900), demo.encode_prompts(DEMO_PROMPTS[:1]))


def sd15_blocks() -> tuple[torch.nn.Module, tuple[Any, ...]]:
    """SD v1.5's UNet with a tenth of its channels, for pictures of 256 × 256."""
    from diffusers import UNet2DConditionModel

    config: dict[str, Any] = {"block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 64, "sample_size": 32}
    unet = UNet2DConditionModel(**config, attention_head_dim=4, norm_num_groups=16).eval()
    return unet, (torch.randn(2, 4, 32, 32), torch.tensor(900), torch.randn(2, 77, 64))


MODELS = {"demo model": demo_model, "SD v1.5's blocks": sd15_blocks}


@torch.no_grad()
def start(model: str, side: str, path: Path) -> dict[str, float]:
    """Seconds of the first call, and of the second."""
    torch.set_num_threads(1)
    unet, args = MODELS[model]()
    begun = time.process_time()
    if side != "plain":
        cw = ch.wrap(unet, region=path if side == "with the file" else None)
    unet(*args)
    first = time.process_time()
    unet(args[0], args[1] - 50, *args[2:])
    second = time.process_time()
    if side == "wrapped":
        assert cw.region is not None
        cw.region.save(path)
    return {"first": first - begun, "second": second - first}


def main() -> None:
    """Start by start, in turns."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--start", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        model, side, path = options.start
        print(json.dumps(start(model, side, Path(path))))
        return
    print(f"torch {torch.__version__}\n")
    print("| model | side | first call, s | second call, s |\n|:---|:---|---:|---:|")
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            seconds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
            for _ in range(options.rounds):
                for side in SIDES:
                    command = [sys.executable, __file__, "--start", model, side, f"{folder}/region.json"]
                    seconds[side].append(json.loads(subprocess.run(command, check=True, stdout=-1).stdout))
            for side in SIDES:
                first, second = (statistics.median(run[k] for run in seconds[side]) for k in ("first", "second"))
                print(f"| {model} | {side} | {first:.2f} | {second:.2f} |", flush=True)


if __name__ == "__main__":
    main()
