"""`benchmarks/coco_fid.py` on a made-up folder of captioned pictures, with a tiny random Stable Diffusion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn

import clockwork_hooks as ch
from benchmarks import coco_fid
from tests.pipelines import parts
from tests.test_metrics import tiny_clip

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
CAPTIONS = ("a red ring", "a blue dog", "two cats", "a small house")


class Extractor(nn.Module):
    """uint8 pictures to the means of their channels and quarters."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """COCO's layout: pictures of several shapes, captions in disorder and several a picture."""
    (tmp_path / "val").mkdir()
    images, notes = [], []
    for k, caption in enumerate(CAPTIONS):
        pixels = np.random.default_rng(k).integers(0, 255, (40 + 8 * k, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "val" / f"{k:03}.png")
        images.insert(0, {"id": k, "file_name": f"{k:03}.png"})
        notes += [{"image_id": k, "caption": f" {caption}\n"}, {"image_id": k, "caption": "another one"}]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": notes}))
    return tmp_path


def pipeline() -> Any:
    return StableDiffusionPipeline(
        vae=parts.vae(), text_encoder=parts.text_encoder(), tokenizer=parts.tokenizer(), unet=parts.unet(),
        scheduler=parts.scheduler(steps_offset=1, clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def test_one_caption_a_picture_in_order(data: Path) -> None:
    coco = coco_fid.Coco.read(data / "captions.json", data / "val", 3)
    assert coco.captions == CAPTIONS[:3]
    assert [file.name for file in coco.files] == ["000.png", "001.png", "002.png"]
    batches = list(coco.pictures(16, 2))
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 16, 16), (1, 3, 16, 16)]


def test_a_tuned_row_is_tuned_on_captions_that_are_not_judged(data: Path) -> None:
    pipe = pipeline()
    coco, captions = coco_fid.Coco.read(data / "captions.json", data / "val", 4).split(2)
    assert (coco.captions, captions) == (CAPTIONS[:2], CAPTIONS[2:])
    with pytest.raises(ch.ArgumentError, match="not judged"):
        coco.split(1)
    sampler = {"steps": 4, "size": 32}
    variant = coco_fid.tuned(pipe, captions, 0.1, **sampler)
    assert isinstance(variant["adaptor"], ch.CalibratedAdaptor)
    assert "forward" not in vars(pipe.unet)
    report = coco_fid.coco_fid(pipe, coco, {"tuned": variant}, feature=Extractor(), batch=2, **sampler)
    assert report["tuned"].macs_per_image <= 0.9 * report["plain"].macs_per_image
    assert report["tuned"].adaptor_passes == len(variant["schedule"].adaptor_steps(4))


def test_plain_and_clockwork(data: Path) -> None:
    """FID by hand for plain: our extractor on the pipeline's own pictures."""
    pipe, coco = pipeline(), coco_fid.Coco.read(data / "captions.json", data / "val", 4)
    (data / "clip").mkdir()
    report = coco_fid.coco_fid(
        pipe,
        coco,
        {"clock 2": {"clock": 2}},
        feature=Extractor(),
        clip=tiny_clip(data / "clip"),
        steps=4,
        size=32,
        batch=2,
    )
    assert [row.name for row in report.rows] == ["plain", "clock 2"]
    assert set(report["plain"].scores) == {"FID", "CLIP"}
    assert set(report["clock 2"].scores) == {"FID", "CLIP", "PSNR", "SSIM", "relative L2"}
    assert (report["clock 2"].full_passes, report["clock 2"].adaptor_passes) == (4, 4)
    assert report["clock 2"].macs_per_image < report["plain"].macs_per_image
    pictures = [
        pipe(list(coco.captions[at : at + 2]), num_inference_steps=4, height=32, width=32, output_type="pt",
             generator=torch.Generator().manual_seed(at // 2)).images
        for at in (0, 2)
    ]  # fmt: skip
    read = Extractor()
    from clockwork_hooks.metrics import frechet_distance, statistics_of

    def statistics(batches: Any) -> Any:
        return statistics_of(lambda x: read((x * 255).round()), batches)

    expected = frechet_distance(statistics(coco.pictures(32, 4)), statistics(pictures))
    assert report["plain"].scores["FID"].mean == pytest.approx(expected, rel=1e-4)


def test_the_command(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From a saved pipeline to the JSON; Inception's place is taken by our extractor."""
    pipeline().save_pretrained(data / "sd")
    fid = coco_fid.fid
    monkeypatch.setattr(coco_fid, "fid", lambda real, **options: fid(real, feature=Extractor()))
    arguments = [str(data / "sd"), "--captions", str(data / "captions.json"), "--images", str(data / "val")]
    arguments += ["--steps", "2", "--size", "32", "--batch", "2", "--device", "cpu", "--out", str(data / "coco.json")]
    assert coco_fid.main(arguments) == 0
    assert "clock 2, identity" in capsys.readouterr().out
    saved = json.loads((data / "coco.json").read_text())
    assert saved["captions"] == 4
    assert saved["command"].startswith("python -m benchmarks.coco_fid")
    assert saved["rows"][1]["scores"]["FID"]["values"]


@pytest.mark.parametrize("broken", ["captions", "images", "model", "form"])
def test_what_is_missing_is_told(data: Path, broken: str, capsys: pytest.CaptureFixture[str]) -> None:
    if broken == "form":
        (data / "captions.json").write_text("[]")
    if broken == "images":
        (data / "val" / "001.png").unlink()
    captions = data / ("absent.json" if broken == "captions" else "captions.json")
    arguments = [str(data / "absent"), "--captions", str(captions), "--images", str(data / "val")]
    assert coco_fid.main(arguments) == 2
    said = capsys.readouterr().err
    expected = {"captions": "absent.json", "form": "COCO's own JSON", "images": "001.png", "model": "hf download"}
    assert expected[broken] in said
    assert "What to do" in said


def test_docs_say_that_it_is_unverified() -> None:
    assert "unverified by us" in str(coco_fid.__doc__)
    assert ch.evaluate.__doc__
