"""`bench`: the passes it times are those of the clocks, and its ratios follow from its numbers."""

import json
from io import StringIO

import pytest
import torch
from rich.console import Console

import clockwork_hooks as ch
from clockwork_hooks.analysis.benchmark import MODES, Benchmark, BenchRow
from clockwork_hooks.analysis.timing import Timing, in_turns, timed
from clockwork_hooks.cli import main
from clockwork_hooks.models import PRESETS, load_model
from tests.schemas import follows_its_schema
from tests.small_unet import Tiny
from tests.snapshot import snapshot


def measured(**options):
    unet = Tiny()
    console = Console(file=StringIO())
    return unet, ch.bench(unet, torch.ones(1, 2, 16, 16), 3, **{"rounds": 2, "console": console, **options})


def build():
    """What a user's own factory returns."""
    return Tiny(), (torch.ones(1, 2, 16, 16), 3)


def test_every_clock_runs_its_own_passes():
    _, result = measured(clocks=(2, 3, 4), steps=12)
    assert [(row.clock, row.full_passes, row.adaptor_passes) for row in result.rows] == [
        (1, 12, 0), (2, 6, 6), (3, 4, 8), (4, 3, 9)
    ]  # fmt: skip
    share = ch.find_region(Tiny(), torch.ones(1, 2, 16, 16), 3).macs_share
    for row in result.rows[1:]:
        assert row.macs_ratio == pytest.approx(1 - share * row.adaptor_passes / 12)


def test_the_ratios_follow_from_the_times():
    _, result = measured(clocks=(2,), steps=2)
    plain, ours = result.rows
    assert plain.speed_up == plain.macs_ratio == plain.time_to_macs == 1
    assert ours.speed_up == pytest.approx(plain.seconds_per_step / ours.seconds_per_step)
    assert ours.promised == pytest.approx(1 / ours.macs_ratio)
    assert ours.time_to_macs == pytest.approx(ours.seconds_per_step / plain.seconds_per_step / ours.macs_ratio)
    assert ours.low <= ours.seconds_per_step <= ours.high
    follows_its_schema(json.loads(result.to_json()))


def test_a_slow_region_is_what_is_saved(monkeypatch):
    """Each call of the skipped part takes a second of a clock that nothing else moves: 4 of 4, then 2 of 4."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    class Slow(torch.nn.Conv2d):
        def forward(self, x):
            now[0] += 1
            return super().forward(x)

    unet = Tiny()
    unet.body = Slow(16, 16, 3, padding=1)
    result = ch.bench(unet, torch.ones(1, 2, 16, 16), 3, clocks=(2,), steps=4, rounds=3)
    assert [row.seconds_per_step for row in result.rows] == [1.0, 0.5]
    assert result.rows[1].speed_up == 2


def test_an_adaptor_is_counted():
    region = ch.find_region(Tiny(), torch.ones(1, 2, 16, 16), 3)
    adaptor = ch.ResNetAdaptor.for_region(region, width=8, inputs=("entry", "exit"))
    _, plain = measured(clocks=(2,), steps=2)
    _, result = measured(clocks=(2,), steps=2, adaptor=adaptor)
    assert result.adaptor == "ResNetAdaptor"
    assert result.rows[1].macs_ratio > plain.rows[1].macs_ratio


def test_the_unet_stays_as_it_is():
    unet = Tiny()
    before = snapshot(unet)
    ch.bench(unet, torch.ones(1, 2, 16, 16), 3, clocks=(2,), steps=2, rounds=1)
    assert snapshot(unet) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clocks": ()}, "different ints"),
        ({"clocks": (1, 2)}, "different ints"),
        ({"clocks": (2, 2)}, "different ints"),
        ({"clocks": (0,)}, "clock"),
        ({"clocks": (4,), "steps": 3}, "steps is an int of at least 4"),
        ({"rounds": 0}, "rounds is an int of at least 1"),
        ({"modes": ("fast",)}, "a mode is one of eager, compile, cudagraphs"),
        ({"modes": ("eager", "eager")}, "each measured once"),
        ({"modes": "eager"}, "modes are several"),
        ({"clocks": 2}, "clocks are several"),
        ({"modes": ("cudagraphs",)}, "CUDA"),
    ],
)
def test_options_outside_their_rules(options, said):
    with pytest.raises(ch.ArgumentError, match=said):
        measured(**options)


def test_a_mode_that_cannot_run_is_told_beside_those_that_can():
    _, result = measured(clocks=(2,), steps=2, modes=("eager", "cudagraphs"))
    assert [row.mode for row in result.rows] == ["eager", "eager"]
    assert "CUDA" in result.failed["cudagraphs"]
    assert "cudagraphs could not be measured" in result.to_markdown()


@pytest.mark.parametrize("seconds", [0.000123, 0.0123, 12.3], ids=str)
def test_the_table_fits_80_columns(seconds):
    def row(mode, clock):
        return BenchRow(mode, clock, seconds, 0.99 * seconds, 1.01 * seconds, 5, 1, clock - 1, 0.5583, 12.345, 5.678)

    rows = [row(mode, clock) for mode in MODES for clock in (1, 2, 12)]
    settings = {"device": "cpu", "dtype": "float32", "threads": 1, "versions": {"torch": "2"}, "notes": []}
    benchmark = Benchmark("UNet2DConditionModel", (2, 4, 64, 64), "region", "identity", 12, tuple(rows), {}, settings)
    console = Console(file=StringIO(), width=80)
    console.print(benchmark.table())
    lines = console.file.getvalue().splitlines()
    heads = next(line for line in lines if line.startswith(" mode"))
    assert heads.split()[-2:] == ["to", "MACs"]
    assert [line.split()[-1] for line in lines if line.startswith(" compile")] == ["–", "0.15", "0.15"]


def no_compiler(self, mode=None):
    raise ch.CompileError("no compiler", do="install one")


def test_what_cannot_be_timed(monkeypatch):
    inputs = torch.ones(1, 2, 16, 16), 3
    with pytest.raises(ch.WrapError, match="only an nn"):
        ch.bench(3, *inputs)
    with pytest.raises(ch.ArgumentError, match="a time can be measured only on a device that computes"):
        ch.bench(Tiny().to("meta"), inputs[0].to("meta"), 3)
    monkeypatch.setattr(ch.ClockworkWrapper, "compile", no_compiler)
    with pytest.raises(ch.CompileError, match=r"(?s)at least one mode.*compile: no compiler"):
        measured(clocks=(2,), steps=2, modes=("compile", "cudagraphs"))


def test_sides_are_timed_in_turns():
    seen = []
    sides = {name: (lambda name=name: seen.append(name)) for name in "ab"}
    times = in_turns(sides, "cpu", rounds=3, warmup=1, tell=lambda name: seen.append(name.upper()))
    assert seen[:4] == ["A", "a", "B", "b"]
    assert sorted(seen[4:]) == sorted("AaBb" * 3)
    assert all(timing.runs == 3 for timing in times.values())
    assert timed(lambda: None, "cpu") >= 0


def test_quartiles_lie_among_the_runs():
    few = Timing.of([1.0, 5.0])
    assert (few.low, few.median, few.high) == (2.0, 3.0, 4.0)
    assert Timing.of([7.0]) == Timing(7.0, 7.0, 7.0, 1)


_HEAVY = {"sdxl", "svd"}  # a dozen seconds each


@pytest.mark.parametrize("name", [pytest.param(one, marks=[pytest.mark.slow] * (one in _HEAVY)) for one in PRESETS])
def test_every_preset_has_a_tiny_one(name):
    unet, args, kwargs = load_model(name, tiny=True)
    report = ch.flops_report(unet, *args, **kwargs)
    assert report.region is not None
    assert report.full_macs < 20e9
    assert report.parameters < 150e6  # deepfloyd-if: projections of its text


def test_the_command(capsys, tmp_path):
    words = ["tests.test_bench:build", "--clock", "2", "--steps", "2", "--rounds", "1", "--format", "json"]
    assert main(["bench", *words, "--out", str(tmp_path / "b"), "--out", str(tmp_path / "page.html")]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert [row["clock"] for row in data["rows"]] == [1, 2]
    for name in ("b/bench.json", "b/bench.md", "b/bench.html", "b/bench.png", "page.html"):
        assert str(tmp_path / name) in err
    assert json.loads((tmp_path / "b" / "bench.json").read_text(encoding="utf-8")) == data


def test_a_preset_on_the_cpu_is_tiny_and_says_so(capsys):
    words = ["ddpm-cifar10", "--clock", "2", "--steps", "2", "--rounds", "1", "--guidance", "--dtype", "bfloat16"]
    assert main(["bench", *words, "--format", "json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["sample"] == [2, 3, 16, 16]
    assert data["settings"]["dtype"] == "bfloat16"
    assert [note.split(":")[0] for note in data["settings"]["notes"]] == [
        "A preset has random weights", "ddpm-cifar10 at a tenth of its width"
    ]  # fmt: skip
