"""Calibrated adaptors on UNets whose exits are known to be linear in what the adaptor reads."""

import concurrent.futures
import contextlib
import json
import math
import warnings
import weakref

import pytest
import torch
from torch import nn

import clockwork_hooks as ch
from clockwork_hooks.adaptors.calibrated import CalibratedAdaptor, Knot, Positions
from clockwork_hooks.analysis import calibration
from clockwork_hooks.analysis.calibration import Calibration, calibrate, log_snr_of
from clockwork_hooks.analysis.normal_equations import KINDS, NormalEquations, Shape, shared_basis
from tests.schemas import follows_its_schema
from tests.snapshot import snapshot

TIMES = (900.0, 790.0, 670.0, 540.0, 400.0, 250.0)


class Blocks(nn.Module):
    """Maps that are constant over blocks of 2 stay so: what the region emits is a function of each block's own values.

    exit = gain(t)·f(c) + mix·M·entry + bias(t), with f not linear.
    """

    def __init__(self, gain=lambda t: 1.0, bias=lambda t: 0.0, mix=0.0, rank=2):
        super().__init__()
        torch.manual_seed(0)
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
        self.gain, self.bias, self.mix, self.rank = gain, bias, mix, rank
        self.stem, self.head = conv(2, 6, 1), conv(10, 2, 1)
        self.down, self.up = conv(6, 12, 2, 2), conv(12, 4, 1)
        self.side = nn.Linear(3, 12)
        self.eval()

    def forward(self, x, t, c):
        h = self.stem(x)
        z = self.down(h)
        side = self.side(c).sin().reshape(len(x), 12, *[1] * self.rank)
        z = self.gain(t) * side + self.mix * z + self.bias(t)
        z = self.up(nn.functional.interpolate(z, scale_factor=2.0, mode="nearest"))
        return self.head(torch.cat([h, z], 1))


def sampler(unet, times=TIMES, rate=0.3, size=8):
    """Both branches in one call; noise that is constant over blocks."""

    def generate(batch, seed=0):
        count, guidance = batch
        generator = torch.Generator().manual_seed(seed)
        small = torch.randn(count, 2, *[size // 2] * unet.rank, generator=generator)
        x = nn.functional.interpolate(small, scale_factor=2.0, mode="nearest")
        c = torch.randn(2 * count, 3, generator=generator)
        for t in times:
            u, guided = unet(torch.cat([x, x]), t, c).chunk(2)
            x = x - rate * (u + guidance * (guided - u))
        return x

    return generate


WORLDS = {
    "gain": {"gain": lambda t: 1 + t / 500},
    "affine": {"gain": lambda t: 1 + t / 500, "bias": lambda t: math.sin(t)},
    "exit+entry+before": {"mix": 1.0},
}


@pytest.mark.parametrize("world", WORLDS)
def test_the_kind_that_is_right_is_chosen_and_leaves_no_error(world):
    unet = Blocks(**WORLDS[world])
    if world == "gain":  # the last layer's own bias is no gain
        nn.init.zeros_(unet.up.bias)
    adaptor = calibrate(unet, sampler(unet), [(8, 2.0)], guidance=2.0)
    report = adaptor.report
    assert report.kinds[world].left < 1e-3
    cheaper = [name for name in report.kinds if report.kinds[name].macs < report.kinds[report.kind].macs]
    assert report.kinds[report.kind].left < 1e-3
    assert all(report.kinds[name].left > 0.05 for name in cheaper)
    assert report.kind in {"gain": ("gain", "affine")}.get(world, (world,))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("world", ["affine", "exit+entry+before"])
def test_a_linear_world_is_sampled_as_without_clockwork(world, rank):
    unet = Blocks(**WORLDS[world], rank=rank)
    generate = sampler(unet)
    adaptor = calibrate(unet, generate, [(8, 2.0)], guidance=2.0, clock=2, kind=world, ridge=1e-9)
    plain = generate((8, 2.0), seed=7)
    with ch.wrap(unet, adaptor, clock=2) as cw, cw.trajectory():
        generate((8, 2.0), seed=6)  # the very first call is traced
        before = cw.stats.adaptor_passes
        samples = generate((8, 2.0), seed=7)
    assert cw.stats.adaptor_passes - before == 3
    with ch.wrap(unet, clock=2) as cw, cw.trajectory():
        identity = generate((8, 2.0), seed=7)
    assert (identity - plain).abs().max() > 1e-2
    torch.testing.assert_close(samples, plain, atol=2e-4, rtol=1e-3)


class Blurred(nn.Module):
    """At the k-th time, its input convolved k times with one kernel: each output is a convolution of the last one."""

    def __init__(self, rank):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.kernel = 0.2 * torch.randn(4, 4, *[3] * rank, generator=generator)
        self.convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[rank - 1]

    def forward(self, z, t):
        for _ in range(TIMES.index(int(t)) + 1):
            z = self.convolve(z, self.kernel, padding=1)
        return z


class Neighbours(Blocks):
    """What the region emits depends on the positions around, and on no entry."""

    def __init__(self, rank=2):
        super().__init__(rank=rank)
        self.last = Blurred(rank)

    def forward(self, x, t, c):
        h = self.stem(x)
        side = self.side(c).sin().reshape(len(x), 12, *[1] * self.rank)
        space = torch.linspace(0, 3, x.shape[-1] // 2)
        z = side * (self.down(0 * h) + torch.cos(side * space))
        z = self.up(nn.functional.interpolate(z, scale_factor=2.0, mode="nearest"))
        return self.head(torch.cat([h, self.last(z, t)], 1))


@pytest.mark.parametrize("rank", [1, 2])
def test_a_kernel_is_recovered(rank):
    """With it the sampler does as without Clockwork; with a matrix alone it does not."""
    unet = Neighbours(rank)
    generate = sampler(unet)
    adaptors = {
        kind: calibrate(unet, generate, [(24, 2.0)], guidance=2.0, clock=2, kind=kind, ridge=1e-10)
        for kind in ("exit", "kernel")
    }
    assert adaptors["kernel"].report.kinds["kernel"].left < 1e-2 < adaptors["exit"].report.kinds["exit"].left / 5
    error = {}
    with torch.no_grad():
        plain = generate((8, 2.0), seed=7)
        for kind, adaptor in adaptors.items():
            with ch.wrap(unet, adaptor, clock=2) as cw:
                generate((8, 2.0), seed=6)  # the very first call is traced
                with cw.trajectory():
                    error[kind] = float((generate((8, 2.0), seed=7) - plain).norm() / plain.norm())
    assert error["kernel"] < 0.05 * error["exit"]
    around = 3**rank - 1
    weights = adaptors["kernel"].table[0, -around * 4 * 4 :].reshape(around, 4, 4)  # they stand at a row's end
    kernel = unet.last.kernel.flatten(2)
    expected = torch.cat([kernel[..., : 3**rank // 2], kernel[..., 3**rank // 2 + 1 :]], 2).permute(2, 1, 0)
    torch.testing.assert_close(weights, expected, atol=0.02, rtol=0.05)


def pairs(count=400, channels=4, entry=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, width, generator=generator) for width in (channels, channels, entry, entry)]


def test_weights_are_least_squares():
    """Against torch.linalg.lstsq on the features themselves; rows of what is not read are as if they were not there."""
    cached, exit, entry, before = pairs()
    sums = NormalEquations.empty(Shape(4, 3), torch.device("cpu"))
    for part in (slice(0, 100), slice(100, None)):
        sums.add(cached[part], exit[part], entry[part], before[part])
    columns = {"exit": [cached], "exit+entry": [cached, entry], "exit+entry+before": [cached, entry, before]}
    for name, read in columns.items():
        features = torch.cat([torch.ones(400, 1), *read], 1).double()
        expected = features @ torch.linalg.lstsq(features, (exit - cached).double()).solution + cached
        weights = sums.solve(KINDS[name], 0.0)
        all_features = torch.cat([torch.ones(400, 1), cached, entry - before, before], 1).double()
        torch.testing.assert_close(all_features @ weights[:-1] + cached, expected)
        error = (expected - exit).square().sum() / exit.double().square().sum()
        assert sums.error(weights) == pytest.approx(float(error))
    affine = sums.solve(KINDS["affine"], 0.0)
    for c in range(4):
        features = torch.stack([torch.ones(400), cached[:, c]], 1).double()
        solution = torch.linalg.lstsq(features, (exit - cached)[:, c : c + 1].double()).solution[:, 0]
        torch.testing.assert_close(torch.stack((affine[0, c], affine[1 + c, c])), solution)


def test_two_halves_are_the_whole():
    whole, first, second = (NormalEquations.empty(Shape(4, 3), torch.device("cpu")) for _ in range(3))
    whole.add(*pairs())
    first.add(*(x[:150] for x in pairs()))
    second.add(*(x[150:] for x in pairs()))
    both = first + second
    for name in ("gram", "cross", "square", "exit_square", "low", "high"):
        torch.testing.assert_close(getattr(both, name), getattr(whole, name))


def test_a_full_rank_cuts_nothing_and_a_lower_one_keeps_what_counts():
    cached, _, entry, before = pairs(channels=6)
    exit = cached * 0.5 + 2 + 3 * (entry - before)[:, :1] * torch.tensor([1.0, 2, 0, 0, 1, 0])
    sums = NormalEquations.empty(Shape(6, 3), torch.device("cpu"))
    sums.add(cached, exit, entry, before)
    weights = sums.solve(KINDS["low rank"], 0.0)
    basis = shared_basis([sums.added(weights, 0.0)], 1)
    assert sums.error(sums.cut(weights, 0.0, basis)) < 5e-3  # gains are fitted first, to 400 positions
    torch.testing.assert_close(
        basis.abs(), torch.tensor([[1.0, 2, 0, 0, 1, 0]]).double() / math.sqrt(6), atol=0.02, rtol=0
    )
    full = shared_basis([sums.added(weights, 0.0)], 6)
    torch.testing.assert_close(sums.cut(weights, 0.0, full), weights)
    assert sums.error(sums.cut(weights, 0.0, basis[:0])) > 0.05


def test_the_ridge_is_chosen_on_what_is_held_out(monkeypatch):
    """Fitted on few noisy positions, a matrix wants a strong ridge; on many, a weak one."""

    def ridge(count):
        fit, held = (NormalEquations.empty(Shape(12, 0), torch.device("cpu")) for _ in range(2))
        for sums, rows, seed in ((fit, count, 1), (held, 4000, 2)):
            generator = torch.Generator().manual_seed(seed)
            cached = torch.randn(rows, 12, generator=generator)
            exit = 0.9 * cached + torch.randn(rows, 12, generator=generator)
            sums.add(cached, exit, None, None)
        place = calibration.PositionSums(2, 1.0, 2.0, fit, held)
        solver = object.__new__(calibration.Solver)
        solver.ridges = calibration.RIDGES
        return solver.best(place, KINDS["exit"])[0]

    assert ridge(15) > ridge(100_000)


# -- positions ----------------------------------------------------------------------------------------------------


def adaptor_of(knots=(200.0, 400.0, 600.0), log_snr=None, form="affine", gains=(0.1, 0.3, 0.7)):
    """An affine adaptor of 4 channels with these gains at these positions, each 200 after the one before."""
    unet = Blocks()
    region = ch.find_region(unet, torch.zeros(2, 2, 8, 8), 1.0, torch.zeros(2, 3))
    at = Positions(knots, [200.0] * len(knots), [*knots, knots[-1] + 200], log_snr)
    ends = torch.full((4,), 100.0)
    knots_ = [
        Knot(t, t + 200, -ends, ends, torch.zeros(4), torch.full((4,), gain))
        for t, gain in zip(knots, gains, strict=True)
    ]
    return CalibratedAdaptor.of(region, knots_, at, form=form)


def gain_at(adaptor, position, before=None):
    cached = torch.ones(1, 4, 8, 8)
    before = None if before is None else torch.tensor(before)
    return float(adaptor(None, cached, position=torch.tensor(position), position_cached=before)[0, 0, 0, 0]) - 1


def test_weights_are_exact_at_calibrated_positions_and_interpolated_between():
    adaptor = adaptor_of()
    assert gain_at(adaptor, 200.0, 400.0) == pytest.approx(0.1, abs=1e-6)
    assert gain_at(adaptor, 400.0, 600.0) == pytest.approx(0.3, abs=1e-6)
    assert gain_at(adaptor, 300.0) == pytest.approx(0.2, abs=1e-6)
    assert gain_at(adaptor, 500.0) == pytest.approx(0.5, abs=1e-6)
    assert gain_at(adaptor, 130.0) == pytest.approx(0.1, abs=1e-6)  # half a stride beyond the last is still its own


def test_it_is_log_snr_that_weights_are_interpolated_in():
    adaptor = adaptor_of(log_snr=lambda t: -2 * math.log(t))
    middle = math.sqrt(200.0 * 400.0)
    assert gain_at(adaptor, middle) == pytest.approx(0.2, abs=2e-3)
    assert gain_at(adaptor, 300.0) == pytest.approx(0.1 + 0.2 * math.log(1.5) / math.log(2), abs=2e-3)


def test_a_step_half_as_long_changes_half_as_much():
    adaptor = adaptor_of()
    assert gain_at(adaptor, 400.0, 500.0) == pytest.approx(0.15, abs=1e-6)
    assert gain_at(adaptor, 400.0, 400.0) == 0
    assert gain_at(adaptor, 400.0, 300.0) == 0  # backwards: nothing is known of that
    assert gain_at(adaptor, 400.0, 800.0) == pytest.approx(0.6, abs=1e-6)
    assert gain_at(adaptor, 200.0, 800.0) == pytest.approx(0.2, abs=1e-6)  # three times as long: it stops at two


def test_outside_it_is_the_identity_and_warns_once():
    adaptor = adaptor_of()
    cached = torch.randn(1, 4, 8, 8) * 1e4  # beyond the bounds that hold inside
    with pytest.warns(UserWarning, match=r"outside them it is the identity\n  calibrated at: 100 to 700\n"):
        assert torch.equal(adaptor(None, cached, position=torch.tensor(900.0)), cached)
    for position in (900.0, 99.0, -5.0, 1e9):  # warnings are errors here
        assert torch.equal(adaptor(None, cached, position=torch.tensor(position)), cached)
    assert adaptor.distances([200.0, 300.0, 450.0, 900.0, 50.0]) == [0.0, 0.5, 0.25, None, None]


def test_what_it_returns_is_bounded():
    adaptor = adaptor_of()
    huge = torch.full((1, 4, 8, 8), 1e6)
    assert adaptor(None, huge, position=torch.tensor(400.0)).abs().max() == 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_table(dtype):
    adaptor = adaptor_of(knots=(0.0, 999.5, 1003.5), log_snr=lambda t: -t)
    before = adaptor.table.clone()
    adaptor = adaptor.to(dtype)
    assert adaptor.table.dtype == adaptor.grid.dtype == torch.float32
    assert torch.equal(adaptor.table, before)
    output = adaptor(None, torch.ones(1, 4, 8, 8, dtype=dtype), position=torch.tensor(999.5))
    assert output.dtype == dtype
    assert float(output[0, 0, 0, 0]) == pytest.approx(1.3, abs=1e-2)


@pytest.mark.parametrize("told", [True, False])
def test_the_report_has_log_snr_where_it_was_told(told):
    unet = Blocks(**WORLDS["affine"])
    adaptor = calibrate(unet, sampler(unet), [(4, 2.0)], log_snr=(lambda t: 2.0 * t) if told else None)
    steps, kinds = adaptor.report.steps, adaptor.report.tables()[1].to_markdown()
    assert [one.log_snr for one in steps] == [2 * one.position if told else None for one in steps]
    assert ("log-SNR" in kinds) == told


def test_schedulers_tell_log_snr():
    diffusers = pytest.importorskip("diffusers")
    levels = [log_snr_of(diffusers.DDIMScheduler())(t) for t in (0.0, 250.0, 250.5, 999.0)]
    assert levels == sorted(levels, reverse=True)
    alpha = diffusers.DDIMScheduler().alphas_cumprod[250].double()
    assert levels[1] == pytest.approx(float((alpha / (1 - alpha)).log()), abs=1e-6)
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(8)
    sigma = float(flow.sigmas[3])
    assert log_snr_of(flow)(float(flow.timesteps[3])) == pytest.approx(2 * math.log((1 - sigma) / sigma), abs=1e-4)
    assert log_snr_of(object()) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' schedulers, of NumPy
def test_a_time_that_is_no_place_among_the_alphas_is_not_looked_up_there():
    """Of SVD's scheduler, 8.1 to 10.4 was reported for -13.1 to 12.4."""
    diffusers = pytest.importorskip("diffusers")
    continuous = diffusers.EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", interpolation_type="linear", use_karras_sigmas=True,
        sigma_min=0.002, sigma_max=700.0,
    )  # fmt: skip
    flow = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    for scheduler, level in ((continuous, lambda s: -2 * math.log(s)), (flow, lambda s: 2 * math.log((1 - s) / s))):
        scheduler.set_timesteps(6)
        told = log_snr_of(scheduler)
        for time, sigma in zip(scheduler.timesteps[1:].tolist(), scheduler.sigmas[1:6].tolist(), strict=True):
            assert told(time) == pytest.approx(level(sigma), abs=1e-3)
    silent = diffusers.IPNDMScheduler()
    silent.set_timesteps(6)
    assert log_snr_of(silent) is None
    unet = Blocks(**WORLDS["affine"])
    adaptor = calibrate(unet, sampler(unet), [(4, 2.0)], log_snr=silent)  # as tune passes a pipeline's
    assert {one.log_snr for one in adaptor.report.steps} == {None}


# -- what is seen -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
def test_no_features_are_held_longer_than_a_step():
    unet, alive, most = Blocks(mix=1.0), [], 0
    generate = sampler(unet)

    def look(module, args, output):
        nonlocal most
        alive.append(weakref.ref(output))
        most = max(most, sum(one() is not None for one in alive))

    unet.up.register_forward_hook(look)
    calibrate(unet, generate, [(4, 2.0)] * 3, guidance=2.0)
    assert len(alive) >= 18
    assert most <= 2


def two_calls(unet, times=TIMES):
    """As `sampler`, a call for each branch."""

    def generate(batch, seed=0):
        count, guidance = batch
        generator = torch.Generator().manual_seed(seed)
        x = nn.functional.interpolate(
            torch.randn(count, 2, 4, 4, generator=generator), scale_factor=2.0, mode="nearest"
        )
        c = torch.randn(2 * count, 3, generator=generator)
        for t in times:
            u, guided = unet(x, t, c[:count]), unet(x, t, c[count:])
            x = x - 0.3 * (u + guidance * (guided - u))
        return x

    return generate


@torch.no_grad()
def guided_error(adaptor, unet, scale):
    """What the adaptor is off by at the guided combination of both branches, at one step."""
    seen: list[torch.Tensor] = []
    handle = unet.up.register_forward_hook(lambda module, args, output: seen.append(output))
    times = TIMES[:2]
    sampler(unet, times)((64, scale), 5)
    handle.remove()
    _, exit = (one[:64] + scale * (one[64:] - one[:64]) for one in seen)
    adapted = adaptor(None, seen[0], position=torch.tensor(times[1]))
    adapted = adapted[:64] + scale * (adapted[64:] - adapted[:64])
    return float((adapted - exit).square().mean())


@pytest.mark.parametrize("calls", [sampler, two_calls])
def test_the_guided_combination_is_fitted_too(calls):
    """What both branches share wants another gain than what they differ in, which is what guidance scales up."""
    unet = Blocks(gain=lambda t: 2.0 if t > 850 else 1.0, mix=1.0)
    options = {"schedule": {2}, "kind": "affine", "ridge": 0.0}
    scale = 6.0
    without = calibrate(unet, calls(unet), [(64, scale)], **options)
    with_it = calibrate(unet, calls(unet), [(64, scale)], guidance=scale, **options)
    assert guided_error(with_it, unet, scale) < 0.9 * guided_error(without, unet, scale)
    swapped = calibrate(unet, calls(unet), [(64, scale)], guidance=scale, unconditional="second", **options)
    assert guided_error(with_it, unet, scale) < guided_error(swapped, unet, scale)


def test_one_call_and_two_calls_give_the_same():
    adaptors = []
    for calls in (sampler, two_calls):
        unet = Blocks(**WORLDS["affine"])
        adaptors.append(calibrate(unet, calls(unet), [(8, 2.0)], guidance=2.0, kind="affine", ridge=1e-4))
    torch.testing.assert_close(adaptors[0].table, adaptors[1].table, rtol=1e-4, atol=1e-5)


# -- fitted on what the student reaches -----------------------------------------------------------------------------


class Bent(Blocks):
    """The exit is no linear function of anything."""

    def forward(self, x, t, c):
        return super().forward(x, t, c + x.mean((2, 3))[:, :1] + t / 200)


@torch.no_grad()
def test_chained_steps_are_fitted_on_what_the_student_reaches():
    unet = Bent(mix=0.5)
    generate = sampler(unet, rate=0.4)
    options = {"schedule": {2, 3, 4, 5, 6}, "kind": "exit", "guidance": 2.0}
    teacher = calibrate(unet, generate, [(64, 2.0), (48, 2.0)], refit=False, **options)
    student = calibrate(unet, generate, [(64, 2.0), (48, 2.0)], **options)
    assert [step.on_policy for step in teacher.report.steps] == [False] * 5
    assert [step.on_policy for step in student.report.steps] == [False, True, True, True, True]
    same = [torch.equal(*pair) for pair in zip(teacher.table, student.table, strict=True)]  # by time: last step first
    assert same == [False, False, False, False, True, True]
    errors = []
    plain = generate((128, 2.0), seed=3)
    for adaptor in (teacher, student):
        with ch.wrap(unet, adaptor, schedule=options["schedule"]) as cw, cw.trajectory():
            generate((128, 2.0), seed=2)
            errors.append(float((generate((128, 2.0), seed=3) - plain).norm()))
    assert errors[1] < 0.95 * errors[0]


def test_a_linear_world_stays_one_when_fitted_again():
    unet = Blocks(mix=1.0)
    generate = sampler(unet)
    adaptor = calibrate(unet, generate, [(8, 2.0)], guidance=2.0, clock=3, kind="exit+entry+before", ridge=1e-9)
    assert [step.on_policy for step in adaptor.report.steps] == [False, True, False, True]
    plain = generate((8, 2.0), seed=7)
    with ch.wrap(unet, adaptor, clock=3):
        generate((8, 2.0), seed=6)
        torch.testing.assert_close(generate((8, 2.0), seed=7), plain, atol=2e-3, rtol=1e-2)


# -- files, reports, other ways to run ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["affine", "exit+entry+before", "kernel", "low rank"])
@pytest.mark.filterwarnings("ignore:an adaptor has to take fewer MACs:clockwork_hooks.NoEffectWarning")
def test_it_comes_back_from_its_files_bit_for_bit(kind, tmp_path):
    unet = Blocks(mix=1.0)
    generate = sampler(unet)
    adaptor = calibrate(unet, generate, [(4, 2.0)], guidance=2.0, clock=2, kind=kind)
    adaptor.save_pretrained(tmp_path)
    loaded = CalibratedAdaptor.from_pretrained(tmp_path)
    assert loaded.facts == json.loads(json.dumps(adaptor.facts))
    for name, tensor in adaptor.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    outputs = []
    for one in (adaptor, str(tmp_path)):
        with ch.wrap(unet, one, clock=2):
            outputs.append(generate((4, 2.0), seed=1))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", ["affine", "exit+entry+before", "kernel", "low rank"])
@pytest.mark.filterwarnings("ignore:an adaptor has to take fewer MACs:clockwork_hooks.NoEffectWarning")
def test_it_compiles_once_for_all_positions(kind):
    unet = Blocks(mix=1.0)
    generate = sampler(unet, [torch.tensor(t) for t in TIMES])
    adaptor = calibrate(unet, generate, [(4, 2.0)], guidance=2.0, clock=2, kind=kind)
    with torch.no_grad(), ch.wrap(unet, adaptor, clock=2) as cw:
        generate((4, 2.0))
        eager = generate((4, 2.0))
        cw.compile(backend="aot_eager")
        compiled = generate((4, 2.0))
        torch._dynamo.utils.counters.clear()
        with torch.compiler.set_stance("fail_on_recompile"):
            again = generate((4, 2.0))
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(again, eager)


def test_the_report_says_what_was_measured():
    unet = Blocks(mix=1.0)
    adaptor = calibrate(unet, sampler(unet), [(8, 2.0)], guidance=2.0, clock=2)
    report = adaptor.report
    assert [step.step for step in report.steps] == [2, 4, 6]
    assert [step.position for step in report.steps] == [790, 540, 250]
    assert (report.guidance, report.samples, report.held_out, report.schedule) == (2.0, 16, "rows", "every(2)")
    assert report.kinds["identity"].left == 1
    assert report.kinds["exit+entry"].macs > report.kinds["exit"].macs > report.kinds["affine"].macs == 0
    assert report.kind in report.why
    assert Calibration.from_json(report.to_json()) == report
    assert f"{report.kind} (chosen)" in str(report)
    follows_its_schema(report.to_dict())


def test_one_sample_is_split_by_positions():
    unet = Blocks(mix=1.0)
    adaptor = calibrate(unet, sampler(unet), [(1, 2.0)], guidance=2.0)
    assert adaptor.report.held_out == "positions"


class Walk(Blocks):
    """What the region emits goes on at random: nothing foretells more than that it stays where it is."""

    def forward(self, x, t, c):
        steps = TIMES.index(t) + 1
        seeds = [int(1e6 * abs(float(row[0]))) for row in c]
        walks = [torch.randn(6, 3, generator=torch.Generator().manual_seed(seed))[:steps].sum(0) for seed in seeds]
        return super().forward(x, t, torch.stack(walks) / 3)


def test_an_adaptor_that_is_the_identity_at_all_steps_is_told_of():
    """It costs MACs, and nobody but the report's readers saw that it does nothing."""
    unet = Walk()
    unet.side.weight.data *= 3
    with pytest.warns(
        ch.NoEffectWarning, match=r"at no step do any weights\n  kind: exit\+entry\+before\n  steps: 5 steps\n"
    ):
        adaptor = calibrate(unet, sampler(unet), [(4, 1.0)], kind="exit+entry+before")
    assert {one.ridge for one in adaptor.report.steps} == {None}
    assert not adaptor.table[:-1, 9:].any()


@pytest.mark.filterwarnings("always:an adaptor has to take fewer MACs:clockwork_hooks.NoEffectWarning")
def test_an_adaptor_that_costs_more_than_its_region_is_told_of_once():
    """A run took a fifth more MACs than a plain one, and only the report's readers saw it."""
    unet = Blocks(gain=lambda t: 1 + t / 500, mix=0.5)
    generate = sampler(unet)
    for kind, said in (("kernel", 1), ("exit+entry", 0)):
        adaptor = calibrate(unet, generate, [(4, 2.0)], kind=kind, clock=2)
        with warnings.catch_warnings(record=True) as caught, torch.no_grad(), ch.wrap(unet, adaptor) as cw:
            for seed in range(3):
                with cw.trajectory():
                    generate((4, 2.0), seed)
        told = [str(one.message) for one in caught if one.category is ch.NoEffectWarning]
        assert (len(told), cw.stats.saving < 0) == (said, said == 1)
        assert all("CalibratedAdaptor" in text and "full pass: 78.11 kMACs" in text for text in told)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "best"}, "a kind is auto, gain"),
        ({"clock": 2, "schedule": {2}}, "a schedule and a clock cannot both be given"),
        ({"schedule": {40}}, "a step can be calibrated only if the sampler takes it"),
        ({"guidance": "high"}, "guidance is a number"),
        ({"ridge": -1.0}, "a ridge is a number of at least 0"),
        ({"unconditional": "both"}, "the unconditional branch"),
        ({"log_snr": 3}, "log_snr is a function"),
        ({"schedule": ch.Schedule.adaptive(0.1)}, "which steps are calibrated is known beforehand"),
    ],
)
def test_options_outside_their_rule(options, said):
    unet = Blocks()
    with pytest.raises(ch.ArgumentError, match=said):
        calibrate(unet, sampler(unet), [(2, 2.0)], **options)
    assert not unet._forward_pre_hooks
    assert "forward" not in vars(unet.up)


def test_what_is_no_unet_or_too_few_steps():
    unet = Blocks()
    with pytest.raises(ch.ArgumentError, match=r"(?s)what is measured is a UNet.*in this order"):
        calibrate(sampler(unet), unet, [(2, 2.0)])
    with pytest.raises(ch.ArgumentError, match="sample in more steps"):
        calibrate(unet, sampler(unet, times=TIMES[:1]), [(2, 2.0)])


@pytest.mark.parametrize(
    ("log_snr", "said"),
    [
        (lambda time: math.inf if time < 300 else -time, r"(?s)a finite number for every time.*time: 250.*inf"),
        (lambda time: math.log(time / 250 - 1), "(?s)a finite number.*time: 250.*math domain error"),
        (lambda time: None, "(?s)a finite number.*None"),
        (lambda time: 1.0, "tells any two times of the sampler apart"),
        (lambda time: max(-time, -700.0), "(?s)tells any two times.*at 790.*at 900"),
        (math.sin, "rises with the time, or falls with it"),
    ],
)
def test_a_log_snr_that_is_none(log_snr, said):
    """Weights of NaN came of some, without a word."""
    unet = Blocks()
    before = snapshot(unet)
    with pytest.raises(ch.ArgumentError, match=said):
        calibrate(unet, sampler(unet), [(4, 2.0)], log_snr=log_snr)
    assert snapshot(unet) == before


@pytest.mark.parametrize("schedule", [None, {2, 4}, {2, 3}])
def test_times_that_single_precision_does_not_tell_apart_are_refused(schedule):
    """A table with strides of zero made NaN of pictures, without a word."""
    unet = Blocks(gain=lambda t: t)
    times = [1e6 + time * 1e-9 for time in TIMES]
    before = snapshot(unet)
    with pytest.raises(
        ch.ArgumentError,
        match=r"must differ in float32, the precision in which an adaptor gets them(.|\n)*at step 2: 1000000\.0",
    ):
        calibrate(unet, sampler(unet, times=times, rate=1e-7), [(4, 2.0)], schedule=schedule)
    assert snapshot(unet) == before


def test_a_time_in_two_precisions_is_one_position():
    unet = Blocks(gain=lambda t: 1 + float(t) / 500)
    times = [time / 1000 for time in TIMES]
    both = [times, [float(time) for time in torch.tensor(times)]]

    def generate(batch, seed=0):
        return sampler(unet, both[batch])((8, 2.0), seed)

    assert len(calibrate(unet, generate, [0, 1]).report.steps) == len(TIMES) - 1


@pytest.mark.parametrize("schedule", [None, {2, 3}])
@pytest.mark.parametrize("step", [1, 3])
def test_what_is_not_finite_makes_no_adaptor(step, schedule):
    unet = Blocks(mix=1.0)

    def generate(count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        x, c = torch.randn(count, 2, 8, 8, generator=generator), torch.randn(count, 3, generator=generator)
        for k, time in enumerate(TIMES, 1):
            if k == step:
                x = x / torch.arange(count).reshape(-1, 1, 1, 1).clamp(max=1)
            x = x - 0.1 * unet(x, time, c)
        return x

    with pytest.raises(ch.ArgumentError, match=f"(?s)must be finite.*in step {max(step, 2)}.*its dtype"):
        calibrate(unet, generate, [4], schedule=schedule)


def one_branch(unet, *, modes=(torch.no_grad,), conditions=True):
    """No guidance; in these modes by turns, and with the condition in every step or in every other one."""

    def generate(count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        x, c = torch.randn(count, 2, 8, 8, generator=generator), torch.randn(count, 3, generator=generator)
        for k, time in enumerate(TIMES):
            with modes[k % len(modes)]():
                x = x - 0.1 * unet(x, time, c if conditions or k % 2 else 0 * c)
        return x

    return generate


@pytest.mark.parametrize("rows", [1, 3])
def test_guidance_that_the_sampler_does_not_have(rows):
    """Halves of one row are none: its weights were those of no sums at all."""
    unet = Blocks(mix=1.0)
    with pytest.raises(ch.ArgumentError, match=r"(?s)guidance combines two branches.*leave guidance= out"):
        calibrate(unet, one_branch(unet), [rows], guidance=2.0)
    assert calibrate(unet, one_branch(unet), [rows]).table.isfinite().all()


@pytest.mark.parametrize("calls", [1, 2])
def test_guidance_that_ends_before_the_adaptor_steps(calls):
    unet = Blocks(mix=1.0)

    def generate(batch, seed=0):
        generator = torch.Generator().manual_seed(seed)
        x, c = torch.randn(1, 2, 8, 8, generator=generator), torch.randn(2, 3, generator=generator)
        for time in TIMES:
            if time < 700:
                x = x - 0.1 * unet(x, time, c[:1])
            elif calls == 1:
                x = x - 0.1 * unet(torch.cat([x, x]), time, c).sum(0, keepdim=True)
            else:
                x = x - 0.1 * (unet(x, time, c[:1]) + unet(x, time, c[1:]))

    adaptor = calibrate(unet, generate, [1], guidance=2.0, schedule={5, 6})
    assert adaptor.table.isfinite().all()
    assert [step.step for step in adaptor.report.steps] == [5, 6]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"modes": (torch.no_grad, torch.inference_mode)}, "inputs or modes changed since the step before: 5 calls"),
        ({"conditions": False}, "conditions are new in this step"),
    ],
)
def test_who_has_no_calibrated_step_is_told_why(options, reason):
    unet = Blocks(mix=1.0)
    with pytest.raises(ch.ArgumentError, match=rf"(?s)full, {reason}.*like the same call of the step before"):
        calibrate(unet, one_branch(unet, **options), [4])


def test_steps_that_a_function_names_are_those_of_the_adaptor(tmp_path):
    """Text does not hold the function: saved or not, the adaptor ran at clock 2."""
    unet = Blocks(**WORLDS["affine"])
    adaptor = calibrate(unet, sampler(unet), [(4, 2.0)], schedule=lambda step: step in (3, 4, 6))
    adaptor.save_pretrained(tmp_path)
    for one in (adaptor, tmp_path):
        with ch.wrap(unet, one) as cw:
            assert cw.schedule.adaptor_steps(len(TIMES)) == (3, 4, 6)


def test_a_unet_that_takes_no_time_is_told_so():
    class Timeless(Blocks):
        def forward(self, x, c):
            return super().forward(x, 0.0, c)

    unet = Timeless()

    def generate(count, seed=0):
        for _ in range(5):
            unet(torch.randn(count, 2, 8, 8), torch.randn(count, 3))

    with pytest.raises(ch.ArgumentError, match=r"(?s)no time input.*its time as an argument"):
        calibrate(unet, generate, [4])


def test_a_sampler_with_gradients_on_holds_no_graph():
    unet = Blocks(mix=1.0)
    plain, inputs = calibrate(unet, one_branch(unet), [4, 4], clock=3), []
    unet.stem.register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0])))

    def generate(count, seed=0):
        result = one_branch(unet, modes=(torch.enable_grad,))(count, seed).detach()
        del inputs[-1]  # the last call's may be held until its result is gone
        held.append(sum(one() is not None for one in inputs))
        return result

    held = []
    adaptor = calibrate(unet, generate, [4, 4], clock=3)
    assert held == [0] * len(held)
    assert adaptor.report.kind == plain.report.kind


def test_a_sampler_that_calls_the_unet_in_a_thread():
    """It finds no result where its first call is all that was wanted. Steps that it has no evidence for are named."""
    unet = Blocks(mix=1.0)

    def generate(count, seed=0):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            done = pool.submit(one_branch(unet), count, seed)
            try:
                return done.result()
            except BaseException as error:
                raise RuntimeError("the worker failed") from error

    with pytest.warns(ch.OtherStepsWarning, match=r"(?s)steps: 2, 3, 4, 5\n.*not known to be one trajectory") as caught:
        adaptor = calibrate(unet, generate, [4])
    assert [step.step for step in adaptor.report.steps] == [6]
    assert caught[0].filename == __file__


def test_nothing_stays_on_the_unet():
    unet = Blocks(mix=1.0)
    before = snapshot(unet)
    calibrate(unet, sampler(unet), [(2, 2.0)], clock=3)
    assert snapshot(unet) == before


@pytest.mark.filterwarnings("ignore:a calibrated adaptor works at the times that it was calibrated at")
def test_another_number_of_steps_degrades_softly():
    """Twice as many steps, each half as long: the weights in between, half as much of them."""
    unet = Blocks(gain=lambda t: math.exp(t / 300))
    few, many = ([900.0 - step * k for k in range(count)] for count, step in ((8, 100), (16, 50)))
    adaptor = calibrate(unet, sampler(unet, few), [(16, 2.0)], guidance=2.0, kind="affine", ridge=1e-6)
    distances = adaptor.distances(many)
    assert distances[:3] == [None, 0, 0]  # half a step beyond the first one is still its own
    assert distances[3:6] == [0.5, 0, 0.5]
    generate, errors = sampler(unet, many), []
    plain = generate((16, 2.0), seed=3)
    for one in (None, adaptor):
        with ch.wrap(unet, one, clock=2):
            generate((16, 2.0), seed=2)
            errors.append((generate((16, 2.0), seed=3) - plain).norm().item())
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize("lift", [float, torch.tensor])
def test_an_adaptor_is_told_where_its_cached_exit_comes_from(lift):
    seen = []

    class Guided(nn.Module):
        needs = frozenset({"position", "position_cached", "entry_cached"})

        def forward(self, entry, exit_cached, *, time, text, position, position_cached, entry_cached):
            seen.append((position.item(), None if position_cached is None else position_cached.item()))
            assert position.dtype == torch.float32
            return exit_cached

    unet = Blocks()
    generate = sampler(unet, [lift(t) for t in TIMES])
    with torch.no_grad(), ch.wrap(unet, Guided(), schedule={3, 4, 6}) as cw, cw.trajectory():
        generate((2, 2.0))
    assert seen == [(TIMES[2], TIMES[1]), (TIMES[3], TIMES[2]), (TIMES[5], TIMES[4])]


class WritesItsTime(Blocks):
    """In place, before the region or after it."""

    def __init__(self, late):
        super().__init__()
        self.late = late

    def forward(self, x, t, c):
        now = t.clone()
        if not self.late:
            t.div_(1000)
        output = super().forward(x, now, c)
        t.fill_(0.0)
        return output


BUFFER = torch.zeros(1)


@pytest.mark.parametrize("unet", [Blocks(), WritesItsTime(False), WritesItsTime(True)], ids=["reads", "early", "late"])
@pytest.mark.parametrize(
    "lift", [torch.tensor, lambda time: torch.full((4, 1, 1, 1), time), BUFFER.fill_], ids=["one", "rows", "a buffer"]
)
def test_times_are_those_of_the_calls_whatever_is_written_to_them(lift, unet):
    """Of a buffer for the time the adaptor was told that no time had passed; of the recorded call, nothing."""
    seen = []

    class Told(nn.Module):
        needs = frozenset({"position", "position_cached"})

        def forward(self, entry, exit_cached, *, time, text, position, position_cached):
            seen.append((position.item(), position_cached.item()))
            return exit_cached

    def generate(batch, seed=0):
        x, c = torch.randn(4, 2, 8, 8), torch.randn(4, 3)
        for time in TIMES:
            x = x - 0.1 * unet(x, lift(time), c)
        return x

    with torch.no_grad(), ch.wrap(unet, Told(), schedule={2, 3, 6}) as cw:
        for _ in range(2):
            with cw.trajectory():
                generate(4)
    pairs = [(TIMES[1], TIMES[0]), (TIMES[2], TIMES[1]), (TIMES[5], TIMES[4])]
    assert seen == pairs * 2
    report = calibrate(unet, generate, [4], schedule={2, 3, 6}).report
    assert [(one.step, one.position) for one in report.steps] == [(2, TIMES[1]), (3, TIMES[2]), (6, TIMES[5])]


def test_compiled_passes_are_told_the_time_that_the_call_came_with():
    """A UNet that writes to its time before the region told the adaptor of a compiled pass what it had written."""

    class Scales(nn.Module):
        needs = frozenset({"position"})

        def forward(self, entry, exit_cached, *, time, text, position):
            return exit_cached * (1 + position / 1000)

    outputs = []
    for compiles in (False, True):
        torch.manual_seed(0)
        unet = WritesItsTime(late=False)
        x, c = torch.randn(4, 2, 8, 8), torch.randn(4, 3)
        with torch.no_grad(), ch.wrap(unet, Scales(), schedule={2, 3, 6}) as cw:
            if compiles:
                cw.compile(backend="eager")
            for _ in range(3):
                with cw.trajectory():
                    outputs.append([unet(x, torch.tensor(time), c) for time in TIMES])
            assert cw.stats.adaptor_passes == 9
    for eager, compiled in zip(outputs[:3], outputs[3:], strict=True):
        for one, other in zip(eager, compiled, strict=True):
            assert torch.allclose(one, other, atol=1e-6)


def test_a_region_is_named_as_wrap_takes_it(tmp_path):
    unet = Blocks()
    region = ch.find_region(unet, torch.randn(4, 2, 8, 8), 900.0, torch.randn(4, 3))
    region.save(tmp_path / "region.json")
    adaptors = [
        calibrate(unet, sampler(unet), [(2, 1.5)], clock=2, region=one)
        for one in (region, ch.Choice(level=1), str(tmp_path / "region.json"))
    ]
    assert len({adaptor.report.region for adaptor in adaptors}) == 1
    with pytest.raises(ch.ArgumentError, match="comes from find_region"):
        calibrate(unet, sampler(unet), [(2, 1.5)], region=1)


# -- a UNet whose time cannot be told ------------------------------------------------------------------------------


class TwoNumbers(Blocks):
    """Either number may be the time."""

    def forward(self, x, gamma, strength, c):
        return super().forward(x * strength, gamma, c)


def named_sampler(unet, steps=6):
    """Levels from 900 downward."""

    def generate(batch, seed=0):
        generator = torch.Generator().manual_seed(seed)
        x, c = torch.randn(4, 2, 8, 8, generator=generator), torch.ones(4, 3)
        for k in range(steps):
            x = x - 0.1 * unet(x, 900.0 - 100 * k, 1.5, c)
        return x

    return generate


def test_the_time_is_named_where_it_cannot_be_told():
    unet = TwoNumbers()
    generate = named_sampler(unet)
    for ask in (
        lambda **time: calibrate(unet, generate, [4], schedule={3, 5}, **time),
        lambda **time: ch.plan(unet, generate, [4], min_saving=0.1, clocks=(2,), probes=2, **time),
        lambda **time: ch.tune(unet, [4, 4], generate=generate, saving=0.1, **time),
    ):
        with pytest.raises(ch.AmbiguousInputError, match='name it: time="gamma"'):
            ask()
    adaptor = calibrate(unet, generate, [4], schedule={3, 5}, time="gamma")
    assert [step.position for step in adaptor.report.steps] == [700.0, 500.0]
    with torch.no_grad(), ch.wrap(unet, adaptor, time="gamma") as cw, cw.trajectory():
        generate(4)
    assert cw.stats.adaptor_passes == 2
    plan = ch.plan(unet, generate, [4], min_saving=0.1, clocks=(2,), probes=2, time="gamma")
    with torch.no_grad(), ch.wrap(unet, plan=plan) as cw, cw.trajectory():  # its region knows the time
        generate(4)
    assert cw.stats.adaptor_passes == len(plan.schedule.adaptor_steps(6))
    cw = ch.tune(unet, [4, 4], generate=generate, saving=0.1, time="gamma")
    with torch.no_grad(), cw.trajectory():
        generate(4)
    assert cw.stats.adaptor_passes == len(cw.adaptor.tuning.chosen.steps)
    cw.remove()


class Named(Blocks):
    """The time has an unusual name, and another input the usual one."""

    def forward(self, x, gamma, sigma, c):
        return super().forward(x, gamma, c)


def test_a_named_time_is_the_time_at_all_sizes(tmp_path):
    """Batches of another size than the one that was looked at were told the other number: 0.004 off."""
    unet = Named(gain=lambda t: 1 + t / 500, mix=0.5)
    levels = [900.0 - 100 * k for k in range(8)]

    def generate(count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        small, c = torch.randn(count, 2, 4, 4, generator=generator), torch.randn(count, 3, generator=generator)
        x = nn.functional.interpolate(small, scale_factor=2.0, mode="nearest")
        for t in levels:
            x = x - 0.1 * unet(x, t, torch.tensor(1000.0 - t), c)
        return x

    with torch.no_grad():
        plain = {count: generate(count, 8) for count in (4, 6, 5)}
    options = {"generate": generate, "saving": 0.1, "time": "gamma", "folder": tmp_path}
    for _ in ("tuned", "read"):
        with ch.tune(unet, [6, 6, 4], **options) as cw, torch.no_grad():
            for count, wanted in plain.items():
                for seed in (7, 8):
                    with cw.trajectory():
                        served = generate(count, seed)
                assert float((served - wanted).norm() / wanted.norm()) < 1e-5
            assert cw.stats.adaptor_passes == 6 * len(cw.adaptor.tuning.chosen.steps)


class Looked(Blocks):
    """An integer for each row, which may be a class label, is the time."""

    def forward(self, x, k, c):
        return super().forward(x, 0.0, c) * (1 + k.reshape(-1, 1, 1, 1) / 8)


def test_an_adaptor_that_is_not_told_the_time_says_so_once(tmp_path):
    """It is saved without the name of its time; where steps are declared, nothing else asks for it."""
    unet, c = Looked(), torch.ones(4, 3)

    def generate(batch, seed=0, step=contextlib.nullcontext):
        x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
        for k in range(6, 0, -1):
            with step():
                x = x - 0.1 * unet(x, torch.full((4,), k), c)
        return x

    calibrate(unet, generate, [4], schedule={3, 5}, time="k").save_pretrained(tmp_path)
    ch.flops_report(unet, torch.randn(4, 2, 8, 8), torch.full((4,), 6), c, adaptor=tmp_path)  # counts, and runs nothing
    with torch.no_grad(), ch.wrap(unet, tmp_path, time="k") as cw, cw.trajectory():
        generate(4)
        assert cw.stats.adaptor_passes == 2
    untold = pytest.warns(ch.NoEffectWarning, match=r"no time input(.*\n)*.*time=name")
    with torch.no_grad(), ch.wrap(unet, tmp_path) as cw, cw.trajectory(), untold:
        generate(4)
    untold = pytest.warns(
        ch.OtherStepsWarning, match=r"needs the time of each call, and gets none: it acts as the identity\n(.*)time="
    )
    with torch.no_grad(), ch.wrap(unet, tmp_path, ignore=("k",)) as cw, cw.trajectory(), untold as caught:
        generate(4, step=cw.step)
    assert (cw.stats.adaptor_passes, len(caught)) == (2, 1)
