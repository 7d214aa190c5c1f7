"""docs/calibration.md and README's first table against benchmarks/results/calibration.json."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from benchmarks import calibration_results as results


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return results.load(results.RESULT)


def test_page_and_readme_say_what_was_measured(data: dict[str, Any]) -> None:
    cost = results.load(results.COST) if results.COST.exists() else None
    page = results.PAGE.read_text(encoding="utf-8")
    assert results.between(page, results.BEGIN, results.END, results.page(data, cost)) == page
    tables = results.TABLES.read_text(encoding="utf-8")
    assert results.between(tables, results.BEGIN_ROWS, results.END_ROWS, results.all_rows(data)) == tables
    assert results.between(page, results.BEGIN_SPACING, results.END_SPACING, results.spacings()) == page
    readme = results.README.read_text(encoding="utf-8")
    assert results.between(readme, results.BEGIN_README, results.END_README, results.shown(data)) == readme
    assert results.between(readme, results.BEGIN_BUDGET, results.END_BUDGET, results.budget(data)) == readme


def test_readme_says_that_plain_is_reached(data: dict[str, Any]) -> None:
    """The claim that the text around the table makes, on the captions that nothing was chosen by."""
    rows = results.Rows(data)
    best = rows.calibrated("main-8", 0.45)
    assert best is not None
    assert rows.saved(best) >= 0.45
    gap = rows.gap(best, "main-8/plain")
    assert sum(gap) / len(gap) - results.half(gap) <= 0


def test_choice_reads_the_other_captions(data: dict[str, Any]) -> None:
    """A row that is good only where it is judged is not the one that is shown; a verdict turns with the numbers."""
    changed = copy.deepcopy(data)
    rows = results.Rows(changed)
    best = str(rows.calibrated("main-8", 0.45))
    other = "main-8/affine, widest, 3 4 6 7"
    assert best != other
    changed["rows"][other]["scores"]["judge"]["Fréchet"] = [0.0, 0.0, 0.0]
    assert rows.calibrated("main-8", 0.45) == best
    assert "met" in results.verdicts(rows)[0].split(":")[1]
    changed["rows"][best]["scores"]["judge"]["Fréchet"] = [90.0, 91.0, 92.0]
    assert "**missed**" in results.verdicts(rows)[0]
    changed["rows"][other]["scores"]["choose"]["Fréchet"] = [0.0]
    assert rows.calibrated("main-8", 0.45) == other
    del changed["rows"]["main-50/plain"]
    assert "not measured" in results.verdicts(rows)[3]


def test_what_a_budget_buys_is_chosen_by_the_other_captions(data: dict[str, Any]) -> None:
    changed = copy.deepcopy(data)
    rows = results.Rows(changed)
    budget = rows.row(rows.plain()[8])["macs_per_image"]
    best = str(rows.within(budget))
    assert rows.row(best)["macs_per_image"] <= budget
    gap = rows.gap(best, rows.plain()[8])
    assert sum(gap) / len(gap) + results.half(gap) < 0  # as the README says: better than plain sampling
    five, ten = str(rows.within(rows.row(rows.plain()[5])["macs_per_image"])), rows.plain()[10]
    assert rows.mean(five) < rows.mean(ten) + 0.1  # likewise: for the MACs of 5 plain steps, the quality of 10
    assert rows.steps("main-8/affine, widest, 3 4 6 7") == (8, 4)
    other = "main-8/affine, widest, 3 4 6 7"
    changed["rows"][other]["scores"]["judge"]["Fréchet"] = [0.0, 0.0, 0.0]
    assert rows.within(budget) == best
    changed["rows"][other]["scores"]["choose"]["Fréchet"] = [0.0]
    assert rows.within(budget) == other
    assert rows.within(0) is None


def test_plots(data: dict[str, Any], tmp_path: Path) -> None:
    assert results.plot(data, tmp_path / "plot.png").stat().st_size > 10_000
    assert results.plot_budgets(data, tmp_path / "budgets.png").stat().st_size > 10_000
