"""The arguments of `distill`: checked, and turned into learners."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from clockwork_hooks._generate import with_seed
from clockwork_hooks.adaptors.resolve import is_identity, resolve_adaptor
from clockwork_hooks.engine.stand_in import check_region, region_options
from clockwork_hooks.errors import AdaptorError, ArgumentError, DistillError
from clockwork_hooks.regions.find import Choice
from clockwork_hooks.regions.region import Region
from clockwork_hooks.schedule import Schedule, check_clock
from clockwork_hooks.training import checkpoint
from clockwork_hooks.training.learner import Learner
from clockwork_hooks.training.losses import Loss, Weights, loss_of
from clockwork_hooks.training.options import MODES, Student, TrainingOptions

if TYPE_CHECKING:
    from clockwork_hooks.adaptors import LearnedAdaptor

__all__ = [
    "check",
    "check_facts",
    "check_folder",
    "chosen",
    "kind_of",
    "learners_of",
    "loaded",
    "samplers_of",
    "students_of",
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
    if not resume and checkpoint.saved(folder) is not None:
        raise ArgumentError(
            "a folder holds one run",
            seen={"folder": folder, "checkpoint": checkpoint.saved(folder)},
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
