"""The trend: how an exit moved between the last two full passes, as an adaptor is given it and as one is calibrated."""

import pytest
import torch
from torch import nn

import clockwork_hooks as ch
from clockwork_hooks.adaptors.calibrated import CalibratedAdaptor, ResidualAdaptor
from clockwork_hooks.analysis.calibration import calibrate
from clockwork_hooks.analysis.normal_equations import KINDS, NormalEquations, Shape
from clockwork_hooks.clock import reasons
from clockwork_hooks.clock.timeline import Trail
from clockwork_hooks.clock.times import Told
from tests.test_calibration import TIMES, Blocks, sampler

STEPS = tuple(range(950, 0, -100))  # ten


class Drifting(Blocks):
    """What the region emits moves along a straight line in time, another one for each sample and channel."""

    def __init__(self):
        super().__init__()
        self.speed, self.emitted = nn.Linear(3, 12), []

    def forward(self, x, t, c):
        h = self.stem(x)
        z = 0 * self.down(h)
        sides = [one(c).sin().reshape(len(x), 12, 1, 1) for one in (self.side, self.speed)]
        z = self.up(nn.functional.interpolate(z + sides[0] + t / 300 * sides[1], scale_factor=2.0, mode="nearest"))
        self.emitted.append(z.clone())
        return self.head(torch.cat([h, z], 1))


class Seen(nn.Module):
    """Passes the cached exit on, and notes what it was given."""

    needs = frozenset({"trend", "trend_positions"})

    def __init__(self):
        super().__init__()
        self.trends = []

    def forward(self, entry, exit_cached, *, time, text, trend, trend_positions):
        self.trends.append((exit_cached.clone(), trend, trend_positions))
        return exit_cached


def run(unet, cw, times=STEPS, seed=0, condition=None):
    """One trajectory; step → what its region emitted, as the UNet's own code saw it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 2, 8, 8, generator=generator)
    c = torch.randn(2, 3, generator=generator) if condition is None else condition
    unet.emitted.clear()
    with torch.no_grad(), cw.trajectory():
        for t in times:
            x = x - 0.1 * unet(x, float(t), c)
    return dict(enumerate(unet.emitted, 1))


def trends(seen):
    return [None if trend is None else (trend, positions.tolist()) for _, trend, positions in seen.trends]


def test_an_adaptor_is_given_the_difference_of_the_last_two_full_passes():
    unet, seen = Drifting(), Seen()
    with ch.wrap(unet, seen, schedule=ch.Schedule.at((3, 5, 6, 8, 9, 10))) as cw:
        run(unet, cw, seed=1)  # recorded
        seen.trends.clear()
        exits = run(unet, cw)
        assert cw.stats.reasons == {reasons.FIRST: 2, reasons.SCHEDULED: 6}
    pairs = [(2, 1), (4, 2), (4, 2), (7, 4), (7, 4), (7, 4)]
    assert len(seen.trends) == 6
    for (trend, positions), (last, before) in zip(trends(seen), pairs, strict=True):
        assert torch.equal(trend, exits[last] - exits[before])
        assert positions == [STEPS[last - 1], STEPS[before - 1]]


def test_the_first_run_is_given_the_same_trends_as_the_second():
    unet = Drifting()
    both = []
    for _ in range(2):
        seen = Seen()
        with ch.wrap(unet, seen, schedule=ch.Schedule.at((3, 5, 6))) as cw:
            run(unet, cw)
        both.append(trends(seen))
    for (one, at), (other, there) in zip(*both, strict=True):
        assert torch.equal(one, other)
        assert at == there


def test_after_one_full_pass_there_is_no_trend_and_no_pass_is_lost():
    unet, seen = Drifting(), Seen()
    with ch.wrap(unet, seen, clock=3) as cw:
        run(unet, cw)
        assert cw.stats.adaptor_passes == 6
    assert [one is None for one in trends(seen)] == [True, True, False, False, False, False]


def test_a_trend_of_other_weights_or_conditions_is_none():
    """What comes after a doubt costs full passes until there are two of one kind."""
    unet, seen = Drifting(), Seen()
    with ch.wrap(unet, seen, schedule=ch.Schedule.at((3, 4, 5, 6, 7, 8, 9))) as cw, torch.no_grad(), cw.trajectory():
        x, c = torch.randn(2, 2, 8, 8), torch.randn(2, 3)
        kinds = []
        for step, t in enumerate(STEPS, 1):
            if step == 5:
                unet.up.weight.mul_(2.0)
            before = cw.stats.adaptor_passes
            x = x - 0.1 * unet(x, float(t), c)
            kinds.append("A" if cw.stats.adaptor_passes > before else "F")
        assert "".join(kinds) == "FFAAFFAAAF"
        assert cw.stats.reasons[reasons.WEIGHTS] == 1
        assert cw.stats.reasons[reasons.TREND] == 1
    assert len(seen.trends) == 5
    assert all(trend is not None for _, trend, _ in seen.trends)
    assert seen.trends[2][2].tolist() == [STEPS[5], STEPS[4]]  # both with the weights as they are


def test_trajectories_and_branches_have_trends_of_their_own():
    unet, seen = Drifting(), Seen()
    schedule = ch.Schedule.at((3, 5))
    alone = []
    conditions = [torch.randn(2, 3, generator=torch.Generator().manual_seed(k)) for k in (5, 6)]
    for condition in conditions:
        with ch.wrap(unet, seen, schedule=schedule) as cw:
            run(unet, cw, STEPS[:5], condition=condition)
        alone.append(trends(seen))
        seen.trends.clear()
    with ch.wrap(unet, seen, schedule=schedule) as cw, torch.no_grad(), cw.trajectory():
        xs = [torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0)) for _ in conditions]
        for t in STEPS[:5]:
            xs = [x - 0.1 * unet(x, float(t), c) for x, c in zip(xs, conditions, strict=True)]
    both = trends(seen)
    for k, expected in enumerate(alone):
        for (one, at), (other, there) in zip(expected, both[k::2], strict=True):
            torch.testing.assert_close(one, other)
            assert at == there


def test_what_was_emitted_may_be_written_to_afterwards():
    """A module that writes all its outputs to one place: the trend is of copies."""

    class OneHome(nn.Conv2d):
        home = None

        def forward(self, x):
            output = super().forward(x)
            self.home = output.clone() if self.home is None else self.home
            return self.home.data.copy_(output)

    unet, seen = Drifting(), Seen()
    up = OneHome(12, 4, 1)
    up.load_state_dict(unet.up.state_dict())
    unet.up = up
    with ch.wrap(unet, seen, schedule=ch.Schedule.at((4, 6, 8))) as cw:
        exits = run(unet, cw)
        assert cw.stats.adaptor_passes >= 2
    assert len(seen.trends) == cw.stats.adaptor_passes
    for trend, positions in trends(seen):
        last, before = (STEPS.index(int(t)) + 1 for t in positions)
        torch.testing.assert_close(trend, exits[last] - exits[before])


def test_a_trail_is_broken_until_there_are_two_passes():
    one = Trail.after(None, torch.zeros(1), Told(torch.tensor(9.0)))
    assert one.broken
    assert one.trend is None
    two = Trail.after(one, torch.ones(1), Told(torch.tensor(7.0)))
    assert not two.broken
    assert two.trend.tolist() == [1.0]
    assert two.positions.tolist() == [7.0, 9.0]
    assert Trail.after(two, torch.ones(2), None).trend is None  # of another shape
    assert not Trail.after(None, torch.zeros(1), None, first=True).broken


@torch.no_grad()
def error(unet, adaptor, generate, **options):
    plain = generate((8, 2.0), seed=7)
    with ch.wrap(unet, adaptor, **options) as cw:
        generate((8, 2.0), seed=6)  # the very first call is traced
        before = cw.stats.adaptor_passes
        with cw.trajectory():
            sampled = generate((8, 2.0), seed=7)
        passes = cw.stats.adaptor_passes - before
    return float((sampled - plain).norm() / plain.norm()), passes


@pytest.mark.parametrize("kind", ["affine", "exit"])
def test_exits_that_move_along_a_line_are_predicted(kind):
    """And only with the trend; at times that are not evenly spaced, where the line is the time's."""
    unet = Drifting()
    generate = sampler(unet)
    schedule = ch.Schedule.at((3, 5, 6))
    errors = {}
    for name in (kind, f"{kind}+trend"):
        adaptor = calibrate(unet, generate, [(16, 2.0)], guidance=2.0, schedule=schedule, kind=name, ridge=1e-9)
        errors[name], passes = error(unet, adaptor, generate, schedule=schedule)
        assert passes == 3
    assert errors[f"{kind}+trend"] < 0.02 * errors[kind]


def test_auto_takes_the_trend_where_it_tells_and_says_so():
    unet = Drifting()
    adaptor = calibrate(unet, sampler(unet), [(16, 2.0)], guidance=2.0, schedule=ch.Schedule.at((3, 5, 6)))
    assert adaptor.report.kind == "affine+trend"
    assert adaptor.report.kinds["affine+trend"].macs == 0
    assert adaptor.reads_trend
    assert {"trend", "trend_positions"} <= adaptor.needs
    for_any = calibrate(unet, sampler(unet), [(16, 2.0)], guidance=2.0)  # whose full steps nobody knows
    assert not for_any.reads_trend
    assert not any("trend" in name for name in for_any.report.kinds)


@pytest.mark.parametrize(("steps", "runs"), [(None, 2), (len(STEPS), 1)])
def test_a_schedule_that_counts_from_the_end_has_its_own_full_steps_trend(steps, runs):
    """Which steps are full follows from how many there are: one run more counts them, where nobody says."""
    unet = Drifting()
    same_noise, ended = sampler(unet, times=STEPS), []

    def generate(batch):
        pictures = same_noise(batch)
        ended.append(batch)  # the run that is traced ends in its first call
        return pictures

    options = {"guidance": 2.0, "kind": "affine+trend", "ridge": 1e-9, "refit": False}
    schedule = ch.Schedule.every(3, first_full=2, last_full=1)
    adaptor = calibrate(unet, generate, [(16, 2.0)], schedule=schedule, steps=steps, **options)
    assert len(ended) == runs
    at = schedule.adaptor_steps(len(STEPS))
    same = calibrate(unet, generate, [(16, 2.0)], schedule=ch.Schedule.at(at), **options)
    torch.testing.assert_close(adaptor.table, same.table, rtol=0, atol=0)


@pytest.mark.parametrize("schedule", [ch.Schedule.spread(2), ch.Schedule.every(2)])
def test_steps_are_those_that_the_sampler_takes(schedule):
    unet = Drifting()
    with pytest.raises(ch.ArgumentError, match=rf"steps seen: {len(STEPS)}\n.*steps={len(STEPS)}"):
        calibrate(unet, sampler(unet, times=STEPS), [(4, 2.0)], schedule=schedule, steps=len(STEPS) + 2)
    with pytest.raises(ch.ArgumentError, match="steps is an int of at least 1"):
        calibrate(unet, sampler(unet, times=STEPS), [(4, 2.0)], schedule=schedule, steps=0)
    assert "forward" not in vars(unet)


def test_runs_of_other_lengths_than_the_first_are_told_of():
    unet = Drifting()

    def generate(batch):
        return sampler(unet, times=STEPS[: batch[0]])(batch)

    batches = [(len(STEPS) - 2, 2.0), (len(STEPS), 2.0)]
    with pytest.warns(ch.OtherStepsWarning, match=rf"first batch: {len(STEPS) - 2}\n  of the longest: {len(STEPS)}"):
        adaptor = calibrate(unet, generate, batches, schedule=ch.Schedule.spread(2), kind="affine")
    wanted = ch.Schedule.spread(2).adaptor_steps(len(STEPS) - 2)
    assert {step.step for step in adaptor.report.steps} == set(wanted)


def test_calibrated_for_any_schedule_it_serves_another_spacing():
    """The trend is carried on as far as the step goes, whatever the full passes before were apart."""
    unet = Drifting()
    adaptor = calibrate(unet, sampler(unet), [(16, 2.0)], guidance=2.0, kind="affine+trend", ridge=1e-9)
    plain = calibrate(unet, sampler(unet), [(16, 2.0)], guidance=2.0, kind="affine", ridge=1e-9)
    for at in ((3, 5), (4, 6), (3, 4, 6)):
        one, _ = error(unet, adaptor, sampler(unet), schedule=ch.Schedule.at(at))
        other, _ = error(unet, plain, sampler(unet), schedule=ch.Schedule.at(at))
        assert one < 0.05 * other


def test_its_weights_are_least_squares_of_each_channel():
    """Against torch.linalg.lstsq with the channel's own trend as one more feature."""
    generator = torch.Generator().manual_seed(0)
    cached, exit, trend = (torch.randn(300, 4, generator=generator) for _ in range(3))
    entry, before = (torch.randn(300, 3, generator=generator) for _ in range(2))
    exit = exit + 0.7 * trend + 0.2 * cached.roll(1, 1)
    sums = NormalEquations.empty(Shape(4, 3), torch.device("cpu"))
    for part in (slice(0, 100), slice(100, None)):
        sums.add(cached[part], exit[part], entry[part], before[part], trend=trend[part])
    columns = {"exit+trend": [cached], "exit+entry+before+trend": [cached, entry - before, before]}
    for name, read in columns.items():
        weights, whole = sums.solve(KINDS[name], 0.0), 0.0
        for c in range(4):
            features = torch.cat([torch.ones(300, 1), *read, trend[:, c : c + 1]], 1).double()
            target = (exit - cached)[:, c : c + 1].double()
            solution = torch.linalg.lstsq(features, target).solution[:, 0]
            own = torch.cat([weights[: features.shape[1] - 1, c], weights[-1:, c]])
            torch.testing.assert_close(own, solution)
            whole += float((features @ solution[:, None] - target).square().sum())
        assert sums.error(weights) == pytest.approx(whole / float(exit.double().square().sum()))
    affine = sums.solve(KINDS["affine+trend"], 0.0)
    features = torch.stack([torch.ones(300), cached[:, 2], trend[:, 2]], 1).double()
    solution = torch.linalg.lstsq(features, (exit - cached)[:, 2:3].double()).solution[:, 0]
    torch.testing.assert_close(torch.stack((affine[0, 2], affine[3, 2], affine[-1, 2])), solution)
    assert sums.solve(KINDS["exit"], 0.0)[-1].abs().max() == 0
    assert sums.identity == pytest.approx(float((exit - cached).square().sum() / exit.square().sum()))


def test_a_low_rank_with_a_trend_that_cuts_nothing_is_the_whole():
    generator = torch.Generator().manual_seed(0)
    cached, exit, trend = (torch.randn(300, 4, generator=generator) for _ in range(3))
    sums = NormalEquations.empty(Shape(4, 0), torch.device("cpu"))
    sums.add(cached, exit + trend, None, None, trend=trend)
    weights = sums.solve(KINDS["low rank+trend"], 0.0)
    torch.testing.assert_close(sums.cut(weights, 0.0, torch.eye(4).double()), weights)
    assert sums.error(sums.cut(weights, 0.0, torch.eye(4)[:1].double())) >= sums.error(weights)


@pytest.mark.parametrize("clock", [2, 3])
def test_compiled_passes_do_as_eager_ones(clock):
    unet = Drifting()
    generate = sampler(unet)
    adaptor = calibrate(unet, generate, [(8, 2.0)], guidance=2.0, clock=clock, kind="affine+trend")
    results = []
    for compiled in (False, True):
        with ch.wrap(unet, adaptor, clock=clock) as cw, torch.no_grad():
            if compiled:
                cw.compile(backend="eager")
            for seed in (5, 6):
                with cw.trajectory():
                    sampled = generate((8, 2.0), seed=seed)
            results.append((sampled, cw.stats.adaptor_passes))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_it_is_saved_and_loaded(tmp_path):
    unet = Drifting()
    adaptor = calibrate(unet, sampler(unet), [(8, 2.0)], guidance=2.0, clock=2, kind="affine+trend")
    adaptor.save_pretrained(tmp_path)
    loaded = CalibratedAdaptor.from_pretrained(tmp_path)
    assert loaded.reads_trend
    assert torch.equal(loaded.table, adaptor.table)
    first, _ = error(unet, adaptor, sampler(unet), clock=2)
    second, _ = error(unet, loaded, sampler(unet), clock=2)
    assert first == second


def test_what_is_returned_is_bounded_however_far_the_trend_would_go():
    unet = Drifting()
    adaptor = calibrate(unet, sampler(unet), [(8, 2.0)], guidance=2.0, clock=2, kind="affine+trend")
    cached = torch.zeros(1, 4, 8, 8)
    position, before = torch.tensor(TIMES[3]), torch.tensor(TIMES[2])
    full = torch.tensor([TIMES[2], TIMES[2]])  # no way between them: the trend says nothing
    with torch.no_grad():
        options = {"position": position, "position_cached": before, "trend_positions": full}
        still = adaptor(None, cached, trend=torch.full_like(cached, 1e6), **options)
        torch.testing.assert_close(still, adaptor(None, cached, **options))
        options["trend_positions"] = torch.tensor(TIMES[1:3]).flip(0)
        wild = adaptor(None, cached, trend=torch.full_like(cached, 1e6), **options)
    assert wild.isfinite().all()
    assert wild.abs().max() < 100


def test_training_starts_at_it_and_is_given_the_trend():
    unet = Drifting()
    generate = sampler(unet)
    schedule = ch.Schedule.at((3, 5, 6))
    start = calibrate(unet, generate, [(8, 2.0)], guidance=2.0, schedule=schedule, kind="affine+trend", ridge=1e-9)
    region = ch.find_region(unet, torch.randn(4, 2, 8, 8), TIMES[0], torch.randn(4, 3))
    adaptor = ResidualAdaptor.of(start, region, width=4)
    assert "trend" in adaptor.needs
    affine = calibrate(unet, generate, [(8, 2.0)], guidance=2.0, schedule=schedule, kind="affine", ridge=1e-9)
    without = ResidualAdaptor.of(affine, region, width=4)
    starts = {}
    for name, one in (("with", adaptor), ("without", without)):
        result = ch.distill(
            unet, one, lambda batch: generate((4, 2.0)), prompts=["a"], schedule=schedule, trajectories=1
        )
        starts[name] = result.losses[0]
    assert starts["with"] < 1e-3 * starts["without"]
