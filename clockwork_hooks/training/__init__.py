"""Training of adaptors on the trajectories of any sampler."""

from clockwork_hooks.training.distill import distill, local_device
from clockwork_hooks.training.losses import LOSSES, Loss, Outcome
from clockwork_hooks.training.options import Student, TrainingOptions
from clockwork_hooks.training.result import DistillResult, StudentResult
from clockwork_hooks.training.trajectory import RecordedCall, Trajectory, TrajectoryRecorder

__all__ = [
    "LOSSES",
    "DistillResult",
    "Loss",
    "Outcome",
    "RecordedCall",
    "Student",
    "StudentResult",
    "TrainingOptions",
    "Trajectory",
    "TrajectoryRecorder",
    "distill",
    "local_device",
]
