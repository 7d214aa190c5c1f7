"""What the wrapper says about itself: stats, reasons, the log, and the memory that it holds."""

import gc
import json
import logging
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import clockwork_hooks as ch
from benchmarks import sync_count
from clockwork_hooks.clock import reasons
from clockwork_hooks.clock.times import TimeReader
from tests.small_unet import Tiny

DOCS = Path(__file__).parent.parent / "docs" / "timeline.md"


def run(call: Any, times: Any, pair: Any = (None,)) -> None:
    with torch.no_grad():
        for t in times:
            for c in pair:
                call(torch.randn(1, 2, 8, 8), t, c)


def test_stats_of_each_trajectory() -> None:
    with ch.wrap(Tiny(), clock=4) as cw, cw.trajectory():
        run(cw, (900, 800, 700, 600, 500, 400))
        run(cw, (900, 800))
        run(cw, (850, 840, 830), torch.randn(2, 1, 3))
        first, second, third = cw.stats.trajectories
        assert [t.number for t in cw.stats.trajectories] == [1, 2, 3]
        assert (first.steps, first.full_passes, first.adaptor_passes) == (6, 2, 4)
        assert first.reasons == {"first step": 1, "scheduled": 1}
        assert (second.steps, second.full_passes, second.adaptor_passes) == (2, 1, 1)
        assert (third.steps, third.full_passes, third.adaptor_passes) == (3, 2, 4)
        for name in ("full_passes", "adaptor_passes", "macs_run", "macs_plain", "macs_saved"):
            assert sum(getattr(t, name) for t in cw.stats.trajectories) == getattr(cw.stats, name)
        region = cw.region
        assert region is not None
        assert first.macs_saved == 4 * region.macs
        assert first.saving == pytest.approx(4 * region.macs / (6 * region.full_macs))
        cw.stats.clear()
        assert not cw.stats.trajectories
        run(cw, (820, 810))
        assert sum(t.full_passes + t.adaptor_passes for t in cw.stats.trajectories) == 4 - 2


def test_the_log_says_for_every_call_what_ran_and_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "clockwork_hooks")
    with ch.wrap(Tiny()) as cw, cw.trajectory():
        run(cw, (900, 800), torch.randn(2, 1, 3))
        with cw.branch("late"):
            run(cw, (700,))
        run(cw, (600, 600))
    assert [record.getMessage() for record in caplog.records if record.name == "clockwork_hooks"] == [
        "trajectory 1, step 1, branch 1, call 1: full: first step",
        "trajectory 1, step 1, branch 2, call 1: full: first step",
        "trajectory 1, step 2, branch 1, call 1: adaptor",
        "trajectory 1, step 2, branch 2, call 1: adaptor",
        "trajectory 1, step 3, branch 'late', call 1: full: scheduled",
        "trajectory 1, step 4, branch 4, call 1: full: conditions are new in this step",
        "trajectory 1, step 4, branch 4, call 2: full: conditions are new in this step",
    ]


def test_the_report() -> None:
    with ch.wrap(Tiny()) as cw, cw.trajectory():
        run(cw, (900, 800, 700), torch.randn(2, 1, 3))
        report = cw.report()
        text = str(report)
    for line in ("passes       4 full, 2 with the adaptor", "full because first step: 2", "full because scheduled: 2"):
        assert re.search(line.replace("because ", r"because\s+"), text), text
    assert re.search(r"cache\s+trajectory 1, branch 1: ", text)
    assert json.loads(report.to_json())["cache"] == report.cache


# -- memory -------------------------------------------------------------------------------------------------------


def held_tensors(cw: ch.ClockworkWrapper) -> list[torch.Tensor]:
    """Every feature that the wrapper holds, found by looking."""
    gc.collect()
    return [tensor for tensor in tensors(gc.get_objects()) if tensor.shape == (1, 8, 8, 8)]


def tensors(objects: list[Any]) -> list[torch.Tensor]:
    # isinstance() would ask odd objects of torch's; torch.compile leaves fake ones, which have no memory
    return [o for o in objects if issubclass(type(o), torch.Tensor) and type(o) is not FakeTensor]


def test_the_cache_is_what_the_report_says() -> None:
    """8×8×8 float32 a call of the step before, and the copies of three numbers of the conditions."""
    with ch.wrap(Tiny(), clock=4) as cw:  # in whose last steps exits are kept for more
        one, size = 8 * 8 * 8 * 4, 3 * 4
        run(cw, torch.tensor([900, 800]), torch.randn(2, 1, 3))
        assert cw.report().cache == {f"trajectory 1, branch {k}": one + size for k in (1, 2)}
        assert len(held_tensors(cw)) == 2
        c = torch.randn(1, 3)
        with cw.trajectory():
            run(cw, torch.tensor([900, 800, 700]), [c] * 4)  # four tiles
            assert cw.report().cache == {"trajectory 2, branch 1": 4 * one + size}
            assert len(held_tensors(cw)) == 4
        assert cw.report().cache == {}
        assert held_tensors(cw) == []
        run(cw, torch.tensor([900, 800]))
        assert list(cw.report().cache.values()) == [one]
        cw.reset()
        assert held_tensors(cw) == []
        run(cw, torch.tensor([900, 800]))
    assert cw.report().cache == {}
    assert held_tensors(cw) == []


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")  # all calls are at one time
def test_calls_at_one_time_without_end_are_bounded() -> None:
    """A loss at a fixed time, over data without end: 128 calls of a step are remembered, then none."""
    with ch.wrap(Tiny()) as cw:
        sizes = []
        for _ in range(200):
            run(cw, (500,), [torch.randn(1, 3)])
            sizes.append(sum(cw.report().cache.values()))
        assert max(sizes) == 128 * (8 * 8 * 8 * 4 + 3 * 4)
        assert sizes[-1] == 0
        assert cw.report().cache == {}
        run(cw, (400, 300, 200), [torch.randn(1, 3)])
        assert cw.stats.reasons == {"first step": 128, "too many calls in one step to remember": 72 + 1, "scheduled": 1}
        assert cw.stats.adaptor_passes == 1


def test_training_keeps_nothing() -> None:
    unet = Tiny().train()
    with ch.wrap(unet) as cw:
        for t in (900, 800, 700):
            unet(torch.randn(1, 2, 8, 8), t).sum().backward()
            assert cw.report().cache == {} or t == 900  # the recorded call keeps one


def test_two_hundred_trajectories_leave_nothing_behind() -> None:
    """Other prompts, lengths, batches and ends in each; tensors, objects and the cache are as many as after ten."""
    unet = Tiny()

    def soak(count: int, cw: ch.ClockworkWrapper) -> tuple[int, int, int]:
        for k in range(count):
            times = torch.linspace(900, 100, 4 + k % 3)
            pair = torch.randn(1 + k % 2, 1, 3)
            run(cw, times[: 3 + k % 2], list(pair))
        cw.reset()
        gc.collect()
        objects = [one for one in gc.get_objects() if type(one) is not weakref.ref]  # of these, dead ones come and go
        return len(tensors(objects)), len(objects), sum(cw.report().cache.values())

    with ch.wrap(unet) as cw:
        soak(70, cw)
        labels, objects, _ = soak(10, cw)
        after = soak(200, cw)
        assert after[0] <= labels
        assert after[1] <= objects + 50
        assert after[2] == 0
        assert len(cw.stats.trajectories) == 64


def test_a_wrapper_that_is_dropped_is_collected() -> None:
    unet = Tiny()
    cw = ch.wrap(unet)
    run(cw, (900, 800))
    gone = weakref.ref(cw)
    cw.remove()
    del cw
    gc.collect()
    assert gone() is None


# -- the table of reasons -----------------------------------------------------------------------------------------


def test_every_reason_is_explained() -> None:
    names = {value for name, value in vars(reasons).items() if name.isupper() and isinstance(value, str)}
    assert names == set(reasons.REASONS)
    page = DOCS.read_text(encoding="utf-8")
    for reason, (cause, do) in reasons.REASONS.items():
        assert f"| {reason} | {cause} | {do} |" in page, f"docs/timeline.md lacks: | {reason} | {cause} | {do} |"


# -- waiting for the device ---------------------------------------------------------------------------------------


def test_a_list_of_times_is_read_once() -> None:
    """One copy of the whole list, whatever is taken from it: on a device, one wait for each trajectory."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func in (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype_layout)
            return func(*args, **(kwargs or {}))

    for inference in (False, True):
        clock = TimeReader()
        with torch.inference_mode(inference):
            for expected in (1, 2):
                times, mode = torch.linspace(999, 0, 20), Copies()
                with mode:
                    places = [clock.read(view)[1] for t in times for view in (t, t[None], t.expand(4))]
                assert mode.count == 1, expected
                assert [place.index for place in places if place] == [k for k in range(20) for _ in range(3)]


@pytest.mark.filterwarnings("ignore")
def test_waits_are_counted_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_count, "LOOPS", {"bare": sync_count.bare_loop})
    data = json.loads(sync_count.run("cpu", tmp_path, steps=2, seed=0).read_text())
    assert data["values read"] == [
        {"loop": "bare", "steps": 2, "plain": 0, "wrapped": 1, "ours": 1, "adaptor_passes": 1}
    ]
    assert data["environment"]["seed"] == 0
