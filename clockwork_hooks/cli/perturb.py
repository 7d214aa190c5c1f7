"""`clockwork-hooks perturb`: how well a sampler recovers from disturbed feature maps."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from clockwork_hooks.cli.app import MEASURE, app, epilog
from clockwork_hooks.cli.delivery import deliver
from clockwork_hooks.cli.options import OutputFolder, spread
from clockwork_hooks.cli.sampling import Sampled, Sampling, load_sampler

__all__ = ["perturb"]

EXAMPLES = (
    "perturb   (the demo model; some minutes on a CPU)",
    'perturb --map "up 16×16" --map "up 32×32" --start 1 --start 5 --batch 2',
    "perturb my_package.sampler:build --alpha 0.7 --out my-folder",
)


class Statistics(str, Enum):
    """Whose mean and deviation the noise has."""

    channel = "channel"
    map = "map"


@app.command(epilog=epilog(*EXAMPLES), rich_help_panel=MEASURE)
@spread
def perturb(
    sampling: Sampling,
    output: OutputFolder,
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
) -> None:
    """Disturb each feature map from each step on, and measure how far the result moves (the paper's Sec. 3)."""
    from clockwork_hooks.analysis.robustness import measure_robustness

    loaded = load_sampler(model, sampling)
    options = {"alpha": alpha, "maps": map or None, "starts": start or None, "seeds": sampling.seeds}
    result = measure_robustness(*loaded, statistics=statistics.value, **options)  # type: ignore[arg-type]
    deliver(result, output, "perturb")
