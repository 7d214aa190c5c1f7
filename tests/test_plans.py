"""What drift and plans say of adaptors, milliseconds and adaptive schedules, on UNets whose answers are known."""

import itertools
import json
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import clockwork_hooks as ch
from clockwork_hooks.analysis import planning, sampling
from clockwork_hooks.analysis.drift import Drift
from clockwork_hooks.analysis.planning import adaptive_steps, rule_of_thumb, threshold_for
from clockwork_hooks.analysis.sampling import candidates
from tests import test_calibration as calibration
from tests.small_unet import Tiny
from tests.test_analysis import TIMES, sampler, tiny
from tests.test_trend import STEPS, Drifting


class Mixed(nn.Module):
    """Half of the cached feature and half of the entry."""

    def forward(self, entry, exit_cached, *, time=None, text=None):
        return (exit_cached + entry) / 2


class Flipped(nn.Module):
    """The cached feature with the other sign."""

    def forward(self, entry, exit_cached, *, time=None, text=None):
        return -exit_cached


def alternating(**options):
    """The region's exit changes its sign at every step."""
    signs = {t: (-1.0) ** k for k, t in enumerate(TIMES)}
    unet = tiny(**options)
    up = unet.up1

    class Signed(nn.Module):
        sign = 1.0

        def forward(self, x):
            return up(x) * self.sign

    unet.up1 = Signed()
    unet.register_forward_pre_hook(lambda module, args: setattr(unet.up1, "sign", signs[args[1]]))
    return unet


# -- drift ---------------------------------------------------------------------------------------------------------


def test_an_adaptors_error_is_what_it_makes_of_the_true_features():
    """Recomputed from entries and exits recorded by plain hooks, the adaptor's own outputs fed back."""
    unet = tiny(upper=lambda t: 1 + 5 * t)
    drift = ch.measure_drift(unet, sampler(unet), [2], adaptor=[None, Mixed()], clocks=(2, 4))
    assert list(drift.adaptors.values()) == ["identity", "identity", "Mixed"]
    entries, exits = [], []
    handles = [
        module.register_forward_hook(lambda m, a, out, features=features: features.append(out))
        for module, features in ((unet.stem, entries), (unet.up1, exits))
    ]
    with torch.no_grad():
        sampler(unet)(2, 0)
    for handle in handles:
        handle.remove()
    name = next(name for name, adaptor in drift.adaptors.items() if adaptor == "Mixed")
    errors = drift.error(name, clock=4)
    assert [step for step, error in enumerate(errors, 1) if error is None] == [1, 5]
    cached = exits[0]
    for step in range(1, 8):
        cached = exits[step] if step == 4 else Mixed()(entries[step], cached)
        if step != 4:
            assert errors[step] == pytest.approx(float((cached - exits[step]).norm() / exits[step].norm()), rel=1e-4)
    for age in (1, 2, 3):
        moved = [float((b - a).norm() / a.norm()) for a, b in zip(entries, entries[age:], strict=False)]
        assert list(drift.entries[name][age - 1][age:]) == pytest.approx(moved, rel=1e-4)
    assert drift.changes[name] == drift.changes[name.removesuffix(", Mixed")]


def test_a_sampler_with_gradients_on_holds_no_graph():
    """What drift and plans add up held the graph of all calls before."""
    unet, inputs, held = tiny(), [], []
    run = sampler(unet)
    unet.register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0])))

    def generate(batch, seed):
        with torch.enable_grad():
            result = run(batch, seed).detach()
        held.append(sum(one() is not None for one in inputs[:-1]))
        return result

    plain = ch.measure_drift(unet, run, [2], seeds=(0, 1))
    assert ch.measure_drift(unet, generate, [2], seeds=(0, 1)).errors == plain.errors
    assert held[1:3] == [0, 0]


def test_an_entry_that_is_written_to_later_is_seen_as_it_was():
    class Writing(nn.Module):
        def __init__(self, unet):
            super().__init__()
            self.stem, self.down, self.up, self.head = unet.stem, unet.down1, unet.up1, unet.head

        def forward(self, x, t):
            h = self.stem(x)
            z = self.up(torch.cat([self.down(h)] * 2, 1))
            return self.head(torch.cat([h.mul_(0), z], 1))

    unet = Writing(tiny()).eval()
    drift = ch.measure_drift(unet, sampler(unet), [1], clocks=(2,))
    assert all(value > 0 for value in next(iter(drift.entries.values()))[0][1:])


def test_the_table_tells_errors_at_the_exit_and_in_the_result():
    unet = alternating()
    drift = ch.measure_drift(unet, sampler(unet), [1], adaptor=[None, Flipped()], clocks=(2, 3))
    rows = {row[0]: row for row in drift.table().rows}
    heads = drift.table().columns
    assert [h for h in heads if "exit" in h] == [">exit, clock 2", ">exit, clock 3"]
    flipped, identity = (next(row for name, row in rows.items() if name.endswith(end)) for end in ("Flipped", "MACs"))
    at = heads.index(">exit, clock 2")
    assert float(flipped[at].rstrip("%")) < 0.1 * float(identity[at].rstrip("%"))
    with pytest.raises(ch.ArgumentError, match="candidates that were measured"):
        drift.error("level 7", 2)


# -- adaptors ------------------------------------------------------------------------------------------------------


def test_the_right_adaptor_is_chosen():
    unet = alternating()
    flip = Flipped()
    plan = ch.plan(
        unet, sampler(unet, rate=0.02), [1], min_saving=0.4, adaptor=["identity", flip], clocks=(2,), probes=3
    )
    assert plan.chosen.region.endswith(", Flipped")
    assert plan.adaptor is flip
    others = [o.error for o in plan.options if o.region.startswith("level 1") and o.region[-4:] == "MACs"]
    assert plan.chosen.measured < 0.2 * min(others)
    with pytest.raises(ch.ArgumentError, match="adaptor of the plan: Flipped"):
        ch.Plan.from_json(plan.to_json())
    again = ch.Plan.from_json(plan.to_json(), adaptor=flip)
    assert (again, again.adaptor) == (plan, flip)
    with ch.wrap(unet, plan=again) as cw:
        assert cw.adaptor is flip


def test_what_an_adaptor_costs_is_not_saved():
    """An adaptor with a convolution of its own."""

    class Dear(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, entry, exit_cached, *, time=None, text=None):
            return exit_cached + 0 * self.own(exit_cached)

    unet = tiny()
    plan = ch.plan(unet, sampler(unet), [1], min_saving=0.1, adaptor=[None, Dear()], clocks=(2,), probes=1)
    free, dear = (
        next(o for o in plan.options if o.region.startswith("level 1") and (o.region[-4:] == "Dear") == which)
        for which in (False, True)
    )
    assert free.kind == dear.kind == "clock 2"
    full = ch.find_region(unet, torch.zeros(1, 2, 16, 16), 0.5).full_macs
    assert free.saved - dear.saved == pytest.approx(4 * 4 * 9 * 256 / full * 4 / 8, rel=1e-6)


def test_a_saved_adaptor_is_named_by_its_folder(tmp_path):
    unet = tiny()
    region = ch.find_region(unet, torch.zeros(1, 2, 16, 16), 0.5)
    folder = str(tmp_path / "saved")
    ch.ResNetAdaptor.for_region(region, width=8).save_pretrained(folder)
    plan = ch.plan(unet, sampler(unet), [1], max_error=0.9, adaptor=folder, clocks=(2,), probes=1)
    assert (plan.adaptor_name, plan.adaptor_folder) == ("ResNetAdaptor", folder)
    again = ch.Plan.from_json(plan.to_json())
    assert again.adaptor == folder
    with torch.no_grad(), ch.wrap(unet, plan=again) as cw:
        sampler(unet)(1, 0)
    assert cw.stats.adaptor_passes > 0
    other = ch.find_region(unet, torch.zeros(1, 2, 16, 16), 0.5, level=2)
    with pytest.raises(ch.AdaptorError, match="made for"):
        ch.plan(unet, sampler(unet), [1], max_error=0.9, adaptor=folder, regions=[other], clocks=(2,), probes=1)


@pytest.mark.parametrize("named", [str, Path])
def test_a_saved_adaptor_is_followed_where_the_unet_runs(named, tmp_path):
    """It is loaded on the CPU: the first call that it is compared in moves it, however its folder was passed."""
    unet = tiny()
    region = ch.find_region(unet, torch.zeros(1, 2, 16, 16), 0.5)
    ch.ResNetAdaptor.for_region(region, width=8).save_pretrained(tmp_path)
    wide = unet.double()

    def generate(count, seed):
        x = torch.randn(count, 2, 16, 16, generator=torch.Generator().manual_seed(seed)).double()
        for t in TIMES:
            x = x - wide(x, t) / 8
        return x

    (one,) = candidates(sampling.first_call(unet, generate, 1, 0), unet, None, named(tmp_path))
    sampling.follow(sampling.Runs(unet, generate, [(1, 0)]), [one], 1, lambda: None)
    assert {parameter.dtype for parameter in one.adaptor.parameters()} == {torch.float64}


@pytest.mark.parametrize("choice", [{"cut": "paper"}, {"level": 2}, {"entry": "stem", "exit": "up1"}])
def test_any_region_is_found_again_from_the_json(choice):
    unet = tiny()
    region = ch.find_region(unet, torch.zeros(1, 2, 16, 16), 0.5, **choice)
    plan = ch.plan(unet, sampler(unet), [1], max_error=0.9, regions=[region], clocks=(2,), probes=1)
    with torch.no_grad(), ch.wrap(unet, plan=ch.Plan.from_json(plan.to_json())) as cw:
        sampler(unet)(1, 0)
    assert cw.region.fingerprint == plan.fingerprint == region.fingerprint


def test_a_plan_serves_the_unet_that_it_was_made_for():
    """The other has a region below its first level too, but nobody has measured that."""
    unet, other = tiny(), Tiny().eval()
    plan = ch.Plan.from_json(ch.plan(unet, sampler(unet), [1], max_error=0.9, clocks=(2,), probes=1).to_json())
    with torch.no_grad(), ch.wrap(other, plan=plan), pytest.raises(ch.RegionNotFoundError, match="model: Tiny"):
        other(torch.zeros(1, 2, 16, 16), torch.tensor(0.5))


# -- milliseconds --------------------------------------------------------------------------------------------------


def test_milliseconds_are_weighed_when_asked(monkeypatch):
    """Level 2 holds most of the MACs, but the time goes into a layer of level 1, which level 2 does not skip."""
    clock = [0.0]
    monkeypatch.setattr(sampling, "now", lambda device: clock[0])

    class Slow(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            clock[0] += 0.009
            return self.inner(x)

    signs = {t: (-1.0) ** k for k, t in enumerate(TIMES)}
    unet = tiny(upper=lambda t: 5 * signs[t])
    unet.body1 = Slow(unet.body1)

    def pace(module, args):
        clock[0] += 0.001

    unet.stem.register_forward_pre_hook(pace)
    run = sampler(unet, rate=0.02)
    plans = {
        weigh: ch.plan(unet, run, [1], min_saving=0.2, weigh=weigh, clocks=(2,), probes=1) for weigh in ("MACs", "ms")
    }
    assert plans["MACs"].chosen.region.startswith("level 2")
    assert plans["MACs"].chosen.saved_ms is None
    plan = plans["ms"]
    assert plan.chosen.region.startswith("level 1")
    assert plan.chosen.saved_ms == pytest.approx(0.9 * len(plan.chosen.steps) / 8)
    assert max(o.saved_ms for o in plan.options if o.region.startswith("level 2")) == pytest.approx(0)
    assert ">ms saved" in plan.table().columns
    assert ch.Plan.from_json(plan.to_json()) == plan
    data = json.loads(plan.to_json())
    broken = [{**data, "choice": one} for one in (None, 3, ["level"], {"level": 0}, {"unknown": 1})]
    broken += [{**data, "chosen": {**data["chosen"], "threshold": one}} for one in (10**400, "x", -1)]
    broken += [{**data, "chosen": {**data["chosen"], "steps": one}} for one in (None, [0], ["x"], 3)]
    for one in [*broken, [data], 7]:
        with pytest.raises(ch.ArgumentError):
            ch.Plan.from_json(json.dumps(one))


# -- adaptive schedules --------------------------------------------------------------------------------------------


def own_pace(unet, gains):
    """The sample moves as `gains` say, whatever the UNet returns; the result is all that it returned."""

    def generate(count, seed):
        x = torch.randn(count, 2, 16, 16, generator=torch.Generator().manual_seed(seed))
        results = []
        for t, gain in zip(TIMES, gains, strict=True):
            x = x * gain
            results.append(unet(x, t))
        return torch.cat(results, 1)

    return generate


@pytest.mark.parametrize("longest", [2, 4])
@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.35, 0.9])
def test_the_simulated_steps_are_those_of_a_run(threshold, longest):
    unet = tiny()
    generate = own_pace(unet, (1.0, 1.1, 1.3, 1.1, 1.02, 1.02, 1.2, 1.01))
    drift = ch.measure_drift(unet, generate, [1], clocks=(2, 6))
    name = next(iter(drift.regions))
    expected = adaptive_steps(drift.entries[name], threshold, longest)
    with torch.no_grad():
        region = ch.find_region(unet, torch.zeros(1, 2, 16, 16), TIMES[0])
        counts = [0]
        with (
            ch.wrap(unet, region=region, schedule=ch.Schedule.adaptive(threshold, longest=longest)) as cw,
            cw.trajectory(),
        ):

            def count(*_):
                counts.append(cw.stats.adaptor_passes)

            unet.register_forward_hook(count)
            generate(1, 0)
    seen = tuple(step for step, (a, b) in enumerate(itertools.pairwise(counts), 1) if b > a)
    assert seen == expected


def test_the_smallest_threshold_that_reaches():
    entries = ((None, 0.1, 0.3, 0.1, 0.2), (None, None, 0.35, 0.4, 0.25))
    for count in range(1, 5):
        threshold = threshold_for(entries, count, 3)
        if threshold is None:
            assert all(len(adaptive_steps(entries, v, 3)) < count for v in (0.1, 0.2, 0.3, 0.4, 9.0))
        else:
            assert len(adaptive_steps(entries, threshold, 3)) >= count
            assert len(adaptive_steps(entries, threshold * 0.999, 3)) < count


def test_adaptive_schedules_are_compared_and_not_chosen():
    unet = tiny(upper=lambda t: 1 + 5 * t)
    plan = ch.plan(unet, sampler(unet), [1], min_saving=0.2, clocks=(2, 3), probes=3, adaptive=True)
    adaptive = [option for option in plan.options if option.kind == "adaptive"]
    assert [option.region[:7] for option in adaptive] == ["level 1"] * 2  # no module sees the entry of level 2
    for option in adaptive:
        assert option.threshold > 0
        assert option.schedule == ch.Schedule.adaptive(option.threshold, longest=option.longest)
        alike = [o.saved for o in plan.options if o.region == option.region and o.kind.startswith("clock")]
        assert min(abs(option.saved - saved) for saved in alike) < 0.15
    assert plan.chosen.kind != "adaptive"
    assert f"adaptive({adaptive[0].threshold:g}, longest=6)" in plan.to_markdown()
    assert ch.Plan.from_json(plan.to_json()) == plan


def test_planned_sets_save_as_much_as_each_clock():
    unet = tiny(upper=lambda t: 1 + 5 * t)
    plan = ch.plan(unet, sampler(unet), [1], min_saving=0.2, clocks=(2, 4), probes=3)
    for clock in [option for option in plan.options if option.kind.startswith("clock")]:
        same = [o for o in plan.options if (o.region, o.kind) == (clock.region, "planned") and o.saved == clock.saved]
        assert len(same[0].steps) == len(clock.steps)
        assert clock.predicted is not None
        assert same[0].predicted <= clock.predicted * (1 + 1e-9)


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weigh": "FLOPs"}, 'weighs "MACs" or "ms"'),
        ({"longest": 0}, "longest is an int"),
        ({"adaptor": []}, "each region needs an adaptor"),
        ({"clocks": ()}, "clocks that skip"),
        ({"clocks": 2}, "clocks: 2"),
        ({"held_out": []}, "needs conditions and seeds"),
        ({"held_out_seeds": ()}, "needs conditions and seeds"),
        (
            {"guidance": 3.0},
            'used only where an adaptor is calibrated\n  guidance: 3.0\n(.*\n)*.*adaptor="?.calibrated',
        ),
        ({"adaptor": "identity", "log_snr": float}, "used only where an adaptor is calibrated"),
    ],
)
def test_bad_options_are_told(options, said):
    unet = tiny()
    with pytest.raises(ch.ArgumentError, match=said):
        ch.plan(unet, sampler(unet), [1], **{"max_error": 0.1, "clocks": (2,), "probes": 1, **options})


@pytest.mark.parametrize("measure", [ch.measure_robustness, ch.measure_drift, lambda *a: ch.plan(*a, max_error=0.1)])
@pytest.mark.parametrize(
    ("generate", "conditions"),
    [(None, [1]), (sampler(tiny()), 3), (sampler(tiny()), "a cat"), (sampler(tiny()), {"count": 1})],
)
def test_a_function_and_a_list_are_asked_for(measure, generate, conditions):
    with pytest.raises(ch.ArgumentError, match="a list of batches"):
        measure(tiny(), generate, conditions)


def test_results_that_are_no_numbers_are_told():
    unet = tiny()
    run = sampler(unet)
    with pytest.raises(ch.ArgumentError, match="finite"):
        ch.measure_drift(unet, lambda batch, seed: run(batch, seed) * float("nan"), [1])


def endless(unet, keeps):
    """A sampler whose results are infinite where `keeps(seed, result, the first result of the seed)` says no."""
    run, plain = sampler(unet), {}

    def generate(batch, seed):
        result = run(batch, seed)
        first = plain.setdefault(seed, result)
        return result if keeps(seed, result, first) else result * float("inf")

    return generate


@pytest.mark.parametrize("seeds", [(0, 1_000_003), (1_000_003,)])
def test_no_plan_has_results_that_are_no_numbers(seeds):
    """The least of infinite errors was chosen; and so was one whose results were no numbers where it was judged."""
    unet = tiny()
    generate = endless(unet, lambda seed, result, first: seed not in seeds or torch.equal(result, first))
    with pytest.raises(ch.ArgumentError, match=r"must be finite\n(.*\n)*What to do: ask for less"):
        ch.plan(unet, generate, [1], min_saving=0.2, clocks=(2,), probes=1)


def test_results_that_are_no_numbers_are_on_no_front_and_come_back_from_json():
    unet = tiny()
    generate = endless(unet, lambda seed, result, first: (result - first).norm() < 3e-4 * first.norm())
    plan = ch.plan(unet, generate, [1], min_saving=0.01, clocks=(2, 3, 4), probes=3)
    infinite = [one for one in plan.options if one.measured == float("inf")]
    assert infinite
    assert not set(infinite) & set(plan.pareto())
    drift = ch.measure_drift(unet, generate, [1], clocks=(4,))
    assert Drift.from_json(drift.to_json()) == drift
    assert "inf" in str(Drift.from_json(drift.to_json()))


def test_the_json_of_a_drift_has_every_candidate():
    unet = tiny()
    drift = ch.measure_drift(unet, sampler(unet), [1], adaptor=[Mixed(), Mixed()], clocks=(2,))
    names = list(json.loads(drift.to_json())["errors"])
    assert [name.partition("MACs")[2] for name in names] == [", Mixed", ", Mixed #2"]
    with torch.no_grad():
        trace = ch.trace(unet, torch.zeros(1, 2, 16, 16), 0.5)
    assert [one.name for one in candidates(trace, unet, None, [None, Mixed()])][-1] == names[0]


# -- calibrated adaptors, and rules of thumb ---------------------------------------------------------------------------


def test_sensitivities_are_measured_with_the_calibrated_adaptor_in_place():
    """What is affine in the cached exit costs nothing with the adaptor."""
    unet = calibration.Blocks(**calibration.WORLDS["affine"])
    generate, batches = calibration.sampler(unet), [(4, 2.0), (4, 2.0)]
    options = {"min_saving": 0.3, "clocks": (2,), "probes": 3, "guidance": 2.0}
    region = ch.find_region(unet, torch.zeros(8, 2, 8, 8), 1.0, torch.zeros(8, 3))
    plan = ch.plan(unet, generate, batches, adaptor=["identity", "calibrated"], regions=[region], **options)
    assert plan.chosen.region.endswith("calibrated")
    assert isinstance(plan.adaptor, ch.CalibratedAdaptor)
    assert plan.adaptor.facts["schedule"] == str(plan.schedule)  # calibrated once more, for these steps
    worst = max(o.measured for o in plan.options if o.region.endswith("calibrated") and o.measured is not None)
    best = min(o.measured for o in plan.options if o.region.endswith("MACs") and o.measured is not None)
    assert worst < 0.02 * best
    assert plan.held_out < 0.02 * best
    assert plan.rule in str(plan)
    with ch.wrap(unet, plan=plan) as cw, torch.no_grad(), cw.trajectory():
        generate(batches[0], 0)
        generate(batches[0], 0)
    again = ch.Plan.from_json(plan.to_json(), adaptor=plan.adaptor)
    assert (again, again.rule) == (plan, plan.rule)


def test_what_follows_a_trend_is_judged_with_the_trend():
    """What moves on a line is exact wherever two full passes come first; an adaptor for any steps lags behind."""
    unet = Drifting()
    generate, batches = calibration.sampler(unet, times=STEPS), [(4, 2.0), (4, 2.0)]
    region = ch.find_region(unet, torch.zeros(8, 2, 8, 8), 950.0, torch.zeros(8, 3))
    options = {"min_saving": 0.4, "clocks": (2,), "probes": 3, "guidance": 2.0, "regions": [region]}
    plan = ch.plan(unet, generate, batches, adaptor="calibrated", **options)
    lagging = {option.steps: option.measured for option in plan.options if option.measured is not None}
    assert plan.adaptor.facts["kind"].endswith("+trend")
    assert plan.held_out < 1e-3 * min(lagging.values())
    assert plan.chosen.kind.startswith("rule early") or plan.rule.startswith("early")
    assert plan.chosen.saved >= 0.4


@pytest.mark.parametrize("least", [0.05, 0.45])
def test_what_a_plan_saves_is_what_its_own_adaptor_saves(least, monkeypatch):
    """Calibrated once more it may be of another kind, which costs more: such a plan saved less than was asked for."""
    unet = calibration.Blocks(mix=0.5, gain=lambda t: 1 + t / 500)
    generate, batches = calibration.sampler(unet, times=STEPS), [(4, 2.0), (4, 2.0)]

    def calibrate(*args, schedule, **options):
        return ch.calibrate(*args, schedule=schedule, kind="affine" if schedule is None else "exit+entry", **options)

    monkeypatch.setattr(planning, "calibrate", calibrate)
    options = {"clocks": (2,), "probes": 3, "guidance": 2.0}
    plan = ch.plan(unet, generate, batches, adaptor="calibrated", min_saving=least, **options)
    with ch.wrap(unet, plan=plan) as cw, torch.no_grad():
        with cw.trajectory():
            generate(batches[0], 0)  # the first call is recorded
        cw.stats.clear()
        with cw.trajectory():
            generate(batches[0], 0)
        assert cw.stats.saving == pytest.approx(plan.chosen.saved, abs=0.01)
        assert cw.stats.saving >= least
    assert plan.chosen in plan.options
    assert plan.adaptor.facts["kind"] == ("exit+entry" if least < 0.4 else "affine")


def test_rules_of_thumb_are_among_what_is_measured():
    unet = tiny()
    plan = ch.plan(unet, sampler(unet), [1], min_saving=0.2, clocks=(2,), probes=2)
    kinds = {option.kind: option.steps for option in plan.options if option.kind.startswith("rule")}
    assert kinds == {
        "rule spread(2)": (3, 4, 6, 7),
        "rule early(2)": (3, 5, 6, 7),
        "rule every(2, first_full=2, last_full=1)": (3, 5, 7),
    }
    assert all(option.measured is not None for option in plan.options if option.kind.startswith("rule"))


@pytest.mark.parametrize(
    ("chosen", "steps", "said"),
    [
        ({2, 4, 6, 8}, 8, "every(2)"),
        ({3, 4, 6, 7}, 8, "spread(2)"),
        ({3, 4, 5, 7, 8}, 9, "every(4, first_full=2, last_full=1)"),
        ({2}, 2, "every(2)"),
        ({2, 3, 5, 8, 12}, 12, "nearly"),
    ],
)
def test_steps_amount_to_a_rule_of_thumb(chosen, steps, said):
    rule = rule_of_thumb(chosen, steps)
    assert rule.startswith(said)
    if not rule.startswith("nearly"):
        assert set(ch.Schedule.parse(rule).adaptor_steps(steps)) == chosen
