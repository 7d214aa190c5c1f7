"""The `clockwork-hooks` application; each command has a file of its own beside this one."""

from __future__ import annotations

from typing import Annotated

import typer

from clockwork_hooks._version import __version__

__all__ = ["EPILOG", "EXIT_CODES", "app"]

EXIT_CODES = (
    "Exit codes: 0 done; 1 a check failed (a budget exceeded, a package missing); "
    "2 an error, told in one block on stderr."
)
EPILOG = f"""Examples:

clockwork-hooks flops sd15 --guidance

clockwork-hooks flops sd15 --cut paper --no-attention --guidance   (the paper's own numbers)

clockwork-hooks flops path/to/unet --size 96 --steps 20 --clock 4 --format md

clockwork-hooks regions sdxl

clockwork-hooks regions my_package.unet:build --level 2 --format json

{EXIT_CODES}
"""


app = typer.Typer(
    name="clockwork-hooks",
    help="Clockwork Diffusion on any diffusion UNet: what passes cost, and what an adaptor pass can skip.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass
