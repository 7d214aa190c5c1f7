"""What is known before the first run: a call recorded ahead, torch.compile's output, a region of an earlier run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clockwork_hooks as ch
from clockwork_hooks.training.trajectory import TrajectoryRecorder
from tests.oracle import Judge
from tests.small_unet import Tiny
from tests.snapshot import snapshot
from tests.test_nested import Recursive

TIMES = torch.linspace(900, 100, 9)


class Late(Tiny):
    """Its exit is read by nobody else, and it draws noise: what a recording must not use up."""

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        return super().forward(x + 0.01 * torch.randn_like(x), t, c)


def run(cw: Any, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    x, outputs = torch.randn(1, 2, 8, 8), []
    for t in TIMES.clone()[:8]:
        outputs.append(cw(x, t, torch.ones(1, 3)))
        x = x - 0.1 * outputs[-1]
    return outputs


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_first_run_is_like_all_later_ones(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clockwork_hooks.graph.recorder.Recorder.likely_exits", lambda *_, **__: {})
    unet = Late()
    with mode(), ch.wrap(unet, schedule=lambda step: True) as cw:
        run(cw)
        assert cw.stats.reasons["traced"] == 1  # the exit was not among those that were kept
    with ch.wrap(unet, schedule=lambda step: True) as cw:
        random = torch.get_rng_state()
        before = snapshot(unet.stem)
        assert cw.prepare(torch.zeros(1, 2, 8, 8), TIMES[0], torch.zeros(1, 3)) is cw
        assert torch.equal(torch.get_rng_state(), random)
        assert snapshot(unet.stem) == before
        assert cw.stats.full_passes == 0
        assert cw.region is not None
        with mode():
            first, second = run(cw), run(cw)
    assert cw.stats.reasons == {"first step": 2}
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@torch.no_grad()
def test_what_was_prepared_is_judged() -> None:
    judge, random = Judge(Tiny()), torch.Generator().manual_seed(0)
    with ch.wrap(judge.unet) as cw:
        cw.prepare(torch.zeros(1, 2, 8, 8), TIMES[0]).prepare(torch.zeros(2, 2, 8, 8), TIMES[0])
        for batch in (1, 2):
            judge.begin()
            for step, t in enumerate(TIMES.clone()[:8]):
                judge.call(torch.randn(batch, 2, 8, 8, generator=random), t, step=step)
    assert judge.letters == "FAFAFAFA" * 2


class Doubles(Tiny):
    """Writes to its sample."""

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        return super().forward(x.mul_(2), t, c, **more)


@torch.no_grad()
def test_what_is_recorded_apart_leaves_its_arguments() -> None:
    """They were written to twice where a trajectory is recorded: what an adaptor learned from began elsewhere."""
    unet, x, t, c = Doubles(), torch.randn(2, 2, 8, 8), torch.tensor(900.0), torch.randn(2, 3)
    want = unet(x.clone(), t, c)
    with ch.wrap(unet) as cw:
        sample = x.clone()
        cw.prepare(sample, t, c)
        assert torch.equal(sample, x)
        assert torch.equal(unet(sample, t, c), want)
    recorder = TrajectoryRecorder(unet)
    outputs: list[Tensor] = []
    recorder.record(lambda batch: outputs.append(unet(x.clone(), t, c)), None)
    recorder.remove()
    assert torch.equal(outputs[0], want)


def test_prepare_within_a_run_and_after_remove() -> None:
    with torch.no_grad(), ch.wrap(Tiny()) as cw:
        x, times = torch.zeros(1, 2, 8, 8), TIMES.clone()
        cw(x, times[0])
        cw.prepare(torch.zeros(3, 2, 8, 8), times[0])
        cw(x, times[1])
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (1, 1)
    with pytest.raises(ch.WrapError, match="attach"):
        cw.prepare(x, times[0])


def test_nothing_to_skip_is_said_ahead() -> None:
    with ch.wrap(nn.Conv2d(3, 3, 3, padding=1)) as cw, pytest.raises(ch.RegionNotFoundError):
        cw.prepare(torch.zeros(1, 3, 8, 8))


# -- the output of torch.compile ------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_output_of_torch_compile_is_wrapped() -> None:
    """The UNet in it is wrapped and compiled by ourselves; whoever holds either is served; remove() takes all back."""
    plain = Tiny()
    unet = Tiny()
    compiled = torch.compile(unet, backend="eager")
    own = vars(compiled)["forward"]
    judge, random = Judge(unet, plain), torch.Generator().manual_seed(0)
    cw = ch.wrap(compiled)
    assert cw.unet is unet
    assert cw.compiled
    cw.compile(backend="eager")
    for call in (compiled, unet, cw):
        judge.unet = call
        judge.begin()
        for step, t in enumerate(TIMES.clone()[:4]):
            judge.call(torch.randn(1, 2, 16, 16, generator=random), t, step=step)
    assert judge.letters == "FAFA" * 3
    cw.remove()
    assert vars(compiled)["forward"] is own
    assert "forward" not in vars(unet)
    x = torch.randn(1, 2, 16, 16, generator=random)
    assert torch.equal(compiled(x, TIMES[0]), plain(x, TIMES[0]))
    cw.attach()
    assert vars(compiled)["forward"] is not own
    cw.remove()
    assert vars(compiled)["forward"] is own
    torch._dynamo.reset()


@torch.no_grad()
def test_the_output_of_torch_compile_with_several_clocks() -> None:
    """Its passes are static ones of each region, with the numbers of eager ones."""
    unet = Recursive().eval()
    compiled = torch.compile(unet, backend="eager")
    own, outputs, regions = vars(compiled)["forward"], [], []
    for call in (unet, compiled):
        with ch.wrap(call, clocks={1: 2, 2: 4}) as cw:
            assert cw.compiled == (call is compiled)
            if call is compiled:
                cw.compile(backend="eager")  # as it is, torch's default backend
            torch.manual_seed(1)
            for _ in range(2):
                outputs.append([call(torch.randn(1, 3, 32, 32), t) for t in TIMES.clone()[:6]])
            regions.append(set(cw.stats.regions))
            assert cw.stats.adaptor_passes == 8
    assert regions == [{"level 1", "level 2"}] * 2
    for eager, static in zip(outputs[:2], outputs[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(eager, static, strict=True))
    assert vars(compiled)["forward"] is own
    torch._dynamo.reset()


# -- a region of an earlier run -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"modules": ["body"]}, {"entry": "down", "exit": "up"}], ids=str)
def test_a_saved_region_is_found_again(options: dict[str, Any], tmp_path: Path) -> None:
    with ch.wrap(Tiny(), **options) as cw:
        run(cw)
        region = cw.region
    assert region is not None
    path = region.save(tmp_path / "region.json")
    with ch.wrap(Tiny(), region=path) as cw:
        run(cw)
        assert cw.region == region
        assert cw.stats.adaptor_passes == 4
    if not options:
        other = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1))
        with ch.wrap(other, region=str(path)) as cw, pytest.raises(ch.RegionNotFoundError):
            cw(torch.zeros(1, 2, 8, 8))


def test_a_file_that_holds_no_region(tmp_path: Path) -> None:
    with pytest.raises(ch.ArgumentError, match=r"region\.save wrote"):
        ch.wrap(Tiny(), region=tmp_path / "none.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ch.ArgumentError, match="to_json wrote"):
        ch.wrap(Tiny(), region=tmp_path / "other.json")
