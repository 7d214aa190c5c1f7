"""`clockwork-hooks explain`: every error says the command that prints its page, and the page is in the wheel."""

import importlib
from pathlib import Path

import pytest

import clockwork_hooks.errors as errors
from clockwork_hooks.cli import main

ROOT = Path(__file__).parents[1]
KINDS = [name for name in errors.__all__ if isinstance(getattr(errors, name), type) and name != "ClockworkError"]


@pytest.mark.parametrize("name", KINDS)
def test_every_error_and_warning_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", name.upper()]) == 0
    page = (ROOT / "docs" / "errors" / f"{name}.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == page.strip()


def test_an_error_says_the_command_that_explains_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flops", "no-such-model"]) == 2
    command = capsys.readouterr().err.strip().splitlines()[-1].removeprefix("Causes and fixes: ").split()
    assert command[0] == "clockwork-hooks"
    assert main(command[1:]) == 0
    assert capsys.readouterr().out.startswith("# ModelNotFoundError")


def test_without_a_name_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 0
    listed = capsys.readouterr().out
    assert all(f"[{name}]" in listed for name in KINDS)


def test_a_misspelt_name_is_answered_with_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "WrapEror"]) == 2
    assert "What to do: clockwork-hooks explain WrapError" in capsys.readouterr().err


def test_the_pages_are_part_of_the_wheel() -> None:
    """Building one takes a minute: the line that makes it so stands in pyproject.toml."""
    explain = importlib.import_module("clockwork_hooks.cli.support")
    target = explain.FOLDERS[0].relative_to(ROOT).as_posix()
    assert f'"docs/errors" = "{target}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
