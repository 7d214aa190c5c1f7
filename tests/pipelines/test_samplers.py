"""Every scheduler of diffusers: the passes are the schedule's, the samples those of a plain UNet with a hook."""

import pytest
import torch
from torch import Tensor

from benchmarks import samplers
from benchmarks.samplers import PAGE, UNFIT, Row, Sampler, as_model, small_unet
from clockwork_hooks import Schedule
from clockwork_hooks.diffusers import wrap_pipeline
from tests.pipelines.oracle import replay

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' deprecations, numpy's, torchsde's rounding

EXIT = "up_blocks.1"  # of three levels: its upsampler ends the region below the highest
ALL = list(samplers.samplers())


@pytest.fixture(scope="module")
def unet() -> torch.nn.Module:
    model: torch.nn.Module = small_unet()
    return model


@pytest.fixture(scope="module")
def measured(unet: torch.nn.Module) -> list[Row]:
    return samplers.rows()


def test_every_scheduler_is_run_or_refused() -> None:
    """None that a new version of diffusers brings goes by unseen."""
    run = {sampler.kind for sampler in ALL}
    assert run | set(UNFIT) >= set(samplers.scheduler_names())
    assert not run & set(UNFIT)
    assert len(ALL) >= 40


def test_passes_are_the_schedules_or_the_table_says_why(measured: list[Row]) -> None:
    for row in measured:
        expected = row.sampler.expected()
        assert (row.plain == expected) == (not row.sampler.undeclared), row
        assert (row.pipeline == expected) == (not row.sampler.by_time), row
        assert row.declared == expected, row
        # KarrasVe's times go up and down: no trend shows that they are one run, so it has to be declared; and of few
        # steps those that two evaluations share show it late
        least = {"KarrasVe": 0.0, "ScoreSdeVe": 0.25}.get(row.sampler.name, 0.33)
        for letters in (row.plain, row.pipeline):
            assert letters.count("A") >= least * sum(row.sampler.evaluations), row


def test_the_page_is_what_a_rerun_writes(measured: list[Row]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    if samplers.version() not in text:
        pytest.skip(f"the page was measured with another version than {samplers.version()}")
    assert samplers.page(text, measured) == text


def passes(sampler: Sampler) -> list[tuple[str, int]]:
    return [(letter, slot) for group in sampler.expected().split() for slot, letter in enumerate(group)]


LIKE_DDIM = (1,) * samplers.STEPS  # one evaluation a step: a few of these in every run, all of them in `make test-all`
OFTEN = ("DDIM", "DDIMInverse", "DPMSolverMultistep", "EulerAncestral", "DDPMWuerstchen", "LCM", "FlowMatchEuler")


def marked(sampler: Sampler) -> object:
    slow = sampler.evaluations == LIKE_DDIM and sampler.name not in OFTEN
    return pytest.param(sampler, id=sampler.name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("sampler", [marked(one) for one in ALL if not one.by_time])
def test_samples_are_those_of_a_hook(unet: torch.nn.Module, sampler: Sampler) -> None:
    def run() -> Tensor:
        return sampler.run(as_model(unet), sampler.scheduler())

    expected = replay(unet, EXIT, passes(sampler), run)
    with torch.no_grad(), wrap_pipeline(Holder(unet, sampler), schedule=Schedule.every(2)) as cw:
        samples = sampler.run(as_model(unet), cw.pipe.scheduler)
        assert torch.equal(samples, expected)
        assert torch.equal(sampler.run(as_model(unet), cw.pipe.scheduler), expected)  # set_timesteps begins anew


class Holder:
    def __init__(self, unet: torch.nn.Module, sampler: Sampler) -> None:
        self.unet, self.scheduler = unet, sampler.scheduler()
