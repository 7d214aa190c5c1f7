"""Numbers of the README and the pages it leads to against a rerun, and their first code blocks run."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

import clockwork_hooks as ch
from benchmarks.fidelity_plan import Sampler
from benchmarks.fidelity_results import Results
from benchmarks.fidelity_tables import SHIPS
from benchmarks.performance_results import Latencies, verdicts
from clockwork_hooks._numbers import flops, macs, percent, shape
from clockwork_hooks.models import load_model
from tests.pipelines.parts import text_to_image

ROOT = Path(__file__).parents[2]
PATHS = ("README.md", "docs/index.md", "docs/reports.md", "docs/training.md")
TEXT = {path: (ROOT / path).read_text(encoding="utf-8") for path in PATHS}
BLOCKS = {path: re.findall(r"```python\n(.*?)```", text, re.S) for path, text in TEXT.items()}
TABLES = dict(zip(("speed table", "demo table", "flops table", "quality table"), PATHS, strict=True))


def rows(marker: str) -> dict[str, list[str]]:
    """The cells of the table after a comment, by the first one."""
    lines = TEXT[TABLES[marker]].split(f"<!-- {marker}", 1)[1].split("-->", 1)[1].strip().split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {first: rest for first, *rest in cells}


@pytest.mark.parametrize("preset", ["sd15", "sd21", "sdxl", "svd", "kandinsky22", "deepfloyd-if", "ddpm-cifar10"])
def test_costs_of_real_architectures(preset: str) -> None:
    loaded = load_model(preset)
    report = ch.flops_report(loaded.unet, *loaded.args, clock=2, steps=8, **loaded.kwargs)
    assert rows("flops table")[preset] == [
        shape(loaded.args[0].shape),
        flops(report.full_flops),
        flops(report.adaptor_pass_flops),
        flops(report.full_trajectory_flops),
        flops(report.trajectory_flops),
        percent(report.saved_share),
    ]


def test_cost_of_the_demo() -> None:
    from clockwork_hooks.demo.model import LATENT_SHAPE, new_unet

    unet = new_unet().to("meta").eval()
    inputs = [torch.empty(2, *LATENT_SHAPE, device="meta"), torch.empty((), device="meta")]
    hidden = torch.empty(2, 18, 128, device="meta")
    region = ch.find_regions(unet, *inputs, encoder_hidden_states=hidden)[0]
    table = rows("demo table")
    for name, schedule in (("DeepCache's setting", ch.Schedule.every(2)), ("identity", ch.Schedule.spread(2))):
        report = ch.flops_report(unet, *inputs, steps=8, clock=schedule, region=region, encoder_hidden_states=hidden)
        assert table["plain"][0] == macs(report.full_trajectory_macs)
        assert table[name][:2] == [macs(report.trajectory_macs), percent(report.saved_share)]
    exit, entry = region.exit.shape, region.entry.shape
    own = 4 * exit[1] * (exit[1] + 2 * entry[1]) * exit[2] * exit[3] * exit[0]  # exit+entry+before, at four steps
    assert table["calibrated"][0] == macs(report.trajectory_macs + own)
    assert table["calibrated"][1] == percent(1 - (report.trajectory_macs + own) / report.full_trajectory_macs)


def test_quality_of_the_demo() -> None:
    """The README's rows are those of the JSON, and what its text says about them is so."""
    measured = json.loads((ROOT / "benchmarks/results/fidelity.json").read_text(encoding="utf-8"))
    results = Results(measured)
    keys = {label: f"losses-8/{label}" for label in ("plain", "plain, 6 steps", "plain, 5 steps", "identity")}
    keys["the paper's adaptor and loss"] = "losses-8/ResNet, feature"
    keys["the adaptor that ships"] = SHIPS
    keys["the best of all tried"] = "best-8/UNet-light, 3 5 7"
    printed = rows("quality table")
    assert list(printed) == list(keys)
    for label, key in keys.items():
        saved = "–" if label == "plain" else percent(results.saved(key))
        scores = [str(results.score(key, name)) for name in ("Fréchet", "attributes right")]
        assert printed[label] == [macs(results.row(key)["macs_per_image"]), saved, *scores], label
    order = ("plain", "the adaptor that ships", "plain, 6 steps", "plain, 5 steps", "identity")
    distances = [results.score(keys[label], "Fréchet") for label in (*order, "the paper's adaptor and loss")]
    means = [score.mean for score in distances if score]
    assert means == sorted(means)
    tried = {key: results.score(key, "Fréchet") for key in results.trained_at(Sampler())}
    assert f"Of the {len(tried)} trained settings that we\ntried at 8 steps, one draws level" in TEXT[PATHS[3]]
    assert [key for key, score in tried.items() if score and score.mean <= means[0]] == [keys["the best of all tried"]]
    for row, better in (("steps-4/trained", False), ("longer-4/width 64", True)):
        gap = results.difference(row, "losses-8/plain, 3 steps", "Fréchet")
        assert (gap.mean < 0) == better, row


def test_times_on_a_gpu() -> None:
    data = json.loads((ROOT / "benchmarks/results/gpu_latency.json").read_text(encoding="utf-8"))
    printed, measured = rows("speed table"), {one.what: one.measured for one in verdicts(Latencies(data))}
    assert len(printed) == 7
    assert {what: [measured[what]] for what in printed} == printed
    for what in printed:  # like with like: both sides in the same mode
        assert re.search(r"(captured|compiled)\b.*against plain \1$", what), what


def test_the_first_screen_says_what_the_tables_say() -> None:
    text = TEXT["README.md"]
    assert "at 46% fewer MACs in 8 steps of the demo model,\n  51% fewer in 20 and 76% fewer in 50" in text
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    quality, steps = {}, ""
    for cells in (line for line in lines if len(line) == 7):
        steps = cells[0] or steps
        quality[steps, cells[1].strip("*").split(",")[0]] = cells[2:]
    for steps, claimed in (("8", 46), ("20", 51), ("50", 76)):
        _, saved, fréchet, *_ = quality[steps, "calibrated"]
        assert round(float(saved[:-1])) == claimed
        distance, (plain, spread) = float(fréchet.split()[0]), map(float, quality[steps, "plain"][2].split(" ± "))
        assert distance <= plain + spread
    faster = [float(cells[1][:-1]) for cells in lines if len(cells) == 2 and cells[0].startswith("sd15")]
    assert f"up to {max(faster):.1f} times as [fast]" in text
    performance, calibration = (
        " ".join((ROOT / f"docs/{name}.md").read_text("utf-8").split()) for name in ("performance", "calibration")
    )
    times = {cells[0].split(": planned")[0]: float(cells[1][:-1]) for cells in lines if ": planned" in cells[0]}
    sd15, sdxl = ({key: times.get(f"{model}, batch 2, {key}") for key in (
        "50 steps, captured", "8 steps, captured", "50 steps, compiled", "8 steps, compiled"
    )} for model in ("sd15", "sdxl"))  # fmt: skip
    captured = (
        f"captured calls of SD 1.5's UNet are {sd15['50 steps, captured']:.1f} times as fast in 50 steps and "
        f"{sd15['8 steps, captured']:.1f} times in 8"
    )
    assert captured in performance
    assert f"compiled ones {sd15['50 steps, compiled']:.1f} and {sd15['8 steps, compiled']:.1f} times" in performance
    assert f"SDXL's are {sdxl['50 steps, captured']:.1f} and {sdxl['8 steps, captured']:.1f} times" in performance
    assert "[46% fewer MACs in 8 steps, 51% in 20](#measured-on-the-demo-model)" in calibration


def test_five_lines(capsys: pytest.CaptureFixture[str], tiny_unet: Any) -> None:
    scheduler = DDIMScheduler()

    @torch.no_grad()
    def pipe(prompt: str) -> torch.Tensor:
        sample = torch.randn(1, 3, 16, 16)
        scheduler.set_timesteps(8)
        for t in scheduler.timesteps:
            sample = scheduler.step(tiny_unet(sample, t).sample, t, sample).prev_sample
        return sample

    before = dict(vars(tiny_unet))
    space = SimpleNamespace(unet=tiny_unet, pipe=pipe, prompt="a circle")
    exec(BLOCKS["docs/index.md"][0], vars(space))
    assert "4 full, 4 with the adaptor" in capsys.readouterr().out
    assert vars(tiny_unet) == before


def test_a_unet_and_a_loop_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    exec(BLOCKS["README.md"][1], {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert re.search(r"passes +(5 full, 3|4 full, 4) with the adaptor", printed), (
        printed
    )  # of the first run, one is recorded
    assert "exit up" in printed


def test_a_pipeline_is_tuned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny pipeline and a CPU: in few steps, without CUDA graphs, and for a saving that so small a UNet allows."""
    pipe = text_to_image()
    pipe.set_progress_bar_config(mininterval=0)  # shown, as where nobody turned them off
    before = dict(vars(pipe.unet))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.StableDiffusionPipeline.from_pretrained", lambda *_, **__: pipe)
    monkeypatch.setattr(type(pipe), "to", lambda self, *_: self)
    block = (
        re.sub(r"cw\.compile.*", "", BLOCKS["README.md"][0])
        .replace(": 20}", ": 6}")
        .replace("saving=0.4", "saving=0.2")
    )
    exec(block, {"__name__": "readme"})
    printed, told = capsys.readouterr()
    assert re.search(r"[1-9]\d* with the adaptor", printed), printed
    assert told.count(" 0/6") == 1, told  # diffusers' bar of the picture alone: the many runs of tune have none
    assert list((tmp_path / "tuned").rglob("*.safetensors"))
    assert vars(pipe.unet) == before


@pytest.fixture
def tiny_unet() -> Any:
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(16, block_out_channels=(8, 32), norm_num_groups=8, **blocks).eval()
