"""The command: what it prints, its errors, and how little it imports."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from clockwork_hooks import __version__
from clockwork_hooks._numbers import count, duration, flops, macs, percent, quantity, shape
from clockwork_hooks.cli import ORDER, app, main
from clockwork_hooks.cli.budget import LIMITS
from clockwork_hooks.cli.options import as_option
from clockwork_hooks.reports.tables import table
from tests.schemas import follows_its_schema, schema
from tests.small_unet import Tiny


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")


def run(capsys, *words):
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"{__version__}\n", "")


COMMANDS = sorted(command.callback.__name__ for command in app.registered_commands)


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=str)
def test_help_teaches_by_example(capsys, words):
    code, out, _ = run(capsys, *words, "--help")
    assert code == 0
    shown = out.split("Examples:")[1]
    assert shown.count(" ".join(["clockwork-hooks", *words])) >= 2


def options():
    """(command, option) of all commands, but `--help`."""
    group = get_command(app)
    parameters = [(name, one) for name in COMMANDS for one in group.commands[name].params]
    return [(name, one) for name, one in parameters if one.opts[0].startswith("--") and one.opts[0] != "--help"]


def test_the_same_options_mean_the_same_everywhere():
    """One name, one sentence of help; but samplers have their own steps, batch, seeds, and some folders hold more."""
    several = {"--out", "--batch", "--steps", "--seed", "--clock", "--adaptor"}
    helps = {}
    for _, option in options():
        helps.setdefault(option.opts[0], set()).add(option.help)
    assert {name for name, texts in helps.items() if len(texts) > 1} <= several
    assert helps["--clock"] == {"One full pass every so many steps.", "One full pass every so many steps; repeatable."}


def test_the_page_of_reports_tables_every_option():
    """docs/reports.md: a row an option, with its commands."""
    page = (Path(__file__).parent.parent / "docs" / "reports.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| `--")]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    documented = {(row[0].split("`")[1], name) for row in rows for name in row[1].split(", ")}
    assert documented == {(option.opts[0], name) for name, option in options()}


def test_the_page_of_reports_tables_every_command_in_the_order_of_the_help():
    page = (Path(__file__).parent.parent / "docs" / "reports.md").read_text(encoding="utf-8")
    table = page.split("| command | does |\n", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    assert tuple(line.split("`")[1] for line in table) == ORDER


def test_a_schema_names_every_limit_of_a_budget():
    assert set(schema("clockwork_hooks/budget/1")["properties"]) == set(LIMITS)


def test_flops_prints_the_papers_numbers(capsys):
    code, out, err = run(capsys, "flops", "sd15", "--cut", "paper", "--no-attention", "--guidance")
    assert (code, err) == (0, "")
    for text in ("338.61 GMACs", "677.22 GFLOPs", "228.12 GFLOPs", "10.84 TFLOPs", "attention products left out"):
        assert text in out


def test_flops_json_and_markdown(capsys):
    _, out, _ = run(capsys, "flops", "ddpm-cifar10", "--format", "json", "--steps", "6", "--clock", "3", "--batch", "2")
    data = json.loads(out)
    assert (data["steps"], data["full_steps"], data["sample"]) == (6, [1, 4], [2, 3, 32, 32])
    _, out, _ = run(capsys, "flops", "ddpm-cifar10", "--format", "md", "--depth", "1", "--norms")
    assert "| up_blocks " in out
    assert "fvcore's estimate for normalisations added" in out


@contextlib.contextmanager
def unread():
    """Standard output and standard error are pipes that nobody reads any more."""
    with contextlib.ExitStack() as stack:
        for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            reader, writer = os.pipe()
            os.close(reader)
            stack.enter_context(redirect(stack.enter_context(os.fdopen(writer, "w"))))
        yield


@pytest.mark.parametrize("words", [["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_a_closed_pipe_is_no_error(words):
    with unread():
        assert main(words) == 0


@pytest.mark.parametrize("format", ["table", "md", "json"])
def test_behind_a_closed_pipe_files_are_written_and_checks_made(tmp_path, format):
    (tmp_path / "budget.json").write_text('{"full_macs": 1}')
    words = ["flops", "ddpm-cifar10", "--format", format, "--out", str(tmp_path / "report.json")]
    with unread():
        assert main(words) == 0
        assert main([*words, "--check", str(tmp_path / "budget.json")]) == 1
        assert main(["flops", "sd99"]) == 2
    follows_its_schema(json.loads((tmp_path / "report.json").read_text()))


def test_a_closed_pipe_of_a_process():
    """Also what Python itself writes at its end is no error."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "clockwork_hooks", "explain"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_flops_of_another_size(capsys):
    _, out, _ = run(capsys, "flops", "ddpm-cifar10", "--size", "16x24", "--format", "json")
    assert json.loads(out)["sample"] == [1, 3, 16, 24]


def test_regions_lists_and_draws(capsys):
    code, out, err = run(capsys, "regions", "ddpm-cifar10")
    assert (code, err) == (0, "")
    assert "up_blocks.2.upsamplers.0.conv" in out
    assert "┄┄ entry" in out
    _, out, _ = run(capsys, "regions", "sd21", "--level", "2", "--format", "json")
    data = json.loads(out)
    follows_its_schema(data)
    assert data["chosen"]["level"] == 2
    assert len(data["regions"]) > 2
    _, out, _ = run(capsys, "regions", "sd21", "--cut", "paper", "--format", "md")
    assert "| level |" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["flops", "sd99"], "presets: sd15, sd21"),
        (["flops", "sd15", "--size", "big"], "pass --size 64 or 72x128"),
        (["flops", "sd15", "--size", "8²"], "pass --size 64 or 72x128"),
        (["regions", "ddpm-cifar10", "--level", "9"], "levels with a region"),
        (
            ["flops", "ddpm-cifar10", "--level", "9"],
            "What to do: pass one of these levels, or name modules: --module NAME",
        ),
        (["flops", "sd15", "--share", "2"], "What to do: pass --share 0.5"),
        (["flops", "sd15", "--device", "tpu"], "clockwork-hooks doctor lists"),
        (["flops", "sd15", "--out", "a.txt"], "endings: .json .md .html .svg .png"),
        (["bench", "sd15", "--device", "meta"], "a time can be measured only on a device that computes"),
        (["bench", "sd15", "--clock", "1"], "greater than or equal to 2"),
        (
            ["bench", "ddpm-cifar10", "--clock", "2", "--clock", "2"],
            "pass --clock 2 --clock 4\nCauses and fixes: clockwork-hooks explain ArgumentError",
        ),
        (["bench", "sd15", "--adaptor"], "requires an argument"),
        (["flops", "sd15", "--frmt", "md"], "--format"),
        (["flosp", "sd15"], "Did you mean 'flops'?"),
        (["plan"], "What to do: pass --max-error or --min-saving"),
        (["flops", "sd15", "--cut", "middle"], "middle"),
        (["flops", "sd15", "--clock", "0"], "clock"),
        (["nothing"], "nothing"),
    ],
)
def test_errors_are_one_readable_block(capsys, words, said):
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_a_failing_model_is_an_error_too(capsys):
    code, _, err = run(capsys, "flops", "ddpm-cifar10", "--size", "7")
    assert code == 2
    assert "--debug" in err


@pytest.mark.parametrize("words", [["--debug", "flops", "sd99"], ["flops", "sd99", "--debug"]])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(capsys, words):
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert "Traceback (most recent call last)" in err
    assert "Error: a model is a preset" in err


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("max_error", None, "--max-error"),
        ("share", 0.5, "--share 0.5"),
        ("clocks", (2, 4), "--clock 2 --clock 4"),
        ("modules", ..., "--module NAME"),
        ("maps", ["up 16×16"], "--map 'up 16×16'"),
        ("resume", True, "--resume"),
    ],
)
def test_arguments_in_errors_are_written_as_options(name, value, option):
    assert as_option(name, value) == option


@pytest.mark.parametrize("words", [["flops", "ddpm-cifar10"], ["plan"], ["demo"], ["tune"], ["distill", "demo"]])
def test_a_place_that_cannot_be_written_is_found_before_the_work(capsys, tmp_path, words):
    (tmp_path / "taken").write_text("")
    for out in (tmp_path / "taken", tmp_path / "taken" / "new"):
        code, printed, err = run(capsys, *words, "--out", str(out))
        assert (code, printed) == (2, "")
        assert f"in the way: {tmp_path / 'taken'}" in err
    assert (tmp_path / "taken").read_text() == ""


@pytest.mark.parametrize("words", [["demo"], ["tune"], ["distill", "demo"]])
def test_a_file_is_no_folder_whatever_its_ending(capsys, tmp_path, words):
    """One with the ending of a report was taken for its place, and found in the way minutes later."""
    (tmp_path / "report.json").write_text("")
    code, printed, err = run(capsys, *words, "--out", str(tmp_path / "report.json"))
    assert (code, printed) == (2, "")
    assert f"in the way: {tmp_path / 'report.json'}" in err


def test_a_stream_that_has_no_such_letters_gets_them_all_the_same():
    """As a pipe of Windows: × and → are in no old code page."""
    command = [sys.executable, "-m", "clockwork_hooks", "flops", "ddpm-cifar10", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert "32×32" in done.stdout.decode("utf-8")


class OnlyData(torch.nn.Module):
    """Looks at its values: it cannot run on meta."""

    def __init__(self):
        super().__init__()
        self.unet = Tiny()

    def forward(self, x, t):
        return self.unet(x, t) if float(x.sum()) > 0 else x


def build():
    """A factory of a model and of one call."""
    return OnlyData(), (torch.ones(1, 2, 8, 8), torch.tensor(3)), {}


def sampled():
    """A factory of a sampler."""
    return Tiny(), lambda batch, seed: torch.zeros(1), [1]


@pytest.mark.parametrize("command", ["flops", "regions"])
def test_a_factory_that_does_not_run_on_meta_runs_on_the_cpu(capsys, command):
    code, out, err = run(capsys, command, "tests.test_cli:build", "--format", "json")
    assert code == 0
    assert json.loads(out)["schema"] == f"clockwork_hooks/{command}/1"
    assert "On the CPU, as tests.test_cli:build does not run on meta" in err
    assert run(capsys, command, "tests.test_cli:build", "--device", "cpu")[::2] == (0, "")
    assert run(capsys, command, "tests.test_cli:build", "--device", "meta")[0] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["flops", "tests.test_cli:sampled"], "(unet, generate, conditions), is for drift, perturb, plan and tune"),
        (["drift", "tests.test_cli:build"], "(model, args, kwargs), is for flops, regions and bench"),
    ],
)
def test_factories_of_models_and_of_samplers_are_told_apart(capsys, words, said):
    code, _, err = run(capsys, *words)
    assert code == 2
    assert said in err


def test_help_imports_no_torch():
    code = "import sys; from clockwork_hooks.cli import main; main(['--help']); print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = out.splitlines()[-1]
    for name in ("'torch'", "'numpy'", "'diffusers'", "'fvcore'", "'transformers'", "'matplotlib'"):
        assert name not in loaded


def test_numbers_always_have_units():
    assert macs(338_610_585_600) == "338.61 GMACs"
    assert flops(7_250_000_000_000) == "7.25 TFLOPs"
    assert macs(0) == "0 MACs"
    assert macs(None) is flops(None) is percent(None) is None
    assert quantity(999_999_999, "MACs") == "1.00 GMACs"
    shown = ["30.9%", "0.0%", "0.1%", "0.0031%", "<0.001%"]
    assert [percent(share) for share in (0.3094, 0.0, 0.00061, 0.000031, 1.2e-7)] == shown
    assert shape((1, 4, 64)) == "1×4×64"
    assert [duration(s) for s in (0.29, 0.9996, 2.64, 59.96, 4980)] == [
        "290 ms", "1 s", "2.64 s", "1 min 0 s", "1 h 23 min"
    ]  # fmt: skip
    assert [count(n, "prompt") for n in (0, 1, 2)] == ["0 prompts", "1 prompt", "2 prompts"]


def test_a_table_renders_twice_from_one_description():
    from rich.console import Console

    example = table("T", ("name", ">n"), [("a|b", 1), ("[bold]", None)], notes=("note",))
    assert example.to_markdown().splitlines()[2:6] == [
        "| name   |   n |",
        "|:-------|----:|",
        "| a\\|b   |   1 |",
        "| [bold] |   – |",
    ]
    console = Console(width=60)
    with console.capture() as shown:
        console.print(example)
    assert "[bold]" in shown.get()
    assert "note" in shown.get()
