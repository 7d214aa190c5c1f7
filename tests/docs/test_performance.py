"""docs/performance.md and docs/performance_tables.md say what benchmarks/results/ says."""

import copy
from pathlib import Path

import pytest

from benchmarks import performance, performance_plots
from benchmarks.performance_results import Latencies, verdicts

DATA = performance.read()
GPU = DATA["gpu_latency"]


def test_the_pages_are_up_to_date() -> None:
    """If not: python -m benchmarks.performance."""
    pages = [page.read_text(encoding="utf-8") for page in performance.PAGES]
    assert [performance.filled(page, DATA) for page in pages] == pages
    assert all("".join(pages).count(f"<!-- begin {name} -->") == 1 for name in performance.PARTS)


def test_rows_follow_from_each_other() -> None:
    """Speed-ups and ratios to the ideal are quotients of the times beside them."""
    rows = {(r["model"], r["batch"], r["steps"], r["mode"], r["side"]): r for r in GPU["latency"]}
    checked = 0
    for (*where, _), row in rows.items():
        plain = rows[(*where, "plain")]
        assert row["speedup"] == pytest.approx(plain["ms_per_step"] / row["ms_per_step"])
        if row["to_ideal"] is not None:
            ideal = rows[(*where, f"ideal, clock {row['clock']}, identity, {row['cut']} cut")]
            assert row["to_ideal"] == pytest.approx(row["ms_per_step"] / ideal["ms_per_step"])
            checked += 1
    assert checked > 10


def test_verdicts_follow_the_numbers() -> None:
    before = {one.what: one for one in verdicts(Latencies(GPU))}
    faster, gone = copy.deepcopy(GPU), copy.deepcopy(GPU)
    for row in faster["latency"]:
        if row["kind"] == "clockwork":
            row["ms_per_step"] /= 1.3
    for row in faster["passes"]:
        row["ratio"] = row["ratio"] and 1.2
    after = {one.what: one for one in verdicts(Latencies(faster))}
    what = "sd15, batch 2, 8 steps, compiled: Clockwork (clock 2, identity) against plain compiled"
    assert (before[what].met, after[what].met) == (False, True)
    what = "sd15, cudagraphs: adaptor pass (identity, outer cut) against the ideal"
    assert (before[what].met, after[what].met) == (True, False)
    gone["latency"], gone["passes"] = [], []
    assert {one.verdict for one in verdicts(Latencies(gone))} == {"not measured"}


def test_an_ideal_has_the_macs_of_its_own_cut() -> None:
    """The run of 2026-11-24 counted the ideal's MACs at the outer cut only and wrote them in both rows."""
    latencies = Latencies(GPU)
    for cut in ("outer", "paper"):
        ideal, ours = (
            latencies.row(f"{kind}, clock 2, identity, {cut} cut", "cudagraphs") for kind in ("ideal", "clockwork")
        )
        assert ideal is not None
        assert ours is not None
        assert ideal["macs_ratio"] == ours["macs_ratio"]
        assert ideal["tflops"] * ideal["ms_per_step"] == pytest.approx(ours["tflops"] * ours["ms_per_step"])


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
def test_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in performance_plots.PLOTS:
        monkeypatch.setitem(performance_plots.PLOTS, name, tmp_path / f"{name}.png")
    assert all(path.stat().st_size > 10_000 for path in performance_plots.plot(DATA))
