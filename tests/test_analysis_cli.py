"""perturb, drift, plan and edit on the command line: files, tables and errors."""

import json
from pathlib import Path

import pytest
import torch

from clockwork_hooks import Plan, wrap
from clockwork_hooks.cli import main
from tests.schemas import follows_its_schema
from tests.test_analysis import sampler, tiny

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' schedulers, of NumPy


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")


def build():
    """What a user's own factory returns."""
    unet = tiny()
    return unet, sampler(unet), [1]


def build_two():
    """With a batch to calibrate on, and one to judge on."""
    unet = tiny()
    return unet, sampler(unet), [1, 1]


def run(capsys, *words):
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (
            ["perturb", "--start", "1", "--map", "first", "--alpha", "0.7"],
            ["perturb.json", "perturb.png"],
        ),
        (["drift", "--clock", "2"], ["drift.json", "drift.md", "drift.html", "drift.png"]),
        (["plan", "--min-saving", "0.2", "--clock", "2", "--probes", "2"], ["plan.json", "plan.md", "plan.png"]),
    ],
    ids=lambda words: words[0],
)
def test_a_factory_is_analysed(capsys, tmp_path, words, files):
    out = tmp_path / "new" / "folder"
    code, printed, err = run(capsys, words[0], "tests.test_analysis_cli:build", *words[1:], "--out", str(out))
    assert code == 0, err
    for name in files:
        assert (out / name).stat().st_size > 100
        assert str(out / name) in err
    assert printed.count("|") == 0
    assert len(printed) > 200  # the table, and nothing else
    data = json.loads((out / files[0]).read_text(encoding="utf-8"))
    assert data["schema"] == {"perturb": "clockwork_hooks/robustness/1"}.get(words[0], f"clockwork_hooks/{words[0]}/1")
    if words[0] == "perturb":
        assert (data["alpha"], data["starts"], list(data["distances"])) == (0.7, [1], ["first"])
    if words[0] == "plan":
        unet, generate, conditions = build()
        with torch.no_grad(), wrap(unet, plan=Plan.from_json((out / "plan.json").read_text())) as cw:
            generate(conditions[0], 0)
            with cw.trajectory():  # its times are plain numbers
                generate(conditions[0], 0)
        assert cw.stats.trajectories[-1].adaptor_passes == len(data["chosen"]["steps"])


def test_a_sampler_is_tuned(capsys, tmp_path):
    """The folder is all that `wrap` needs: region, adaptor and steps."""
    out = tmp_path / "tuned"
    code, printed, err = run(capsys, "tune", "tests.test_analysis_cli:build_two", "--saving", "0.2", "--out", str(out))
    assert code == 0, err
    assert "(chosen)" in printed
    assert f'wrap(unet, "{out}")' in err
    data = json.loads((out / "tuning.json").read_text(encoding="utf-8"))
    follows_its_schema(data)
    unet, generate, conditions = build_two()
    with wrap(unet, out) as cw, cw.trajectory(), torch.no_grad():
        generate(conditions[0], 0)
        generate(conditions[0], 0)
    assert cw.schedule.adaptor_steps(data["steps"]) == tuple(data["chosen"]["steps"])


@pytest.mark.parametrize("out", [None, "folder", "file.json"])
def test_a_plan_with_a_calibrated_adaptor_is_used_as_the_help_says(capsys, tmp_path, monkeypatch, out):
    """The adaptor was solved for and thrown away: nothing could use the plan."""
    monkeypatch.chdir(tmp_path)
    words = ["--min-saving", "0.1", "--adaptor", "calibrated", "--clock", "2", "--probes", "1"]
    more = [] if out is None else ["--out", out]
    code, _, err = run(capsys, "plan", "tests.test_analysis_cli:build_two", *words, *more)
    assert code == 0, err
    file = {None: "clockwork-plan/plan.json", "folder": "folder/plan.json", "file.json": "file.json"}[out]
    plan = Plan.from_json(Path(file).read_text(encoding="utf-8"))
    assert str(plan.adaptor_folder) in err
    unet, generate, conditions = build_two()
    with wrap(unet, plan=plan) as cw, cw.trajectory(), torch.no_grad():
        generate(conditions[0], 0)
    assert type(cw.adaptor).__name__ == plan.adaptor_name == "CalibratedAdaptor"
    assert cw.stats.adaptor_passes == len(plan.chosen.steps)


@pytest.mark.parametrize(("words", "scale"), [([], 1.5), (["--guidance-scale", "0.0"], 0.0)])
def test_the_demo_is_sampled_with_the_guidance_that_its_adaptor_is_for(capsys, tmp_path, monkeypatch, words, scale):
    """It was calibrated for one scale, and sampled with another."""
    from clockwork_hooks.analysis import tuning
    from clockwork_hooks.demo.model import DemoModel

    scales = []

    def stops(unet, batches, *, generate, guidance, **options):
        scales.append(guidance)
        generate(batches[0], 0)

    def samples(model, prompts, *, guidance, **options):
        scales.append(guidance)
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "tune", stops)
    monkeypatch.setattr(DemoModel, "sample", samples)
    assert run(capsys, "tune", *words, "--out", str(tmp_path / "out"))[0] == 130
    assert scales == [scale, scale]


def test_an_interrupt_says_what_is_kept(capsys, tmp_path, monkeypatch):
    from clockwork_hooks.analysis import tuning

    measured = tuning._Tuner.tried
    count = iter(range(100))

    def tried(self, *args):
        if next(count) == 2:
            raise KeyboardInterrupt
        return measured(self, *args)

    monkeypatch.setattr(tuning._Tuner, "tried", tried)
    out = tmp_path / "tuned"
    words = ["tests.test_analysis_cli:build_two", "--saving", "0.2", "--out", str(out)]
    code, _, err = run(capsys, "tune", *words)
    assert code == 130
    assert "no adaptor yet" in err
    assert f"The 2 schedules that were tried are in {out / 'trials.json'}" in err
    assert len(json.loads((out / "trials.json").read_text())) == 2


def interrupted():
    """A factory whose sampler is stopped by Ctrl-C."""

    def generate(batch, seed):
        raise KeyboardInterrupt

    return build()[0], generate, [2]


@pytest.mark.parametrize("command", ["drift", "perturb", "plan"])
def test_an_interrupt_of_a_measurement_says_that_nothing_is_kept(capsys, tmp_path, command):
    more = ["--min-saving", "0.2"] if command == "plan" else []
    code, _, err = run(capsys, command, "tests.test_analysis_cli:interrupted", "--out", str(tmp_path), *more)
    assert (code, err.strip()) == (130, "Interrupted. Nothing is kept: another run begins anew.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder where nobody may write, root neither")
@pytest.mark.parametrize("command", ["drift", "perturb", "plan", "tune", "edit"])
def test_a_folder_that_cannot_be_written_is_found_before_the_work(capsys, command):
    model = [] if command == "edit" else ["tests.test_analysis_cli:interrupted"]
    code, _, err = run(capsys, command, *model, "--out", "/proc/nowhere")
    assert code == 2
    assert "not writable: /proc" in err


def test_the_demo_model_is_the_default(capsys, tmp_path):
    words = ["--start", "2", "--map", "bottleneck 8×8", "--steps", "2", "--batch", "1", "--out", str(tmp_path)]
    code, printed, err = run(capsys, "perturb", *words)
    assert code == 0, err
    assert "mid_block" in printed
    assert (tmp_path / "perturb-2.png").stat().st_size > 5000


def test_scenes_are_edited(capsys, tmp_path):
    own = ["--source", "a large red circle in the centre on a grey background", "--replace", "red", "--by", "blue"]
    small = ["--inversion-steps", "2", "--steps", "2", "--out", str(tmp_path)]
    code, printed, err = run(capsys, "edit", *own, *small)
    assert code == 0, err
    assert "plain, no injection" in printed
    data = json.loads((tmp_path / "edit.json").read_text(encoding="utf-8"))
    assert data["settings"]["targets"] == ["a large blue circle in the centre on a grey background"]
    follows_its_schema(data)
    plain, quick, _ = data["rows"]
    assert quick["macs"] == round(plain["macs"] * (1 - quick["saving"]))
    assert quick["saving"] == pytest.approx(0.4, abs=0.01)
    assert (tmp_path / "edit.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["perturb", "sd15"], "a preset or a folder has no sampler"),
        (["plan", "no_such_package:build", "--min-saving", "0.2"], "Python can import from here"),
        (["drift", "tests.test_analysis:tiny"], "must return (unet, generate, conditions)"),
        (["plan", "tests.test_analysis_cli:build"], "one budget"),
        (["perturb", "tests.test_analysis_cli:build", "--alpha", "2"], "α is a share"),
        (["perturb", "tests.test_analysis_cli:build", "--start", "99"], "choose from 1 to 8"),
        (["edit", "--source", "a large red circle in the centre on a grey background"], "pass all three"),
        (["edit", "--source", "a red circle", "--replace", "red", "--by", "blue"], "must name everything"),
        (["edit", "--source", "a red circle", "--replace", "pink", "--by", "blue"], "'pink' in: a red circle"),
        (["edit", "--source", "a", "--replace", "b", "--by", "c", "--scenes", "2"], "one of the two"),
        (["edit", "--until-features", "1.5"], "until_features is a share"),
        (["edit", "--source", "a large red dog", "--replace", "red", "--by", "blue"], "dog"),
    ],
)
def test_errors_are_told(capsys, tmp_path, words, said):
    code, _, err = run(capsys, *words, "--out", str(tmp_path))
    assert code == 2
    assert said in err
    assert "Traceback" not in err
