"""`distill`: train adaptors for one UNet on the trajectories of the user's own sampler."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from clockwork_hooks._generate import Generate, seeded
from clockwork_hooks._version import versions
from clockwork_hooks.engine.wrapper import check_unet
from clockwork_hooks.errors import DistillError, named
from clockwork_hooks.regions.find import Choice, ChoiceOptions, region_or_choice
from clockwork_hooks.regions.region import Region
from clockwork_hooks.reports.progress import ProgressBar
from clockwork_hooks.training.losses import Guidance, Loss, guidance_of
from clockwork_hooks.training.options import Mode, TrainingOptions
from clockwork_hooks.training.recording import Noise, TrajectoryRecorder
from clockwork_hooks.training.result import (
    DistillResult,
    StudentResult,
    latest_checkpoint,
    load_checkpoint,
    save_adaptor,
    save_checkpoint,
)
from clockwork_hooks.training.setup import (
    accelerated,
    check,
    check_facts,
    check_folder,
    chosen,
    frozen,
    learners_of,
    loaded,
    quietly,
    samplers_of,
    students_of,
    tf32,
)
from clockwork_hooks.training.trainer import Trainer, status
from clockwork_hooks.training.trajectory import Buffer

if TYPE_CHECKING:
    from rich.progress import TaskID

__all__ = ["distill"]


def distill(
    unet: nn.Module,
    adaptor: Any,
    generate: Generate | Sequence[Generate],
    *,
    prompts: Sequence[Any],
    clock: int | Sequence[int] = 2,
    schedule: Any = None,
    region: Region | Choice | None = None,
    time: str | None = None,
    mode: Mode = "unrolled",
    loss: str | Loss | None = None,
    guidance: Guidance = None,
    images: Callable[[Any], Tensor] | None = None,
    add_noise: Callable[[Tensor, Tensor, float], Tensor] | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    facts: Mapping[str, Any] | None = None,
    accelerator: Any = None,
    progress: bool = True,
    console: Any = None,
    **options: Any,
) -> DistillResult:
    """Train an adaptor, or several on the same trajectories, to stand in for the UNet's low-resolution part.

    Anything that calls the UNet is a sampler: `generate(batch, seed)` runs your own sampling code on a list of prompts,
    and what crosses the region's edge at every step of it is recorded and learned from. The UNet is frozen, and
    afterwards is as it was. Every trajectory has a seed of its own; `generate(batch)` serves too, as torch's random
    numbers are seeded from it. A fixed seed inside would train on one noise only.

    Args:
        unet: called by `generate`.
        adaptor: "resnet", a module that follows `Adaptor`, the folder of a saved one, a function that makes one for a
            region (`ResNetAdaptor.for_region`), or a mapping name → any of these or a `Student` with a loss and a
            clock of its own.
        generate: your sampler, over a list of prompts; several take turns (other step counts, other solvers).
        prompts: any sequence of conditions, which `generate` gets lists of.
        clock: one full pass every so many steps; several take turns, for an adaptor that serves all of them.
        schedule: replaces `clock`: what `wrap(schedule=...)` takes.
        region: what to stand in for, a `Region` or a `Choice`; None for the one that the adaptor was made for, or else
            the one below the highest level. The options of `Choice` may be passed one by one instead: `level=2`.
        time: name of the UNet's time input, where it is not clear.
        mode: "unrolled", on the teacher's trajectories from noise (the paper); "on_policy", on the student's own,
            labelled by the teacher; "forward_noise", on noised images.
        loss: "feature" (the paper), "guided-feature", "guided-output", or a `Loss`; None for "guided-output" where
            `guidance` is known, else "feature".
        guidance: scale of classifier-free guidance, unconditional branch first in the batch or in the calls; or a
            weight for each branch in order; or a function of step (from 1) and time that returns one of these or
            None; None where there is none or it is not known. A step in which one branch alone is called counts as
            without guidance.
        images: for "forward_noise": list of prompts → (B, ...) clean samples, as the sampler diffuses them.
        add_noise: for "forward_noise": (clean, noise, time) → what the UNet is called with at that time.
        folder: where the trained adaptor, the summary and checkpoints go; None keeps them in memory alone.
        resume: go on from the folder's checkpoint, if there is one.
        facts: what else to save with the adaptor, the sampler's name for example; JSON only.
        accelerator: an `accelerate.Accelerator` of your own.
        progress: draw a progress bar.
        console: rich's, for the bar; None for standard error.
        **options: options of `Choice`, and fields of `TrainingOptions`: trajectories, minutes, batch, lr, buffer_gb,
            ema, precision, ...

    Returns:
        The trained adaptors (the modules passed in, trained in place), their losses, and a table.

    Raises:
        ArgumentError: an option is outside its rule, there are no prompts, or the buffer cannot hold one trajectory.
        DistillError: `generate` never calls the UNet, a loss is not finite, the disk is full, or a checkpoint does not
            fit. What was trained until then is kept, in the adaptor, in the folder, and in the error's `.result`.
        AdaptorError: there is no adaptor of this name or in this folder, or it does not fit the region.
        RegionNotFoundError: nothing of the UNet can be skipped.
        WrapError: the UNet is wrapped.

    Example:
        >>> import torch
        >>> from diffusers import UNet2DModel
        >>> from clockwork_hooks.training import distill
        >>> blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        >>> unet = UNet2DModel(16, block_out_channels=(8, 32), norm_num_groups=8, **blocks)
        >>> def generate(batch):
        ...     sample = torch.randn(len(batch), 3, 16, 16)
        ...     for t in (900, 600, 300, 0):
        ...         sample = sample - 0.1 * unet(sample, t).sample
        >>> class Add(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.scale = torch.nn.Parameter(torch.zeros(1))
        ...
        ...     def forward(self, entry, exit_cached, *, time, text):
        ...         return exit_cached * (1 + self.scale)
        >>> result = distill(unet, Add(), generate, prompts=range(8), batch=2, trajectories=4, progress=False)
        >>> result.trajectories, len(result.losses), result.steps
        (4, 8, (4,))

    Source: arXiv 2312.08128, Sec. 4.4, Algorithm 1.
    """
    where = {name: options.pop(name) for name in ChoiceOptions.__annotations__ if name in options}
    settings = TrainingOptions.of(options, beside=[*named(distill), *ChoiceOptions.__annotations__])
    wanted = region_or_choice(region, where)
    check_unet(unet)
    check(mode, prompts, images, add_noise, settings.graphs)
    weights = guidance_of(guidance)
    generates = samplers_of(generate)
    check_facts(facts)
    adaptor = loaded(adaptor)
    home = Path(folder) if folder is not None else None
    check_folder(home, resume)
    with frozen(unet), accelerated(unet, settings, home, accelerator) as engine, tf32(settings.tf32):
        recorder = TrajectoryRecorder(unet, region=chosen(adaptor, wanted), time=time, graphs=settings.graphs)
        try:
            with seeded(settings.seed):
                first = [prompts[k % len(prompts)] for k in range(settings.batch)]
                region = recorder.probe(lambda batch: generates[0](batch, settings.seed), first)
                students = students_of(adaptor, region)
                learners = learners_of(students, clock, schedule, loss, weights, engine, settings)
            trainer = Trainer(
                recorder=recorder,
                learners=learners,
                generates=generates,
                prompts=prompts,
                buffer=Buffer(settings.buffer, settings.buffer_gb),
                accelerator=engine,
                options=settings,
                mode=mode,
                noise=Noise(images, add_noise) if images is not None and add_noise is not None else None,
            )
            summary = _summary(trainer, region, guidance)
            if home is not None:
                trainer.save = lambda: _save(home, trainer, summary)
                if resume:
                    _resume(home, trainer, summary)
            bar = ProgressBar(console, shown=progress and engine.is_main_process)
            return _train(trainer, bar, lambda: _result(trainer, region, summary, home), facts or {})
        finally:
            recorder.remove()


def _train(
    trainer: Trainer, bar: ProgressBar, result: Callable[[], DistillResult], facts: Mapping[str, Any]
) -> DistillResult:
    """Train behind a progress bar. What was learned is written however it ends, and an error has it with it."""
    try:
        with bar:
            task = bar.add_task("distilling", total=1.0)
            trainer.tell = lambda: _tell(trainer, bar, task)
            try:
                trainer.run()
            finally:
                trainer.close()
                if trainer.accelerator.is_main_process:
                    with quietly(sys.exc_info()[1]):
                        _write(result(), facts)
    except DistillError as error:
        error.result = result()
        raise
    trainer.accelerator.wait_for_everyone()
    return result()


def _summary(trainer: Trainer, region: Region, guidance: Guidance) -> dict[str, Any]:
    """The settings of this run, as its report and its checkpoints hold them."""
    return {
        **{key: str(value) if isinstance(value, Path) else value for key, value in asdict(trainer.options).items()},
        "mode": trainer.mode,
        "guidance": _named(guidance),
        "losses": {learner.name: learner.loss.name for learner in trainer.learners},
        "schedules": {learner.name: [str(one) for one in learner.schedules] for learner in trainer.learners},
        "region": region.fingerprint,
        "processes": trainer.accelerator.num_processes,
        "prompts": len(trainer.prompts),
        "versions": versions(),
    }


def _named(guidance: Guidance) -> Any:
    """The guidance as JSON holds it: of a function, its name."""
    if callable(guidance):
        return f"{getattr(guidance, '__qualname__', type(guidance).__name__)}(step, time)"
    return list(guidance) if isinstance(guidance, Sequence) else guidance


def _tell(trainer: Trainer, bar: ProgressBar, task: TaskID) -> None:
    bar.update(task, completed=trainer.share(), detail=status(trainer))
    if trainer.options.tracker is None:
        return
    for learner in trainer.learners:
        if learner.losses:
            values = {f"{learner.name}/loss": learner.losses[-1]}
            values |= {f"{learner.name}/error/step {step}": error for step, error in learner.errors.items()}
            trainer.accelerator.log(values, step=learner.updates)


def _save(folder: Path, trainer: Trainer, settings: Mapping[str, Any]) -> None:
    if trainer.accelerator.is_main_process:
        steps = {str(kind): number for kind, number in trainer.steps.items()}
        run = {"trajectories": trainer.done, "seconds": trainer.seconds, "steps": steps, "settings": dict(settings)}
        save_checkpoint(folder, trainer.learners, run)


def _resume(folder: Path, trainer: Trainer, settings: Mapping[str, Any]) -> None:
    latest = latest_checkpoint(folder)
    if latest is None:
        return
    free = ("trajectories", "minutes", "save_every", "log_every", "tracker", "buffer", "buffer_gb", "versions")
    fixed = {name: value for name, value in settings.items() if name not in free}
    run = load_checkpoint(latest, trainer.learners, fixed)
    trainer.done, trainer.seconds = run["trajectories"], run["seconds"]
    trainer.steps = {int(kind): number for kind, number in run["steps"].items()}


def _result(trainer: Trainer, region: Region, settings: Mapping[str, Any], folder: Path | None) -> DistillResult:
    students = {
        learner.name: StudentResult(
            adaptor=learner.module,
            loss=learner.loss.name,
            losses=tuple(learner.losses),
            errors=dict(sorted(learner.errors.items())),
            updates=learner.updates,
            schedules=tuple(map(str, learner.schedules)),
            identity_errors=dict(sorted(learner.identity_errors.items())),
        )
        for learner in trainer.learners
    }
    steps = tuple(trainer.steps[kind] for kind in sorted(trainer.steps))
    return DistillResult(
        students=students,
        region=region,
        steps=steps,
        trajectories=trainer.done,
        seconds=trainer.seconds,
        recording_seconds=trainer.recording_seconds,
        buffer_peak=trainer.buffer.peak,
        settings=settings,
        folder=folder,
    )


def _write(result: DistillResult, facts: Mapping[str, Any]) -> None:
    folder = result.folder
    if folder is None:
        return
    alone = len(result.students) == 1
    for name, student in result.students.items():
        steps = result.steps[0] if len(result.steps) == 1 else list(result.steps)
        training = {
            "steps": steps,
            "schedule": ", ".join(student.schedules),
            "mode": result.settings["mode"],
            "loss": student.loss,
            "guidance": result.settings["guidance"],
            "gradient steps": student.updates,
            "prompts": result.trajectories * result.settings["batch"],
            "relative error": {str(step): round(error, 4) for step, error in student.errors.items()},
            "relative error of the identity": {str(k): round(error, 4) for k, error in student.identity_errors.items()},
        }
        save_adaptor(student.adaptor, folder if alone else folder / name, {**training, **facts})
    try:
        (folder / "training.json").write_text(result.to_json() + "\n", encoding="utf-8")
    except OSError as error:
        raise DistillError(
            "the summary is written into the run's folder",
            seen={"folder": folder, "error": error},
            do="free some space",
        ) from error
