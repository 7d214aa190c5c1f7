"""`ResidualAdaptor`: training starts where the closed form ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import clockwork_hooks as ch
from clockwork_hooks.adaptors import ResidualAdaptor
from clockwork_hooks.training import distill
from tests.test_calibration import TIMES, Blocks, sampler

SCHEDULE = {2, 4, 6}


def started() -> tuple[Blocks, ch.CalibratedAdaptor, ResidualAdaptor]:
    """What the region emits is not linear in what flows in: the closed form leaves something to learn."""
    torch.manual_seed(1)
    unet = Blocks(gain=lambda t: 1 + t / 500, mix=1.0).requires_grad_(False)
    generate = sampler(unet)
    start = ch.calibrate(unet, generate, [(8, 2.0)], guidance=2.0, schedule=SCHEDULE, kind="affine")
    region = ch.find_region(unet, torch.zeros(16, 2, 8, 8), 1.0, torch.zeros(16, 3))
    return unet, start, ResidualAdaptor.of(start, region, width=16)


def drawn(unet: Blocks, adaptor: object) -> torch.Tensor:
    with torch.no_grad(), ch.wrap(unet, adaptor, schedule=SCHEDULE) as cw, cw.trajectory():  # type: ignore[arg-type]
        samples: torch.Tensor = sampler(unet)((8, 2.0), seed=5)
        with cw.trajectory():
            samples = sampler(unet)((8, 2.0), seed=6)
        assert cw.stats.adaptor_passes >= len(SCHEDULE)
    return samples


@pytest.mark.filterwarnings("ignore:an adaptor has to take fewer MACs:clockwork_hooks.NoEffectWarning")
def test_a_fresh_one_is_the_calibrated_one(tmp_path: Path) -> None:
    unet, start, adaptor = started()
    assert adaptor.needs == {"entry_cached", "position", "position_cached", "prepared"}
    assert torch.equal(drawn(unet, adaptor), drawn(unet, start))
    adaptor.save_pretrained(tmp_path)
    assert torch.equal(drawn(unet, tmp_path), drawn(unet, start))


def test_training_begins_at_the_closed_form_and_lowers_its_loss() -> None:
    """In seconds, on a CPU; the calibrated part stays what it was."""
    unet, start, adaptor = started()
    before = start.table.detach().clone()
    draw = sampler(unet, [float(t) for t in TIMES])

    def generate(batch: list[int]) -> torch.Tensor:
        samples: torch.Tensor = draw((len(batch), 2.0), seed=int(torch.randint(1 << 30, ())))
        return samples

    options = {"prompts": range(8), "schedule": SCHEDULE, "loss": "feature", "batch": 8, "lr": 3e-3, "progress": False}
    result = distill(unet, adaptor, generate, trajectories=40, seed=0, **options)  # type: ignore[arg-type]
    losses = result.losses
    assert sum(losses[-12:]) < 0.6 * sum(losses[:12])
    assert torch.equal(adaptor.start.table, before)
    region = ch.find_region(unet, torch.zeros(16, 2, 8, 8), 1.0, torch.zeros(16, 3))
    anew = ch.ScaledResNetAdaptor.for_region(region, width=16)
    first = distill(unet, anew, generate, trajectories=1, seed=0, **options).losses  # type: ignore[arg-type]
    assert losses[0] < 0.5 * first[0]  # which starts at the identity
