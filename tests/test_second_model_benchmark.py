"""`benchmarks/second_model.py` in miniature, and the arithmetic of its model."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import second_model
from benchmarks.calibration_results import PAGE, TABLES, between, load
from benchmarks.second_model import PLAN, RESULT, key_of, page, verdicts
from benchmarks.second_model_training import (
    SIGMA_MAX,
    Pool,
    SecondModel,
    Shape,
    log_snr,
    loss_of,
    sigmas_of,
)
from tests.test_samplers import k_sampling


class Silent(nn.Module):
    """Emits zeros: the best that can be said of white noise, as all is in what EDM skips."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.times: list[float] = []

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.times.append(float(time[0]))
        return self.weight * x


def test_sigmas_and_times() -> None:
    sigmas = sigmas_of(8)
    assert sigmas[0] == pytest.approx(SIGMA_MAX)
    assert sigmas[7:] == [pytest.approx(0.02), 0.0]
    assert all(a > b for a, b in itertools.pairwise(sigmas))
    model = SecondModel(Silent(), Shape())
    model.sample(model.noise(1, 0), 8)
    assert model.unet.times == [pytest.approx(torch.tensor(sigma).log().item() / 4) for sigma in sigmas[:-1]]
    assert log_snr(model.unet.times[2]) == pytest.approx(-2 * torch.tensor(sigmas[2]).log().item())


def test_white_noise_is_sampled_exactly() -> None:
    """Of data that are white noise of the root mean square `sigma_data`, the sampler makes such."""
    model = SecondModel(Silent(), Shape(sigma_data=0.5))
    spread = {steps: model.sample(model.noise(8, 0), steps).std().item() for steps in (8, 50)}
    assert spread[50] == pytest.approx(0.5, rel=0.01)
    assert abs(spread[50] - 0.5) < abs(spread[8] - 0.5)


def test_sampler_is_that_of_k_diffusion() -> None:
    sampling = k_sampling()
    torch.manual_seed(0)
    model = SecondModel(Silent(), Shape())
    model.unet.weight.data.fill_(-0.3)
    noise = model.noise(2, 3)
    sigmas = torch.tensor(sigmas_of(6), dtype=torch.float64)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return model.denoised(x, float(sigma[0]))

    with torch.no_grad():
        theirs = sampling.sample_dpmpp_2m(denoise, noise * SIGMA_MAX, sigmas, disable=True)
    torch.testing.assert_close(model.sample(noise, 6), theirs.float(), rtol=1e-4, atol=1e-4)


def test_loss_is_of_unit_variance() -> None:
    """What the network learns has variance 1 at every noise level, where the pixels' root mean square is right."""
    torch.manual_seed(0)
    clean = Pool(64, 0, torch.device("cpu")).draw(256)
    power = float(clean.square().mean().sqrt())
    model = SecondModel(Silent(), Shape(sigma_data=power))
    assert float(loss_of(model, model.unet, clean).detach()) == pytest.approx(1, abs=0.1)
    wrong = SecondModel(Silent(), Shape(sigma_data=power / 3))
    assert float(loss_of(wrong, wrong.unet, clean).detach()) > 2


def test_plan() -> None:
    keys = [key_of(steps, row) for steps, row in PLAN]
    assert len(set(keys)) == len(keys)
    assert keys[0] == "edm-8/plain"
    for steps, row in PLAN:
        assert all(1 < step <= (row.taken or steps) for step in row.at)
        assert row.kind is None or row.at


def _measured(distances: dict[str, float]) -> dict[str, Any]:
    """Rows as `run` writes them, with these Fréchet distances; 20 elsewhere."""
    rows = {}
    for steps, row in PLAN:
        key = key_of(steps, row)
        distance = distances.get(key, 20.0)
        macs = (row.taken or steps) - 0.8 * len(row.at)
        scores = {"Fréchet": [distance, distance + 0.1, distance - 0.1], "readable": [99.0] * 3, "PSNR": [30.0] * 3}
        rows[key] = {
            "kind": row.kind, "taken": row.taken, "at": list(row.at), "region line": "a → b",
            "macs_per_image": 1e9 * macs, "scores": {"judge": scores, "choose": scores},
        }  # fmt: skip
    model = {"shape": {"dim": 8, "dim_mults": [1, 2]}, "parameters": 1e6, "minutes": 5, "iterations": 10, "batch": 4,
             "device": "a GPU"}  # fmt: skip
    run = {"model": model, "pictures": 8, "seeds": 3, "calibration": 8, "device": "a GPU", "dtype": "torch.float16",
           "versions": {"torch": "2"}, "python": "3"}  # fmt: skip
    return {"rows": rows, "runs": [run]}


def test_verdicts_turn_with_the_numbers() -> None:
    best, plain = "edm-8/affine, widest, 3 4 6 7", "edm-8/plain, 5 steps"
    good = verdicts(_measured({best: 10.0}))
    assert any("`affine, widest, 3 4 6 7`, 40.0%" in line and "-10.0" in line for line in good)
    assert any("beaten at equal MACs: " in line and "5 (37.5%; `affine, widest, 3 4 6 7`" in line for line in good)
    bad = verdicts(_measured({best: 10.0, plain: 5.0}))
    assert any("**not beaten**: " in line and "5 (37.5%; `affine, widest, 3 4 6 7`" in line for line in bad)
    data = _measured({})
    assert "Planned, not measured" not in second_model.all_rows(data)
    del data["rows"][best]
    assert "Planned, not measured: 1 of edm-8 " in second_model.all_rows(data)


def test_rows_that_do_not_fit_wait_for_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    rows = _measured({})["rows"]

    class Slow:
        """A second for a step, and five to judge."""

        model = SecondModel(Silent(), Shape())

        @classmethod
        def make(cls, options: Any, dtype: torch.dtype) -> Slow:
            return cls()

        def measure(self, steps: int, row: Any) -> dict[str, Any]:
            clock[0] += (row.taken or steps) + 5
            return dict(rows[key_of(steps, row)])

    monkeypatch.setattr(second_model, "Judge", Slow)
    monkeypatch.setattr(second_model.time, "monotonic", lambda: clock[0])
    run = [
        "run",
        "--out",
        str(tmp_path),
        "--model",
        "none",
        "--device",
        "cpu",
        "--match",
        r"plain|identity, widest, 3 4 6",
    ]
    assert second_model.main([*run, "--minutes", "1.5"]) == 0
    first = list(load(tmp_path / "second_model.json")["rows"])
    assert clock[0] <= 90
    assert first[:2] == ["edm-8/plain", "edm-20/plain"]
    assert "edm-50/plain" not in first  # 55 seconds
    assert "rows are not there yet" in capsys.readouterr().out
    clock[0] = 0.0
    assert second_model.main([*run, "--minutes", "60"]) == 0
    assert "all is there" in capsys.readouterr().out
    assert set(load(tmp_path / "second_model.json")["rows"]) > {*first, "edm-50/plain"}


def test_page_says_what_was_measured() -> None:
    text = PAGE.read_text(encoding="utf-8")
    section = page(load(RESULT)) if RESULT.exists() else ""
    assert between(text, second_model.BEGIN, second_model.END, section) == text
    text = TABLES.read_text(encoding="utf-8")
    rows = second_model.all_rows(load(RESULT)) if RESULT.exists() else ""
    assert between(text, second_model.BEGIN_ROWS, second_model.END_ROWS, rows) == text


@pytest.mark.slow
def test_trained_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("denoising_diffusion_pytorch") is None:
        pytest.skip("needs denoising-diffusion-pytorch")
    size = ["--dim", "8", "--batch", "4", "--pool", "64", "--shown", "8", "--log-every", "1", "--device", "cpu"]
    assert second_model.main(["train", "--out", str(tmp_path), "--minutes", "0.05", *size]) == 0
    curve = json.loads((tmp_path / "second_model_training.json").read_text())["curve"]
    assert curve[0]["iteration"] == 1
    weights = tmp_path / "second_model.safetensors"
    match = r"edm-8/(plain|affine, widest, 3 4 6 7|identity, widest, 3 4 6 7|plain, 5 steps)$"
    run = ["run", "--model", str(weights), "--pictures", "2", "--seeds", "2", "--calibration", "4", "--match", match]
    assert second_model.main([*run, "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert "all is there" in capsys.readouterr().out
    rows = json.loads((tmp_path / "second_model.json").read_text())["rows"]
    affine, identity = (rows[f"edm-8/{kind}, widest, 3 4 6 7"] for kind in ("affine", "identity"))
    assert [step["step"] for step in affine["calibration"]["steps"]] == [3, 4, 6, 7]
    assert (affine["full"], affine["adaptor"]) == (8, 8)  # two seeds of "judge", a batch each
    assert rows["edm-8/plain"]["macs_per_image"] > affine["macs_per_image"] == identity["macs_per_image"]
    for part, seeds in (("choose", 1), ("judge", 2)):
        assert len(affine["scores"][part]["Fréchet"]) == seeds
        assert affine["scores"][part]["PSNR"][0] > identity["scores"][part]["PSNR"][0]
    earlier = rows.pop("edm-8/plain, 5 steps")
    (tmp_path / "earlier.json").write_text(json.dumps({"runs": [], "rows": rows}))
    more = [*run, "--out", str(tmp_path / "more"), "--resume", str(tmp_path / "earlier.json"), "--device", "cpu"]
    assert second_model.main(more) == 0
    assert "1 of 4 rows to do" in capsys.readouterr().out
    again = json.loads((tmp_path / "more" / "second_model.json").read_text())["rows"]
    assert again["edm-8/plain, 5 steps"]["scores"] == earlier["scores"]
    assert second_model.main(["table", str(tmp_path / "second_model.json")]) == 0
    assert "| affine, widest, 3 4 6 7 " in capsys.readouterr().out
    assert (
        second_model.main(["train", "--out", str(tmp_path / "on"), "--start", str(weights), "--minutes", "0.02", *size])
        == 0
    )


def test_rows_at_the_steps_that_were_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    found = {"steps": 20, "region": "widest", "adaptor steps": [2, 4]}
    path.write_text(json.dumps({"plans": [found, {**found, "steps": 8}], "searches": [found]}), encoding="utf-8")
    monkeypatch.setattr(second_model, "PLANNED", path)
    rows = second_model._planned(20)
    assert {row.at for row in rows} == {(2, 4)}
    assert [row.label.split("widest, ")[1] for row in rows[::3]] == [
        "searched for, 2 adaptor steps",
        "planned, 2 adaptor steps",
    ]
    monkeypatch.setattr(second_model, "PLANNED", tmp_path / "none.json")
    assert second_model._planned(20) == []


def test_a_search_moves_one_full_step() -> None:
    full = frozenset({1, 2, 8})
    moved = list(second_model._moves(full, 8))
    assert set(moved) == {frozenset(one) for one in ({1, 2, 7}, {1, 2, 6}, {1, 3, 8}, {1, 4, 8})}
