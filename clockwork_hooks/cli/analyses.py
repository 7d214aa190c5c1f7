"""The commands that sample and measure: `drift` of what regions emit, `perturb` feature maps, `plan` the steps."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from clockwork_hooks.cli.app import MEASURE, app, epilog
from clockwork_hooks.cli.delivery import deliver
from clockwork_hooks.cli.options import Adaptors, Clocks, Format, FormatOption, OutFolder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

__all__ = ["drift", "perturb", "plan"]

SAMPLED_HELP = (
    "demo, the model that ships; or package.module:factory, a function that returns (unet, generate, conditions): "
    "generate(batch, seed) samples with that UNet and returns one tensor, conditions is a list of batches."
)
Sampled = Annotated[str, typer.Argument(metavar="[MODEL]", help=SAMPLED_HELP)]
DemoSteps = Annotated[int, typer.Option(help="Denoising steps of the demo's sampler; a factory has its own.", min=1)]
DemoBatch = Annotated[int, typer.Option(help="Samples of a batch: so many of the demo's prompts.", min=1, max=16)]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="Of the noise; repeatable.", show_default="0")]
CLOCKS, SEEDS = (2, 3, 4), (0,)
DRIFT_EXAMPLES = (
    "drift   (the demo model)",
    "drift my_package.sampler:build --clock 2 --clock 4 --out my-folder",
    "drift my_package.sampler:build --adaptor identity --adaptor my-adaptor",
)


@app.command(epilog=epilog(*DRIFT_EXAMPLES), rich_help_panel=MEASURE)
def drift(
    model: Sampled = "demo",
    steps: DemoSteps = 8,
    batch: DemoBatch = 2,
    seed: Seeds = None,
    format: FormatOption = Format.table,
    out: OutFolder = None,
    clock: Clocks = None,
    adaptor: Adaptors = None,
) -> None:
    """Measure how every region's exit changes along the trajectory, and what keeping it does to the result."""
    from clockwork_hooks.analysis.drift import measure_drift

    loaded = load_sampler(model, steps, batch)
    adaptors = tuple(adaptor) if adaptor else None
    result = measure_drift(*loaded, adaptor=adaptors, clocks=tuple(clock or CLOCKS), seeds=tuple(seed or SEEDS))
    deliver(result, format, "drift", out)


PERTURB_EXAMPLES = (
    "perturb   (the demo model; some minutes on a CPU)",
    'perturb --map "up 16×16" --map "up 32×32" --start 1 --start 5 --batch 2',
    "perturb my_package.sampler:build --alpha 0.7 --out my-folder",
)


class Statistics(str, Enum):
    """Whose mean and deviation the noise has."""

    channel = "channel"
    map = "map"


@app.command(epilog=epilog(*PERTURB_EXAMPLES), rich_help_panel=MEASURE)
def perturb(
    model: Sampled = "demo",
    steps: DemoSteps = 8,
    batch: DemoBatch = 2,
    seed: Seeds = None,
    format: FormatOption = Format.table,
    out: OutFolder = None,
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

    loaded = load_sampler(model, steps, batch)
    options = {"alpha": alpha, "maps": map or None, "starts": start or None, "seeds": tuple(seed or SEEDS)}
    result = measure_robustness(*loaded, statistics=statistics.value, **options)  # type: ignore[arg-type]
    deliver(result, format, "perturb", out)


PLAN_EXAMPLES = (
    "plan --min-saving 0.4   (the demo model; some minutes on a CPU)",
    "plan my_package.sampler:build --max-error 0.05 --weigh ms --adaptor identity --adaptor my-adaptor",
)


class Unit(str, Enum):
    """What savings are measured in."""

    macs = "MACs"
    ms = "ms"


@app.command(epilog=epilog(*PLAN_EXAMPLES), rich_help_panel=MEASURE)
def plan(
    model: Sampled = "demo",
    steps: DemoSteps = 8,
    batch: DemoBatch = 2,
    seed: Seeds = None,
    format: FormatOption = Format.table,
    out: OutFolder = None,
    max_error: Annotated[
        float | None, typer.Option(help="Relative L2 error of the result that is allowed, 0 to 1.", show_default=False)
    ] = None,
    min_saving: Annotated[
        float | None,
        typer.Option(help="Share of a trajectory's MACs that must be saved. One of the two.", show_default=False),
    ] = None,
    weigh: Annotated[Unit, typer.Option(help="Savings are of MACs, or of the time spent in the UNet.")] = Unit.macs,
    adaptor: Annotated[
        list[str] | None,
        typer.Option(
            "--adaptor",
            help="identity; calibrated, which is solved for here; or the folder of a saved adaptor; repeatable.",
            show_default="identity",
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Of classifier-free guidance.", show_default="none")
    ] = None,
    clock: Clocks = None,
    adaptive: Annotated[bool, typer.Option("--adaptive", help="Measure adaptive schedules too.")] = False,
    probes: Annotated[int, typer.Option(help="Steps at which one adaptor step alone is measured.", min=1)] = 8,
) -> None:
    """Choose region, adaptor and steps from measured error against MACs or ms, and verify the choice on fresh noise.

    The plan is used by wrap(unet, plan=clockwork_hooks.Plan.from_json(open("clockwork-plan/plan.json").read())).
    """
    from clockwork_hooks.analysis.planning import plan as make

    loaded = load_sampler(model, steps, batch)
    options: dict[str, Any] = {"max_error": max_error, "min_saving": min_saving, "weigh": weigh.value}
    options |= {"probes": probes, "adaptive": adaptive, "adaptor": adaptor or None, "guidance": guidance_scale}
    options |= {"clocks": tuple(clock or CLOCKS), "seeds": tuple(seed or SEEDS)}
    result = make(*loaded, **options)
    deliver(result, format, "plan", out)


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
