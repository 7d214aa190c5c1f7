"""The `clockwork-hooks` application; each panel of its help has a file beside this one."""

from __future__ import annotations

from typing import Annotated

import typer

from clockwork_hooks._version import __version__

LOOK, MEASURE, TRAIN, TRY, INSTALL = (
    "Look at a model (no weights, no GPU)",
    "Measure",
    "Train",
    "Try with the demo model",
    "Check the installation",
)
EXIT_CODES = (
    "Exit codes: 0 done; 1 a check failed (a budget exceeded, a package missing); "
    "2 an error, told in one block on stderr; 130 interrupted."
)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what is kept and how to go on; without words, nothing is kept."""


def epilog(*examples: str) -> str:
    """The end of a command's help: examples, and the exit codes."""
    return "\n\n".join(["Examples:", *(f"clockwork-hooks {example}" for example in examples), EXIT_CODES])


app = typer.Typer(
    name="clockwork-hooks",
    help="Clockwork Diffusion on any diffusion UNet: what passes cost, what an adaptor pass can skip, and what that "
    "does to time and pictures. Start with `clockwork-hooks demo`; each command's --help has examples.",
    epilog=epilog(
        "demo   (a picture and a table, from the model that ships)",
        "play   (the same on a page, where the steps are clicked)",
        "flops sd15 --guidance   (MACs and FLOPs, by level, operator and module)",
        "regions sdxl   (what can be skipped)",
        "bench my_package.unet:build --out bench.html   (time and MACs on this machine)",
        "tune --saving 0.4   (an adaptor without training, and its steps)",
        "plan my_package.sampler:build --max-error 0.05   (which steps may use the adaptor)",
        "distill examples/distill_demo.toml   (train an adaptor)",
        "--install-completion   (completion in your shell)",
    ),
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
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; before or after the command.")
    ] = False,
) -> None:
    pass
