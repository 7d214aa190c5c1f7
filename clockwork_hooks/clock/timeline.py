"""Which denoising step is this call, and may the features of the step before serve it?

The UNet's time input tells: a changed value is a new step, a value that runs backwards is a new trajectory. Every
other input tells the branch, and the calls of one branch within a step are numbered: the k-th is served by the k-th
of the step before. Where the answer is in doubt the position says why, and the wrapper takes a full pass.

What is remembered of a guidance branch: its conditions, and what the region emitted in each of its calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from clockwork_hooks.clock import reasons
from clockwork_hooks.clock.conditions import Conditions, Seen
from clockwork_hooks.clock.times import Place

__all__ = ["Branch", "Call", "Kept", "Position", "Timeline"]


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


_FAR = 4.0
_MOST_CALLS = 128
_MOST_COMPARED = 2


@dataclass(slots=True)
class Position:
    """Where a call is.

    Attributes:
        trajectory: number of the trajectory; 0 for a call that belongs to none.
        step: denoising step of the trajectory, from 1.
        branch: what its conditions tell.
        ordinal: which call of the branch in this step, from 0.
        call: where its own exit is remembered.
        before: the same call of the step before; None if there is none.
        doubt: why that one may not serve; None where it may.
    """

    trajectory: int
    step: int
    branch: Branch
    ordinal: int
    call: Call
    before: Call | None = None
    doubt: str | None = None

    @property
    def scheduled(self) -> str:
        """Why a full step is full. In a first step doubts count: a call that cannot be placed never gets beyond it."""
        return reasons.SCHEDULED if self.step > 1 else self.doubt or reasons.FIRST


@dataclass(slots=True)
class Timeline:
    """The steps and branches of one thread or task; `at` is called once per call of the UNet.

    Attributes:
        numbers: where the numbers of trajectories come from; shared by the timelines of one wrapper.
        trajectory: number of the trajectory.
        step: its last step, from 1; 0 before the first.
        declared: are steps told by `declare`, and not by the time?
        opened: has one been, and no call come since? Its time matters, of declared steps no other.
        names: names of branches that the caller has opened, innermost last.
        branches: the branches of this step and of the step before.
    """

    numbers: Iterator[int] = field(default_factory=itertools.count(1).__iter__)
    trajectory: int = 0
    step: int = 0
    declared: bool = False
    names: list[str] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    mark: Place | None = None
    opened: bool = False
    way: int = 0
    _time: float | None = None
    _first: float | None = None
    _direction: int = 0
    _before: int = 0  # direction of the trajectory before
    _strides: tuple[float, ...] = ()
    _far: float = 0.0
    _place: Place | None = None
    _start: Place | None = None
    _jump: int | None = None
    _doubt: str | None = None
    _calls: int = 0
    _seen: int = 0
    _compared: int = 0

    def reset(self) -> None:
        """The next call begins a trajectory; what was kept is let go."""
        self.step, self.declared, self.opened = 0, False, False
        self._time, self._first, self._direction, self._strides, self._far = None, None, 0, (), 0.0
        self._before = 0
        self._place, self._start, self._jump = None, None, None
        self._doubt, self._calls, self._seen, self._compared = None, 0, 0, 0
        self.branches, self.mark, self.way = [], None, 0

    def declare(self, mark: Place | None = None, *, start: Place | None = None) -> None:
        """A new step begins now, whatever the time input says; from here on the caller declares all steps.

        Args:
            mark: the caller is a scheduler, and this is where it stands in its list.
            start: and the step began there, if not here.
        """
        if not self.declared:
            self.reset()
        self.mark = mark
        self.declared, self.opened, self._start = True, True, start or mark
        self._advance()

    def at(
        self,
        time: float | None,
        place: Place | None,
        conditions: Sequence[Any],
        *,
        has_time: bool = True,
    ) -> Position:
        """Place a call.

        Args:
            time: its time; None if that cannot be told.
            place: where it stands in its list, if it comes from one.
            conditions: every input but the sample and the time.
            has_time: does the UNet have a time input at all?
        """
        if self.declared:
            self._check_declared(time)
        elif time is None:
            self.reset()
            return self.nowhere(reasons.UNREADABLE if has_time else reasons.NO_TIME)
        else:
            self._tick(time, place)
        self._calls += 1
        if self._calls > _MOST_CALLS:
            self.branches.clear()
            return self.nowhere(reasons.CROWDED)
        branch = self._branch(conditions)
        if branch.step != self.step:
            branch.enter(self.step, declared=self.declared, placed=self.mark is not None)
        if conditions and branch.seen.renewed(conditions):
            if self._calls == 1:
                self._begin_again(time, place)
                return self.at(time, place, conditions, has_time=has_time)
            self._doubt = reasons.RENEWED  # calls of this step have been counted already
        here = self.mark if self.declared else place
        call, ordinal = Call(here.index - self._start.index if here and self._start else 0), len(branch.calls)
        branch.calls.append(call)
        before = branch.before[ordinal] if ordinal < len(branch.before) else None
        doubt = self._doubt or branch.doubt
        if self.step > 1 and branch.before and not doubt:
            if before is None:
                doubt = reasons.AGAIN
                self._doubt = None if self.declared else doubt  # this time comes twice: who missed the first one?
            elif before.offset != call.offset:
                doubt = reasons.APART
        return Position(self.trajectory, self.step, branch, ordinal, call, before, doubt)

    def nowhere(self, doubt: str) -> Position:
        """A call of which nothing is remembered."""
        number = self.trajectory if self.step else 0
        return Position(number, max(self.step, 1), Branch(0, None, Conditions(())), 0, Call(), None, doubt)

    # -- steps ---------------------------------------------------------------------------------------------------

    def _tick(self, time: float, place: Place | None) -> None:
        """Find out whether the step goes on, the next one begins, or the next trajectory."""
        if self._time is None:
            self._begin(time, place)
            return
        change, held = time - self._time, self._place
        # entries of the list since the time before; 0 where neither is in a list, None in another list or in one
        jump = None if place is not held else 0
        if place is not None and held is not None:
            jump = place.index - held.index if place.times is held.times or place.times == held.times else None
        if change == 0 and jump is not None:
            self._place = place
            return
        direction = (change > 0) - (change < 0)
        stride = abs(change)
        backwards = self._direction and direction != self._direction
        # one trajectory takes its list's entries in turn; another list is another trajectory's
        regular = jump == 0 or (jump is not None and (jump == self._jump or (self.step == 1 and abs(jump) == 1)))
        if change == 0 or backwards or not regular or (self._far and stride > _FAR * self._far):
            self._begin(time, place, jump, before=self._direction)
            return
        if not jump and self._before not in (0, direction) and self.step == 1:  # its first step was another one's last
            self._begin(time, place, jump)
            return
        known = self._direction != 0 or direction < 0 or bool(jump)
        even = bool(jump) or _even((*self._strides, stride))
        self._time, self._place, self._direction, self._jump = time, place, direction, jump
        self._strides, self._far = (*self._strides, stride)[-2:], max(self._far, stride)
        self._advance()
        self._start = place
        self._doubt = self._doubt or (None if known else reasons.DIRECTION) or (None if even else reasons.STRIDE)

    def _begin(self, time: float, place: Place | None, jump: int | None = None, *, before: int = 0) -> None:
        self.reset()
        self._before = before
        self._time, self._place, self._start, self._jump = time, place, place, jump
        self._advance()

    def _begin_again(self, time: float | None, place: Place | None) -> None:
        """This very call begins a trajectory; of declared steps, if those before it were."""
        if not self.declared:
            assert time is not None  # else it would have no place
            self._begin(time, place)
            return
        mark, way = self.mark, self.way
        self.reset()
        self.declared, self._time, self._first, self.mark, self.way, self._start = True, time, time, mark, way, mark
        self._advance()

    def _check_declared(self, time: float | None) -> None:
        """Declared steps may take any time, but one that went back is not served by the step before."""
        if not self.opened:
            return
        self.opened = False
        if time is None or self._time is None or time == self._time:
            self._time = self._time if time is None else time
            self._first = self._time if self._first is None else self._first
            return
        direction = 1 if time > self._time else -1
        self._time = time
        if self._direction in (0, direction):
            self._direction = direction
        elif self._first is not None and (time - self._first) * self._direction <= 0:  # back where it began
            self._begin_again(time, None)
        else:
            self._doubt = reasons.BACKWARDS

    def _advance(self) -> None:
        """A new step: what was not called in the step before is forgotten."""
        self._doubt = reasons.CROWDED if self._calls > _MOST_CALLS else None
        self._calls = 0
        if len(self.branches) != 1 or self.branches[0].step != self.step:
            self.branches = [branch for branch in self.branches if branch.step == self.step]
        self.trajectory = self.trajectory if self.step else next(self.numbers)
        self.step += 1

    # -- branches ------------------------------------------------------------------------------------------------

    def _branch(self, conditions: Sequence[Any]) -> Branch:
        name = self.names[-1] if self.names else None
        if name is not None:
            conditions = ()
        for branch in self.branches:
            if branch.name == name and branch.conditions.same(conditions):
                return branch
        found = self._equal([branch for branch in self.branches if branch.name == name], conditions)
        if found is None:
            self._seen += 1
            found = Branch(self._seen, name, Conditions(conditions))
            self.branches.append(found)
        return found

    def _equal(self, named: Sequence[Branch], conditions: Sequence[Any]) -> Branch | None:
        """New objects on a device may have the values of old ones; given up after some that did not."""
        if self.step == 1 or self._compared >= _MOST_COMPARED:
            return None
        for branch in named:
            if branch.conditions.equal(conditions):
                branch.conditions = Conditions(conditions)
                return branch
        self._compared += bool(named)
        return None


def _even(strides: tuple[float, ...]) -> bool:
    """Is the last stride like the two before it, where those two are alike?"""
    if len(strides) < 3:
        return True
    one, two, last = strides[-3:]
    slack = max(0.02 * two, 1.01 if min(strides) >= 2 else 0.0)  # times rounded to integers
    return abs(one - two) > slack or abs(last - two) <= 2 * slack
