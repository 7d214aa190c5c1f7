"""How a command hands over its report: standard output holds the report alone, files are told of beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from clockwork_hooks.cli.options import Format

if TYPE_CHECKING:
    from clockwork_hooks.reports.report import Report

__all__ = ["deliver", "show"]

FORMS = ("json", "md", "html", "png")


def deliver(report: Report, format: Format, name: str, out: Sequence[str] | None = (), *more: Any) -> None:
    """Print the report as asked, and write its files; their paths go to standard error.

    Args:
        report: what the command measured.
        format: how it is printed.
        name: of the command: of its files in a folder.
        out: where to; None for the folder clockwork-NAME.
        *more: printed after the tables.
    """
    if format is Format.json:
        typer.echo(report.to_json())
    elif format is Format.md:
        typer.echo(report.to_markdown())
    else:
        show(*report.tables(), *more)
    for path in map(Path, [f"clockwork-{name}"] if out is None else out):
        for written in _write(report, path, name):
            typer.echo(written, err=True)


def _write(report: Report, path: Path, name: str) -> list[Path]:
    if path.suffix and not path.is_dir():
        return [report.save(path)]
    drawn = report.figures()
    written = [report.save(path / f"{name}.{form}") for form in FORMS if form != "png"]
    for k, figure in enumerate(drawn, 1):
        written.append(path / (f"{name}.png" if k == 1 else f"{name}-{k}.png"))
        figure.save(written[-1])
    return written


def show(*parts: Any) -> None:
    """Print tables and text to the terminal."""
    from rich.console import Console

    console = Console()
    for part in parts:
        if isinstance(part, str):
            typer.echo(part)
        else:
            console.print(part)
