"""Robustness, drift and plans on UNets whose answers are known in advance, and on the zoo."""

import itertools
import json

import pytest
import torch
from torch import nn

import clockwork_hooks as ch
from clockwork_hooks.analysis.planning import Sensitivity, probe_steps
from clockwork_hooks.analysis.robustness import disturb, find_maps
from tests.snapshot import snapshot
from tests.zoo import ZOO

TIMES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


class TwoLevels(nn.Module):
    """Two levels below the top; `upper` and `lower` say how each one's output depends on the time."""

    def __init__(self, upper=lambda t: 1.0, lower=lambda t: 1.0):
        super().__init__()
        self.upper, self.lower = upper, lower
        self.stem, self.head = nn.Conv2d(2, 4, 3, 1, 1), nn.Conv2d(8, 2, 3, 1, 1)
        self.down1, self.up1 = nn.Conv2d(4, 8, 4, 2, 1), nn.ConvTranspose2d(16, 4, 4, 2, 1)
        self.body1 = nn.Conv2d(8, 8, 3, 1, 1)
        self.down2, self.up2 = nn.Conv2d(8, 16, 4, 2, 1), nn.ConvTranspose2d(16, 8, 4, 2, 1)
        self.body2 = nn.Conv2d(16, 32, 3, 1, 1)
        self.body3 = nn.Conv2d(32, 16, 3, 1, 1)

    def forward(self, x, t):
        top = self.stem(x)
        one = self.body1(self.down1(top)) * self.upper(t)
        two = self.up2(self.body3(self.body2(self.down2(one / self.upper(t)))) * self.lower(t))
        return self.head(torch.cat([top, self.up1(torch.cat([one, two], 1))], 1))


def sampler(unet, times=TIMES, rate=0.1):
    def generate(count, seed):
        x = torch.randn(count, 2, 16, 16, generator=torch.Generator().manual_seed(seed))
        for t in times:
            x = x - rate * unet(x, t)
        return x

    return generate


def tiny(**options):
    torch.manual_seed(0)
    return TwoLevels(**options).eval()


# -- maps ----------------------------------------------------------------------------------------------------------


class Shortcut(nn.Module):
    """A block whose sum flows on through an activation, and beside it through a shortcut that is an Identity."""

    def __init__(self, a, b):
        super().__init__()
        self.layer, self.act, self.skip = nn.Conv2d(a, b, 3, 1, 1), nn.SiLU(), nn.Identity()

    def forward(self, x):
        h = self.layer(x)
        return self.act(h) + self.skip(h)


class Shortcuts(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.down, self.up = Shortcut(2, 4), nn.Conv2d(4, 8, 4, 2, 1), nn.ConvTranspose2d(8, 4, 4, 2, 1)
        self.body, self.head = Shortcut(8, 8), nn.Conv2d(8, 2, 3, 1, 1)

    def forward(self, x, t):
        h = self.stem(x)
        return self.head(torch.cat([h, self.up(self.body(self.down(h)))], 1)) * t


def test_a_map_is_what_flows_on_not_what_a_shortcut_hands_on():
    """With alpha 0 nothing of a map is left, neither in the sum's way nor in the shortcut's."""
    torch.manual_seed(0)
    unet, x = Shortcuts().eval(), torch.randn(1, 2, 16, 16)
    maps = find_maps(ch.trace(unet, x, 0.5), unet)
    assert [one.path for one in maps if one.kind == "first"] == ["stem.layer"]
    seen = []
    handle = unet.stem.skip.register_forward_hook(lambda m, args, output: seen.append(args[0]))
    ch.measure_robustness(unet, lambda n, seed: unet(x, 0.5), [1], maps=["first"], starts=(1,), alpha=0.0)
    handle.remove()
    plain = unet.stem.layer(x)
    assert torch.equal(seen[-2], plain)
    assert not torch.equal(seen[-1], plain)
    assert not any(one.path.endswith("skip") for one in maps)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "sd15",
            {
                "first": "conv_in",
                "down 16×16": "down_blocks.0.attentions.1",
                "down 8×8": "down_blocks.1.attentions.1",
                "bottleneck 2×2": "mid_block.resnets.1",
                "up 8×8": "up_blocks.1.upsamplers.0.conv",
                "up 16×16": "up_blocks.2.upsamplers.0.conv",
            },
        ),
        ("plain", {"first": "down1.0", "bottleneck 4×6": "middle.4", "up 16×24": "up1"}),
        ("unet1d", {"down 32": "down_blocks.1.resnets.2", "bottleneck 8": "mid_block.attentions.5"}),
        ("monai3d", {"bottleneck 2×3×4": "middle_block.resnet_2", "up 8×12×16": "up_blocks.1.upsampler.postconv.conv"}),
    ],
)  # fmt: skip
def test_maps_are_found_in_the_graph(name, expected):
    case = ZOO[name]()
    maps = {one.name: one.path for one in find_maps(ch.trace(case.model, *case.args, **case.kwargs), case.model)}
    assert {key: maps.get(key) for key in expected} == expected


# -- robustness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("statistics", "axes"), [("channel", (2, 3)), ("map", (1, 2, 3))])
def test_noise_keeps_the_statistics(statistics, axes):
    torch.manual_seed(0)
    f = torch.randn(2, 3, 64, 64, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.2]).view(1, 3, 1, 1) + 2
    noisy = disturb(f, 0.3, statistics, torch.randn_like(f))
    assert torch.allclose(noisy.mean(axes), f.mean(axes), atol=0.25)
    assert torch.allclose(noisy.std(axes), f.std(axes), rtol=0.05)
    centred = [x - x.mean(axes, keepdim=True) for x in (f, noisy)]
    cosine = (centred[0] * centred[1]).sum() / (centred[0].norm() * centred[1].norm())
    assert abs(float(cosine) - 0.3**0.5) < 0.03
    assert torch.equal(disturb(f, 1.0, statistics, torch.randn_like(f)).round(decimals=9), f.round(decimals=9))


def test_a_later_start_disturbs_less_and_no_noise_disturbs_nothing():
    unet = tiny()
    result = ch.measure_robustness(unet, sampler(unet), [2], starts=(1, 4, 8))
    assert [one.name for one in result.maps][-2:] == ["up 8×8", "up 16×16"]
    for one in result.maps:
        first, middle, last = result.distances[one.name]
        assert first > middle > last > 0
    none = ch.measure_robustness(unet, sampler(unet), [2], starts=(1,), alpha=1.0)
    assert max(none.distances[one.name][0] for one in none.maps) < 1e-4 * none.norm


def test_a_map_that_reaches_nothing_disturbs_nothing():
    """The lower level is multiplied by zero: its map may be anything."""
    unet = tiny(lower=lambda t: 0.0)
    result = ch.measure_robustness(unet, sampler(unet), [1], starts=(1,))
    assert result.distances["bottleneck 4×4"] == (0.0,)
    assert result.distances["up 16×16"][0] > 0


def test_a_disturbance_is_what_a_hook_of_ones_own_makes_it():
    """Recomputed without the library's steps and hooks: the last step alone, on the first convolution."""
    unet, seed = tiny(), 3
    result = ch.measure_robustness(unet, sampler(unet), [1], maps=["first"], starts=(8,), seeds=(seed,))
    calls = []

    def hook(module, args, output):
        calls.append(1)
        if len(calls) == 8:
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(1_000_003 * (seed + 1) + 8))
            return disturb(output, 0.3, "channel", noise)
        return None

    with torch.no_grad():
        plain = sampler(unet)(1, seed)
        handle = unet.stem.register_forward_hook(hook)
        other = sampler(unet)(1, seed)
        handle.remove()
    assert result.distances["first"][0] == pytest.approx(float((other - plain).norm()), rel=1e-5)


def test_results_are_written_and_drawn(tmp_path):
    unet = tiny()
    run = sampler(unet)
    result = ch.measure_robustness(unet, lambda b, s: run(b, s)[:, :1], [1], maps=["first", "up 16×16"], starts=(1, 8))
    assert ch.Robustness.from_json(result.to_json()) == result
    assert json.loads(result.to_json())["alpha"] == 0.3
    for write, name in ((result.plot, "curves.png"), (result.plot_grid, "grid.png")):
        write(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    with pytest.raises(ch.ArgumentError, match="a grid shows pictures"):
        ch.Robustness.from_json(result.to_json()).plot_grid(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 1.5}, "α is a share"),
        ({"statistics": "row"}, "statistics are those"),
        ({"starts": (9,)}, "choose from 1 to 8"),
        ({"starts": ()}, "none given"),
        ({"maps": ["up 16x16"]}, "up 16×16"),
        ({"maps": []}, "feature maps are chosen by their names"),
        ({"seeds": ()}, "needs conditions and seeds"),
        ({"seeds": 3}, "seeds are a sequence"),
        ({"seeds": ([0], [1])}, r"seeds: \(\[0\], \[1\]\)"),
        ({"seeds": (0.5,)}, "seeds are a sequence of ints"),
        ({"seeds": "01"}, "seeds are a sequence of ints"),
    ],
)
def test_bad_options_are_told(options, said):
    unet = tiny()
    before = snapshot(unet)
    with pytest.raises(ch.ArgumentError, match=said):
        ch.measure_robustness(unet, sampler(unet), [1], **options)
    assert snapshot(unet) == before


@pytest.mark.parametrize("measure", [ch.measure_robustness, ch.measure_drift, lambda *a: ch.plan(*a, max_error=0.1)])
def test_results_that_are_no_numbers_are_nothing_to_compare_with(measure):
    unet = tiny()
    with pytest.raises(ch.ArgumentError, match="not finite: 512 of 512 values"):
        measure(unet, lambda batch, seed: sampler(unet)(batch, seed) * torch.nan, [1])


@pytest.mark.parametrize("measure", [ch.measure_robustness, ch.measure_drift, lambda *a: ch.plan(*a, max_error=0.1)])
def test_a_wrapped_or_compiled_unet_is_refused(measure):
    unet = tiny()
    compiled = torch.compile(unet, backend="eager")
    with pytest.raises(ch.WrapError, match=r"the output of torch\.compile"):
        measure(compiled, sampler(compiled), [1])
    with ch.wrap(unet), pytest.raises(ch.WrapError, match="wrapped only once"):
        measure(unet, sampler(unet), [1])


@pytest.mark.parametrize("measure", [ch.measure_robustness, ch.measure_drift, lambda *a: ch.plan(*a, max_error=0.1)])
def test_a_sampler_that_never_calls_the_unet(measure):
    unet, other = tiny(), tiny()
    with pytest.raises(ch.ArgumentError, match="calls of the UNet: 0"):
        measure(unet, sampler(other), [1])


@pytest.mark.parametrize("measure", [ch.measure_robustness, ch.measure_drift, lambda *a: ch.plan(*a, max_error=0.1)])
def test_a_sampler_that_fails_leaves_the_unet_as_it_was(measure):
    unet = tiny()
    before, runs = snapshot(unet), []

    def fails(batch, seed):
        runs.append(1)
        result = sampler(unet)(batch, seed)
        if len(runs) > 2:
            raise RuntimeError("mine")
        return result

    with pytest.raises(RuntimeError, match="mine"):
        measure(unet, fails, [1])
    assert snapshot(unet) == before


# -- drift ---------------------------------------------------------------------------------------------------------


def test_drift_is_what_the_exits_say():
    """Recomputed from exits recorded by plain hooks."""
    unet = tiny(upper=lambda t: 1 + 5 * t)
    drift = ch.measure_drift(unet, sampler(unet), [2], clocks=(2, 4))
    assert [name.split(",")[0] for name in drift.regions] == ["level 1", "level 2"]
    for name, module in zip(drift.regions, (unet.up1, unet.up2), strict=True):
        exits = []
        handle = module.register_forward_hook(lambda m, a, out, exits=exits: exits.append(out))
        with torch.no_grad():
            sampler(unet)(2, 0)
        handle.remove()
        for age in (1, 2, 3):
            want = [(b - a).norm() / b.norm() for a, b in zip(exits, exits[age:], strict=False)]
            got = drift.errors[name][age - 1]
            assert got[:age] == (None,) * age
            assert list(got[age:]) == pytest.approx([float(w) for w in want], rel=1e-4)
        cosines = [float(torch.cosine_similarity(a.flatten(), b.flatten(), 0)) for a, b in itertools.pairwise(exits)]
        assert list(drift.cosines[name][1:]) == pytest.approx(cosines, rel=1e-4)
        errors = drift.error(name, 4)
        assert [k for k, e in enumerate(errors, 1) if e is None] == [1, 5]
        assert errors[3] == drift.errors[name][2][3]


def test_a_batch_of_another_size_counts_from_its_second_step_on():
    """Its first call is traced while it runs, and is placed when it is over."""
    unet, exits = tiny(upper=lambda t: 1 + 5 * t), []
    handle = unet.up1.register_forward_hook(lambda module, args, out: exits.append(out))
    with torch.no_grad():
        both = [sampler(unet)(2, 0), sampler(unet)(1, 0)]
    handle.remove()
    assert len(both) * len(TIMES) == len(exits)
    change = exits[1] - exits[0], exits[len(TIMES) + 1] - exits[len(TIMES)]
    want = torch.cat(change).norm() / torch.cat([exits[1], exits[len(TIMES) + 1]]).norm()
    drift = ch.measure_drift(unet, sampler(unet), [2, 1], clocks=(2,))
    name = next(iter(drift.regions))
    assert drift.changes[name][1] == pytest.approx(float(want), rel=1e-5)
    assert drift.error(name, 2)[1] == drift.changes[name][1]


def test_effects_are_those_of_the_clock():
    unet = tiny(upper=lambda t: 1 + 5 * t)
    drift = ch.measure_drift(unet, sampler(unet), [2], clocks=(3,))
    with torch.no_grad():
        plain = sampler(unet)(2, 0)
        with ch.wrap(unet, clock=3) as cw, cw.trajectory():
            other = sampler(unet)(2, 0)
    want = ((other - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)).mean()
    name = next(name for name, line in drift.regions.items() if line == cw.region.line)
    assert drift.effects[name][3] == pytest.approx(float(want), rel=1e-5)


def test_branches_are_not_compared_with_each_other():
    """Guidance in two calls: the exit of one branch is compared with its own of the step before."""
    unet = tiny()
    flat = ch.measure_drift(unet, sampler(unet), [1], clocks=(2,))

    class Guided(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = unet

        def forward(self, x, t, label):
            return self.inner(x, t) * (1 if label is None else 0)

    both = Guided().eval()

    def generate(count, seed):
        x = torch.randn(count, 2, 16, 16, generator=torch.Generator().manual_seed(seed))
        for t in TIMES:
            first, _ = both(x, t, None), both(-3 * x, t, "other")
            x = x - 0.1 * first
        return x

    drift = ch.measure_drift(both, generate, [1], clocks=(2,))
    level = next(name for name in drift.regions if name.startswith("level 2"))
    alone = next(name for name in flat.regions if name.startswith("level 2"))
    assert max(drift.changes[level][1:]) < 5 * max(flat.changes[alone][1:])  # not the 3 x between the branches


def test_drift_is_written_and_drawn(tmp_path):
    unet = tiny()
    drift = ch.measure_drift(unet, sampler(unet), [1], clocks=(2,))
    assert ch.Drift.from_json(drift.to_json()) == drift
    drift.plot(tmp_path / "drift.png")
    assert (tmp_path / "drift.png").stat().st_size > 5000
    with pytest.raises(ch.ArgumentError, match="measured: 2 to 2"):
        drift.error(next(iter(drift.regions)), 3)


# -- plans ---------------------------------------------------------------------------------------------------------


def test_the_sensitive_level_is_left_alone():
    """The upper level flips its sign at every step, the lower one is constant: the plan skips the lower one."""
    signs = {t: (-1.0) ** k for k, t in enumerate(TIMES)}
    unet = tiny(upper=lambda t: 5 * signs[t])
    plan = ch.plan(unet, sampler(unet, rate=0.02), [1], min_saving=0.25, clocks=(2,), probes=4)
    assert plan.chosen.region.startswith("level 2")
    assert plan.chosen.measured < 0.2 * min(o.error for o in plan.options if o.region.startswith("level 1"))


def test_the_sensitive_steps_stay_full():
    """The time matters in the first three steps alone: none of them may use the adaptor."""
    gains = dict(zip(TIMES, (9.0, 1.0, 7.0, 2.0, 2.0, 2.0, 2.0, 2.0), strict=True))
    unet = tiny(upper=lambda t: gains[t], lower=lambda t: gains[t])
    plan = ch.plan(unet, sampler(unet, rate=0.02), [1], min_saving=0.2, clocks=(2,), probes=8)
    assert min(plan.chosen.steps) >= 5  # step 4 differs from step 3
    clock = min(o.error for o in plan.options if o.kind == "clock 2")
    assert plan.chosen.measured < 0.5 * clock
    assert plan.held_out < 0.5 * clock


def test_a_plan_is_what_wrap_runs(tmp_path):
    unet = tiny()
    plan = ch.plan(unet, sampler(unet), [1], max_error=0.2, clocks=(2,), probes=3)
    assert plan.chosen.measured <= 0.2
    again = ch.Plan.from_json(plan.to_json())
    assert again == plan
    results = []
    for one in (plan, again):
        with torch.no_grad(), ch.wrap(unet, plan=one) as cw, cw.trajectory():
            sampler(unet)(1, 0)  # traces
            cw.stats.clear()
            results.append(sampler(unet)(1, 0))
        assert cw.region.fingerprint == plan.fingerprint
        assert cw.stats.adaptor_passes == len(plan.chosen.steps)
        assert cw.stats.saving == pytest.approx(plan.chosen.saved, abs=1e-6)
    assert torch.equal(*results)
    plan.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 5000
    assert "chosen" in plan.to_markdown()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "one budget"),
        ({"max_error": 0.1, "min_saving": 0.1}, "one budget"),
        ({"min_saving": 1.2}, "between 0 and 1"),
        ({"min_saving": 0.99}, "most that can be saved"),
        ({"max_error": 1e-9}, "least error"),
        ({"max_error": 0.1, "probes": 0}, "probes"),
        ({"max_error": 0.1, "clocks": (1,)}, "clocks that skip"),
        ({"max_error": 0.1, "regions": ["level 1"]}, "candidates are regions"),
        ({"max_error": 0.1, "regions": 3}, "candidates are regions"),
        ({"max_error": 0.1, "regions": [], "adaptor": "calibrated"}, "candidates are regions"),
    ],
)
def test_bad_budgets_are_told(options, said):
    unet = tiny(upper=lambda t: 1 + 5 * t)
    with pytest.raises(ch.ArgumentError, match=said):
        ch.plan(unet, sampler(unet), [1], **{"clocks": (2,), "probes": 2, **options})


def test_no_json_is_no_plan():
    with pytest.raises(ch.ArgumentError, match="a plan is what"):
        ch.Plan.from_json("{}")


def test_the_search_finds_the_best_set_of_a_small_problem():
    """Against all sets of the same size."""
    from itertools import combinations

    generator = torch.Generator().manual_seed(0)
    ages = tuple(
        tuple(None if k <= a else float(torch.rand((), generator=generator)) * (a + 1) for k in range(9))
        for a in range(3)
    )
    search = Sensitivity(ages, {s: float(torch.rand((), generator=generator)) for s in range(2, 10)})
    sets = search.best()
    assert [len(chosen) for chosen in sets] == list(range(1, len(sets) + 1))
    for chosen in sets:
        best = min(search.predicted(frozenset(c)) for c in combinations(range(2, 10), len(chosen)))
        assert search.predicted(chosen) == pytest.approx(best)


def test_probes_are_spread():
    assert probe_steps(2, 12) == (2,)
    assert probe_steps(9, 99) == tuple(range(2, 10)) or set(probe_steps(9, 99)) <= set(range(2, 10))
    assert probe_steps(50, 12)[0] == 2
    assert probe_steps(50, 12)[-1] == 50
