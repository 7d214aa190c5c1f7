"""`clockwork-hooks tune`: an adaptor without training, and the steps that it is best at, for a saving."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clockwork_hooks.cli.analyses import DemoSteps, Sampled, load_sampler
from clockwork_hooks.cli.app import MEASURE, Interrupted, app, epilog
from clockwork_hooks.cli.delivery import deliver
from clockwork_hooks.cli.options import Format, FormatOption, check_out

if TYPE_CHECKING:
    from clockwork_hooks.analysis.tuning import Trial

__all__ = ["tune"]

PARAGRAPHS = (
    "How it works: the sampler runs once with full passes alone, and for each region an adaptor is solved for, a "
    "linear function of what was cached: no gradient, no training. Then schedules that save enough (so many first and "
    "last steps full, a clock between) are run end to end on batches that were not calibrated with; the one that is "
    "nearest to the plain results is calibrated once more, for its own steps.",
    "What to turn: --saving. The more, the further from plain; the table says how far. A dozen prompts are enough, "
    "more steps bear more.",
    'The folder is all that is needed later: clockwork_hooks.wrap(unet, "FOLDER") runs the adaptor at its steps. For a '
    "diffusers pipeline call clockwork_hooks.tune(pipe, prompts, saving=0.4).",
)
EXAMPLES = (
    "tune   (the demo model; minutes on a CPU)",
    "tune --saving 0.5 --steps 20 --out my-folder",
    "tune my_package.sampler:build --guidance-scale 7.5",
)


@app.command(epilog="\n\n".join([*PARAGRAPHS, epilog(*EXAMPLES)]), rich_help_panel=MEASURE)
def tune(
    model: Sampled = "demo",
    steps: DemoSteps = 8,
    batch: Annotated[int, typer.Option(help="Samples of a batch of the demo's, of which four are made.", min=1)] = 4,
    saving: Annotated[float, typer.Option(help="Share of a trajectory's MACs to save, between 0 and 1.")] = 0.4,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Of classifier-free guidance.", show_default="the demo's, or none")
    ] = None,
    format: FormatOption = Format.table,
    out: Annotated[
        str, typer.Option(help="The folder for the adaptor and the report.", callback=check_out)
    ] = "clockwork-tuned",
) -> None:
    """Calibrate an adaptor and find its steps for a saving, without training; wrap(unet, FOLDER) takes the result."""
    from clockwork_hooks.analysis.tuning import tune as find

    sampler, scale, log_snr = load_sampler(model, steps, 4 * batch), guidance_scale, None
    batches = sampler.conditions
    if model == "demo":
        from clockwork_hooks.demo.model import GUIDANCE, load_demo

        prompts = batches[0]
        batches = [prompts[at : at + batch] for at in range(0, len(prompts), batch)]
        scale, log_snr = scale or GUIDANCE, load_demo().scheduler()
    folder = Path(out)
    with _interruptible(folder) as trials:
        cw = find(
            sampler.unet, batches, generate=sampler.generate, saving=saving, guidance=scale, log_snr=log_snr,
            on_trial=trials.append,
        )  # fmt: skip
    adaptor, tuning = cw.adaptor, cw.adaptor.tuning  # type: ignore[attr-defined]
    cw.remove()
    adaptor.save_pretrained(folder)  # type: ignore[attr-defined]
    deliver(tuning, format, "tuning", [str(folder)])
    typer.echo(f'The adaptor, for wrap(unet, "{folder}"), which runs it at {cw.schedule}: {folder}', err=True)


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
