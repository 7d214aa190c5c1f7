"""`clockwork-hooks demo`: the shipped model, plain and with Clockwork, side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from clockwork_hooks.cli.app import TRY, app, epilog
from clockwork_hooks.cli.delivery import deliver
from clockwork_hooks.cli.options import Clock, Format, FormatOption, Seed, Steps, check_out

__all__ = ["demo"]

EXAMPLES = (
    "demo",
    "demo --steps 20 --clock 4 --out my-folder",
    'demo --prompt "a large pink star left of a small white ring on a black background" --seed 7',
    "demo --prompts my-scenes.txt",
)


@app.command(epilog=epilog(*EXAMPLES), rich_help_panel=TRY)
def demo(
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help='A scene, e.g. "a small yellow star above a large cyan ring on a dark blue background"; repeatable. '
            "None for the 16 that ship with the demo.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="Scenes of a text file, one a line.", show_default=False)
    ] = None,
    steps: Steps = 8,
    clock: Clock = 2,
    seed: Seed = 0,
    out: Annotated[
        str, typer.Option(help="The folder for the picture and the report.", callback=check_out)
    ] = "clockwork-demo",
    format: FormatOption = Format.table,
) -> None:
    """Draw the same scenes plain, with DeepCache's setting, the identity, and an adaptor that is calibrated live."""
    from clockwork_hooks.demo.run import demo as run
    from clockwork_hooks.training.pipeline import read_prompts

    texts = [*(prompt or ()), *(read_prompts(prompts) if prompts is not None else ())]
    result = run(texts, steps=steps, clock=clock, seed=seed, out=out)
    deliver(result, format, "demo")
    for name in ("grid.png", "report.html", "report.md", "report.json"):
        typer.echo(result.folder / name, err=True)
