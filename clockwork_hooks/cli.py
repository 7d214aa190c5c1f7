"""The `clockwork-hooks` command: what a UNet costs, and what of it Clockwork can skip."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clockwork_hooks._version import __version__

if TYPE_CHECKING:
    from clockwork_hooks.boundary import Region
    from clockwork_hooks.models import LoadedModel
    from clockwork_hooks.report import Table

__all__ = ["app", "main"]

MODEL_HELP = (
    "A preset (sd15, sd21, sdxl, svd, kandinsky22, deepfloyd-if, ddpm-cifar10), a folder with a diffusers config.json, "
    "or package.module:factory, a function that returns (model, args, kwargs)."
)
EPILOG = """Examples:

clockwork-hooks flops sd15 --guidance

clockwork-hooks flops sd15 --cut paper --no-attention --guidance   (the paper's own numbers)

clockwork-hooks flops path/to/unet --size 96 --steps 20 --clock 4 --format md

clockwork-hooks regions sdxl

clockwork-hooks regions my_package.unet:build --level 2 --format json
"""

DEMO_EPILOG = """Examples:

clockwork-hooks demo

clockwork-hooks demo --steps 20 --clock 4 --out my-folder

clockwork-hooks demo --prompt "a large pink star left of a small white ring on a black background" --seed 7
"""


class Format(str, Enum):
    """How a report is printed."""

    table = "table"
    md = "md"
    json = "json"


class Cut(str, Enum):
    """Where the region's edge lies."""

    outer = "outer"
    paper = "paper"


Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Size = Annotated[
    str | None,
    typer.Option(
        help="Spatial shape of the sample (of the latent): 64, or 72x128.", metavar="H[xW]", show_default="native"
    ),
]
Batch = Annotated[int, typer.Option(help="Samples in the traced call.", min=1)]
Frames = Annotated[int, typer.Option(help="Frames of a video sample; 0 is the model's own number.", min=0)]
Device = Annotated[str, typer.Option(help="Where the model is built; meta needs no memory and runs nothing.")]
Level = Annotated[int, typer.Option(help="The region below this level; 1 is the highest resolution.", min=1)]
CutOption = Annotated[
    Cut,
    typer.Option(help="outer skips the region's downsampler and upsampler too; paper runs both, as in the paper."),
]
Output = Annotated[Format, typer.Option("--format", help="How to print.")]

app = typer.Typer(
    name="clockwork-hooks",
    help="Clockwork Diffusion on any diffusion UNet: what passes cost, and what an adaptor pass can skip.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
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


@app.command(epilog=EPILOG)
def flops(
    model: Model,
    clock: Annotated[int, typer.Option(help="One full pass every so many steps.", min=1)] = 2,
    steps: Annotated[int, typer.Option(help="Denoising steps of a trajectory.", min=1)] = 8,
    guidance: Annotated[bool, typer.Option("--guidance", help="Classifier-free guidance: twice the batch.")] = False,
    attention: Annotated[
        bool, typer.Option("--attention/--no-attention", help="Count attention products; the paper leaves them out.")
    ] = True,
    norms: Annotated[bool, typer.Option("--norms", help="Add fvcore's estimate for normalisations.")] = False,
    cut: CutOption = Cut.outer,
    level: Level = 1,
    depth: Annotated[int, typer.Option(help="Names of a module path that the table by module keeps.", min=1)] = 2,
    size: Size = None,
    batch: Batch = 1,
    frames: Frames = 0,
    device: Device = "meta",
    output: Output = Format.table,
) -> None:
    """Count a full pass, an adaptor pass and a trajectory: by level, operator and module."""
    from clockwork_hooks.flops import flops_report

    loaded = _load(model, size, batch, frames, device)
    report = flops_report(
        loaded.unet,
        *loaded.args,
        clock=clock,
        steps=steps,
        guidance=guidance,
        level=level,
        cut=cut.value,
        attention=attention,
        norms="fvcore" if norms else None,
        **loaded.kwargs,
    )
    if output is Format.json:
        typer.echo(report.to_json(depth=depth))
    elif output is Format.md:
        typer.echo(report.to_markdown(depth=depth))
    else:
        _print(*report.tables(depth=depth))


@app.command(epilog=EPILOG)
def regions(
    model: Model,
    level: Annotated[
        int | None, typer.Option(help="Show the region below this level in full; 1 is the highest.", min=1)
    ] = None,
    cut: CutOption = Cut.outer,
    size: Size = None,
    batch: Batch = 1,
    frames: Frames = 0,
    device: Device = "meta",
    output: Output = Format.table,
) -> None:
    """List every region that adaptor passes can skip, widest first, and draw the chosen one."""
    import json

    from clockwork_hooks.graph import record
    from clockwork_hooks.regions import choose, regions_of

    loaded = _load(model, size, batch, frames, device)
    trace = record(loaded.unet, loaded.args, loaded.kwargs)
    found = regions_of(trace, loaded.unet)
    chosen = choose(trace, loaded.unet, level=level or 1, cut=cut.value)
    if output is Format.json:
        data = {"regions": [_region_data(region) for region in found], "chosen": _region_data(chosen)}
        typer.echo(json.dumps(data, indent=2, ensure_ascii=False))
    elif output is Format.md:
        typer.echo(f"{_regions_table(found).to_markdown()}\n\n```\n{chosen}\n\n{chosen.draw()}\n```")
    else:
        _print(_regions_table(found))
        typer.echo(f"{chosen}\n\n{chosen.draw()}")


@app.command(epilog=DEMO_EPILOG)
def demo(
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help='A scene, e.g. "a small yellow star above a large cyan ring on a dark blue background"; repeatable. '
            "None for the 16 that ship with the demo.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="DPM++ denoising steps.", min=1)] = 8,
    clock: Annotated[int, typer.Option(help="One full pass every so many steps.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Of the initial noise.")] = 0,
    out: Annotated[str, typer.Option(help="Folder for grid.png, report.md and report.json.")] = "clockwork-demo",
) -> None:
    """Draw the same scenes with the plain UNet and with Clockwork: MACs, time, likeness, and a picture."""
    from clockwork_hooks.demo.run import demo as run

    result = run(prompt or (), steps=steps, clock=clock, seed=seed, out=out)
    _print(result.table())
    for name in ("grid.png", "report.md", "report.json"):
        typer.echo(result.folder / name)


def _regions_table(found: Iterable[Region]) -> Table:
    from clockwork_hooks.report import macs, percent, shape, table

    listed = list(found)
    rows = [
        (
            k,
            region.level,
            shape(region.resolution),
            shape(region.bottleneck),
            macs(region.macs),
            percent(region.macs_share),
            percent(region.parameter_share),
        )
        for k, region in enumerate(listed)
    ]
    columns = (">region", ">level", ">edge", ">bottleneck", ">skipped", ">of MACs", ">of parameters")
    notes = (
        "Widest first, each contains the next; the last of a level is the region below it. "
        "MACs of convolutions and matrix products, attention products counted, at the traced batch.",
        *(f"{k}: {region.entry.path} → {region.exit.path}" for k, region in enumerate(listed)),
    )
    return table("Regions that adaptor passes can skip", columns, rows, notes=notes)


def _region_data(region: Region) -> dict[str, Any]:
    def edge(boundary: Any) -> dict[str, Any]:
        return {"path": boundary.path, "call": boundary.call, "shape": list(boundary.shape)}

    names = "model level cut macs macs_share parameters parameter_share fingerprint"
    return {
        **{name: getattr(region, name) for name in names.split()},
        "resolution": list(region.resolution),
        "bottleneck": list(region.bottleneck),
        "entry": edge(region.entry),
        "exit": edge(region.exit),
        "skipped": [{"path": call.path, "ordinal": call.ordinal} for call in region.skipped],
    }


def _load(model: str, size: str | None, batch: int, frames: int, device: str) -> LoadedModel:
    from clockwork_hooks.models import load_model

    return load_model(model, size=_size(size), batch=batch, frames=frames, device=device)


def _size(text: str | None) -> tuple[int, ...] | None:
    """The spatial shape that the text names: 64 → (64, 64), 72x128 → (72, 128)."""
    from clockwork_hooks.errors import ArgumentError

    if text is None:
        return None
    parts = text.lower().replace("×", "x").split("x")
    if not all(part.isdigit() and int(part) for part in parts):
        raise ArgumentError(
            "a size is one edge, or the spatial shape joined by x", seen={"size": text}, do="pass --size 64 or 72x128"
        )
    sizes = tuple(int(part) for part in parts)
    return sizes * 2 if len(sizes) == 1 else sizes


def _print(*parts: Any) -> None:
    from rich.console import Console

    console = Console()
    for part in parts:
        console.print(part)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the console entry point.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        0, or 2 after an error, which is one readable block on stderr; with `--debug` the error is raised.

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
        text = str(error)
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
