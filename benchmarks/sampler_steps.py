"""How much is it worth that a sampler's steps are declared? Writes the table of docs/samplers.md.

    python -m benchmarks.sampler_steps     # measure, and write the table; two minutes on a CPU

The demo model samples with k-diffusion's own samplers: plain; at clock 2 with every evaluation counted as a step, from
the first; with `cw.sampler(name, sigmas)` and a schedule that goes by the sampler's steps; and with `cw.sampler` at
clock 2, which counts evaluations from the second. The noise is the same in all. The error is how far the sample is from
the plain one, as a share of its own norm.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import clockwork_hooks as ch
from clockwork_hooks.demo.model import DEMO_PROMPTS, GUIDANCE, load_demo
from clockwork_hooks.reports.tables import Table, table
from tests.test_samplers import k_sampling

STEPS, PICTURES = 12, 2
SAMPLERS = ("dpm_2", "dpmpp_sde", "dpmpp_2s_ancestral", "dpm_2_ancestral", "heun")
CLOCK, BY_STEPS = ch.Schedule.every(2), ch.Schedule.every(2, stop=STEPS)  # a clock that stops is no plain one
PAGE = Path(__file__).parents[1] / "docs" / "samplers.md"
MARKS = ("<!-- table: python -m benchmarks.sampler_steps -->", "<!-- end of steps -->")


class Denoiser:
    """The demo's UNet as k-diffusion wants it: (sample, sigma) → the clean sample."""

    def __init__(self, demo: Any, unet: Any) -> None:
        self.unet, self.text = unet, demo.encode_prompts(DEMO_PROMPTS[:PICTURES])
        alphas = demo.scheduler("ddim").alphas_cumprod.double()
        self.logs = ((1 - alphas) / alphas).sqrt().log()

    def time(self, sigma: Tensor) -> Tensor:
        """The timestep of this sigma, between the trained ones."""
        log, logs = sigma.double().log(), self.logs
        above = torch.searchsorted(logs, log).clamp(1, len(logs) - 1)
        share = (log - logs[above - 1]) / (logs[above] - logs[above - 1])
        return (above - 1 + share).float()

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        wide, time = sigma[:, None, None, None], self.time(sigma)
        scaled = x / (wide**2 + 1).sqrt()
        v = self.unet(torch.cat([scaled, scaled]), torch.cat([time, time]), self.text).sample
        plain, guided = (x / (wide**2 + 1) - half * wide / (wide**2 + 1).sqrt() for half in v.chunk(2))
        return plain + GUIDANCE * (guided - plain)


def sample(name: str, denoise: Denoiser, sigmas: Tensor) -> Tensor:
    """One run, the same noise every time."""
    random = torch.Generator().manual_seed(0)
    noise = lambda *_: torch.randn(PICTURES, 12, 32, 32, generator=random)  # noqa: E731
    options = {} if name in ("dpm_2", "heun") else {"noise_sampler": noise}
    run = getattr(k_sampling(), f"sample_{name}")
    return run(denoise, noise() * sigmas[0], sigmas, disable=True, **options)


@torch.no_grad()
def measure() -> Table:
    """A row for each sampler."""
    demo = load_demo()
    sigmas = k_sampling().get_sigmas_karras(STEPS, 0.02, 40.0)
    rows = []
    for name in SAMPLERS:
        plain, cells = sample(name, Denoiser(demo, demo.unet), sigmas), [name]
        for schedule, declared in ((CLOCK, False), (BY_STEPS, True), (CLOCK, True)):
            with (
                ch.wrap(demo.unet, schedule=schedule) as cw,
                cw.sampler(name, sigmas) if declared else cw.trajectory(),
            ):
                drawn = sample(name, Denoiser(demo, cw), sigmas)
            share = cw.stats.adaptor_passes / (cw.stats.adaptor_passes + cw.stats.full_passes)
            cells += [f"{share:.0%}", f"{float((drawn - plain).norm() / plain.norm()):.4f}"]
        rows.append(tuple(cells))
        print(rows[-1], flush=True)
    heads = (
        *("sampler", ">adaptor passes, undeclared", ">error"),
        *(">adaptor passes, by steps", ">error", ">adaptor passes, by name", ">error"),
    )
    return table(f"Demo model, {STEPS} steps, clock 2, identity adaptor, {PICTURES} prompts", heads, rows)


def main() -> None:
    """Measure, and write the table."""
    text = PAGE.read_text(encoding="utf-8")
    begin, end = (text.index(mark) for mark in MARKS)
    made = measure().to_markdown()
    with contextlib.suppress(BrokenPipeError):
        print(made)
    PAGE.write_text(text[:begin] + MARKS[0] + "\n" + made.strip() + "\n" + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
