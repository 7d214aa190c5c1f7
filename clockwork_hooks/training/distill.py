"""`distill`: train adaptors for one UNet on the trajectories of the user's own sampler.

How a run is set up is here too: arguments checked, learners made, the UNet frozen, Accelerate around it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import TaskID
from torch import Tensor, nn

from clockwork_hooks._generate import Generate, seeded, with_seed
from clockwork_hooks._version import versions
from clockwork_hooks.adaptors.saved import check_facts
from clockwork_hooks.adaptors.stand_in import check_region, is_identity, region_options, resolve_adaptor
from clockwork_hooks.engine.wrapper import check_unet
from clockwork_hooks.errors import AdaptorError, ArgumentError, DistillError, as_path, is_several, named, need
from clockwork_hooks.regions.find import Choice, ChoiceOptions, region_or_choice
from clockwork_hooks.regions.region import Region
from clockwork_hooks.reports.progress import ProgressBar
from clockwork_hooks.schedule import Schedule, check_clock
from clockwork_hooks.training.losses import Guidance, Loss, Weights, guidance_of, loss_of
from clockwork_hooks.training.options import MODES, Mode, Student, TrainingOptions
from clockwork_hooks.training.result import (
    DistillResult,
    StudentResult,
    latest_checkpoint,
    load_checkpoint,
    save_adaptor,
    save_checkpoint,
)
from clockwork_hooks.training.trainer import Learner, Trainer, status
from clockwork_hooks.training.trajectory import Buffer, Noise, TrajectoryRecorder

if TYPE_CHECKING:
    from clockwork_hooks.adaptors import LearnedAdaptor


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
    check_facts(facts or {}, ArgumentError)  # now, not when it is trained
    adaptor = loaded(adaptor)
    home = None if folder is None else as_path("folder", folder)
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
            schedules=tuple(one.written(max(trainer.steps.values(), default=0)) for one in learner.schedules),
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
            "the run's folder must be writable: the summary could not be saved",
            seen={"folder": folder, "error": error},
            do="free some space",
        ) from error


def check(mode: str, prompts: Any, images: Any, add_noise: Any, graphs: bool) -> None:
    """Raise `ArgumentError` if mode, prompts or images are outside their rule."""
    if graphs and mode == "on_policy":
        raise ArgumentError(
            "graphs=True can replay only the teacher's trajectories",
            seen={"graphs": True, "mode": mode},
            do="pass graphs=False: the student runs its adaptor, which changes",
        )
    if mode not in MODES:
        raise ArgumentError("a mode is one of three", seen={"mode": repr(mode)}, do=f"pass one of {', '.join(MODES)}")
    if not hasattr(prompts, "__len__") or not hasattr(prompts, "__getitem__") or not is_several(prompts):
        raise ArgumentError(
            "prompts are a sequence: they have a length and are taken by number",
            seen={"prompts": type(prompts).__name__},
            do="pass a list; for a sampler without conditions, range(10_000)",
        )
    if len(prompts) == 0:
        raise ArgumentError(
            "prompts must not be empty",
            seen={"prompts": 0},
            do="pass some; for a sampler without conditions, range(10_000)",
        )
    passed = [name for name, value in (("images", images), ("add_noise", add_noise)) if value is not None]
    if len(passed) != (2 if mode == "forward_noise" else 0):
        raise ArgumentError(
            'mode="forward_noise" trains on noised images, and only that does',
            seen={"mode": mode, "given": ", ".join(passed) or "neither images nor add_noise"},
            do="pass images=batch -> clean samples, and add_noise=(clean, noise, time) -> noisy, with that mode",
        )


def samplers_of(generate: Any) -> tuple[Callable[[Any, int], Any], ...]:
    """The sampler, or those that take turns, as functions of batch and seed.

    Raises:
        ArgumentError: it is none.
    """
    several = (generate,) if callable(generate) or not isinstance(generate, Sequence) else tuple(generate)
    if not several or not all(map(callable, several)):
        raise ArgumentError(
            "generate is a function that samples for a list of prompts, or several of them",
            seen={"generate": repr(generate)[:80]},
            do="pass generate=lambda batch, seed: sample(batch, seed)",
        )
    return tuple(with_seed(one, seeding=False) for one in several)


def check_folder(folder: Path | None, resume: bool) -> None:
    """Make the run's folder, and see that it can be written and holds no other run."""
    if folder is None:
        if resume:
            raise ArgumentError("a run is resumed from its folder", seen={"folder": None}, do="pass folder=")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".write").touch()
        (folder / ".write").unlink(missing_ok=True)  # another process may have been quicker
    except OSError as error:
        raise DistillError(
            "the run's folder must be writable",
            seen={"folder": folder, "error": error},
            do="pass another folder=",
        ) from error
    if not resume and latest_checkpoint(folder) is not None:
        raise ArgumentError(
            "a folder can hold only one run",
            seen={"folder": folder, "checkpoint": latest_checkpoint(folder)},
            do="pass {resume} to go on with it, or another folder",
            arguments={"resume": True},
        )


def chosen(adaptor: Any, wanted: Region | Choice) -> Region | Choice:
    """What was asked for, or where nothing was, what the first adaptor that was made for a region needs."""
    if wanted != Choice():
        return wanted
    students = list(adaptor.values()) if isinstance(adaptor, Mapping) else [adaptor]
    modules = [one.adaptor if isinstance(one, Student) else one for one in students]
    return Choice(**next((options for options in map(region_options, modules) if options), {}))


def loaded(adaptor: Any) -> Any:
    """What `distill` is given, with each saved adaptor in it loaded: its training goes on.

    Raises:
        AdaptorError: there is none of this name or in this folder, or it is the identity.
    """
    if isinstance(adaptor, Mapping):
        return {name: loaded(one) for name, one in adaptor.items()}
    if isinstance(adaptor, Student):
        return replace(adaptor, adaptor=loaded(adaptor.adaptor))
    if isinstance(adaptor, os.PathLike) or (isinstance(adaptor, str) and ("/" in adaptor or Path(adaptor).is_dir())):
        return resolve_adaptor(adaptor)
    if is_identity(adaptor) or isinstance(adaptor, str):
        kind_of(adaptor)
    return adaptor


def students_of(adaptor: Any, region: Region) -> dict[str, Student]:
    """The adaptors by name, each one a module that fits the region."""
    named = adaptor if isinstance(adaptor, Mapping) else {"adaptor": adaptor}
    if not named or not all(isinstance(name, str) and name.isidentifier() for name in named):
        raise ArgumentError(
            "adaptors that are trained together have names, which become file names",
            seen={"names": list(named)},
            do='pass {"small": ..., "large": ...}',
        )
    return {
        name: replace(student, adaptor=_module(student.adaptor, region))
        for name, student in ((name, one if isinstance(one, Student) else Student(one)) for name, one in named.items())
    }


def _module(adaptor: Any, region: Region) -> nn.Module:
    if isinstance(adaptor, str):
        adaptor = kind_of(adaptor).for_region
    module = adaptor if isinstance(adaptor, nn.Module) else adaptor(region) if callable(adaptor) else None
    if not isinstance(module, nn.Module):
        raise AdaptorError(
            "an adaptor to train is a module, or a function that makes one for a region",
            seen={"adaptor": repr(adaptor)[:80], "made": type(module).__name__},
            do='pass adaptor="resnet", or ResNetAdaptor.for_region',
        )
    check_region(module, region)
    return module


def kind_of(name: str | None) -> type[LearnedAdaptor]:
    """The class of adaptors of this name.

    Raises:
        AdaptorError: there is none.
    """
    from clockwork_hooks import adaptors

    if not isinstance(name, str) or name not in adaptors.KINDS:
        raise AdaptorError(
            "an adaptor to train is known by its name, or is a module, or the folder of a saved one",
            seen={"adaptor": repr(name)},
            do=f"pass one of {', '.join(adaptors.KINDS)}; the identity has nothing to train",
        )
    kind: type[LearnedAdaptor] = getattr(adaptors, adaptors.KINDS[name])
    return kind


def learners_of(
    students: Mapping[str, Student],
    clock: Any,
    schedule: Any,
    loss: str | Loss | None,
    guidance: Callable[[int, float | None], Weights] | None,
    accelerator: Any,
    options: TrainingOptions,
) -> list[Learner]:
    """The learners of the adaptors."""
    return [
        Learner(
            name,
            student.adaptor.to(accelerator.device),
            loss=loss_of(student.loss if student.loss is not None else loss, with_guidance=guidance is not None),
            schedules=_schedules(
                clock if student.clock is None else student.clock,
                schedule if student.clock is None and student.schedule is None else student.schedule,
            ),
            guidance=guidance,
            accelerator=accelerator,
            options=options,
            lr=student.lr or options.lr,
        )
        for name, student in students.items()
    ]


def _schedules(clock: Any, schedule: Any) -> list[Schedule]:
    if schedule is not None:
        one = Schedule.of(schedule)
        one.known_beforehand("what an adaptor is trained for")
        if one.counts_from_end:
            raise ArgumentError(
                "an adaptor is trained for named steps: the number of steps of a trajectory is not known beforehand",
                seen={"schedule": one},
                do=f'for 8 steps pass schedule=Schedule.at(Schedule.parse("{one}").adaptor_steps(8))',
            )
        return [one]
    clocks = list(clock) if isinstance(clock, Sequence) else [clock]
    for one in clocks:
        check_clock(one)
    if not clocks or min(clocks) < 2:
        raise ArgumentError(
            "an adaptor is trained for clocks of at least 2: with clock 1 it never runs",
            seen={"clock": clock},
            do="pass clock=2, or several, as in clock=(2, 3, 4)",
        )
    return [Schedule.every(one) for one in clocks]


def local_device() -> str:
    """Where this process trains: its own GPU under `accelerate launch`, else the first one, else the CPU.

    Returns:
        A device that torch takes.

    Example:
        >>> local_device().partition(":")[0] in ("cuda", "cpu")
        True
    """
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def frozen(unet: nn.Module) -> Iterator[None]:
    """No gradients for the UNet's parameters and evaluation mode inside; every flag as it was afterwards."""
    modes = [(module, module.training) for module in unet.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
    unet.eval()
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def accelerated(unet: nn.Module, options: TrainingOptions, folder: Path | None, own: Any) -> Iterator[Any]:
    """Accelerate on the UNet's device, with trackers: the user's own, or a fresh one."""
    device = next((tensor.device for tensor in (*unet.parameters(), *unet.buffers())), torch.device("cpu"))
    need("training runs on Hugging Face Accelerate", "accelerate", install="clockwork-hooks[train]")
    if options.tracker is not None:
        need("losses are logged with TensorBoard", "tensorboard", install="clockwork-hooks[train]")
        if folder is None and own is None:
            raise ArgumentError(
                "losses are logged in the run's folder",
                seen={"tracker": options.tracker, "folder": None},
                do="pass folder=",
            )
    import accelerate
    from accelerate.state import AcceleratorState

    if own is not None and not isinstance(own, accelerate.Accelerator):
        raise ArgumentError(
            "accelerator= is Accelerate's",
            seen={"accelerator": type(own).__name__},
            do="pass accelerate.Accelerator(...), or leave it out",
        )

    fresh = own is None and not AcceleratorState._shared_state
    accelerator = own or accelerate.Accelerator(
        mixed_precision=options.precision,
        cpu=device.type == "cpu",
        log_with=options.tracker,
        project_dir=str(folder) if folder is not None else None,
    )
    try:
        if accelerator.device.type != device.type or (
            accelerator.num_processes > 1 and device.index not in (None, accelerator.device.index)
        ):
            raise ArgumentError(
                "the UNet must be on the device of its process",
                seen={"unet": device, "process": accelerator.device},
                do="move it before: unet.to(accelerate.Accelerator().device)",
            )
        if options.tracker is not None and own is None:
            accelerator.init_trackers("logs")
        yield accelerator
    finally:
        if options.tracker is not None and own is None:
            accelerator.end_training()
        if fresh and accelerator.num_processes == 1:  # the next run in this process may want another precision
            AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def tf32(wanted: bool) -> Iterator[None]:
    """Float32 products use TensorFloat-32 inside, where wanted."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    if wanted:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        if wanted:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def quietly(error: BaseException | None) -> Iterator[None]:
    """While an error is on its way out, another one while saving does not hide it, but warns."""
    try:
        yield
    except DistillError as other:
        if error is None:
            raise
        warnings.warn(f"what was trained could not be saved either: {other}", RuntimeWarning, stacklevel=5)
