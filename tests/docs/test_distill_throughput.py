"""The throughput benchmark in miniature: both models, one process and two with gloo."""

import json
from pathlib import Path

import pytest

from benchmarks import distill_throughput

# diffusers 0.42 hands numpy 2 a tensor in `set_timesteps`, in a way that torch and numpy will both give up
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.mark.slow
def test_two_processes_on_a_cpu(tmp_path: Path) -> None:
    assert distill_throughput.main(["--out", str(tmp_path), "--tiny", "--device", "cpu", "--trajectories", "2"]) == 0
    data = json.loads((tmp_path / "distill_throughput.json").read_text())
    assert set(data["runs"]) == {"demo-1", "demo-2", "sd15-1", "sd15-2"}
    assert set(data["speed_up"]) == {"demo, 2 processes", "sd15, 2 processes"}
    for run in data["runs"].values():
        assert (run["prompts"], run["trajectories"]) == (2 * run["processes"], 2 * run["processes"])
        assert run["prompts_per_second"] > 0
        assert 0 < run["recording_seconds"] < run["seconds"]


def test_one_worker_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = tmp_path / "sd15-1.json"
    words = ["--worker", "--models", "sd15", "--out", str(part), "--tiny", "--device", "cpu", "--trajectories", "1"]
    assert distill_throughput.main(words) == 0
    run = json.loads(part.read_text())
    assert (run["model"], run["processes"], run["prompts"], run["memory_gb"]) == ("sd15", 1, 1, None)
