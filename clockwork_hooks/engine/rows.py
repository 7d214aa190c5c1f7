"""Rows of a batch, named by the caller: those that stay are served where others go, or where the order changes.

A row is served from the row of its name in the step right before, if that had the very same conditions. Whether rows of
the UNet's batch see each other cannot be told here: who names them says that they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from clockwork_hooks._tree import version
from clockwork_hooks.clock import reasons
from clockwork_hooks.clock.conditions import Conditions
from clockwork_hooks.clock.timeline import Feature, Position, Timeline
from clockwork_hooks.clock.times import Told
from clockwork_hooks.errors import ArgumentError

# why a call is full where rows may help: it is of no branch of the step before, or of one with another batch
HELPED = frozenset({reasons.NEW, reasons.CHANGED})


@dataclass(slots=True)
class Batch:
    """One call's batch.

    Attributes:
        names: of its rows.
        signature: of its arguments.
        paths: of its conditions.
        exit: shape of the region's exit, for such a call.
    """

    names: tuple[str, ...]
    signature: tuple[Any, ...]
    paths: tuple[str, ...]
    exit: tuple[int, ...]

    def fits(self, sample: Any) -> bool:
        """Has the sample as many rows as there are names?"""
        return _rows_of(sample) == len(self.names)

    def check(self, sample: Any) -> None:
        """Raise `ArgumentError` if the sample has another number of rows."""
        if not self.fits(sample):
            raise ArgumentError(
                "rows= needs one name for each row of the UNet's batch",
                seen={"rows": ", ".join(self.names), "rows of the sample": _rows_of(sample)},
                do="pass as many names as the sample has rows, in their order",
            )

    def alike(self, other: Batch) -> bool:
        """Do the two calls differ in their rows alone, and has the exit as many in each?"""
        rows = len(self.names), len(other.names)
        if self.paths != other.paths or len(self.signature) != len(other.signature):
            return False
        pairs = [*zip(self.signature, other.signature, strict=True), (torch.Size(self.exit), torch.Size(other.exit))]
        whole = (self.exit[0], other.exit[0]) == rows
        return whole and all(one == two or _rows_apart(one, two, rows) for one, two in pairs)


@dataclass(slots=True)
class Rows:
    """What a call with named rows has left for the next step.

    Attributes:
        step: of the trajectory.
        batch: the call's.
        conditions: of the call.
        feature: what the region emitted; None where nothing may be used.
    """

    step: int
    batch: Batch
    conditions: Conditions
    feature: Feature | None

    @staticmethod
    def modes(feature: Feature) -> Any:
        """The modes of the feature's call."""
        return feature.key[1:] if isinstance(feature.key, tuple) else None

    @classmethod
    def remember(cls, timeline: Timeline, place: Position, batch: Batch, feature: Feature | None) -> None:
        """The call is over: keep what it left, and let go of what is older than a step."""
        timeline.rows = [rows for rows in timeline.rows if rows.step >= place.step - 1]
        if place.branch.number:  # else it has no place
            timeline.rows.append(cls(place.step, batch, place.branch.conditions, feature))


def serves(
    timeline: Timeline,
    place: Position,
    batch: Batch,
    values: Sequence[Any],
    key: tuple[Any, ...],
    weights: Any,
) -> Feature | None:
    """What the rows of this batch emitted in the step before, put together; None where one is missing or in doubt.

    Args:
        timeline: of the loop.
        place: of the call.
        batch: the call's.
        values: its conditions.
        key: its input signature and modes.
        weights: state of the UNet's weights.
    """
    exits, entries, features = list[torch.Tensor](), list[torch.Tensor](), list[Feature]()
    for index, name in enumerate(batch.names):
        own = [rows for rows in timeline.rows if rows.step >= place.step - 1 and name in rows.batch.names]
        if len(own) != 1 or own[0].step != place.step - 1:  # it is told by its name once in a step
            return None
        rows, feature = own[0], own[0].feature
        if feature is None or not rows.batch.alike(batch) or feature.trail is not None:
            return None
        if rows.modes(feature) != key[1:] or feature.weights != weights or feature.version != version(feature.exit):
            return None
        row, sizes = rows.batch.names.index(name), (len(rows.batch.names), len(batch.names))
        if not rows.conditions.same_rows(values, [(row, index)], *sizes):
            return None
        exits.append(feature.exit[row : row + 1])
        entries += [] if feature.entry is None else [feature.entry[row : row + 1]]
        features += [] if features and features[-1] is feature else [feature]
    told = features[0].told
    if any(not _at_one_time(told, feature.told) for feature in features[1:]):
        return None
    exit = torch.cat(exits)
    entry = torch.cat(entries) if len(entries) == len(exits) else None
    return Feature(key, exit, version(exit), weights, entry, told=told)


def _at_one_time(one: Told | None, other: Told | None) -> bool:
    return one is other or (one is not None and other is not None and one.same(other))


def _rows_of(sample: Any) -> int | None:
    return sample.shape[0] if isinstance(sample, torch.Tensor) and sample.ndim else None


def _rows_apart(one: Any, other: Any, rows: tuple[int, int]) -> bool:
    """Are these shapes that differ in the batch alone?"""
    sizes = isinstance(one, torch.Size) and isinstance(other, torch.Size) and bool(one) and bool(other)
    return sizes and (one[0], other[0]) == rows and one[1:] == other[1:]
