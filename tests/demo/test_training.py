from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from clockwork_hooks.demo.evaluate import evaluate
from clockwork_hooks.demo.model import DemoModel, load_demo
from clockwork_hooks.demo.pool import ScenePool
from clockwork_hooks.demo.train import main
from clockwork_hooks.demo.train_generator import Options, Trainer
from clockwork_hooks.demo.weights import save_half, write_json

TINY = Options(device="cpu", batch=2, pool=32)


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
    start = [p.detach().clone() for p in trainer.parameters]
    trainer.prepare(pool)
    for _ in range(2):
        trainer.step(0.0)
    assert all(torch.isfinite(p).all() for p in trainer.parameters)
    assert any(not torch.equal(p, q) for p, q in zip(trainer.parameters, start, strict=True))
    trainer.save(tmp_path / "checkpoint")
    resumed = Trainer(TINY)
    resumed.load(tmp_path / "checkpoint")
    assert resumed.iteration == 2
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters, trainer.parameters, strict=True))
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(resumed.first, trainer.first, strict=True))

    weights = tmp_path / "weights"
    resumed.export(weights)
    save_half(model.classifier, weights / "classifier" / "model.safetensors")
    write_json(weights / "training.json", {})
    assert load_demo(weights=weights).unet.config.block_out_channels == [48, 128, 128]


def test_an_update_is_adamw() -> None:
    """The hand-written update (for the CUDA graph) against torch's, gradients below the clipping norm."""
    trainer = Trainer(TINY)
    parameters = [p.detach().clone().requires_grad_() for p in trainer.parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
    trainer.rate.fill_(1e-3)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for ours, theirs in zip(trainer.parameters, parameters, strict=True):
            assert ours.grad is not None
            ours.grad.copy_(1e-5 * torch.randn(ours.shape, generator=generator))
            theirs.grad = ours.grad.clone()
        trainer.update()
        optimizer.step()
    for ours, theirs in zip(trainer.parameters, parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")  # diffusers'
def test_evaluation_measures(model: DemoModel) -> None:
    found = evaluate(model, steps=[2], count=4, guidance=1.5, batch=4)
    assert found["rendered"]["total"] >= 0.97
    assert found["steps_2"].keys() == found["rendered"].keys()
    json.dumps(found)
