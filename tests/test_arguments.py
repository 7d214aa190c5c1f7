"""Every function that samples takes generate(batch, seed) and generate(batch), and names the option that was meant."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import clockwork_hooks as ch
from clockwork_hooks._generate import told_apart, with_seed
from clockwork_hooks.diffusers import wrap_pipeline
from tests.small_unet import Tiny


class TinyUNet(Tiny):
    """One that takes no more than it names."""

    def forward(self, x: torch.Tensor, t: Any) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, t)


@pytest.fixture
def unet() -> torch.nn.Module:
    return TinyUNet()


def loop(unet: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    for t in (900.0, 700.0, 500.0, 300.0):
        x = x - 0.1 * unet(x, t)
    return x


class Mean:
    """A metric that takes whatever is sampled."""

    better: ClassVar[dict[str, str]] = {"mean": "lower"}

    def observe(self, images: torch.Tensor, plain: torch.Tensor | None, batch: Any) -> torch.Tensor:
        return images.mean((1, 2, 3))

    def score(self, rows: torch.Tensor) -> dict[str, float]:
        return {"mean": float(rows.mean())}


def calibrated(unet: torch.nn.Module, generate: Any, **options: Any) -> Any:
    return ch.calibrate(unet, generate, [2, 2], **{"clock": 2, **options})


def tuned(unet: torch.nn.Module, generate: Any, **options: Any) -> Any:
    with ch.tune(unet, [2, 2], generate=generate, **{"saving": 0.1, **options}) as cw:
        return cw.adaptor


def planned(unet: torch.nn.Module, generate: Any, **options: Any) -> Any:
    return ch.plan(unet, generate, [2], **{"min_saving": 0.1, "clocks": (2,), "probes": 1, **options})


def evaluated(unet: torch.nn.Module, generate: Any, **options: Any) -> Any:
    own = {"metrics": [Mean()], "seeds": (0,)}
    return ch.evaluate(unet, generate, [2], {"clock 2": {"clock": 2}}, **{**own, **options})


def drift(unet: torch.nn.Module, generate: Any, **options: Any) -> Any:
    return ch.measure_drift(unet, generate, [2], **{"clocks": (2,), **options})


def robustness(unet: torch.nn.Module, generate: Any, **options: Any) -> Any:
    return ch.measure_robustness(unet, generate, [2], **{"maps": ("first",), "starts": (2,), **options})


def distilled(unet: torch.nn.Module, generate: Any, **options: Any) -> Any:
    own = {"prompts": [2], "batch": 1, "trajectories": 2, "progress": False}
    return ch.distill(unet, "resnet", generate, **{**own, **options})


NEW_NOISE = (calibrated, tuned, planned, distilled)  # the others compare results of one noise alone


@pytest.mark.parametrize("take", [*NEW_NOISE, evaluated, drift, robustness], ids=lambda take: take.__name__)
@pytest.mark.parametrize("form", ["seed", "second", "batch alone"])
def test_every_function_takes_both_forms_of_generate(unet: torch.nn.Module, take: Any, form: str) -> None:
    drawn: list[float] = []
    seeds: list[int] = []

    def sample(batch: Any, generator: torch.Generator | None = None) -> torch.Tensor:
        x = torch.randn(len(batch) if isinstance(batch, list) else batch, 2, 16, 16, generator=generator)
        drawn.append(float(x.sum()))
        return loop(unet, x)

    def by_name(batch: Any, steps: int = 4, *, seed: int) -> torch.Tensor:
        assert steps == 4
        seeds.append(seed)
        return sample(batch, torch.Generator().manual_seed(seed))

    def second(batch: Any, number: int) -> torch.Tensor:
        return by_name(batch, seed=number)

    def alone(batch: Any, steps: int = 4) -> torch.Tensor:
        assert steps == 4
        return sample(batch)

    before = torch.random.get_rng_state()
    take(unet, {"seed": by_name, "second": second, "batch alone": alone}[form])
    if form != "batch alone":
        assert len(seeds) == len(drawn)
        assert {type(seed) for seed in seeds} == {int}
    if take is not calibrated or form != "batch alone":  # there it goes on with the caller's own numbers
        assert torch.equal(before, torch.random.get_rng_state())
    assert (len(set(drawn)) > 1) == (take in NEW_NOISE)


@pytest.mark.parametrize(
    ("generate", "seeds"),
    [
        (lambda batch, seed=0: seed, (5, 6)),
        (lambda batch, *rest: rest[0], (5, 6)),
        (lambda *run: run[1], (5, 6)),
        (lambda batch, height=64, width=64: height, (64, 64)),
        (lambda batch, **options: len(options), (0, 0)),
        (math.pow, (32, 64)),
    ],
)
def test_where_the_seed_goes(generate: Callable[..., Any], seeds: tuple[int, int]) -> None:
    assert (with_seed(generate)(2, 5), with_seed(generate)(2, 6)) == seeds


def twice(source: str) -> list[Any]:
    """What a program makes, in two runs of it."""
    made = []
    for _ in range(2):
        names: dict[str, Any] = {}
        exec(source, names)
        made.append(names["made"])
    return made


SOLVER = """
import functools, random
import numpy, torch
from diffusers import DDIMScheduler
from PIL import Image
def solver(rate, more=(1, {"a": 2})):
    unet = object()
    def inner(x):
        return None if x else inner(x - rate)
    def generate(batch, seed=0, *, k=3):
        def within(x):
            return x + RATE, unet, inner
        return within(batch) + rate
    return generate
"""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("solver(1)", "solver(2)"),
        ("functools.partial(solver(1), k=2)", "functools.partial(solver(1), k=4)"),
        ("lambda t: -t", "lambda t: t"),
        ("{'image': Image.new('RGB', (8, 8), 'red')}", "{'image': Image.new('RGB', (8, 8), 'blue')}"),
        ("Image.new('L', (4, 8))", "Image.new('L', (8, 4))"),
        ("[torch.zeros(5000)]", "[torch.zeros(5000).index_fill_(0, torch.tensor(2500), 1)]"),
        ("torch.ones(2, dtype=torch.bfloat16)", "torch.zeros(2, dtype=torch.bfloat16)"),
        ("numpy.zeros(5000)", "numpy.eye(1, 5000, 2500)[0]"),
        ("DDIMScheduler()", "DDIMScheduler(beta_end=0.03)"),
        ("{'steps': 20, 'strength': 0.5}", "{'steps': 20, 'strength': 0.6}"),
        ("{'a', 'b', 'c'}", "{'a', 'b', 'd'}"),
        ("random.Random(0).random", "None"),
    ],
)
def test_what_tells_options_apart_in_every_process(one: str, other: str) -> None:
    """Pictures and functions have an address in their `repr`, and long tensors have dots there."""
    first, again = twice(f"{SOLVER}made = {one}")
    (changed, _) = twice(f"{SOLVER}made = {other}")
    assert "random.Random" in one or told_apart(first) == told_apart(again)
    assert told_apart(first) != told_apart(changed)


def on_call(function: Any) -> Callable[..., Any]:
    return lambda unet, **options: function(unet, torch.randn(1, 2, 16, 16), 0.5, **options)


def sampling(function: Any) -> Callable[..., Any]:
    return lambda unet, **options: function(unet, lambda batch: loop(unet, torch.randn(2, 2, 16, 16)), **options)


def in_pipeline(unet: torch.nn.Module, /, **options: Any) -> Any:
    return wrap_pipeline(SimpleNamespace(unet=unet), **options)


@pytest.mark.parametrize(
    ("take", "name", "meant"),
    [
        (on_call(ch.find_region), "lvl", "level"),
        (on_call(ch.diagram), "resolutoin", "resolution"),
        (on_call(ch.flops_report), "clok", "clock"),
        (on_call(ch.flops_report), "step", "steps"),
        (on_call(ch.bench), "round", "rounds"),
        (ch.wrap, "clok", "clock"),
        (in_pipeline, "unet", "unets"),
        (in_pipeline, "shedule", "schedule"),
        (sampling(calibrated), "guidence", "guidance"),
        (sampling(tuned), "savings", "saving"),
        (sampling(planned), "region", "regions"),
        (sampling(evaluated), "metric", "metrics"),
        (sampling(drift), "clock", "clocks"),
        (sampling(robustness), "start", "starts"),
        (sampling(distilled), "clok", "clock"),
        (sampling(distilled), "trajectory", "trajectories"),
    ],
)
def test_a_misspelt_option_is_named(unet: torch.nn.Module, take: Any, name: str, meant: str) -> None:
    with pytest.raises(ch.ArgumentError, match=rf"no such option: {name}\n(.|\n)*pass {meant}=(\n|$)"):
        take(unet, **{name: 2})
    assert not unet._forward_pre_hooks
