from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clockwork_hooks.demo.evaluate import evaluate
from clockwork_hooks.demo.model import DemoModel, load_demo
from clockwork_hooks.demo.train import Options, ScenePool, Trainer, main
from clockwork_hooks.demo.weights import save_half, write_json

TINY = Options(device="cpu", batch=2, pool=32)


def parameters(trainer: Trainer) -> list[Tensor]:
    """Copies of the weights."""
    return [p.detach().clone() for p in trainer.networks.parameters()]


def moments(trainer: Trainer) -> list[dict[str, Tensor]]:
    """The optimizer's state, a weight after the other."""
    return [trainer.optimizer.state[p] for p in trainer.networks.parameters()]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    for word in ("classifier", "generator", "evaluate", "--resume"):
        assert word in shown


def test_the_notes_that_ship_say_how_to_retrain(model: DemoModel) -> None:
    for part in ("classifier", "generator"):
        notes = model.info[part]
        assert notes["command"].startswith(f"python -m clockwork_hooks.demo.train {part}")
        assert {"seed", "device", "versions"} <= notes.keys()
    assert model.info["results"]["steps_8"]["attributes right"] >= 0.9
    assert model.info["results"]["steps_50"]["frechet"] < model.info["results"]["steps_8"]["frechet"]


def test_a_pool_refreshes_its_oldest_scenes() -> None:
    pool = ScenePool.draw(32, 0, "cpu")
    before = pool.images.clone()
    pool.refresh(8)
    changed = (pool.images != before).flatten(1).any(1)
    assert changed[:8].all()
    assert not changed[8:].any()


def test_training_goes_on_from_its_checkpoint_and_ships(tmp_path: Path, model: DemoModel) -> None:
    trainer, pool = Trainer(TINY), ScenePool.draw(TINY.pool, 0, "cpu")
    start = parameters(trainer)
    trainer.prepare(pool)
    for _ in range(2):
        trainer.step(0.0)
    assert all(torch.isfinite(p).all() for p in parameters(trainer))
    assert any(not torch.equal(p, q) for p, q in zip(parameters(trainer), start, strict=True))
    trainer.save(tmp_path / "checkpoint")
    resumed = Trainer(TINY)
    resumed.load(tmp_path / "checkpoint")
    assert (resumed.iteration, int(resumed.average.n_averaged)) == (2, 2)
    assert all(torch.equal(p, q) for p, q in zip(parameters(resumed), parameters(trainer), strict=True))
    for ours, theirs in zip(moments(resumed), moments(trainer), strict=True):
        assert ours["step"] == theirs["step"] == 2
        assert torch.equal(ours["exp_avg"], theirs["exp_avg"].bfloat16())

    weights = tmp_path / "weights"
    resumed.export(weights)
    save_half(model.classifier, weights / "classifier" / "model.safetensors")
    write_json(weights / "training.json", {})
    assert load_demo(weights=weights).unet.config.block_out_channels == [48, 128, 128]


def test_a_step_is_adamw_of_clipped_gradients_and_the_average_follows() -> None:
    """By hand, in float64: the first update moves each weight by the rate, whatever the size of its gradient."""
    trainer = Trainer(TINY)
    pool = ScenePool.draw(TINY.pool, 0, "cpu")
    trainer.prepare(pool)
    seen = [parameters(trainer)]
    for k in range(3):
        trainer.step(0.0)
        seen.append(parameters(trainer))
        rate = TINY.rate * (k + 1) / 500
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in trainer.networks.parameters()))
        assert norm <= 1 + 1e-4
        for state, p, before, after in zip(
            moments(trainer), trainer.networks.parameters(), seen[-2], seen[-1], strict=True
        ):
            first, second = state["exp_avg"].double(), state["exp_avg_sq"].double()
            scaled = first / (1 - 0.9 ** (k + 1)) / ((second / (1 - 0.99 ** (k + 1))).sqrt() + 1e-8)
            wanted = before.double() * (1 - 0.01 * rate) - rate * scaled
            torch.testing.assert_close(after.double(), wanted, rtol=1e-6, atol=1e-7)
            if k == 0:
                torch.testing.assert_close(first, 0.1 * p.grad.double(), rtol=1e-5, atol=1e-12)
    mean = seen[1]
    for k in (1, 2):  # the first average is the weights themselves
        mean = [p.lerp(q, 1 - (1 + k) / (10 + k)) for p, q in zip(mean, seen[k + 1], strict=True)]
    for ours, theirs in zip(trainer.average.module.parameters(), mean, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")  # diffusers'
def test_evaluation_measures(model: DemoModel) -> None:
    report = evaluate(model, steps=[2], count=4, guidance=1.5, batch=4)
    assert report["rendered"]["total"] >= 0.97
    assert report["steps_2"].keys() == report["rendered"].keys()
    json.dumps(report)
