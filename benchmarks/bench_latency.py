"""Latency on a CPU: Clockwork, the same by hand, and DeepCache, through a real scheduler loop.

    python -m pytest -n 0 -s benchmarks/bench_latency.py

The demo model's architecture and a small SD, guidance batch 2, 8 DPM++ steps, eager; as `gpu_latency.py` does on a GPU,
with the same columns. All sides of a model run in turns; results go to benchmarks/results/cpu_latency.json (or where
LATENCY_OUT says). On two idle cores it takes less than five minutes.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from benchmarks.latency import PLAIN, Group, Latency
from benchmarks.sides import Variant

MODELS, CLOCKS, CUTS = ("demo", "small SD"), (2, 3, 4), ("outer", "paper")
ROUNDS, SECONDS = 5, 900  # seconds: where a busy machine is given up on
COMMAND = "python -m pytest -n 0 -s benchmarks/bench_latency.py"
OUT = Path(os.environ.get("LATENCY_OUT", Path(__file__).parent / "results" / "cpu_latency.json"))

SIDES = [
    PLAIN,
    *(Variant(kind, clock, cut=cut) for clock in CLOCKS for cut in CUTS for kind in ("clockwork", "ideal")),
    *(Variant("clockwork", clock, "ResNet", cut) for clock in CLOCKS for cut in CUTS),
    *(Variant("DeepCache", interval) for interval in (2, 3)),
    *(Variant("clockwork", clock, cut="widest") for clock in (2, 3)),  # what DeepCache skips
]


@pytest.fixture(scope="module")
def run() -> Latency:
    """One file for all tests of this run."""
    made = Latency(OUT, device="cpu", minutes=SECONDS * len(MODELS) / 60, tiny=False, compile_options={})
    made.results.data["environment"] |= {"load": os.getloadavg(), "command": COMMAND}
    return made


@pytest.mark.parametrize("model", MODELS)
def test_latency(model: str, benchmark: Any, run: Latency) -> None:
    """Every side runs, and the ideal's MACs are Clockwork's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers and DeepCache
        benchmark.pedantic(lambda: run.trajectories(model, 2, "eager", [Group(8, SIDES, ROUNDS, SECONDS)]), rounds=1)
    rows = {row["side"]: row for row in run.results.data["latency"] if row["model"] == model}
    assert [one.name for one in SIDES if one.name not in rows] == []
    for clock in CLOCKS:
        for cut in CUTS:
            ours, ideal = (rows[Variant(kind, clock, cut=cut).name]["macs_ratio"] for kind in ("clockwork", "ideal"))
            assert ours == pytest.approx(ideal, rel=1e-3)
