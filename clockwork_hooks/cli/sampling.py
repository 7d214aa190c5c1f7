"""A UNet with its sampler from a name on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

__all__ = ["DemoBatch", "DemoSteps", "Sampled", "Sampler", "Seeds", "load_sampler"]

SAMPLED_HELP = (
    "demo, the model that ships; or package.module:factory, a function that returns (unet, generate, conditions): "
    "generate(batch, seed) samples with that UNet and returns one tensor, conditions is a list of batches."
)
Sampled = Annotated[str, typer.Argument(metavar="[MODEL]", help=SAMPLED_HELP)]
DemoSteps = Annotated[int, typer.Option(help="Denoising steps of the demo's sampler; a factory has its own.", min=1)]
DemoBatch = Annotated[int, typer.Option(help="Samples of a batch: so many of the demo's prompts.", min=1, max=16)]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="Of the noise; repeatable.", show_default="0")]


class Sampler(NamedTuple):
    """What the analyses take."""

    unet: nn.Module
    generate: Any
    conditions: list[Any]


def load_sampler(model: str, steps: int, batch: int) -> Sampler:
    """The UNet, sampler and batches that the command line names.

    Args:
        model: demo, or package.module:factory.
        steps, batch: of the demo; a factory has its own.

    Raises:
        ModelNotFoundError: the name means no sampler.
    """
    from clockwork_hooks.errors import ModelNotFoundError

    if model == "demo":
        from clockwork_hooks.demo import DEMO_PROMPTS, load_demo

        demo = load_demo()

        def generate(prompts: Sequence[str], seed: int) -> Tensor:
            return demo.sample(prompts, steps=steps, seed=seed)

        return Sampler(demo.unet, generate, [list(DEMO_PROMPTS[:batch])])
    module, colon, factory = model.partition(":")
    if not colon or Path(model).exists():
        raise ModelNotFoundError(
            "a model that is sampled from is demo, or package.module:factory: a preset or a folder has no sampler",
            seen={"model": model},
            do="write a function that returns (unet, generate, conditions), and name it",
        )
    from clockwork_hooks.models import find_factory

    parts = find_factory(module or "?", factory)()
    if not isinstance(parts, tuple) or len(parts) != 3 or not callable(parts[1]):
        kinds = [type(part).__name__ for part in (parts if isinstance(parts, tuple) else [parts])]
        one_call = isinstance(parts, tuple) and len(parts) > 1 and isinstance(parts[1], (tuple, list))
        raise ModelNotFoundError(
            "a factory of a sampler returns (unet, generate, conditions)",
            seen={"factory": model, "returned": ", ".join(kinds)},
            do="name another one: what this one returns, (model, args, kwargs), is for flops, regions and bench"
            if one_call
            else "return the UNet, generate(batch, seed) and a list of batches",
        )
    return Sampler(parts[0], parts[1], list(parts[2]))
