"""The `clockwork-hooks` command: what a UNet costs, what of it Clockwork can skip, and everything around it."""

from __future__ import annotations

import sys

import typer

from clockwork_hooks.cli import (  # each registers its command
    demo,
    distill,
    doctor,
    drift,
    edit,
    flops,
    perturb,
    plan,
    regions,
)
from clockwork_hooks.cli.app import app

__all__ = ["app", "demo", "distill", "doctor", "drift", "edit", "flops", "main", "perturb", "plan", "regions"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the console entry point.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        0; 1 where a check failed, of a budget or of `doctor`; or 2 after an error, which is one readable block on
        stderr, or with `--debug` is raised.

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
        text = f"{error}\nCauses and fixes: {error.page}"
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
