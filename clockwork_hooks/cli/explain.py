"""`clockwork-hooks explain`: causes and fixes of an error or a warning, without a checkout or a network."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Annotated

import typer

from clockwork_hooks.cli.app import INSTALL, app, epilog
from clockwork_hooks.errors import ArgumentError

__all__ = ["explain"]

EXAMPLES = ("explain   (the list of errors and warnings)", "explain WrapError", "explain NoEffectWarning")
PACKAGE = Path(__file__).parents[1]
FOLDERS = (PACKAGE / "error_pages", PACKAGE.parent / "docs" / "errors")  # in a wheel, in a checkout


def pages() -> dict[str, Path]:
    """Name of the error → its page; "index" is the list of all."""
    folder = next(folder for folder in FOLDERS if folder.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.md"))}


@app.command(epilog=epilog(*EXAMPLES), rich_help_panel=INSTALL)
def explain(
    name: Annotated[
        str, typer.Argument(metavar="[ERROR]", help="Its name, as the last line of an error says it.")
    ] = "index",
) -> None:
    """Print causes and fixes of an error or a warning; without a name, the list of all."""
    names = {page.lower(): page for page in pages()}
    page = names.get(name.rpartition(".")[2].lower())
    if page is None:
        near = difflib.get_close_matches(name.lower(), names, n=1)
        raise ArgumentError(
            "explain takes the name of an error or a warning of this library",
            seen={"name": name, "names": ", ".join(sorted(set(names.values()) - {"index"}))},
            do=f"clockwork-hooks explain {names[near[0]]}" if near else "clockwork-hooks explain lists them",
        )
    text = pages()[page].read_text(encoding="utf-8")
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(text, hyperlinks=False))
    else:
        typer.echo(text.rstrip())
