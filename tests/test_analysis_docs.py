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


def test_a_planned_set_is_better_than_every_clock_at_no_more_macs():
    """At 20 and 50 steps, on held-out prompts and noise: what the page says, recomputed from the JSON."""
    data = json.loads(analysis_tables.RESULTS.read_text(encoding="utf-8"))
    for steps in (20, 50):
        rows = data[f"compare-{steps}"]["rows"]
        planned = [row for row in rows if row["kind"] == "planned"]
        clocks = [row for row in rows if row["kind"].startswith("clock")]
        assert len(clocks) == 2 + 3 + 4
        for clock in clocks:
            assert min(row["error"] for row in planned if row["saved"] >= clock["saved"] - 1e-9) < clock["error"], clock
        assert not set(data[f"plan-{steps}"]["prompts"]) & set(data[f"compare-{steps}"]["held out"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_script_runs_in_miniature(tmp_path):
    out = tmp_path / "results.json"
    sizes = ["--steps", "2", "--prompts", "1", "--out", str(out), "--figures", str(tmp_path)]
    analysis_demo.main(["plan-20", "compare-20", *sizes])
    found = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["schedule"]: row["error"] for row in found["compare-20"]["rows"]}
    assert rows["at([2])"] == rows["every(2)"] == pytest.approx(found["plan-20"]["held_out"])  # there is one choice
    analysis_tables.draw(found, tmp_path)
    assert (tmp_path / "analysis-plan-20.png").stat().st_size > 5000
    assert "planned at no more MACs" in analysis_tables.tables(found)["plan"]
