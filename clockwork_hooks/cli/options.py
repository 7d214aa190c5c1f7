"""The options that mean the same in every command, and how a model is named."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from clockwork_hooks.models import LoadedModel

__all__ = [
    "Batch",
    "Cut",
    "CutOption",
    "Device",
    "Entry",
    "Exit",
    "Format",
    "Frames",
    "Html",
    "Level",
    "Model",
    "Modules",
    "Output",
    "Resolution",
    "Share",
    "Size",
    "choice",
    "load",
    "show",
]

MODEL_HELP = (
    "A preset (sd15, sd21, sdxl, svd, kandinsky22, deepfloyd-if, ddpm-cifar10), a folder with a diffusers config.json, "
    "or package.module:factory, a function that returns (model, args, kwargs)."
)


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
Level = Annotated[
    int | None,
    typer.Option(help="The region below this level; 1 is the highest resolution.", min=1, show_default="1"),
]
Resolution = Annotated[
    str | None, typer.Option(help="The region with this edge: 32, or 24x40.", metavar="H[xW]", show_default=False)
]
Share = Annotated[
    float | None,
    typer.Option(help="The narrowest region that skips this share of the MACs; 0.9 is nearly all.", show_default=False),
]
Modules = Annotated[
    list[str] | None,
    typer.Option("--module", help="A module to skip, or a range blocks.4:blocks.20; repeatable.", show_default=False),
]
Entry = Annotated[
    str | None, typer.Option(help="The region from this module's output on; with --exit.", show_default=False)
]
Exit = Annotated[str | None, typer.Option(help="The region up to this module's output.", show_default=False)]
CutOption = Annotated[
    Cut,
    typer.Option(help="outer skips the region's downsampler and upsampler too; paper runs both, as in the paper."),
]
Html = Annotated[
    Path | None,
    typer.Option(help="Also write the report as one HTML page, with a picture of the UNet.", show_default=False),
]
Output = Annotated[Format, typer.Option("--format", help="How to print.")]


def load(model: str, size: str | None, batch: int, frames: int, device: str) -> LoadedModel:
    """The model that the command line names, with the arguments of one call."""
    from clockwork_hooks.models import load_model

    return load_model(model, size=_size(size), batch=batch, frames=frames, device=device)


def _size(text: str | None, option: str = "size") -> tuple[int, ...] | None:
    """The spatial shape that the text names: 64 → (64, 64), 72x128 → (72, 128)."""
    from clockwork_hooks.errors import ArgumentError

    if text is None:
        return None
    parts = text.lower().replace("×", "x").split("x")
    if not all(part.isdigit() and int(part) for part in parts):
        raise ArgumentError(
            f"a {option} is one edge, or the spatial shape joined by x",
            seen={option: text},
            do=f"pass --{option} 64 or 72x128",
        )
    sizes = tuple(int(part) for part in parts)
    return sizes * 2 if len(sizes) == 1 else sizes


def choice(
    level: int | None,
    resolution: str | None,
    share: float | None,
    modules: list[str] | None,
    entry: str | None,
    exit: str | None,
    cut: Cut,
) -> dict[str, Any]:
    """The options of `find_region` that the command line gives."""
    sizes = _size(resolution, "resolution")
    edge = sizes[0] if sizes and resolution and resolution.isdigit() else sizes
    return {
        "level": level,
        "resolution": edge,
        "share": share,
        "modules": modules or None,
        "entry": entry,
        "exit": exit,
        "cut": cut.value,
    }


def show(*parts: Any) -> None:
    """Print tables and text to the terminal."""
    from rich.console import Console

    console = Console()
    for part in parts:
        console.print(part)
