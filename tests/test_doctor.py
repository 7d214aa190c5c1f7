"""`clockwork-hooks doctor`, completion in the shell, and exit codes that `--help` tells."""

import json
import platform
import re
import sys
from importlib import metadata

import pytest
import torch

from clockwork_hooks.cli import app, main
from clockwork_hooks.cli import support as command
from tests.schemas import follows_its_schema


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")


@pytest.fixture
def without(monkeypatch):
    """Let some packages seem not to be installed."""

    def take(*names):
        real = metadata.version

        def version(name):
            if name in names:
                raise metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(metadata, "version", version)

    return take


def test_all_is_there(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert metadata.version("torch") in out
    assert platform.python_version() in out
    assert "Nothing is missing." in out


def test_an_optional_part_is_missing(capsys, without):
    """The line is pip's for this very Python, with the versions that pyproject.toml asks for."""
    without("accelerate", "torchmetrics")
    assert main(["doctor"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        re.escape(sys.executable) + r' -m pip install "accelerate>=[\d.]+" "torchmetrics>=[\d.]+"', line
    )


def test_a_part_that_all_needs_is_missing(capsys, without):
    without("safetensors")
    assert main(["doctor"]) == 1
    assert '"safetensors>=' in capsys.readouterr().out


def test_conditions_of_requirements_are_asked(capsys, monkeypatch):
    """What this Python does not ask for is not missing; what it asks for is, without its condition in pip's line."""
    lines = [
        'old-toml>=2.0; python_version < "3.0"',
        'new-toml[fast]>=2.0; python_version >= "3.0"',
        "old-plots>=1; sys_platform == 'amiga' and extra == 'plot'",
        "new-plots<3,>=1; sys_platform != 'amiga' and extra == 'plot'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    assert main(["doctor", "--format", "json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["parts"] == {
        "new-toml": {"version": None, "extra": None},
        "new-plots": {"version": None, "extra": "plot"},
    }
    assert data["install"].endswith(' -m pip install "new-toml[fast]>=2.0" "new-plots<3,>=1"')


def test_json_and_markdown(capsys, without):
    without("matplotlib")
    assert main(["doctor", "--format", "json"]) == 0
    data = json.loads(capsys.readouterr().out)
    follows_its_schema(data)
    assert data["parts"]["torch"] == {"version": metadata.version("torch"), "extra": None}
    assert data["parts"]["matplotlib"] == {"version": None, "extra": "plot"}
    assert "matplotlib>=" in data["install"]
    assert set(data["devices"]) >= {"cpu"}
    assert main(["doctor", "--format", "md"]) == 0
    assert "| matplotlib " in capsys.readouterr().out


def test_every_extra_of_the_package_has_a_purpose():
    developers = {"test", "docs", "all"}
    extras = set(metadata.metadata("clockwork-hooks").get_all("Provides-Extra"))
    assert extras - developers == set(command.PURPOSES) - {""}


def test_a_gpu_is_named(monkeypatch):
    about = type("Properties", (), {"name": "H", "total_memory": 80 * 2**30, "major": 9, "minor": 0})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda k: about)
    assert dict(command.devices())["cuda:0"] == "H, 80 GiB, compute 9.0"


@pytest.mark.parametrize("words", [[], *([command.callback.__name__] for command in app.registered_commands)])
def test_help_tells_the_exit_codes(capsys, words):
    assert main([*words, "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Exit codes: 0 done" in out


def test_the_shell_completes(capsys, monkeypatch):
    monkeypatch.setenv("_CLOCKWORK_HOOKS_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "clockwork-hooks do")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert main([]) == 0
    assert capsys.readouterr().out.split() == ["doctor"]
    monkeypatch.setenv("COMP_WORDS", "clockwork-hooks flops sd15 --att")
    monkeypatch.setenv("COMP_CWORD", "3")
    assert main([]) == 0
    assert capsys.readouterr().out.split() == ["--attention"]
    monkeypatch.setenv("COMP_WORDS", "clockwork-hooks bench sd15 --format ")
    monkeypatch.setenv("COMP_CWORD", "4")
    assert main([]) == 0
    assert capsys.readouterr().out.split() == ["table", "md", "json"]
