"""`evaluate`: the same noise for every variant, honest costs, and results that survive a file."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import clockwork_hooks as ch
from clockwork_hooks.analysis.evaluation import Evaluation, Score, Variant
from clockwork_hooks.analysis.flops import counting
from clockwork_hooks.errors import ArgumentError, WrapError
from clockwork_hooks.metrics import Paired
from tests.small_unet import Tiny
from tests.snapshot import snapshot

BATCHES = [[0.5, -0.5], [0.1, 0.2]]


def sampler(unet: Tiny, steps: int = 6) -> Any:
    def generate(batch: list[float], seed: int) -> Tensor:
        noise = torch.randn(len(batch), 2, 16, 16, generator=torch.Generator().manual_seed(seed))
        conditions = torch.tensor(batch)[:, None].expand(-1, 3).contiguous()
        for t in torch.linspace(99, 0, steps):
            noise = noise - unet(noise, t, conditions) / steps
        return torch.cat([noise, noise.mean(1, keepdim=True)], 1).sigmoid()

    return generate


def run(unet: Tiny, variants: dict[str, Any], **options: Any) -> Evaluation:
    quiet = Console(quiet=True)
    return ch.evaluate(unet, sampler(unet), BATCHES, variants, console=quiet, **options)


def test_variants_against_plain() -> None:
    unet = Tiny()
    before = snapshot(unet)
    result = run(unet, {"clock 2": {"clock": 2}, "clock 3": {"clock": 3}}, seeds=(0, 1))
    assert snapshot(unet) == before
    assert [row.name for row in result.rows] == ["plain", "clock 2", "clock 3"]
    assert result["plain"].scores == {}
    assert [(row.full_passes, row.adaptor_passes) for row in result.rows[1:]] == [(12, 12), (8, 16)]
    assert result["clock 2"].scores["relative L2"].mean < result["clock 3"].scores["relative L2"].mean
    assert result["clock 3"].macs_per_image < result["clock 2"].macs_per_image < result["plain"].macs_per_image
    assert all(row.images == 4 and row.seconds_per_image > 0 for row in result.rows)
    assert len(result["clock 2"].scores["PSNR"].values) == 2


@pytest.mark.parametrize("options", [{"level": 1}, {"share": 0.3}, {"clocks": {1: 2}}, {"clock": 2}], ids=str)
def test_a_region_that_the_options_choose_is_found_once_for_all_batches(options: dict[str, Any]) -> None:
    row = run(Tiny(), {"ours": options}, seeds=(0, 1))["ours"]
    assert (row.full_passes, row.adaptor_passes) == (12, 12)


def test_a_schedule_that_counts_from_the_end_knows_the_steps_of_the_sampler() -> None:
    """It was that of a plain clock: of `early(2)` in 12 steps the second and third are full."""
    unet, schedule = Tiny(), ch.Schedule.early(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variants = {"by rule": {"schedule": schedule}, "by name": {"schedule": schedule.adaptor_steps(12)}}
        result = ch.evaluate(unet, sampler(unet, 12), BATCHES, variants, seeds=(0,), console=Console(quiet=True))
    rule, name = result["by rule"], result["by name"]
    assert rule.scores == name.scores
    assert (rule.full_passes, rule.adaptor_passes) == (name.full_passes, name.adaptor_passes) == (12, 12)


def test_a_sampler_of_another_unet_is_refused() -> None:
    """A copy, or a compiled one: each variant would have been the plain one."""
    unet, other = Tiny(), Tiny()
    with pytest.raises(ArgumentError, match="calls of the UNet: 0"):
        ch.evaluate(unet, sampler(other), BATCHES, {"clock 2": {"clock": 2}}, seeds=(0,))
    with pytest.raises(ArgumentError, match="calls of the UNet: 0"):
        run(unet, {"clock 2": Variant(wrap={"clock": 2}, generate=sampler(other))}, seeds=(0,))
    assert run(unet, {"another model": Variant(generate=sampler(other))}, seeds=(0,))["another model"].images == 4
    assert "forward" not in vars(unet)


def test_an_oracle_is_exactly_plain() -> None:
    """What is wrapped but runs full passes only gives the plain pictures: 100 dB, from the very same noise."""
    result = run(Tiny(), {"all full": {"schedule": lambda step: False}})
    assert result["all full"].scores["PSNR"].values == (100.0,) * 3
    assert result["all full"].macs_per_image == result["plain"].macs_per_image


def test_fewer_steps_and_costs_by_hand() -> None:
    unet = Tiny()
    result = run(unet, {"3 steps": Variant(generate=sampler(unet, 3)), "clock 2": {"clock": 2}}, seeds=(0,))
    assert result["3 steps"].macs_per_image * 2 == result["plain"].macs_per_image
    with counting(unet) as calls:
        sampler(unet)(BATCHES[0], 0)
    assert sum(calls) // 2 == result["plain"].macs_per_image
    region = ch.find_region(unet, torch.zeros(2, 2, 16, 16), torch.tensor(1.0), torch.zeros(2, 3))
    assert result["clock 2"].macs_per_image == (6 * region.full_macs - 3 * region.macs) // 2


def test_what_a_peer_skips_is_counted_as_skipped() -> None:
    unet = Tiny()

    def cached(batch: list[float], seed: int) -> Tensor:
        """A peer in the form of one: the body answers from a cache every second call."""
        forward, cache = unet.body.forward, []

        def skipping(x: Tensor) -> Tensor:
            cache.append(cache[-1] if len(cache) % 2 else forward(x))
            return cache[-1]

        unet.body.forward = skipping  # type: ignore[method-assign]
        try:
            return sampler(unet)(batch, seed)
        finally:
            del unet.body.forward

    result = run(unet, {"peer": Variant(generate=cached)}, seeds=(0,))
    body = 3 * 8 * 8 * 16 * 16 * 9  # three calls on 8×8 positions
    assert result["plain"].macs_per_image - result["peer"].macs_per_image == body


def test_json_round_trip_and_table() -> None:
    result = run(Tiny(), {"clock 2": {"clock": 2}}, seeds=(0, 1))
    again = Evaluation.from_json(result.to_json())
    assert again == result
    assert again.table() == result.table()
    data = json.loads(result.to_json())
    score = data["rows"][1]["scores"]["PSNR"]
    assert score["mean"] == pytest.approx(sum(score["values"]) / 2)
    text = result.to_markdown()
    assert "PSNR ↑" in text
    assert "relative L2 ↓" in text
    assert f"± {result['clock 2'].scores['PSNR'].spread:.2f}" in text


def test_score() -> None:
    score = Score((1.0, 2.0, 3.0))
    assert (score.mean, score.spread) == (2.0, 1.0)
    assert Score((1.0,)).spread is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seeds": ()}, "seeds: 0"),
        ({"seeds": (0, 1, 0)}, r"seeds: \[0, 1, 0\]"),
        ({"variants": {"plain": {}}}, "always there"),
        ({"variants": {"clock 2": 2}}, "variants are a name and the options"),
        ({"variants": ["clock 2"]}, "variants are a name and the options"),
        ({"generate": lambda batch, seed: torch.zeros(3)}, "returned: "),
        ({"conditions": []}, "batches: 0"),
    ],
)
def test_bad_arguments(change: dict[str, Any], said: str) -> None:
    unet = Tiny()
    arguments = {"generate": sampler(unet), "conditions": BATCHES, "variants": {"a": {"clock": 2}}} | change
    with pytest.raises(ArgumentError, match=said):
        ch.evaluate(unet, **arguments, metrics=[Paired()], console=Console(quiet=True))


def test_a_failing_sampler_leaves_nothing_behind() -> None:
    unet = Tiny()
    before = snapshot(unet)

    def failing(batch: Any, seed: int) -> Tensor:
        unet(torch.zeros(1, 2, 16, 16), torch.tensor(1.0), torch.zeros(1, 3))
        raise RuntimeError("out of memory")

    for variants in ({"a": {"clock": 2}}, {"a": {"clock": 2, "schedule": {2}}}):
        with pytest.raises(RuntimeError, match="out of memory"):
            ch.evaluate(unet, failing, BATCHES, variants, console=Console(quiet=True))
        assert snapshot(unet) == before
    with ch.wrap(unet), pytest.raises(WrapError, match="once"):
        run(unet, {"a": {"clock": 2}})
