"""The benchmarks measure what they say: the ideal computes what Clockwork computes, and the GPU script runs."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.harness import Results, Timing, in_turns
from benchmarks.latency import PLAIN, Group, Latency
from benchmarks.setting import Loop, build
from benchmarks.sides import Bench, Variant

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' schedulers
    pytest.mark.filterwarnings("ignore::FutureWarning:DeepCache"),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(build("sdxl", "cpu", torch.float32, tiny=True))


@pytest.mark.parametrize(("name", "cut"), [("sd15", "paper"), ("sdxl", "outer")])
def test_the_ideal_is_clockwork(bench: Bench, name: str, cut: str) -> None:
    bench = bench if name == "sdxl" else Bench(build(name, "cpu", torch.float32, tiny=True))
    loop = Loop(bench.model, 2, 3)
    plain, ours, ideal = (
        loop(bench.open(variant, loop, "eager").call)
        for variant in (Variant(), Variant("clockwork", 2, cut=cut), Variant("ideal", 2, cut=cut))
    )
    assert torch.equal(ours, ideal)
    assert not torch.equal(ours, plain)


def test_a_region_found_for_the_loop_is_not_traced_again(bench: Bench) -> None:
    """A call that is being recorded has no place yet."""
    loop = Loop(bench.model, 2, 2)
    side = bench.open(Variant("clockwork", 2), loop, "eager")
    wrapper, places = side.wrapper, []
    assert wrapper is not None
    hook = next(wrapper.unet.children()).register_forward_hook(lambda *_: places.append(wrapper.position))
    loop(side.call)
    hook.remove()
    assert None not in places
    assert len(places) >= 2
    assert dict(wrapper.stats.reasons) == {"first step": 1}


def test_twins_share_weights_and_nothing_else(bench: Bench) -> None:
    unet, twin = bench.model.unet, bench.model.twin()
    assert [id(p) for p in unet.parameters()] == [id(p) for p in twin.parameters()]
    assert not {id(m) for m in unet.modules()} & {id(m) for m in twin.modules()}


def test_deepcache_skips_what_the_widest_cut_skips() -> None:
    bench = Bench(build("sd15", "cpu", torch.float32, tiny=True))
    loop = Loop(bench.model, 2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        macs = {}
        for variant in (Variant("DeepCache", 2), Variant("clockwork", 2, cut="widest")):
            side = bench.open(variant, loop, "eager")
            bench.warm(side, loop, "eager")
            macs[variant.kind] = side.macs
    assert macs["DeepCache"] == macs["clockwork"]


def test_deepcache_by_hand_is_deepcache() -> None:
    bench = Bench(build("sd15", "cpu", torch.float32, tiny=True))
    loop = Loop(bench.model, 2, 4)
    sides = [bench.open(Variant(kind, 3), loop, "eager") for kind in ("DeepCache", "DeepCache, static by hand")]
    first, by_hand = (loop(side.call) for side in sides)
    assert torch.equal(first, by_hand)
    assert not torch.equal(first, loop(bench.open(Variant(), loop, "eager").call))


@pytest.mark.slow
def test_a_warm_up_times_nothing(tmp_path: Path) -> None:
    run = Latency(tmp_path / "r.json", device="cpu", minutes=5, tiny=True, compile_options={}, timed=False)
    calls = []
    run.bench("sd15").model.unet.register_forward_hook(lambda *_: calls.append(1))  # twins have it too
    run.trajectories("sd15", 2, "eager", [Group(1, [PLAIN], 1, 60)])
    assert calls
    assert set(run.results.data) == {"environment"}
    before = len(calls)
    run.timed = True
    run.trajectories("sd15", 2, "eager", [Group(1, [PLAIN], 1, 60)])
    assert len(calls) > before
    assert [row["side"] for row in run.results.data["latency"]] == ["plain"]


@pytest.mark.slow
def test_planned_and_calibrated_beside_fewer_steps(tmp_path: Path) -> None:
    """Of whole images: a side with fewer steps of its own, and one that is opened once for all numbers of steps."""
    run = Latency(tmp_path / "r.json", device="cpu", minutes=5, tiny=True, compile_options={})
    opened, bench = [], run.bench("sd15")
    solved = Variant("clockwork", adaptor="affine", cut="widest", planned=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Bench, "open", lambda self, one, *args, was=Bench.open: (opened.append(one), was(self, one, *args))[1]
        )
        run.trajectories(
            "sd15", 2, "eager", [Group(8, [PLAIN, Variant(steps=4), solved], 1, 60), Group(2, [PLAIN], 1, 60)]
        )
    assert opened == [PLAIN, solved]
    rows = {(row["steps"], row["side"]): row for row in run.results.data["latency"]}
    assert list(rows) == [(8, "plain"), (8, "plain, 4 steps"), (8, solved.name), (2, "plain")]
    assert [row["steps_run"] for row in rows.values()] == [8, 4, 8, 2]
    assert [row["macs_ratio"] for row in rows.values()] == pytest.approx([1, 0.5, 0.54, 1], abs=0.05)
    for row in rows.values():
        assert row["speedup"] == rows[row["steps"], "plain"]["ms_per_image"] / row["ms_per_image"]
    assert list(bench.adaptors) == [("affine", "widest", 8, "at([3, 4, 6, 7])")]


def test_timings_take_turns_and_results_are_whole_after_every_row(tmp_path: Path) -> None:
    seen: list[str] = []
    sides = {name: (lambda name=name: seen.append(name)) for name in "ab"}
    timings = in_turns(sides, "cpu", rounds=4, warmup=1)
    assert [timing.runs for timing in timings.values()] == [4, 4]
    assert all(set(seen[k : k + 2]) == {"a", "b"} for k in range(0, 10, 2))
    late = in_turns(sides, "cpu", rounds=9, warmup=0, until=0.0, least=3)
    assert [timing.runs for timing in late.values()] == [3, 3]
    assert Timing.of([1.0, 2.0, 3.0]).median == 2.0
    results = Results(tmp_path / "r.json", {"seed": 0})
    for k in range(2):
        results.add("rows", value=k)
        assert json.loads(results.path.read_text())["rows"][-1] == {"value": k}


@pytest.mark.slow
def test_the_adaptor_alone_in_miniature(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.adaptor_cost", "--out", str(tmp_path), "--tiny", "--device", "cpu"]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    data = json.loads((tmp_path / "adaptor_cost.json").read_text())
    rows = [(row["model"], row["cut"], row["layout"]) for row in data["adaptor"]]
    layouts = "contiguous_format", "channels_last"
    assert rows == [(m, c, one) for m in ("sd15", "sdxl") for c in ("outer", "paper") for one in layouts]
    assert all(row["calls"] > 10 for row in data["kernels"] if row["kernel"] == "all")


@pytest.mark.slow
def test_the_gpu_script_in_miniature(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu_latency.py", "--out", str(tmp_path), "--tiny", "--device", "cpu"]
    subprocess.run([*command, "--minutes", "9"], check=True, cwd=ROOT, capture_output=True)
    data = json.loads((tmp_path / "gpu_latency.json").read_text())
    graphs = [row for row in data["failures"] if row.get("mode") != "cudagraphs"]
    assert [row["side"] for row in graphs] == ["DeepCache, interval 2, branch 0"]  # under torch.compile
    assert {row["schedule"] for row in data["calibrate"]} == {"every(2)", "spread(2)"}
    assert all(row["passed"] for row in data["checks"] if row["mode"] == "compile")
    assert {row["model"] for row in data["latency"]} == {"sd15", "sdxl"}
