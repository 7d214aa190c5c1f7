"""Call the adaptor, and see that it and what it returns fit the region before the UNet sees it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from clockwork_hooks._numbers import shape
from clockwork_hooks._tree import copied, version
from clockwork_hooks.adaptors.base import Adaptor, AdaptorInputs, needs_of
from clockwork_hooks.errors import AdaptorError, ArgumentError, OtherStepsWarning, is_whole
from clockwork_hooks.graph.macs import node_macs
from clockwork_hooks.graph.tracing import recording
from clockwork_hooks.regions.region import Region
from clockwork_hooks.schedule import Schedule

if TYPE_CHECKING:
    from clockwork_hooks.clock.timeline import Feature

__all__ = [
    "Lent",
    "Past",
    "call",
    "check",
    "check_region",
    "check_schedule",
    "count_and_call",
    "fits",
    "inputs",
    "owned",
    "place",
    "region_options",
    "scalar",
    "schedule_of",
    "schedules_of",
]


class Past(NamedTuple):
    """What an adaptor is given of earlier steps beside the exit; see `AdaptorInputs`."""

    entry: torch.Tensor | None = None
    position: torch.Tensor | None = None
    trend: torch.Tensor | None = None
    trend_positions: torch.Tensor | None = None

    @classmethod
    def of(cls, feature: Feature) -> Past:
        """What is kept beside a feature."""
        trail = feature.trail
        trend = (None, None) if trail is None else (trail.trend, trail.positions)
        return cls(feature.entry, feature.position, *trend)


class Lent:
    """The UNet's tensors that an adaptor is given; what comes after the region reads them, too.

    Args:
        captured: those that came.
        compares: where tensors keep no count of writes, in inference mode, look at values: waits for the device.
    """

    __slots__ = ("_before",)

    def __init__(self, captured: Mapping[str, torch.Tensor], *, compares: bool) -> None:
        self._before = [
            (name, one, version(one), copied(one) if compares and version(one) < 0 else None)
            for name, one in captured.items()
        ]

    def check(self, where: Mapping[str, object]) -> None:
        """Raise `AdaptorError` if one of them was written to."""
        for name, one, then, copy in self._before:
            same = copy is None or torch.allclose(one, copy, rtol=0, atol=0, equal_nan=True)
            if version(one) != then or not same:
                raise AdaptorError(
                    "an adaptor does not write to what flows on in the UNet",
                    seen={"written to": name, **_words(where)},
                    do="let it write to a copy, as of entry.clone(); a layer with inplace=True writes to what it takes",
                )


def inputs(
    captured: Mapping[str, torch.Tensor | None],
    exit_cached: torch.Tensor,
    past: Past = Past(),  # noqa: B008 - a tuple
    position: Any = None,
) -> AdaptorInputs:
    """What an adaptor is given, of what a pass picked up at the boundary.

    Args:
        captured: "entry", "time", "text", "mask", as far as they came.
        exit_cached: what the region emitted one step before.
        past: what is known of earlier steps.
        position: the UNet's time input now, as it was passed.
    """
    text, mask = captured.get("text"), captured.get("mask")
    if text is not None and mask is not None:
        text = masked_mean(text, mask)
    at = None if position is None else scalar(position, exit_cached.device)
    return AdaptorInputs(captured.get("entry"), exit_cached, captured.get("time"), text, past.entry, at, *past[1:])


def call(adaptor: Adaptor, arguments: AdaptorInputs) -> Any:
    """Call the adaptor with what it takes: the four of `Adaptor`, and what its `needs` name."""
    return adaptor(arguments.entry, arguments.exit_cached, **_keywords(adaptor, arguments))


def count_and_call(adaptor: Adaptor, arguments: AdaptorInputs) -> tuple[Any, int]:
    """`call`, recorded: also the MACs that the adaptor took."""
    module = adaptor if isinstance(adaptor, nn.Module) else _Function(adaptor)
    with recording(module, (arguments.entry, arguments.exit_cached), _keywords(adaptor, arguments)) as recorder:
        exit = call(module, arguments)
    return exit, sum(map(node_macs, recorder.bindings.nodes))


def region_options(adaptor: Adaptor) -> dict[str, Any]:
    """The options of `Choice` that find the region an adaptor was made for; none where it knows of no region."""
    return dict(getattr(adaptor, "region_options", None) or {})


def schedule_of(adaptor: Adaptor) -> tuple[Schedule | None, tuple[int, ...]]:
    """The schedule, and the numbers of steps, that a saved, trained or calibrated adaptor says it was made for.

    No schedule where it is for any or for several; no number where it names no schedule.
    """
    own, counts = schedules_of(adaptor)
    return own[0] if len(own) == 1 else None, counts


def schedules_of(adaptor: Adaptor) -> tuple[tuple[Schedule, ...], tuple[int, ...]]:
    """All schedules that it was made for, of which `distill` may name several; and the numbers of steps."""
    facts = getattr(adaptor, "facts", None)
    if not isinstance(facts, dict):
        return (), ()
    try:
        own = tuple(Schedule.parse(text) for text in re.split(r",\s+(?=\w+\()", str(facts.get("schedule"))))
    except ArgumentError:
        return (), ()
    steps = facts.get("steps")
    counts = steps if isinstance(steps, (list, tuple)) else [steps]
    return own, tuple(int(count) for count in counts if isinstance(count, int) and is_whole(count, 1))


def check_schedule(adaptor: Adaptor, schedule: Schedule) -> None:
    """Warn of a schedule whose adaptor steps are not those that the adaptor was made for."""
    own, counts = schedules_of(adaptor)
    steps = next(iter(counts), 0)
    if own and not any(_alike(one, schedule, steps) for one in own):
        warnings.warn(
            "an adaptor is best at the steps that it was made for: "
            f"{type(adaptor).__name__} was made for {' or '.join(map(str, own))}"
            + (f" of {steps} steps" if steps else "")
            + f", and runs at {schedule}\nWhat to do: leave schedule= and clock= out, or calibrate or train one for "
            "this schedule",
            OtherStepsWarning,
            stacklevel=3,
        )


def _alike(own: Schedule, other: Schedule, steps: int) -> bool:
    """Are the adaptor steps the same, in a run of so many? Of two adaptive ones nobody can tell."""
    if own == other or None not in (own.threshold, other.threshold):
        return True
    return bool(steps) and own.threshold is other.threshold and own.adaptor_steps(steps) == other.adaptor_steps(steps)


def check_region(adaptor: Adaptor, region: Region) -> None:
    """Let an adaptor that knows its region (`LearnedAdaptor.check_region`) refuse another one."""
    refuse = getattr(adaptor, "check_region", None)
    if refuse is not None:
        refuse(region)


def place(adaptor: Adaptor, like: torch.Tensor) -> None:
    """Move an adaptor's parameters to the exit's device and dtype; as plain tensors, also in inference mode."""
    if isinstance(adaptor, nn.Module):
        with torch.inference_mode(False):
            adaptor.to(like.device, like.dtype)


def fits(exit: Any, cached: torch.Tensor) -> bool:
    """Does what the adaptor returned look like the exit of the step before?"""
    if exit is cached:
        return True
    alike = isinstance(exit, torch.Tensor) and exit.shape == cached.shape and exit.dtype == cached.dtype
    return alike and exit.device == cached.device


def check(exit: Any, cached: torch.Tensor, *, finite: bool, where: Mapping[str, object]) -> torch.Tensor:
    """What the adaptor returned, if it may stand in for the exit.

    Args:
        exit: what it returned.
        cached: the exit of the step before, whose shape, dtype and device it must have.
        finite: look for NaN and infinity too; waits for the device.
        where: step, region and adaptor, for the error.

    Raises:
        AdaptorError: it may not.
    """
    if not isinstance(exit, torch.Tensor) or not fits(exit, cached):
        raise AdaptorError(
            "an adaptor returns a tensor like the region's exit",
            seen={"exit": _describe(cached), "returned": _describe(exit), **_words(where)},
            do="make the adaptor's output fit Region.exit",
        )
    if finite and not bool(torch.isfinite(exit).all()):
        raise AdaptorError(
            "an adaptor returns finite numbers", seen=_words(where), do="train it longer, or with float32"
        )
    return exit


def _words(where: Mapping[str, object]) -> dict[str, object]:
    """For the error; in the passes that have none, nothing is put into words."""
    words = dict(where)
    if isinstance(region := words.get("region"), Region):
        words["region"] = region.line
    return words | {"adaptor": type(words["adaptor"]).__name__}


def owned(exit: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
    """What the adaptor returned, in memory that is ours: it may write its next output over this one.

    Such writes leave no mark where tensors keep no count of them: in inference mode, by CUDA graphs, through `.data`.
    """
    return exit if exit is cached else exit.clone()


def masked_mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the unmasked tokens of each row; zero where all are masked. Does not wait for the device.

    Args:
        tokens: (B, L, D).
        mask: (B, L), or (b, L) where each row serves B/b rows of tokens. True or above zero where a token counts; or
            what is added to attention scores, 0 where a token counts and far below where it does not. Of numbers that
            are all zero, every token counts.

    Returns:
        (B, D).

    Example:
        >>> masked_mean(torch.tensor([[[2.0], [4.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
        tensor([[3.]])
    """
    if mask.dtype != torch.bool:
        mask = torch.where(mask.max() > 0, mask > 0, mask > -1)
    if mask.shape[0] != tokens.shape[0]:
        mask = mask.repeat_interleave(tokens.shape[0] // mask.shape[0], 0)
    keep = mask.to(tokens)[:, :, None]
    return (tokens * keep).sum(1) / keep.sum(1).clamp(min=1)


def scalar(value: Any, device: torch.device) -> torch.Tensor:
    """A time as a float32 tensor of shape (); of several rows the first one's."""
    if isinstance(value, torch.Tensor):
        return value.detach().reshape(-1)[0].to(device, torch.float32)
    return torch.full((), float(value), device=device)  # a kernel: nothing to wait for


def _keywords(adaptor: Adaptor, arguments: AdaptorInputs) -> dict[str, Any]:
    named = {"time": arguments.time, "text": arguments.text}
    for name in needs_of(adaptor):
        named[name] = getattr(arguments, name)
    return named


class _Function(nn.Module):
    """An adaptor that is no module, as one: for the recorder."""

    def __init__(self, function: Adaptor) -> None:
        super().__init__()
        self._function = (function,)  # a tuple: whatever it is, it is no submodule
        self.needs = needs_of(function)

    def forward(self, entry: Any, exit_cached: Any, **options: Any) -> Any:
        return self._function[0](entry, exit_cached, **options)


def _describe(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{shape(value.shape)} {value.dtype} {value.device}"
