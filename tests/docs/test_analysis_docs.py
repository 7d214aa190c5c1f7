"""The tables of the analysis pages are those of the JSON, and the script that makes it runs."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import analysis_demo, analysis_tables, edits_demo, edits_tables
from clockwork_hooks.demo.captions import parse
from clockwork_hooks.demo.edits import draw_edits
from clockwork_hooks.demo.scenes import COLUMNS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(("module", "page"), [(analysis_tables, "analysis.md"), (edits_tables, "editing.md")])
def test_the_tables_are_those_of_the_results(module, page):
    tables = module.tables(json.loads(module.RESULTS.read_text(encoding="utf-8")))
    text = (DOCS / page).read_text(encoding="utf-8")
    assert set(tables) == set(re.findall(r"<!-- (?!end of )(.+) -->", text))
    assert all(table in text for table in tables.values())
    assert analysis_tables.filled(text, tables) == text


def test_pictures_are_small_and_there():
    for page in ("analysis.md", "editing.md"):
        for name in [part.split(")")[0] for part in (DOCS / page).read_text(encoding="utf-8").split("](")[1:]]:
            if name.endswith(".png"):
                assert 5_000 < (DOCS / name).stat().st_size < 200_000, name


@pytest.mark.parametrize("steps", [20, 50])
def test_a_clock_is_set_against_planned_sets_that_save_no_less(steps):
    """Planned sets without an error are ahead of those clocks only that save no more than they do."""
    part = f"compare-{steps}"
    data = {
        name: json.loads(analysis_tables.RESULTS.read_text(encoding="utf-8"))[name] for name in (f"plan-{steps}", part)
    }
    clocks = [row["saved"] for row in data[part]["rows"] if row["kind"].startswith("clock")]
    for most in (0.0, sorted(clocks)[4], 1.0):
        for row in data[part]["rows"]:
            if row["kind"] == "planned":
                row |= {"saved": most, "error": 0.0}
        ahead = sum(saved <= most for saved in clocks)
        assert f"below that of {ahead} of {len(clocks)} uniform clocks" in analysis_tables.tables(data)["plan"]
    assert not set(data[f"plan-{steps}"]["prompts"]) & set(data[part]["held out"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_script_runs_in_miniature(tmp_path):
    out = tmp_path / "results.json"
    sizes = ["--steps", "2", "--prompts", "1", "--out", str(out), "--figures", str(tmp_path)]
    analysis_demo.main(["plan-50", "compare-50", *sizes])
    data = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["schedule"]: row["error"] for row in data["compare-50"]["rows"]}
    assert rows["at([2])"] == rows["every(2)"] == pytest.approx(data["plan-50"]["held_out"])  # there is one choice
    analysis_tables.draw(data, tmp_path)
    assert (tmp_path / "analysis-plan-50.png").stat().st_size > 5000
    assert "planned at no more MACs" in analysis_tables.tables(data)["plan"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_edits_go_on_where_they_stopped(tmp_path, monkeypatch, capsys):
    for name, value in (("INVERSION_STEPS", (2,)), ("STEPS", 2), ("TARGET", 2)):
        monkeypatch.setattr(edits_demo, name, value)
    monkeypatch.setattr(edits_demo, "WAYS", edits_demo.WAYS[-2:])
    out = tmp_path / "edits.json"
    options = ["--scenes", "1", "--inversion-steps", "2", "--out", str(out)]
    edits_demo.main(["steps", *options])
    first = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert list(first) == ["steps/2"]
    assert [row["name"] for row in first["steps/2"]["rows"]] == ["plain", "Clockwork", "plain, no injection"]
    edits_tables.draw({"runs": {"steps/100": first["steps/2"]}}, out.with_suffix(".npz"), tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 5000
    edits_demo.main(["steps", "ways", *options])
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert runs.pop("steps/2") == first["steps/2"]
    savings = [run["rows"][0]["saving"] for run in runs.values()]
    assert len(savings) == 2  # clock 3, which at two steps is clock 2, and the trained adaptor
    assert savings[0] == pytest.approx(0.4, abs=0.001)
    assert 0.3 < savings[1] < 0.4
    with pytest.raises(SystemExit):
        edits_demo.main([*options, "--scenes", "2"])
    assert "pass --again" in capsys.readouterr().err


def test_edits_are_drawn_that_change_one_object():
    edits = draw_edits(40)
    assert edits == draw_edits(40)
    assert len(set(edits)) == 40
    for caption, old, new in edits:
        before, after = parse([caption, caption.replace(old, new)])
        changed = [name for name, was, now in zip(COLUMNS, before, after, strict=True) if was != now]
        assert changed in (["shape_1", "colour_1"], ["shape_2", "colour_2"])
