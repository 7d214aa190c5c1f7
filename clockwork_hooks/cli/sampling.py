"""A UNet with its sampler from a name on the command line, and the folder that results go to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

__all__ = [
    "Adaptors",
    "Clocks",
    "Out",
    "Prompts",
    "Sampled",
    "Sampler",
    "Seeds",
    "Steps",
    "draw",
    "load_sampler",
    "shared",
    "write",
]

SAMPLED_HELP = (
    "demo, the model that ships; or package.module:factory, a function that returns (unet, generate, conditions): "
    "generate(batch, seed) samples with that UNet and returns one tensor, conditions is a list of batches."
)
Sampled = Annotated[str, typer.Argument(metavar="[MODEL]", help=SAMPLED_HELP)]
Steps = Annotated[int, typer.Option(help="DPM++ steps of the demo's sampler.", min=1)]
Prompts = Annotated[int, typer.Option(help="How many of the demo's 16 prompts.", min=1, max=16)]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="Of the noise; repeatable.", show_default="0")]
Clocks = Annotated[
    list[int] | None, typer.Option("--clock", help="A clock to measure; repeatable.", min=2, show_default="2, 3 and 4")
]
Adaptors = Annotated[
    list[str] | None,
    typer.Option(
        "--adaptor",
        help="identity, or the folder of a saved adaptor; repeatable, to compare several.",
        show_default="identity",
    ),
]
Out = Annotated[str, typer.Option(help="Folder for the JSON, the Markdown and the PNGs.")]


class Sampler(NamedTuple):
    """What the analyses take."""

    unet: nn.Module
    generate: Any
    conditions: list[Any]


def load_sampler(model: str, steps: int, prompts: int) -> Sampler:
    """The UNet, sampler and batches that the command line names.

    Raises:
        ModelNotFoundError: the name means no sampler.
    """
    from clockwork_hooks.errors import ModelNotFoundError

    if model == "demo":
        from clockwork_hooks.demo import DEMO_PROMPTS, load_demo

        demo = load_demo()

        def generate(batch: Sequence[str], seed: int) -> Tensor:
            return demo.sample(batch, steps=steps, seed=seed)

        return Sampler(demo.unet, generate, [list(DEMO_PROMPTS[:prompts])])
    module, colon, factory = model.partition(":")
    if not colon or Path(model).exists():
        raise ModelNotFoundError(
            "a model that is sampled from is demo, or package.module:factory: a preset or a folder has no sampler",
            seen={"model": model},
            do="write a function that returns (unet, generate, conditions), and name it",
        )
    from clockwork_hooks.models import find_factory

    made = find_factory(module or "?", factory)()
    if not isinstance(made, tuple) or len(made) != 3 or not callable(made[1]):
        raise ModelNotFoundError(
            "a factory of a sampler returns (unet, generate, conditions)",
            seen={"factory": model, "returned": type(made).__name__},
            do="return the UNet, generate(batch, seed) and a list of batches",
        )
    return Sampler(made[0], made[1], list(made[2]))


def shared(adaptor: Adaptors, clock: Clocks, seed: Seeds) -> dict[str, Any]:
    """The options that `drift` and `plan` share, as the library takes them."""
    return {"adaptor": adaptor or None, "clocks": tuple(clock or (2, 3, 4)), "seeds": tuple(seed or (0,))}


def write(out: str, name: str, result: Any) -> Path:
    """Make the folder, and write the result there as NAME.json and NAME.md; prints the table and the files' paths.

    Raises:
        ArgumentError: the folder cannot be written.
    """
    from clockwork_hooks.cli.options import show
    from clockwork_hooks.errors import ArgumentError

    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(result.to_json() + "\n", encoding="utf-8")
        (folder / f"{name}.md").write_text(result.to_markdown() + "\n", encoding="utf-8")
    except OSError as error:
        raise ArgumentError(
            "results go to a folder that can be written", seen={"out": out, "error": error}, do="pass another --out"
        ) from error
    show(result.table())
    for suffix in ("json", "md"):
        typer.echo(folder / f"{name}.{suffix}")
    return folder


def draw(plot: Any, path: Path) -> None:
    """Draw a picture and print its path."""
    plot(path)
    typer.echo(path)
