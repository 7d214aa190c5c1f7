"""What a training run leaves in its folder: checkpoints while it runs, its adaptors and its report at the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from clockwork_hooks._numbers import count, duration, percent
from clockwork_hooks.errors import DistillError
from clockwork_hooks.regions.region import Region
from clockwork_hooks.reports.plots import Plot, plots
from clockwork_hooks.reports.report import Report
from clockwork_hooks.reports.tables import Table, table
from clockwork_hooks.training.trainer import Learner

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class StudentResult:
    """One trained adaptor.

    Attributes:
        adaptor: the module, in evaluation mode.
        loss: name of the loss.
        losses: of every adaptor step that was trained on, in order; earlier runs of a resumed training included.
        errors: step → relative error of what the loss looks at, root of the squared error over the squared norm, over
            the last log interval.
        updates: gradient steps.
        schedules: which it was trained for.
        identity_errors: likewise for the identity in the adaptor's place, over the run's first trajectories.
    """

    adaptor: nn.Module = field(repr=False)
    loss: str
    losses: tuple[float, ...] = field(repr=False)
    errors: Mapping[int, float]
    updates: int
    schedules: tuple[str, ...]
    identity_errors: Mapping[int, float] = field(default_factory=dict)

    @property
    def first(self) -> float:
        """Mean of the first tenth of the losses."""
        return _mean(self.losses[: max(1, len(self.losses) // 10)])

    @property
    def last(self) -> float:
        """Mean of the last tenth of the losses."""
        return _mean(self.losses[-max(1, len(self.losses) // 10) :])


@dataclass(frozen=True, slots=True)
class DistillResult(Report):
    """What `distill` trained.

    Attributes:
        students: name → trained adaptor; "adaptor" where there was one without a name.
        region: what the adaptors stand in for.
        steps: denoising steps of each sampler.
        trajectories: runs of `generate` that were trained on, over all processes.
        seconds: of training, earlier runs of a resumed one included.
        recording_seconds: of this run, spent on recording trajectories.
        buffer_peak: most bytes that recorded trajectories took.
        settings: all options, the machine and the versions.
        folder: where it was saved, or None.
    """

    SCHEMA = "distill/1"

    students: Mapping[str, StudentResult]
    region: Region = field(repr=False)
    steps: tuple[int, ...]
    trajectories: int
    seconds: float
    recording_seconds: float
    buffer_peak: int
    settings: Mapping[str, Any] = field(repr=False)
    folder: Path | None

    @property
    def adaptor(self) -> nn.Module:
        """The trained adaptor, where there is one."""
        return self._only.adaptor

    @property
    def losses(self) -> tuple[float, ...]:
        """The losses of the only adaptor."""
        return self._only.losses

    @property
    def errors(self) -> Mapping[int, float]:
        """Step → relative error of the only adaptor."""
        return self._only.errors

    @property
    def _only(self) -> StudentResult:
        if len(self.students) != 1:
            raise DistillError(
                "a run of several adaptors has one result for each",
                seen={"adaptors": ", ".join(self.students)},
                do='read result.students["name"]',
            )
        return next(iter(self.students.values()))

    def table(self) -> Table:
        """One row an adaptor."""
        columns = (
            "adaptor",
            "loss",
            "schedule",
            ">gradient steps",
            ">first loss",
            ">last loss",
            "relative error by step",
        )
        rows = [
            (
                name,
                student.loss,
                ", ".join(student.schedules),
                f"{student.updates:,}",
                f"{student.first:.4g}",
                f"{student.last:.4g}",
                ", ".join(f"{step}: {error:.1%}" for step, error in sorted(student.errors.items())),
            )
            for name, student in self.students.items()
        ]
        steps = ", ".join(map(str, self.steps))
        note = (
            f"{count(self.trajectories, 'trajectory batch', 'trajectory batches')} of "
            f"{count(self.settings['batch'], 'prompt')} in {steps} steps, {duration(self.seconds)}. "
            f"Region: {self.region.line}."
        )
        return table("Distillation", columns, rows, notes=(note,))

    def tables(self) -> Sequence[Table]:
        """The adaptors, and each one's error beside the identity's."""
        rows = [
            (name, step, percent(error), percent(student.identity_errors.get(step)))
            for name, student in self.students.items()
            for step, error in sorted(student.errors.items())
        ]
        note = (
            "Relative error of what the loss looks at: of the adaptor over the last log interval of training, of the "
            "identity (the feature of the last full step) over the first trajectories."
        )
        columns = ("adaptor", ">step", ">its error", ">identity's")
        return self.table(), table("Error by step", columns, rows, notes=(note,))

    def figures(self) -> Sequence[Plot]:
        """The losses over the adaptor steps that were trained on."""
        return plots(Plot(self._losses, "Loss over the adaptor steps that were trained on, an adaptor a line"))

    def _losses(self) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3.2), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        for name, student in self.students.items():
            wide = max(1, len(student.losses) // 100)
            means = [_mean(student.losses[k : k + wide]) for k in range(0, len(student.losses), wide)]
            axes.plot([wide * (k + 0.5) for k in range(len(means))], means, label=f"{name} ({student.loss})")
        axes.set(xlabel="adaptor steps trained on", ylabel="loss, means of 1%", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        return figure

    def data(self) -> dict[str, Any]:
        """All numbers; losses thinned to 1,000 an adaptor."""
        students = {}
        for name, student in self.students.items():
            every = max(1, len(student.losses) // 1000)
            students[name] = {
                "loss": student.loss,
                "errors": student.errors,
                "identity_errors": student.identity_errors,
                "updates": student.updates,
                "schedules": student.schedules,
                "first_loss": student.first,
                "last_loss": student.last,
                "losses_every": every,
                "losses": student.losses[::every],
            }
        return {
            "students": students,
            "region": {"line": self.region.line, "fingerprint": self.region.fingerprint},
            "steps": self.steps,
            "trajectories": self.trajectories,
            "seconds": self.seconds,
            "recording_seconds": self.recording_seconds,
            "buffer_peak_bytes": self.buffer_peak,
            "settings": self.settings,
        }


def save_adaptor(adaptor: Any, folder: Path, facts: Mapping[str, Any]) -> None:
    """Save a trained adaptor: with `save_pretrained` where it has that, else its weights alone.

    Args:
        adaptor: the module.
        folder: made if need be.
        facts: what it was trained for; JSON only.

    Raises:
        DistillError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if hasattr(adaptor, "save_pretrained"):
            if hasattr(adaptor, "facts"):
                adaptor.facts = {**adaptor.facts, **facts}
            adaptor.save_pretrained(folder)
        else:
            tensors = {name: tensor.contiguous().cpu() for name, tensor in adaptor.state_dict().items()}
            safetensors.torch.save_file(tensors, folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise DistillError(
            "the run's folder must be writable: the trained adaptor could not be saved",
            seen={"folder": folder, "error": error},
            do="free some space and save it again: it is this error's .result.adaptor",
        ) from error


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values) if values else float("nan")


_CHECKPOINT = "at-"


def latest_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint below a folder."""
    runs = sorted((folder / "checkpoint").glob(f"{_CHECKPOINT}*/run.json"))
    return runs[-1].parent if runs else None


def save_checkpoint(folder: Path, learners: Sequence[Learner], run: Mapping[str, Any]) -> None:
    """Write a checkpoint, then forget the ones before it.

    Args:
        folder: of the run.
        learners: whose state is saved.
        run: what else the run goes on from; "trajectories" names the checkpoint.

    Raises:
        DistillError: the folder cannot be written; the checkpoint before, if any, is still there.
    """
    parent = folder / "checkpoint"
    partial, final = parent / "partial", parent / f"{_CHECKPOINT}{run['trajectories']:09d}"
    if (final / "run.json").is_file():
        return  # the state after so many trajectories is there already, and is never taken away before another is whole
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        numbers = {}
        for learner in learners:
            tensors, numbers[learner.name] = learner.state()
            safetensors.torch.save_file(
                {k: v.contiguous().cpu() for k, v in tensors.items()}, partial / f"{learner.name}.safetensors"
            )
        (partial / "run.json").write_text(json.dumps({**run, "learners": numbers}) + "\n", encoding="utf-8")
        os.replace(partial, final)
        for old in parent.glob(f"{_CHECKPOINT}*"):
            if old != final:
                shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)  # room for the adaptor itself
        before = latest_checkpoint(folder)
        raise DistillError(
            "the run's folder must be writable: a checkpoint could not be saved",
            seen={"folder": parent, "error": error, "checkpoint before": before or "none"},
            do="free some space and go on with {resume}" if before else "free some space, or pass another {folder}",
            arguments={"resume": True, "folder": None},
        ) from error


def load_checkpoint(path: Path, learners: Sequence[Learner], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Put the learners back to a checkpoint.

    Args:
        path: from `latest_checkpoint`.
        learners: of the same names and shapes as those that were saved.
        expected: settings that must be as they were.

    Returns:
        What `save_checkpoint` was given as `run`.

    Raises:
        DistillError: it was saved by another run, or is damaged.
    """
    try:
        run: dict[str, Any] = json.loads((path / "run.json").read_text(encoding="utf-8"))
        then = run["settings"]
        changed = {name: f"{then.get(name)} → {value}" for name, value in expected.items() if then.get(name) != value}
        if changed:
            raise DistillError(
                "a run can be resumed only with the settings that it was started with",
                seen={"folder": path.parent.parent, **changed},
                do="pass those settings, or train into another folder",
            )
        for learner in learners:
            device = str(learner.parameters[0].device)
            learner.load(
                safetensors.torch.load_file(path / f"{learner.name}.safetensors", device=device),
                run["learners"][learner.name],
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DistillError(
            "a run is resumed from its checkpoint",
            seen={"checkpoint": path, "error": f"{type(error).__name__}: {error}"},
            do="delete the folder's checkpoint to start anew",
        ) from error
    return run
