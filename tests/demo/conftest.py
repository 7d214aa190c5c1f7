from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from clockwork_hooks.demo.model import DEMO_PROMPTS, DemoModel, load_demo, to_images


@dataclass(frozen=True)
class Run:
    """The demo prompts at 8 steps: the pictures, what the sampler had after each step, and what the callback saw."""

    images: Tensor
    halfway: Tensor
    calls: list[tuple[int, int]]


@pytest.fixture(scope="session")
def model() -> DemoModel:
    return load_demo()


@pytest.fixture(scope="session")
def run(model: DemoModel) -> Run:
    seen: list[Tensor] = []
    calls: list[tuple[int, int]] = []

    def watch(number: int, timestep: int, latents: Tensor) -> None:
        calls.append((number, timestep))
        seen.append(latents.clone())

    images = model.sample(DEMO_PROMPTS, steps=8, seed=0, callback=watch)
    assert torch.equal(to_images(seen[-1]), images)
    return Run(images, to_images(seen[3]), calls)
