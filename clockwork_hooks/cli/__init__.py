"""The `clockwork-hooks` command: what a UNet costs, what of it Clockwork can skip, and everything around it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import TextIOWrapper
from typing import Any, TextIO, cast

import typer

from clockwork_hooks.cli import demo, distill, look, measure, support  # each registers its commands
from clockwork_hooks.cli.app import Interrupted, app
from clockwork_hooks.cli.options import as_option, as_setting
from clockwork_hooks.errors import ClockworkError

__all__ = ["app", "demo", "distill", "look", "main", "measure", "support"]

ORDER = (
    "demo",
    "play",
    "edit",
    "flops",
    "regions",
    "bench",
    "perturb",
    "drift",
    "plan",
    "tune",
    "distill",
    "doctor",
    "explain",
)
app.registered_commands.sort(key=lambda command: ORDER.index(getattr(command.callback, "__name__", "")))


class OutlivesItsReader:
    """A standard stream whose reader may leave, as `head` does: the rest goes nowhere then, and the work goes on.

    Files are still written and checks made, so that the exit code tells of them and not of the pipe; typer and rich
    would leave with 1.

    Args:
        stream: standard output or standard error.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text, if somebody reads it."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Hand on what is written, if somebody reads it."""
        self._try(self._stream.flush)

    def _try(self, act: Callable[..., object], *args: str) -> None:
        try:
            act(*args)
        except BrokenPipeError:  # what is still buffered follows, also when Python ends
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the console entry point.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        0; 1 where a check failed, of a budget or of `doctor`; 2 after an error, which is one readable block on
        stderr, below its traceback with `--debug`; 130 where it was interrupted.

    Example:
        >>> main(["--version"])  # doctest: +SKIP
        0.2.0
        0
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and "utf" not in stream.encoding.lower():
            if stream.isatty():
                stream.reconfigure(errors="replace")
            else:
                stream.reconfigure(encoding="utf-8")  # a file has all letters: × and → too
    # a stream that was closed before is None
    out, err = (stream and cast(TextIO, OutlivesItsReader(stream)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        return _run(sys.argv[1:] if arguments is None else list(arguments))


def _run(words: list[str]) -> int:
    debug = "--debug" in words
    words = ["--debug"] * debug + [word for word in words if word != "--debug"]  # before or after the command
    try:
        app(words, prog_name="clockwork-hooks")
    except SystemExit as stop:
        if stop.code == 130:
            typer.echo(f"Interrupted. {_partial_result(stop)}", err=True)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except ClockworkError as error:
        failure: Exception = error
        command = next((word for word in words if not word.startswith("-")), "")
        text = f"{error.message(as_setting if command == 'distill' else as_option)}\n{error.where}"
    except Exception as error:  # the model's own code failed
        failure = error
        text = f"{type(error).__name__}: {error}" + (
            "" if debug else "\nWhat to do: run again with --debug to see where"
        )
    else:
        return 0
    if debug:
        typer.echo("".join(traceback.format_exception(failure)), err=True)
    typer.echo(f"Error: {text}", err=True)
    return 2


def _partial_result(stop: BaseException | None) -> str:
    """What the interrupted command says of itself."""
    while stop is not None and not isinstance(stop, KeyboardInterrupt):  # typer leaves on its own
        stop = stop.__cause__ or stop.__context__
    return str(stop) if isinstance(stop, Interrupted) else "Nothing is kept: another run begins anew."
