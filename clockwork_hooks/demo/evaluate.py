"""Measuring the demo model: attributes, Fréchet distance, guidance scales, judged on held-out captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clockwork_hooks.demo.captions import decode, parse, write_captions
from clockwork_hooks.demo.classifier import AttributeClassifier, attribute_accuracy, score
from clockwork_hooks.demo.model import DemoModel
from clockwork_hooks.demo.scenes import draw_split, render_bytes
from clockwork_hooks.metrics import Better, Statistics, frechet_distance, statistics_of

_CHUNK = 2048


@dataclass(frozen=True, slots=True)
class Attributes:
    """A metric of the task: the share of the attributes asked for that the classifier finds in the pictures, in %.

    The generator was never trained against this classifier. Conditions are the captions, or, to read them only
    once, what `captions.parse` makes of them.

    Args:
        classifier: reads pictures.
    """

    classifier: AttributeClassifier

    @property
    def better(self) -> Mapping[str, Better]:
        """Higher is better."""
        return {"attributes right": "higher", "pictures all right": "higher"}

    def observe(self, images: Tensor, plain: Tensor | None, conditions: Any) -> Tensor:
        """What is read and what was asked for (B, 18)."""
        asked = conditions if isinstance(conditions, np.ndarray) else parse(conditions)
        return torch.from_numpy(np.concatenate([self.classifier.read(images), asked], 1))

    def score(self, rows: Tensor) -> dict[str, float]:
        """The shares over all pictures, in percent."""
        seen, asked = rows.numpy().astype(np.int64).reshape(len(rows), 2, -1).swapaxes(0, 1)
        accuracy = score(seen, asked)
        return {"attributes right": 100 * accuracy.total, "pictures all right": 100 * accuracy.perfect}


def held_out_prompts(count: int, seed: int = 7) -> list[str]:
    """Captions, with nothing left out, of attribute combinations that training never saw."""
    return decode(write_captions(draw_split(count, seed, test=True), seed))


def reference_statistics(model: DemoModel, count: int) -> Statistics:
    """Feature statistics of `count` rendered scenes of the held-out combinations."""
    images = render_bytes(draw_split(count, 8, test=True), model.device)
    return statistics_of(model.classifier.features, (chunk.float() / 255 for chunk in images.split(_CHUNK)))


def sample_many(model: DemoModel, prompts: Sequence[str], *, batch: int = 1024, **options: Any) -> Tensor:
    """Sample any number of prompts in batches, each with its number as its seed.

    Args:
        model: to sample from.
        prompts: N captions.
        batch: prompts at a time.
        options: of `DemoModel.sample`.

    Returns:
        (N, 3, 64, 64) pictures in [0, 1].
    """
    starts = range(0, len(prompts), batch)
    return torch.cat(
        [model.sample(prompts[at : at + batch], seed=number, **options) for number, at in enumerate(starts)]
    )


def evaluate(
    model: DemoModel, *, steps: Sequence[int], count: int, guidance: float, batch: int = 1024
) -> dict[str, Any]:
    """Attributes and Fréchet distance at several step counts.

    Args:
        model: to measure.
        steps: step counts.
        count: held-out captions, and rendered scenes of the reference.
        guidance: classifier-free guidance scale.
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
        | {"frechet": frechet_distance(reference, statistics_of(model.classifier.features, rendered.split(_CHUNK)))}
    }
    for number in steps:
        images = sample_many(model, prompts, steps=number, guidance=guidance, batch=batch)
        accuracy = asdict(attribute_accuracy(model.classifier, images, prompts))
        distance = frechet_distance(reference, statistics_of(model.classifier.features, images.split(_CHUNK)))
        result[f"steps_{number}"] = accuracy | {"frechet": distance}
    return result


def sweep_guidance(
    model: DemoModel, scales: Sequence[float], *, steps: Sequence[int] = (8,), batch: int = 1024
) -> list[dict[str, float]]:
    """Accuracy and Fréchet distance at several guidance scales, on 2,048 held-out captions."""
    rows = []
    for scale in scales:
        scores = evaluate(model, steps=steps, count=2048, guidance=scale, batch=batch)
        for number in steps:
            told = {name: scores[f"steps_{number}"][name] for name in ("total", "perfect", "frechet")}
            rows.append({"guidance": scale, "steps": number, **told})
    return rows
