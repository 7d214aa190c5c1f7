"""Calibration with samplers whose batches or steps are not all alike: other step counts, guidance now and then."""

import warnings

import pytest
import torch
from torch import nn

import clockwork_hooks as ch
from clockwork_hooks.analysis.calibration import Calibration, calibrate
from clockwork_hooks.analysis.normal_equations import KINDS, NormalEquations, Shape, shared_basis
from tests.schemas import follows_its_schema
from tests.test_calibration import TIMES, WORLDS, Blocks, sampler, two_calls


def noise(count, seed):
    """Blocks of 2 of one value, and a condition for each of two branches."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(count, 2, 4, 4, generator=generator)
    x = nn.functional.interpolate(small, scale_factor=2.0, mode="nearest")
    return x, torch.randn(2 * count, 3, generator=generator)


@torch.no_grad()
def error(unet, generate, adaptor, **options):
    """How far a sampler's result is from the plain one, and how many passes used the adaptor."""
    plain = generate(3)
    with ch.wrap(unet, adaptor, **options) as cw, cw.trajectory():
        generate(2)  # the very first call is traced
        before = cw.stats.adaptor_passes
        result = generate(3)
    return float((result - plain).norm() / plain.norm()), cw.stats.adaptor_passes - before


def test_batches_in_several_numbers_of_steps():
    """A time that comes after a short step and after a long one had weights that were right for neither: 0.019."""
    unet = Blocks(gain=lambda t: 1 + t / 500)
    few, many = ([900.0 - 800 * k / (count - 1) for k in range(count)] for count in (9, 17))

    def generate(times, seed):
        return sampler(unet, times)((8, 2.0), seed)

    adaptor = calibrate(unet, generate, [many, few], guidance=2.0, kind="affine", ridge=1e-6)
    alone = calibrate(unet, generate, [many], guidance=2.0, kind="affine", ridge=1e-6)
    errors = [error(unet, lambda seed: generate(few, seed), one, clock=2) for one in (adaptor, alone, None)]
    assert [passes for _, passes in errors] == [4, 4, 4]
    assert errors[0][0] < errors[1][0] < 0.1 * errors[2][0]
    assert error(unet, lambda seed: generate(many, seed), adaptor, clock=2)[0] < 1e-4


@pytest.mark.parametrize("order", ["as they come", "by seed"])
def test_a_time_that_follows_a_full_step_in_some_runs_and_an_adaptor_step_in_others(order):
    """It was fitted again on the second kind alone, for a step of another length than the table: 0.002, 0.005."""
    unet = Blocks(gain=lambda t: 1 + t / 500)
    few, many = ([900.0 - 800 * k / (count - 1) for k in range(count)] for count in (9, 17))

    def generate(times, seed=0):
        times = times if order == "as they come" else (few, many)[seed % 2]
        return sampler(unet, times)((8, 2.0), seed)

    adaptor = calibrate(unet, generate, [many, few, many], guidance=2.0, kind="affine", ridge=1e-6, clock=3)
    assert any(one.on_policy for one in adaptor.report.steps)
    off, passes = error(unet, lambda seed: sampler(unet, many)((8, 2.0), seed), adaptor, clock=3)
    assert (off < 1e-3, passes) == (True, 11)


def test_steps_of_a_run_are_those_of_its_longest_trajectory():
    """A second, shorter one at twice the size had its number of steps taken for the run's."""
    unet = Blocks(gain=lambda t: 1 + t / 500)
    many = [900.0 - 100 * k for k in range(9)]

    def generate(count, seed=0):
        x, c = noise(count, seed)
        for times in (many, many[5:]):
            for time in times:
                x = x - 0.3 * unet(x, time, c[:count])
            x = nn.functional.interpolate(x, scale_factor=2.0)
        return x

    schedule = ch.Schedule.spread(2)
    adaptor = calibrate(unet, generate, [8], schedule=schedule, kind="affine", ridge=1e-6)
    assert adaptor.facts["schedule"] == str(ch.Schedule.at(schedule.adaptor_steps(9)))
    served, identity = (
        error(unet, lambda seed: generate(8, seed), one, schedule={3, 5, 7, 8}) for one in (adaptor, None)
    )
    assert served[0] < 0.02 * identity[0]
    assert ch.measure_drift(unet, generate, [2]).steps == 9


def test_what_any_run_emitted_is_in_bounds():
    """The bounds of a step that was fitted again were those of the second run alone, and cut what the first one saw."""
    unet = Blocks(gain=lambda t: 1 + t / 500)

    def generate(count, seed=0):
        x, c = noise(count, seed)
        for time in TIMES:
            x = x - 0.3 * unet(x, time, c[:count])
        return x

    options = {"schedule": {3, 4, 5, 6}, "kind": "affine", "ridge": 1e-6}
    once, twice = (calibrate(unet, generate, [128], refit=refit, **options) for refit in (False, True))
    assert [one.on_policy for one in twice.report.steps] == [False, True, True, True]
    assert (twice.table[:-1, :4] <= once.table[:-1, :4]).all()
    assert (twice.table[:-1, 4:8] >= once.table[:-1, 4:8]).all()
    assert error(unet, lambda seed: generate(32, seed), twice, schedule={3, 4, 5, 6})[0] < 1e-4


def guided(unet, guides, switches=0.0, calls=1):
    """Guidance in one call or two at the times that `guides` names; other conditions from `switches` on."""

    def generate(batch, seed=0):
        x, c = noise(16, seed)
        other = c + noise(16, seed + 1)[1]
        for time in TIMES:
            now = other if time < switches else c
            if not guides(time):
                x = x - 0.1 * unet(x, time, now[16:])
                continue
            if calls == 1:
                u, wanted = unet(torch.cat([x, x]), time, now).chunk(2)
            else:
                u, wanted = unet(x, time, now[:16]), unet(x, time, now[16:])
            x = x - 0.1 * (u + 6.0 * (wanted - u))
        return x

    return generate


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.filterwarnings("ignore:steps that cannot use an adaptor:clockwork_hooks.OtherStepsWarning")
def test_samples_without_guidance_are_not_halves(calls):
    """Before guidance begins, and after it has ended, two samples of a batch are no branches of one."""
    unet = Blocks(mix=0.5, gain=lambda t: 1 + t / 500)
    generate = guided(unet, lambda time: 450 < time < 600, calls=calls)
    tables = [calibrate(unet, generate, [0], kind="exit", ridge=1e-4, guidance=scale).table for scale in (None, 6.0)]
    torch.testing.assert_close(tables[1], tables[0])


@pytest.mark.filterwarnings("ignore:steps that cannot use an adaptor:clockwork_hooks.OtherStepsWarning")
def test_guidance_in_one_call_goes_on_where_conditions_change():
    """Conditions that change on the way looked like the second of two calls: nothing was combined from there on."""
    tables = []
    for calls in (1, 2):
        unet = Blocks(mix=0.5, gain=lambda t: 1 + t / 500)
        generate = guided(unet, lambda time: True, switches=600.0, calls=calls)
        tables.append(calibrate(unet, generate, [0], kind="exit", ridge=1e-4, guidance=6.0).table)
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["auto", "affine", "exit", "exit+entry+before", "kernel", "low rank"])
def test_without_a_ridge_channels_that_never_move_have_weights_too(kind):
    """A ridge is a number from 0; the sums of channels that say nothing of their own have no inverse."""
    unet = Blocks(**WORLDS["exit+entry+before"])
    with torch.no_grad():
        unet.up.weight[1], unet.up.bias[1], unet.up.weight[2], unet.up.bias[2] = 0.0, 1000.0, 0.0, 0.0
    adaptor = calibrate(unet, sampler(unet), [(8, 2.0)], guidance=2.0, kind=kind, ridge=0)
    assert adaptor.table.isfinite().all()
    assert all(step.error < step.identity for step in adaptor.report.steps)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("gain", "kernel")])
@pytest.mark.parametrize("ridge", [0.0, 1e-8, 1e-6, 1e-3])
def test_a_channel_that_stands_still_has_no_gain(name, ridge):
    """Its variance is a rounding error: a gain that followed from it was anything, and a low rank left 6% of errors."""
    generator = torch.Generator().manual_seed(1)
    cached = torch.randn(3000, 4, generator=generator)
    cached[:, 1] = 1000.3
    exit = cached * 1.1
    sums = NormalEquations.empty(Shape(4, 0), torch.device("cpu"))
    sums.add(cached, exit, None, None, None, 0.3 * torch.randn(3000, 4, generator=generator))
    weights = sums.solve(KINDS[name], ridge)
    assert weights[2].abs().max() == 0
    assert weights[1:-1, 1].abs().max() < 1e-9
    if KINDS[name].form == "low rank":
        weights = sums.cut(weights, ridge, shared_basis([sums.added(weights, ridge)], 1))
    assert weights[0, 1] == pytest.approx(100.03, rel=1e-4)
    assert sums.error(weights) ** 0.5 < 1e-4


@pytest.mark.parametrize("kind", ["affine", "exit+entry+before", "exit+entry+before+trend", "kernel", "low rank"])
@pytest.mark.parametrize("schedule", [None, {3, 4, 5, 6}])
def test_few_samples_make_no_step_worse_than_the_identity(kind, schedule):
    """Where the exit follows from nothing that is read, weights that fit a few samples were farther off."""

    def rough(t):
        return 1 + 0.3 * torch.randn(12, 1, 1, generator=torch.Generator().manual_seed(int(t)))

    class Rough(Blocks):
        def forward(self, x, t, c):
            return super().forward(x, t, c + 2 * torch.sin(40 * x.mean((2, 3))[:, :1]))

    unet = Rough(gain=rough)

    def generate(count, seed=0):
        x, c = noise(count, seed)
        for time in TIMES:
            x = x - 0.3 * unet(x, time, c[:count])
        return x

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ch.NoEffectWarning)
        adaptor = calibrate(unet, generate, [5], kind=kind, schedule=schedule)
    steps = adaptor.report.steps
    assert all(step.error <= step.identity for step in steps)
    at_no_step = [one for one in told if "at no step do any weights" in str(one.message)]
    assert len(at_no_step) == all(step.ridge is None for step in steps) == len(told)
    as_it_is = [step for step in steps if step.ridge is None]
    assert as_it_is
    cached, entry = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 8, 8)
    for step in as_it_is:
        inputs = {"position": torch.tensor(step.position)}
        inputs |= {"entry_cached": torch.randn(2, 6, 8, 8)} if "entry_cached" in adaptor.needs else {}
        low, high = adaptor.table[sorted(one.position for one in steps).index(step.position), :8].chunk(2)
        within = cached.clamp(low.reshape(-1, 1, 1), high.reshape(-1, 1, 1))
        assert torch.equal(adaptor(entry, cached, **inputs), within)
    assert "the identity is best" in str(adaptor.report.tables()[1].to_markdown())
    follows_its_schema(adaptor.report.to_dict())
    assert Calibration.from_json(adaptor.report.to_json()) == adaptor.report


def composed(unet, order):
    """Two conditions in one call, and none in another one of half as many rows."""

    def generate(batch, seed=0):
        x, c = noise(8, seed)
        for time in TIMES:
            outputs = {}
            for rows in order:
                outputs[rows] = (
                    unet(x, time, c[:8]) if rows == 8 else unet(torch.cat([x, x]), time, torch.cat([c[8:]] * 2))
                )
            first, second = outputs[16].chunk(2)
            x = x - 0.1 * (outputs[8] + 2.0 * (first - outputs[8]) + 2.0 * (second - outputs[8]))
        return x

    return generate


@pytest.mark.parametrize("order", [(8, 16), (16, 8)])
def test_calls_of_other_sizes_are_not_combined(order):
    """Composed conditions raised torch's own error. Two conditions are no pair of an unconditional and another one."""
    unet = Blocks(mix=0.5, gain=lambda t: 1 + t / 500)
    tables = [
        calibrate(unet, composed(unet, order), [0], kind="exit", ridge=1e-4, guidance=scale).table
        for scale in (None, 6.0)
    ]
    torch.testing.assert_close(tables[1], tables[0])


def test_a_sampler_that_goes_both_ways_is_told_that_one_is_served():
    """Inversion, then sampling: each time had weights for both directions, which were right for neither."""
    unet = Blocks(gain=lambda t: 1 + t / 500)

    def generate(times, seed=0):
        x, c = noise(32, seed)
        for time in times:
            x = x - 0.1 * unet(x, time, c[:32])
        return x

    up = [100.0 * k for k in range(1, 10)]
    options = {"kind": "affine", "ridge": 1e-6}
    one_way = calibrate(unet, generate, [up], **options)
    with pytest.warns(ch.OtherStepsWarning, match=r"(?s)one direction of time.*did: [5-8]\n.*each direction") as caught:
        both = calibrate(unet, generate, [up + up[::-1]], **options)
    assert caught[0].filename == __file__
    at = sorted(step.position for step in both.report.steps)
    own = [at.index(step.position) for step in sorted(one_way.report.steps, key=lambda step: step.position)]
    torch.testing.assert_close(both.table[own], one_way.table[:-1])
    assert all(step.error < 1e-3 for step in both.report.steps)


@pytest.mark.parametrize("calls", [sampler, two_calls])
def test_batches_of_one_are_held_out_as_a_whole(calls):
    """Of one picture at a time other positions were held out, which are no other picture: errors came out too small."""
    unet = Blocks(gain=lambda t: 1 + 0.3 * torch.randn(12, 1, 1, generator=torch.Generator().manual_seed(int(t))))
    options = {"kind": "exit+entry+before", "guidance": 2.0}
    report = calibrate(unet, calls(unet), [(1, 2.0)] * 6, **options).report
    alone = calibrate(unet, calls(unet), [(1, 2.0)], **options).report
    assert (report.held_out, alone.held_out) == ("rows", "positions")
    other = calibrate(unet, calls(unet), [(32, 2.0)], **options).report  # what is left of many others
    ratios = [[step.error / step.identity for step in one.steps] for one in (report, alone, other)]
    assert max(ratios[1]) < 1e-2 < min(ratios[2]) / 3
    assert min(ratios[0]) > 0.1
