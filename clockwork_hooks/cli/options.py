"""The options that mean the same in every command: declared once, in groups that commands take as one argument.

    @app.command()
    @spread
    def flops(model: Model, load: Loading, region: Choosing, output: Output) -> None: ...

docs/reports.md tables which command has which.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from clockwork_hooks.reports.report import PICTURES, TEXTS

if TYPE_CHECKING:
    from clockwork_hooks.models import LoadedModel

__all__ = [
    "Adaptors",
    "Choosing",
    "Clocks",
    "Cut",
    "Format",
    "FormatOption",
    "Guidance",
    "Loading",
    "Model",
    "Output",
    "OutputFolder",
    "Seed",
    "Steps",
    "spread",
]

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
Clocks = Annotated[
    list[int] | None,
    typer.Option("--clock", help="One full pass every so many steps; repeatable.", min=2, show_default="2, 3 and 4"),
]
Adaptors = Annotated[
    list[str] | None,
    typer.Option(
        "--adaptor",
        help="identity, or the folder of a saved adaptor; repeatable, to compare several.",
        show_default="identity",
    ),
]
Seed = Annotated[int, typer.Option(help="Of all that is random.")]
Guidance = Annotated[
    bool, typer.Option("--guidance", help="Classifier-free guidance: two samples for each one of the batch.")
]


def option(*names: str, panel: str, **more: Any) -> Any:
    """An option in a panel of the help."""
    return typer.Option(*names, rich_help_panel=panel, **more)


FormatOption = Annotated[Format, option("--format", panel="Output", help="How to print the report.")]


@dataclass(frozen=True)
class Loading:
    """Options of the model's inputs and place."""

    size: Annotated[
        str | None,
        option(
            panel="Model",
            help="Spatial shape of the sample (of the latent): 64, or 72x128.",
            metavar="H[xW]",
            show_default="native",
        ),
    ] = None
    batch: Annotated[int, option(panel="Model", help="Samples of one call.", min=1)] = 1
    frames: Annotated[
        int, option(panel="Model", help="Frames of a video sample; 0 is the model's own number.", min=0)
    ] = 0
    device: Annotated[
        str | None,
        option(
            panel="Model",
            help="Where the model is built: cpu, cuda, cuda:1, mps, or meta, which needs no memory and runs nothing.",
            show_default="meta; bench: a GPU if there is one",
        ),
    ] = None

    def model(self, name: str, **more: Any) -> LoadedModel:
        """The model that the command line names, with the arguments of one call."""
        from clockwork_hooks.models import load_model

        _check_device(self.device)
        given = {"batch": self.batch, "frames": self.frames, "device": self.device or "meta", **more}
        return load_model(name, size=_size(self.size), **given)


@dataclass(frozen=True)
class Choosing:
    """Options of the region, as in `find_region`."""

    level: Annotated[
        int | None,
        option(
            panel="Region", help="The region below this level; 1 is the highest resolution.", min=1, show_default="1"
        ),
    ] = None
    resolution: Annotated[
        str | None,
        option(panel="Region", help="The region with this edge: 32, or 24x40.", metavar="H[xW]", show_default=False),
    ] = None
    share: Annotated[
        float | None,
        option(
            panel="Region",
            help="The narrowest region that skips this share of the MACs; 0.9 is nearly all.",
            show_default=False,
        ),
    ] = None
    module: Annotated[
        list[str] | None,
        option(panel="Region", help="A module to skip, or a range blocks.4:blocks.20; repeatable.", show_default=False),
    ] = None
    entry: Annotated[
        str | None,
        option(panel="Region", help="The region from this module's output on; with --exit.", show_default=False),
    ] = None
    exit: Annotated[
        str | None, option(panel="Region", help="The region up to this module's output.", show_default=False)
    ] = None
    cut: Annotated[
        Cut,
        option(
            panel="Region",
            help="outer skips the region's downsampler and upsampler too; paper runs both, as in the paper.",
        ),
    ] = Cut.outer

    def options(self) -> dict[str, Any]:
        """Those of `find_region`."""
        sizes = _size(self.resolution, "resolution")
        edge = sizes[0] if sizes and self.resolution and self.resolution.isdigit() else sizes
        given = {name: getattr(self, name) for name in ("level", "share", "entry", "exit")}
        return {**given, "resolution": edge, "modules": self.module or None, "cut": self.cut.value}


@dataclass(frozen=True)
class Output:
    """Options of the report; standard output holds the report alone."""

    format: FormatOption = Format.table
    out: Annotated[
        list[str] | None, option("--out", "--html", panel="Output", help=OUT_HELP, metavar="PATH", show_default=False)
    ] = None

    def __post_init__(self) -> None:
        """Tell of a wrong ending before anything is measured."""
        from clockwork_hooks.errors import ArgumentError

        wrong = [path for path in self.out or () if Path(path).suffix not in ("", *ENDINGS) and not Path(path).is_dir()]
        if wrong:
            raise ArgumentError(
                "--out is a folder, or a file whose ending tells the report's form",
                seen={"--out": ", ".join(wrong), "endings": " ".join(ENDINGS)},
                do="end the name with one of these, or with none",
            )


@dataclass(frozen=True)
class OutputFolder(Output):
    """The same for commands that always write their files."""

    out: Annotated[
        list[str] | None,
        option(panel="Output", help=OUT_HELP, metavar="PATH", show_default="the folder clockwork-COMMAND"),
    ] = None


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command with each group of options in the place of the one argument that takes it."""
    own = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: one.annotation for name, one in own.parameters.items() if dataclasses.is_dataclass(one.annotation)
    }
    spread_out: list[inspect.Parameter] = []
    for name, one in own.parameters.items():
        if name not in groups:
            spread_out.append(one.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        hints = get_type_hints(groups[name], include_extras=True)
        spread_out += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
            for f in dataclasses.fields(groups[name])
        ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        made = {
            name: group(**{f.name: given.pop(f.name) for f in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        command(**made, **given)

    del run.__wrapped__  # typer would look through it
    run.__signature__ = own.replace(parameters=spread_out)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in spread_out}
    return run


def _check_device(device: str | None) -> None:
    import torch

    from clockwork_hooks.errors import ArgumentError

    try:
        torch.empty(0, device=device or "cpu")
    except (RuntimeError, AssertionError) as error:  # no such device, or torch was built without it
        raise ArgumentError(
            "a device is one that torch can use here",
            seen={"--device": device, "error": str(error).splitlines()[0]},
            do="pass one that clockwork-hooks doctor lists",
        ) from error


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
