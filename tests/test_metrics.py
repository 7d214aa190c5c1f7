"""Metrics against hand-derived values and against torchmetrics."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from clockwork_hooks.errors import ArgumentError
from clockwork_hooks.metrics import (
    ClipScore,
    Frechet,
    Metric,
    Paired,
    Statistics,
    clip_score,
    fid,
    frechet_distance,
    psnr,
    relative_l2,
    statistics_of,
    statistics_of_features,
)


class Extractor(nn.Module):
    """Pictures to 6 features: mean and spread of each channel."""

    def forward(self, images: Tensor) -> Tensor:
        values = images.double().flatten(2) / (255 if images.dtype == torch.uint8 else 1)
        return torch.cat([values.mean(2), values.std(2)], 1)


def pictures(count: int, seed: int, low: float = 0.0) -> Tensor:
    noise = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return low + (1 - low) * noise * torch.linspace(0.2, 1, count)[:, None, None, None]


def test_paired_by_hand() -> None:
    plain = torch.full((2, 3, 16, 16), 0.5)
    images = torch.stack([plain[0] + 0.1, plain[1]])
    rows = Paired().observe(images, plain, None)
    assert rows is not None
    assert rows[:, 0].tolist() == pytest.approx([20.0, 100.0], abs=1e-3)  # 10·log10(1 / 0.1²); equal: 100 by rule
    assert rows[1, 1].item() == pytest.approx(1.0)
    assert rows[:, 2].tolist() == pytest.approx([0.2, 0.0], abs=1e-6)
    assert Paired().score(rows)["PSNR"] == pytest.approx(60.0, abs=1e-3)
    assert Paired().observe(plain, None, None) is None


def test_paired_needs_pairs() -> None:
    with pytest.raises(ArgumentError, match=r"plain: \(1, 3, 16, 16\)"):
        Paired().observe(torch.rand(2, 3, 16, 16), torch.rand(1, 3, 16, 16), None)


def test_frechet_distance_of_known_gaussians() -> None:
    a = Statistics(np.zeros(3), np.diag([1.0, 4.0, 0.0]))
    b = Statistics(np.array([3.0, 0.0, 0.0]), np.diag([4.0, 1.0, 0.0]))
    assert frechet_distance(a, b) == pytest.approx(9 + 1 + 1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_correlated_gaussians_agrees_with_the_general_root() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 5, 5))
    a, b = Statistics(np.zeros(5), x @ x.T), Statistics(np.zeros(5), y @ y.T)
    roots = np.sqrt(np.linalg.eigvals(a.covariance @ b.covariance).astype(complex)).real.sum()
    expected = np.trace(a.covariance) + np.trace(b.covariance) - 2 * roots
    assert frechet_distance(a, b) == pytest.approx(expected)


def test_statistics_need_two_pictures() -> None:
    with pytest.raises(ArgumentError, match="pictures: 1"):
        statistics_of(Extractor(), [torch.rand(1, 3, 4, 4)])
    with pytest.raises(ArgumentError, match="pictures: 0"):
        statistics_of(Extractor(), [])


def test_statistics_do_not_depend_on_the_batches() -> None:
    images = pictures(32, 0)
    whole, parts = statistics_of(Extractor(), [images]), statistics_of(Extractor(), images.split(5))
    np.testing.assert_allclose(whole.covariance, parts.covariance)
    assert whole.count == parts.count == 32


def test_fid_agrees_with_torchmetrics() -> None:
    real, generated = pictures(64, 0), pictures(64, 1, low=0.2)
    theirs = FrechetInceptionDistance(feature=Extractor(), input_img_size=(3, 16, 16)).set_dtype(torch.float64)
    for images, is_real in ((real, True), (generated, False)):
        theirs.update((images * 255).round().to(torch.uint8), real=is_real)
    ours = fid(real.split(16), feature=Extractor())
    rows = torch.cat([ours.observe(batch, None, None) for batch in generated.split(16)])
    assert ours.score(rows)["FID"] == pytest.approx(float(theirs.compute()), rel=1e-4)
    assert ours.better == {"FID": "lower"}


class Network(nn.Module):
    """In the place of torch-fidelity's Inception v3, made as torchmetrics makes it: with the path of its weights."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **_: object
    ) -> None:
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        self.linear = nn.Linear(3, 5)
        if feature_extractor_weights_path is not None:
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return self.linear(images.float().mean((2, 3)))


def test_fid_with_local_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", True)
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", Network)
    network, real = Network("inception-v3-compat", ["2048"]), pictures(32, 0)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    metric = fid(real.split(8), weights=tmp_path / "weights.pth")
    rows = metric.observe(real, None, None)
    torch.testing.assert_close(rows, network((real * 255).round().to(torch.uint8)))
    assert metric.score(rows.detach().double())["FID"] == pytest.approx(0, abs=1e-3)


def test_frechet_metric_is_zero_on_its_reference_and_grows() -> None:
    images = pictures(64, 0)
    metric = Frechet(Extractor(), statistics_of(Extractor(), [images]))
    scores = [metric.score(metric.observe(images + shift, None, None))["Fréchet"] for shift in (0.0, 0.1, 0.2)]
    assert scores[0] == pytest.approx(0, abs=1e-9)
    assert scores[1] == pytest.approx(3 * 0.01, rel=1e-3)  # three means shifted by 0.1
    assert scores[1] < scores[2]


def test_clip_score_with_local_weights(tmp_path: Path) -> None:
    """A tiny random CLIP in a folder; the logits of CLIP itself are the scaled cosines of all pairs."""
    folder = tiny_clip(tmp_path)
    metric, images = clip_score(folder), pictures(3, 0)
    prompts = ["red square", "blue ring", "red ring " * 40]
    rows = metric.observe(images, None, prompts)
    assert rows.shape == (3, 1)
    inputs = metric.processor(
        text=prompts, images=list((images * 255).round().to(torch.uint8)), return_tensors="pt",
        padding=True, truncation=True, max_length=24,
    )  # fmt: skip
    with torch.no_grad():
        logits = metric.model(**inputs).logits_per_image.diag() / metric.model.logit_scale.exp()
    torch.testing.assert_close(rows[:, 0], logits)
    assert metric.score(rows)["CLIP"] == pytest.approx(float(logits.mean()))


def test_clip_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="hf download"):
        clip_score(tmp_path / "absent")


@pytest.mark.parametrize(
    "metric", [Paired(), Frechet(Extractor(), statistics_of_features(torch.rand(4, 6))), ClipScore(None, None)]
)
def test_metrics_follow_the_protocol(metric: object) -> None:
    assert isinstance(metric, Metric)


def tiny_clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    words = ["!", "<|startoftext|>", "<|endoftext|>", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    words += list("abcdefghijklmnopqrstuvwxyz")
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = size | {"vocab_size": len(words), "max_position_embeddings": 24, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config=size | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("compare", [psnr, relative_l2])
@pytest.mark.parametrize("other", [torch.ones(1, 3, 4, 4), torch.ones(3, 4, 4), torch.ones(2, 3, 4, 4).byte(), 1.0])
def test_what_is_compared_is_of_one_shape(compare: Callable[..., Tensor], other: Any) -> None:
    """Shapes that broadcast gave numbers of other pictures."""
    with pytest.raises(ArgumentError, match="two floating tensors of the same shape"):
        compare(torch.rand(2, 3, 4, 4), other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_small_differences_are_no_zeros(dtype: torch.dtype) -> None:
    plain = torch.full((2, 3, 4, 4), 0.01, dtype=dtype)
    images = plain + torch.tensor(2.0**-13, dtype=dtype)
    far = (images.double() - plain.double()).mean()
    torch.testing.assert_close(psnr(images, plain).double(), -20 * far.log10().expand(2), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        relative_l2(images, plain).double(), (far / plain[0, 0, 0, 0]).expand(2).double(), rtol=1e-4, atol=0
    )
