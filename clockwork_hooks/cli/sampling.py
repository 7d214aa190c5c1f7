"""A UNet with its sampler from a name on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

__all__ = ["Sampled", "Sampler", "Sampling", "load_sampler"]

SAMPLED_HELP = (
    "demo, the model that ships; or package.module:factory, a function that returns (unet, generate, conditions): "
    "generate(batch, seed) samples with that UNet and returns one tensor, conditions is a list of batches."
)
Sampled = Annotated[str, typer.Argument(metavar="[MODEL]", help=SAMPLED_HELP)]


@dataclass(frozen=True)
class Sampling:
    """Options of the sampler; steps and batch are the demo's, a factory has its own."""

    steps: Annotated[int, typer.Option(help="Denoising steps of the demo's sampler.", min=1)] = 8
    batch: Annotated[int, typer.Option(help="Samples of a batch: so many of the demo's prompts.", min=1, max=16)] = 2
    seed: Annotated[list[int] | None, typer.Option(help="Of the noise; repeatable.", show_default="0")] = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """All of them."""
        return tuple(self.seed or (0,))

    def shared(self, adaptor: list[str] | None, clock: list[int] | None) -> dict[str, Any]:
        """The options that `drift` and `plan` share, as the library takes them."""
        return {"adaptor": adaptor or None, "clocks": tuple(clock or (2, 3, 4)), "seeds": self.seeds}


class Sampler(NamedTuple):
    """What the analyses take."""

    unet: nn.Module
    generate: Any
    conditions: list[Any]


def load_sampler(model: str, sampling: Sampling) -> Sampler:
    """The UNet, sampler and batches that the command line names.

    Raises:
        ModelNotFoundError: the name means no sampler.
    """
    from clockwork_hooks.errors import ModelNotFoundError

    if model == "demo":
        from clockwork_hooks.demo import DEMO_PROMPTS, load_demo

        demo = load_demo()

        def generate(batch: Sequence[str], seed: int) -> Tensor:
            return demo.sample(batch, steps=sampling.steps, seed=seed)

        return Sampler(demo.unet, generate, [list(DEMO_PROMPTS[: sampling.batch])])
    module, colon, factory = model.partition(":")
    if not colon or Path(model).exists():
        raise ModelNotFoundError(
            "a model that is sampled from is demo, or package.module:factory: a preset or a folder has no sampler",
            seen={"model": model},
            do="write a function that returns (unet, generate, conditions), and name it",
        )
    from clockwork_hooks.models import find_factory

    made = find_factory(module or "?", factory)()
    kinds = [type(part).__name__ for part in (made if isinstance(made, tuple) else [made])]
    if not isinstance(made, tuple) or len(made) != 3 or not callable(made[1]):
        raise ModelNotFoundError(
            "a factory of a sampler returns (unet, generate, conditions)",
            seen={"factory": model, "returned": ", ".join(kinds)},
            do="return the UNet, generate(batch, seed) and a list of batches",
        )
    return Sampler(made[0], made[1], list(made[2]))
