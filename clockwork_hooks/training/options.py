"""How to train: each option of `distill` with its default, the paper's where it names one; and students of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from clockwork_hooks.errors import ArgumentError, is_number, no_option, whole
from clockwork_hooks.training.losses import Loss

Mode = Literal["unrolled", "forward_noise", "on_policy"]
MODES: tuple[str, ...] = get_args(Mode)
_NONE_TOO = ("trajectories", "minutes", "max_norm", "ema")
_COUNTS = {"trajectories": 1, "batch": 1, "accumulate": 1, "hold": 1, "reuse": 1, "log_every": 1, "seed": 0}  # at least
_CHOICES = {"decay": ("constant", "cosine"), "precision": ("no", "bf16", "fp16"), "tracker": (None, "tensorboard")}


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How to train.

    Attributes:
        trajectories: runs of `generate`, over all processes; None where `minutes` decides.
        minutes: of training, resumed runs included; the learning rate falls over them. None where `trajectories`
            decides; given both, the first to be reached ends the run.
        batch: prompts in one run of `generate`, in each process; a gradient step has them all.
        lr: peak learning rate of Adam.
        decay: of the learning rate over the run: "constant" (the paper) or "cosine".
        warmup: share of the run over which the learning rate rises.
        max_norm: gradients are clipped to this norm; None: they are not.
        accumulate: adaptor steps in one gradient step.
        hold: trajectories that are recorded before they are trained on, if the buffer has room for them.
        reuse: times that each recorded trajectory is trained on.
        buffer: where they are held: "device" (the UNet's), "ram", or a folder on disk.
        buffer_gb: bound of the buffer, in 10⁹ bytes.
        precision: of the adaptor's arithmetic: "no" (its own), "bf16" or "fp16".
        tf32: float32 products use TensorFloat-32 on CUDA during the run.
        graphs: the teacher's passes are replayed as CUDA graphs: for small UNets and batches, which wait for launches.
            Losses of features then run the UNet's high-resolution half too, to see what flows into the region.
        ema: decay of a moving average of the weights, which is what the run returns; None for none.
        seed: of the prompts' order and the noise; runs with the same seed see the same trajectories.
        save_every: seconds between checkpoints; 0 saves after every refill of the buffer.
        log_every: gradient steps between looks at the losses, each of which waits for the device.
        tracker: None or "tensorboard": logs in the folder.

    Example:
        >>> options = TrainingOptions(minutes=5, batch=16, decay="cosine")  # `distill` takes the same keywords
        >>> options.lr, options.trajectories
        (0.0001, None)

    Source: arXiv 2312.08128, Sec. 5.1 (Adam, learning rate 1e-4, batch 16).
    """

    trajectories: int | None = None
    minutes: float | None = None
    batch: int = 16
    lr: float = 1e-4
    decay: str = "constant"
    warmup: float = 0.0
    max_norm: float | None = 1.0
    accumulate: int = 1
    hold: int = 8
    reuse: int = 1
    buffer: str | Path = "device"
    buffer_gb: float = 4.0
    precision: str = "no"
    tf32: bool = False
    graphs: bool = False
    ema: float | None = None
    seed: int = 0
    save_every: float = 60.0
    log_every: int = 50
    tracker: str | None = None

    def __post_init__(self) -> None:
        if self.trajectories is None and self.minutes is None:
            object.__setattr__(self, "trajectories", 500)
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None or one.name not in _NONE_TOO:
                _check(one.name, value)

    @classmethod
    def of(cls, settings: Mapping[str, Any], beside: Iterable[str] = ()) -> TrainingOptions:
        """From keyword arguments or a configuration.

        Args:
            settings: name → value.
            beside: other names that the caller knows, for the error's advice.

        Raises:
            ArgumentError: there is no such option, or a value is outside its rule.
        """
        names = [one.name for one in fields(cls)]
        for name in settings:
            if name not in names:
                raise no_option(name, [*beside, *names], rule="a training option has a known name")
        return cls(**settings)


def _check(name: str, value: Any) -> None:
    """Raise `ArgumentError` if an option's value is outside its rule."""
    if name in _COUNTS:
        whole(name, value, least=_COUNTS[name])
    elif name in ("minutes", "lr", "max_norm", "buffer_gb") and not (is_number(value) and value > 0):
        raise ArgumentError(f"{name} is above 0", seen={name: repr(value)}, do=f"pass a positive {name}=")
    elif name == "save_every" and not (is_number(value) and value >= 0):
        raise ArgumentError(f"{name} is a number of seconds", seen={name: repr(value)}, do=f"pass {name}=60")
    elif name in ("warmup", "ema") and not (is_number(value) and 0 <= value < 1):
        raise ArgumentError(f"{name} is in [0, 1)", seen={name: repr(value)}, do=f"pass {name}=0.1 or the like")
    elif name == "buffer" and not isinstance(value, (str, Path)):
        raise ArgumentError('buffer is "device", "ram" or a folder', seen={name: repr(value)}, do='pass buffer="ram"')
    elif name in _CHOICES and value not in _CHOICES[name]:
        raise ArgumentError(f"{name} is one of a few", seen={name: repr(value)}, do=f"pass one of {_CHOICES[name]}")


@dataclass(frozen=True, slots=True)
class Student:
    """An adaptor to train, where several learn from the same trajectories; what is None is as for all of them.

    Attributes:
        adaptor: the module, or a function that makes one for a region: `ResNetAdaptor.for_region`.
        loss: name of a loss, or a `Loss`.
        clock: the clock, or several, of which each trajectory gets one.
        schedule: replaces `clock`.
        lr: peak learning rate.

    Example:
        >>> from clockwork_hooks import ResNetAdaptor
        >>> students = {loss: Student(ResNetAdaptor.for_region, loss=loss) for loss in ("feature", "guided-output")}
        >>> students["feature"].loss, students["feature"].clock
        ('feature', None)
    """

    adaptor: Any
    loss: str | Loss | None = None
    clock: int | Sequence[int] | None = None
    schedule: Any = None
    lr: float | None = None
