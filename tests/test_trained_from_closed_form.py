"""`benchmarks/trained_from_closed_form.py` in miniature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import trained_from_closed_form as benchmark
from benchmarks.calibration_results import PAGE, between, load
from benchmarks.trained_from_closed_form import BEGIN, END, GROUPS, RESULT, page, trained_row, verdict


def test_settings_and_names() -> None:
    first = GROUPS[0].rows[0]
    assert (first.label, trained_row(first).label) == ("exit+entry+before, widest, 3 4 6 7", "trained, widest, 3 4 6 7")
    assert trained_row(first).at == first.at == (3, 4, 6, 7)
    assert GROUPS[1].rows[0].at[:4] == (3, 4, 6, 7)
    assert GROUPS[1].rows[0].at[-1] == 19


def _measured(gaps: dict[str, float]) -> dict[str, Any]:
    """Rows as `run` writes them: the trained ones are so much farther from rendered scenes than the calibrated ones."""
    rows: dict[str, Any] = {}
    training = {"updates": 9, "seconds": 70.0, "width": 16, "parameters": 90_000, "mode": "unrolled",
                "loss": "guided-output", "batch": 128, "lr": 1e-3}  # fmt: skip

    def row(distance: float, macs: float, **more: Any) -> dict[str, Any]:
        scores = {"Fréchet": [distance, distance + 0.2, distance - 0.1], "PSNR": [34.0] * 3}
        return {"macs_per_image": macs, "scores": {"judge": {**scores, "attributes right": [99.0] * 3}}, **more}

    for group in GROUPS:
        rows[f"{group.name}/plain"] = row(27, 8e9)
        for one in group.rows:
            key = f"{group.name}/{trained_row(one).label}"
            rows[f"{group.name}/{one.label}"] = row(30, 4e9)
            rows[key] = row(30 + gaps.get(key, 0.0), 4.1e9, training=training)
    run = {"calibration": 512, "captions": 5120, "seeds": 3, "seed": 0, "device": "a GPU", "versions": {"torch": "2"}}
    return {"runs": [run], "rows": rows}


def test_verdict_turns_with_the_numbers() -> None:
    key = "main-8/trained, widest, 3 4 6 7"
    assert "not worth it there: main-8, widest, 3 4 6 7; " in verdict(_measured({}))
    assert "beats the closed form at the same steps: main-8, widest, 3 4 6 7." in verdict(_measured({key: -3.0}))
    assert "makes it worse: main-8, widest, 3 4 6 7." in verdict(_measured({key: 3.0}))
    assert "| 50.0%, 48.8% | " in page(_measured({}))


def test_page_says_what_was_measured() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert between(text, BEGIN, END, page(load(RESULT) if RESULT.exists() else None)) == text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
def test_calibrated_trained_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["run", "--out", str(tmp_path), "--captions", "2", "--seeds", "1", "--calibration", "2", "--device", "cpu"]
    run += ["--train-batch", "2", "--train-captions", "8", "--trajectories", "2", "--match", "main-8.*3 5 7"]
    assert benchmark.main(run) == 0
    assert "all is there" in capsys.readouterr().out
    rows = json.loads((tmp_path / "trained_from_closed_form.json").read_text())["rows"]
    plain, closed, trained = (
        rows[f"main-8/{label}"] for label in ("plain", "exit+entry+before, widest, 3 5 7", "trained, widest, 3 5 7")
    )
    assert closed["macs_per_image"] < trained["macs_per_image"] < plain["macs_per_image"]
    assert trained["training"]["updates"] == 6  # three adaptor steps in each of two trajectories
    assert trained["scores"]["judge"]["PSNR"] != closed["scores"]["judge"]["PSNR"]
    assert benchmark.main(run) == 0
    assert "0 of 1 settings to do" in capsys.readouterr().out
    assert benchmark.main(["table", str(tmp_path / "trained_from_closed_form.json")]) == 0
    assert "| main-8, widest, 3 5 7 " in capsys.readouterr().out
