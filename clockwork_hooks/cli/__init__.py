"""The `clockwork-hooks` command: what a UNet costs, what of it Clockwork can skip, and everything around it."""

from __future__ import annotations

import re
import sys

import typer

from clockwork_hooks.cli import (  # each registers its commands
    analyses,
    bench,
    demo,
    distill,
    doctor,
    edit,
    flops,
    regions,
)
from clockwork_hooks.cli.app import app

__all__ = ["analyses", "app", "bench", "demo", "distill", "doctor", "edit", "flops", "main", "regions"]

ORDER = ("demo", "edit", "flops", "regions", "bench", "perturb", "drift", "plan", "distill", "doctor")
app.registered_commands.sort(key=lambda command: ORDER.index(getattr(command.callback, "__name__", "")))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the console entry point.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        0; 1 where a check failed, of a budget or of `doctor`; 2 after an error, which is one readable block on
        stderr, or with `--debug` is raised; 130 where it was interrupted.

    Example:
        >>> main(["--version"])  # doctest: +SKIP
        0.1.0
        0
    """
    from clockwork_hooks.errors import ClockworkError

    given = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in given
    given = ["--debug"] * debug + [word for word in given if word != "--debug"]  # before or after the command
    try:
        app(given, prog_name="clockwork-hooks")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except ClockworkError as error:
        text = f"{_as_options(str(error))}\nCauses and fixes: {error.page}"
        if debug:
            raise
    except Exception as error:  # the model's own code failed
        text = f"{type(error).__name__}: {error}\nWhat to do: run again with --debug to see where"
        if debug:
            raise
    else:
        return 0
    typer.echo(f"Error: {text}", err=True)
    return 2


def _as_options(text: str) -> str:
    """Python's arguments in an error as the command's options: share=0.5 is --share 0.5, clocks=(2, 4) two --clock."""
    options = {
        known: option
        for command in getattr(typer.main.get_command(app), "commands", {}).values()
        for option in command.params
        for known in (option.name, f"{option.name}s")
        if option.opts[0].startswith("--")
    }

    def named(found: re.Match[str]) -> str:
        option, value = options.get(found[1]), found[2].replace("[...]", "NAME")
        if option is None:
            return found[0]
        several = getattr(option, "multiple", False) and value[:1] in ("(", "[")
        values = [one.strip("'\"") for one in re.split(r",\s*", value[1:-1]) if one] if several else [value]
        return " ".join(f"{option.opts[0]} {one}".rstrip() for one in values)

    return re.sub(r"\b(\w+)=(\([^)]*\)|\[[^\]]*\]|[^\s,;:]*)", named, text)
