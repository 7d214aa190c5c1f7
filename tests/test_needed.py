"""Packages that are not there: who needs them, why they cannot be imported, and how to install them."""

import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import clockwork_hooks as ch
from clockwork_hooks import metrics
from clockwork_hooks.demo.run import demo
from clockwork_hooks.models import load_model
from clockwork_hooks.reports import u_drawing
from clockwork_hooks.reports.plots import Plot
from clockwork_hooks.training.pipeline import pipeline_arguments
from tests.small_unet import Tiny
from tests.training_parts import Small, sampler


def train(folder: Path, **options: Any) -> None:
    unet = Tiny()
    ch.distill(unet, Small(), sampler(unet), prompts=range(4), batch=2, trajectories=1, folder=folder, **options)


USES: list[tuple[str, Any, type[ch.ClockworkError], str]] = [
    ("accelerate", lambda folder: train(folder), ch.ArgumentError, "[train]"),
    ("tensorboard", lambda folder: train(folder, tracker="tensorboard"), ch.ArgumentError, "[train]"),
    ("diffusers", lambda folder: load_model("sd15"), ch.ModelNotFoundError, "[diffusers]"),
    ("transformers", lambda folder: pipeline_arguments(path=folder, prompts=["a"]), ch.ArgumentError, "[diffusers]"),
    ("PIL", lambda folder: demo(out=folder), ch.DemoError, "[demo]"),
    (
        "torchmetrics",
        lambda folder: metrics.Paired().observe(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16), None),
        ch.ArgumentError,
        "[evaluate]",
    ),
    ("torch_fidelity", lambda folder: metrics.fid([]), ch.ArgumentError, '"torch-fidelity"'),
    ("matplotlib", lambda folder: Plot(Mock(), "a plot").save(folder / "plot.pdf"), ch.ArgumentError, "[plot]"),
    ("matplotlib", lambda folder: Plot(Mock(), "a plot").to_svg(), ch.ArgumentError, "[plot]"),
    (
        "matplotlib",
        lambda folder: u_drawing.save(u_drawing.Drawing("a U"), folder / "u.png"),
        ch.ArgumentError,
        "[plot]",
    ),
]


@pytest.mark.parametrize(("package", "use", "error", "install"), USES)
def test_a_package_that_is_missing_is_named(
    package: str,
    use: Any,
    error: type[ch.ClockworkError],
    install: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # importing it raises now
    with pytest.raises(error) as caught:
        use(tmp_path)
    assert f"import {package}: " in str(caught.value)
    assert install in caught.value.do
    assert isinstance(caught.value.__cause__, ImportError)
