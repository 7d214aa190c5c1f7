"""The commands that run a model and measure.

`bench`: time; `drift`: what regions emit; `perturb`: feature maps; `plan`: the steps; `tune`: an adaptor and its steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from clockwork_hooks.cli import options
from clockwork_hooks.cli.app import MEASURE, Interrupted, app, epilog
from clockwork_hooks.cli.options import Adaptors, Clocks, Format, FormatOption, OutFolder, check_out, deliver, is_folder
from clockwork_hooks.errors import ArgumentError, ModelNotFoundError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from clockwork_hooks.analysis.tuning import Trial

BENCH_EXAMPLES = (
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


@app.command(epilog=epilog(*BENCH_EXAMPLES), rich_help_panel=MEASURE)
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
    adaptor: Annotated[
        str, typer.Option(help="identity (the cached exit as it is), or the folder of a saved adaptor.")
    ] = "identity",
    mode: Annotated[
        list[Mode] | None,
        typer.Option(
            help="How passes run, plain ones too: eager; compile (torch.compile); cudagraphs (captured). Repeatable.",
            show_default="eager",
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type of weights and inputs.", show_default="float16 on a GPU, else float32")
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
    """Time a step on this machine, plain and at each clock, and compare the gain with what the MACs promise."""
    import torch

    from clockwork_hooks.analysis.benchmark import bench as measure
    from clockwork_hooks.models import PRESETS, load_model
    from clockwork_hooks.regions.find import find_region

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if place == "meta":
        raise ArgumentError(
            "a time can be measured only on a device that computes",
            seen={"--device": place},
            do="pass --device cpu or cuda",
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


SAMPLED_HELP = (
    "demo, the model that ships; or package.module:factory, a function that returns (unet, generate, conditions): "
    "generate(batch, seed) samples with that UNet and returns one tensor, conditions is a list of batches."
)
Sampled = Annotated[str, typer.Argument(metavar="[MODEL]", help=SAMPLED_HELP)]
DemoSteps = Annotated[int, typer.Option(help="Denoising steps of the demo's sampler; a factory has its own.", min=1)]
DemoBatch = Annotated[int, typer.Option(help="Samples in a batch: how many of the demo's prompts.", min=1, max=16)]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="Seed of the noise; repeatable.", show_default="0")]
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
    result = measure_robustness(
        *loaded,
        alpha=alpha,
        statistics=statistics.value,
        maps=map or None,
        starts=start or None,
        seeds=tuple(seed or SEEDS),
    )
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
        float | None,
        typer.Option(
            help="Relative L2 error of the result that is allowed, 0 to 1. Pass this or --min-saving.",
            show_default=False,
        ),
    ] = None,
    min_saving: Annotated[
        float | None,
        typer.Option(
            help="Share of a trajectory's MACs that must be saved, 0 to 1. Pass this or --max-error.",
            show_default=False,
        ),
    ] = None,
    weigh: Annotated[
        Unit, typer.Option(help="What a saving is a share of: MACs, or the time (ms) spent in the UNet.")
    ] = Unit.macs,
    adaptor: Annotated[
        list[str] | None,
        typer.Option(
            "--adaptor",
            help="identity (the cached exit as it is); calibrated, which is solved for here; or the folder of a saved "
            "adaptor; repeatable.",
            show_default="identity",
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Scale of classifier-free guidance.", show_default="none")
    ] = None,
    clock: Clocks = None,
    adaptive: Annotated[bool, typer.Option("--adaptive", help="Measure adaptive schedules too.")] = False,
    probes: Annotated[int, typer.Option(help="Steps at which one adaptor step alone is measured.", min=1)] = 8,
) -> None:
    """Choose region, adaptor and steps from measured error against MACs or ms, and verify the choice on fresh noise.

    The plan is used by wrap(unet, plan=clockwork_hooks.Plan.from_json(open("clockwork-plan/plan.json").read())); a
    calibrated adaptor is saved beside it, and read from there.
    """
    from clockwork_hooks.adaptors.calibrated import CalibratedAdaptor
    from clockwork_hooks.analysis.planning import plan as make

    loaded = load_sampler(model, steps, batch, guidance_scale)
    result = make(
        *loaded,
        max_error=max_error,
        min_saving=min_saving,
        weigh=weigh.value,
        adaptor=tuple(adaptor) if adaptor else None,
        clocks=tuple(clock or CLOCKS),
        guidance=guidance_scale,
        adaptive=adaptive,
        probes=probes,
        seeds=tuple(seed or SEEDS),
    )
    if isinstance(result.adaptor, CalibratedAdaptor):
        first = Path((out or ["clockwork-plan"])[0])
        folder = first / "adaptor" if is_folder(first) else first.with_name(f"{first.stem}-adaptor")
        result.adaptor.save_pretrained(folder)
        result = replace(result, adaptor_folder=str(folder))
        typer.echo(folder, err=True)
    deliver(result, format, "plan", out)


class Sampler(NamedTuple):
    """What the analyses take."""

    unet: nn.Module
    generate: Any
    conditions: list[Any]


def load_sampler(model: str, steps: int, batch: int, guidance: float | None = None) -> Sampler:
    """The UNet, sampler and batches that the command line names.

    Args:
        model: demo, or package.module:factory.
        steps, batch, guidance: of the demo; a factory has its own. No guidance is the demo's usual one.

    Raises:
        ModelNotFoundError: the name means no sampler.
    """
    if model == "demo":
        from clockwork_hooks.demo import DEMO_PROMPTS, load_demo
        from clockwork_hooks.demo.model import GUIDANCE

        demo, scale = load_demo(), GUIDANCE if guidance is None else guidance

        def generate(prompts: Sequence[str], seed: int, steps: int = steps) -> Tensor:
            return demo.sample(prompts, steps=steps, seed=seed, guidance=scale)

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
            "a factory of a sampler must return (unet, generate, conditions)",
            seen={"factory": model, "returned": ", ".join(kinds)},
            do="name another one: what this one returns, (model, args, kwargs), is for flops, regions and bench"
            if one_call
            else "return the UNet, generate(batch, seed) and a list of batches",
        )
    return Sampler(parts[0], parts[1], list(parts[2]))


TUNE_PARAGRAPHS = (
    "How it works: the sampler runs once with full passes alone, and for each region an adaptor is solved for, a "
    "linear function of what was cached: no gradient, no training. Then schedules that save enough (so many first and "
    "last steps full, a clock between) are run end to end on batches that were not calibrated with; the one that is "
    "nearest to the plain results is calibrated once more, for its own steps.",
    "What to turn: --saving. The more, the further from plain; the table says how far. A dozen prompts are enough, "
    "more steps bear more.",
    'The folder is all that is needed later: clockwork_hooks.wrap(unet, "FOLDER") runs the adaptor at its steps. For a '
    "diffusers pipeline call clockwork_hooks.tune(pipe, prompts, saving=0.4).",
)
TUNE_EXAMPLES = (
    "tune   (the demo model; minutes on a CPU)",
    "tune --saving 0.5 --steps 20 --out my-folder",
    "tune my_package.sampler:build --guidance-scale 7.5",
)


@app.command(epilog="\n\n".join([*TUNE_PARAGRAPHS, epilog(*TUNE_EXAMPLES)]), rich_help_panel=MEASURE)
def tune(
    model: Sampled = "demo",
    steps: DemoSteps = 8,
    batch: Annotated[int, typer.Option(help="Samples in a batch; the demo has four batches.", min=1)] = 4,
    saving: Annotated[float, typer.Option(help="Share of a trajectory's MACs to save, between 0 and 1.")] = 0.4,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Scale of classifier-free guidance.", show_default="the demo's, or none")
    ] = None,
    format: FormatOption = Format.table,
    out: Annotated[
        str, typer.Option(help="The folder for the adaptor and the report.", callback=check_out)
    ] = "clockwork-tuned",
) -> None:
    """Calibrate an adaptor and find its steps for a saving, without training; wrap(unet, FOLDER) takes the result."""
    from clockwork_hooks.analysis.tuning import tune as find

    sampler, scale, log_snr = load_sampler(model, steps, 4 * batch, guidance_scale), guidance_scale, None
    shorter: Callable[[int], Callable[..., Tensor]] | None = None
    batches = sampler.conditions
    if model == "demo":
        from clockwork_hooks.demo.model import GUIDANCE, load_demo

        prompts = batches[0]
        batches = [prompts[at : at + batch] for at in range(0, len(prompts), batch)]
        scale, log_snr = GUIDANCE if scale is None else scale, load_demo().scheduler()

        def shorter(count: int) -> Callable[..., Tensor]:
            return partial(sampler.generate, steps=count)

    folder = Path(out)
    with _interruptible(folder) as trials:
        cw = find(
            sampler.unet, batches, generate=sampler.generate, shorter=shorter, saving=saving, guidance=scale,
            log_snr=log_snr, on_trial=trials.append,
        )  # fmt: skip
    adaptor, tuning = cw.adaptor, cw.adaptor.tuning  # type: ignore[attr-defined]
    cw.remove()
    adaptor.save_pretrained(folder)  # type: ignore[attr-defined]
    deliver(tuning, format, "tuning", [str(folder)])
    typer.echo(f'wrap(unet, "{folder}") takes the adaptor, and runs it by the schedule {cw.schedule}', err=True)


@contextmanager
def _interruptible(folder: Path) -> Iterator[list[Trial]]:
    """The trials that come; where they are interrupted, they are written, and what is kept is said."""
    trials: list[Trial] = []
    try:
        yield trials
    except KeyboardInterrupt as interrupt:
        lines = ["There is no adaptor yet, and another run begins anew."]
        if trials:
            path = folder / "trials.json"
            folder.mkdir(parents=True, exist_ok=True)
            rows = [{name: getattr(one, name) for name in type(one).__slots__} for one in trials]
            path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            best = min(trials, key=lambda one: one.error)
            lines += [
                f"The {len(trials)} schedules that were tried are in {path}.",
                f"The best so far: {best.rule}, region {best.region}, at {set(best.steps)}: {best.saved:.1%} saved.",
            ]
        raise Interrupted("\n".join(lines)) from interrupt
