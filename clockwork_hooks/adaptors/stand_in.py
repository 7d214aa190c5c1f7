"""What stands in for a region: its signature, the identity, what users may pass as one; and how a pass calls it.

A pass sees that an adaptor, and what it returns, fit the region before the UNet sees it.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn

from clockwork_hooks import adaptors
from clockwork_hooks._numbers import shape
from clockwork_hooks._tree import copied, version
from clockwork_hooks.errors import AdaptorError, ArgumentError, OtherStepsWarning, is_several, is_whole, warn
from clockwork_hooks.graph.operators import node_macs
from clockwork_hooks.graph.tracing import recording
from clockwork_hooks.regions.region import Region
from clockwork_hooks.schedule import Schedule

if TYPE_CHECKING:
    from clockwork_hooks.clock.timeline import Feature


@runtime_checkable
class Adaptor(Protocol):
    """Predicts a region's exit from its entry and from what the region emitted one step before.

    Any module (or function) with this signature will do. The paper's φ_θ(r_in(t), r_out(t+1), t_emb, text_emb).
    One that takes more says so by an attribute `needs`: names of `AdaptorInputs` beyond the four, which are then
    passed by keyword, as in `needs = frozenset({"entry_cached"})`. One that needs "prepared" has a method
    `prepare(times, exit_cached)` for what follows from the times alone: it is called before a pass wherever the times
    are known as numbers, and what it returns (tensors, or tuples of them) takes the place of the positions; after None
    they are passed as ever. `times` are `position`, `position_cached`, and, if the trend is needed, the two of
    `trend_positions`.

    Example:
        >>> class Blend(torch.nn.Module):
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         self.mix = torch.nn.Conv2d(2 * channels, channels, 1)
        ...
        ...     def forward(self, entry, exit_cached, *, time, text):
        ...         return self.mix(torch.cat([entry, exit_cached], 1))

    Source: arXiv 2312.08128, Sec. 4.2.
    """

    def __call__(
        self,
        entry: torch.Tensor | None,
        exit_cached: torch.Tensor,
        *,
        time: torch.Tensor | None,
        text: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the exit.

        Args:
            entry: what flows into the region now (r_in), as in `Region.entry.shape`; None where it cannot be picked
                up (`Region.inputs` lists what can).
            exit_cached: what the region emitted one step before (r_out), as in `Region.exit.shape`.
            time: the side input that comes from the time, usually its embedding, (B, D); None where there is none.
            text: the embedding of another condition, usually the text's: a pooled vector (B, D) where there is one, or
                the mean of the unmasked tokens where a mask comes with them; else the tokens, (B, L, D); or None.

        Returns:
            The exit, with `exit_cached`'s shape, dtype and device.
        """
        ...


class AdaptorInputs(NamedTuple):
    """All that an adaptor can be given in one call.

    Attributes:
        entry, exit_cached, time, text: as `Adaptor` takes them.
        entry_cached: what flowed into the region one step before, when it emitted `exit_cached`; shaped as `entry`.
            Where nothing of it was kept, the pass is full.
        position: the UNet's time input of this call, as it was passed, float32 of shape (): which step it is.
        position_cached: likewise of the call that `exit_cached` comes from: how far the two are apart. None where the
            UNet takes no time.
        trend: what the region emitted in the last full pass less what it emitted in the full pass before that one;
            shaped as `exit_cached`, and without gradients. None in a trajectory that had one full pass so far (compiled
            and captured: zero, and its positions are one and the same); where it is missing for another reason, the
            pass is full.
        trend_positions: the UNet's time input of these two full passes, the last one's first, float32 of shape (2,).
        prepared: what the adaptor's `prepare` returned for this call; None where it was not called.

    Example:
        >>> inputs = AdaptorInputs(None, torch.zeros(1, 4, 8, 8), None, None, None, torch.tensor(981.0))
        >>> inputs.position
        tensor(981.)
    """

    entry: torch.Tensor | None
    exit_cached: torch.Tensor
    time: torch.Tensor | None
    text: torch.Tensor | None
    entry_cached: torch.Tensor | None = None
    position: torch.Tensor | None = None
    position_cached: torch.Tensor | None = None
    trend: torch.Tensor | None = None
    trend_positions: torch.Tensor | None = None
    prepared: Any = None


def needs_of(adaptor: Any) -> frozenset[str]:
    """What an adaptor takes beyond the four inputs of `Adaptor`: names of `AdaptorInputs`.

    Example:
        >>> needs_of(IdentityAdaptor())
        frozenset()
    """
    return frozenset(getattr(adaptor, "needs", ()))


class IdentityAdaptor(nn.Module):
    """Returns what the region emitted one step before: no parameters, no MACs.

    Example:
        >>> cached = torch.ones(1, 4, 8, 8)
        >>> IdentityAdaptor()(None, cached, time=None, text=None) is cached
        True

    Source: arXiv 2312.08128, Sec. 4.2 ("identity adaptor") and Tab. 3.
    """

    needs: frozenset[str] = frozenset()  # a module asked for an attribute that it lacks takes 3 µs to say so

    def forward(
        self,
        entry: torch.Tensor | None,
        exit_cached: torch.Tensor,
        *,
        time: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return `exit_cached` itself."""
        return exit_cached


AdaptorLike = Adaptor | str | os.PathLike[str] | None


def is_identity(adaptor: Any) -> bool:
    """Is this the identity, in one of the ways to say it?"""
    return adaptor is None or (isinstance(adaptor, str) and adaptor == "identity") or type(adaptor) is IdentityAdaptor


def resolve_adaptor(adaptor: AdaptorLike) -> Adaptor:
    """The adaptor that a user's value stands for.

    Args:
        adaptor: None or "identity"; the folder of a saved adaptor, as text or a path, or its id on the Hugging Face
            Hub; or a module or function that follows `Adaptor`, which is returned as it is.

    Returns:
        The adaptor; a saved one on the CPU, in evaluation mode.

    Raises:
        AdaptorError: it is none of these, or what is saved there cannot be loaded.

    Example:
        >>> resolve_adaptor("identity")
        IdentityAdaptor()
    """
    if isinstance(adaptor, (str, os.PathLike)) and not is_identity(adaptor):
        return adaptors.LearnedAdaptor.from_pretrained(adaptor)  # imported now: huggingface_hub comes with it
    if is_identity(adaptor):
        return adaptor if isinstance(adaptor, IdentityAdaptor) else IdentityAdaptor()
    if isinstance(adaptor, type) or not callable(adaptor):
        raise AdaptorError(
            'an adaptor is None, "identity", the folder of a saved one, or a module called as '
            "adaptor(entry, exit_cached, time=..., text=...)",
            seen={"adaptor": repr(adaptor)[:80]},
            do="pass one of these; a clock is passed by name: clock=2",
        )
    _check_needs(adaptor)
    _check_signature(adaptor)
    return adaptor


_MORE = AdaptorInputs._fields[4:]


def _check_needs(adaptor: Any) -> None:
    needs = getattr(adaptor, "needs", ())
    if not is_several(needs) or any(name not in _MORE for name in needs):
        raise AdaptorError(
            f"an adaptor's `needs` are some of {', '.join(_MORE)}",
            seen={"adaptor": repr(adaptor)[:80], "needs": repr(needs)[:80]},
            do='write needs = frozenset({"entry_cached"})',
        )
    if "prepared" in needs and not callable(getattr(adaptor, "prepare", None)):
        raise AdaptorError(
            'an adaptor that needs "prepared" has a method prepare(times, exit_cached)',
            seen={"adaptor": repr(adaptor)[:80], "prepare": getattr(adaptor, "prepare", None)},
            do='write the method, or leave "prepared" out of its `needs`',
        )


def _check_signature(adaptor: Any) -> None:
    """Said here, a wrong signature costs no run; it is not asked of what has none (C functions)."""
    try:
        signature = inspect.signature(adaptor.forward if isinstance(adaptor, nn.Module) else adaptor)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, None, **dict.fromkeys(("time", "text", *needs_of(adaptor))))
    except TypeError as error:
        raise AdaptorError(
            "an adaptor is called as adaptor(entry, exit_cached, time=..., text=...), with more arguments if its "
            "`needs` names them",
            seen={"adaptor": repr(adaptor)[:80], "its arguments": signature, "error": error},
            do="write a module whose forward(self, entry, exit_cached, *, time, text) returns the exit",
        ) from error


class Past(NamedTuple):
    """What an adaptor is given of earlier steps beside the exit; see `AdaptorInputs`."""

    entry: torch.Tensor | None = None
    position: torch.Tensor | None = None
    trend: torch.Tensor | None = None
    trend_positions: torch.Tensor | None = None

    @classmethod
    def of(cls, feature: Feature, *, times: bool = True) -> Past:
        """What is kept beside a feature; without the times for an adaptor that has prepared what follows from them."""
        trail, told = feature.trail, feature.told if times else None
        trend = None if trail is None else trail.trend
        positions = trail.positions if trail is not None and times else None
        return cls(feature.entry, None if told is None else told.tensor(feature.exit.device), trend, positions)


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
                    "an adaptor must not write to tensors that the UNet uses after it",
                    seen={"written to": name, **_words(where)},
                    do="let it write to a copy, such as entry.clone(); a layer with inplace=True writes to its input",
                )


def inputs(
    captured: Mapping[str, torch.Tensor | None],
    exit_cached: torch.Tensor,
    past: Past = Past(),  # noqa: B008 - a tuple
    position: torch.Tensor | None = None,
    prepared: Any = None,
) -> AdaptorInputs:
    """What an adaptor is given, of what a pass picked up at the boundary.

    Args:
        captured: "entry", "time", "text", "mask", as far as they came.
        exit_cached: what the region emitted one step before.
        past: what is known of earlier steps.
        position: the UNet's time input now, float32 of shape ().
        prepared: what the adaptor has prepared for the call.
    """
    text, mask = captured.get("text"), captured.get("mask")
    if text is not None and mask is not None:
        text = masked_mean(text, mask)
    return AdaptorInputs(
        captured.get("entry"), exit_cached, captured.get("time"), text, past.entry, position, *past[1:], prepared
    )


def call(adaptor: Adaptor, arguments: AdaptorInputs) -> Any:
    """Call the adaptor with what it takes: the four of `Adaptor`, and what its `needs` name."""
    return adaptor(arguments.entry, arguments.exit_cached, **_keywords(adaptor, arguments))


def as_module(adaptor: Adaptor) -> nn.Module:
    """The adaptor as what can be recorded: one that is no module is put into one."""
    return adaptor if isinstance(adaptor, nn.Module) else _Function(adaptor)


def count_and_call(adaptor: Adaptor, arguments: AdaptorInputs) -> tuple[Any, int]:
    """`call`, recorded: also the MACs that the adaptor took."""
    module = as_module(adaptor)
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
        warn(
            "an adaptor works best at the steps that it was made for: "
            f"{type(adaptor).__name__} was made for {' or '.join(map(str, own))}"
            + (f" of {steps} steps" if steps else "")
            + f", and runs at {schedule}\nWhat to do: leave schedule= and clock= out, or calibrate or train one for "
            "this schedule",
            OtherStepsWarning,
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
    return alike and exit.device == cached.device and exit.layout == cached.layout


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
            "an adaptor must return a tensor like the region's exit",
            seen={"exit": _describe(cached), "returned": _describe(exit), **_words(where)},
            do="make the adaptor's output fit Region.exit",
        )
    if finite and not bool(torch.isfinite(exit).all()):
        raise AdaptorError(
            "an adaptor must return finite numbers", seen=_words(where), do="train it longer, or with float32"
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


def _keywords(adaptor: Adaptor, arguments: AdaptorInputs) -> dict[str, Any]:
    named = {"time": arguments.time, "text": arguments.text}
    for name in needs_of(adaptor):
        named[name] = getattr(arguments, name)
    return named


class _Function(nn.Module):
    def __init__(self, function: Adaptor) -> None:
        super().__init__()
        self._function = (function,)  # a tuple: whatever it is, it is no submodule
        self.needs = needs_of(function)

    def forward(self, entry: Any, exit_cached: Any, **options: Any) -> Any:
        return self._function[0](entry, exit_cached, **options)


def _describe(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    layout = "" if value.layout == torch.strided else f" {value.layout}"
    return f"{shape(value.shape)} {value.dtype} {value.device}{layout}"
