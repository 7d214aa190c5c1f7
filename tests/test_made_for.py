"""A saved adaptor brings the schedule that it was made for, and says when it runs at other steps."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import clockwork_hooks as ch
from clockwork_hooks import Schedule
from clockwork_hooks.diffusers import wrap_pipeline
from tests.small_unet import Tiny


def sampler(unet: torch.nn.Module, steps: int) -> Any:
    def generate(count: int) -> torch.Tensor:
        x = torch.randn(count, 2, 16, 16, generator=torch.Generator().manual_seed(0))
        for k in range(steps):
            x = x - 0.1 * unet(x, 900 * (steps - k) / steps)
        return x

    return generate


@pytest.fixture
def unet() -> torch.nn.Module:
    torch.manual_seed(0)
    return Tiny().eval()


def adaptor(unet: torch.nn.Module, **schedule: Any) -> ch.CalibratedAdaptor:
    return ch.calibrate(unet, sampler(unet, 8), [4], kind="affine", **schedule)


def test_the_schedule_comes_with_the_adaptor(unet: torch.nn.Module, tmp_path: Path) -> None:
    adaptor(unet, schedule={3, 4, 6, 7}).save_pretrained(tmp_path)
    with ch.wrap(unet, tmp_path) as cw, torch.no_grad(), cw.trajectory(steps=8):
        assert cw.schedule == Schedule.at({3, 4, 6, 7})
        sampler(unet, 8)(4)
        assert cw.stats.adaptor_passes == 4
    with ch.wrap(unet, adaptor(unet)) as cw:
        assert cw.schedule == Schedule.every(2)  # it was made for any
    with ch.wrap(unet, adaptor(unet, clock=2), schedule={2, 4, 6, 8}) as cw:
        assert cw.schedule == Schedule.at({2, 4, 6, 8})  # the same steps, in other words


@pytest.mark.parametrize("options", [{"clock": 2}, {"schedule": {3, 4}}, {"schedule": Schedule.adaptive(0.1)}])
def test_another_schedule_is_told(unet: torch.nn.Module, options: dict[str, Any]) -> None:
    calibrated = adaptor(unet, schedule={3, 4, 6, 7})
    with pytest.warns(ch.OtherStepsWarning, match=r"made for at\(\[3, 4, 6, 7\]\) of 8 steps") as caught:
        ch.wrap(unet, calibrated, **options).remove()
    assert caught[0].filename == __file__


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:a calibrated adaptor works at the times that it was calibrated at")
@pytest.mark.parametrize(("declared", "steps"), [(12, 12), (None, 9), (4, 4)])
def test_another_number_of_steps_is_told_once(unet: torch.nn.Module, declared: int | None, steps: int) -> None:
    calibrated = adaptor(unet, schedule=Schedule.every(2, first_full=2))
    with ch.wrap(unet, calibrated) as cw:
        with pytest.warns(ch.OtherStepsWarning, match="made for 8 steps"), cw.trajectory(steps=declared):
            sampler(unet, steps)(4)
        with warnings.catch_warnings(), cw.trajectory(steps=declared):
            warnings.simplefilter("error", ch.OtherStepsWarning)
            sampler(unet, steps)(4)


@torch.no_grad()
def test_what_is_for_any_schedule_says_nothing(unet: torch.nn.Module) -> None:
    with ch.wrap(unet, adaptor(unet)) as cw, cw.trajectory(steps=12):
        sampler(unet, 12)(4)
        assert cw.stats.adaptor_passes == 6


def test_a_schedule_that_counts_from_the_end_is_calibrated_for_the_steps_that_it_means(unet: torch.nn.Module) -> None:
    for schedule, steps in (
        (Schedule.spread(2), [3, 4, 6, 7]),
        (Schedule.every(2, last_full=1), [2, 4, 6]),
    ):
        calibrated = adaptor(unet, schedule=schedule)
        assert [step.step for step in calibrated.report.steps] == steps
        with ch.wrap(unet, calibrated) as cw:
            assert cw.schedule == Schedule.at(steps)


def letters(cw: ch.ClockworkWrapper, unet: torch.nn.Module, steps: int) -> str:
    """One letter a step of a loop that says nothing of how many it takes."""
    counts = [cw.stats.adaptor_passes]
    watched = unet.register_forward_hook(lambda *_: counts.append(cw.stats.adaptor_passes))
    with cw.trajectory():
        sampler(unet, steps)(4)
    watched.remove()
    return " ".join("A" if after > before else "F" for before, after in itertools.pairwise(counts))


@torch.no_grad()
def test_the_adaptor_knows_how_many_steps_a_loop_of_ones_own_takes(unet: torch.nn.Module) -> None:
    """A schedule that depends on it is that of the steps that the adaptor was made for; longer runs are told."""
    calibrated = adaptor(unet, schedule=Schedule.early(2))
    with ch.wrap(unet, calibrated, schedule=Schedule.early(2)) as cw:
        for _ in range(2):
            assert letters(cw, unet, 8) == Schedule.early(2).preview(8) != Schedule.every(2).preview(8)
        with pytest.warns(ch.OtherStepsWarning) as caught:
            assert letters(cw, unet, 12) == f"{Schedule.early(2).preview(8)} F A F A"
    assert sum("made for 8 steps, and this run has 10 or more" in str(one.message) for one in caught) == 1


@torch.no_grad()
def test_a_schedule_that_nobody_tells_the_number_of_steps_says_so_once(unet: torch.nn.Module) -> None:
    said = r"has to be known\n  schedule: early\(2\)\n(.*\n)+.*Schedule.at\(Schedule.early\(2\).adaptor_steps\(20\)\)"
    with ch.wrap(unet, schedule=Schedule.early(2)) as cw:
        with pytest.warns(ch.OtherStepsWarning, match=said) as caught:
            letters(cw, unet, 8)
        assert caught[0].filename == __file__
        letters(cw, unet, 8)
    with ch.wrap(unet, schedule=Schedule.early(2)) as cw, cw.trajectory(steps=8):
        sampler(unet, 8)(4)


@torch.no_grad()
def test_steps_that_a_run_does_not_have_are_told_once(unet: torch.nn.Module) -> None:
    """Where the number of steps is known; an adaptor that was made for a number tells of that alone."""
    with ch.wrap(unet, schedule={2, 4, 30}) as cw:
        letters(cw, unet, 20)  # who has not said how many there are may go on
        with pytest.warns(ch.OtherStepsWarning, match=r"at\(\[2, 4, 30\]\)\n  steps of this run: 20\n"):
            run(cw, unet, 20)
        run(cw, unet, 20)
    with ch.wrap(unet, schedule={2, 4, 20}) as cw:
        run(cw, unet, 20)
    with ch.wrap(unet, adaptor(unet, schedule={2, 4, 8})) as cw:
        with pytest.warns(ch.OtherStepsWarning, match="made for 8 steps") as caught:
            run(cw, unet, 6)
        assert len(caught) == 1


def run(cw: ch.ClockworkWrapper, unet: torch.nn.Module, steps: int) -> None:
    """A loop that says how many steps it takes."""
    with cw.trajectory(steps=steps):
        sampler(unet, steps)(4)


def test_training_asks_for_steps_that_are_named(unet: torch.nn.Module) -> None:
    with pytest.raises(ch.ArgumentError, match=r"adaptor_steps\(8\)"):
        ch.distill(unet, "resnet", lambda batch: sampler(unet, 8)(len(batch)), prompts=[4], schedule="spread(2)")


def trained(unet: torch.nn.Module, folder: Path, **schedule: Any) -> None:
    def generate(batch: list[Any], seed: int) -> None:
        x = torch.randn(len(batch), 2, 16, 16, generator=torch.Generator().manual_seed(seed))
        for k in range(8):
            x = x - 0.1 * unet(x, 900 * (8 - k) / 8)

    ch.distill(
        unet, "resnet", generate, prompts=[0], batch=1, trajectories=2, folder=folder, progress=False, **schedule
    )


@pytest.mark.parametrize(
    ("clock", "said"), [(4, r"made for every\(4\) of 8 steps"), ((3, 4), r"every\(3\) or every\(4\) of 8 steps")]
)
def test_a_trained_adaptor_at_another_clock_is_told(
    unet: torch.nn.Module, tmp_path: Path, clock: Any, said: str
) -> None:
    """Also of several clocks, each of which is its own; and in another number of steps."""
    trained(unet, tmp_path, clock=clock)
    with pytest.warns(ch.OtherStepsWarning, match=said):
        ch.wrap(unet, tmp_path, clock=2).remove()
    with ch.wrap(unet, tmp_path, clock=4) as cw, torch.no_grad():
        with cw.trajectory(steps=8):
            sampler(unet, 8)(4)
        with pytest.warns(ch.OtherStepsWarning, match="made for 8 steps"), cw.trajectory(steps=12):
            sampler(unet, 12)(4)
    if clock == 4:
        with ch.wrap(unet, tmp_path) as cw:
            assert cw.schedule == Schedule.every(4)  # left out, it brings its own
    with wrap_pipeline(SimpleNamespace(unet=type("TinyUNet", (Tiny,), {})()), str(tmp_path), clock=4) as pipe:
        assert pipe.wrappers["unet"].schedule == Schedule.every(4)  # not spread(4), for which it was not trained
