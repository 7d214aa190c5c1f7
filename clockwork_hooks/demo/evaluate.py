"""Measuring the demo model: attributes, Fréchet distance, guidance scales, judged on held-out captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from clockwork_hooks.demo.captions import decode, write_captions
from clockwork_hooks.demo.classifier import attribute_accuracy
from clockwork_hooks.demo.frechet import Statistics, frechet_distance, statistics_of
from clockwork_hooks.demo.model import DemoModel
from clockwork_hooks.demo.pool import draw_split, render_bytes

__all__ = ["evaluate", "held_out_prompts", "reference_statistics", "sample_many", "sweep_guidance"]


def held_out_prompts(count: int, seed: int = 7) -> list[str]:
    """Captions, with nothing left out, of attribute combinations that training never saw."""
    return decode(write_captions(draw_split(count, seed, test=True), seed))


def reference_statistics(model: DemoModel, count: int, seed: int = 8) -> Statistics:
    """Feature statistics of `count` rendered scenes of the held-out combinations."""
    images = render_bytes(draw_split(count, seed, test=True), model.device)
    chunks = [chunk.float() / 255 for chunk in images.split(4096)]
    return statistics_of(model.classifier, torch.cat(chunks))


def sample_many(
    model: DemoModel, prompts: Sequence[str], *, batch: int = 1024, seed: int = 0, **options: Any
) -> Tensor:
    """Sample any number of prompts in batches, each with its own seed.

    Args:
        model: to sample from.
        prompts: N captions.
        batch: prompts at a time.
        seed: of the first batch, counted up from there.
        options: of `DemoModel.sample`.

    Returns:
        (N, 3, 64, 64) pictures in [0, 1].
    """
    starts = range(0, len(prompts), batch)
    return torch.cat(
        [model.sample(prompts[at : at + batch], seed=seed + number, **options) for number, at in enumerate(starts)]
    )


def evaluate(
    model: DemoModel, *, steps: Sequence[int], count: int, guidance: float, scheduler: str = "dpm++", batch: int = 1024
) -> dict[str, Any]:
    """Attributes and Fréchet distance at several step counts.

    Args:
        model: to measure.
        steps: step counts.
        count: held-out captions, and rendered scenes of the reference.
        guidance: classifier-free guidance scale.
        scheduler: a name in `model.SCHEDULERS`.
        batch: prompts at a time.

    Returns:
        For each step count the accuracy and the Fréchet distance; also the distance of rendered scenes to themselves
        (the floor that sampling noise leaves), and the accuracy of rendered scenes (the ceiling of the judge).
    """
    prompts = held_out_prompts(count)
    reference = reference_statistics(model, count)
    rendered = render_bytes(draw_split(count, 7, test=True), model.device).float() / 255
    result: dict[str, Any] = {
        "rendered": asdict(attribute_accuracy(model.classifier, rendered, prompts))
        | {"frechet": frechet_distance(reference, statistics_of(model.classifier, rendered))}
    }
    for number in steps:
        images = sample_many(model, prompts, steps=number, guidance=guidance, scheduler=scheduler, batch=batch)
        accuracy = asdict(attribute_accuracy(model.classifier, images, prompts))
        distance = frechet_distance(reference, statistics_of(model.classifier, images))
        result[f"steps_{number}"] = accuracy | {"frechet": distance}
    return result


def sweep_guidance(
    model: DemoModel, scales: Sequence[float], *, steps: Sequence[int] = (8,), count: int = 2048, batch: int = 1024
) -> list[dict[str, float]]:
    """Accuracy and Fréchet distance at several guidance scales, on `count` held-out captions."""
    rows = []
    for scale in scales:
        found = evaluate(model, steps=steps, count=count, guidance=scale, batch=batch)
        for number in steps:
            at = found[f"steps_{number}"]
            rows.append(
                {
                    "guidance": scale,
                    "steps": number,
                    "total": at["total"],
                    "perfect": at["perfect"],
                    "frechet": at["frechet"],
                }
            )
    return rows
