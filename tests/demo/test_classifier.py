from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from clockwork_hooks.demo.captions import CaptionError, decode, parse, write_captions
from clockwork_hooks.demo.classifier import UNREADABLE, add_noise, attribute_accuracy, blur, half_denoised, score
from clockwork_hooks.demo.evaluate import Attributes
from clockwork_hooks.demo.model import DEMO_PROMPTS, DemoModel
from clockwork_hooks.demo.scenes import COLUMNS, Scenes, draw_split, render
from clockwork_hooks.errors import ArgumentError
from clockwork_hooks.metrics import frechet_distance, statistics_of


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_split(256, 4321, test=True)


@pytest.fixture(scope="module")
def images(scenes: Scenes) -> Tensor:
    return render(scenes)


def judge(model: DemoModel, images: Tensor, scenes: Scenes) -> tuple[float, float]:
    scores = score(model.classifier.read(images), scenes.attributes)
    return scores.total, scores.unreadable


def test_held_out_scenes_are_read(model: DemoModel, images: Tensor, scenes: Scenes) -> None:
    scores = score(model.classifier.read(images), scenes.attributes)
    assert scores.total >= 0.98
    assert min(scores.by_attribute.values()) >= 0.97


@pytest.mark.parametrize("mild", ["noise", "blur"])
def test_slight_damage_does_not_matter(model: DemoModel, images: Tensor, scenes: Scenes, mild: str) -> None:
    damaged = add_noise(images, 0.05, torch.Generator().manual_seed(0)) if mild == "noise" else blur(images, 0.8)
    assert judge(model, damaged, scenes)[0] >= 0.98


@pytest.mark.parametrize("strong", ["noise", "blur", "half-denoised", "half-denoised and blurred", "blend"])
def test_strong_damage_is_unreadable_not_guessed(model: DemoModel, images: Tensor, scenes: Scenes, strong: str) -> None:
    noise = torch.Generator().manual_seed(0)
    damaged = {
        "noise": lambda: add_noise(images, 0.5, noise),
        "blur": lambda: blur(images, 5.0),
        "half-denoised": lambda: half_denoised(images, 0.7, noise),
        "half-denoised and blurred": lambda: half_denoised(blur(images, 2.0), 0.6, noise),
        "blend": lambda: (images + images.roll(1, 0)) / 2,
    }[strong]()
    right, unreadable = judge(model, damaged, scenes)
    assert right <= 0.05
    assert unreadable >= 0.9


def test_without_its_objects_only_the_background_is_read(model: DemoModel, images: Tensor, scenes: Scenes) -> None:
    empty = images[:, :, :1, :1].expand_as(images).contiguous()
    read = model.classifier.read(empty)
    assert (read[:, 0] == scenes.attributes[:, 0]).mean() >= 0.98
    assert (read[:, 1:] == UNREADABLE).mean() >= 0.98


def test_the_wrong_prompt_scores_low(model: DemoModel, images: Tensor, scenes: Scenes) -> None:
    assert judge(model, images.roll(1, 0), scenes)[0] < 0.5


def test_score_counts_what_was_asked() -> None:
    wanted = np.array([[0, 0, -1, 1, 2, 0, 6, 8, 2]])  # a lone object, its place left open
    seen = np.array([[0, 0, 5, 1, 3, UNREADABLE, 6, 8, 2]])
    scores = score(seen, wanted)
    assert scores.asked == 5
    assert scores.total == pytest.approx(3 / 5)
    assert scores.unreadable == pytest.approx(1 / 5)
    assert scores.perfect == 0.0
    assert scores.by_attribute == {"background": 1.0, "count": 1.0, "shape_1": 1.0, "colour_1": 0.0, "size_1": 0.0}
    assert score(wanted, wanted).perfect == 1.0


def test_accuracy_needs_as_many_prompts_as_pictures(model: DemoModel, images: Tensor) -> None:
    with pytest.raises(ArgumentError, match="prompts: 16"):
        attribute_accuracy(model.classifier, images, DEMO_PROMPTS)
    with pytest.raises(CaptionError):
        attribute_accuracy(model.classifier, images[:1], ["red"])


def test_other_pictures_are_refused(model: DemoModel) -> None:
    with pytest.raises(ArgumentError, match=r"shape: \(1, 3, 32, 32\)"):
        model.classifier.read(torch.zeros(1, 3, 32, 32))


def test_read_of_nothing(model: DemoModel) -> None:
    assert model.classifier.read(torch.zeros(0, 3, 64, 64)).shape == (0, len(COLUMNS))


def test_frechet_distance_grows_with_damage(model: DemoModel, images: Tensor) -> None:
    read = model.classifier.features
    clean = statistics_of(read, [images])
    near = frechet_distance(clean, statistics_of(read, [blur(images, 0.8)]))
    far = frechet_distance(clean, statistics_of(read, [blur(images, 2.0)]))
    assert 0 < near < far


def test_attributes_as_a_metric(model: DemoModel, images: Tensor, scenes: Scenes) -> None:
    """In percent, over batches, from captions as from what was parsed of them; the wrong prompt scores low."""
    prompts = decode(write_captions(scenes, 0))
    metric = Attributes(model.classifier)
    halves = (slice(0, 128), slice(128, None))
    rows = torch.cat([metric.observe(images[half], None, prompts[half]) for half in halves]).double()
    accuracy = attribute_accuracy(model.classifier, images, prompts)
    assert metric.score(rows) == {
        "attributes right": pytest.approx(100 * accuracy.total),
        "pictures all right": pytest.approx(100 * accuracy.perfect),
    }
    torch.testing.assert_close(metric.observe(images, None, parse(prompts)).double(), rows)
    assert metric.score(metric.observe(images.roll(1, 0), None, prompts).double())["attributes right"] < 50
