"""`Schedule.adaptive`: the entry of the region decides at run time which steps are full."""

import copy
import itertools
import json
import warnings
from pathlib import Path

import jsonschema
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import clockwork_hooks as ch
from clockwork_hooks import Schedule
from clockwork_hooks.clock import reasons
from tests.small_unet import Tiny

TIMES = (900, 800, 700, 600, 500, 400, 300, 200)
SCHEMA = Path(__file__).parents[1] / "docs/schemas/flops-1.schema.json"


def samples(*jumps: int, size: float = 5.0) -> list[torch.Tensor]:
    """Samples that hardly move, but at these steps (from 1)."""
    x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    tensors = []
    for step in range(1, len(TIMES) + 1):
        x = x + (size if step in jumps else 1e-3)
        tensors.append(x)
    return tensors


class Still(Tiny):
    """Its entry changes with the sample alone."""

    def forward(self, x, t, c=None, **more):
        return super().forward(x, torch.zeros(()) * t, c, **more)


class Writing(Still):
    """Writes to the entry after the region has read it."""

    def forward(self, x, t, c=None, **more):
        h = self.stem(x)
        z = self.up(self.body(self.act(self.down(h))))
        return self.head(torch.cat([h.mul_(3.0).add_(z), z], 1))


def run(unet, cw, xs, *conditions, until=None):
    """Outputs of one trajectory, and a letter a step: A if every call of it used the adaptor, F if none did."""
    outputs, letters = [], ""
    with torch.no_grad(), cw.trajectory():
        for x, t in itertools.islice(zip(xs, TIMES, strict=True), until):
            before = cw.stats.adaptor_passes
            outputs += [unet(x, t, c) for c in conditions or (None,)]
            letters += {0: "F", max(len(conditions), 1): "A"}.get(cw.stats.adaptor_passes - before, "?")
    return outputs, letters


def traced(unet, schedule, **options):
    """A wrapped UNet that has seen two steps."""
    cw = ch.wrap(unet, schedule=schedule, **options)
    run(unet, cw, samples(), until=2)
    cw.stats.clear()
    return cw


@pytest.mark.parametrize("kind", [Still, Writing])
@pytest.mark.parametrize(
    ("jumps", "longest", "expected"),
    [
        ((), 9, "FAAAAAAA"),
        ((), 2, "FAAFAAFA"),
        ((4,), 9, "FAAFAAAA"),
        ((4, 5), 9, "FAAFFAAA"),
        ((3,), 2, "FAFAAFAA"),  # the bound counts from the last full pass
    ],
)
def test_full_where_the_entry_jumps(kind, jumps, longest, expected):
    unet, other = kind(), kind()
    cw = traced(unet, Schedule.adaptive(0.1, longest=longest))
    outputs, letters = run(unet, cw, samples(*jumps))
    assert letters == expected
    bound = expected.count("F") - 1 - len(jumps)
    counted = {reasons.FIRST: 1, reasons.MOVED: len(jumps), reasons.LONGEST: bound}
    assert cw.stats.reasons == {reason: count for reason, count in counted.items() if count}
    fixed = traced(other, Schedule.at({k + 1 for k, letter in enumerate(expected) if letter == "A"}))
    assert all(map(torch.equal, outputs, run(other, fixed, samples(*jumps))[0]))


def test_small_changes_add_up():
    """Each is compared with the entry of the last full pass, not with that of the step before."""
    unet = Still()
    cw = traced(unet, Schedule.adaptive(0.25, longest=9))
    xs = [x * (1 + 0.1 * k) for k, x in enumerate([samples()[0]] * len(TIMES))]
    for bias in (unet.stem.bias, unet.emb.bias):  # so that the entry grows as the sample
        bias.data.zero_()
    assert run(unet, cw, xs)[1].startswith("FAAFAAA")


def test_warmup_is_full():
    unet = Still()
    cw = traced(unet, Schedule.adaptive(9.0, longest=2, warmup=3))
    assert run(unet, cw, samples())[1] == "FFFAAFAA"


def test_the_first_call_of_a_step_decides_for_all():
    one, two = torch.zeros(1, 3), torch.ones(1, 3)
    unet = Still()
    cw = traced(unet, Schedule.adaptive(0.1, longest=9))
    run(unet, cw, samples(), one, two)  # a call with a condition is traced too
    assert run(unet, cw, samples(4, 6), one, two)[1] == "FAAFAFAA"
    assert cw.stats.reasons[reasons.MOVED] == 4


def test_branches_are_compared_with_their_own_entries():
    one, two = torch.zeros(1, 3), torch.ones(1, 3)
    unet = Still()
    cw = traced(unet, Schedule.adaptive(0.1, longest=9))
    run(unet, cw, samples(), one, two)
    cw.stats.clear()
    with torch.no_grad(), cw.trajectory():
        for x, t in zip(samples(), TIMES, strict=True):
            unet(x, t, one)
            unet(x + 50, t, two)
    assert cw.stats.full_passes == 2


class Waits(TorchDispatchMode):
    """Counts reads of a tensor's value: on a device each one waits for it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_device_is_waited_for_once_a_step_at_most():
    unet, conditions = Still(), (torch.zeros(1, 3), torch.ones(1, 3))
    cw = traced(unet, Schedule.adaptive(0.1, longest=2))
    run(unet, cw, samples(), *conditions)
    with Waits() as waits:
        letters = run(unet, cw, samples(5), *conditions)[1]
    assert letters == "FAAFFAAF"
    asked = 5  # steps 2, 3, 5, 6, 7; the first is full, and the bound has come in 4 and 8
    assert waits.count == asked


def test_nothing_is_saved_where_everything_moves_and_nan_is_a_change():
    unet, plain = Still(), Still()
    cw = traced(unet, Schedule.adaptive(1e-6))
    xs = samples(*range(9))
    outputs, letters = run(unet, cw, xs)
    assert letters == "F" * 8
    with torch.no_grad():
        assert all(torch.equal(out, plain(x, t)) for out, x, t in zip(outputs, xs, TIMES, strict=True))
    cw.remove()
    cw = traced(unet, Schedule.adaptive(9.0))
    assert run(unet, cw, [samples()[0], *[torch.full_like(xs[0], torch.nan)] * 7])[1] == "F" * 8


def test_a_threshold_that_no_step_passes_is_told_once():
    """After two whole runs, as of a schedule whose steps are never reached; not where one step has passed."""
    unet = Still()
    cw = traced(unet, Schedule.adaptive(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for jumps in (range(9), range(2, 5), range(9), range(9)):
            run(unet, cw, samples(*jumps))
    with pytest.warns(ch.NoEffectWarning, match=r"changed by more than the threshold(.|\n)*a larger threshold"):
        run(unet, cw, samples(), until=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            run(unet, cw, samples(*range(9)))


def test_without_a_trace_no_pass_is_lost():
    unet = Still()
    with torch.no_grad():
        region = ch.find_region(unet, samples()[0], TIMES[0], None)
    cw = ch.wrap(unet, region=region, schedule=Schedule.adaptive(9.0, longest=9))
    assert run(unet, cw, samples())[1] == "FAAAAAAA"
    other = Still()
    again = ch.wrap(other, schedule=Schedule.adaptive(9.0, longest=9))
    assert run(other, again, samples())[1] == "FFAAAAAA"  # the recorded call's entry is not kept
    assert again.stats.reasons == {reasons.FIRST: 1, reasons.TRACED: 1}


def test_it_restores_and_counts_its_memory():
    unet = Still()
    cw = traced(unet, Schedule.adaptive(9.0))
    with torch.no_grad():
        unet(samples()[0], 900, None)
        exit, entry = 8 * 8 * 8 * 4, 8 * 8 * 8 * 4
        assert list(cw.report().cache.values()) == [exit + entry]
    assert "adaptive(9, longest=4)" in str(cw.report())
    twin = copy.deepcopy(unet)
    cw.remove()
    assert "forward" not in vars(unet.down)
    with torch.no_grad():
        assert torch.equal(unet(samples()[1], 800), twin(samples()[1], 800))


def test_what_needs_the_steps_beforehand_refuses():
    unet = Still()

    def sampled(batch):
        unet(samples()[0], 900, None)

    with pytest.raises(ch.ArgumentError, match=r"adaptor is trained for.*known beforehand"):
        ch.distill(unet, "resnet", sampled, prompts=["a"], schedule=Schedule.adaptive(0.1), progress=False)
    with pytest.raises(ch.ArgumentError, match="how many steps are full"):
        Schedule.adaptive(0.1).full_steps(8)


@pytest.mark.parametrize("threshold", [0, -1, float("nan"), float("inf"), True, "0.1", None])
def test_a_threshold_is_a_positive_number(threshold):
    with pytest.raises(ch.ArgumentError, match="threshold"):
        Schedule.adaptive(threshold)


@pytest.mark.parametrize("options", [{"longest": 0}, {"longest": 1.5}, {"warmup": 0}, {"longest": True}])
def test_counts_are_counts(options):
    with pytest.raises(ch.ArgumentError, match="int of at least 1"):
        Schedule.adaptive(0.1, **options)


def test_schedules_of_equal_numbers_are_equal():
    schedules = [Schedule.adaptive(0.2), Schedule.adaptive(0.3), Schedule.adaptive(0.2, longest=2), Schedule.every(2)]
    schedules += [Schedule.every(2, start=2), Schedule.at({2}), Schedule.at({2, 3})]
    assert [[a == b for b in schedules] for a in copy.deepcopy(schedules)] == torch.eye(7).bool().tolist()
    assert len({*schedules, *copy.deepcopy(schedules)}) == 7
    assert str(schedules[0]) == "adaptive(0.2, longest=4)"


@pytest.mark.parametrize(("longest", "warmup", "steps"), [*itertools.product((1, 2, 5), (1, 2), (1, 4, 9))])
def test_bounds_by_trying(longest, warmup, steps):
    """Against the schedule that runs as long as it may."""
    run_, full = longest, 0
    for step in range(1, steps + 1):
        run_ = 0 if step <= warmup or run_ == longest else run_ + 1
        full += run_ == 0
    assert Schedule.adaptive(0.1, longest=longest, warmup=warmup).bounds(steps) == (full, steps)
    assert Schedule.every(3).bounds(8) == (3, 3)


def test_a_flop_count_gives_both_ends():
    reports = {
        name: ch.flops_report(Still(), samples()[0], 900, clock=schedule, steps=8)
        for name, schedule in {"adaptive": Schedule.adaptive(0.1, longest=3), "four": 4, "off": 1}.items()
    }
    report = reports["adaptive"]
    assert report.least_trajectory_macs == reports["four"].trajectory_macs == reports["four"].least_trajectory_macs
    assert report.trajectory_macs == reports["off"].trajectory_macs == report.full_trajectory_macs
    assert "8 steps, 2 of them full" in str(report)
    assert "8 steps, 8 of them full" in str(report)
    assert "F ? ? ? ? ? ? ? (F full pass, ? decided at run time)" in str(report)
    jsonschema.validate(json.loads(report.to_json()), json.loads(SCHEMA.read_text(encoding="utf-8")))


class Unnamed(Still):
    """The entry is a sum that no module takes or returns: only its double flows into the region's first module."""

    def forward(self, x, t, c=None, **more):
        h = self.stem(x) + 1
        return self.head(torch.cat([h * 1, self.up(self.body(self.act(self.down(2 * h))))], 1))


class Late(Still):
    """A second entry, of full size too, that is made after the region has begun."""

    def __init__(self):
        super().__init__()
        self.second = torch.nn.Conv2d(2, 8, 3, padding=1)
        self.other = torch.nn.Conv2d(8, 16, 4, 2, 1)

    def forward(self, x, t, c=None, **more):
        low = self.body(self.act(self.down(self.stem(x))))
        late = self.second(x)
        return self.head(torch.cat([late, self.up(low + self.other(late))], 1))


def test_a_region_whose_entry_nobody_sees_is_refused():
    unet = Unnamed()
    with torch.no_grad(), pytest.raises(ch.RegionNotFoundError, match="some module must take or return it"):
        run(unet, ch.wrap(unet, schedule=Schedule.adaptive(0.1)), samples())
    assert "forward" not in vars(unet.down)
    with torch.no_grad():
        unet(samples()[0], 900)


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
def test_an_entry_that_comes_too_late_costs_a_full_pass():
    unet = Late()
    cw = traced(unet, Schedule.adaptive(9.0, longest=9))
    assert cw.region.entry.path == "second"
    assert run(unet, cw, samples())[1] == "F" * 8
    assert cw.stats.reasons == {reasons.FIRST: 1, reasons.UNSEEN: 7}


class Told(torch.nn.Module):
    """Notes what it is given of the step before."""

    needs = frozenset({"entry_cached", "position_cached"})

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, entry, exit_cached, *, time, text, entry_cached, position_cached):
        self.seen.append((entry.clone(), entry_cached.clone(), position_cached.item()))
        return exit_cached


def test_an_adaptor_is_given_the_entry_of_the_step_before_and_the_schedule_that_of_the_last_full_pass():
    """Where adaptor steps follow each other it was given the one, with the exit and the time of the other."""
    unet, told, entries = Still(), Told(), []
    plain = copy.deepcopy(unet)
    plain.down.register_forward_pre_hook(lambda module, args: entries.append(args[0].clone()))
    xs = samples(5, size=5.0)
    xs = [x + 0.01 * step for step, x in enumerate(xs)]
    with ch.wrap(unet, told, schedule=Schedule.adaptive(0.5, longest=8)) as cw:
        for x, t in zip(xs, TIMES, strict=True):
            plain(x, t)
        _, letters = run(unet, cw, xs)
        told.seen.clear()
        _, letters = run(unet, cw, xs)
    assert letters == "FAAAFAAA"
    steps = [k for k, letter in enumerate(letters) if letter == "A"]
    for k, (entry, before, time) in zip(steps, told.seen, strict=True):
        torch.testing.assert_close(entry, entries[k])
        torch.testing.assert_close(before, entries[k - 1])
        assert time == TIMES[k - 1]
