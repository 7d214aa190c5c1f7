"""What is remembered of a guidance branch: its conditions, and what the region emitted in each of its calls."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

from clockwork_hooks import reasons
from clockwork_hooks.conditions import Conditions, Seen

__all__ = ["Branch", "Call", "Kept"]


@dataclass(slots=True)  # frozen would take microseconds at every call
class Kept:
    """What the region emitted in a call; never changed.

    Attributes:
        key: input signature and modes of the call.
        exit: the tensor.
        version: its counter of in-place writes, when it was kept.
        weights: state of the UNet's weights in the call.
    """

    key: Hashable
    exit: torch.Tensor
    version: int
    weights: Hashable


@dataclass(slots=True, eq=False)
class Call:
    """One call of a branch.

    Attributes:
        offset: entries of the list of times from the step's first call to this one; 0 where there is no list.
        kept: for the same call of the step after it; None if nothing may be used.
        missing: why there is none.
        inner: the same for the regions inside of that one that have clocks of their own.
        entry: where the schedule decides at run time, the entry of the last full pass.
        age: and how many adaptor passes came since.
    """

    offset: int = 0
    kept: Kept | None = None
    missing: str = reasons.NOT_KEPT
    inner: tuple[Call, ...] = ()
    entry: torch.Tensor | None = None
    age: int = 0

    def take(self) -> Kept | None:
        """What was kept, which is let go: it serves once."""
        kept, self.kept = self.kept, None
        return kept


@dataclass(slots=True, eq=False)
class Branch:
    """The calls of one trajectory that share their conditions.

    Attributes:
        number: in order of appearance in the trajectory, from 1.
        name: as the caller named it; None where the conditions tell.
        conditions: every input but sample and time.
        seen: the objects that they were.
        step: the last step with a call.
        calls: the calls of that step.
        before: the calls of the step before it.
        doubt: why none of those may serve.
    """

    number: int
    name: str | None
    conditions: Conditions
    seen: Seen = field(default_factory=Seen)
    step: int = 0
    calls: list[Call] = field(default_factory=list)
    before: list[Call] = field(default_factory=list)
    doubt: str | None = None
    _steps: int = 0
    _usual: int = 0
    _last: int = 0
    _regular: bool = True

    @property
    def label(self) -> str:
        """How reports call it."""
        return repr(self.name) if self.name is not None else str(self.number)

    @property
    def nbytes(self) -> int:
        """Memory that it holds: features, each storage once, and copies of conditions."""
        calls = [each for call in (*self.before, *self.calls) for each in (call, *call.inner)]
        kept = [call.kept.exit for call in calls if call.kept is not None]
        kept += [call.entry for call in calls if call.entry is not None]
        storages = map(torch.Tensor.untyped_storage, kept)
        return self.conditions.nbytes + sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def enter(self, step: int, *, declared: bool, placed: bool = False) -> None:
        """The first call of this branch in a step; `placed`: a scheduler declared it, which knows no order of calls."""
        new = self.step == 0
        self.seen.steps += 1
        self.before, self.calls, self.step = self.calls, [], step
        if len(self.before) == self._last == self._usual == 1:  # a call a step so far: there is nothing to tell apart
            self._steps, self.doubt = self._steps + 1, None
            return
        self.doubt = reasons.NEW if new and step > 1 else None
        if not new and not self._countable(placed=placed) and (placed or not declared):
            self.doubt = reasons.COUNT

    def _countable(self, *, placed: bool) -> bool:
        """May the k-th call be told by its number? One call a step always; more, once their number is regular."""
        count, last = len(self.before), self._last
        if placed:  # calls with times of their own are told apart by them
            count = -(-count // len({call.offset for call in self.before}))
        self._steps, self._last = self._steps + 1, count
        if self._steps <= 2:  # the first step may have fewer: Heun's corrections begin with the second
            self._usual = count
        elif count != self._usual:
            self._regular = False
        return count <= 1 or (self._regular and count == last)
