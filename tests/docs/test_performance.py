"""docs/performance.md and docs/performance_tables.md say what benchmarks/results/ says."""

import copy
from pathlib import Path

import pytest

from benchmarks import performance, performance_plots
from benchmarks.performance_results import Latencies, speed_ups, verdicts

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
        assert row["speedup"] == pytest.approx(plain["ms_per_image"] / row["ms_per_image"])
        if row["to_ideal"] is not None:
            ideal = rows[(*where, f"ideal, clock {row['clock']}, identity, {row['cut']} cut")]
            assert row["to_ideal"] == pytest.approx(row["ms_per_step"] / ideal["ms_per_step"])
            checked += 1
    assert checked > 2


def test_verdicts_follow_the_numbers() -> None:
    """Twice as fast or as slow: no verdict but those on what is not a time of ours stands."""
    before = {one.what: one for one in verdicts(Latencies(GPU))}
    for factor, met in ((0.01, True), (100.0, False)):
        changed = copy.deepcopy(GPU)
        for row in changed["latency"]:
            row["ms_per_step"] *= factor if row["kind"] == "clockwork" else 1
        for row in changed["passes"]:
            row["ratio"] = row["ratio"] and factor
        after = {one.what: one for one in verdicts(Latencies(changed))}
        times = [what for what in before if before[what].met is not None and " against " in what]
        times = [what for what in times if "memory" not in what]
        assert len(times) > 20
        assert [after[what].met for what in times] == [met] * len(times)
    gone = {**GPU, "latency": [], "passes": [], "calibrate": []}
    assert {one.verdict for one in verdicts(Latencies(gone))} == {"not measured"}


def test_planned_and_calibrated_rows_are_judged() -> None:
    """On rows of a run that had them: speed-up in one mode, MACs saved, minutes and memory of a calibration."""
    row = {"model": "sd15", "batch": 2, "steps": 50, "mode": "compile", "clock": None, "cut": "widest", "tflops": None}
    plain = {**row, "kind": "plain", "side": "plain", "adaptor": None, "ms_per_step": 7.0, "macs_ratio": 1.0}
    kind = "exit+entry+before+trend"
    side = f"clockwork, planned, {kind}, widest cut"
    ours = {**row, "kind": "clockwork", "side": side, "adaptor": kind, "ms_per_step": 2.0, "macs_ratio": 0.32}
    solved = {"model": "sdxl", "schedule": "every(2)", "seconds": 250.0, "memory_ratio": 1.2}
    data = {"latency": [plain, ours], "passes": [], "calibrate": [solved]}
    seen = {one.what: (one.measured, one.met) for one in verdicts(Latencies(data)) if one.met is not None}
    assert seen == {
        "sd15, batch 2, 50 steps, compiled: planned, exit+entry+before+trend against plain compiled": ("3.50×", True),
        "sd15, 50 steps: MACs saved, planned, exit+entry+before+trend": ("68.0%", True),
        "sdxl: calibrate, 64 prompts, 20 steps, every(2)": ("250 s", False),
        "sdxl: calibrate, 64 prompts, 20 steps, every(2): peak memory against sampling's": ("1.200", True),
    }
    assert [one.measured for one in speed_ups(Latencies(data))] == ["3.50×"]


def test_an_ideal_has_the_macs_of_its_own_cut() -> None:
    """The run of 2026-11-24 counted the ideal's MACs at the outer cut only and wrote them in both rows."""
    latencies = Latencies(GPU)
    keys = ("mode", "model", "batch", "steps")
    pairs = [
        (row, latencies.row(row["side"].replace("ideal", "clockwork"), *(row[key] for key in keys)))
        for row in latencies.data["latency"]
        if row["kind"] == "ideal"
    ]
    pairs = [(ideal, ours) for ideal, ours in pairs if ours is not None]
    assert len(pairs) > 2
    for ideal, ours in pairs:
        assert ideal["macs_ratio"] == ours["macs_ratio"]
        assert ideal["tflops"] * ideal["ms_per_step"] == pytest.approx(ours["tflops"] * ours["ms_per_step"])


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
def test_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in performance_plots.PLOTS:
        monkeypatch.setitem(performance_plots.PLOTS, name, tmp_path / f"{name}.png")
    assert all(path.stat().st_size > 10_000 for path in performance_plots.plot(DATA))
