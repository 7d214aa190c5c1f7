"""`demo`: plain and identity always, the trained adaptor where it is there and meant for these steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

import clockwork_hooks as ch
from clockwork_hooks.cli import main
from clockwork_hooks.demo import run
from clockwork_hooks.demo.model import DEMO_PROMPTS, LATENT_SHAPE, DemoModel
from tests.schemas import follows_its_schema

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")


@pytest.fixture
def adaptor(model: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh adaptor in the place of the shipped one: it does what the identity does."""
    hidden = model.encode_prompts(["", ""], guided=False)
    region = ch.find_region(model.unet, torch.zeros(2, *LATENT_SHAPE), torch.tensor(1), encoder_hidden_states=hidden)
    made = ch.ScaledResNetAdaptor.for_region(region, width=16)
    made.facts = {"steps": 4, "schedule": "every(2)"}
    made.half().save_pretrained(tmp_path / "adaptor")
    monkeypatch.setattr(run, "ADAPTOR", tmp_path / "adaptor")
    return tmp_path / "adaptor"


def drawn(out: Path, **options: int) -> run.DemoResult:
    return run.demo(DEMO_PROMPTS[:2], out=out, console=Console(quiet=True), **options)


def test_three_side_by_side(adaptor: Path, tmp_path: Path) -> None:
    found = drawn(tmp_path / "out", steps=4)
    plain, identity, trained = found.rows
    assert [row.name for row in found.rows] == ["plain", "identity", "trained"]
    assert (trained.full_passes, trained.adaptor_passes) == (identity.full_passes, identity.adaptor_passes) == (2, 2)
    assert trained.psnr == identity.psnr
    assert identity.macs_per_image < trained.macs_per_image < plain.macs_per_image
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rows"][2]["name"] == "trained"
    follows_its_schema(json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")))
    assert "data:image/png;base64," in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.width > 2 * 3 * 144


def test_an_adaptor_for_other_steps_is_not_shown(adaptor: Path, tmp_path: Path) -> None:
    found = drawn(tmp_path / "out", steps=2)
    assert [row.name for row in found.rows] == ["plain", "identity"]
    assert "trained for 4 steps, every(2)" in found.table().to_markdown()


def test_a_list_of_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []
    (tmp_path / "scenes.txt").write_text("a red ring\n\n a small blue star \n")
    words = ["demo", "--prompt", "a pink circle", "--prompts", str(tmp_path / "scenes.txt")]
    monkeypatch.setattr(run, "demo", lambda texts, **options: asked.append(texts) or 1 / 0)
    assert main(words) == 2
    assert asked == [["a pink circle", "a red ring", "a small blue star"]]
    (tmp_path / "scenes.txt").write_text("\n")
    assert main(words) == 2
    assert "prompts: 0" in capsys.readouterr().err


def test_without_an_adaptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ADAPTOR", tmp_path / "absent")
    found = drawn(tmp_path / "out", steps=2)
    assert [row.name for row in found.rows] == ["plain", "identity"]
    assert "No trained adaptor" in found.table().to_markdown()


def test_what_ships_is_what_the_demo_shows_by_default() -> None:
    """Once there is a trained adaptor in the package, it serves the demo's own steps and clock."""
    if not (run.ADAPTOR / "config.json").exists():
        pytest.skip("no trained adaptor yet")
    adaptors, untrained = run._adaptors(8, 2)
    assert list(adaptors) == ["identity", "trained"]
    assert untrained == ""
    assert sum(file.stat().st_size for file in run.ADAPTOR.iterdir()) <= 2 * 2**20
