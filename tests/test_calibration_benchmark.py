"""`benchmarks/calibration.py` in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import calibration
from benchmarks.calibration import GROUPS, every


def test_schedules_and_names() -> None:
    assert every(8, 2) == (2, 4, 6, 8)
    assert every(8, 3, 2, 1) == (3, 4, 6, 7)
    assert len(every(20, 2, 2, 1)) == 9
    for group in GROUPS:
        labels = [row.label for row in group.rows]
        assert len(set(labels)) == len(labels)
        assert all(1 < step <= (row.taken or group.sampler.steps) for row in group.rows for step in row.at)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
def test_rows_are_measured_once_and_written_as_they_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    match = r"main-4/(plain|affine, widest, 3|identity, widest, 3)$"
    run = ["run", "--captions", "2", "--seeds", "1", "--calibration", "2", "--match", match]
    assert calibration.main([*run, "--out", str(tmp_path)]) == 0
    assert "all is there" in capsys.readouterr().out
    file = tmp_path / "calibration.json"
    data = json.loads(file.read_text())
    plain, affine, identity = (
        data["rows"][f"main-4/{label}"] for label in ("plain", "affine, widest, 3", "identity, widest, 3")
    )
    assert plain["macs_per_image"] > affine["macs_per_image"] == identity["macs_per_image"]
    assert affine["calibration"]["kind"] == "affine"
    assert [step["step"] for step in affine["calibration"]["steps"]] == [3]
    for part in ("choose", "judge"):
        assert affine["scores"][part]["PSNR"][0] > identity["scores"][part]["PSNR"][0]
        assert plain["scores"][part]["attributes right"]
    assert data["runs"][0]["captions"] == 2
    del data["rows"]["main-4/plain"]
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(data))
    assert calibration.main([*run, "--out", str(tmp_path / "more"), "--resume", str(earlier)]) == 0
    assert "1 of 3 rows to do" in capsys.readouterr().out
    again = json.loads((tmp_path / "more" / "calibration.json").read_text())
    assert again["rows"]["main-4/plain"]["scores"] == plain["scores"]
    assert again["rows"]["main-4/affine, widest, 3"] == affine
    assert calibration.main(["table", str(file)]) == 0
    assert "| affine, widest, 3 " in capsys.readouterr().out
