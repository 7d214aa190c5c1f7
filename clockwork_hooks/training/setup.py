"""How a run of `distill` is set up: arguments checked, learners made, the UNet frozen, Accelerate around it."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from clockwork_hooks._generate import with_seed
from clockwork_hooks.adaptors.base import is_identity, resolve_adaptor
from clockwork_hooks.engine.stand_in import check_region, region_options
from clockwork_hooks.errors import AdaptorError, ArgumentError, DistillError, need
from clockwork_hooks.regions.find import Choice
from clockwork_hooks.regions.region import Region
from clockwork_hooks.schedule import Schedule, check_clock
from clockwork_hooks.training.learner import Learner
from clockwork_hooks.training.losses import Loss, Weights, loss_of
from clockwork_hooks.training.options import MODES, Student, TrainingOptions
from clockwork_hooks.training.result import latest_checkpoint

if TYPE_CHECKING:
    from clockwork_hooks.adaptors import LearnedAdaptor

__all__ = [
    "accelerated",
    "check",
    "check_facts",
    "check_folder",
    "chosen",
    "frozen",
    "kind_of",
    "learners_of",
    "loaded",
    "local_device",
    "quietly",
    "samplers_of",
    "students_of",
    "tf32",
]


def check(mode: str, prompts: Any, images: Any, add_noise: Any, graphs: bool) -> None:
    """Raise `ArgumentError` if mode, prompts or images are outside their rule."""
    if graphs and mode == "on_policy":
        raise ArgumentError(
            "graphs replay the teacher's trajectories",
            seen={"graphs": True, "mode": mode},
            do="pass graphs=False: the student runs its adaptor, which changes",
        )
    if mode not in MODES:
        raise ArgumentError("a mode is one of three", seen={"mode": repr(mode)}, do=f"pass one of {', '.join(MODES)}")
    if not hasattr(prompts, "__len__") or not hasattr(prompts, "__getitem__") or isinstance(prompts, (str, Mapping)):
        raise ArgumentError(
            "prompts are a sequence: they have a length and are taken by number",
            seen={"prompts": type(prompts).__name__},
            do="pass a list; for a sampler without conditions, range(10_000)",
        )
    if len(prompts) == 0:
        raise ArgumentError(
            "there is something to generate from",
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


def check_facts(facts: Mapping[str, Any] | None) -> None:
    """Raise `ArgumentError` if JSON cannot hold what is to be saved with the adaptor: now, not when it is trained."""
    try:
        json.dumps(dict(facts or {}))
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            "the facts saved with an adaptor are what JSON holds: numbers, strings, lists, dicts",
            seen={"facts": repr(facts)[:80], "error": error},
            do="convert them, e.g. float(tensor)",
        ) from error


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
            "the run's folder can be written",
            seen={"folder": folder, "error": error},
            do="pass another folder=",
        ) from error
    if not resume and latest_checkpoint(folder) is not None:
        raise ArgumentError(
            "a folder holds one run",
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
                "an adaptor is trained for steps that are named: how many a trajectory has is not known before",
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
    """Where this process trains: its own GPU under `accelerate launch`, else the first one, else the CPU."""
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
                "the UNet is on the device of its process",
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
