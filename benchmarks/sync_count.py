"""How often does a wrapped UNet wait for the device? Plain and wrapped sampling loops of the demo model, counted.

    python -m benchmarks.sync_count --device cuda --out results

On a GPU `torch.cuda.set_sync_debug_mode("warn")` reports every call that waits. On a CPU nothing waits: there the
values that are read out of tensors are counted instead, so that the script can be tried; they mean nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import clockwork_hooks as ch
from benchmarks.harness import Results, environment
from clockwork_hooks.demo import load_demo

SCHEDULERS = ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
Loop = Callable[[Any, Tensor, Tensor, int], None]


class Reads(TorchDispatchMode):
    """Counts the values that are read out of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted(device: str) -> Iterator[Callable[[], int]]:
    """Within it, what it yields says how many waits there were so far."""
    if not device.startswith("cuda"):
        with Reads() as reads:
            yield lambda: reads.count
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("synchronizing" in str(warning.message) for warning in caught)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def diffusers_loop(name: str) -> Loop:
    """The loop of a diffusers pipeline, guidance in one batched call."""

    def loop(unet: Any, latents: Tensor, hidden: Tensor, steps: int) -> None:
        import diffusers

        scheduler = getattr(diffusers, name)()
        scheduler.set_timesteps(steps, device=latents.device)
        for t in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([latents, latents]), t)
            plain, told = unet(both, t, encoder_hidden_states=hidden).sample.chunk(2)
            latents = scheduler.step(plain + 3 * (told - plain), t, latents).prev_sample

    return loop


def bare_loop(unet: Any, latents: Tensor, hidden: Tensor, steps: int) -> None:
    """Nothing but calls at the times of one list: every wait is the UNet's or ours."""
    for t in torch.linspace(999, 0, steps, device=latents.device):
        both = torch.cat([latents, latents])
        latents = latents - 0.1 * unet(both, t, encoder_hidden_states=hidden).sample[: len(latents)]


def fresh_times_loop(unet: Any, latents: Tensor, hidden: Tensor, steps: int) -> None:
    """As k-diffusion: a new tensor of times for each call, which has to be read each time."""
    ones = latents.new_ones(2 * len(latents))
    for k in range(steps):
        both = torch.cat([latents, latents])
        latents = latents - 0.1 * unet(both, ones * (999 - 40 * k), encoder_hidden_states=hidden).sample[: len(latents)]


LOOPS: dict[str, Loop] = {
    "bare": bare_loop,
    **{name: diffusers_loop(name) for name in SCHEDULERS},
    "fresh times": fresh_times_loop,
}


@torch.no_grad()
def waits(device: str, loop: Loop, unet: Any, latents: Tensor, hidden: Tensor, steps: int) -> int:
    """Of one trajectory, after one to warm up."""
    loop(unet, latents, hidden, steps)
    with counted(device) as count:
        loop(unet, latents, hidden, steps)
        return count()


def run(device: str, out: Path, *, steps: int, seed: int) -> Path:
    """Count all loops, plain and wrapped; returns the path of the JSON file."""
    demo = load_demo(device=device)
    latents, hidden = demo.noise(1, seed=seed), demo.encode_prompts(["a red square"])
    results = Results(out / "sync_count.json", environment(device, seed))
    for name, loop in LOOPS.items():
        plain = waits(device, loop, demo.unet, latents, hidden, steps)
        with ch.wrap(demo.unet, clock=2) as cw:
            wrapped = waits(device, loop, demo.unet, latents, hidden, steps)
            passes = cw.stats.trajectories[-1]
        results.add(
            "waits" if device.startswith("cuda") else "values read",
            loop=name,
            steps=steps,
            plain=plain,
            wrapped=wrapped,
            ours=wrapped - plain,
            adaptor_passes=passes.adaptor_passes,
        )
    return results.path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON file")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of a trajectory")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    options = parser.parse_args()
    print(run(options.device, options.out, steps=options.steps, seed=options.seed))


if __name__ == "__main__":
    main()
