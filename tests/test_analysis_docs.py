"""The tables of the analysis pages are those of the JSON, and the script that makes it runs."""

import json
from pathlib import Path

import pytest

from benchmarks import analysis_demo, analysis_tables

DOCS = Path(__file__).parents[1] / "docs"


def test_the_tables_are_those_of_the_results():
    made = analysis_tables.tables(json.loads(analysis_tables.RESULTS.read_text(encoding="utf-8")))
    assert set(made) == {"robustness", "drift", "plan", "edits"}
    for page, names in {"analysis.md": ("robustness", "drift", "plan"), "editing.md": ("edits",)}.items():
        text = (DOCS / page).read_text(encoding="utf-8")
        assert all(made[name] in text for name in names)
        assert analysis_tables.filled(text, made) == text


def test_pictures_are_small_and_there():
    for page in ("analysis.md", "editing.md"):
        for name in [part.split(")")[0] for part in (DOCS / page).read_text(encoding="utf-8").split("](")[1:]]:
            if name.endswith(".png"):
                assert 5_000 < (DOCS / name).stat().st_size < 200_000, name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_script_runs_in_miniature(tmp_path):
    out = tmp_path / "results.json"
    sizes = ["--steps", "2", "--prompts", "1", "--out", str(out), "--figures", str(tmp_path)]
    analysis_demo.main(["plan-50", "compare-50", *sizes])
    found = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["schedule"]: row["error"] for row in found["compare-50"]["rows"]}
    assert rows["at([2])"] == rows["every(2)"] == pytest.approx(found["plan-50"]["held_out"])  # there is one choice
    analysis_tables.draw(found, tmp_path)
    assert (tmp_path / "analysis-plan-50.png").stat().st_size > 5000
    assert "planned at no more MACs" in analysis_tables.tables(found)["plan"]
