"""`tune` on UNets that tell which steps may use an adaptor, and on a pipeline."""

import itertools
import warnings

import pytest
import torch

import clockwork_hooks as ch
from clockwork_hooks.analysis import tuning
from clockwork_hooks.analysis.tuning import Tuning, spaced, tune
from clockwork_hooks.reports.progress import ProgressBar
from tests.schemas import follows_its_schema
from tests.snapshot import snapshot
from tests.test_calibration import TIMES, WORLDS, Blocks, sampler

BATCHES = [(6, 2.0), (6, 2.0), (4, 2.0)]


def late(t):
    """Changes beyond all prediction until 700, and not at all from then on."""
    return torch.randn(12, 1, 1, generator=torch.Generator().manual_seed(int(t))) if t > 700 else 1.0


def test_the_schedule_is_the_one_that_spares_the_steps_that_matter():
    unet = Blocks(gain=late)
    generate = sampler(unet)
    with tune(unet, BATCHES, generate=generate, saving=0.3, guidance=2.0) as cw:
        tuning = cw.adaptor.tuning
        steps = [step for step, t in enumerate(TIMES, 1) if cw.schedule.uses_adaptor(step)]
        assert tuple(steps) == tuning.chosen.steps
        assert min(steps) > 3  # step 3 is the first whose time is below 700, and its cached exit is from above
        assert cw.stats.full_passes == 0  # what tuning ran is no run of the caller's
        assert tuning.chosen.error < 1e-3 < max(one.error for one in tuning.trials)
        assert tuning.chosen.saved >= 0.3
        assert all(one.saved >= 0.3 for one in tuning.trials)
        assert "calibrated" in tuning.chosen.rule
        assert "calibrated" not in tuning.identity.rule
    assert "forward" not in vars(unet.up)
    assert Tuning.from_json(tuning.to_json()) == tuning
    assert "(chosen)" in str(tuning)
    follows_its_schema(tuning.to_dict())


def test_the_bar_moves_from_the_first_run_on_and_ends_near_its_end(monkeypatch):
    shares = []

    def advance(bar, task, advance=1):
        plain(bar, task, advance)
        if bar.tasks[task].description != "calibrate":  # the quiet bars of its parts
            shares.append(bar.tasks[task].percentage)

    plain = ProgressBar.advance
    monkeypatch.setattr(ProgressBar, "advance", advance)
    unet = Blocks(gain=late)
    tune(unet, BATCHES, generate=sampler(unet), saving=0.3, guidance=2.0).remove()
    assert 0 < shares[0] < 20
    assert all(later > earlier for earlier, later in itertools.pairwise(shares))
    assert 60 < shares[-1] <= 100


def test_what_is_kept_in_a_folder_is_not_tuned_again(tmp_path):
    unet = Blocks(**WORLDS["affine"])
    calls = []

    def generate(batch, seed):
        calls.append(seed)
        return sampler(unet)(batch, seed)

    options = {"generate": generate, "saving": 0.3, "guidance": 2.0, "folder": tmp_path}
    with tune(unet, BATCHES, **options) as first:
        tuned, count = first.adaptor.tuning, len(calls)
        state = first.adaptor.state_dict()
    with tune(unet, BATCHES, **options) as again:
        assert len(calls) == count + 3  # one run, for its times; and first calls alone, to find regions
        assert again.adaptor.tuning == tuned
        assert again.schedule == first.schedule
        assert all(torch.equal(again.adaptor.state_dict()[name], tensor) for name, tensor in state.items())
        again.remove()
    with tune(unet, BATCHES, **{**options, "saving": 0.35}) as other:
        assert len(calls) > count + 5
        assert other.adaptor.tuning.saving == 0.35


@pytest.mark.parametrize("change", ["guidance", "weights"])
def test_another_model_or_guidance_is_tuned_anew(tmp_path, change):
    """A model that was trained on has the same shapes."""
    unet, calls = Blocks(**WORLDS["affine"]), []

    def generate(batch, seed):
        calls.append(seed)
        return sampler(unet)(batch, seed)

    options = {"generate": generate, "saving": 0.3, "guidance": 2.0, "folder": tmp_path}
    tune(unet, BATCHES, **options).remove()
    calls.clear()
    if change == "guidance":
        options["guidance"] = 3.0
    else:
        with torch.no_grad():
            unet.up.weight.mul_(1.01)
    tune(unet, BATCHES, **options).remove()
    assert len(calls) > 5


def test_another_number_of_steps_of_ones_own_sampler_is_tuned_anew(tmp_path):
    """Steps for 6 were wrapped where the sampler takes 12, whose adaptor steps are others and save less."""
    unet = Blocks(**WORLDS["affine"])
    many = [900.0 - 59.0 * k for k in range(12)]
    options = {"saving": 0.3, "guidance": 2.0, "folder": tmp_path}
    seen = []
    for times in (TIMES, many, TIMES):
        with tune(unet, BATCHES, generate=sampler(unet, times), **options) as cw, torch.no_grad():
            seen.append((cw.adaptor.tuning.steps, cw.adaptor.tuning.seconds))
            with cw.trajectory():
                sampler(unet, times)(BATCHES[0])
            assert cw.stats.saving >= 0.3
        cw.remove()
    assert [steps for steps, _ in seen] == [6, 12, 6]
    assert seen[2] == seen[0]  # read, and not tuned once more


def test_a_broken_file_in_the_folder_is_named(tmp_path):
    unet = Blocks(**WORLDS["affine"])
    options = {"generate": sampler(unet), "saving": 0.3, "guidance": 2.0, "folder": tmp_path}
    tune(unet, BATCHES, **options).remove()
    (home,) = tmp_path.iterdir()
    for name, said in (("model.safetensors", "truncated"), ("config.json", "KeyError"), ("tuning.json", "JSONDecode")):
        whole = (home / name).read_bytes()
        (home / name).write_text("{}" if name == "config.json" else "{")
        with pytest.raises(ch.ArgumentError, match=rf"(?s)ch\.tune, or nothing\n.*{said}.*delete {home}: .*anew"):
            tune(unet, BATCHES, **options)
        assert "forward" not in vars(unet.up)
        (home / name).write_bytes(whole)
    tune(unet, BATCHES, **options).remove()


def test_a_folder_has_a_whole_result_or_none(tmp_path, monkeypatch):
    """Two processes at once wrote their files among each other: an adaptor with the steps of another one."""
    unet, texts = Blocks(**WORLDS["affine"]), []
    options = {"generate": sampler(unet), "saving": 0.3, "guidance": 2.0, "folder": tmp_path}
    plain = Tuning.save

    def fails(tuning, path):
        raise OSError("disk full")

    monkeypatch.setattr(Tuning, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        tune(unet, BATCHES, **options)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Tuning, "save", plain)

    def tried(trial):  # another process is done first
        if not texts:
            texts.append("begun")
            tune(unet, BATCHES[1:], **options).remove()
            texts.append({file.name: file.read_bytes() for file in next(tmp_path.iterdir()).iterdir()})

    tune(unet, BATCHES, on_trial=tried, **options).remove()
    (home,) = tmp_path.iterdir()
    assert {file.name: file.read_bytes() for file in home.iterdir()} == texts[1]


@pytest.mark.parametrize("change", ["solver", "log_snr", "shorter"])
def test_what_the_result_depends_on_is_what_a_folder_is_for(change, tmp_path):
    """A sampler with the same times, and another log-SNR, were served by what was made for others."""
    unet = Blocks(**WORLDS["affine"])

    def heavier(batch, seed=0, rate=0.5):
        return sampler(unet, rate=rate)(batch, seed)

    def lighter(batch, seed=0, rate=0.3):
        return sampler(unet, rate=rate)(batch, seed)

    changed = {
        "solver": {"generate": heavier},
        "log_snr": {"log_snr": lambda t: -t / 100},
        "shorter": {"shorter": lambda steps: sampler(unet, TIMES[-steps:])},
    }[change]
    options = {"generate": lighter, "saving": 0.3, "guidance": 2.0, "folder": tmp_path}
    for more, folders in (({}, 1), (changed, 2), ({}, 2), (changed, 2)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ch.NoEffectWarning)
            tune(unet, BATCHES, **{**options, **more}).remove()
        assert len(list(tmp_path.iterdir())) == folders


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (BATCHES, {"saving": 0.9}, "the saving must be one that some schedule reaches"),
        (BATCHES, {"saving": 40}, "a saving is a share of the MACs"),
        (BATCHES[:1], {}, "tune needs several conditions: some to calibrate with, others to judge on"),
        ("a lighthouse in a storm", {}, "tune needs several conditions: some to calibrate with, others to judge on"),
        (BATCHES, {"options": {"output_type": "pil"}}, "is what the pipeline is called with beside prompt"),
        (BATCHES, {"generate": None}, "what is tuned is a diffusers pipeline"),
    ],
)
def test_options_outside_their_rule(arguments, options, said):
    unet = Blocks(mix=1.0)
    with pytest.raises(ch.ArgumentError, match=said):
        tune(unet, arguments, **{"generate": sampler(unet), **options})
    assert "forward" not in vars(unet.up)


def test_a_folder_that_cannot_be_made_is_refused_before_anything_runs(tmp_path):
    unet, calls = Blocks(mix=1.0), []
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ch.ArgumentError, match="folder= is a folder that can be written to"):
        tune(unet, BATCHES, generate=lambda batch, seed: calls.append(seed), folder=tmp_path / "file")
    assert not calls
    assert "forward" not in vars(unet.up)


@pytest.mark.parametrize("regions", [3, [], ["level 1"], ch.Choice(level=1)])
def test_regions_that_are_none(regions):
    unet = Blocks()
    with pytest.raises(ch.ArgumentError, match="candidates are regions"):
        tune(unet, BATCHES, generate=sampler(unet), regions=regions)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_stays_on_the_unet_where_the_end_fails(error, tmp_path, monkeypatch):
    """The last run, of the pictures after, and what is written to the folder come once the UNet is wrapped."""
    unet, runs, last = Blocks(**WORLDS["affine"]), [], 0
    before = snapshot(unet)

    def generate(batch, seed):
        runs.append(seed)
        if len(runs) == last:
            raise error
        return sampler(unet)(batch, seed)

    def fail(tuning, path):
        raise error

    options = {"generate": generate, "saving": 0.3, "guidance": 2.0}
    tune(unet, BATCHES, **options).remove()
    last = len(runs)
    runs.clear()
    with pytest.raises(error):
        tune(unet, BATCHES, **options)
    assert snapshot(unet) == before
    last = 0
    monkeypatch.setattr(Tuning, "save", fail)
    with pytest.raises(error):
        tune(unet, BATCHES, folder=tmp_path, **options)
    assert snapshot(unet) == before


def test_what_is_calibrated_for_its_steps_also_saves_what_was_asked_for(monkeypatch, tmp_path):
    """It may be of another kind, which costs more: 35% were wrapped where 45% were asked for."""
    unet = Blocks(mix=0.5, gain=lambda t: 1 + t / 500)

    def calibrate(*args, schedule, **options):
        return ch.calibrate(*args, schedule=schedule, kind="affine" if schedule is None else "exit+entry", **options)

    monkeypatch.setattr(tuning, "calibrate", calibrate)
    with tune(unet, BATCHES, generate=sampler(unet), saving=0.45, guidance=2.0) as cw, torch.no_grad():
        for seed in (1, 2):  # the first call of all is recorded
            cw.stats.clear()
            with cw.trajectory():
                sampler(unet)(BATCHES[0], seed)
        assert cw.stats.saving >= cw.adaptor.tuning.chosen.saved >= 0.45
        assert cw.adaptor.tuning.chosen.adaptor == cw.adaptor.facts["kind"] == "affine"
        cw.adaptor.save_pretrained(tmp_path)
    with ch.wrap(unet, tmp_path) as again:
        assert again.schedule == cw.schedule


def test_a_saving_beyond_the_widest_region_is_refused_before_calibrating():
    unet, calls = Blocks(mix=1.0), []

    def generate(batch, seed):
        calls.append(seed)
        return sampler(unet)(batch, seed)

    with pytest.raises(ch.ArgumentError) as refusal:
        tune(unet, BATCHES, generate=generate, saving=0.999)
    assert refusal.value.do == "ask for less than that share"
    assert len(calls) == 1  # the first call, which finds the regions


def test_schedules_follow_rules_of_thumb():
    rules = dict(spaced(20, 0.5, 0.93))
    assert rules["clock 3, first 2 full"] == tuple(s for s in range(3, 20) if (s - 2) % 3)
    assert all(0.93 * len(steps) / 20 > 0.5 for steps in rules.values())
    assert spaced(4, 0.9, 0.5) == []


class Pipeline:
    """In the form of a diffusers pipeline."""

    def __init__(self, unet):
        self.unet, self.calls = unet, []

    def __call__(self, prompt, generator=None, output_type="pil", guidance_scale=2.0, num_inference_steps=6):
        self.calls.append((prompt, output_type, guidance_scale, num_inference_steps))
        sample = sampler(self.unet, TIMES[:num_inference_steps])
        return (sample((len(prompt), guidance_scale), generator.initial_seed()),)


class Pictures(Pipeline):
    """Of a pipeline that returns pictures."""

    def __call__(self, prompt, **options):
        (latents,) = super().__call__(prompt, **options)
        return (latents[:, [0, 1, 0]].sigmoid() if options["output_type"] == "pt" else latents,)


def test_a_pipeline_is_called_with_prompts_and_its_own_options():
    pipe = Pipeline(Blocks(**WORLDS["affine"]))
    with pytest.raises(ch.ArgumentError, match=r"unknown: num_steps\nWhat to do: write num_inference_steps"):
        tune(pipe, ["a", "b", "c", "d"], saving=0.3, options={"num_steps": 6})
    with tune(pipe, ["a", "b", "c", "d"], saving=0.3, options={"num_inference_steps": 6}) as cw:
        assert cw.adaptor.facts["guidance"] == 2.0
        assert cw.adaptor.tuning.figures() == ()  # what it returns has two channels
        assert [one.rule for one in cw.adaptor.tuning.fewer] == ["plain, 3 steps", "plain, 4 steps"]
    assert {call[1:] for call in pipe.calls} == {*(("latent", 2.0, steps) for steps in (3, 4, 6)), ("pt", 2.0, 6)}
    assert [call[1] for call in pipe.calls].count("pt") == 2
    assert [call[0] for call in pipe.calls][-1] == ["d"]


def test_pictures_before_and_after(tmp_path):
    unet = Blocks(**WORLDS["affine"])

    def generate(batch, seed):
        return sampler(unet)(batch, seed)[:, [0, 1, 0]].sigmoid()

    with tune(unet, BATCHES, generate=generate, saving=0.3, guidance=2.0, folder=tmp_path) as cw:
        pictures = cw.adaptor.tuning.pictures
    assert pictures.shape == (2, 4, 3, 8, 8)
    assert torch.equal(pictures[0], generate(BATCHES[-1], 1))
    assert not torch.equal(*pictures)
    (figure,) = tmp_path.glob("*/before-after.png")
    assert figure.stat().st_size > 1000


def test_a_warning_names_the_callers_line():
    unet, text = Blocks(**WORLDS["affine"]), torch.ones(4, 3)

    def generate(batch, seed):
        with torch.no_grad():
            x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
            for now in torch.linspace(1, 0.3, 8):  # two calls at one time: in doubt, until their number is regular
                x = x - 0.1 * unet(x, now, text)
                x = x - 0.1 * unet(x, now, text) if now < 1 else x
        return x

    with pytest.warns(ch.OtherStepsWarning, match="not calibrated") as caught:
        tune(unet, BATCHES, generate=generate, saving=0.05).remove()
    assert {one.filename for one in caught} == {__file__}


def test_pictures_come_of_several_prompts():
    """A pipeline makes one a prompt: as many are shown as of a batch of four."""
    pipe, prompts = Pictures(Blocks(**WORLDS["affine"])), [str(number) for number in range(20)]
    with tune(pipe, prompts, saving=0.3) as cw:
        assert cw.adaptor.tuning.pictures.shape == (2, 4, 3, 8, 8)
    assert [call[0] for call in pipe.calls if call[1] == "pt"] == 2 * [[one] for one in prompts[-5:-1]]


class Unforeseen(Blocks):
    """What its region emits follows from the entry, and no linear map of that foretells it."""

    def __init__(self):
        super().__init__(mix=1.0)
        self.down.weight.data *= 1000

    def forward(self, x, t, c):
        return super().forward(x.sin(), t, c)


@pytest.mark.parametrize("foreseen", [True, False])
def test_fewer_plain_steps_are_judged_and_told_of_where_they_are_nearer(foreseen):
    """Where the region is not foreseen, the first eight steps do nothing: without them the result is the same."""
    unet, needed = (Blocks(**WORLDS["affine"]), 12) if foreseen else (Unforeseen(), 4)
    cuts = []

    def of(steps):
        cuts.append(steps)

        def generate(batch, seed):
            x = torch.randn(batch, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
            for k in range(12 - steps, 12):
                output = unet(x, 900.0 - 50 * k, torch.ones(batch, 3))
                x = x - 0.3 * output if k >= 12 - needed else x
            return x

        return generate

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with tune(unet, [6, 6, 6], generate=of(12), shorter=of, saving=0.4) as cw:
            tuning = cw.adaptor.tuning
    chosen, (less, more) = tuning.chosen, tuning.fewer
    assert cuts == [12, 2, *(int(one.rule.split()[1]) for one in tuning.fewer)]
    assert (less.saved, more.saved) == tuple(pytest.approx(1 - steps / 12) for steps in cuts[2:])
    assert less.saved >= chosen.saved > more.saved
    assert (less.error > chosen.error) is foreseen
    said = [str(one.message) for one in caught if one.category is ch.NoEffectWarning]
    assert [less.rule in text and chosen.rule in text for text in said] == ([] if foreseen else [True])
    assert not unet._forward_hooks
    assert Tuning.from_json(tuning.to_json()) == tuning
    assert less.rule in str(tuning)


@pytest.mark.parametrize("shorter", ["a text", lambda steps: None, lambda steps: sampler(Blocks())])
def test_a_shorter_sampler_that_is_none_is_refused_before_anything_is_calibrated(shorter):
    unet, calls = Blocks(), []

    def generate(batch, seed):
        calls.append(batch)
        return sampler(unet)(batch, seed)

    with pytest.raises(ch.ArgumentError, match=r"shorter= is for a UNet|let it call this very UNet object"):
        tune(unet, BATCHES, generate=generate, shorter=shorter)
    assert not calls
    assert not unet._forward_hooks
    assert not unet._forward_pre_hooks


class NoFewer(Pipeline):
    """Of a pipeline whose scheduler needs so many steps, as diffusers' PNDM needs four."""

    def __call__(self, prompt, num_inference_steps=6, **options):
        if num_inference_steps < 6:
            raise ValueError("operands could not be broadcast together")
        return super().__call__(prompt, num_inference_steps=num_inference_steps, **options)


def test_a_sampler_that_takes_no_fewer_steps_loses_nothing_that_was_chosen():
    pipe = NoFewer(Blocks(**WORLDS["affine"]))
    with pytest.warns(ch.OtherStepsWarning, match=r"error: ValueError: operands could not"):
        cw = tune(pipe, ["a", "b", "c", "d"], saving=0.3)
    assert cw.adaptor.tuning.fewer == ()
    assert cw.adaptor.tuning.chosen.saved >= 0.3
    cw.remove()
    assert not pipe.unet._forward_hooks


def test_a_pipeline_needs_no_shorter_one():
    with pytest.raises(ch.ArgumentError, match="num_inference_steps, and needs none"):
        tune(Pipeline(Blocks()), ["a", "b"], shorter=lambda steps: None)


def test_batches_of_other_sizes_have_no_other_shares():
    """What the adaptor takes was counted for six samples, of what a pass takes for four: 30% could not be reached."""
    unet = Blocks(gain=lambda t: 1 + t / 500, mix=0.5)
    times = [900.0 - 100 * k for k in range(8)]
    for held in (4, 8):
        with tune(unet, [(6, 2.0), (6, 2.0), (held, 2.0)], generate=sampler(unet, times), saving=0.3) as cw:
            assert cw.adaptor.tuning.chosen.saved >= 0.3
            assert cw.adaptor.tuning.chosen.steps == tuple(range(2, 9))  # each of the other ones falls short of it
    with pytest.raises(ch.ArgumentError, match=r"saving: 33.0%\n(.*\n)*  most that can be .*: 32\.1%\n  steps: 8"):
        tune(unet, BATCHES, generate=sampler(unet, times), saving=0.33)


def test_what_is_calibrated_anew_is_not_taken_where_it_is_worse(monkeypatch):
    """Of few samples it may be; the table had a better row than the one that was chosen."""
    plain = tuning.calibrate

    def worse(*args, schedule=None, **options):
        adaptor = plain(*args, schedule=schedule, **options)
        if schedule is not None:
            adaptor.table.zero_()
        return adaptor

    monkeypatch.setattr(tuning, "calibrate", worse)
    unet = Blocks(**WORLDS["affine"])
    with tune(unet, BATCHES, generate=sampler(unet), saving=0.3, guidance=2.0) as cw:
        chosen = cw.adaptor.tuning.chosen
        assert chosen.error == min(one.error for one in cw.adaptor.tuning.trials)
        assert "calibrated" not in chosen.rule
        assert cw.adaptor.facts["schedule"] == str(cw.schedule)


def exploding(unet, times=TIMES, limit=1e-3):
    """Results are no numbers where they are too far from those of plain sampling."""
    plain = {}

    def generate(batch, seed=0):
        result = sampler(unet, times)(batch, seed)
        first = plain.setdefault((batch, seed), result)
        return result if (result - first).norm() <= limit * first.norm() else result * float("inf")

    return generate


def test_results_that_are_no_numbers_come_back_from_the_folder(tmp_path):
    """Their errors came back as None, and the report could not be printed."""
    unet = Blocks(**WORLDS["affine"])
    options = {"generate": exploding(unet), "saving": 0.3, "guidance": 2.0, "folder": tmp_path}
    with tune(unet, BATCHES, **options) as first:
        assert first.adaptor.tuning.identity.error == float("inf")
    with tune(unet, BATCHES, **options) as again:
        assert again.adaptor.tuning == first.adaptor.tuning
        assert str(again.adaptor.tuning) == str(first.adaptor.tuning)
        follows_its_schema(again.adaptor.tuning.to_dict())


def test_no_schedule_is_chosen_whose_results_are_no_numbers():
    unet = Blocks(**WORLDS["affine"])
    with pytest.raises(ch.ArgumentError, match=r"must be finite\n  saving: 30.0%\n  schedules tried: \d+\n"):
        tune(unet, BATCHES, generate=exploding(unet, limit=0.0), saving=0.3)


def test_noise_that_the_seed_does_not_reach_is_the_same_in_each_trial():
    """As an ancestral sampler's is: results with other noise were compared, and told nothing of the schedule."""
    unet = Blocks(gain=late)

    def generate(batch, seed):
        x = sampler(unet)(batch, seed)
        return x + torch.randn_like(x)

    with tune(unet, BATCHES, generate=generate, saving=0.3, guidance=2.0) as cw:
        assert cw.adaptor.tuning.chosen.error < 1e-3
        assert min(cw.adaptor.tuning.chosen.steps) > 3


def test_plain_trials_are_named_by_the_steps_that_they_took():
    """A sampler that takes two thirds of what it is asked for was reported with the number that it was asked for."""
    unet = Blocks(**WORLDS["affine"])
    times = [900.0 - 50 * k for k in range(12)]
    with tune(
        unet, BATCHES, generate=sampler(unet, times), shorter=lambda steps: sampler(unet, times[: 2 * steps // 3]),
        saving=0.3, guidance=2.0,
    ) as cw:  # fmt: skip
        assert [one.rule for one in cw.adaptor.tuning.fewer]
        for one in cw.adaptor.tuning.fewer:
            assert one.rule == f"plain, {round(12 * (1 - one.saved))} steps"
