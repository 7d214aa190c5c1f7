"""What a zoo case is, and the registry that holds them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn

from tests.zoo.proof import map_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A UNet, one call of it, and what reading its code tells of it.

    Attributes:
        name: key in `ZOO` or `REFUSED`, or "random-<seed>".
        model: in eval mode, float32, every constant parameter made random.
        args: positional arguments of the one call; pass `inputs()`, some models empty the lists they are given.
        kwargs: keyword arguments of the one call, likewise.
        source: package and class.
        note: which lines of that code lead to the expectation.
    """

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    source: str
    note: str

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments in new lists and dicts, with the same tensors."""
        return map_tensors(lambda tensor: tensor, self.args), map_tensors(lambda tensor: tensor, self.kwargs)


@dataclass(frozen=True, slots=True, kw_only=True)
class ZooCase(Case):
    """A UNet that can be served.

    The region is the default one: below the highest level, the paper's stage 1. Paths are dotted, as in
    `named_modules()`. Where several modules return the very same tensor, all of them are listed, the outermost
    first, and any of them is a right answer.

    Attributes:
        entry: modules that return the tensor flowing in at top resolution; empty where the parent computes it.
        exit: modules whose call is injected on an adaptor pass.
        level: levels that stay outside; 1 is the region below the highest.
        resolution: size of the entry, channels and batch left out (frames of a video too).
        exit_resolution: size of the injected tensor; None where it is the entry's.
        axes: those of the tensors that the resolution is read off; None where they are the last.
        consumer: the module that takes the entry as its first argument; None where a function does.
        exit_call: which call of the exit module, counted from 0.
        skipped: modules inside the region: none of their calls runs on an adaptor pass.
        outside: modules outside of it: every call runs on every pass.
    """

    entry: tuple[str, ...]
    exit: tuple[str, ...]
    level: int = 1
    resolution: tuple[int, ...]
    exit_resolution: tuple[int, ...] | None = None
    axes: tuple[int, ...] | None = None
    consumer: str | None = None
    exit_call: int = 0
    skipped: frozenset[str]
    outside: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedCase(Case):
    """A model that has no region of its own.

    Attributes:
        says: parts of the error's text: why, and what there is.
    """

    says: tuple[str, ...]


ZOO: dict[str, Callable[[], ZooCase]] = {}
REFUSED: dict[str, Callable[[], RefusedCase]] = {}
Some = TypeVar("Some", bound=Case)


def case(build: Callable[[], ZooCase]) -> Callable[[], ZooCase]:
    """Register a function that makes a case, under the function's name; it runs seeded, outside the caller's RNG."""
    ZOO[build.__name__] = _seeded(build)
    return ZOO[build.__name__]


def refused(build: Callable[[], RefusedCase]) -> Callable[[], RefusedCase]:
    """`case` for a model that cannot be served."""
    REFUSED[build.__name__] = _seeded(build)
    return REFUSED[build.__name__]


def _seeded(build: Callable[[], Some]) -> Callable[[], Some]:
    @wraps(build)
    def seeded() -> Some:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build()
            enliven(model.model)
        return model

    return seeded


def enliven(model: nn.Module) -> None:
    """Make every constant parameter random: behind a zero-initialised output a wrong region could not be seen."""
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.min() != parameter.max():
                continue
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def children(path: str, count: int) -> tuple[str, ...]:
    """The paths of the first modules of a list: `children("mid", 2)` is `("mid.0", "mid.1")`."""
    return tuple(f"{path}.{index}" for index in range(count))
