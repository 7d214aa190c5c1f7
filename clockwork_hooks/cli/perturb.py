"""`clockwork-hooks perturb`: how well a sampler recovers from disturbed feature maps."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from clockwork_hooks.cli.app import EXIT_CODES, app
from clockwork_hooks.cli.sampling import Out, Prompts, Sampled, Seeds, Steps, draw, load_sampler, write

__all__ = ["perturb"]

EPILOG = f"""Examples:

clockwork-hooks perturb                       (the demo model; some minutes on a CPU)

clockwork-hooks perturb --map "up 16×16" --map "up 32×32" --start 1 --start 5 --prompts 2

clockwork-hooks perturb my_package.sampler:build --alpha 0.7 --out my-folder

{EXIT_CODES}
"""


class Statistics(str, Enum):
    """Whose mean and deviation the noise has."""

    channel = "channel"
    map = "map"


@app.command(epilog=EPILOG)
def perturb(
    model: Sampled = "demo",
    alpha: Annotated[float, typer.Option(help="Share of a map's variance that stays its own, 0 to 1.")] = 0.3,
    statistics: Annotated[
        Statistics, typer.Option(help="The noise has the mean and variance of each channel, or of the whole map.")
    ] = Statistics.channel,
    map: Annotated[
        list[str] | None, typer.Option(help='A map by its name, as "up 16×16"; repeatable.', show_default="all")
    ] = None,
    start: Annotated[
        list[int] | None, typer.Option(help="First disturbed step, from 1; repeatable.", show_default="about ten")
    ] = None,
    steps: Steps = 8,
    prompts: Prompts = 2,
    seed: Seeds = None,
    out: Out = "clockwork-perturb",
) -> None:
    """Disturb each feature map from each step on, and measure how far the result moves (the paper's Sec. 3)."""
    from clockwork_hooks.analysis.robustness import measure_robustness

    loaded = load_sampler(model, steps, prompts)
    options = {"alpha": alpha, "maps": map or None, "starts": start or None, "seeds": tuple(seed or (0,))}
    result = measure_robustness(*loaded, statistics=statistics.value, **options)  # type: ignore[arg-type]
    folder = write(out, "perturb", result)
    draw(result.plot, folder / "curves.png")
    plain = result.pictures["", 0]
    if plain.ndim == 3 and plain.shape[0] in (1, 3):
        draw(result.plot_grid, folder / "grid.png")
