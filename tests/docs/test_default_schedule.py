"""What docs/calibration.md says of `Schedule.spread` against benchmarks/results/default_schedule.json; in miniature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import default_schedule

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DATA = json.loads((RESULTS / "default_schedule.json").read_text(encoding="utf-8"))
GPU = json.loads((RESULTS / "default_schedule_gpu.json").read_text(encoding="utf-8"))


def test_the_page_shows_what_was_measured() -> None:
    page, tables = (
        (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("calibration", "calibration_tables")
    )
    assert default_schedule.markdown(DATA) in tables
    assert default_schedule.markdown(GPU) in page
    plain = [f"{row['Fréchet']:.1f}" for row in GPU["rows"] if row["rule"] == "plain"]
    assert "{}, {} and {} of plain sampling in 8, 20".format(*plain) in page


@pytest.mark.parametrize("kind", ["identity", "affine"])
@pytest.mark.parametrize(("data", "steps"), [(DATA, 8), (DATA, 20), (GPU, 8), (GPU, 20), (GPU, 50)])
def test_spread_is_nearer_at_the_same_cost(data: dict[str, Any], steps: int, kind: str) -> None:
    """By more than the standard errors of both; on the CPU so few captions say nothing at 50 steps."""
    rows = {row["rule"]: row for row in data["rows"] if row["steps"] == steps and row.get("kind") == kind}
    plain, spread = rows["every(2)"], rows["spread(2)"]
    assert spread["saved"] == plain["saved"]
    assert spread["error"] + spread["standard error"] + plain["standard error"] < plain["error"]


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
def test_in_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--steps", "4", "--clock", "2", "--kind", "identity", "--captions", "2", "--calibration", "2"]
    assert default_schedule.main([*words, "--device", "cpu", "--out", str(tmp_path)]) == 0
    file = tmp_path / "default_schedule.json"
    rules = [row["rule"] for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    assert rules == ["plain", "every(2)", "every(2, first_full=2, last_full=1)"]  # spread(2) is every(2) at 4 steps
    capsys.readouterr()
    assert default_schedule.main(["--table", str(file)]) == 0
    assert "40.0%" in capsys.readouterr().out
