"""The options that mean the same in every command, each declared once; what they stand for; how a report is delivered.

docs/reports.md tables which command has which. Standard output holds the report alone; files are named on standard
error.
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from clockwork_hooks.errors import ArgumentError, ModelNotFoundError, RegionNotFoundError, first_line
from clockwork_hooks.reports.report import PICTURES, TEXTS, Report

MODEL_HELP = (
    "A preset (sd15, sd21, sdxl, svd, kandinsky22, deepfloyd-if, ddpm-cifar10), a folder with a diffusers config.json, "
    "or package.module:factory, a function that returns (model, args, kwargs)."
)
OUT_HELP = (
    "Write the report too: a file whose ending tells its form (.html, .json, .md, .svg, .png), or a folder for all of "
    "them; repeatable."
)
ENDINGS = (*TEXTS, *PICTURES)


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
Steps = Annotated[int, typer.Option(help="Denoising steps of a trajectory.", min=1)]
Clock = Annotated[int, typer.Option(help="One full pass every so many steps.", min=1)]
Clocks = Annotated[
    list[int] | None,
    typer.Option("--clock", help="One full pass every so many steps; repeatable.", min=2, show_default="2, 3 and 4"),
]
Adaptors = Annotated[
    list[str] | None,
    typer.Option(
        "--adaptor",
        help="identity (the cached exit as it is), or the folder of a saved adaptor; repeatable, to compare several.",
        show_default="identity",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of all that is random.")]
Guidance = Annotated[
    bool, typer.Option("--guidance", help="Classifier-free guidance: a call has two samples for each one of the batch.")
]


def _option(panel: str, *names: str, **more: Any) -> Any:
    """An option in a panel of the help."""
    return typer.Option(*names, rich_help_panel=panel, **more)


# -- the model -----------------------------------------------------------------------------------------------------

Size = Annotated[
    str | None,
    _option(
        "Model",
        help="Spatial shape of the sample (of the latent): 64, or 72x128.",
        metavar="H[xW]",
        show_default="native",
    ),
]
Batch = Annotated[int, _option("Model", help="Samples of one call.", min=1)]
Frames = Annotated[int, _option("Model", help="Frames of a video sample; 0 is the model's own number.", min=0)]
Device = Annotated[
    str | None,
    _option(
        "Model",
        help="Where the model is built: cpu, cuda, cuda:1, mps, or meta, which needs no memory and runs nothing.",
        show_default="meta, or cpu where a factory's model does not run there; bench: a GPU if there is one",
    ),
]
_Result = TypeVar("_Result")


def on_device(device: str | None, model: str, work: Callable[[str], _Result]) -> _Result:
    """What is done with the model on the device.

    Args:
        device: as the option says it; None for meta, or the CPU where a factory's model does not run on meta.
        model: its name.
        work: builds the model on a device, and does what the command does.
    """
    if device is not None:
        check_device(device)
        return work(device)
    try:
        return work("meta")
    except (ArgumentError, ModelNotFoundError, RegionNotFoundError):
        raise
    except Exception as error:
        if ":" not in model:
            raise
        reason = first_line(error)
        typer.echo(f"On the CPU, as {model} does not run on meta: {reason} (--device cpu says so at once)", err=True)
    return work("cpu")


def check_device(device: str) -> None:
    """Raise an ArgumentError unless torch can use the device."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, or torch was built without it
        raise ArgumentError(
            "the device must be one that torch can use here",
            seen={"--device": device, "error": first_line(error)},
            do="pass one that clockwork-hooks doctor lists",
        ) from error


def spatial(text: str | None, option: str = "size") -> tuple[int, ...] | None:
    """The spatial shape that the text names: 64 → (64, 64), 72x128 → (72, 128)."""
    if text is None:
        return None
    parts = text.lower().replace("×", "x").split("x")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ArgumentError(
            f"a {option} is one edge, or the spatial shape joined by x",
            seen={option: text},
            do=f"pass --{option} 64 or 72x128",
        )
    sizes = tuple(int(part) for part in parts)
    return sizes * 2 if len(sizes) == 1 else sizes


# -- the region, as in `find_region` -------------------------------------------------------------------------------

Level = Annotated[
    int | None,
    _option("Region", help="The region below this level; 1 is the highest resolution.", min=1, show_default="1"),
]
Resolution = Annotated[
    str | None,
    _option("Region", help="The region with this edge: 32, or 24x40.", metavar="H[xW]", show_default=False),
]
Share = Annotated[
    float | None,
    _option(
        "Region",
        help="The narrowest region that skips this share of the MACs; 0.9 is nearly all.",
        show_default=False,
    ),
]
Modules = Annotated[
    list[str] | None,
    _option(
        "Region",
        "--module",
        help="A module to skip, or a range blocks.4:blocks.20; repeatable.",
        show_default=False,
    ),
]
Entry = Annotated[
    str | None, _option("Region", help="The region from this module's output on; with --exit.", show_default=False)
]
Exit = Annotated[str | None, _option("Region", help="The region up to this module's output.", show_default=False)]
CutOption = Annotated[
    Cut,
    _option(
        "Region",
        help="outer skips the region's downsampler and upsampler too; paper runs both, as in the paper.",
    ),
]


def region_choice(*, resolution: str | None, modules: list[str] | None, cut: Cut, **same: Any) -> dict[str, Any]:
    """The options of the region as the keywords of `find_region`."""
    sizes = spatial(resolution, "resolution")
    edge = sizes[0] if sizes and resolution and resolution.isdecimal() else sizes
    return {**same, "resolution": edge, "modules": modules or None, "cut": cut.value}


# -- the report; standard output holds the report alone ------------------------------------------------------------


def check_out(context: typer.Context, out: Any) -> Any:
    """Say of a path that cannot be written, or has a wrong ending, before anything is measured."""
    paths = [Path(path) for path in ([out] if isinstance(out, str) else out or [f"clockwork-{context.info_name}"])]
    wrong = [path for path in paths if path.suffix not in ("", *ENDINGS) and not path.is_dir()]
    if wrong and not isinstance(out, str):
        raise ArgumentError(
            "--out is a folder, or a file whose ending tells the report's form",
            seen={"--out": ", ".join(map(str, wrong)), "endings": " ".join(ENDINGS)},
            do="end the name with one of these, or with none",
        )
    for path in map(Path.absolute, paths):
        there = next(place for place in (path, *path.parents) if place.exists())
        a_file = there.is_file()
        folder = isinstance(out, str) or there != path or path.suffix not in ENDINGS  # is it to be one?
        if not _writable(there) or (a_file and folder):
            raise ArgumentError(
                "a report needs a folder that can be written to",
                seen={"--out": path, "in the way" if a_file else "not writable": there},
                do="pass --out with another folder",
            )
    return out


def _writable(place: Path) -> bool:
    """Can the file be written, or a file in the folder be made? It is tried: permissions do not tell all."""
    if place.is_file():
        return os.access(place, os.W_OK)
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError:
        return False
    return True


FormatOption = Annotated[Format, _option("Output", help="How to print the report.")]
Out = Annotated[
    list[str] | None,
    _option("Output", "--out", "--html", help=OUT_HELP, metavar="PATH", show_default=False, callback=check_out),
]
OutFolder = Annotated[
    list[str] | None,
    _option("Output", help=OUT_HELP, metavar="PATH", show_default="the folder clockwork-COMMAND", callback=check_out),
]

# -- errors of the library, in the command line's words ------------------------------------------------------------

OPTIONS = {"clocks": "--clock", "maps": "--map", "modules": "--module", "folder": "--out"}  # the others have one name


def as_option(name: str, value: object) -> str:
    """How an argument of the library is written as an option.

    Example:
        >>> (
        ...     as_option("max_error", 0.3),
        ...     as_option("clocks", (2, 4)),
        ...     as_option("modules", ...),
        ...     as_option("resume", True),
        ... )
        ('--max-error 0.3', '--clock 2 --clock 4', '--module NAME', '--resume')
    """
    option = OPTIONS.get(name, f"--{name.replace('_', '-')}")
    if value is None or value is True:
        return option
    values = ["NAME"] if value is ... else value if isinstance(value, (list, tuple)) else [value]
    return " ".join(f"{option} {shlex.quote(str(one))}" for one in values)


def as_setting(name: str, value: object) -> str:
    """The same for `distill`, where all but three are options of the configuration.

    Example:
        >>> as_setting("clock", (2, 4)), as_setting("mode", "unrolled"), as_setting("resume", True)
        ("--set 'clock=[2, 4]'", '--set mode=unrolled', '--resume')
    """
    if name in ("folder", "resume", "buffer_gb"):
        return as_option(name, value)
    text = "VALUE" if value in (None, ...) else value if isinstance(value, str) else json.dumps(value)
    return f"--set {shlex.quote(f'{name}={text}')}"


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


def is_folder(path: Path) -> bool:
    """Is what --out names a folder for all forms of the report, or one file?"""
    return not path.suffix or path.is_dir()


def _write(report: Report, path: Path, name: str) -> list[Path]:
    if not is_folder(path):
        return [report.save(path)]
    drawn = report.figures()
    written = [report.save(path / f"{name}.{form}") for form in ("json", "md", "html")]
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
