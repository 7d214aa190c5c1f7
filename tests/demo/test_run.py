"""`demo`: plain, and three ways to skip the widest region in as many steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from clockwork_hooks._numbers import duration
from clockwork_hooks.adaptors import LearnedAdaptor
from clockwork_hooks.cli import main
from clockwork_hooks.demo import run
from clockwork_hooks.demo.model import DEMO_PROMPTS
from tests.schemas import follows_its_schema

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")


def drawn(out: Path, **options: int) -> run.DemoResult:
    return run.demo(DEMO_PROMPTS[:2], out=out, console=Console(quiet=True), **options)


def test_four_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At equal MACs: better places are nearer to plain, and the adaptor, calibrated just now, is nearest."""
    monkeypatch.setattr(run, "CAPTIONS", 4)
    monkeypatch.setattr(run, "ROUNDS", 1)
    result = drawn(tmp_path / "out", steps=8)
    plain, deepcache, identity, calibrated = result.rows
    assert [row.name for row in result.rows] == ["plain", "DeepCache's setting", "identity", "calibrated"]
    assert (
        (identity.full_passes, identity.adaptor_passes) == (deepcache.full_passes, deepcache.adaptor_passes) == (4, 4)
    )
    assert deepcache.macs_per_image == identity.macs_per_image <= calibrated.macs_per_image < plain.macs_per_image
    assert calibrated.psnr is not None
    assert identity.psnr is not None
    assert calibrated.psnr > identity.psnr + 3
    calibration = result.settings["calibration"]
    assert calibration["captions"] == 4
    assert calibration["seconds"] > 0
    assert f"{duration(calibration['seconds'])}. No training." in result.table().to_markdown()
    assert result.settings["spread"] == "F F A A F A A F"
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["rows"][3]["name"] == "calibrated"
    follows_its_schema(report)
    assert "data:image/png;base64," in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.width > 4 * run.SIDE
        assert grid.height > 2 * run.SIDE


@pytest.mark.parametrize(("plain", "rounds"), [([2, 2], 2), ([9, 2, 2], 3), ([9, 5, 3, 2], 4)])
def test_a_time_that_other_work_disturbed_is_taken_again(
    plain: list[float], rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them have to agree, or the report says that they do not."""
    times = iter(plain)

    def measured(sample: Any, device: Any) -> tuple[Any, float]:
        return sample(), 1.0 if "forward" in vars(model.unet) else next(times)

    model = run.load_demo()
    monkeypatch.setattr(run, "load_demo", lambda: model)
    monkeypatch.setattr(run, "measured", measured)
    result = drawn(tmp_path / "out", steps=2)
    assert result.settings["rounds"] == rounds
    assert [row.speed_up for row in result.rows] == [1.0, 2.0, 2.0, 2.0]
    assert ("disturbed" in result.table().to_markdown()) == (plain[-2] != plain[-1])


def test_where_no_step_is_the_adaptors_nothing_is_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ROUNDS", 1)
    result = drawn(tmp_path / "out", steps=1)
    assert [row.name for row in result.rows] == ["plain", "DeepCache's setting", "identity"]
    assert result.settings["calibration"] is None
    assert "Calibrated just now" not in result.table().to_markdown()


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


def test_what_ships_serves_the_demos_steps() -> None:
    """Once there is a trained adaptor in the package, it serves the demo's own steps and clock."""
    if not (run.ADAPTOR / "config.json").exists():
        pytest.skip("no trained adaptor yet")
    facts = LearnedAdaptor.from_pretrained(run.ADAPTOR).facts
    assert (facts["steps"], facts["schedule"]) == (8, "every(2)")
    assert sum(file.stat().st_size for file in run.ADAPTOR.iterdir()) <= 2 * 2**20
