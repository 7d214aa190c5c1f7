"""Solved adaptors of two regions, one inside the other, as docs/calibration.md says to calibrate them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import clockwork_hooks as ch
from clockwork_hooks.demo.model import DEMO_PROMPTS, GUIDANCE, DemoModel


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")  # diffusers'
def test_an_inner_adaptor_is_calibrated_with_the_full_steps_of_the_outer_one(model: DemoModel) -> None:
    def sampler(steps: int) -> Any:
        def generate(prompts: Sequence[str], seed: int) -> Tensor:
            return model.sample(prompts, steps=steps, seed=seed)

        return generate

    known, held_out = DEMO_PROMPTS[:8], DEMO_PROMPTS[8:12]
    calls: list[Any] = []
    handle = model.unet.register_forward_pre_hook(lambda *given: calls.append(given[1:]), with_kwargs=True)
    sampler(8)(held_out, 0)
    handle.remove()
    args, kwargs = calls[0]
    outer, inner = ch.find_regions(model.unet, *args, **kwargs)[1:3]

    def solved(region: ch.Region, steps: int, clock: int) -> Any:
        options: dict[str, Any] = {"guidance": GUIDANCE, "log_snr": model.scheduler(), "kind": "exit+entry"}
        return ch.calibrate(model.unet, sampler(steps), [known], clock=clock, region=region, **options)

    plain = sampler(8)(held_out, 5)

    def error(adaptors: Any) -> float:
        with ch.wrap(model.unet, adaptors, clocks={outer: 2, inner: 4}):
            sampler(8)(held_out, 4)  # what is recorded is full
            return float((sampler(8)(held_out, 5) - plain).norm() / plain.norm())

    coarse = solved(outer, 8, 2)
    both = error({outer: coarse, inner: solved(inner, 4, 2)})
    assert both < min(error(None), error({outer: coarse}))
    assert both < error({outer: coarse, inner: solved(inner, 8, 4)})
