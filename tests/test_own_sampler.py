"""The three analyses on a UNet and a sampler of one's own: one dimension, Heun's method over EDM sigmas."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clockwork_hooks as ch
from clockwork_hooks.cli import main

STEPS = 9


class Block(nn.Module):
    def __init__(self, inside, outside):
        super().__init__()
        self.one, self.two = nn.Conv1d(inside, outside, 5, padding=2), nn.Conv1d(outside, outside, 5, padding=2)
        self.embed, self.skip, self.norm = (
            nn.Linear(8, outside),
            nn.Conv1d(inside, outside, 1),
            nn.GroupNorm(4, outside),
        )

    def forward(self, x, emb):
        return self.skip(x) + self.two(F.silu(self.norm(self.one(x)) + self.embed(emb)[:, :, None]))


class Wave(nn.Module):
    def __init__(self):
        super().__init__()
        self.inn, self.out = nn.Conv1d(2, 8, 3, padding=1), nn.Conv1d(8, 2, 3, padding=1)
        self.d0, self.d1, self.mid = Block(8, 8), Block(8, 16), Block(16, 32)
        self.u1, self.u0, self.dec = Block(48, 16), Block(24, 8), nn.ConvTranspose1d(16, 16, 4, 2, 1)

    def forward(self, noisy, sigma, *, cond):
        rates = torch.tensor([1.0, 4.0, 16.0, 64.0])
        emb = torch.cat([(sigma[:, None].log() / 4 * rates).sin(), (sigma[:, None].log() / 4 * rates).cos()], 1) + cond
        a = self.d0(self.inn(noisy), emb)
        b = self.d1(F.avg_pool1d(a, 2), emb)
        c = self.u1(torch.cat([F.interpolate(self.mid(F.max_pool1d(b, 2), emb), scale_factor=2), b], 1), emb)
        return self.out(self.u0(torch.cat([self.dec(c), a], 1), emb))


def build():
    """The UNet, Heun's second-order sampler (Karras et al. 2022, Algorithm 1 without churn), and two conditions."""
    torch.manual_seed(0)
    net = Wave().eval()
    ramp = torch.linspace(0, 1, STEPS)
    sigmas = torch.cat([(80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, torch.zeros(1)])

    def denoise(x, sigma, cond):
        scale = 1 / (1 + sigma**2).sqrt()
        return scale**2 * x + sigma * scale * net(scale * x, sigma.expand(len(x)), cond=cond)

    def generate(cond, seed):
        x = 80 * torch.randn(len(cond), 2, 64, generator=torch.Generator().manual_seed(seed))
        for now, then in itertools.pairwise(sigmas):
            slope = (x - denoise(x, now, cond)) / now
            other = x + (then - now) * slope
            if then > 0:
                slope = (slope + (other - denoise(other, then, cond)) / then) / 2
            x = x + (then - now) * slope
        return x

    return net, generate, [torch.randn(2, 8, generator=torch.Generator().manual_seed(1))]


def test_robustness():
    net, generate, conditions = build()
    robustness = ch.measure_robustness(net, generate, conditions, maps=["first", "bottleneck 16"], starts=(1, STEPS))
    assert all(first > last > 0 for first, last in robustness.distances.values())


def test_steps_that_are_full_whatever_the_schedule_says_are_not_planned():
    """Heun's third step: the second had one call more than the first, so what follows is not placed for sure yet."""
    net, generate, conditions = build()
    drift = ch.measure_drift(net, generate, conditions, clocks=(2,))
    assert all(change > 0 for changes in drift.changes.values() for change in changes[1:])
    assert [step for step, off in enumerate(next(iter(drift.errors.values()))[0], 1) if off is None] == [1, 3]
    regions = [ch.find_region(net, torch.zeros(2, 2, 64), torch.ones(2), cond=conditions[0])]
    plan = ch.plan(net, generate, conditions, regions=regions, min_saving=0.3, clocks=(2,), probes=6)
    planned = [option for option in plan.options if option.kind == "planned"]
    assert all(3 not in option.steps and option.predicted > 0 for option in planned)
    assert plan.chosen.kind == "planned"
    assert plan.chosen.measured == pytest.approx(plan.chosen.predicted, rel=0.5)


def test_the_command_line_takes_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = [
        "plan",
        "tests.test_own_sampler:build",
        "--max-error",
        "0.9",
        "--clock",
        "2",
        "--probes",
        "2",
        "--adaptive",
    ]
    assert main([*words, "--weigh", "ms", "--adaptor", "identity", "--out", str(tmp_path)]) == 0, (
        capsys.readouterr().err
    )
    data = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert data["weigh"] == "ms"
    kinds = {option["kind"] for option in data["options"]}
    assert {kind for kind in kinds if not kind.startswith("rule ")} == {"planned", "clock 2", "adaptive"}
    assert main(["drift", "tests.test_own_sampler:build", "--adaptor", "no/such/folder", "--out", str(tmp_path)]) == 2
    assert "no/such/folder" in capsys.readouterr().err
    with pytest.raises(ch.ArgumentError):
        ch.Plan.from_json((tmp_path / "plan.md").read_text(encoding="utf-8"))
