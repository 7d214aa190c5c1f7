"""`clockwork-hooks bench`: what wrapping brings for a model on this machine."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from clockwork_hooks.cli import options
from clockwork_hooks.cli.app import MEASURE, app, epilog
from clockwork_hooks.cli.delivery import deliver

__all__ = ["bench"]

EXAMPLES = (
    "bench sd15 --guidance   (on a GPU in half precision; on a CPU a tenth of its width, with a note)",
    "bench my_package.unet:build --clock 2 --clock 4 --rounds 9 --out bench.html",
    "bench sd15 --mode eager --mode cudagraphs --format md",
    "bench path/to/unet --adaptor my-adaptor --out my-folder",
)


class Mode(str, Enum):
    """How passes run."""

    eager = "eager"
    compile = "compile"
    cudagraphs = "cudagraphs"


class Dtype(str, Enum):
    """Of weights and inputs."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@app.command(epilog=epilog(*EXAMPLES), rich_help_panel=MEASURE)
def bench(
    model: options.Model,
    size: options.Size = None,
    batch: options.Batch = 1,
    frames: options.Frames = 0,
    device: options.Device = None,
    level: options.Level = None,
    resolution: options.Resolution = None,
    share: options.Share = None,
    module: options.Modules = None,
    entry: options.Entry = None,
    exit: options.Exit = None,
    cut: options.CutOption = options.Cut.outer,
    format: options.FormatOption = options.Format.table,
    out: options.Out = None,
    clock: options.Clocks = None,
    adaptor: Annotated[str, typer.Option(help="identity, or the folder of a saved adaptor.")] = "identity",
    mode: Annotated[
        list[Mode] | None,
        typer.Option(
            help="eager; compile, under torch.compile; cudagraphs, captured. Repeatable; plain runs likewise.",
            show_default="eager",
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of weights and inputs.", show_default="float16 on a GPU, else float32")
    ] = None,
    tiny: Annotated[
        bool | None,
        typer.Option("--tiny/--full", help="A preset at a tenth of its width.", show_default="tiny on a CPU"),
    ] = None,
    steps: options.Steps = 12,
    rounds: Annotated[int, typer.Option(help="Timed trajectories of each side.", min=1)] = 5,
    guidance: options.Guidance = False,
    seed: options.Seed = 0,
) -> None:
    """Time a step on this machine, plain and at each clock, and hold the gain against what the MACs promise."""
    import torch

    from clockwork_hooks.analysis.benchmark import bench as measure
    from clockwork_hooks.errors import ArgumentError
    from clockwork_hooks.models import PRESETS, load_model
    from clockwork_hooks.regions.find import find_region

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if place == "meta":
        raise ArgumentError(
            "time passes where something runs", seen={"--device": place}, do="pass --device cpu or cuda"
        )
    options.check_device(place)
    cpu = place.startswith("cpu")
    small = model in PRESETS and (cpu if tiny is None else tiny)
    number = torch.float32 if dtype is None and cpu else getattr(torch, (dtype or Dtype.float16).value)
    choice = options.region_choice(
        level=level, resolution=resolution, share=share, modules=module, entry=entry, exit=exit, cut=cut
    )
    torch.manual_seed(seed)
    loaded = load_model(
        model,
        size=options.spatial(size),
        batch=batch * (2 if guidance else 1),
        frames=frames,
        device=place,
        dtype=number,
        tiny=small,
    )
    notes = []
    if model in PRESETS:
        notes.append("A preset has random weights: times and MACs are the architecture's, pictures would be noise.")
    if small:
        notes.append(
            f"{model} at a tenth of its width: what a CPU times in seconds. It shows that all works, not what the "
            "real model gains; --full builds that."
        )
    with torch.no_grad():
        region = find_region(loaded.unet, *loaded.args, **choice, **loaded.kwargs)
    result = measure(
        loaded.unet,
        *loaded.args,
        clocks=tuple(clock or (2, 3, 4)),
        adaptor=adaptor,
        region=region,
        steps=steps,
        rounds=rounds,
        modes=tuple(one.value for one in mode or (Mode.eager,)),
        notes=notes,
        **loaded.kwargs,
    )
    deliver(result, format, "bench", out or ())
