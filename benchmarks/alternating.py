"""What does `reuse="same condition"` cost and save where two prompts take turns? Writes the table of docs/timeline.md.

    python -m benchmarks.alternating     # measure, and write the table; a minute on a CPU

The demo model samples with DDIM, and every other step has the other prompt, as [a|b] of A1111 does. The error is how
far the sample is from the plain one, as a share of its own norm; one prompt alone at clock 2 stands beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import clockwork_hooks as ch
from clockwork_hooks.demo.model import DEMO_PROMPTS, GUIDANCE, load_demo
from clockwork_hooks.reports.tables import Table, table

STEPS, PICTURES = 20, 4
PAGE = Path(__file__).parents[1] / "docs" / "timeline.md"
MARKS = ("<!-- table: python -m benchmarks.alternating -->", "<!-- end of alternating -->")


def sample(demo: Any, unet: Any, texts: list[Tensor]) -> Tensor:
    """One run in which the texts take turns."""
    scheduler = demo.scheduler("ddim")
    scheduler.set_timesteps(STEPS)
    latents = demo.noise(PICTURES, seed=0)
    for k, t in enumerate(scheduler.timesteps):
        both = unet(torch.cat([latents, latents]), t, encoder_hidden_states=texts[k % len(texts)]).sample
        plain, guided = both.chunk(2)
        latents = scheduler.step(plain + GUIDANCE * (guided - plain), t, latents).prev_sample
    return latents


@torch.no_grad()
def measure() -> Table:
    """A row for each way to wrap."""
    demo, rows = load_demo(), []
    first, second = (demo.encode_prompts(DEMO_PROMPTS[k : k + PICTURES]) for k in (0, PICTURES))
    for what, texts, options in (
        ("one prompt, clock 2", [first], {}),
        ("[a|b], clock 2", [first, second], {}),
        ('[a|b], clock 2, reuse="same condition"', [first, second], {"reuse": "same condition"}),
    ):
        plain = sample(demo, demo.unet, texts)
        with ch.wrap(demo.unet, clock=2, **options) as cw:
            made = sample(demo, demo.unet, texts)
        passes = cw.stats.full_passes, cw.stats.adaptor_passes
        rows.append((what, *map(str, passes), f"{float((made - plain).norm() / plain.norm()):.4f}"))
        print(rows[-1], flush=True)
    heads = ("", ">full passes", ">adaptor passes", ">error")
    return table(f"Demo model, DDIM, {STEPS} steps, identity adaptor, {PICTURES} pictures", heads, rows)


def main() -> None:
    """Measure, and write the table."""
    text = PAGE.read_text(encoding="utf-8")
    begin, end = (text.index(mark) for mark in MARKS)
    PAGE.write_text(f"{text[:begin]}{MARKS[0]}\n{measure().to_markdown().strip()}\n{text[end:]}", encoding="utf-8")


if __name__ == "__main__":
    main()
