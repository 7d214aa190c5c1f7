"""Checkpoints of a training run: safetensors and JSON, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from clockwork_hooks.errors import DistillError
from clockwork_hooks.training.learner import Learner

__all__ = ["load", "save", "saved"]

_PREFIX = "at-"


def saved(folder: Path) -> Path | None:
    """The latest whole checkpoint below a folder."""
    runs = sorted((folder / "checkpoint").glob(f"{_PREFIX}*/run.json"))
    return runs[-1].parent if runs else None


def save(folder: Path, learners: Sequence[Learner], run: Mapping[str, Any]) -> None:
    """Write a checkpoint, then forget the ones before it.

    Args:
        folder: of the run.
        learners: whose state is saved.
        run: what else the run goes on from; "trajectories" names the checkpoint.

    Raises:
        DistillError: the folder cannot be written; the checkpoint before, if any, is still there.
    """
    parent = folder / "checkpoint"
    partial, final = parent / "partial", parent / f"{_PREFIX}{run['trajectories']:09d}"
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
        for old in parent.glob(f"{_PREFIX}*"):
            if old != final:
                shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)  # room for the adaptor itself
        before = saved(folder)
        raise DistillError(
            "checkpoints are written into the run's folder",
            seen={"folder": parent, "error": error, "checkpoint before": before or "none"},
            do="free some space and go on with {resume}" if before else "free some space, or pass another {folder}",
            arguments={"resume": True, "folder": None},
        ) from error


def load(path: Path, learners: Sequence[Learner], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Put the learners back to a checkpoint.

    Args:
        path: from `saved`.
        learners: of the same names and shapes as those that were saved.
        expected: settings that must be as they were.

    Returns:
        What `save` was given as `run`.

    Raises:
        DistillError: it was saved by another run, or is damaged.
    """
    try:
        run: dict[str, Any] = json.loads((path / "run.json").read_text(encoding="utf-8"))
        then = run["settings"]
        changed = {name: f"{then.get(name)} → {value}" for name, value in expected.items() if then.get(name) != value}
        if changed:
            raise DistillError(
                "a run is resumed with the settings that it was started with",
                seen={"folder": path.parent.parent, **changed},
                do="pass the settings of then, or train into another folder",
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
