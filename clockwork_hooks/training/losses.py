"""What an adaptor is trained to make small.

The paper compares features. Under classifier-free guidance the sampler sees `e_u + g (e_c - e_u)`, which multiplies
the *difference* between the two branches' errors; so errors of the guided combination, of the features or of the
UNet's output, are what counts. These two losses are this library's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clockwork_hooks.errors import ArgumentError, DistillError, is_number

Scale = float | Sequence[float] | None
Guidance = Scale | Callable[[int, float | None], Scale]
Weights = tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One adaptor step: what the student did and what the teacher did, a tensor for each call of the UNet.

    Attributes:
        features: what the adaptor returned, with gradient.
        exits: the region's true exits.
        outputs: what the UNet returned with the features, with gradient; empty unless the loss needs them.
        true_outputs: what the UNet returns in full passes; likewise.
        branches: number of each call's branch: equal for calls with the same conditions.
        weights: the guided output is the sum of the branches' outputs with these weights; None without guidance, or
            where only one branch was called.
    """

    features: Sequence[Tensor]
    exits: Sequence[Tensor]
    outputs: Sequence[Tensor]
    true_outputs: Sequence[Tensor]
    branches: Sequence[int]
    weights: Weights


Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss: the sum of mean squared differences of (student's, teacher's) pairs.

    Attributes:
        name: how it is selected and printed.
        pairs: outcome → pairs of tensors; the last pair is the one whose relative error is reported.
        needs_output: it looks at outputs, so the UNet's high-resolution half runs, with gradient.
        needs_guidance: it looks at `Outcome.weights`, so the guidance has to be known.
    """

    name: str
    pairs: Callable[[Outcome], Pairs]
    needs_output: bool = False
    needs_guidance: bool = False

    def __call__(self, outcome: Outcome) -> tuple[Tensor, Tensor]:
        """The loss, and (2,): squared error and squared norm of what is reported; both without a wait."""
        pairs = self.pairs(outcome)
        differences = [_wide(student) - _wide(teacher) for student, teacher in pairs]
        loss = torch.stack([difference.square().mean() for difference in differences]).sum()
        with torch.no_grad():
            sizes = torch.stack([differences[-1].detach().square().sum(), _wide(pairs[-1][1]).square().sum()])
        return loss, sizes


def _feature(outcome: Outcome) -> Pairs:
    return [(_flat(outcome.features), _flat(outcome.exits))]


def _guided_feature(outcome: Outcome) -> Pairs:
    return [*_feature(outcome), _combined(outcome, outcome.features, outcome.exits)]


def _guided_output(outcome: Outcome) -> Pairs:
    return [_combined(outcome, outcome.outputs, outcome.true_outputs)]


def _combined(outcome: Outcome, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return guided(student, outcome.branches, outcome.weights), guided(teacher, outcome.branches, outcome.weights)


LOSSES = {
    "feature": Loss("feature", _feature),
    "guided-feature": Loss("guided-feature", _guided_feature, needs_guidance=True),
    "guided-output": Loss("guided-output", _guided_output, needs_output=True, needs_guidance=True),
}


def loss_of(loss: str | Loss | None, *, with_guidance: bool) -> Loss:
    """The loss that `distill(loss=...)` means; None for the best that can be had.

    Args:
        loss: a name in `LOSSES`, a `Loss`, or None: "guided-output" where the guidance is known, else "feature".
        with_guidance: is the guidance known?

    Raises:
        ArgumentError: there is no such loss, or it needs the guidance.
    """
    if loss is None:
        loss = "guided-output" if with_guidance else "feature"
    chosen = loss if isinstance(loss, Loss) else LOSSES.get(loss) if isinstance(loss, str) else None
    if chosen is None:
        raise ArgumentError(
            "a loss has a name, or is a Loss", seen={"loss": repr(loss)}, do=f"pass one of {', '.join(LOSSES)}"
        )
    if chosen.needs_guidance and not with_guidance:
        raise ArgumentError(
            "a guided loss needs the guidance: how the sampler combines its branches",
            seen={"loss": chosen.name, "guidance": None},
            do="pass guidance=7.5 (the scale), or guidance=(1.0,) where there is one branch; or loss='feature'",
        )
    return chosen


def guidance_of(guidance: Guidance) -> Callable[[int, float | None], Weights] | None:
    """Step and time → weights of the branches there; None where nothing is known of the guidance.

    Raises:
        ArgumentError: it is neither a scale, nor weights, nor a function that returns such; a function's values are
            looked at when they are asked for.

    Example:
        >>> weights = guidance_of(lambda step, time: 4.0 if 200 < time < 800 else None)
        >>> weights(1, 900.0), weights(2, 700.0)
        (None, (-3.0, 4.0))
    """
    if callable(guidance):
        return lambda step, time: guidance_weights(guidance(step, time))
    weights = guidance_weights(guidance)
    return None if weights is None else lambda step, time: weights


def guidance_weights(guidance: Scale) -> Weights:
    """The weights of the guidance branches, in the order of the sampler's calls or of the batch's parts.

    Args:
        guidance: the scale g of e_u + g (e_c - e_u), unconditional branch first: weights (1 - g, g); or the weights
            themselves, (g, 1 - g) where the conditional branch comes first; None where nothing is known.

    Raises:
        ArgumentError: it is neither.

    Example:
        >>> guidance_weights(4.0), guidance_weights((4.0, -3.0))
        ((-3.0, 4.0), (4.0, -3.0))
    """
    if guidance is None:
        return None
    if is_number(guidance):
        return (1.0 - guidance, float(guidance))
    numbers: list[Any] = list(guidance) if isinstance(guidance, (list, tuple)) else []
    if not numbers or not all(map(is_number, numbers)):
        raise ArgumentError(
            "guidance is a finite scale, or a weight for each branch, or a function (step, time) → such",
            seen={"guidance": repr(guidance)},
            do="pass guidance=7.5, or guidance=(-6.5, 7.5): weights in the order of the branches",
        )
    return tuple(map(float, numbers))


def guided(calls: Sequence[Tensor], branches: Sequence[int], weights: Weights) -> Tensor:
    """The guided combination of what one step's calls gave, flat.

    Calls that share their conditions (or a single call) hold all branches, as equal parts of the batch; calls with
    as many different conditions as there are weights are the branches.

    Args:
        calls: (branches * B, ...) or (B, ...) each.
        branches: number of each call's branch.
        weights: of the branches; None for what the calls gave as it is.

    Raises:
        DistillError: which branch is which is not clear.
    """
    if weights is None:
        return _flat(calls)
    count, kinds = len(weights), list(dict.fromkeys(branches))
    if len(kinds) == 1 and all(len(tensor) % count == 0 for tensor in calls):
        return torch.cat([_weigh(tensor.chunk(count), weights).flatten() for tensor in calls])
    groups = [[t for t, b in zip(calls, branches, strict=True) if b == kind] for kind in kinds]
    if len(kinds) == count and len({len(group) for group in groups}) == 1:
        return torch.cat([_weigh(parts, weights).flatten() for parts in zip(*groups, strict=True)])
    raise DistillError(
        "guidance has a weight for each branch: each a call of its own, or an equal part of the batch",
        seen={"weights": weights, "calls in a step": len(calls), "branches seen": len(kinds)},
        do="pass guidance=(w1, w2, ...) with a weight for each branch, guidance=lambda step, time: ... where they are "
        "not the same in all steps, or loss='feature'",
    )


def _weigh(parts: Sequence[Tensor], weights: tuple[float, ...]) -> Tensor:
    total = _wide(parts[0]) * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total = total + weight * _wide(part)
    return total


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: half precision cannot hold a mean of squares, and float64 is not rounded."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _flat(calls: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in calls]) if len(calls) > 1 else calls[0].flatten()
